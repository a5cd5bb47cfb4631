"""Random conversations on the null backend: whatever is reused, moved, swapped or evicted, tokens stay right."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cortexstream.backend import BackendOptions
from cortexstream.backends.null.backend import create, next_token
from cortexstream.config import EngineConfig
from cortexstream.engine import EngineCore
from cortexstream.plan import SampleSpec
from cortexstream.request import Request
from tests.core.support import AuditedBackend, Receiver, request

VOCABULARY = 97


def dense(asked: Request, window: int | None) -> list[int]:
    context, output = list(asked.prompt_token_ids), []
    spec = SampleSpec(asked.sampling.temperature, seed=asked.seed, sample_index=asked.index)
    for _ in range(asked.sampling.max_tokens or 0):
        output.append(next_token(context, spec, VOCABULARY, window))
        context.append(output[-1])
    return output


def conversations(rng: random.Random, core: EngineCore, steps: int) -> list[tuple[Request, Receiver]]:
    """Requests that begin like earlier ones: a common beginning, a continuation of what was answered, a retry."""
    asked: list[tuple[Request, Receiver]] = []
    systems = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))] for _ in range(3)]
    for _ in range(steps):
        kind = rng.random()
        done = [(r, s) for r, s in asked if s.finish is not None]
        if kind < 0.4 or not done:
            prompt = [*rng.choice(systems), *(rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 9)))]
        else:
            before, sink = rng.choice(done)
            prompt = [*before.prompt_token_ids, *sink.tokens]
            if kind < 0.8:
                prompt += [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 7))]
            elif kind < 0.9:
                prompt = prompt[: rng.randint(1, len(prompt))]
        if len(prompt) > 120:
            prompt = prompt[:60]
        for index in range(rng.choice((1, 1, 1, 3))):
            it = request(
                len(asked), prompt, index=index, seed=rng.randrange(4), max_tokens=rng.randint(1, 24),
                temperature=rng.choice((0.0, 1.0)),
            )  # fmt: skip
            asked.append((it, Receiver()))
            core.add(*asked[-1])
        for _ in range(rng.choice((0, 1, 3, 12, 40))):
            if core.has_work:
                core.step()
                core.arena.check()
        if rng.random() < 0.1 and core.has_work:
            core.abort(rng.choice(asked)[0].id)
    return asked


def run(seed: int, layout: str, block_tokens: int, num_blocks: int, window: int | None, **config: Any) -> EngineCore:
    rng = random.Random(f"{seed} {layout} {block_tokens} {window} {config}")
    extra = {} if window is None else {"window": window}
    options = BackendOptions(None, max_num_seqs=6, block_tokens=block_tokens, kv_layout=layout, extra=extra)  # type: ignore[arg-type]
    backend = AuditedBackend(create(options), 6, 24)
    core = EngineCore(
        backend,
        EngineConfig(backend="null", max_num_seqs=6, max_num_batched_tokens=24, num_kv_blocks=num_blocks, **config),
    )
    asked = conversations(rng, core, 60)
    while core.has_work:
        core.step()
        core.arena.check()
    core.check()
    for it, sink in asked:
        expected = dense(it, window)
        assert sink.tokens == expected[: len(sink.tokens)], it
        assert sink.finish is not None and (sink.finish == "abort" or len(sink.tokens) == it.sampling.max_tokens)
    assert core.arena.used_blocks == 0
    core.arena.clear()
    core.arena.check()
    assert core.arena.stats().largest_free_run <= core.arena.free_blocks == core.arena.num_blocks
    assert core.swap.used_bytes == 0 and core.arena.stats().cached_blocks == 0
    return core


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("policy", ["first_fit", "buddy"])
@pytest.mark.parametrize("window", [None, 5, 16, 33])
@pytest.mark.parametrize("layout", ["run", "paged"])
@pytest.mark.parametrize("seed", range(4))
def test_f83_reuse_changes_no_token(seed: int, layout: str, window: int | None, policy: str, mode: str) -> None:
    block_tokens = (1, 3, 4, 16)[seed % 4]
    blocks = -(-150 // block_tokens) + (2 if seed % 2 else 60 // block_tokens)
    core = run(seed, layout, block_tokens, blocks, window, kv_policy=policy, preemption_mode=mode, swap_memory="1MiB")
    stats = core.stats()
    if layout == "run" or window is None:
        assert stats.arena.reused_tokens > 0
    if mode == "swap":
        assert stats.swaps or not stats.preemptions


@pytest.mark.parametrize("layout", ["run", "paged"])
def test_f83_reuse_can_be_turned_off(layout: str) -> None:
    core = run(0, layout, 4, 60, None, enable_prefix_caching=False)
    assert core.arena.stats().reused_tokens == core.arena.stats().copied_tokens == 0
