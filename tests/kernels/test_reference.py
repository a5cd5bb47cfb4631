"""The numpy definitions against torch (F42, F46, F50, F51): other code, the same mathematics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference.attention import attention
from cortexstream.kernels.reference.kv_append import kv_append
from cortexstream.kernels.reference.rms_norm import rms_norm
from cortexstream.kernels.reference.rope import rope
from tests.conftest import require

HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1), (7, 7)]


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_torch(q: Any, k: Any, v: Any, start: int, scale: float, window: int | None) -> Any:
    """torch's scaled_dot_product_attention with an explicit mask, in float64."""
    torch = require("torch")
    position, key = start + np.arange(len(q))[:, None], np.arange(len(k))[None, :]
    mask = (key <= position) & (key > position - (window or len(k)))
    per_head = [torch.from_numpy(x.astype(np.float64)).transpose(0, 1) for x in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    per_head[1:] = [x.repeat_interleave(groups, 0) for x in per_head[1:]]
    out = torch.nn.functional.scaled_dot_product_attention(*per_head, attn_mask=torch.from_numpy(mask), scale=scale)
    return out.transpose(0, 1).numpy()


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (1, 40), (5, 0), (5, 12), (17, 1), (33, 33)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_f42_f50_attention_is_torchs(heads: int, kv_heads: int, tokens: int, start: int, window: int | None) -> None:
    q, k, v = (
        random(tokens, heads, 16),
        random(start + tokens, kv_heads, 16, seed=1),
        random(start + tokens, kv_heads, 8),
    )
    got = attention(q, k, v, start, 0.3, window)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, by_torch(q, k, v, start, 0.3, window), atol=1e-6, rtol=1e-6)


def test_f51_a_chunk_gives_the_bits_of_the_whole() -> None:
    q, k, v = random(50, 4, 16), random(50, 2, 16, seed=1), random(50, 2, 16, seed=2)
    whole = attention(q, k, v, 0, 0.25, 20)
    for size in (1, 7, 49):
        chunks = [
            attention(q[at : at + size], k[: at + size], v[: at + size], at, 0.25, 20) for at in range(0, 50, size)
        ]
        assert np.array_equal(np.concatenate(chunks), whole)


@pytest.mark.parametrize(("start", "window"), [(8, 5), (30, 24), (3, 9), (40, 1)])
def test_f39_keys_that_no_query_sees_may_be_left_out(start: int, window: int) -> None:
    """The same bits, wherever the keys begin, up to the first that the first query sees."""
    q, k, v = random(7, 4, 16), random(start + 7, 2, 16, seed=1), random(start + 7, 2, 16, seed=2)
    sinks = random(4, seed=3)
    whole = attention(q, k, v, start, 0.25, window, sinks)
    for first in range(max(0, start - window + 1) + 1):
        assert np.array_equal(attention(q, k[first:], v[first:], start, 0.25, window, sinks, first), whole)


def test_f39_a_sink_is_a_key_without_a_value() -> None:
    """A sink of logit s equals one more key whose score is s and whose value is zero."""
    q, k, v, sinks = random(1, 4, 16), random(6, 2, 16, seed=1), random(6, 2, 16, seed=2), random(4, seed=3)
    scores = np.einsum("hd,lhd->hl", q[0], np.repeat(k, 2, axis=1)).astype(np.float64)
    weights = np.exp(np.concatenate((scores, sinks[:, None]), axis=1))
    weights /= weights.sum(axis=1, keepdims=True)
    want = np.einsum("hl,lhd->hd", weights[:, :-1], np.repeat(v, 2, axis=1))
    np.testing.assert_allclose(attention(q, k, v, 5, 1.0, sinks=sinks)[0], want, atol=1e-6)


@pytest.mark.parametrize(
    ("q", "k", "start", "more", "words"),
    [
        ((2, 7, 8), (2, 3, 8), 0, {}, "7 query heads cannot share 3"),
        ((2, 4, 8), (4, 2, 8), 1, {}, "from position 1 need 3 keys from 0 on; there are 4"),
        ((2, 4, 8), (1, 2, 8), -1, {}, "from position -1"),
        ((2, 4, 8), (6, 2, 8), 8, {"window": 5, "first": 5}, "from position 8 need 5 keys from 5 on; there are 6"),
        ((2, 4, 8), (5, 2, 8), 8, {"window": 5, "first": 5}, "first is 5; for queries from 8 and window 5 .* 0 to 4"),
        ((2, 4, 8), (9, 2, 8), 8, {"first": 1}, "first is 1; for queries from 8 and window None it must be 0 to 0"),
        ((2, 4, 8), (5, 2, 8), 2, {"first": -1}, "first is -1"),
        ((2, 4, 8), (2, 2, 4), 0, {}, "must be"),
        ((2, 4, 8), (2, 2, 8), 0, {"window": 0}, "window is 0"),
        ((2, 4, 8), (2, 2, 8), 0, {"sinks": random(2)}, "4 query heads need"),
    ],
)
def test_attention_refuses(q: Any, k: Any, start: int, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention(random(*q), random(*k), random(*k), start, 1.0, **more)


def test_rms_norm_is_torchs() -> None:
    torch = require("torch")
    x, weight = random(3, 5, 48), random(48, seed=1)
    want = torch.nn.functional.rms_norm(torch.from_numpy(x), (48,), torch.from_numpy(weight), 1e-5).numpy()
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), want, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="must have"):
        rms_norm(x, weight[:-1], 1e-5)


def test_rope_is_a_product_of_complex_numbers() -> None:
    """Pair d turns by e^(i p f_d); the pairs are (d, d + D/2)."""
    x, positions = random(4, 3, 10), np.array([0, 1, 50, 1000])
    inv_freq = (10000.0 ** (-np.arange(5) / 5)).astype(np.float32)
    pairs = x[..., :5] + 1j * x[..., 5:]
    turned = pairs * np.exp(1j * (positions[:, None].astype(np.float32) * inv_freq).astype(np.float64))[:, None]
    np.testing.assert_allclose(rope(x, positions, inv_freq), np.concatenate((turned.real, turned.imag), -1), atol=1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        rope(x, positions, inv_freq[:-1])


def test_f34_kv_append_writes_the_slots_and_no_others() -> None:
    pool, new = np.zeros((8, 2, 3), np.float32), random(3, 2, 3)
    kv_append(pool, np.array([6, 1, 3]), new)
    assert np.array_equal(pool[[6, 1, 3]], new)
    assert not pool[[0, 2, 4, 5, 7]].any()


@pytest.mark.parametrize(
    ("slots", "new", "error", "words"),
    [
        ([0, 8], random(2, 2, 3), IndexError, "slot 8 is outside the pool of 8"),
        ([0, -1], random(2, 2, 3), IndexError, "slot -1"),
        ([4, 4], random(2, 2, 3), ValueError, "named twice"),
        ([4, 5], random(3, 2, 3), ValueError, "does not fit"),
        ([4, 5], random(2, 1, 3), ValueError, "does not fit"),
        ([4, 5], random(2, 2, 3).astype(np.float64), ValueError, "float64"),
    ],
)
def test_f46_kv_append_refuses_before_it_writes(slots: list[int], new: Any, error: type[Exception], words: str) -> None:
    pool = np.zeros((8, 2, 3), np.float32)
    with pytest.raises(error, match=words):
        kv_append(pool, np.array(slots), new)
    assert not pool.any()
