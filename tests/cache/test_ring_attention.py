"""Attention over the ring as it lies is attention with a sliding window: F39."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.cache import RingCache
from cortexstream.kernels.reference.attention import attention
from cortexstream.kernels.reference.rope import rope
from tests.cache.libraries import Library, normal

TOKENS, QUERY_HEADS, KV_HEADS, DIM = 37, 6, 2, 16
SCALE = DIM**-0.5


def sequence() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys turned by their positions, and values: [tokens, heads, dim]."""
    inv_freq = (10_000.0 ** (-np.arange(DIM // 2) / (DIM // 2))).astype(np.float32)
    positions = np.arange(TOKENS)
    q, k = (rope(normal(TOKENS, h, DIM, seed=h), positions, inv_freq) for h in (QUERY_HEADS, KV_HEADS))
    return q, k, normal(TOKENS, KV_HEADS, DIM, seed=9)


def masked(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int, sinks: int) -> np.ndarray:
    """Full attention in float64; the query at p sees keys p - window + 1 .. p and the keys before `sinks`."""
    p, key = np.arange(TOKENS)[:, None], np.arange(TOKENS)[None]
    seen = (key <= p) & ((key > p - window) | (key < sinks))
    k, v = (np.repeat(x.astype(np.float64), QUERY_HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.where(seen, np.einsum("qhd,khd->hqk", q, k) * SCALE, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: np.ndarray = np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)
    return result


def attend(lib: Library, q: np.ndarray, keys: Any, values: Any) -> np.ndarray:
    """One query [heads, dim] over keys and values [kv heads, length, dim] with the library's own attention, no mask."""
    if lib.name == "numpy":
        k, v = keys.transpose(1, 0, 2), values.transpose(1, 0, 2)
        return np.squeeze(attention(q[None], k, v, len(k) - 1, SCALE), 0)
    query = lib.array(q)[None, :, None]
    if lib.name == "torch":
        sdpa = lib.namespace.nn.functional.scaled_dot_product_attention
        out = sdpa(query, keys[None], values[None], scale=SCALE, enable_gqa=True)
    else:
        out = lib.namespace.fast.scaled_dot_product_attention(query, keys[None], values[None], scale=SCALE)
    return lib.numpy(out)[0, :, 0]


def through_ring(lib: Library, capacity: int, sinks: int, ordered: bool) -> np.ndarray:
    """Every token is appended and then attends to what the ring holds; the results of all, [tokens, heads, dim]."""
    q, k, v = sequence()
    ring = RingCache(lib.namespace, sinks=sinks)
    ring.allocate(capacity, 1, KV_HEADS * DIM, KV_HEADS)
    results = []
    for position in range(TOKENS):
        ring.append(lib.array(k[position]), lib.array(v[position]), position)
        keys, values, _ = ring.get_cache(ordered=ordered)
        results.append(attend(lib, q[position], keys, values))
    return np.stack(results)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("capacity", [1, 8, 13, 64])
def test_f39_a_ring_is_a_sliding_window(lib: Library, capacity: int, ordered: bool) -> None:
    expected = attention(*sequence(), 0, SCALE, window=capacity)
    np.testing.assert_allclose(through_ring(lib, capacity, 0, ordered), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("capacity", "sinks"), [(8, 1), (8, 4), (8, 7), (13, 4), (64, 4)])
def test_f39_sinks_stay_in_sight(lib: Library, capacity: int, sinks: int) -> None:
    """Once the ring has turned, a query sees the sinks and the capacity - sinks latest; before that, everything."""
    expected = masked(*sequence(), capacity - sinks, sinks)
    expected[:capacity] = masked(*sequence(), TOKENS, 0)[:capacity]
    got = through_ring(lib, capacity, sinks, False)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 8, 64])
def test_f39_the_two_judges_agree(window: int) -> None:
    expected = attention(*sequence(), 0, SCALE, window=window)
    np.testing.assert_allclose(masked(*sequence(), window, 0), expected, atol=1e-6, rtol=1e-5)


def test_f39_the_comparison_sees_a_window_of_one_more_and_lost_sinks() -> None:
    lib = Library("numpy")
    got = through_ring(lib, 8, 0, False)
    assert np.abs(got - attention(*sequence(), 0, SCALE, window=9)).max() > 1e-2
    assert np.abs(got - masked(*sequence(), 7, 1)).max() > 1e-2
