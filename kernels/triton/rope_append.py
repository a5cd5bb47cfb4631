"""From a layer's projections to attention in one launch: head norms, rotary embedding, keys and values to the pools."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.triton._common import (
    FLOAT_TYPES,
    FP8_TYPES,
    capability,
    check_tensor,
    check_tokens,
    narrow,
)
from cortexstream.kernels.triton.kv_append import check_slots


class Config(NamedTuple):
    """A program takes `heads` heads of one token."""

    heads: int
    num_warps: int


CONFIGS = {80: Config(8, 2), 90: Config(8, 2)}  # by compute capability


class Head(NamedTuple):
    """What a head is made of. Numbers inside of tl.constexpr; the pads are the powers of two that hold them."""

    dim: tl.constexpr
    half: tl.constexpr  # of the dimensions that turn; those from 2 * half on stay
    half_pad: tl.constexpr
    rest_pad: tl.constexpr  # 0 if all turn
    norm: tl.constexpr
    unit_offset: tl.constexpr


@triton.jit
def turn(source, target, weight, cosines, live, eps, scale, H: tl.constexpr):
    """Normalise and rotate the heads [N] at `source`, write them to `target`."""
    i = tl.arange(0, H.half_pad)[None, :]
    mask = live[:, None] & (i < H.half)
    low = tl.load(source[:, None] + i, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source[:, None] + H.half + i, mask=mask, other=0.0).to(tl.float32)
    if H.rest_pad > 0:
        j = 2 * H.half + tl.arange(0, H.rest_pad)[None, :]
        rest_mask = live[:, None] & (j < H.dim)
        rest = tl.load(source[:, None] + j, mask=rest_mask, other=0.0).to(tl.float32)
    if H.norm:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        if H.rest_pad > 0:
            squares += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / H.dim + eps)[:, None]
        low *= factor * weights(weight, i, i < H.half, H)
        high *= factor * weights(weight, H.half + i, i < H.half, H)
        if H.rest_pad > 0:
            rest *= factor * weights(weight, j, j < H.dim, H)
    cos = tl.load(cosines + i, mask=i < H.half, other=0.0)
    sin = tl.load(cosines + H.half + i, mask=i < H.half, other=0.0)
    tl.store(target[:, None] + i, narrow(low * cos - high * sin, target, scale), mask=mask)
    tl.store(target[:, None] + H.half + i, narrow(high * cos + low * sin, target, scale), mask=mask)
    if H.rest_pad > 0:
        tl.store(target[:, None] + j, narrow(rest, target, scale), mask=rest_mask)


@triton.jit
def weights(weight, i, mask, H: tl.constexpr):
    w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    if H.unit_offset:
        w += 1.0
    return w


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rope_append_kernel(
    q, k, v, q_out, k_pool, v_pool, table, positions, slots, q_weight, k_weight, q_stride, k_stride, v_stride,
    num_slots, eps, k_scale, v_scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, tiles): first the tiles of N query heads, then those of key heads, then those of value heads."""
    Q_TILES: tl.constexpr = (HEADS + N - 1) // N
    K_TILES: tl.constexpr = (KV_HEADS + N - 1) // N
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        cosines = table + tl.load(positions + token).to(tl.int64) * (2 * H.half)
        if tile < Q_TILES:
            head = tile * N + tl.arange(0, N)
            from_q, to_q = q + token * q_stride + head * H.dim, q_out + (token * HEADS + head) * H.dim
            turn(from_q, to_q, q_weight, cosines, head < HEADS, eps, 1.0, H)
        elif tile < Q_TILES + K_TILES:
            head = (tile - Q_TILES) * N + tl.arange(0, N)
            from_k, to_k = k + token * k_stride + head * H.dim, k_pool + (slot * KV_HEADS + head) * H.dim
            turn(from_k, to_k, k_weight, cosines, head < KV_HEADS, eps, k_scale, H)
        else:
            head = (tile - Q_TILES - K_TILES) * N + tl.arange(0, N)
            d = tl.arange(0, VALUE_PAD)[None, :]
            mask = (head < KV_HEADS)[:, None] & (d < VALUE_DIM)
            x = tl.load(v + token * v_stride + head[:, None] * VALUE_DIM + d, mask=mask)
            to_v = v_pool + (slot * KV_HEADS + head)[:, None] * VALUE_DIM + d
            tl.store(to_v, narrow(x, v_pool, v_scale), mask=mask)


def rope_append(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, table: torch.Tensor,
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
    _check(q, k, v, k_pool, v_pool, table, positions, slots, q_weight, k_weight)
    (tokens, heads, dim), (_, kv_heads, value_dim) = q.shape, v.shape
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device) if out is None else out
    check_tensor("out", out, (tokens, heads, dim), (q.dtype,), q.device)
    if check:
        check_slots(slots, len(k_pool))
        _check_positions(positions[slots >= 0], len(table))
    if tokens == 0:
        return out
    config = CONFIGS[capability()]
    power, half = triton.next_power_of_2, table.shape[1] // 2
    rest = dim - 2 * half
    head = (dim, half, power(half), power(rest) if rest else 0, q_weight is not None, unit_offset)
    tiles = triton.cdiv(heads, config.heads) + 2 * triton.cdiv(kv_heads, config.heads)
    rope_append_kernel[(tokens, tiles)](
        q, k, v, out, k_pool, v_pool, table, positions, slots, q_weight, k_weight,
        q.stride(0), k.stride(0), v.stride(0), len(k_pool), eps, k_scale, v_scale,
        HEADS=heads, KV_HEADS=kv_heads, VALUE_DIM=value_dim, VALUE_PAD=power(value_dim), N=config.heads,
        H=Head(*map(tl.constexpr, head)), num_warps=config.num_warps,
    )  # fmt: skip
    return out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, table: torch.Tensor,
    positions: torch.Tensor, slots: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
) -> None:  # fmt: skip
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
    check_tensor("k_pool", k_pool, (None, kv_heads, dim), (*FLOAT_TYPES, *FP8_TYPES), q.device)
    check_tensor("v_pool", v_pool, (len(k_pool), kv_heads, value_dim), (k_pool.dtype,), q.device)
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


def _check_positions(positions: torch.Tensor, known: int) -> None:
    if len(positions):
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= known:
            raise IndexError(f"positions {low} to {high} are not all in a table of {known}; nothing was written")
