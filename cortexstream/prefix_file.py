"""A prompt's keys and values as a safetensors file, the same for every backend.

    tokens               int32 [T]
    layers.{i}.keys      float32 [tokens of the layer, KV heads, key_dim], rotary embedding included
    layers.{i}.values    float32 [tokens of the layer, KV heads, value_dim]

Quantised ones are three tensors each, as they are stored: `layers.{i}.keys.packed` uint32 [.., key_dim * bits / 32],
`.scales` and `.biases` float32 [.., key_dim / group]. A layer with a sliding window has its last `window` tokens.

The metadata name the format, the checkpoint that computed the numbers and what kind of numbers they are, since others
would give other tokens than computing them again; and a digest of all of it, so that a damaged file is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cortexstream.backend import BackendInfo, KVArray, LayerState, ModelInfo, PackedKV
from cortexstream.errors import InvalidRequestError, ModelLoadError, shown
from cortexstream.files import write_whole

FORMAT = "cortexstream-prefix-2"
SAMPLE_BYTES = 1 << 12
WHOLE_BYTES = 1 << 28
PARTS = PackedKV._fields

Tensors = dict[str, npt.NDArray[Any]]


class Origin(NamedTuple):
    """Where numbers come from: a digest of the checkpoint, and their kind in words. Both must agree to the letter."""

    checkpoint: str
    numbers: str


class Prefix(NamedTuple):
    """Tokens, and one entry per layer."""

    tokens: tuple[int, ...]
    layers: list[LayerState]


def checkpoint_id(folder: Path | None) -> str:
    """A digest of config.json and of every tensor: of its name, type and shape, and of SAMPLE_BYTES at its start, its
    middle and its end, or of all of it in files of up to WHOLE_BYTES. Equal for copies of one checkpoint. A larger one
    of which only numbers between the samples differ is not told apart."""
    if folder is None:
        return "none"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            header_bytes = int.from_bytes(file.read(8), "little")
            header = file.read(header_bytes)
            digest.update(header)
            for name, tensor in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    for start in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
                        file.seek(8 + header_bytes + start)
                        digest.update(file.read(min(SAMPLE_BYTES, end - start)))
    return digest.hexdigest()


def kind_of_numbers(info: BackendInfo, model: ModelInfo) -> str:
    """What keys and values are computed in and stored as."""
    if model.kv_quantization is None:
        return info.dtype
    bits, group = model.kv_quantization
    return f"int{bits} in groups of {group}, of {info.dtype}"


def save(path: Path, origin: Origin, prefix: Prefix) -> int:
    """Write a file, whole or not at all, whoever else writes it; returns its bytes. Raises InvalidRequestError."""
    from safetensors.numpy import save as as_bytes

    tensors: Tensors = {"tokens": np.array(prefix.tokens, np.int32)}
    for number, layer in enumerate(prefix.layers):
        for name, array in layer._asdict().items():
            tensors |= _named(f"layers.{number}.{name}", array)
    metadata = {"format": FORMAT, **origin._asdict()}
    data = as_bytes(tensors, {**metadata, "digest": _digest(metadata, tensors)})
    write_whole("path", path, data)
    return len(data)


def load(path: str | Path, origin: Origin) -> Prefix:
    """Read a file. Raises InvalidRequestError for a path that is none, and ModelLoadError, with what is wrong and what
    to do, for a file that is not such a prefix, is damaged, or was computed by another checkpoint or in other
    numbers."""
    from safetensors import SafetensorError, safe_open

    if not isinstance(path, str | Path):
        raise InvalidRequestError("path", f"is {shown(path)}; it must be a str or a Path")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            _check_metadata(path, metadata, origin)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except ModelLoadError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ModelLoadError(f"{path}: cannot be read as a saved prefix: {error}") from error
    if metadata.pop("digest", None) != _digest(metadata, tensors):
        raise ModelLoadError(f"{path}: is damaged: its contents do not fit their digest; save the prefix again")
    tokens = tensors.pop("tokens", None)
    if tokens is None or tokens.dtype != np.int32 or tokens.ndim != 1:
        raise ModelLoadError(f"{path}: has no list of int32 tokens; save the prefix again")
    return Prefix(tuple(tokens.tolist()), _layers(path, tensors))


def _named(name: str, array: KVArray) -> Tensors:
    parts = dict(zip(PARTS, array, strict=True)) if isinstance(array, PackedKV) else {"": array}
    return {f"{name}.{part}".rstrip("."): np.ascontiguousarray(value) for part, value in parts.items()}


def _digest(metadata: dict[str, str], tensors: Tensors) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _check_metadata(path: str | Path, metadata: dict[str, str], origin: Origin) -> None:
    if metadata.get("format") != FORMAT:
        raise ModelLoadError(f"{path}: is no saved prefix of this version; make one with save_prefix()")
    if metadata.get("checkpoint") != origin.checkpoint:
        raise ModelLoadError(
            f"{path}: was computed by another checkpoint than the loaded one; save it again with this one"
        )
    if metadata.get("numbers") != origin.numbers:
        raise ModelLoadError(
            f"{path}: holds numbers of kind {metadata.get('numbers')!r}, and this engine's are {origin.numbers!r}: use "
            f"the same dtype and kv_dtype, or save it again"
        )


def _layers(path: str | Path, tensors: Tensors) -> list[LayerState]:
    """The states in `tensors`, which must hold nothing else."""
    count = 1 + max((int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))), default=-1)
    layers = []
    for number in range(count):
        keys, values = (_array(path, f"layers.{number}.{name}", tensors) for name in ("keys", "values"))
        layers.append(LayerState(keys, values))
    if tensors:
        raise ModelLoadError(f"{path}: has {sorted(tensors)[0]}, which has no place in a prefix; save the prefix again")
    return layers


def _array(path: str | Path, name: str, tensors: Tensors) -> KVArray:
    """The keys or values of one layer, taken out of `tensors`."""
    whole = tensors.pop(name, None)
    parts = [part for key in PARTS if (part := tensors.pop(f"{name}.{key}", None)) is not None]
    if (whole is None) != (len(parts) == len(PARTS)):
        raise ModelLoadError(f"{path}: has no {name}, or only parts of it; save the prefix again")
    if not all(np.isfinite(part).all() for part in (parts if whole is None else [whole])):
        raise ModelLoadError(f"{path}: {name} has numbers that are not finite; save the prefix again")
    return PackedKV(*parts) if whole is None else whole
