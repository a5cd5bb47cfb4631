"""Tiny random models for the reference backend, plans made by hand, and transformers as judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cortexstream.backend import Backend, BackendOptions
from cortexstream.backends import reference
from cortexstream.plan import (
    PENDING,
    KVRows,
    MemoryOp,
    PlanRow,
    RowResult,
    SampleSpec,
    StepPlan,
    StepResult,
    ring_tokens,
)

VOCAB = 97
BLOCK = 4
SEQUENCE_TOKENS = 128
EVERYTHING = SampleSpec(logprobs=VOCAB)  # greedy, and the whole distribution
PROMPTS = [tuple(np.random.default_rng(n).integers(0, VOCAB, n).tolist()) for n in (1, 13, 30)]

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}

# name: (model_type, dtype, sharded, settings beside the common ones)
CASES: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "llama": ("llama", "float32", False, {}),
    "llama-biases": ("llama", "float16", False, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-linear-tied-bf16-sharded": (
        "llama", "bfloat16", True, {"rope_parameters": LINEAR, "tie_word_embeddings": True},
    ),
    "llama-llama3-mha": ("llama", "float32", False, {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    "mistral-full": ("mistral", "bfloat16", False, {"sliding_window": None, "head_dim": 20}),
    "mistral-window": ("mistral", "float32", True, {"sliding_window": 6}),
    "qwen2-tied": ("qwen2", "float32", False, {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2", "float32", False, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "bfloat16", True, {"head_dim": 24}),
    "qwen3-windows": (
        "qwen3", "float32", False,
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip


def make_folder(folder: Path, model_type: str, dtype: str, sharded: bool, settings: dict[str, Any]) -> Path:
    """A random model as transformers saves it. All parameters are random: zero biases and unit norms hide mistakes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2,
        "bos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **settings}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2 if parameter.ndim == 1 else 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return folder


def by_transformers(folder: Path, tokens: Sequence[int]) -> Any:
    """Log-probabilities after every token, [T, V]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1).numpy()


def load(folder: Path, layout: Any = "paged", block_tokens: int = BLOCK, kv_dtype: Any = "auto") -> Backend:
    """A backend with memory for four sequences of SEQUENCE_TOKENS, with full rings."""
    backend = reference.create(
        BackendOptions(model=str(folder), kv_layout=layout, block_tokens=block_tokens, kv_dtype=kv_dtype)
    )
    assert backend.info.kv_layout == layout
    full, *rings = blocks_of(backend)
    backend.allocate_kv(4 * full, tuple(4 * ring for ring in rings))
    return backend


def blocks_of(backend: Backend) -> list[int]:
    """Blocks of one of the four sequences in every pool."""
    size = backend.info.block_tokens
    return [SEQUENCE_TOKENS // size, *(ring_tokens(window, size) // size for window in backend.model.windows)]


def rows_for(backend: Backend, number: int) -> KVRows:
    """A quarter of the blocks for one of the four: adjacent, or every fourth one, backwards."""

    def share(count: int) -> KVRows:
        if backend.info.kv_layout == "run":
            return KVRows(tuple(range(count * number, count * (number + 1))), True)
        return KVRows(tuple(range(4 * count - 1 - number, -1, -4)), False)

    full, *rings = map(share, blocks_of(backend))
    return full._replace(rings=tuple(rings))


def run_step(backend: Backend, number: int, rows: Iterable[PlanRow], moves: Iterable[MemoryOp] = ()) -> StepResult:
    result = backend.collect(backend.submit(StepPlan(number, tuple(rows), tuple(moves))))
    assert result.step == number
    return result


def step(
    backend: Backend, number: int, rows: Iterable[PlanRow], moves: Iterable[MemoryOp] = ()
) -> tuple[RowResult, ...]:
    return run_step(backend, number, rows, moves).rows


def distribution(row: RowResult) -> Any:
    assert row.error is None and row.logprob == row.top_logprobs[0][1]
    return np.array([logprob for _, logprob in sorted(row.top_logprobs)])


def prefill(backend: Backend, tokens: Sequence[int], chunk: int, kv: KVRows, step_before: int = 0) -> dict[int, Any]:
    """Position -> log-probabilities after it, at the end of every chunk."""
    found = {}
    for start in range(0, len(tokens), chunk):
        part = tuple(tokens[start : start + chunk])
        (row,) = step(backend, step_before + start + 1, [PlanRow(0, 0, part, start, kv, EVERYTHING)])
        found[start + len(part) - 1] = distribution(row)
    return found


def greedy(backend: Backend, prompts: Sequence[Sequence[int]], count: int, chunk: int = 5) -> list[list[int]]:
    """Continue all prompts at once, one plan in flight, prompts in chunks beside rows that decode already."""
    done = [0] * len(prompts)
    fed = [0] * len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    ticket, number = None, 0
    while ticket is not None or min(done) < count:
        rows = []
        for seq, prompt in enumerate(prompts):
            if fed[seq] < len(prompt):
                part = tuple(prompt[fed[seq] : fed[seq] + chunk])
                last = fed[seq] + len(part) == len(prompt)
            elif done[seq] < count:
                part, last = (PENDING,), True
            else:
                continue
            rows.append(PlanRow(seq, seq, part, fed[seq], rows_for(backend, seq), SampleSpec() if last else None))
            fed[seq] += len(part)
            done[seq] += last
        number += 1
        following = backend.submit(StepPlan(number, tuple(rows))) if rows else None
        if ticket is not None:
            for row in backend.collect(ticket).rows:
                tokens[row.seq_id].append(row.token)
        ticket = following
    return tokens
