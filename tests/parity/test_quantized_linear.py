"""One 4-bit or 8-bit folder of mlx-lm's, in mlx-lm and in transformers' classes with packed layers (P2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.backends.common.checkpoint import read_config, read_weights
from cortexstream.errors import ModelLoadError
from tests.conftest import require
from tests.parity.tiny_models import WINDOWED, write_model

torch: Any = require("torch")
transformers: Any = require("transformers")
IDS = np.random.default_rng(0).integers(0, 200, 30)
WIDE = {"hidden_size": 128, "intermediate_size": 256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen3, tied": ("qwen3", {}),
    "qwen2, tied, biases": ("qwen2", {}),
}


def quantize(folder: Path, bits: int, group: int, predicate: Callable[[str, Any], Any] | None = None) -> Path:
    """What mlx_lm.convert --quantize writes beside `folder`."""
    require("mlx_lm")
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(folder)
    model, config = quantize_model(model, config, group, bits, quant_predicate=predicate)
    out = folder.with_name(f"{folder.name}-{bits}")
    save_model(out, model)
    save_config(config, out / "config.json")
    return out


def mlx_logits(folder: Path) -> Any:
    mx = require("mlx")
    from mlx_lm.utils import load_model

    return np.array(load_model(folder)[0](mx.array(IDS)[None])[0])


def build(folder: Path, device: str = "meta", dtype: Any = torch.float32) -> Any:
    """transformers' model of this config without weights."""
    settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    for key in ("quantization", "quantization_config"):
        if hasattr(settings, key):
            delattr(settings, key)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="eager").eval()


def load(folder: Path, device: str = "meta", dtype: Any = torch.float32) -> Any:
    from cortexstream.backends.cuda.quantized import load_weights

    model = build(folder, device, dtype)
    load_weights(model, read_weights(folder), read_config(folder), dtype)
    return model


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None], use_cache=False).logits[0].float().numpy()


def off(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [*((name, bits, 64) for name in MODELS for bits in (4, 8)), ("llama", 4, 32), ("llama", 3, 32), ("llama", 6, 128)],
)
def test_p2_logits_are_mlx_lms(name: str, bits: int, group: int, device: str, tmp_path: Path) -> None:
    from cortexstream.backends.cuda.quantized import QuantizedEmbedding, QuantizedLinear

    architecture, extra = MODELS[name]
    folder = quantize(write_model(tmp_path / "model", architecture, {**WIDE, **extra}), bits, group)
    model = load(folder, device)
    assert off(logits(model), mlx_logits(folder)) < 1e-5
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)]
    assert not linears and isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_p2_a_tied_head_shares_the_table(tmp_path: Path) -> None:
    folder = quantize(write_model(tmp_path / "model", "qwen3", WIDE), 4, 64)
    model = load(folder)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    for name in ("packed", "scales", "biases"):
        assert getattr(head, name).data_ptr() == getattr(table, name).data_ptr()
    stored = sum(array.nbytes for array in read_weights(folder).values())
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert sum(held.values()) < 1.02 * stored


def test_p2_layers_may_be_packed_each_in_its_own_way(tmp_path: Path) -> None:
    """Some in 8 bits, some in other groups, some dense; the tied table dense, too."""

    def predicate(path: str, module: Any) -> Any:
        if "v_proj" in path or "embed_tokens" in path:
            return False
        return {"group_size": 32, "bits": 8} if "down_proj" in path else True

    from cortexstream.backends.cuda.quantized import QuantizedLinear

    folder = quantize(write_model(tmp_path / "model", "llama", WIDE), 4, 64, predicate)
    model = load(folder)
    assert off(logits(model), mlx_logits(folder)) < 1e-5
    layer = model.model.layers[1]
    assert (layer.mlp.down_proj.bits, layer.mlp.down_proj.group) == (8, 32)
    assert (layer.mlp.up_proj.bits, layer.mlp.up_proj.group) == (4, 64)
    assert isinstance(layer.self_attn.v_proj, torch.nn.Linear) and isinstance(layer.self_attn.q_proj, QuantizedLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("bits", [6, 8])
def test_p2_a_packed_head_of_the_folders_own_is_kept(bits: int, tmp_path: Path) -> None:
    """transformers' Gemma 3 ties by default, mlx-lm's has a head of its own if the folder has one. The square root of
    the width, by which both multiply embeddings, is exact here: mlx-lm rounds it to bfloat16."""
    source = write_model(tmp_path / "model", "gemma3_text", {**WIDE, **WINDOWED["gemma3_text"], "hidden_size": 256})
    model = load(folder := quantize(source, bits, 64))
    assert "lm_head.scales" in read_weights(folder)
    assert model.lm_head.packed.data_ptr() != model.model.embed_tokens.packed.data_ptr()
    assert off(logits(model), mlx_logits(folder)) < 1e-5


def test_p2_a_dense_head_of_the_folders_own_is_kept(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "gemma3_text", {**WIDE, **WINDOWED["gemma3_text"], "hidden_size": 256})
    folder = quantize(source, 4, 64, lambda path, module: "lm_head" not in path)
    model = load(folder)
    assert isinstance(model.lm_head, torch.nn.Linear) and not isinstance(model.model.embed_tokens, torch.nn.Embedding)
    assert off(logits(model), mlx_logits(folder)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_what_a_model_does_not_compute_is_refused(dtype: Any, tmp_path: Path) -> None:
    """Not left as NaN: a buffer that no tensor fills and no code of transformers does."""
    from cortexstream.backends.cuda.quantized import load_weights

    folder = quantize(write_model(tmp_path / "model", "qwen3", WIDE), 4, 64)
    model = build(folder)
    norm = model.model.norm
    norm.register_buffer("extra", torch.empty(3, dtype=dtype, device="meta"), persistent=False)
    with pytest.raises(ModelLoadError, match=r"model\.norm\.extra is not among the weights, and transformers does not"):
        load_weights(model, read_weights(folder), read_config(folder), torch.float32)


def test_p2_stacked_experts_are_refused_by_name(tmp_path: Path) -> None:
    from tests.parity.tiny_models import FULL

    settings = {**FULL["mixtral"], "hidden_size": 128, "intermediate_size": 128}
    folder = quantize(write_model(tmp_path / "model", "mixtral", settings), 4, 32)
    with pytest.raises(ModelLoadError, match=r"switch_mlp\.\w+ holds packed weights of all experts .* the mlx backend"):
        load(folder)


def test_p2_an_embedding_may_be_scaled(tmp_path: Path) -> None:
    """Gemma 3 multiplies its embeddings; packed and dense layers with the same numbers give the same logits."""
    from cortexstream.backends.common.affine import dense_weights
    from cortexstream.backends.cuda.quantized import load_weights
    from tests.parity.torch_models import ARCHITECTURES
    from tests.parity.torch_models import write_model as write_torch_model

    mx = require("mlx")
    settings = {**ARCHITECTURES["gemma3_text"], **WIDE, "vocab_size": 200, "tie_word_embeddings": True}
    folder = write_torch_model(tmp_path / "model", "gemma3_text", settings)
    config = {**read_config(folder), "quantization": {"group_size": 64, "bits": 4}}
    weights = read_weights(folder)
    for name in [name for name, array in weights.items() if array.ndim == 2 and array.shape[1] % 64 == 0]:
        parts = mx.quantize(mx.array(weights.pop(name)), group_size=64, bits=4)
        names = (name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases"))
        weights.update(zip(names, map(np.array, parts), strict=True))
    dense, packed = build(folder), build(folder)
    load_weights(dense, dense_weights(dict(weights), config), config, torch.float32)
    load_weights(packed, weights, config, torch.float32)
    assert packed.get_input_embeddings().scale == float(dense.get_input_embeddings().embed_scale) > 8
    assert off(logits(packed), logits(dense)) < 1e-5


def test_p2_half_precision_keeps_the_scales_digits(tmp_path: Path) -> None:
    """Scales that were bfloat16 take two bytes; the others stay float32, and the logits are near."""
    folder = quantize(write_model(tmp_path / "model", "llama", WIDE), 4, 64)
    wanted = mlx_logits(folder)
    model = load(folder, dtype=torch.bfloat16)
    assert model.lm_head.scales.dtype == torch.float32
    assert model.model.norm.weight.dtype == model(torch.from_numpy(IDS)[None]).logits.dtype == torch.bfloat16
    assert off(logits(model), wanted) < 0.1
    from cortexstream.backends.cuda.quantized import load_weights

    weights = read_weights(folder)
    for name in weights:
        if name.endswith((".scales", ".biases")):
            weights[name] = torch.from_numpy(weights[name]).bfloat16().float().numpy()
    model = build(folder, dtype=torch.bfloat16)
    load_weights(model, weights, read_config(folder), torch.bfloat16)
    assert model.lm_head.scales.dtype == torch.bfloat16 and not weights


def test_p2_fused_layers_give_what_the_layers_give(tmp_path: Path) -> None:
    from cortexstream.backends.cuda.quantized import fuse

    model = load(quantize(write_model(tmp_path / "model", "qwen2", WIDE), 4, 64))
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert all(part.bias is not None for part in parts)
    want = torch.cat([part(x) for part in parts], -1)
    whole = fuse(parts)
    assert whole.out_features == sum(part.out_features for part in parts)
    torch.testing.assert_close(whole(x), want, rtol=1e-6, atol=1e-6)
    first, second = model.model.layers[0].mlp.gate_proj, parts[0]
    torch.testing.assert_close(fuse([first, second])(x), torch.cat([first(x), second(x)], -1), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="2 layers of 2 kinds cannot be one"):
        fuse([first, model.model.layers[0].mlp.down_proj])


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    from cortexstream.backends.cuda.quantized import load_weights

    folder = quantize(write_model(tmp_path / "model", "qwen2", WIDE), 4, 64)
    config, name = read_config(folder), "model.layers.0.mlp.up_proj"

    def refused(words: str, changed: dict[str, Any], without: str = "", settings: dict[str, Any] | None = None) -> None:
        weights = {key: array for key, array in {**read_weights(folder), **changed}.items() if key != without}
        merged = {**config, "quantization": {**config["quantization"], **(settings or {})}}
        with pytest.raises(ModelLoadError, match=words):
            load_weights(build(folder), weights, merged, torch.float32)

    zeros = np.zeros((256, 2), np.float32)
    refused(f"{name} is quantised and needs", {}, f"{name}.biases")
    refused(f"{name}: scales has shape", {f"{name}.scales": zeros[:7]})
    refused("do not match", {}, settings={"bits": 8})
    refused(f"says that {name} is not quantised", {}, settings={name: False})
    refused(f"{name} is 7 x 128; the model's is", {
        f"{name}.weight": np.zeros((7, 16), np.uint32), f"{name}.scales": zeros[:7], f"{name}.biases": zeros[:7],
    })  # fmt: skip
    refused("q_proj.bias is missing", {}, "model.layers.0.self_attn.q_proj.bias")
    refused("tensor model.norm.weight is missing", {}, "model.norm.weight")
    refused("tensor model.extra has no place in it", {"model.extra": zeros})
    refused("size mismatch", {"model.norm.weight": zeros})
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    refused("has no place in it", {})
