"""From a layer's projections to attention in one launch: head norms, rotary embedding, keys and values to the pools."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.torch.quantized_pool import Pool
from cortexstream.kernels.triton._common import (
    FLOAT_TYPES,
    FP8_TYPES,
    capability,
    check_tensor,
    check_tokens,
)
from cortexstream.kernels.triton._pools import (
    Format,
    check_pools,
    check_scales,
    load_rows,
    store_pool,
    store_rows,
)
from cortexstream.kernels.triton.kv_append import check_slots


class Config(NamedTuple):
    """A program takes `heads` heads of one token."""

    heads: int
    num_warps: int


CONFIGS = {80: Config(8, 2), 90: Config(8, 2)}  # by compute capability


class Head(NamedTuple):
    """What a head is made of. Numbers inside of tl.constexpr; the pad is the power of two that holds it."""

    dim: tl.constexpr
    dim_pad: tl.constexpr
    half: tl.constexpr  # of the dimensions that turn; those from 2 * half on stay
    norm: tl.constexpr
    unit_offset: tl.constexpr


@triton.jit
def turned(source, weight, cosines, live, eps, H: tl.constexpr):
    """The heads [N] that follow each other from `source`, normalised and rotated: float32 [N, dim_pad]."""
    d = tl.arange(0, H.dim_pad)
    low, turns = d < H.half, d < 2 * H.half
    pair = tl.where(low, d + H.half, d - H.half)  # what turns with d
    angle = tl.where(low, d, d - H.half)
    head = tl.arange(0, live.shape[0])[:, None] * H.dim
    x = tl.load(source + head + d[None, :], mask=live[:, None] & (d < H.dim)[None, :], other=0.0).to(tl.float32)
    y = tl.load(source + head + pair[None, :], mask=live[:, None] & turns[None, :], other=0.0).to(tl.float32)
    if H.norm:
        factor = tl.rsqrt(tl.sum(x * x, 1) / H.dim + eps)[:, None]
        x *= factor * weights(weight, d, d < H.dim, H)[None, :]
        y *= factor * weights(weight, pair, turns, H)[None, :]
    cos = tl.load(cosines + angle, mask=turns, other=1.0)
    sin = tl.load(cosines + H.half + angle, mask=turns, other=0.0)
    return x * cos[None, :] + y * tl.where(low, -sin, sin)[None, :]


@triton.jit
def weights(weight, i, mask, H: tl.constexpr):
    w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    if H.unit_offset:
        w += 1.0
    return w


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["positions", "slots"])
def rope_append_kernel(
    q, k, v, q_out, k_pool, v_pool, table, positions, slots, q_weight, k_weight, q_stride, k_stride, v_stride,
    num_slots, eps, k_scale, v_scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, tiles): first the tiles of N query heads, then those of key heads, then those of value heads."""
    Q_TILES: tl.constexpr = (HEADS + N - 1) // N
    K_TILES: tl.constexpr = (KV_HEADS + N - 1) // N
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        cosines = table + tl.load(positions + token).to(tl.int64) * (2 * H.half)
        if tile < Q_TILES:
            first = tile * N
            head = first + tl.arange(0, N)
            queries = turned(q + token * q_stride + first * H.dim, q_weight, cosines, head < HEADS, eps, H)
            store_rows(q_out, token * HEADS + head, queries, head < HEADS, H.dim, H.dim_pad)
        elif tile < Q_TILES + K_TILES:
            first = (tile - Q_TILES) * N
            head = first + tl.arange(0, N)
            keys = turned(k + token * k_stride + first * H.dim, k_weight, cosines, head < KV_HEADS, eps, H)
            store_pool(
                k_pool, slot * KV_HEADS + head, keys, head < KV_HEADS, k_scale, H.dim, H.dim_pad, BITS, GROUP
            )  # fmt: skip
        else:
            head = (tile - Q_TILES - K_TILES) * N + tl.arange(0, N)
            values = load_rows(v + token * v_stride, head, head < KV_HEADS, VALUE_DIM, VALUE_PAD, MASKED=True)
            store_pool(
                v_pool, slot * KV_HEADS + head, values, head < KV_HEADS, v_scale, VALUE_DIM, VALUE_PAD, BITS, GROUP
            )  # fmt: skip


def rope_append(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pool: Pool, v_pool: Pool, table: torch.Tensor,
    positions: torch.Tensor, slots: torch.Tensor, *, q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None, eps: float = 1e-6, unit_offset: bool = False, k_scale: float = 1.0,
    v_scale: float = 1.0, out: torch.Tensor | None = None, check: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Normalise and rotate q and k, write k and v to their slots; returns q [T, Hq, D], in `out` if given.

    q [T, Hq, D], k [T, H, D] and v [T, H, Dv], of one dtype (float16, bfloat16 or float32), heads adjacent, tokens at
    any distance; pools, slots, scales and `check` as in `kv_append`. The pair (x[d], x[d + R / 2]), d < R / 2, turns by
    the angle whose cosine is table[p, d] and whose sine is table[p, d + R / 2], p = positions[t]; dimensions from
    R <= D on stay. table float32 [P, R], positions int32 or int64 [T] below P. With weights [D] (both or neither) each
    head of q and k is divided by its root mean square (`eps` joins the mean) and multiplied by its weight, or by
    1 + weight with `unit_offset`, before it turns. All in float32, rounded once.

    A token whose slot is negative is padding: neither the pools nor its part of the result are written. Raises
    ValueError and IndexError as `kv_append` does, for positions as for slots, before anything is written.
    """
    pools = _check(q, k, v, k_pool, v_pool, table, positions, slots, q_weight, k_weight)
    check_scales(k_pool, k_scale, v_scale)
    (tokens, heads, dim), (_, kv_heads, value_dim) = q.shape, v.shape
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device) if out is None else out
    check_tensor("out", out, (tokens, heads, dim), (q.dtype,), q.device)
    if check:
        check_slots(slots, pools.slots)
        _check_positions(positions[slots >= 0], len(table))
    if tokens == 0:
        return out
    config = CONFIGS[capability()]
    power, half = triton.next_power_of_2, table.shape[1] // 2
    head = (dim, power(dim), half, q_weight is not None, unit_offset)
    tiles = triton.cdiv(heads, config.heads) + 2 * triton.cdiv(kv_heads, config.heads)
    rope_append_kernel[(tokens, tiles)](
        q, k, v, out, k_pool, v_pool, table, positions, slots, q_weight, k_weight,
        q.stride(0), k.stride(0), v.stride(0), pools.slots, eps, k_scale, v_scale,
        HEADS=heads, KV_HEADS=kv_heads, VALUE_DIM=value_dim, VALUE_PAD=power(value_dim), N=config.heads,
        BITS=pools.bits, GROUP=pools.group, H=Head(*map(tl.constexpr, head)), num_warps=config.num_warps,
    )  # fmt: skip
    return out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pool: Pool, v_pool: Pool, table: torch.Tensor,
    positions: torch.Tensor, slots: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
) -> Format:  # fmt: skip
    tokens, _, dim = check_tokens("q", q)
    kv_heads = check_tokens("k", k, (tokens,))[1]
    value_dim = check_tokens("v", v, (tokens, kv_heads))[2]
    if k.shape[2] != dim:
        raise ValueError(f"k has heads of {k.shape[2]} numbers; with this q they must have {dim}")
    for name, tensor in (("k", k), ("v", v)):
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; q is {q.dtype} on {q.device}: make them alike"
            )
    pools = check_pools(k_pool, v_pool, (kv_heads, dim, value_dim), (*FLOAT_TYPES, *FP8_TYPES), q.device)
    check_tensor("table", table, (None, None), (torch.float32,), q.device)
    if table.shape[1] % 2 or not 2 <= table.shape[1] <= dim:
        raise ValueError(f"table has {table.shape[1]} columns; it must have an even number from 2 to {dim}")
    for name, tensor in (("positions", positions), ("slots", slots)):
        check_tensor(name, tensor, (tokens,), (torch.int32, torch.int64), q.device)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight go together: give both or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_tensor(name, weight, (dim,), FLOAT_TYPES, q.device)
    return pools


def _check_positions(positions: torch.Tensor, known: int) -> None:
    if len(positions):
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= known:
            raise IndexError(f"positions {low} to {high} are not all in a table of {known}; nothing was written")
