"""How much KV memory there is, and how long a sequence may become (F18)."""

from __future__ import annotations

import pytest

from cortexstream.config import EngineConfig
from cortexstream.engine import EngineCore
from cortexstream.engine.budget import kv_size, swap_budget_bytes
from cortexstream.errors import OutOfMemoryBudgetError
from tests.core.support import Receiver, engine, null_backend, request


@pytest.mark.parametrize(
    ("config", "extra", "blocks"),
    [
        ({"num_kv_blocks": 3}, {}, 3),
        ({"kv_cache_memory": 256}, {}, 1),  # 16 tokens of two 8-byte numbers
        ({"kv_cache_memory": 511}, {}, 1),
        ({"kv_cache_memory": "2kib"}, {}, 8),
        ({"memory_utilization": 0.5}, {"memory_bytes": 1024}, 2),
        ({}, {"memory_bytes": 3200}, 10),  # the backend's own share, 0.8
        ({"kv_cache_memory": "8MiB"}, {"max_context_tokens": 33}, 64 * 3),  # more could never be used
        ({"kv_cache_memory": "8MiB", "max_model_len": 16, "max_num_seqs": 5}, {"max_context_tokens": 33}, 5),
    ],
)
def test_budget(config: dict[str, object], extra: dict[str, object], blocks: int) -> None:
    made = EngineConfig(backend="null", **config)  # type: ignore[arg-type]
    assert kv_size(null_backend(**extra), made) == (blocks, ())
    assert EngineCore(null_backend(**extra), made).kv_bytes == blocks * 256


@pytest.mark.parametrize(
    ("config", "memory_bytes", "budget"),
    [({"kv_cache_memory": 255}, 1000, 255), ({"memory_utilization": 0.2}, 1000, 200), ({}, 200, 160)],
)
def test_budget_errors_have_the_numbers(config: dict[str, object], memory_bytes: int, budget: int) -> None:
    backend = null_backend(memory_bytes=memory_bytes)
    with pytest.raises(OutOfMemoryBudgetError) as caught:
        EngineCore(backend, EngineConfig(backend="null", **config))  # type: ignore[arg-type]
    text = str(caught.value)
    assert f"the KV budget of {budget} bytes holds no block of 16 tokens (256 bytes)" in text
    assert f"{backend.info.memory_bytes:,} bytes are free on none" in text
    assert "raise kv_cache_memory or memory_utilization" in text and isinstance(caught.value, MemoryError)


def test_the_longest_sequence_is_the_smallest_of_three_limits() -> None:
    def limit(num_blocks: int, max_model_len: int | None) -> tuple[int, str]:
        core, _ = engine(num_blocks=num_blocks, block_tokens=4, max_model_len=max_model_len, max_context_tokens=100)
        return core.limits.max_tokens, core.limits.reason

    assert limit(50, None) == (100, "the model's context is 100 tokens")
    assert limit(50, 60) == (60, "max_model_len is 60")
    assert limit(50, 100) == (100, "the model's context is 100 tokens")
    assert limit(10, 60) == (41, "the KV arena holds 40 tokens; raise kv_cache_memory")
    assert limit(10, None)[0] == 41  # the last token needs no KV


@pytest.mark.parametrize("window", [1, 16, 40, 1000])
@pytest.mark.parametrize("budget", [800, 5000, 100_000, 3_000_000])
def test_p7_rings_and_blocks_share_the_budget(window: int, budget: int) -> None:
    backend = null_backend(window=window, max_context_tokens=3000)
    config = EngineConfig(backend="null", kv_cache_memory=budget, max_num_seqs=10)
    size = kv_size(backend, config)
    core = EngineCore(backend, config)
    block_bytes = 256
    ring = -(-window // 16)
    assert core.kv_bytes == block_bytes * (size.num_blocks + size.rings[0].num_blocks) <= budget
    most = 10 * -(-3000 // 16)
    assert size.num_blocks == most or core.kv_bytes + 3 * block_bytes > budget  # nothing is left over
    assert size.rings[0].num_blocks == min(size.num_blocks, max(-(-size.num_blocks // 4), ring), 10 * ring)
    longest = core.limits.max_tokens
    assert longest == 3000 or longest == core.arena.capacity_tokens + 1
    core.add(request(0, [1] * (longest - 1), max_tokens=1), Receiver())
    core.run()
    core.check()


def test_p7_a_ring_that_is_too_small_limits_the_sequence() -> None:
    backend = null_backend(window=400)
    core = EngineCore(backend, EngineConfig(backend="null", num_kv_blocks=20, max_num_seqs=1))
    assert core.arena.rings[0].num_blocks == 20  # of the 25 of a whole ring
    assert core.limits.max_tokens == 321 and "the KV arena holds 320 tokens" in core.limits.reason


@pytest.mark.parametrize(
    ("asked", "kv_bytes", "found"),
    [(None, 1000, 250), (None, 100 << 30, 4 << 30), (0, 1000, 0), ("1KiB", 1 << 30, 1024), (77, 10, 77)],
)
def test_swap_memory(asked: int | str | None, kv_bytes: int, found: int) -> None:
    assert swap_budget_bytes(EngineConfig(backend="null", swap_memory=asked), kv_bytes) == found
