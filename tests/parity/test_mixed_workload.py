"""Many prompts on a small arena give what each gives alone, on every backend, and the backends agree."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from typing import Any

import pytest

from cortexstream import LLM, RequestOutput, SamplingParams
from tests.conftest import require_backend

NUM_PROMPTS = 64
LONGEST = 1000
GROWERS = slice(2, 14)  # short prompts with long outputs: together they outgrow the arena, whatever the timing
SMALL = {
    "num_kv_blocks": 70, "block_tokens": 16, "max_num_seqs": 12, "max_num_batched_tokens": 192,
    "enable_prefix_caching": False,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "null": {"backend": "null", "skip_tokenizer_init": True, "backend_options": {"vocab_size": 359}},
    "null-paged": {
        "backend": "null", "skip_tokenizer_init": True, "backend_options": {"vocab_size": 359}, "kv_layout": "paged",
    },
    "reference": {"backend": "reference"},
    "reference-run": {"backend": "reference", "kv_layout": "run"},
    "mlx": {"backend": "mlx"},
    "cuda": {"backend": "cuda", "backend_options": {"device": "cpu"}},
}  # fmt: skip


@cache
def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    """Random ids, 1 to 1,000 tokens long (log-uniform); greedy and seeded sampling; 1 to 32, or 100, tokens to make."""
    rng = random.Random(11)
    lengths = [1, LONGEST, *(round(LONGEST ** rng.random()) for _ in range(NUM_PROMPTS - 2))]
    lengths[GROWERS] = [4] * len(lengths[GROWERS])
    prompts = [[1] + [rng.randrange(264, 359) for _ in range(n - 1)] for n in lengths]
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 32), temperature=rng.choice([0.0, 0.8, 1.2]), seed=rng.randrange(2**40),
            top_p=rng.choice([1.0, 0.9]), top_k=rng.choice([0, 20]), logprobs=0, ignore_eos=rng.random() < 0.7,
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        )
        for _ in prompts
    ]  # fmt: skip
    params[GROWERS] = [dataclasses.replace(p, max_tokens=100, ignore_eos=True) for p in params[GROWERS]]
    return prompts, params


@cache
def alone(name: str) -> list[RequestOutput]:
    """Every prompt by itself, in an arena with room for all."""
    prompts, params = workload()
    with LLM(**{**OPTIONS[name], "max_num_seqs": 1}) as llm:
        return [llm.generate([p], s, use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]


def together(name: str) -> list[RequestOutput]:
    """All of them, most submitted while others run, in an arena for a few; nothing may be left afterwards."""
    prompts, params = workload()
    with LLM(**{**OPTIONS[name], **SMALL}) as llm:
        running = [llm.submit(p, s) for p, s in zip(prompts[:20], params[:20], strict=True)]
        for first in range(20, NUM_PROMPTS, 4):
            running[first - 20].result(timeout_s=300)
            part = slice(first, first + 4)
            running += [llm.submit(p, s) for p, s in zip(prompts[part], params[part], strict=True)]
        outputs = [generation.result(timeout_s=300) for generation in running]
        llm.check()
        stats = llm.stats()
        assert stats.arena.used_blocks == 0 and stats.num_running == stats.num_waiting == 0
        assert stats.requests_finished == NUM_PROMPTS and stats.requests_failed == 0
        assert stats.preemptions > 0, "the arena must be too small for all of them"
        if llm.info.kv_layout == "run":
            assert stats.arena.compactions > 0 and stats.arena.relocations > 0
        return outputs


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OPTIONS)
def test_together_is_alone(name: str) -> None:
    """F65, F70, P7: tokens equal, logprobs within 1e-4, nothing leaks."""
    require_backend(name)
    for one, all_ in zip(alone(name), together(name), strict=True):
        (expected,), (got,) = one.outputs, all_.outputs
        assert got.token_ids == expected.token_ids
        assert got.finish_reason == expected.finish_reason
        for token, a, b in zip(expected.token_ids, expected.logprobs or (), got.logprobs or (), strict=True):
            assert abs(a[token].logprob - b[token].logprob) < 1e-4


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["mlx", "cuda"])
def test_backends_agree(name: str) -> None:
    """P1: every backend draws the reference's tokens, greedy and seeded, from the same checkpoint in float32."""
    require_backend(name)
    for number, (a, b) in enumerate(zip(alone("reference"), alone(name), strict=True)):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids, f"prompt {number}"
        assert a.outputs[0].text == b.outputs[0].text


@pytest.mark.timeout(900)
def test_placements_agree() -> None:
    """The same numpy model through runs and through block tables."""
    for a, b in zip(alone("reference"), alone("reference-run"), strict=True):
        assert a.outputs == b.outputs
