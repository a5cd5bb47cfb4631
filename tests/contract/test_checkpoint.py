"""Reading model folders: every broken file is refused by itself, in a sentence that names it (F61, F62)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cortexstream.backends.common.affine import dense_weights, dequantize, packing_of
from cortexstream.backends.common.checkpoint import (
    check_weights,
    eos_token_ids,
    read_config,
    read_weights,
    stored_bytes,
)
from cortexstream.backends.common.memory import host_memory_bytes
from cortexstream.errors import ModelLoadError
from tests.conftest import require

TENSORS: dict[str, Any] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder with one weight file."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def shard(folder: Path) -> Path:
    """The same folder in two shards with an index."""
    (folder / "model.safetensors").unlink()
    save_file({"a": TENSORS["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_header(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_sound_folder(folder: Path) -> None:
    assert read_config(folder) == {"model_type": "llama"}
    assert check_weights(folder) == [folder / "model.safetensors"]
    assert stored_bytes(check_weights(folder)) == 6 * 4 + 4 * 2
    weights = read_weights(folder)
    assert {name: tensor.dtype for name, tensor in weights.items()} == {"a": np.float32, "b": np.float32}
    assert all(np.array_equal(weights[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_with_an_index_and_without(folder: Path, indexed: bool) -> None:
    shard(folder)
    if not indexed:
        (folder / "model.safetensors.index.json").unlink()
    assert [path.name[:11] for path in check_weights(folder)] == ["model-00001", "model-00002"]
    assert all(np.array_equal(read_weights(folder)[name], TENSORS[name]) for name in TENSORS)


def test_bfloat16_is_read_bit_by_bit(folder: Path) -> None:
    torch = require("torch")
    from safetensors.torch import save_file as save_torch

    values = torch.cat((torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, 3e38, float("inf")]))).to(torch.bfloat16)
    save_torch({"x": values, "none": torch.zeros(0, 3)}, folder / "model.safetensors")
    weights = read_weights(folder)
    assert weights["x"].tobytes() == values.float().numpy().tobytes()
    assert weights["none"].shape == (0, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no config.json"),
        ("{", "config.json cannot be read as JSON"),
        (b"\xff\xfe", "config.json cannot be read as JSON"),
        ("[1]", "config.json is not a JSON object but a list"),
        ("{}", "config.json has no model_type"),
        ('{"model_type": 3}', "config.json has no model_type"),
    ],
)
def test_broken_config(folder: Path, text: str | bytes | None, words: str) -> None:
    path = folder / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelLoadError, match=words):
        read_config(folder)


def test_no_folder(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nowhere does not exist"):
        read_config(folder / "nowhere")
    with pytest.raises(ModelLoadError, match=r"config\.json is not a folder"):
        read_config(folder / "config.json")


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        (None, {}, set()),
        (None, {"eos_token_id": 2}, {2}),
        ('{"eos_token_id": [5, 6]}', {"eos_token_id": 2}, {5, 6}),
        ('{"eos_token_id": null}', {"eos_token_id": [0]}, {0}),
        ("{}", {"eos_token_id": None}, set()),
    ],
)
def test_eos_token_ids(folder: Path, generation: str | None, config: dict[str, Any], want: set[int]) -> None:
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    assert eos_token_ids(folder, config) == want


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ("nonsense", r"generation_config\.json cannot be read as JSON"),
        ("3", r"generation_config\.json is not a JSON object"),
        ('{"eos_token_id": "</s>"}', r"generation_config\.json: eos_token_id has '</s>'"),
        ('{"eos_token_id": [1, true]}', "eos_token_id has True"),
        ('{"eos_token_id": -1}', "eos_token_id has -1"),
    ],
)
def test_broken_eos_token_ids(folder: Path, generation: str, words: str) -> None:
    (folder / "generation_config.json").write_text(generation)
    with pytest.raises(ModelLoadError, match=words):
        eos_token_ids(folder, {"eos_token_id": 2})


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ModelLoadError, match=r"looked for model\.safetensors\.index\.json, model\.safetensors and model\*"
    ):
        check_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "q4.gguf").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin, q4\.gguf, which cannot be read: .* to safetensors"):
        check_weights(folder)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: p.write_bytes(b"1234"), "has 4 bytes; a safetensors file has at least 8"),
        (lambda p: p.write_bytes(struct.pack("<Q", 2**40) + b"{}"), "no safetensors file"),
        (
            lambda p: p.write_bytes(struct.pack("<Q", 50) + b"{}"),
            "truncated: its header alone needs 58 bytes, it has 10",
        ),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"truncated: its header describes (\d+) bytes, it has \d+"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "too long"),
        (lambda p: write_header(p, b"{]"), "header that is not JSON"),
        (lambda p: write_header(p, [1]), "not a JSON object"),
        (lambda p: write_header(p, {"x": 3}), "tensor x has a broken header entry"),
        (lambda p: write_header(p, {"x": {**ONE, "shape": [-1]}}, b"1234"), "tensor x has a broken header entry"),
        (lambda p: write_header(p, {"x": {**ONE, "data_offsets": [0]}}, b"1234"), "tensor x has a broken header entry"),
        (lambda p: write_header(p, {"x": {**ONE, "dtype": "Q9"}}, b"1234"), "tensor x has dtype Q9"),
        (lambda p: write_header(p, {"x": {**ONE, "shape": [2]}}, b"1234"), "needs 8 bytes; its data_offsets .* hold 4"),
        (lambda p: write_header(p, {"x": ONE, "y": ONE}, b"1234"), "tensor y starts at byte"),
        (lambda p: write_header(p, {"x": {**ONE, "data_offsets": [4, 8]}}, b"12345678"), "tensor x starts at byte"),
    ],
)
def test_broken_weight_file(folder: Path, break_it: Callable[[Path], Any], words: str) -> None:
    break_it(folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=words) as caught:
        check_weights(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_truncated_file_says_expected_and_actual_size(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelLoadError, match=rf"describes {size} bytes, it has {size - 10}"):
        check_weights(folder)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, "has no weight_map"),
        ({}, "has no weight_map"),
        ({"a": 3}, "is said to be in 3"),
        ({"a": "../model.safetensors"}, "which is no file name"),
        ({"a": "model-9.safetensors"}, "names model-9.safetensors, which .* does not have"),
        ({"b": "model-00001-of-00002.safetensors"}, "tensor b is said to be in model-00001.*, which does not hold it"),
    ],
)
def test_broken_index(folder: Path, weight_map: Any, words: str) -> None:
    write_index(shard(folder), weight_map)
    with pytest.raises(ModelLoadError, match=words):
        check_weights(folder)


def test_index_that_is_not_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"index\.json cannot be read as JSON"):
        check_weights(folder)


def test_a_tensor_in_two_files_and_an_unreadable_dtype(folder: Path) -> None:
    save_file({"x": np.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match="tensor x has dtype F64; readable are"):
        read_weights(folder)
    (folder / "model.safetensors").unlink()
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file(TENSORS, folder / name)
    with pytest.raises(ModelLoadError, match="tensor a is in another file"):
        read_weights(folder)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_p2_dequantize_is_mlxs(bits: int, group_size: int) -> None:
    require("mlx")
    import mlx.core as mx

    dense = np.random.default_rng(bits).standard_normal((300, 256)).astype(np.float32)  # 300: more rows than one part
    packed = mx.quantize(mx.array(dense), group_size=group_size, bits=bits)
    want = np.array(mx.dequantize(*packed, group_size=group_size, bits=bits))
    weights, scales, biases = (np.array(part) for part in packed)
    got = dequantize(weights, scales, biases, group_size, bits)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-6)


def test_dense_weights_takes_the_packed_ones_out() -> None:
    tensors = {"l.weight": np.full((2, 8), 0x76543210, np.uint32), "n.weight": np.ones(3, np.float32)}
    tensors |= {"l.scales": np.full((2, 2), 2.0, np.float32), "l.biases": np.full((2, 2), -1.0, np.float32)}
    dense = dense_weights(tensors, {"quantization": {"bits": 4, "group_size": 32}})
    assert sorted(dense) == ["l.weight", "n.weight"]
    assert np.array_equal(dense["l.weight"], np.tile(np.arange(8) * 2.0 - 1, (2, 8)))


@pytest.mark.parametrize(
    ("settings", "drop", "words"),
    [
        ({}, None, "does not say that l is quantised"),
        ({"quantization": {"bits": 4, "group_size": 32, "l": False}}, None, "does not say that l is quantised"),
        ({"quantization": {"bits": 4, "group_size": 64}}, None, "do not fit 4 bits in groups of 64"),
        (
            {"quantization": {"bits": 4, "group_size": 32, "l": {"bits": 8, "group_size": 32}}},
            None,
            "do not fit 8 bits",
        ),
        ({"quantization": {"bits": 7, "group_size": 32}}, None, "bits 7 and group_size 32; bits may be"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, None, "mode 'mxfp4' of l"),
        ({"quantization": 4}, None, "quantization is 4"),
        ({"quantization_config": {"quant_method": "gptq"}}, None, "method 'gptq' cannot be read"),
        (
            {"quantization": {"bits": 4, "group_size": 32}},
            "l.biases",
            "needs l.weight .U32, two axes., .scales and .biases",
        ),
        ({"quantization": {"bits": 4, "group_size": 32}}, "l.scales", "tensor l.weight is packed"),
    ],
)
def test_broken_quantisation(settings: dict[str, Any], drop: str | None, words: str) -> None:
    tensors: dict[str, Any] = {"l.weight": np.zeros((2, 8), np.uint32)}
    tensors |= {f"l.{part}": np.zeros((2, 2), np.float32) for part in ("scales", "biases")}
    tensors.pop(drop or "", None)
    with pytest.raises(ModelLoadError, match=words):
        dense_weights(tensors, settings)


def test_packing_of_a_layer_overrides_the_whole() -> None:
    config = {"quantization": {"bits": 4, "group_size": 64, "a": {"bits": 8, "group_size": 32}, "b": False}}
    assert [packing_of(config, name) for name in "abc"] == [(32, 8), None, (64, 4)]


def test_host_memory_is_the_least_of_machine_and_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:    1000 kB\n")
    assert host_memory_bytes(tmp_path / "meminfo", tmp_path) == 1000 * 1024
    (tmp_path / "memory.max").write_text("600000\n")
    (tmp_path / "memory.current").write_text("500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 1000\ninactive_file 20000\n")
    assert host_memory_bytes(tmp_path / "meminfo", tmp_path) == 600000 - 500000 + 21000
    assert host_memory_bytes() > 0
    assert host_memory_bytes(tmp_path / "none", tmp_path) > 0
