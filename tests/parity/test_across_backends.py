"""The same folder on mlx and on the CUDA backend's CPU device: two model libraries, one engine, the same tokens (P1,
P3, F60). Each has its own judge elsewhere: plain mlx-lm in test_mlx_models, transformers in test_cuda_models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM, RequestOutput, SamplingParams
from tests.conftest import require
from tests.parity.test_quantized_linear import quantize
from tests.parity.tiny_models import write_model as write_packable
from tests.parity.torch_models import ARCHITECTURES, write_model

require("mlx")
require("mlx_lm")
require("torch")
require("transformers")

PROMPTS = [[1 + (7 * i + 3 * n) % 150 for i in range(n)] for n in (7, 30, 1, 19)]
STEPS = 64
PARAMS = [
    SamplingParams(max_tokens=STEPS if n == 0 else 12, temperature=t, seed=5 + n, ignore_eos=True, logprobs=0)
    for n, t in enumerate((0.0, 0.9, 0.0, 0.8))
]
LOGPROB_ERROR = 1e-4
NO_WINDOW = {"sliding_window": 400}
# name -> what the config says beside ARCHITECTURES. Those with a window that mlx-lm does not know get one that nothing
# reaches; heads that are tied, where mlx-lm ties them whatever the config says. gpt_neox is not here: mlx-lm has
# another gelu.
SHARED: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": NO_WINDOW, "qwen2": {}, "qwen3": {}, "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, **NO_WINDOW}, "gemma3_text": {}, "mixtral": {}, "qwen2_moe": {},
    "qwen3_moe": {}, "phi3": {}, "phi": {}, "olmo2": {}, "olmo3": {}, "granite": {}, "granitemoe": {}, "smollm3": {},
    "glm4": {}, "cohere": {"tie_word_embeddings": True}, "cohere2": {"tie_word_embeddings": True}, "deepseek_v3": {},
    "starcoder2": {"tie_word_embeddings": True}, "stablelm": {}, "helium": {}, "nemotron": {},
    "ernie4_5": {}, "seed_oss": {}, "hunyuan_v1_dense": {}, "dots1": {},
}  # fmt: skip
REFERENCE = ("llama", "mistral", "qwen2", "qwen3")


def folder_for(root: Path, name: str) -> Path:
    """A random model whose config.json has the keys of published checkpoints, which mlx-lm asks for, beside those that
    transformers 5 writes."""
    tied = SHARED[name].get("tie_word_embeddings", False)
    folder = write_model(root / name, name, {**ARCHITECTURES[name], **SHARED[name]}, scale=0.03 if tied else 0.15)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        rope = rope["full_attention"]
    old = {"rope_theta": rope.get("rope_theta"), "partial_rotary_factor": rope.get("partial_rotary_factor"),
           "rotary_emb_base": rope.get("rope_theta"), "rotary_pct": rope.get("partial_rotary_factor"),
           "num_experts": config.get("num_local_experts")}  # fmt: skip
    for key, value in old.items():
        if value is not None and key not in config:
            config[key] = value
    path.write_text(json.dumps(config))
    return folder


def generate(folder: Path, backend: str) -> list[RequestOutput]:
    """In chunks of 16 tokens, in a batch of three of the four."""
    options: dict[str, Any] = {"backend_options": {"device": "cpu"}} if backend == "cuda" else {}
    with LLM(
        str(folder), backend=backend, dtype="float32", skip_tokenizer_init=True, max_num_seqs=3,
        max_num_batched_tokens=16, num_kv_blocks=64, block_tokens=16, **options,
    ) as llm:  # fmt: skip
        return llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def assert_same(a: list[RequestOutput], b: list[RequestOutput]) -> None:
    for one, other in zip(a, b, strict=True):
        (x,), (y,) = one.outputs, other.outputs
        assert x.token_ids == y.token_ids
        for token, p, q in zip(x.token_ids, x.logprobs or (), y.logprobs or (), strict=True):
            assert abs(p[token].logprob - q[token].logprob) < LOGPROB_ERROR


@pytest.mark.parametrize("name", SHARED)
def test_f60_p1_mlx_and_torch_agree(name: str, tmp_path: Path) -> None:
    """64 greedy tokens and seeded ones; the log-probability of each within 1e-4."""
    folder = folder_for(tmp_path, name)
    on_torch = generate(folder, "cuda")
    assert_same(on_torch, generate(folder, "mlx"))
    if name in REFERENCE:
        assert_same(on_torch, generate(folder, "reference"))


def test_p3_at_least_twenty_architectures() -> None:
    assert len(SHARED) >= 20


@pytest.mark.parametrize(("kind", "name"), [("4", "llama"), ("8", "qwen3"), ("bfloat16", "qwen2")])
def test_p2_one_folder_everywhere(kind: str, name: str, tmp_path: Path) -> None:
    """What mlx-lm quantised to 4 or 8 bits, and a bfloat16 folder of transformers', computed in float32."""
    if kind == "bfloat16":
        folder = write_model(tmp_path / name, name, ARCHITECTURES[name], dtype=kind)
    else:
        made = write_packable(tmp_path / name, name, {"hidden_size": 128, "intermediate_size": 256})
        folder = quantize(made, int(kind), 64)
    on_torch = generate(folder, "cuda")
    for backend in ("mlx", "reference"):
        assert_same(on_torch, generate(folder, backend))


def test_p2_packed_layers_stay_packed_and_are_fused(tmp_path: Path) -> None:
    import torch

    from cortexstream.backends.cuda.fused import torch_ops
    from cortexstream.backends.cuda.models import load
    from cortexstream.backends.cuda.quantized import QuantizedLinear

    dense = write_packable(tmp_path / "llama", "llama", {"hidden_size": 128, "intermediate_size": 256})
    loaded = load(quantize(dense, 4, 64), "float32", torch.device("cpu"), torch_ops())
    layers = len(loaded.layers)
    assert loaded.rewrites["mlp"] == loaded.rewrites["qkv"] == loaded.rewrites["rotary"] == layers
    packed = [module for module in loaded.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == 4 * layers + 1  # qkv, o, gate and up, down; the head
    assert all(parameter.ndim == 1 for parameter in loaded.model.parameters())
