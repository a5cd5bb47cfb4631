"""Attention over one tile of keys: what decode and prefill are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.torch.quantized_pool import Pool
from cortexstream.kernels.triton._common import FLOAT_TYPES, FP8_TYPES, check_tensor, padded
from cortexstream.kernels.triton._pools import Format, check_pools, check_scales, load_part, load_rows, store_rows

LOG2_E = tl.constexpr(1.4426950408889634)


class Shape(NamedTuple):
    """What a kernel is compiled for. Numbers inside of tl.constexpr; `make_shape` makes them."""

    heads: tl.constexpr  # query heads
    kv_heads: tl.constexpr
    dim: tl.constexpr
    value_dim: tl.constexpr
    key_width: tl.constexpr  # columns of a tile: the power of two that holds a head, or a group if quantised
    value_width: tl.constexpr
    key_parts: tl.constexpr  # tiles of a head: 1, or its groups
    value_parts: tl.constexpr
    bits: tl.constexpr  # of a number in the pools if they are quantised, else 0
    block_n: tl.constexpr  # positions of a tile
    page: tl.constexpr  # positions of a block, 0 for runs
    window: tl.constexpr  # 0 for none
    softcap: tl.constexpr  # 0.0 for none
    sinks: tl.constexpr  # are there any?


@triton.jit
def load_queries(q, vector, live, S: tl.constexpr):
    """The queries [M] in as many parts [M, key_width] as keys have."""
    parts = ()
    for part in tl.static_range(S.key_parts):
        x = load_rows(q + part * S.key_width, vector, live, S.dim, S.key_width, MASKED=True)
        parts = parts + (x,)  # type: ignore[assignment]  # noqa: RUF005 - Triton's language has no *
    return parts


@triton.jit
def no_values(M: tl.constexpr, S: tl.constexpr):
    """What `accumulate` begins with: sums of values, in parts, the largest score and the sum of weights."""
    summed = ()
    for _ in tl.static_range(S.value_parts):
        x = tl.zeros((M, S.value_width), tl.float32)
        summed = summed + (x,)  # type: ignore[assignment]  # noqa: RUF005
    return summed, tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)


@triton.jit
def find(table, kv_head, start, inside, S: tl.constexpr, MASKED: tl.constexpr):
    """Which of a pool's vectors belong to positions start .. start + block_n - 1 of a key head: int64 [block_n].

    `start` is a multiple of block_n. If MASKED, positions that are not `inside` may be in no table.
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
    return slot * S.kv_heads + kv_head


@triton.jit
def scores(queries, k_pool, vector, inside, scale, S: tl.constexpr, MASKED: tl.constexpr):
    """q k^T * scale, capped if there is a cap, times log2(e): exp2 of it is what softmax sums. float32 [M, N]."""
    s = tl.zeros((queries[0].shape[0], S.block_n), tl.float32)
    for part in tl.static_range(S.key_parts):
        k = load_part(k_pool, vector, inside, part, S.dim, S.key_width, S.bits, MASKED).to(queries[part].dtype)
        s = tl.dot(queries[part], tl.trans(k), s, input_precision="ieee")
    s *= scale
    if S.softcap > 0.0:  # c * tanh(s / c) by way of the sigmoid: tl has no tanh
        s = S.softcap * (2.0 * tl.sigmoid(s * (2.0 / S.softcap)) - 1.0)
    return s * LOG2_E


@triton.jit
def accumulate(
    s, v_pool, vector, inside, summed, largest, total, kind: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """One step of the online softmax (Milakov and Gimelshein, 2018): scores s [M, N] and the values at `vector` [N].

    summed, in parts [M, value_width], is the sum of exp2(s - largest) * v, total [M] that of exp2(s - largest); the
    product is made in the type `kind`. Scores of -inf change nothing, not by a bit, even where a line has no others
    yet. If MASKED, values that are not `inside` are not read but taken as zeros, so that 0 * v is 0 whatever memory
    holds there.
    """
    top = tl.maximum(largest, tl.max(s, 1))
    finite = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(largest - finite)
    weights = tl.exp2(s - finite[:, None])
    total = total * shrink + tl.sum(weights, 1)
    joined = ()
    for part in tl.static_range(S.value_parts):
        v = load_part(v_pool, vector, inside, part, S.value_dim, S.value_width, S.bits, MASKED).to(kind)
        product = tl.dot(weights.to(kind), v, summed[part] * shrink[:, None], input_precision="ieee")
        joined = joined + (product,)  # type: ignore[assignment]  # noqa: RUF005
    return joined, top, total


@triton.jit
def divisor(largest, total, sinks, head, live, v_scale, S: tl.constexpr):
    """What sums of values [M] are to be multiplied with, once the heads' sinks joined `total`."""
    if S.sinks:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - top)
        factor = shrink * v_scale / (total * shrink + tl.exp2(sink - top))
    else:
        factor = v_scale / tl.where(total == 0.0, 1.0, total)
    return factor


@triton.jit
def store_values(out, vector, summed, factor, live, S: tl.constexpr):
    """factor * summed, put together from its parts, to the rows `vector` [M] of `out` that are `live`."""
    for part in tl.static_range(S.value_parts):
        x = summed[part] * factor[:, None]
        store_rows(out + part * S.value_width, vector, x, live, S.value_dim, S.value_width)


def make_shape(
    heads: int, pools: Format, block_n: int, block_tokens: int | None, window: int | None, softcap: float | None,
    sinks: torch.Tensor | None,
) -> Shape:  # fmt: skip
    """The shape of a launch with `heads` query heads whose arguments `check_attention` has passed."""
    _, kv_heads, dim, value_dim, bits, group = pools
    widths = (group, group, dim // group, value_dim // group) if bits else (padded(dim), padded(value_dim), 1, 1)
    numbers = (
        heads, kv_heads, dim, value_dim, *widths, bits, block_n, block_tokens or 0, window or 0, float(softcap or 0.0),
        sinks is not None,
    )  # fmt: skip
    return Shape(*map(tl.constexpr, numbers))


def check_attention(
    q: torch.Tensor, k_pool: Pool, v_pool: Pool, tables: torch.Tensor, block_tokens: int | None, window: int | None,
    softcap: float | None, sinks: torch.Tensor | None, k_scale: float, v_scale: float,
) -> Format:  # fmt: skip
    """What decode and prefill have in common; returns what the pools are. Raises ValueError."""
    check_tensor("q", q, (None, None, None), FLOAT_TYPES, q.device)
    _, heads, dim = q.shape
    if not 1 <= dim <= 256:
        raise ValueError(f"q has heads of {dim} numbers; these kernels take 1 to 256")
    pools = check_pools(k_pool, v_pool, (None, dim, None), (q.dtype, *FP8_TYPES), q.device)
    if not 1 <= pools.value_dim <= 256:
        raise ValueError(f"v_pool has heads of {pools.value_dim} numbers; these kernels take 1 to 256")
    if pools.heads < 1 or heads < 1 or heads % pools.heads:
        raise ValueError(f"{heads} query heads cannot share {pools.heads} key heads evenly")
    check_scales(k_pool, k_scale, v_scale)
    _check_tables(tables, block_tokens, q.device)
    if sinks is not None:
        check_tensor("sinks", sinks, (heads,), FLOAT_TYPES, q.device)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None")
    return pools


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
