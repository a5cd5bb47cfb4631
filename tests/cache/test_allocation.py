"""Sizes, memory and layers of a KVCache: F30 to F33, the twenty allocation tests of the position contract."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cortexstream.cache import KVCache, KVCacheConfig, MemoryTracker, Purpose, address_of
from cortexstream.errors import ArenaError, CacheIndexError, CacheMemoryError, CacheValueError
from tests.cache.libraries import Library
from tests.repo.test_import import HEAVY, loaded_by

QWEN_05B = KVCacheConfig(num_layers=24, max_context_length=2048, num_kv_heads=2, head_dim=64)
LLAMA_8B = KVCacheConfig(num_layers=32, max_context_length=8192, num_kv_heads=8, head_dim=128)
SMALL = KVCacheConfig(num_layers=3, max_context_length=10, num_kv_heads=2, head_dim=4)
MIB = 1 << 20


def make(lib: Library, tracker: MemoryTracker | None = None, **changes: Any) -> KVCache:
    return KVCache(replace(SMALL, **changes), lib.namespace, tracker=tracker)


def test_f30_size_small() -> None:
    assert KVCache.calculate_size(QWEN_05B) == 25_165_824
    assert 24 * MIB <= KVCache.calculate_size(QWEN_05B) < 26 * MIB


def test_f30_size_medium() -> None:
    assert KVCache.calculate_size(replace(LLAMA_8B, max_context_length=4096)) == 536_870_912


def test_f30_size_large_context() -> None:
    size = KVCache.calculate_size(replace(LLAMA_8B, max_context_length=32_768))
    assert size == 4_294_967_296
    assert 4000 * MIB < size < 5000 * MIB


@pytest.mark.parametrize(("dtype", "factor"), [("float16", 1), ("bfloat16", 1), ("float32", 2)])
def test_f30_size_follows_the_dtype(dtype: str, factor: int) -> None:
    assert KVCache.calculate_size(replace(QWEN_05B, dtype=dtype)) == factor * 25_165_824


@pytest.mark.parametrize("field", ["num_layers", "max_context_length", "num_kv_heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -1])
def test_f30_invalid_config(field: str, value: int) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(CacheValueError, match=f"^{field} must be positive$") as caught:
        KVCache.calculate_size(replace(QWEN_05B, **changes))
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, ArenaError)


def test_f30_config_types() -> None:
    with pytest.raises(CacheValueError, match=r"head_dim is 64\.0; must be an integer"):
        replace(QWEN_05B, head_dim=64.0)  # type: ignore[arg-type]
    with pytest.raises(CacheValueError, match="dtype is 'int8'; must be one of float16, bfloat16, float32"):
        replace(QWEN_05B, dtype="int8")
    with pytest.raises(CacheValueError, match=r"dtype is \[\]; must be one of float16, bfloat16, float32"):
        replace(QWEN_05B, dtype=[])  # type: ignore[arg-type]


def test_f32_allocation_basic(lib: Library) -> None:
    cache = make(lib)
    assert cache.size_bytes == KVCache.calculate_size(SMALL) == 3 * 2 * 10 * 2 * 4 * 2
    assert cache.config == SMALL
    assert str(cache.keys(0).dtype).endswith("float16") and tuple(cache.keys(0).shape) == (10, 2, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_f32_allocation_of_other_dtypes(lib: Library, dtype: str) -> None:
    if lib.name == "numpy" and dtype == "bfloat16":
        with pytest.raises(CacheValueError, match="'bfloat16'; with numpy it must be one of float16, float32"):
            make(lib, dtype=dtype)
        return
    cache = make(lib, dtype=dtype)
    assert str(cache.values(2).dtype).endswith(dtype)
    assert cache.size_bytes == KVCache.calculate_size(cache.config)


def test_f33_allocation_with_tracker(lib: Library) -> None:
    tracker = MemoryTracker()
    initial = tracker.total_bytes
    cache = make(lib, tracker)
    assert tracker.total_bytes - initial == cache.size_bytes > 0
    cache.close()
    assert tracker.total_bytes == initial


def test_f31_layer_pointers_valid(lib: Library) -> None:
    cache = make(lib)
    places = [address_of(array) for layer in range(3) for array in (cache.keys(layer), cache.values(layer))]
    assert all(places) and len(set(places)) == 6
    assert places == [address_of(array) for layer in range(3) for array in (cache.keys(layer), cache.values(layer))]


@pytest.mark.parametrize("layer", [-1, 24, 100])
def test_f31_layer_pointers_invalid_index(lib: Library, layer: int) -> None:
    cache = make(lib, num_layers=24)
    for access in (cache.keys, cache.values):
        with pytest.raises(IndexError, match=rf"^Layer index out of range: {layer} \(must be 0-23\)$") as caught:
            access(layer)
        assert isinstance(caught.value, CacheIndexError) and isinstance(caught.value, ArenaError)


def test_f31_layer_pointers_spacing(lib: Library) -> None:
    """Values follow their keys, a layer follows the one before; on MLX an array is an allocation of its own."""
    cache = make(lib)
    step = 10 * 2 * 4 * 2
    places = [address_of(array) for layer in range(3) for array in (cache.keys(layer), cache.values(layer))]
    if lib.name == "mlx":
        places.sort()
        assert all(after - before >= step for before, after in pairwise(places))
    else:
        assert places == [places[0] + number * step for number in range(6)]
    assert cache.keys(1).nbytes == cache.values(1).nbytes == step


def test_f31_a_slice_is_the_memory_itself(lib: Library) -> None:
    cache = make(lib)
    assert address_of(cache.values(1)[3:]) == address_of(cache.values(1)) + 3 * 2 * 4 * 2
    cache.update(1, lib.full((4, 2, 4), 1.0), lib.full((4, 2, 4), 2.0))
    assert np.all(lib.numpy(cache.values(1)[3:4]) == 2)


def test_f32_zero_init_keys(lib: Library) -> None:
    assert not lib.numpy(make(lib).keys(0)).any()


def test_f32_zero_init_values(lib: Library) -> None:
    assert not lib.numpy(make(lib).values(0)).any()


def test_f32_zero_init_all_layers(lib: Library) -> None:
    """Also in memory that was used before."""
    first = make(lib, max_context_length=4096)
    for layer in range(3):
        first.update(layer, lib.full((4096, 2, 4), 7.0), lib.full((4096, 2, 4), 8.0))
        lib.settle(first.keys(layer), first.values(layer))
    first.close()
    second = make(lib, max_context_length=4096)
    for layer in range(3):
        assert not lib.numpy(second.keys(layer)).any() and not lib.numpy(second.values(layer)).any()


def test_f33_tracking_allocation(lib: Library) -> None:
    tracker = MemoryTracker()
    cache = make(lib, tracker)
    assert tracker.usage(Purpose.KV_CACHE) == tracker.usage("kv_cache") == cache.size_bytes
    assert tracker.usage("weights") == tracker.usage("intermediate") == tracker.usage("unknown") == 0
    assert tracker.allocation_count == 1


def test_f33_tracking_deallocation(lib: Library) -> None:
    """By `close`, by the end of a with block, and by the garbage collector, cycles too."""
    tracker = MemoryTracker()
    with make(lib, tracker) as cache:
        assert tracker.allocation_count == 1
    assert (tracker.allocation_count, tracker.total_bytes, cache.size_bytes) == (0, 0, 0)
    cache.close()  # once more does nothing
    lost = make(lib, tracker)
    lost.itself = lost  # type: ignore[attr-defined]
    assert tracker.allocation_count == 1
    del lost
    gc.collect()
    assert (tracker.allocation_count, tracker.total_bytes) == (0, 0)


def test_f33_tracking_multiple(lib: Library) -> None:
    tracker = MemoryTracker()
    one, two = make(lib, tracker), make(lib, tracker, num_layers=5)
    assert tracker.total_bytes == one.size_bytes + two.size_bytes and tracker.allocation_count == 2
    remaining = two.size_bytes
    del one
    gc.collect()
    assert (tracker.total_bytes, tracker.allocation_count) == (remaining, 1)


def test_f32_realistic_qwen(lib: Library) -> None:
    tracker = MemoryTracker()
    with KVCache(QWEN_05B, lib.namespace, tracker=tracker) as cache:
        assert cache.size_bytes == tracker.total_bytes == 25_165_824
        assert tuple(cache.values(23).shape) == (2048, 2, 64)


def test_f30_realistic_llama() -> None:
    assert KVCache.calculate_size(LLAMA_8B) == 1_073_741_824


def test_f31_edge_single_layer(lib: Library) -> None:
    cache = make(lib, num_layers=1)
    assert not lib.numpy(cache.keys(0)).any()
    with pytest.raises(IndexError, match=r"Layer index out of range: 1 \(must be 0-0\)"):
        cache.keys(1)


def test_f32_edge_single_head(lib: Library) -> None:
    cache = make(lib, num_kv_heads=1)
    assert tuple(cache.keys(0).shape) == (10, 1, 4)


def test_f32_edge_small_context(lib: Library) -> None:
    cache = make(lib, max_context_length=1)
    before = address_of(cache.keys(0))
    cache.update(0, lib.full((1, 2, 4), 3.0), lib.full((1, 2, 4), 4.0))
    cache.advance()
    assert cache.is_full and cache.remaining == 0
    assert np.all(lib.numpy(cache.keys(0)) == 3) and np.all(lib.numpy(cache.values(0)) == 4)
    assert address_of(cache.keys(0)) == before


@pytest.mark.parametrize("tokens", [2**25, 2**31, 2**62, 2**70])
def test_f30_memory_that_cannot_be_had(lib: Library, tokens: int) -> None:
    """A pebibyte and more: refused by name, and not counted."""
    tracker = MemoryTracker()
    with pytest.raises(
        CacheMemoryError, match=rf"^Failed to allocate KV cache \(\d+ MB, {tokens} tokens, 3 layers\)"
    ) as e:
        make(lib, tracker, max_context_length=tokens, num_kv_heads=2**10, head_dim=2**14)
    assert isinstance(e.value, RuntimeError) and isinstance(e.value, MemoryError)
    assert tracker.allocation_count == 0


def test_a_closed_cache_is_refused(lib: Library) -> None:
    cache = make(lib)
    cache.close()
    for use in (lambda: cache.keys(0), lambda: cache.values(0), cache.advance, cache.reset):
        with pytest.raises(ArenaError, match="closed; make a new one"):
            use()


def test_libraries_and_devices_that_are_refused() -> None:
    with pytest.raises(CacheValueError, match=r"pass the module numpy, torch or mlx\.core"):
        KVCache(SMALL, gc)
    with pytest.raises(CacheValueError, match="device is 'cuda'; only torch takes one"):
        KVCache(SMALL, np, device="cuda")
    with pytest.raises(CacheValueError, match="array is of type list"):
        address_of([1.0])


def test_caches_on_numpy_load_no_other_array_library() -> None:
    used = "from cortexstream.cache import *; RingCache().allocate(4, 1, 8, 2); KVCache(KVCacheConfig(1, 4, 1, 4))"
    assert loaded_by(used) & HEAVY == set()
