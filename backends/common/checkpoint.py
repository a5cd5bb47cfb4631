"""A Hugging Face model folder as numpy sees it: config.json, generation_config.json and safetensors files.

Every fault of a folder is a `ModelLoadError` of one sentence that names the file. The safetensors format
(https://github.com/huggingface/safetensors, "Format"): eight bytes, the header's length N as a little-endian unsigned
number; N bytes of JSON, tensor name -> {dtype, shape, data_offsets}; then the tensors' bytes, little-endian, row-major,
without holes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cortexstream.errors import ModelLoadError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = "model*.safetensors"
OTHER_FORMATS = (".bin", ".gguf", ".pth", ".pt", ".npz")

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}

Array = npt.NDArray[Any]


class TensorEntry(NamedTuple):
    """One tensor of a safetensors header; `start` and `end` are offsets in bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, which must name a `model_type`. Raises ModelLoadError."""
    if not folder.exists():
        raise ModelLoadError(f"model folder {folder} does not exist; give the path of a Hugging Face model folder")
    if not folder.is_dir():
        raise ModelLoadError(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    path = folder / CONFIG
    if not path.is_file():
        raise ModelLoadError(f"{folder} has no {CONFIG}; a Hugging Face model folder needs one")
    config = _read_json_object(path)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ModelLoadError(f"{path} has no model_type; without it the architecture is unknown")
    return config


def eos_token_ids(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """The ids that end a text: generation_config.json's if it names any, else config.json's, else none.

    Raises ModelLoadError for a broken generation_config.json and for ids that are not whole numbers of at least 0.
    """
    path = folder / GENERATION_CONFIG
    value = _read_json_object(path).get("eos_token_id") if path.is_file() else None
    if value is None:
        path, value = folder / CONFIG, config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ModelLoadError(f"{path}: eos_token_id has {token!r}; token ids are whole numbers of at least 0")
    return frozenset(ids)


def check_weights(folder: Path) -> list[Path]:
    """The folder's weight files, sorted, each with a header that was read and holds together.

    Looked for in this order: the shards that model.safetensors.index.json names, model.safetensors,
    model*.safetensors. Reads the headers only. Raises ModelLoadError.
    """
    files = _find_files(folder)
    for path in files:
        read_header(path)
    return files


def stored_bytes(files: list[Path]) -> int:
    """Bytes that the files' tensors take as they are stored, without the headers."""
    return sum(entry.end - entry.start for path in files for entry in read_header(path).values())


def read_weights(folder: Path) -> dict[str, Array]:
    """Every tensor of the folder by name. F32, F16 and BF16 become float32; U32 (packed weights) stays uint32.

    Raises ModelLoadError for what `check_weights` refuses, for another dtype, and for a name that two files hold.
    """
    weights: dict[str, Array] = {}
    for path in check_weights(folder):
        for name, entry in read_header(path).items():
            if name in weights:
                raise ModelLoadError(f"{path}: tensor {name} is in another file of the folder too; which one counts?")
            weights[name] = _read_tensor(path, name, entry)
    return weights


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, validated against the file's size. Raises ModelLoadError."""
    actual = path.stat().st_size
    if actual < LENGTH_BYTES:
        raise ModelLoadError(
            f"{path} has {actual} bytes; a safetensors file has at least {LENGTH_BYTES}; fetch it again"
        )
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        data_start = LENGTH_BYTES + header_bytes
        if header_bytes > MAX_HEADER_BYTES:
            raise ModelLoadError(
                f"{path} claims a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed, so this is "
                f"no safetensors file"
            )
        if data_start > actual:
            raise ModelLoadError(
                f"{path} is truncated: its header alone needs {data_start} bytes, it has {actual}; fetch it again"
            )
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ModelLoadError(f"{path} has a header that is not JSON ({error}); fetch it again") from None
    if not isinstance(header, dict):
        raise ModelLoadError(f"{path} has a header that is not a JSON object; fetch it again")
    entries = {name: _entry(path, name, item, data_start) for name, item in header.items() if name != "__metadata__"}
    _check_extent(path, entries, data_start, actual)
    return entries


def _entry(path: Path, name: str, item: Any, data_start: int) -> TensorEntry:
    fields = item if isinstance(item, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise ModelLoadError(f"{path}: tensor {name} has a broken header entry; it needs dtype, shape, data_offsets")
    if dtype not in ITEM_BYTES:
        raise ModelLoadError(f"{path}: tensor {name} has dtype {dtype}; known are {', '.join(sorted(ITEM_BYTES))}")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise ModelLoadError(
            f"{path}: tensor {name} of dtype {dtype} and shape {shape} needs {needed} bytes; its data_offsets "
            f"{offsets} hold {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_extent(path: Path, entries: dict[str, TensorEntry], data_start: int, actual: int) -> None:
    """The tensors follow each other without holes or overlaps and end where the file ends."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end)):
        if entry.start != end:
            raise ModelLoadError(
                f"{path}: tensor {name} starts at byte {entry.start}; the one before it ends at {end}; fetch it again"
            )
        end = entry.end
    if actual != end:
        word = "truncated" if actual < end else "too long"
        raise ModelLoadError(f"{path} is {word}: its header describes {end} bytes, it has {actual}; fetch it again")


def _read_tensor(path: Path, name: str, entry: TensorEntry) -> Array:
    stored = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4"}.get(entry.dtype)
    if stored is None:
        raise ModelLoadError(f"{path}: tensor {name} has dtype {entry.dtype}; readable are F32, F16, BF16 and U32")
    flat = np.fromfile(path, stored, count=math.prod(entry.shape), offset=entry.start)
    if entry.dtype == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of a float32
    return flat.astype(np.uint32 if entry.dtype == "U32" else np.float32, copy=False).reshape(entry.shape)


def _find_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    files = sorted(folder.glob(SHARDS))
    if not files:
        message = f"{folder} has no weights: looked for {INDEX}, {SINGLE} and {SHARDS}"
        others = sorted(p.name for p in folder.iterdir() if p.suffix in OTHER_FORMATS) if folder.is_dir() else []
        advice = "fetch one of these"
        if others:
            advice = f"it has {', '.join(others)}, which cannot be read: convert the weights to safetensors"
        raise ModelLoadError(f"{message}; {advice}")
    return files


def _indexed_files(folder: Path) -> list[Path]:
    path = folder / INDEX
    weight_map = _read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{path} has no weight_map; it must say which file holds which tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelLoadError(f"{path}: tensor {name} is said to be in {shard!r}, which is no file name")
    files = [folder / shard for shard in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelLoadError(
            f"{path} names {', '.join(missing)}, which {folder} does not have; fetch the missing files"
        )
    held = {file.name: read_header(file) for file in files}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise ModelLoadError(f"{path}: tensor {name} is said to be in {shard}, which does not hold it")
    return files


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is not a JSON object but a {type(value).__name__}")
    return value


def _counts(value: Any) -> list[int] | None:
    """`value` if it is a list of whole numbers of at least 0, else None."""
    return value if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None
