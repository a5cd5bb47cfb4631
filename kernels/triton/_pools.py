"""Reading and writing pools, whether of numbers or of integers with scales and biases; checks of both."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.torch.quantized_pool import Pool, QuantizedPool
from cortexstream.kernels.triton._common import FLOAT_TYPES, FP8_TYPES, check_tensor, narrow

BITS = (4, 8)
GROUPS = (32, 64, 128, 256)  # powers of two: tiles are cut into them
SMALLEST_SCALE = tl.constexpr(1e-7)  # before rounding, as the definition has it


class Format(NamedTuple):
    """How both pools of a layer hold their numbers."""

    slots: int
    heads: int
    dim: int
    value_dim: int
    bits: int  # 0 if pools are of numbers
    group: int


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
def load_part(
    pool, vector, inside, part, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """[N, WIDTH]: as `load_rows`, if the pool is of numbers.

    Else WIDTH is that of a group; these are the numbers that the group `part` of each vector stands for, in float32.
    Product and sum may be one operation, which rounds once where the definition rounds twice.
    """
    if BITS == 0:
        x = load_rows(pool, vector, inside, DIM, WIDTH, MASKED)
    else:
        BYTES: tl.constexpr = WIDTH * BITS // 8
        vector = vector.to(tl.int64)
        at = pool.packed + (vector * (DIM * BITS // 8) + part * BYTES)[:, None] + tl.arange(0, BYTES)[None, :]
        group = vector * (DIM // WIDTH) + part
        if MASKED:
            codes = tl.load(at, mask=inside[:, None], other=0)
            scale = tl.load(pool.scales + group, mask=inside, other=0.0)
            bias = tl.load(pool.biases + group, mask=inside, other=0.0)
        else:
            codes, scale, bias = tl.load(at), tl.load(pool.scales + group), tl.load(pool.biases + group)
        if BITS == 4:
            codes = tl.interleave(codes & 15, codes >> 4)
        x = codes.to(tl.float32) * scale.to(tl.float32)[:, None] + bias.to(tl.float32)[:, None]
    return x


@triton.jit
def store_pool(
    pool, vector, x, inside, scale, DIM: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """`store_rows` to a pool: x / scale if that is of fp8, codes if it is quantised."""
    if BITS == 0:
        store_rows(pool, vector, narrow(x, pool, scale), inside, DIM, PAD)
    else:
        N: tl.constexpr = x.shape[0] * (PAD // GROUP)
        g = tl.arange(0, PAD // GROUP)
        number = vector.to(tl.int64)[:, None] * (DIM // GROUP) + g[None, :]
        live = inside[:, None] & (g < DIM // GROUP)[None, :]
        store_groups(
            pool, tl.reshape(number, (N,)), tl.reshape(x, (N, GROUP)), tl.reshape(live, (N,)), BITS, GROUP
        )  # fmt: skip


@triton.jit
def store_groups(pool, number, x, live, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Quantise the groups x [N, GROUP] and write those that are `live`: number[n] counts the pool's groups.

    Rounded to the type of the scales first. Bits are those of `kernels.reference.kv_quantize` but for scales and
    biases, which are rounded before codes are made from them.
    """
    N: tl.constexpr = x.shape[0]
    LAST: tl.constexpr = (1 << BITS) - 1
    EACH: tl.constexpr = 32 // BITS
    kind: tl.constexpr = pool.scales.dtype.element_ty
    x = x.to(kind).to(tl.float32)
    low, high = tl.min(x, 1), tl.max(x, 1)
    below = tl.abs(low) > tl.abs(high)
    edge = tl.where(below, low, high)
    scale = tl.maximum(tl.div_rn(high - low, LAST * 1.0), SMALLEST_SCALE)
    scale = tl.where(below, scale, -scale)
    steps = nearest(tl.div_rn(edge, scale))  # from zero to the edge
    scale = tl.where(steps == 0.0, scale, tl.div_rn(edge, tl.where(steps == 0.0, 1.0, steps)))
    broken = tl.max((x != x).to(tl.int32), 1) > 0  # low and high do not tell: they may pass NaN over
    scale = tl.where(broken, float("nan"), scale).to(kind)
    bias = tl.where(broken, float("nan"), tl.where(steps == 0.0, 0.0, edge)).to(kind)
    codes = nearest(tl.div_rn(x - bias.to(tl.float32)[:, None], scale.to(tl.float32)[:, None]))
    codes = tl.where(codes == codes, tl.minimum(tl.maximum(codes, 0.0), LAST * 1.0), 0.0).to(tl.int32)
    shifts = tl.arange(0, EACH) * BITS
    words = tl.sum(tl.reshape(codes, (N, GROUP // EACH, EACH)) << shifts[None, None, :], 2)
    word = tl.arange(0, GROUP // EACH)
    at = number.to(tl.int64)
    tl.store(pool.packed + at[:, None] * (GROUP // EACH) + word[None, :], words, mask=live[:, None])
    tl.store(pool.scales + at, scale, mask=live)
    tl.store(pool.biases + at, bias, mask=live)


@triton.jit
def nearest(x):
    """The nearest whole number, the even one of two; from 2 ** 23 on floats are whole."""
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0.0, -size, size)


def check_pools(
    k_pool: Pool, v_pool: Pool, shape: tuple[int | None, int, int | None], dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Format:  # fmt: skip
    """Raises ValueError unless the pools go together and with `shape`: (heads, dim, value_dim), None for any.

    A pool's numbers are of one of `dtypes`, or it is quantised and its scales and biases are; not fp8, those.
    """
    heads, dim, value_dim = shape
    if isinstance(k_pool, QuantizedPool) and isinstance(v_pool, QuantizedPool):
        return _check_quantized(k_pool, v_pool, shape, tuple(t for t in dtypes if t in FLOAT_TYPES), device)
    if isinstance(k_pool, QuantizedPool) or isinstance(v_pool, QuantizedPool):
        raise ValueError("one of k_pool and v_pool is quantised; both must be, or neither")
    check_tensor("k_pool", k_pool, (None, heads, dim), dtypes, device)
    check_tensor("v_pool", v_pool, (*k_pool.shape[:2], value_dim), (k_pool.dtype,), device)
    slots, heads, dim = k_pool.shape
    return Format(slots, heads, dim, v_pool.shape[2], 0, 0)


def _check_quantized(
    k_pool: QuantizedPool, v_pool: QuantizedPool, shape: tuple[int | None, int, int | None],
    dtypes: tuple[torch.dtype, ...], device: torch.device,
) -> Format:  # fmt: skip
    heads, dim, value_dim = shape
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        for part, tensor in pool._asdict().items():
            if tensor.ndim != 3 or not tensor.shape[2]:
                raise ValueError(f"{name}.{part} has shape {list(tensor.shape)}; it must be [slots, heads, numbers]")
    slots, heads = k_pool.packed.shape[0], k_pool.packed.shape[1] if heads is None else heads
    bits, group = 32 * k_pool.packed.shape[2] // dim, dim // k_pool.scales.shape[2]
    if bits not in BITS or group not in GROUPS:
        raise ValueError(
            f"k_pool has {k_pool.packed.shape[2]} words and {k_pool.scales.shape[2]} scales for a head of {dim} "
            f"numbers; words of 4 or 8 bits and groups of {', '.join(map(str, GROUPS))} are known"
        )
    value_dim = 32 * v_pool.packed.shape[2] // bits if value_dim is None else value_dim
    dtype = k_pool.scales.dtype if k_pool.scales.dtype in dtypes else None
    for name, pool, size in (("k_pool", k_pool, dim), ("v_pool", v_pool, value_dim)):
        if size % group:
            raise ValueError(f"{name} has heads of {size} numbers, which do not divide into groups of {group}")
        check_tensor(f"{name}.packed", pool.packed, (slots, heads, size * bits // 32), (torch.int32,), device)
        for part in ("scales", "biases"):
            kinds = dtypes if dtype is None else (dtype,)
            check_tensor(f"{name}.{part}", getattr(pool, part), (slots, heads, size // group), kinds, device)
    return Format(slots, heads, dim, value_dim, bits, group)


def as_bytes(pool: Pool) -> Pool:
    """A pool as `load_part` takes it: codes as uint8, no copy. The first number is in a word's lowest bits."""
    return pool._replace(packed=pool.packed.view(torch.uint8)) if isinstance(pool, QuantizedPool) else pool


def check_scales(pool: Pool, k_scale: float, v_scale: float) -> None:
    """Raises ValueError for scales that are not positive numbers, or not 1 although the pools are not of fp8."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"{name} is {scale}; it must be above 0 and finite")
        if scale != 1.0 and (isinstance(pool, QuantizedPool) or pool.dtype not in FP8_TYPES):
            raise ValueError(f"{name} is {scale}, but the pools are not of fp8; leave it at 1")
