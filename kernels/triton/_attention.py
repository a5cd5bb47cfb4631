"""Attention over one tile of keys: what decode and prefill are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.triton._common import FLOAT_TYPES, FP8_TYPES, check_tensor, padded

LOG2_E = tl.constexpr(1.4426950408889634)


class Shape(NamedTuple):
    """What a kernel is compiled for. Numbers inside of tl.constexpr; `make_shape` makes them."""

    heads: tl.constexpr  # query heads
    kv_heads: tl.constexpr
    dim: tl.constexpr
    value_dim: tl.constexpr
    dim_pad: tl.constexpr  # columns of a tile: a power of two
    value_pad: tl.constexpr
    block_n: tl.constexpr  # positions of a tile
    page: tl.constexpr  # positions of a block, 0 for runs
    window: tl.constexpr  # 0 for none
    softcap: tl.constexpr  # 0.0 for none
    sinks: tl.constexpr  # are there any?


@triton.jit
def load_keys_and_values(k_pool, v_pool, table, kv_head, start, inside, S: tl.constexpr, MASKED: tl.constexpr):
    """K [block_n, dim_pad] and V [block_n, value_pad] of positions start .. start + block_n - 1 of one key head.

    `start` is a multiple of block_n. If MASKED, positions that are not `inside` are not read: they give zeros, so that
    0 * V is 0 whatever memory holds there.
    """
    n = tl.arange(0, S.block_n)
    position = start + n
    if S.page == 0:
        slot = tl.load(table).to(tl.int64) + position
    elif S.page % S.block_n == 0:  # the tile lies in one block: one table entry
        entry = start // S.page
        slot = tl.load(table + entry).to(tl.int64) * S.page + (start - entry * S.page + n)
    elif MASKED:
        slot = tl.load(table + position // S.page, mask=inside, other=0).to(tl.int64) * S.page + position % S.page
    else:
        slot = tl.load(table + position // S.page).to(tl.int64) * S.page + position % S.page
    vector = slot * S.kv_heads + kv_head
    k = load_rows(k_pool, vector, inside, S.dim, S.dim_pad, MASKED)
    v = load_rows(v_pool, vector, inside, S.value_dim, S.value_pad, MASKED)
    return k, v


@triton.jit
def load_rows(base, vector, inside, DIM: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr):
    """[N, PAD]: vectors [N] of DIM numbers each, counted from `base`; columns from DIM on and masked rows are zeros."""
    d = tl.arange(0, PAD)
    at = base + vector[:, None].to(tl.int64) * DIM + d[None, :]
    if MASKED and PAD > DIM:
        x = tl.load(at, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(at, mask=inside[:, None], other=0.0)
    elif PAD > DIM:
        x = tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def store_rows(base, vector, x, inside, DIM: tl.constexpr, PAD: tl.constexpr):
    """The inverse of a masked `load_rows`, in the type that `base` points to."""
    d = tl.arange(0, PAD)
    at = base + vector[:, None].to(tl.int64) * DIM + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=inside[:, None] & (d < DIM)[None, :])


@triton.jit
def scores(q, k, scale, S: tl.constexpr):
    """q k^T * scale, capped if there is a cap, times log2(e): exp2 of it is what softmax sums. float32 [M, N]."""
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
    if S.softcap > 0.0:  # c * tanh(s / c) by way of the sigmoid: tl has no tanh
        s = S.softcap * (2.0 * tl.sigmoid(s * (2.0 / S.softcap)) - 1.0)
    return s * LOG2_E


@triton.jit
def accumulate(s, v, summed, largest, total, kind: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein, 2018): scores s [M, N] and values v [N, DV] join in.

    summed [M, DV] is the sum of exp2(s - largest) * v, total [M] that of exp2(s - largest); the product is made in the
    type `kind`. Scores of -inf change nothing, not by a bit, even where a line has no others yet.
    """
    top = tl.maximum(largest, tl.max(s, 1))
    finite = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(largest - finite)
    weights = tl.exp2(s - finite[:, None])
    total = total * shrink + tl.sum(weights, 1)
    summed = tl.dot(weights.to(kind), v.to(kind), summed * shrink[:, None], input_precision="ieee")
    return summed, top, total


@triton.jit
def divided(summed, largest, total, sinks, head, live, v_scale, S: tl.constexpr):
    """v_scale * summed / total [M, DV], after the heads' sinks joined `total`. A line that saw nothing gives zeros."""
    if S.sinks:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - top)
        total = total * shrink + tl.exp2(sink - top)
        summed = summed * shrink[:, None]
    return summed * (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]


def make_shape(
    q: torch.Tensor, v_pool: torch.Tensor, block_n: int, block_tokens: int | None, window: int | None,
    softcap: float | None, sinks: torch.Tensor | None,
) -> Shape:  # fmt: skip
    """The shape of a launch whose arguments `check_attention` has passed."""
    (_, heads, dim), (_, kv_heads, value_dim) = q.shape, v_pool.shape
    numbers = (
        heads, kv_heads, dim, value_dim, padded(dim), padded(value_dim), block_n, block_tokens or 0, window or 0,
        float(softcap or 0.0), sinks is not None,
    )  # fmt: skip
    return Shape(*map(tl.constexpr, numbers))


def check_attention(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, tables: torch.Tensor, block_tokens: int | None,
    window: int | None, softcap: float | None, sinks: torch.Tensor | None,
) -> None:  # fmt: skip
    """What decode and prefill have in common. Raises ValueError."""
    if q.ndim != 3 or k_pool.ndim != 3 or v_pool.ndim != 3:
        raise ValueError(f"q, k_pool and v_pool have {q.ndim}, {k_pool.ndim} and {v_pool.ndim} dimensions; all need 3")
    (_, heads, dim), (slots, kv_heads, _), value_dim = q.shape, k_pool.shape, v_pool.shape[2]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
    check_tensor("q", q, (None, heads, dim), FLOAT_TYPES, q.device)
    check_tensor("k_pool", k_pool, (slots, kv_heads, dim), (q.dtype, *FP8_TYPES), q.device)
    check_tensor("v_pool", v_pool, (slots, kv_heads, value_dim), (k_pool.dtype,), q.device)
    for name, size in (("q", dim), ("v_pool", value_dim)):
        if not 1 <= size <= 256:
            raise ValueError(f"{name} has heads of {size} numbers; these kernels take 1 to 256")
    _check_tables(tables, block_tokens, q.device)
    if sinks is not None:
        check_tensor("sinks", sinks, (heads,), FLOAT_TYPES, q.device)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None")


def _check_tables(tables: torch.Tensor, block_tokens: int | None, device: torch.device) -> None:
    if tables.ndim != 2 or tables.dtype != torch.int32 or tables.device != device or tables.stride(1) != 1:
        raise ValueError(
            f"tables is {tables.dtype} {list(tables.shape)} with strides {list(tables.stride())} on {tables.device}; "
            f"it must be int32 [rows, blocks] with adjacent blocks, on {device}"
        )
    if block_tokens is None:
        if tables.shape[1] != 1:
            raise ValueError(f"tables has {tables.shape[1]} columns; without block_tokens it must have one")
    elif block_tokens < 1 or block_tokens & (block_tokens - 1):
        raise ValueError(f"block_tokens is {block_tokens}; it must be a power of two, or None for runs")
