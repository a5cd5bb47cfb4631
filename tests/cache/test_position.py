"""The position of a KVCache, and its life: F29, F32, F35."""

from __future__ import annotations

import numpy as np
import pytest

from cortexstream.cache import KVCache, KVCacheConfig, address_of
from cortexstream.errors import ArenaError, CacheOverflowError, CacheValueError
from tests.cache.libraries import Library


def make(lib: Library, tokens: int = 10, layers: int = 1) -> KVCache:
    return KVCache(KVCacheConfig(layers, tokens, num_kv_heads=2, head_dim=4), lib.namespace)


def state(cache: KVCache) -> tuple[int, bool, int]:
    return cache.position, cache.is_full, cache.remaining


def write(lib: Library, cache: KVCache, tokens: int, value: float) -> None:
    """One forward pass: every layer writes, then the tokens are counted once."""
    shape = (tokens, cache.config.num_kv_heads, cache.config.head_dim)
    for layer in range(cache.config.num_layers):
        keys, values = cache.update(layer, lib.full(shape, value), lib.full(shape, -value))
        assert keys.shape[0] == values.shape[0] == cache.position + tokens
    cache.advance(tokens)


def test_f29_initial(lib: Library) -> None:
    assert state(make(lib)) == (0, False, 10)


def test_f29_advance(lib: Library) -> None:
    cache = make(lib)
    seen = []
    for tokens in (1, 3, 6):
        cache.advance(tokens)
        seen.append(state(cache))
    assert seen == [(1, False, 9), (4, False, 6), (10, True, 0)]


def test_f29_overflow(lib: Library) -> None:
    cache = make(lib, 5)
    cache.advance(5)
    message = r"^KV cache overflow: position 6 exceeds max context length 5 \(tried to advance by 1 tokens\)$"
    with pytest.raises(CacheOverflowError, match=message) as caught:
        cache.advance()
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, ArenaError)
    assert state(cache) == (5, True, 0)


def test_f29_overflow_multiple(lib: Library) -> None:
    cache = make(lib, 5)
    message = r"^KV cache overflow: position 6 exceeds max context length 5 \(tried to advance by 6 tokens\)$"
    with pytest.raises(RuntimeError, match=message):
        cache.advance(6)
    assert state(cache) == (0, False, 5)
    cache.advance(5)
    assert cache.is_full


@pytest.mark.parametrize("tokens", [0, -1])
def test_f29_invalid_advance(lib: Library, tokens: int) -> None:
    cache = make(lib)
    cache.advance(2)
    with pytest.raises(ValueError, match=r"^num_tokens must be positive$") as caught:
        cache.advance(tokens)
    assert isinstance(caught.value, CacheValueError)
    with pytest.raises(CacheValueError, match=r"num_tokens is 1\.5; must be an integer"):
        cache.advance(1.5)  # type: ignore[arg-type]
    assert state(cache) == (2, False, 8)


def test_f29_reset_position(lib: Library) -> None:
    cache = make(lib)
    cache.advance(7)
    cache.reset()
    assert state(cache) == (0, False, 10)


def test_f32_reset_zeros_memory(lib: Library) -> None:
    """In place: the arrays stay where they are, and so do the ones that a caller holds."""
    cache = make(lib, layers=2)
    held, places = cache.keys(1), [address_of(cache.keys(layer)) for layer in range(2)]
    write(lib, cache, 10, 5.0)
    assert all(lib.numpy(cache.keys(layer)).all() for layer in range(2))
    cache.reset()
    for layer in range(2):
        assert not lib.numpy(cache.keys(layer)).any() and not lib.numpy(cache.values(layer)).any()
    assert not lib.numpy(held).any()
    assert [address_of(cache.keys(layer)) for layer in range(2)] == places


def test_f32_reset_clears_what_is_not_a_number(lib: Library) -> None:
    cache = make(lib)
    write(lib, cache, 10, float("nan"))
    cache.reset()
    assert not lib.numpy(cache.keys(0)).any() and not lib.numpy(cache.values(0)).any()


def test_f32_reset_may_keep_the_memory(lib: Library) -> None:
    cache = make(lib)
    write(lib, cache, 3, 5.0)
    cache.reset(zero=False)
    assert state(cache) == (0, False, 10)
    assert np.all(lib.numpy(cache.keys(0)[:3]) == 5) and np.all(lib.numpy(cache.values(0)[:3]) == -5)


def test_f35_full_generation_cycle(lib: Library) -> None:
    """Two layers, a prompt of 3 tokens and 5 decoding steps fill a context of 8; every token is where it belongs."""
    cache = make(lib, 8, layers=2)
    write(lib, cache, 3, 1.0)
    steps = 0
    while not cache.is_full:
        write(lib, cache, 1, 2.0 + steps)
        steps += 1
    assert steps == 5 and state(cache) == (8, True, 0)
    for layer in range(2):
        assert [float(row[0, 0]) for row in lib.numpy(cache.keys(layer))] == [1, 1, 1, 2, 3, 4, 5, 6]
        assert np.array_equal(lib.numpy(cache.values(layer)), -lib.numpy(cache.keys(layer)))
    with pytest.raises(CacheOverflowError):
        write(lib, cache, 1, 9.0)
    assert state(cache) == (8, True, 0) and not np.any(lib.numpy(cache.keys(0)) == 9)


def test_f35_reset_and_reuse(lib: Library) -> None:
    cache = make(lib, 8, layers=2)
    write(lib, cache, 8, 1.0)
    cache.reset()
    write(lib, cache, 2, 7.0)
    assert state(cache) == (2, False, 6)
    for layer in range(2):
        assert [float(row[1, 3]) for row in lib.numpy(cache.keys(layer))] == [7, 7, 0, 0, 0, 0, 0, 0]
