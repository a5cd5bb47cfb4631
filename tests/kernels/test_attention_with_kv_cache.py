"""`attention_with_kv_cache` against the definition in float64 (F43, F45, F46, F50, F51).

In torch here; kernels/triton/test_attention_with_kv_cache.py runs the same tests on the Triton kernels.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference.prefill_attention import prefill_attention
from tests.conftest import require

torch: Any = require("torch")

from cortexstream.kernels.torch import attention_with_kv_cache as module  # noqa: E402
from cortexstream.kernels.torch.attention_with_kv_cache import KVCache  # noqa: E402

attend: Any = module.attention_with_kv_cache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.float16
NEAR = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}


def normal(*shape: int, dtype: Any = HALF, seed: int = 0) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype).to(DEVICE)


def projections(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int = 32, value_dim: int | None = None, dtype: Any = HALF
) -> tuple[Any, Any, Any]:
    q = normal(batch, heads, tokens, dim, dtype=dtype, seed=1)
    k = normal(batch, kv_heads, tokens, dim, dtype=dtype, seed=2)
    return q, k, normal(batch, kv_heads, tokens, value_dim or dim, dtype=dtype, seed=3)


def cache_of(lengths: list[int], room: int, kv_heads: int, dim: int = 32, dtype: Any = HALF) -> KVCache:
    """Rows of so many tokens; behind them lies NaN."""
    keys, values = (normal(len(lengths), kv_heads, room, dim, dtype=dtype, seed=seed) for seed in (5, 6))
    for row, length in enumerate(lengths):
        keys[row, :, length:], values[row, :, length:] = float("nan"), float("nan")
    return KVCache(keys, values, torch.tensor(lengths, dtype=torch.int32))


def copied(cache: KVCache) -> KVCache:
    return KVCache(*(part.clone() for part in cache))


def same(left: Any, right: Any) -> bool:
    """The same bits: NaN equals NaN."""
    pairs = [x.contiguous().cpu().view(torch.uint8) for x in (left, right)]
    return bool(torch.equal(*pairs))


def definition(q: Any, past: KVCache | None, k: Any, v: Any, causal: bool = True, window: int | None = None) -> Any:
    """In float64, row by row."""
    rows = []
    for row in range(len(q)):
        tokens = []
        for new, old in zip((k, v), past or (None, None), strict=False):
            parts = [new[row]] if past is None else [old[row, :, : int(past.seq_lens[row])], new[row]]
            tokens.append(torch.cat(parts, 1).transpose(0, 1).double().cpu().numpy())
        queries, table = q[row].transpose(0, 1).double().cpu().numpy(), np.zeros((1, 1), np.int64)
        out = prefill_attention(
            queries, tokens[0], tokens[1], table, [len(queries)], [len(tokens[0])], block_tokens=None,
            scale=q.shape[3] ** -0.5, causal=causal, window=window,
        )  # fmt: skip
        rows.append(out.transpose(1, 0, 2))
    return np.stack(rows)


def near(got: Any, want: Any) -> None:
    assert tuple(got.shape) == want.shape
    assert np.abs(got.double().cpu().numpy() - want).max() <= NEAR[got.dtype]


@pytest.mark.parametrize("dtype", list(NEAR), ids=str)
def test_f43_a_prompt_and_then_tokens_are_one_causal_attention(dtype: Any) -> None:
    q, k, v = projections(2, 4, 2, 38, value_dim=48, dtype=dtype)
    want = definition(q, None, k, v)
    output, cache = attend(q[:, :, :33], k[:, :, :33], v[:, :, :33], cache_max_len=40)
    near(output, want[:, :, :33])
    assert output.dtype == dtype and output.device == q.device
    for at in range(33, 38):
        new = (x[:, :, at : at + 1] for x in (q, k, v))
        output, cache = attend(*new, cache)
        near(output, want[:, :, at : at + 1])
    assert cache is not None and cache.seq_lens.tolist() == [38, 38]
    assert same(cache.keys[:, :, :38], k) and same(cache.values[:, :, :38], v)


def test_f43_a_first_call_makes_a_cache_that_the_caller_owns() -> None:
    """Later calls write into the very same tensors and return them."""
    q, k, v = projections(2, 4, 2, 3, value_dim=16)
    _, cache = attend(q, k, v, cache_max_len=64)
    assert cache.keys.shape == (2, 2, 64, 32) and cache.values.shape == (2, 2, 64, 16)
    assert cache.seq_lens.tolist() == [3, 3] and cache.seq_lens.device.type == "cpu"
    _, again = attend(q, k, v, cache)
    assert all(a is b for a, b in zip(again, cache, strict=True)) and cache.seq_lens.tolist() == [6, 6]
    assert same(cache.keys[:, :, 3:6], k)
    lens = torch.tensor([2, 0])
    _, third = attend(q, k, v, cache[:2], lens)  # as two tensors, and lengths of int64
    assert third.keys is cache.keys and third.seq_lens is lens and lens.tolist() == [5, 3]
    assert same(cache.keys[0, :, 2:5], k[0]) and same(cache.keys[1, :, :3], k[1])


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("where", ["host", "device"])
def test_f43_without_an_update_nothing_changes(tokens: int, where: str) -> None:
    """And the result has the same bits. A full cache is no obstacle."""
    cache = cache_of([5, 0, 14], 18, 2)
    cache = cache._replace(seq_lens=cache.seq_lens.to(DEVICE if where == "device" else "cpu"))
    before, (q, k, v) = copied(cache), projections(3, 4, 2, tokens)
    output, returned = attend(q, k, v, cache, update_cache=False)
    assert all(a is b for a, b in zip(returned, cache, strict=True))
    assert all(same(a, b) for a, b in zip(cache, before, strict=True))
    near(output, definition(q, cache, k, v))
    assert same(output, attend(q, k, v, copied(cache))[0])
    full = cache_of([18, 2, 17], 18, 2)
    near(attend(q, k, v, full, update_cache=False)[0], definition(q, full, k, v))
    alone = attend(q, k, v, update_cache=False)
    assert alone[1] is None
    near(alone[0], definition(q, None, k, v))


@pytest.mark.parametrize(("tokens", "causal"), [(1, True), (3, True), (3, False), (17, True)])
def test_f45_rows_of_different_lengths(tokens: int, causal: bool) -> None:
    cache = cache_of([0, 1, 63, 64, 200], 220, 1)
    q, k, v = projections(5, 2, 1, tokens)
    want = definition(q, cache, k, v, causal)
    output, cache = attend(q, k, v, cache, is_causal=causal)
    near(output, want)
    assert cache is not None and cache.seq_lens.tolist() == [n + tokens for n in (0, 1, 63, 64, 200)]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("window", [1, 6, 100])
def test_f39_a_window_looks_back_from_each_query(window: int, tokens: int) -> None:
    cache = cache_of([0, 20, 33], 40, 2)
    q, k, v = projections(3, 4, 2, tokens)
    want = definition(q, cache, k, v, window=window)
    near(attend(q, k, v, cache, window=window)[0], want)


def test_f46_an_overflow_is_told_and_nothing_written() -> None:
    cache = cache_of([3, 7, 8], 8, 2)
    before, (q, k, v) = copied(cache), projections(3, 4, 2, 2)
    words = "Cache overflow for batch 1: tried to add 2 tokens to cache at position 7, but cache_max_len=8"
    for lens in (cache.seq_lens, cache.seq_lens.to(DEVICE)):
        with pytest.raises(RuntimeError) as error:
            attend(q, k, v, cache._replace(seq_lens=lens))
        assert str(error.value) == words
        assert same(lens, before.seq_lens) and all(same(a, b) for a, b in zip(cache, before, strict=True))
    with pytest.raises(
        RuntimeError, match="batch 0: tried to add 2 tokens to cache at position 0, but cache_max_len=1"
    ):
        attend(q, k, v, cache_max_len=1)


@pytest.mark.parametrize("tokens", [1, 2])
def test_f46_unchecked_a_row_that_overflows_is_left_out(tokens: int) -> None:
    """On whatever device the lengths are; the other rows get what they get alone."""
    cache = cache_of([3, 8, 0], 8, 2)
    cache = cache._replace(seq_lens=cache.seq_lens.to(DEVICE))
    before, (q, k, v) = copied(cache), projections(3, 4, 2, tokens)
    output, _ = attend(q, k, v, cache, check=False)
    want = definition(q[[0, 2]], KVCache(*(x[[0, 2]] for x in before)), k[[0, 2]], v[[0, 2]])
    near(output[[0, 2]], want)
    assert bool(output[1].isnan().all()) and cache.seq_lens.tolist() == [3 + tokens, 8, tokens]
    assert same(cache.keys[1], before.keys[1]) and same(cache.keys[0, :, 3 : 3 + tokens], k[0])


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 16), (32, 8), (32, 4), (32, 1), (28, 4)])
def test_f50_query_heads_share_key_heads(heads: int, kv_heads: int) -> None:
    q, k, v = projections(1, heads, kv_heads, 12)
    want = definition(q, None, k, v)
    output, cache = attend(q[:, :, :11], k[:, :, :11], v[:, :, :11], cache_max_len=16)
    near(output, want[:, :, :11])
    assert cache is not None and cache.keys.shape == (1, kv_heads, 16, 32)
    near(attend(q[:, :, 11:], k[:, :, 11:], v[:, :, 11:], cache)[0], want[:, :, 11:])


def test_f51_equal_scores_give_running_means() -> None:
    ones = torch.ones(1, 1, 48, 32, dtype=torch.float32, device=DEVICE)
    v = torch.arange(48.0, device=DEVICE)[None, None, :, None].expand(1, 1, 48, 16)
    output, _ = attend(ones, ones, v)
    np.testing.assert_allclose(output[0, 0, :, 3].cpu().numpy(), np.arange(48) / 2, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_f51_a_prompt_in_chunks_gives_the_same(chunk: int) -> None:
    q, k, v = projections(1, 2, 1, 70)
    cache, parts = None, []
    for at in range(0, 70, chunk):
        new = (x[:, :, at : at + chunk] for x in (q, k, v))
        output, cache = attend(*new, cache, cache_max_len=70)
        parts.append(output)
    near(torch.cat(parts, 2), definition(q, None, k, v))


def test_a_scale_and_views_with_other_strides() -> None:
    """Projections as models have them: tokens before heads in memory."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in projections(2, 4, 2, 9))
    near(attend(q * 2, k, v, scale=0.5 * 32**-0.5)[0], definition(q, None, k, v))


Q, K, V = projections(2, 4, 2, 3)
PAST = cache_of([1, 2], 8, 2)
with torch.inference_mode():
    INFERENCE = torch.tensor([1, 2])
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"query": normal(2, 32, 3, 32), "key": normal(2, 7, 3, 32)},
        r"^num_query_heads \(32\) must be divisible by num_kv_heads \(7\). Got group_size = 4.57 \(must be integer\).$",
    ),
    ({"past_key_value": cache_of([1, 2], 8, 4)}, r"^Cache has 4 heads, expected 2 \(num_kv_heads\)$"),
    (
        {"past_key_value": cache_of([1], 8, 2)},
        r"cached keys have shape \[1, 2, 8, 32\]; they must be \[2, 2, any, 32\]",
    ),
    ({"past_key_value": cache_of([1, 2], 8, 2, 16)}, r"cached keys have shape \[2, 2, 8, 16\]"),
    ({"past_key_value": PAST._replace(values=PAST.values.float())}, "cached values are torch.float32 .* torch.float16"),
    ({"past_key_value": PAST._replace(keys=PAST.keys[:, :, ::2])}, "cached keys .* strides .* contiguous"),
    ({"past_key_value": PAST._replace(values=normal(2, 2, 9, 32))}, "keys have room for 8 tokens and values for 9"),
    ({"past_key_value": PAST[:2]}, r"past_key_value is \(keys, values\) with seq_lens beside it"),
    ({"past_key_value": PAST, "seq_lens": PAST.seq_lens}, "past_key_value is"),
    ({"seq_lens": PAST.seq_lens}, "seq_lens are given without past_key_value"),
    ({"past_key_value": PAST._replace(seq_lens=torch.tensor([1, 2, 3]))}, r"seq_lens is torch.int64 \[3\]; .* \[2\]"),
    ({"past_key_value": PAST._replace(seq_lens=torch.ones(2))}, "seq_lens is torch.float32"),
    ({"past_key_value": PAST._replace(seq_lens=torch.tensor([1, -2]))}, r"seq_lens\[1\] is -2; it must be 0 to 8"),
    ({"past_key_value": PAST._replace(seq_lens=torch.tensor([9, 2]))}, r"seq_lens\[0\] is 9; it must be 0 to 8"),
    ({"cache_max_len": 0}, "cache_max_len is 0; it must be a whole number of at least 1"),
    ({"cache_max_len": 8.5}, "cache_max_len is 8.5; it must be a whole number"),
    ({"cache_max_len": "8"}, "cache_max_len is '8'"),
    ({"cache_max_len": None}, "cache_max_len is None"),
    ({"window": 0}, "window is 0"),
    ({"past_key_value": PAST, "window": 2.5}, "window is 2.5 .* whole number"),
    ({"past_key_value": PAST, "scale": "a"}, "scale is 'a'; it must be a finite number"),
    ({"past_key_value": PAST, "scale": float("nan")}, "scale is nan"),
    ({"past_key_value": PAST, "scale": torch.ones(())}, r"scale is tensor\(1.\)"),
    ({"scale": True}, "scale is True; it must be a finite number"),
    ({"window": True}, "window is True .* a window is a whole number"),
    ({"cache_max_len": True}, "cache_max_len is True; it must be a whole number of at least 1"),
    ({"past_key_value": PAST, "is_causal": "no"}, "is_causal is 'no'; it must be True or False"),
    ({"past_key_value": PAST, "is_causal": 1}, "is_causal is 1; it must be True or False"),
    ({"past_key_value": PAST, "update_cache": 2}, "update_cache is 2; it must be True or False"),
    ({"past_key_value": PAST, "check": 0}, "check is 0; it must be True or False"),
    ({"past_key_value": 5}, r"past_key_value is \(keys, values\) with seq_lens"),
    ({"past_key_value": PAST.keys, "seq_lens": PAST.seq_lens}, r"past_key_value is \(keys, values\) with seq_lens"),
    ({"past_key_value": (None, None), "seq_lens": PAST.seq_lens}, "cached keys are of type NoneType"),
    ({"past_key_value": PAST[:2], "seq_lens": [1, 2]}, "seq_lens are of type list; they must be a tensor"),
    ({"past_key_value": PAST._replace(seq_lens=torch.tensor([2]).expand(2))}, "seq_lens are one number expanded"),
    ({"past_key_value": PAST._replace(values=PAST.keys)}, "overlap in memory"),
    ({"past_key_value": PAST._replace(seq_lens=INFERENCE)}, r"seq_lens were made in torch.inference_mode\(\)"),
    ({"query": [1]}, "query is of type list; it must be a tensor"),
    ({"window": 4, "is_causal": False}, "window is 4 and is_causal False"),
    ({"key": K[:, :, :2]}, r"query \(2, 4, 3, 32\), key \(2, 2, 2, 32\) .* do not go together"),
    ({"value": V[:, :1]}, "do not go together"),
    ({"query": Q[0]}, "must have 4 dimensions, none 0"),
    ({"query": Q[:, :, :0], "key": K[:, :, :0], "value": V[:, :, :0]}, "must have 4 dimensions, none 0"),
    ({"key": K.float()}, "query, key and value are torch.float16, torch.float32 and torch.float16"),
    ({"query": Q.double(), "key": K.double(), "value": V.double()}, "must be of one float16, bfloat16 or float32"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    """And nothing was written."""
    before = copied(PAST)
    with pytest.raises(ValueError, match=words):
        attend(**{"query": Q, "key": K, "value": V, **changed})
    assert all(same(a, b) for a, b in zip(PAST, before, strict=True)) and INFERENCE.tolist() == [1, 2]


def test_a_cache_of_inference_mode_is_written_in_it_and_read_anywhere() -> None:
    with torch.inference_mode():
        _, cache = attend(Q, K, V, cache_max_len=8)
    with pytest.raises(ValueError, match=r"cached keys were made in .*inference_mode\(\)"):
        attend(Q, K, V, cache)
    near(attend(Q, K, V, cache, update_cache=False)[0], definition(Q, cache, K, V))
    with torch.inference_mode():
        attend(Q, K, V, cache)
    assert cache.seq_lens.tolist() == [6, 6]


@pytest.mark.parametrize("tokens", [1, 2])
def test_f46_unchecked_a_negative_length_is_left_out(tokens: int) -> None:
    """A row's slots begin behind the row before, which it must not reach."""
    cache = cache_of([3, 5], 8, 2)
    cache = cache._replace(seq_lens=torch.tensor([3, -1], device=DEVICE))
    before, (q, k, v) = copied(cache), projections(2, 4, 2, tokens)
    output, _ = attend(q, k, v, cache, check=False)
    assert bool(output[1].isnan().all()) and cache.seq_lens.tolist() == [3 + tokens, -1]
    end = 3 + tokens
    assert same(cache.keys[1], before.keys[1]) and same(cache.values[0, :, end:], before.values[0, :, end:])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "length"), [("int64", 2**32), ("int64", 2**32 + 5), ("int64", -(2**32) + 1), ("int64", 2**63 - 1),
                          ("int32", 2**31 - 1)],
)  # fmt: skip
def test_f46_unchecked_a_length_beyond_int32_is_left_out(dtype: str, length: int, tokens: int) -> None:
    """Cut to 32 bits it would be one that fits, and with the new tokens added it would wrap around."""
    cache = cache_of([3, 5], 8, 2)
    cache = cache._replace(seq_lens=torch.tensor([length, 5], dtype=getattr(torch, dtype), device=DEVICE))
    before, (q, k, v) = copied(cache), projections(2, 4, 2, tokens)
    kept, _ = attend(q, k, v, copied(cache), update_cache=False, check=False)
    output, _ = attend(q, k, v, cache, check=False)
    assert bool(output[0].isnan().all()) and cache.seq_lens.tolist() == [length, 5 + tokens]
    assert same(cache.keys[0], before.keys[0]) and same(cache.values[0], before.values[0])
    other = KVCache(*(x[1:] for x in before))
    near(output[1:], definition(q[1:], other, k[1:], v[1:]))
    assert same(cache.keys[1, :, 5 : 5 + tokens], k[1]) and same(kept, output)


def test_there_are_no_gradients() -> None:
    """Whatever asks for them, the cache included; and the mode of the caller stays."""
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    output, cache = attend(q, k, v, cache_max_len=8)
    asking = KVCache(cache.keys.requires_grad_(), cache.values, cache.seq_lens)
    again, _ = attend(q, k, v, asking)
    assert not output.requires_grad and not cache.values.requires_grad and not again.requires_grad
    assert torch.is_grad_enabled()


def test_kernels_are_launched_on_the_tensors_device() -> None:
    for place in (torch.device("cuda", 1), torch.device("cuda", 0)):
        current: Any = module._current(place)
        assert current.idx == place.index
    with module._current(torch.device("cpu")):
        pass


def test_f43_torch_in_place_of_triton_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    require("triton")
    if torch.cuda.is_available():
        pytest.skip("here the Triton kernels compute")
    module._tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            attend(Q, K, V)
    told = [record.getMessage() for record in caplog.records if record.name == module.log.name]
    assert told == [
        "attention_with_kv_cache computes in torch, which is slow: the tensors are on cpu, not on a GPU"
    ]  # fmt: skip
