"""Writing keys and values: F34, and that a write is in place."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from cortexstream.cache import KVCache, KVCacheConfig, address_of, update_kv_cache
from cortexstream.errors import CacheOverflowError, CacheValueError
from tests.cache.libraries import SLACK, Library, normal
from tests.conftest import require


def pair(lib: Library, tokens: int, heads: int = 1, dim: int = 4) -> tuple[Any, Any]:
    return lib.full((tokens, heads, dim), 0.0), lib.full((tokens, heads, dim), 0.0)


def test_f34_single_token_single_head(lib: Library) -> None:
    k, v = pair(lib, 10)
    token = np.arange(4).reshape(1, 1, 4) + 1
    assert update_kv_cache(k, v, lib.array(token, "float16"), lib.array(-token, "float16"), 0) == 1
    assert lib.numpy(k)[0, 0].tolist() == [1, 2, 3, 4] and lib.numpy(v)[0, 0].tolist() == [-1, -2, -3, -4]
    assert not lib.numpy(k)[1:].any() and not lib.numpy(v)[1:].any()


def test_f34_prefill(lib: Library) -> None:
    k, v = pair(lib, 10)
    tokens = np.arange(12).reshape(3, 1, 4) + 1
    assert update_kv_cache(k, v, lib.array(tokens, "float16"), lib.array(-tokens, "float16"), 0) == 3
    assert np.array_equal(lib.numpy(k)[:3], tokens) and np.array_equal(lib.numpy(v)[:3], -tokens)
    assert not lib.numpy(k)[3:].any() and not lib.numpy(v)[3:].any()


def test_f34_sequential_decodes_until_full(lib: Library) -> None:
    cache = KVCache(KVCacheConfig(1, 5, 1, 4), lib.namespace)
    for step in range(5):
        assert not cache.is_full
        keys, values = cache.update(0, lib.full((1, 1, 4), step + 1), lib.full((1, 1, 4), -step - 1))
        assert lib.numpy(keys)[:, 0, 0].tolist() == [n + 1 for n in range(step + 1)]
        assert np.array_equal(lib.numpy(values), -lib.numpy(keys))
        cache.advance()
    assert cache.is_full
    with pytest.raises(CacheOverflowError):
        cache.update(0, lib.full((1, 1, 4), 6), lib.full((1, 1, 4), 6))
    assert lib.numpy(cache.keys(0))[:, 0, 0].tolist() == [1, 2, 3, 4, 5]


def test_f34_update_at_an_offset(lib: Library) -> None:
    k, v = pair(lib, 10)
    assert update_kv_cache(k, v, lib.full((1, 1, 4), 99), lib.full((1, 1, 4), -99), 3) == 4
    assert lib.numpy(k)[:, 0, 2].tolist() == [0, 0, 0, 99, 0, 0, 0, 0, 0, 0]
    assert np.array_equal(lib.numpy(v), -lib.numpy(k))


def test_f34_heads_are_distinct(lib: Library) -> None:
    k, v = pair(lib, 10, heads=4)
    token = np.repeat([[[1.0], [2.0], [3.0], [4.0]]], 4, axis=2)
    update_kv_cache(k, v, lib.array(token, "float16"), lib.array(10 * token, "float16"), 2)
    for head in range(4):
        assert np.all(lib.numpy(k)[2, head] == head + 1) and np.all(lib.numpy(v)[2, head] == 10 * (head + 1))


def test_f34_layers_are_distinct(lib: Library) -> None:
    cache = KVCache(KVCacheConfig(3, 10, 1, 4), lib.namespace)
    for layer in range(3):
        cache.update(layer, lib.full((1, 1, 4), layer + 1), lib.full((1, 1, 4), 10 * (layer + 1)))
    assert cache.position == 0  # all layers of a pass write at one position
    for layer in range(3):
        assert np.all(lib.numpy(cache.keys(layer))[0] == layer + 1)
        assert np.all(lib.numpy(cache.values(layer))[0] == 10 * (layer + 1))


def test_f34_prefill_then_decode(lib: Library) -> None:
    cache = KVCache(KVCacheConfig(1, 5, 1, 4), lib.namespace)
    cache.update(0, lib.full((3, 1, 4), 1), lib.full((3, 1, 4), 1))
    cache.advance(3)
    for _ in range(2):
        cache.update(0, lib.full((1, 1, 4), 2), lib.full((1, 1, 4), 2))
        cache.advance()
    assert cache.is_full
    assert lib.numpy(cache.keys(0))[:, 0, 0].tolist() == lib.numpy(cache.values(0))[:, 0, 3].tolist() == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("dim", [1, 80, 1025, 2048])
def test_f34_any_head_dim(lib: Library, dim: int) -> None:
    """Keys and values may have different ones."""
    k, v = lib.full((6, 3, dim), 0, "float32"), lib.full((6, 3, 7), 0, "float32")
    new_k, new_v = normal(4, 3, dim), normal(4, 3, 7, seed=1)
    update_kv_cache(k, v, lib.array(new_k), lib.array(new_v), 1)
    assert np.array_equal(lib.numpy(k)[1:5], new_k) and np.array_equal(lib.numpy(v)[1:5], new_v)
    assert not lib.numpy(k)[[0, 5]].any() and not lib.numpy(v)[[0, 5]].any()


@pytest.mark.parametrize(("position", "tokens"), [(5, 1), (0, 6), (4, 2), (100, 1)])
def test_f34_beyond_the_capacity_nothing_is_written(lib: Library, position: int, tokens: int) -> None:
    k, v = pair(lib, 5)
    message = f"^KV cache overflow: position {position + tokens} exceeds max context length 5 .tried to write {tokens} "
    with pytest.raises(CacheOverflowError, match=message):
        update_kv_cache(k, v, lib.full((tokens, 1, 4), 1), lib.full((tokens, 1, 4), 1), position)
    assert not lib.numpy(k).any() and not lib.numpy(v).any()


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "position", "message"),
    [
        ((0, 2, 4), (0, 2, 4), 0, "num_tokens must be positive"),
        ((1, 2, 4), (1, 2, 4), -1, "position is -1; must be at least 0"),
        ((1, 2, 4), (1, 2, 4), 0.5, "position is 0.5; must be an integer"),
        ((1, 3, 4), (1, 2, 4), 0, r"cache_k has shape \(5, 2, 4\) and new_k \(1, 3, 4\)"),
        ((1, 2, 4), (1, 2, 5), 0, r"cache_v has shape \(5, 2, 4\) and new_v \(1, 2, 5\)"),
        ((2, 4), (1, 2, 4), 0, r"new_k \(2, 4\)"),
        ((1, 2, 4), (2, 2, 4), 0, "new_k and new_v 1 and 2; both numbers must agree"),
    ],
)
def test_f34_what_does_not_fit_is_refused(
    lib: Library, k_shape: tuple[int, ...], v_shape: tuple[int, ...], position: Any, message: str
) -> None:
    k, v = pair(lib, 5, heads=2)
    with pytest.raises(CacheValueError, match=message):
        update_kv_cache(k, v, lib.full(k_shape, 1), lib.full(v_shape, 1), position)
    assert not lib.numpy(k).any() and not lib.numpy(v).any()


def test_f34_other_dtypes_and_libraries_are_refused(lib: Library) -> None:
    """Also when only the values are wrong: the keys are not written either."""
    k, v = pair(lib, 5)
    new, other = lib.full((1, 1, 4), 1), Library("numpy" if lib.name == "torch" else "torch")
    with pytest.raises(CacheValueError, match="new_v is float32, the cache holds float16; convert it"):
        update_kv_cache(k, v, new, lib.full((1, 1, 4), 1, "float32"), 0)
    with pytest.raises(
        CacheValueError, match=f"new_v is an array of {other.name}, the cache holds arrays of {lib.name}"
    ):
        update_kv_cache(k, v, new, other.full((1, 1, 4), 1), 0)
    with pytest.raises(CacheValueError, match="cache_k and cache_v are arrays of different libraries"):
        update_kv_cache(k, other.full((5, 1, 4), 0), new, new, 0)
    with pytest.raises(CacheValueError, match="new_k is of type list"):
        update_kv_cache(k, v, [1.0], new, 0)
    with pytest.raises(CacheValueError, match="cache_k and cache_v hold 5 and 6 tokens"):
        update_kv_cache(k, lib.full((6, 1, 4), 0), new, new, 0)
    assert not lib.numpy(k).any() and not lib.numpy(v).any()


def test_f34_read_only_values_leave_the_keys_alone() -> None:
    k, v = np.zeros((5, 1, 4), np.float32), np.zeros((5, 1, 4), np.float32)
    v.flags.writeable = False
    with pytest.raises(CacheValueError, match="new_v cannot be written: the array to write into is read-only"):
        update_kv_cache(k, v, np.ones((1, 1, 4), np.float32), np.ones((1, 1, 4), np.float32), 0)
    assert not k.any()


def attend(lib: Library, q: Any, keys: Any, values: Any) -> Any:
    """The library's own attention of queries [1, heads, dim] over keys and values [tokens, heads, dim]."""
    if lib.name == "numpy":
        return np.einsum("qht,thd->qhd", np.einsum("qhd,thd->qht", q, keys), values)
    axes = (1, 0, 2)
    if lib.name == "torch":
        q, keys, values = (x.permute(axes)[None] for x in (q, keys, values))
        return lib.namespace.nn.functional.scaled_dot_product_attention(q, keys, values)
    q, keys, values = (x.transpose(axes)[None] for x in (q, keys, values))
    return lib.namespace.fast.scaled_dot_product_attention(q, keys, values, scale=0.1)


def test_f34_writes_are_in_place_and_views_are_no_copies(lib: Library) -> None:
    """Decoding with attention over the views, and a full prefill: no array moves, none is copied."""
    cache = KVCache(KVCacheConfig(2, 4096, 4, 64, dtype="float32"), lib.namespace)
    arrays = [cache.keys(0), cache.values(0), cache.keys(1), cache.values(1)]
    places, one_array = [address_of(array) for array in arrays], cache.size_bytes // 4

    def step(tokens: int) -> None:
        new = lib.full((tokens, 4, 64), 1.0, "float32")
        for layer in range(2):
            keys, values = cache.update(layer, new, new)
            if lib.name != "mlx":  # there, asking for the address would evaluate before the attention is there
                assert address_of(keys) == address_of(cache.keys(layer))
            lib.settle(attend(lib, new[:1], keys, values))
        cache.advance(tokens)

    for _ in range(20):
        step(1)
    assert lib.new_bytes(lambda: step(1)) < one_array // 10
    assert [address_of(array) for array in arrays] == places
    cache.reset()
    new = lib.full((4096, 4, 64), 2.0, "float32")
    lib.settle(new)

    def prefill() -> Any:
        cache.update(0, new, new)
        return arrays[:2]

    assert lib.new_bytes(prefill) <= SLACK[lib.name]
    assert [address_of(array) for array in arrays] == places
    assert address_of(new) not in places


def test_f34_on_mlx_a_view_that_is_kept_makes_a_copy() -> None:
    """The control: the addresses do show it, and the result is right all the same."""
    mx = require("mlx")
    cache = KVCache(KVCacheConfig(1, 64, 2, 8), mx)
    ones = mx.ones((1, 2, 8), mx.float16)
    keys, _ = cache.update(0, ones, ones)
    mx.eval(keys)
    place = address_of(cache.keys(0))
    cache.advance()
    cache.update(0, 2 * ones, ones)
    assert address_of(cache.keys(0)) != place
    assert cache.keys(0)[:2, 0, 0].tolist() == [1, 2] and keys.tolist() == ones.tolist()


def test_f34_torch_autograd_and_inference_mode() -> None:
    """A cache made in inference mode can be written outside of it, and a written tensor's graph does not reach it."""
    torch = require("torch")
    with torch.inference_mode():
        cache = KVCache(KVCacheConfig(1, 8, 1, 4, dtype="float32"), torch)
        cache.update(0, torch.ones(2, 1, 4), torch.ones(2, 1, 4))
        cache.advance(2)
    new = torch.full((1, 1, 4), 3.0, requires_grad=True)
    keys, values = cache.update(0, 2 * new, new)
    assert not keys.requires_grad and not values.requires_grad
    assert keys[:, 0, 0].tolist() == [1, 1, 6] and values[:, 0, 0].tolist() == [1, 1, 3]
    with pytest.raises(CacheValueError, match="new_k cannot be written: it is on meta, the cache on cpu"):
        cache.update(0, torch.ones(1, 1, 4, device="meta"), torch.ones(1, 1, 4))


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("kind", ["inference", "expanded", "leaf", "view of a leaf"])
def test_f34_torch_tensors_that_cannot_be_written_are_refused_before_the_write(kind: str, which: str) -> None:
    torch = require("torch")
    leaf = torch.zeros(5, 1, 4, requires_grad=True)
    if kind == "inference":
        with torch.inference_mode():
            bad = torch.zeros(5, 1, 4)
        message = "the tensor to write into was made in inference mode; write it there, or make it outside"
    elif kind == "expanded":
        bad = torch.zeros(1, 1, 4).expand(5, 1, 4)
        message = "the array to write into is expanded: its 5 entries of stride 0 are one in memory; copy it"
    else:
        bad = leaf if kind == "leaf" else leaf[:]
        message = "the tensor to write into requires grad; detach it, or write under torch.no_grad()"
    good, new = torch.zeros(5, 1, 4), torch.ones(2, 1, 4)
    caches = (bad, good) if which == "keys" else (good, bad)
    with pytest.raises(CacheValueError, match=f"^new_{which[0]} cannot be written: {re.escape(message)}$"):
        update_kv_cache(*caches, new, new, 0)
    assert not good.any() and not bad.any()
    if kind != "expanded":  # where torch allows it, it is written
        with torch.inference_mode() if kind == "inference" else torch.no_grad():
            assert update_kv_cache(*caches, new, new, 1) == 3
            assert good.sum() == bad.sum() == 8


def test_f34_numpy_arrays_of_stride_zero_are_refused_before_the_write() -> None:
    k, new = np.zeros((5, 1, 4), np.float32), np.ones((2, 1, 4), np.float32)
    v = np.lib.stride_tricks.as_strided(np.zeros((1, 1, 4), np.float32), (5, 1, 4), (0, 16, 4))
    assert v.flags.writeable
    with pytest.raises(CacheValueError, match="new_v cannot be written: the array to write into is expanded: its 5 "):
        update_kv_cache(k, v, new, new, 0)
    assert not k.any() and not v.any()
    one = np.zeros((1, 1, 4), np.float32)[:, np.newaxis, 0]  # of size 1 any stride will do
    assert update_kv_cache(one, one.copy(), new[:1], new[:1], 0) == 1
