"""Which model a record is of, without reading gigabytes.

Compared: the values of config.json, the bytes of the tokenizer's file, and of the weights the names, types and shapes
of all tensors, however they are spread over files. The weights' own bytes are not: other weights in the same shapes
show as errors, which is what a comparison is for. Samples of the files are noted, so that a failed comparison can say
whether they differ.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cortexstream.errors import ModelLoadError
from cortexstream.prefix_file import checkpoint_id

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the first there is turns text into ids
NONE = "none"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests are SHA-256 in hexadecimal."""

    architecture: str  # `model_type` of config.json
    config: str
    tokenizer: str  # NONE without a file
    tensors: str  # of the sorted lines "name type shape"
    num_tensors: int
    quantized: bool  # packed integers with scales, by config.json
    samples: str  # `prefix_file.checkpoint_id`; not compared by `differences`

    @classmethod
    def of_folder(cls, folder: Path) -> Fingerprint:
        """Raises ModelLoadError for a folder whose config.json or weights cannot be read."""
        from safetensors import SafetensorError, safe_open

        lines = []
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="numpy") as file:
                    parts = [(name, file.get_slice(name)) for name in file.keys()]  # the file is no mapping
                    lines += [f"{name} {part.get_dtype()} {part.get_shape()}" for name, part in parts]
            samples = checkpoint_id(folder)
            tokenizer = next((path for name in TOKENIZER_FILES if (path := folder / name).is_file()), None)
            tokenizer_digest = NONE if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelLoadError(f"{folder}: config.json or the weights cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise ModelLoadError(f"{folder / 'config.json'}: holds {type(config).__name__}; must hold a JSON object")
        return cls(
            architecture=str(config.get("model_type")), config=_digest(json.dumps(config, sort_keys=True)),
            tokenizer=tokenizer_digest, tensors=_digest("\n".join(sorted(lines))), num_tensors=len(lines),
            quantized="quantization" in config or "quantization_config" in config, samples=samples,
        )  # fmt: skip

    def differences(self, other: Fingerprint) -> list[str]:
        """What makes `other` another model than this one, in words; empty for the same."""
        if self.architecture != other.architecture:
            return [f"architecture ({self.architecture} and {other.architecture})"]
        found = []
        if self.config != other.config:
            found.append("config.json")
        if self.tokenizer != other.tokenizer:
            found.append("the tokenizer's file")
        if self.num_tensors != other.num_tensors:
            found.append(f"the number of tensors ({self.num_tensors} and {other.num_tensors})")
        elif self.tensors != other.tensors:
            found.append("names, types or shapes of tensors")
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Fingerprint:
        """The inverse of `as_json`. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(**{field.name: _typed(field.name, values[field.name]) for field in fields(cls)})


def _typed(name: str, value: Any) -> Any:
    if type(value) is not {"num_tensors": int, "quantized": bool}.get(name, str):
        raise TypeError(f"{name} is {value!r}")
    return value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
