"""A prompt's keys and values as a safetensors file, the same for every backend.

    tokens               int32 [T]
    layers.{i}.keys      float32 [tokens of the layer, KV heads, key_dim], rotary embedding included
    layers.{i}.values    float32 [tokens of the layer, KV heads, value_dim]

A layer with a sliding window has its last `window` tokens. The metadata name the format and the checkpoint that
computed the numbers: another checkpoint's would be read as if they were right.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cortexstream.backend import LayerState
from cortexstream.errors import InvalidRequestError, ModelLoadError

FORMAT = "cortexstream-prefix-1"
SAMPLE_BYTES = 1 << 16  # read from the start, the middle and the end of every weight file


class Prefix(NamedTuple):
    """Tokens, and one entry per layer."""

    tokens: tuple[int, ...]
    layers: list[LayerState]


def checkpoint_id(folder: Path | None) -> str:
    """A digest of config.json and of samples of the weight files: equal for copies of one checkpoint."""
    digest = hashlib.sha256()
    if folder is None:
        return "none"
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in (0, max(0, size // 2), max(0, size - SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def save(path: Path, checkpoint: str, prefix: Prefix) -> int:
    """Write a file, whole or not at all; returns its bytes."""
    from safetensors.numpy import save as as_bytes

    tensors = {"tokens": np.array(prefix.tokens, np.int32)}
    for number, layer in enumerate(prefix.layers):
        tensors[f"layers.{number}.keys"] = np.ascontiguousarray(layer.keys)
        tensors[f"layers.{number}.values"] = np.ascontiguousarray(layer.values)
    data = as_bytes(tensors, {"format": FORMAT, "checkpoint": checkpoint})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise InvalidRequestError("path", f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(data)


def load(path: Path, checkpoint: str) -> Prefix:
    """Read a file. Raises ModelLoadError, with what is wrong and what to do, for a file that is not such a prefix, is
    damaged, or was computed by another checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ModelLoadError(f"{path}: is no saved prefix; make one with save_prefix()")
            if metadata.get("checkpoint") != checkpoint:
                raise ModelLoadError(
                    f"{path}: was computed by another checkpoint than the loaded one; save it again with this one"
                )
            tokens = tuple(file.get_tensor("tokens").tolist())
            number, layers = 0, []
            names = set(file.keys())
            while f"layers.{number}.keys" in names:
                keys, values = (file.get_tensor(f"layers.{number}.{name}") for name in ("keys", "values"))
                if keys.dtype != np.float32 or values.dtype != np.float32:
                    raise ModelLoadError(f"{path}: layer {number} is not float32; save the prefix again")
                if not np.isfinite(keys).all() or not np.isfinite(values).all():
                    raise ModelLoadError(
                        f"{path}: layer {number} has numbers that are not finite; save the prefix again"
                    )
                layers.append(LayerState(keys, values))
                number += 1
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelLoadError(f"{path}: cannot be read as a saved prefix: {error}") from error
    return Prefix(tokens, layers)
