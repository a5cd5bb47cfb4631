"""The ring: F36 (the ten listed tests, made true), F38."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest

from cortexstream.cache import MemoryTracker, RingCache, RingMetrics, RingState, address_of
from cortexstream.errors import ArenaError, CacheIndexError, CacheMemoryError, CacheValueError
from tests.cache.libraries import SLACK, Library, normal

HIDDEN, HEADS = 128, 4


def make(lib: Library, tokens: int = 128, batch: int = 1, **options: Any) -> RingCache:
    ring = RingCache(lib.namespace, **options)
    ring.allocate(tokens, batch, HIDDEN, HEADS)
    return ring


def token(lib: Library, position: int, batch: int = 0) -> tuple[Any, Any]:
    """Keys and values [hidden] that tell position, batch entry and place apart; small integers, exact in float32."""
    keys = 1000.0 * batch + 10_000 * position + np.arange(HIDDEN)
    return lib.array(keys), lib.array(-keys)


def fill(lib: Library, ring: RingCache, count: int, batch: int = 0) -> None:
    for position in range(ring.state(batch).total_tokens, ring.state(batch).total_tokens + count):
        ring.append(*token(lib, position, batch), position, batch)


def held(lib: Library, ring: RingCache, batch: int = 0, ordered: bool = True) -> list[int]:
    """The positions of the tokens that the ring returns, read from the contents; every number is checked."""
    keys, values, length = ring.get_cache(batch, ordered=ordered)
    k, v = lib.numpy(keys), lib.numpy(values)
    assert k.shape == v.shape == (HEADS, length, HIDDEN // HEADS)
    positions = [int(row) for row in (k[0, :, 0] - 1000 * batch) // 10_000]
    expected = [1000.0 * batch + 10_000 * p + np.arange(HIDDEN).reshape(HEADS, -1) for p in positions]
    if positions:
        assert np.array_equal(k, np.stack(expected, axis=1)) and np.array_equal(v, -k)
    return positions


def test_f36_1_basic_allocation(lib: Library) -> None:
    ring = make(lib, tokens=2048, batch=2)
    assert ring.memory_bytes == 2 * 2 * 2048 * HIDDEN * 4
    assert ring.batch_size == 2 and (ring.num_heads, ring.max_seq_len, ring.head_dim) == (4, 2048, 32)
    assert ring.state(1) == RingState(0, 0, 0, 0)
    keys, values, length = ring.get_cache(1)
    assert length == 0 and tuple(keys.shape) == tuple(values.shape) == (4, 0, 32)


def test_f36_2_single_append(lib: Library) -> None:
    ring = make(lib)
    ring.append(lib.array(np.full(HIDDEN, 1.5)), lib.array(np.full((HEADS, 32), 2.5)), 0)
    assert ring.state() == RingState(seq_len=1, ring_pos=1, full_count=0, total_tokens=1)
    keys, values, length = ring.get_cache()
    assert length == 1
    assert np.all(lib.numpy(keys) == 1.5) and np.all(lib.numpy(values) == 2.5)


def test_f36_3_multi_append(lib: Library) -> None:
    ring = make(lib)
    fill(lib, ring, 100)
    assert ring.state() == RingState(100, 100, 0, 100) and ring.get_cache().length == 100
    assert held(lib, ring) == held(lib, ring, ordered=False) == [*range(100)]


def test_f36_4_wrap(lib: Library) -> None:
    ring = make(lib)
    fill(lib, ring, 128)
    assert ring.state() == RingState(seq_len=128, ring_pos=0, full_count=1, total_tokens=128)
    fill(lib, ring, 1)
    assert ring.state() == RingState(seq_len=128, ring_pos=1, full_count=1, total_tokens=129)
    assert held(lib, ring) == [*range(1, 129)]
    assert held(lib, ring, ordered=False) == [128, *range(1, 128)]


def test_f36_5_multi_batch(lib: Library) -> None:
    ring = make(lib, batch=4)
    for batch, count in enumerate((10, 20, 30, 40)):
        fill(lib, ring, count, batch)
    assert [ring.state(batch).seq_len for batch in range(4)] == [10, 20, 30, 40]
    for batch, count in enumerate((10, 20, 30, 40)):
        assert held(lib, ring, batch) == [*range(count)]


def test_f36_6_reset(lib: Library) -> None:
    ring = make(lib, batch=2)
    fill(lib, ring, 50, 0)
    fill(lib, ring, 60, 1)
    memory = ring.memory_bytes
    ring.reset(0)
    assert ring.state(0) == RingState(0, 0, 0, 0) and ring.state(1) == RingState(60, 60, 0, 60)
    assert held(lib, ring, 0) == [] and held(lib, ring, 1) == [*range(60)]
    fill(lib, ring, 3, 0)
    assert held(lib, ring, 0) == [0, 1, 2]
    ring.reset_all()
    assert [ring.state(batch).total_tokens for batch in range(2)] == [0, 0]
    assert ring.memory_bytes == memory


def test_f36_7_layout(lib: Library) -> None:
    """Four heads of 32: head 0 first, each head's tokens side by side."""
    ring = make(lib, tokens=8)
    for position in range(3):
        values = np.repeat(np.arange(HEADS), 32) + 100.0 * position
        ring.append(lib.array(values), lib.array(values.reshape(HEADS, 32)), position)
    for array in ring.get_cache()[:2]:
        assert np.array_equal(lib.numpy(array)[:, :, 5], [[h + 100 * p for p in range(3)] for h in range(HEADS)])
        assert address_of(array[1:]) - address_of(array) == 8 * 32 * 4
        assert address_of(array[:, 1:]) - address_of(array) == 32 * 4


def test_f36_8_errors(lib: Library) -> None:
    ring = make(lib, batch=2)
    k, v = token(lib, 0)
    for batch in (2, 5, -1):
        for call in (lambda b: ring.append(k, v, 0, b), ring.get_cache, ring.state, ring.reset, ring.positions):
            with pytest.raises(IndexError, match=rf"^batch_idx out of range: {batch} \(must be 0-1\)$") as caught:
                call(batch)
            assert isinstance(caught.value, CacheIndexError)
    with pytest.raises(ValueError, match=r"^seq_pos mismatch: expected 0 got 5$"):
        ring.append(k, v, 5, 0)
    fill(lib, ring, 130)
    for wrong in (129, 131, 2, -1):
        with pytest.raises(CacheValueError, match=rf"^seq_pos mismatch: expected 130 got {wrong}$"):
            ring.append(k, v, wrong, 0)
    assert ring.state(0).total_tokens == 130 and held(lib, ring) == [*range(2, 130)]
    assert ring.metrics.append_calls == 130 and ring.metrics.reset_calls == 0


def test_f36_9_a_thousand_appends(lib: Library) -> None:
    """Instead of a time: a thousand appends take no memory, and leave the last tokens behind."""
    ring = make(lib)
    tokens = [token(lib, position) for position in range(1000)]
    lib.settle(*(array for pair in tokens for array in pair))
    places = [address_of(array) for array in ring._arrays]

    def appends() -> Any:
        for position, (k, v) in enumerate(tokens):
            ring.append(k, v, position)
        return ring.get_cache()[:2]

    # MLX keeps the graph of a thousand lazy writes until it is evaluated; a step of a model evaluates its own.
    assert lib.new_bytes(appends) <= SLACK[lib.name] + (300_000 if lib.name == "mlx" else 0)
    assert ring.state() == RingState(128, 1000 % 128, 1000 // 128, 1000)
    assert held(lib, ring) == [*range(872, 1000)]
    assert [address_of(array) for array in ring._arrays] == places


def test_f36_10_throughput_workload(lib: Library) -> None:
    """256 tokens in each of 8 entries, in turn, in rings of 100: all are counted, and the last 100 are there."""
    ring = make(lib, tokens=100, batch=8)
    for position in range(256):
        for batch in range(8):
            ring.append(*token(lib, position, batch), position, batch)
    assert ring.metrics.append_calls == 2048 and ring.metrics.append_bytes == 2048 * 2 * HIDDEN * 4
    for batch in range(8):
        assert ring.state(batch) == RingState(100, 56, 2, 256)
        assert held(lib, ring, batch) == [*range(156, 256)]


@pytest.mark.parametrize("capacity", [1, 2, 7, 8])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_f36_two_and_a_half_turns(lib: Library, capacity: int, sinks: int) -> None:
    """After every append the ring holds the sinks and the latest others, in order when asked, and says where."""
    if sinks >= capacity:
        with pytest.raises(CacheValueError, match=f"sinks is {sinks}; max_seq_len is {capacity} and must be larger"):
            make(lib, capacity, sinks=sinks)
        return
    ring = make(lib, capacity, sinks=sinks)
    for total in range(1, capacity * 5 // 2 + 3):
        fill(lib, ring, 1)
        kept = sorted({*range(min(sinks, total)), *range(max(0, total - capacity + sinks), total)})
        kept = [*range(total)] if total <= capacity else kept
        assert held(lib, ring) == ring.positions(ordered=True).tolist() == kept
        assert held(lib, ring, ordered=False) == ring.positions().tolist()
        assert sorted(ring.positions()) == kept
        slot = total if total < capacity else sinks + (total - sinks) % (capacity - sinks)
        turns = max(0, total - sinks) // (capacity - sinks)
        assert ring.state() == RingState(min(total, capacity), slot, turns, total)


def test_f36_results_of_two_entries_do_not_alias(lib: Library) -> None:
    """Both kinds of result of one entry survive whatever happens to the other; a copy survives its own entry too."""
    ring = make(lib, tokens=8, batch=2)
    for batch in range(2):
        fill(lib, ring, 13, batch)
    view, copy = ring.get_cache(0), ring.get_cache(0, ordered=True)
    before = [lib.numpy(array) for array in (view.keys, view.values, copy.keys, copy.values)]
    ring.get_cache(1)
    ring.get_cache(1, ordered=True)
    fill(lib, ring, 9, 1)
    after = [lib.numpy(array) for array in (view.keys, view.values, copy.keys, copy.values)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    del view
    fill(lib, ring, 4, 0)
    assert np.array_equal(lib.numpy(copy.keys), before[2]) and np.array_equal(lib.numpy(copy.values), before[3])
    assert held(lib, ring, 0) == [*range(9, 17)] and held(lib, ring, 1) == [*range(14, 22)]


@pytest.mark.parametrize("numbers", [(0, 1, 8, 2), (4, 0, 8, 2), (4, 1, 0, 2), (4, 1, 8, 0), (-1, 1, 8, 2)])
def test_f38_parameters_must_be_positive(lib: Library, numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"^All parameters must be > 0: "):
        RingCache(lib.namespace).allocate(*numbers)


def test_f38_a_refused_allocate_keeps_what_was_there(lib: Library) -> None:
    ring = make(lib, tokens=8, sinks=2)
    fill(lib, ring, 3)
    for numbers, message in (
        ((4, 1, 10, 3), "hidden_dim must be divisible by num_heads: 10 is not by 3"),
        ((4, 1, 0, 3), "All parameters must be > 0: hidden_dim is 0"),
        ((2, 1, 8, 2), "sinks is 2; max_seq_len is 2 and must be larger"),
        ((4.0, 1, 8, 2), r"max_seq_len is 4\.0; must be an integer"),
    ):
        with pytest.raises(CacheValueError, match=message):
            ring.allocate(*numbers)
    assert held(lib, ring) == [0, 1, 2]
    with pytest.raises(CacheValueError, match="sinks is -1; must be at least 0"):
        RingCache(lib.namespace, sinks=-1)
    with pytest.raises(CacheValueError, match="dtype is 'int4'"):
        RingCache(lib.namespace, dtype="int4")
    with pytest.raises(CacheValueError, match=r"dtype is \[\]"):
        RingCache(lib.namespace, dtype=[])  # type: ignore[arg-type]


def test_f38_what_cannot_be_appended(lib: Library) -> None:
    """Also when only the values are wrong: nothing is written, nothing counted."""
    ring, k = make(lib, tokens=4), token(lib, 9)[0]
    other = Library("numpy" if lib.name == "torch" else "torch")
    for wrong, message in (
        (lib.array(normal(HIDDEN - 1)), r"v has shape \(127,\); must be \(4, 32\) or \(128,\)"),
        (lib.array(normal(32, 4)), r"v has shape \(32, 4\)"),
        (lib.array(normal(1, 4, 32)), r"v has shape \(1, 4, 32\)"),
        (lib.array(normal(HIDDEN), "float16"), "v is float16, the cache holds float32; convert it first"),
        (other.array(normal(HIDDEN)), f"v is an array of {other.name}, the cache holds arrays of {lib.name}"),
        ([1.0], "v is of type list; pass an array of numpy, torch or mlx"),
    ):
        with pytest.raises(CacheValueError, match=message):
            ring.append(k, wrong, 0)
    assert ring.state() == RingState(0, 0, 0, 0) and ring.metrics == RingMetrics()
    ring.append(*token(lib, 0), 0)
    assert held(lib, ring) == [0]


def test_f38_metrics(lib: Library) -> None:
    ring = make(lib, tokens=4, batch=2, dtype="float16")
    for position in range(6):
        ring.append(lib.array(normal(HIDDEN), "float16"), lib.array(normal(HIDDEN), "float16"), position, 1)
    ring.get_cache(1)
    ring.get_cache(1, ordered=True)
    ring.reset(1)
    ring.reset_all()
    assert ring.metrics == RingMetrics(
        append_calls=6, append_bytes=6 * 2 * HIDDEN * 2, reset_calls=2, get_cache_calls=2,
        get_cache_bytes=2 * 4 * HIDDEN * 2,
    )  # fmt: skip


def test_f38_reallocate_returns_the_memory(lib: Library) -> None:
    tracker = MemoryTracker()
    ring = make(lib, tokens=1024, batch=2, tracker=tracker)
    assert tracker.usage("kv_cache") == ring.memory_bytes == 2 * 2 * 1024 * HIDDEN * 4
    fill(lib, ring, 5)
    old = [weakref.ref(array) for array in ring._arrays] if lib.name != "numpy" else [weakref.ref(ring._arrays[0].base)]
    ring.allocate(512, 1, 64, 2)
    gc.collect()
    assert all(reference() is None for reference in old)
    assert tracker.usage("kv_cache") == ring.memory_bytes == 2 * 512 * 64 * 4
    assert tracker.allocation_count == 1
    assert ring.state() == RingState(0, 0, 0, 0) and ring.batch_size == 1
    assert ring.metrics.append_calls == 5
    del ring
    gc.collect()
    assert tracker.total_bytes == 0


@pytest.mark.parametrize("name", ["numpy", "mlx"])
def test_f38_reallocate_holds_one_allocation_at_a_time(name: str) -> None:
    """The old memory goes before the new one comes: the most that is held at once does not grow."""
    lib = Library(name)
    tracemalloc.start()
    try:
        ring = make(lib, tokens=4096)
        assert lib.new_bytes(lambda: ring.allocate(4096, 1, HIDDEN, HEADS)) <= SLACK[name]
        assert ring.memory_bytes > 10 * SLACK[name]
    finally:
        tracemalloc.stop()


def test_f38_without_memory(lib: Library) -> None:
    tracker = MemoryTracker()
    ring = RingCache(lib.namespace, tracker=tracker)
    assert ring.memory_bytes == ring.batch_size == 0
    for use in (lambda: ring.append(*token(lib, 0), 0), ring.get_cache, ring.state, ring.reset, ring.reset_all):
        with pytest.raises(ArenaError, match="no memory; call allocate first"):
            use()
    with pytest.raises(CacheMemoryError, match=r"^Failed to allocate ring cache \(1099511627776 tokens, 3 batch"):
        ring.allocate(2**40, 3, 2**12, 2)
    assert tracker.allocation_count == 0
    with make(lib, tokens=4, tracker=tracker) as other:
        assert tracker.allocation_count == 1
    assert tracker.allocation_count == 0 == other.memory_bytes
    other.allocate(4, 1, HIDDEN, HEADS)
    fill(lib, other, 2)
    assert held(lib, other) == [0, 1]
