"""`kernels.triton.kv_append` against its definition (F34, F46, P12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference import kv_append as reference
from cortexstream.kernels.triton.kv_append import kv_append
from tests.kernels.triton.support import DEVICE, DTYPES, int32, normal, same, torch

HEADS = [(1, 1, 1), (2, 80, 80), (3, 192, 128), (8, 64, 64), (2, 256, 256), (1, 1280, 1280), (2, 96, 1100)]


def pools(slots: int, heads: int, dim: int, value_dim: int, dtype: Any) -> tuple[Any, Any]:
    return normal(slots, heads, dim, dtype=dtype, seed=5), normal(slots, heads, value_dim, dtype=dtype, seed=6)


def as_bytes(tensor: Any) -> Any:
    """A view in numpy, which has no bfloat16."""
    return tensor.view(torch.uint8).numpy()


def by_definition(pool: Any, slots: Any, new: Any) -> Any:
    """The pool as `kernels.reference.kv_append` leaves it, given the slots that are not padding."""
    expected = pool.clone().cpu()
    live = slots.cpu() >= 0
    stored = new.cpu()[live].to(pool.dtype).contiguous()
    reference.kv_append(as_bytes(expected), slots.cpu()[live].long().numpy(), as_bytes(stored))
    return expected.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "value_dim"), HEADS)
def test_f34_keys_and_values_land_in_their_slots_and_nowhere_else(
    heads: int, dim: int, value_dim: int, dtype: Any
) -> None:
    """Padding in between, tokens far apart in memory, in blocks that do not follow each other."""
    k_pool, v_pool = pools(32, heads, dim, value_dim, dtype)
    projection = normal(5, heads * (dim + value_dim) + 24, dtype=dtype)
    k = projection[:, : heads * dim].unflatten(1, (heads, dim))
    v = projection[:, heads * dim : heads * (dim + value_dim)].unflatten(1, (heads, value_dim))
    slots = int32(31, -1, 0, 17, 16)
    wanted = by_definition(k_pool, slots, k), by_definition(v_pool, slots, v)
    kv_append(k, v, k_pool, v_pool, slots)
    assert same(k_pool, wanted[0]) and same(v_pool, wanted[1])


@pytest.mark.parametrize("pool_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_rounded_to_the_pools_type(dtype: Any, pool_dtype: Any) -> None:
    k_pool, v_pool = pools(8, 2, 48, 40, pool_dtype)
    k, v, slots = normal(3, 2, 48, dtype=dtype), normal(3, 2, 40, dtype=dtype, seed=1), int32(6, 1, 3)
    wanted = by_definition(k_pool, slots, k), by_definition(v_pool, slots, v)
    kv_append(k, v, k_pool, v_pool, slots.long())
    assert same(k_pool, wanted[0]) and same(v_pool, wanted[1])


@pytest.mark.parametrize(("pool_dtype", "largest"), [(torch.float8_e5m2, 57344), (torch.float8_e4m3fn, 448)], ids=str)
def test_fp8_holds_the_scaled_number_and_never_an_infinity(pool_dtype: Any, largest: float) -> None:
    k, v, slots = normal(3, 2, 64), normal(3, 2, 64, seed=1), int32(1, -1, 3)
    k[0, 0, :2] = torch.tensor([1e9, -1e9])
    k_pool, v_pool = (torch.zeros(4, 2, 64, device=DEVICE).to(pool_dtype) for _ in range(2))
    kv_append(k, v, k_pool, v_pool, slots, k_scale=0.5, v_scale=2.0)
    assert same(k_pool[[1, 3]], (k[[0, 2]] / 0.5).clamp(-largest, largest).to(pool_dtype))
    assert same(v_pool[[1, 3]], (v[[0, 2]] / 2.0).to(pool_dtype))
    assert k_pool[1, 0, :2].tolist() == [largest, -largest]
    assert not k_pool[[0, 2]].float().any() and not v_pool[[0, 2]].float().any()


def test_f36_a_ring_is_nothing_special() -> None:
    """Positions modulo the capacity: after two and a half rounds the last tokens are there."""
    k_pool, v_pool = pools(8, 1, 16, 16, torch.float16)
    k, v = normal(20, 1, 16, dtype=torch.float16), normal(20, 1, 16, dtype=torch.float16, seed=1)
    for at in range(0, 20, 5):
        slots = int32(*(position % 8 for position in range(at, at + 5)))
        kv_append(k[at : at + 5], v[at : at + 5], k_pool, v_pool, slots)
    for position in range(12, 20):
        assert same(k_pool[position % 8], k[position]) and same(v_pool[position % 8], v[position])


def test_no_tokens_write_nothing() -> None:
    k_pool, v_pool = pools(4, 2, 16, 16, torch.float32)
    before = k_pool.clone(), v_pool.clone()
    kv_append(normal(0, 2, 16), normal(0, 2, 16), k_pool, v_pool, int32())
    kv_append(normal(2, 2, 16), normal(2, 2, 16), k_pool, v_pool, int32(-1, -7))
    assert same(k_pool, before[0]) and same(v_pool, before[1])


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"slots": int32(0, 8)}, IndexError, "slot 8 is outside the pool of 8 slots; nothing was written"),
    ({"slots": int32(4, 4)}, ValueError, "a slot is named twice"),
    ({"slots": int32(4)}, ValueError, r"slots has shape \[1\]; it must be \[2\]"),
    ({"slots": normal(2)}, ValueError, "slots is torch.float32; it must be torch.int32 or torch.int64"),
    ({"k": normal(2, 3, 16)}, ValueError, r"v has shape \[2, 2, 16\]; it must be \[2, 3, dim\]"),
    ({"k": normal(2, 32)}, ValueError, r"k has shape \[2, 32\]; it must be \[T, heads, dim\]"),
    ({"v": normal(3, 2, 16)}, ValueError, r"v has shape \[3, 2, 16\]; it must be \[2, 2, dim\]"),
    ({"k": normal(2, 2, 32)[:, :, ::2]}, ValueError, "the heads of a token must be adjacent"),
    ({"k": normal(2, 2, 16).double()}, ValueError, "k is torch.float64"),
    ({"k_pool": normal(8, 2, 15)}, ValueError, r"k_pool has shape \[8, 2, 15\]; it must be \[any, 2, 16\]"),
    ({"v_pool": normal(7, 2, 16)}, ValueError, r"v_pool has shape \[7, 2, 16\]; it must be \[8, 2, 16\]"),
    ({"v_pool": normal(8, 2, 16).half()}, ValueError, "v_pool is torch.float16; it must be torch.float32"),
    ({"k_pool": normal(8, 2, 32)[:, :, :16]}, ValueError, "k_pool has strides .* it must be contiguous"),
]


@pytest.mark.parametrize(("changed", "error", "words"), REFUSED)
def test_f46_what_does_not_fit_is_refused_and_nothing_written(
    changed: dict[str, Any], error: type[Exception], words: str
) -> None:
    k_pool, v_pool = pools(8, 2, 16, 16, torch.float32)
    arguments = {
        "k": normal(2, 2, 16), "v": normal(2, 2, 16), "k_pool": k_pool, "v_pool": v_pool, "slots": int32(4, 5)
    }  # fmt: skip
    arguments |= changed
    before = [arguments[name].clone() for name in ("k_pool", "v_pool")]
    with pytest.raises(error, match=words):
        kv_append(**arguments)
    assert same(arguments["k_pool"], before[0]) and same(arguments["v_pool"], before[1])


def test_f46_without_the_check_memory_beyond_the_pool_is_safe() -> None:
    """The pools are the middle of larger arrays, which stay as they are."""
    around = normal(16, 2, 16), normal(16, 2, 16)
    before = [x.clone() for x in around]
    k, v = normal(2, 2, 16, seed=1), normal(2, 2, 16, seed=2)
    kv_append(k, v, around[0][4:12], around[1][4:12], int32(8, 2), check=False)
    for whole, old, new in zip(around, before, (k, v), strict=True):
        old[6] = new[1]
        assert same(whole, old)


def test_the_definition_is_told_the_truth() -> None:
    """`by_definition` changes what it should: the check of the check."""
    pool, slots, new = normal(4, 1, 2), int32(2, -1), normal(2, 1, 2, seed=1)
    assert np.array_equal(by_definition(pool, slots, new).cpu()[2], new.cpu()[0])
    assert same(by_definition(pool, slots, new)[[0, 1, 3]], pool[[0, 1, 3]])
