"""A matrix product with weights that stay packed, in MLX's affine format: few rows of x, as when decoding.

With w = scale * q + bias in a group of neighbours, a group adds scale * (x . q) + bias * sum(x) to a result. The codes
q are small whole numbers, exact in half precision, so tensor cores multiply them as they are. They get there without
a conversion: a code's bits, put below the leading bit of the number 2^bits (16 for 4 bits), make 2^bits + q, which
changes the bias by scale * 2^bits. The numbers of a group are taken in an order that lets a thread use all codes of the
words that it loads; x is put into the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.torch.affine_matmul import check_packed
from cortexstream.kernels.triton._common import FLOAT_TYPES, capability, check_tensor

PACKED_BITS = (4, 8)  # that stay packed; other widths are dequantised first
LEAST_GROUPS = 8  # of a split: shorter ones do not fill the pipeline of loads


class Config(NamedTuple):
    """A tile of `block_n` rows of the weights times one group."""

    block_n: int
    num_warps: int
    num_stages: int


_FLOAT = {16: Config(32, 4, 3)}
# compute capability -> (bytes of a number of x, group) -> rows of x in a tile -> Config
CONFIGS = {
    80: {
        (2, 32): {16: Config(128, 4, 6), 32: Config(128, 4, 5), 64: Config(64, 4, 4)},
        (2, 64): {16: Config(128, 4, 4), 32: Config(128, 4, 3), 64: Config(64, 4, 3)},
        (2, 128): {16: Config(128, 4, 3), 32: Config(64, 4, 3)},
        (4, 32): _FLOAT,
        (4, 64): _FLOAT,
        (4, 128): _FLOAT,
    },
    90: {
        (2, 32): {16: Config(128, 4, 6), 32: Config(128, 4, 5), 64: Config(64, 4, 4)},
        (2, 64): {16: Config(128, 4, 5), 32: Config(128, 4, 4), 64: Config(64, 4, 3)},
        (2, 128): {16: Config(128, 4, 3), 32: Config(128, 4, 3), 64: Config(64, 4, 2)},
        (4, 32): _FLOAT,
        (4, 64): _FLOAT,
        (4, 128): _FLOAT,
    },
}
PROGRAMS = {80: 432, 90: 528}  # four to a multiprocessor: K is split until there are about as many
MOST_ROWS = {80: 64, 90: 64}  # of x; for more of them the weights are dequantised
MERGE_BLOCK, DEQUANTIZE_NUMBERS = 512, 4096  # of a program


class Codes(NamedTuple):
    """How a code becomes a number of x's type: `exponent` | code << `shift` are the bits of `offset` + code.

    With an exponent of 0 the code is converted, and the offset is 0.
    """

    shift: int
    exponent: int
    offset: int


CODES = {  # bfloat16 has 7 bits below the leading one and float16 has 10
    (torch.bfloat16, 4): Codes(7 - 4, (127 + 4) << 7, 16),
    (torch.float16, 4): Codes(10 - 4, (15 + 4) << 10, 16),
    (torch.float16, 8): Codes(10 - 8, (15 + 8) << 10, 256),
}


@triton.jit
def moved(words, LEFT: tl.constexpr):
    """Bits moved to the left, or to the right if LEFT is negative."""
    if LEFT >= 0:
        return words << LEFT
    else:
        return words >> -LEFT


@triton.jit
def unpacked(words, ones, like, BITS: tl.constexpr, CODE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """int32 [ROWS, words of a group] -> offset + code in the type that `like` points to, [ROWS, GROUP].

    Two codes, 16 bits apart in a word, are cut out at a time. With j for a pair's number in its word and h for a half
    of it, the order is [word / 4, j, word % 4, h]: what shares a register of a matrix product are halves of a pair, and
    a thread of four takes every fourth word. `ones` is the exponent in both halves. It is an argument of the kernel,
    because with two constants, the mask and this one, each takes an instruction of its own.
    """
    MASK: tl.constexpr = (((1 << BITS) - 1) << CODE.shift) * 0x10001
    words = tl.reshape(words, (ROWS, GROUP * BITS // 128, 4))
    first = moved(words, CODE.shift) & MASK | ones
    second = moved(words, CODE.shift - BITS) & MASK | ones
    if BITS == 8:
        pairs = tl.permute(tl.join(first, second), (0, 1, 3, 2))
    else:
        third = moved(words, CODE.shift - 2 * BITS) & MASK | ones
        fourth = moved(words, CODE.shift - 3 * BITS) & MASK | ones
        pairs = tl.permute(tl.join(tl.join(first, second), tl.join(third, fourth)), (0, 1, 4, 3, 2))
    halves = tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), (ROWS, GROUP))
    if CODE.exponent:
        return halves.to(tl.int16).to(like.dtype.element_ty, bitcast=True)
    # 2^23 + code, from its bits: cheaper than a conversion of an integer.
    return ((halves | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0).to(like.dtype.element_ty)


@triton.jit
def reordered(x, BITS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """x [ROWS, GROUP] in the order of `unpacked`."""
    if BITS == 8:
        x = tl.permute(tl.reshape(x, (ROWS, GROUP // 16, 4, 2, 2)), (0, 1, 4, 2, 3))
    else:
        x = tl.permute(tl.reshape(x, (ROWS, GROUP // 32, 4, 2, 2, 2)), (0, 1, 4, 5, 2, 3))
    return tl.reshape(x, (ROWS, GROUP))


@triton.jit(do_not_specialize=["rows", "ones"])
def affine_matmul_kernel(
    x, packed, scales, biases, bias, out, rows, columns, ones, K: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, CODE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of x's rows, tiles of the weights' rows, splits): a program adds up SPLIT groups of K for a tile.

    out [splits, rows, columns]. The weights are the left factor. Sums and their order do not depend on `rows`: fused
    additions are spelt out, since the compiler chooses them by the tile; sum(x) is a product with ones, no reduction.
    """
    WORDS: tl.constexpr = GROUP * BITS // 32
    GROUPS: tl.constexpr = K // GROUP
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, row_live = n < columns, m < rows
    words_at = packed + n[:, None].to(tl.int64) * (GROUPS * WORDS) + tl.arange(0, WORDS)[None, :]
    x_at = x + m[:, None] * K + tl.arange(0, GROUP)[None, :]
    ones_of_x = tl.full((16, GROUP), 1.0, tl.float32).to(x.dtype.element_ty)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(2) * SPLIT
    for g in range(first, tl.minimum(first + SPLIT, GROUPS)):
        words = tl.load(words_at + g * WORDS, mask=live[:, None], other=0)
        scale = tl.load(scales + n.to(tl.int64) * GROUPS + g, mask=live, other=0.0).to(tl.float32)
        low = tl.load(biases + n.to(tl.int64) * GROUPS + g, mask=live, other=0.0).to(tl.float32)
        part = tl.trans(reordered(tl.load(x_at + g * GROUP, mask=row_live[:, None], other=0.0), BITS, BLOCK_M, GROUP))
        codes = unpacked(words, ones, x, BITS, CODE, BLOCK_N, GROUP)
        low = tl.fma(scale, tl.full((BLOCK_N,), -CODE.offset, tl.float32), low)
        product = tl.dot(codes, part, input_precision="ieee")
        x_sum = tl.max(tl.dot(ones_of_x, part, input_precision="ieee"), 0)
        total = tl.fma(tl.broadcast_to(scale[:, None], (BLOCK_N, BLOCK_M)), product, total)
        total = tl.fma(
            tl.broadcast_to(low[:, None], (BLOCK_N, BLOCK_M)),
            tl.broadcast_to(x_sum[None, :], (BLOCK_N, BLOCK_M)),
            total,
        )
    if bias is not None:
        total += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2).to(tl.int64) * rows + m[:, None]) * columns + n[None, :]
    tl.store(out + at, tl.trans(total).to(out.dtype.element_ty), mask=row_live[:, None] & live[None, :])


@triton.jit(do_not_specialize=["rows"])
def affine_merge_kernel(partial, bias, out, rows, columns, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks of columns, rows): adds up the splits of a row in order."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    to = tl.program_id(1).to(tl.int64) * columns + n
    at = to
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(SPLITS):
        total += tl.load(partial + at, mask=n < columns, other=0.0)
        at += rows.to(tl.int64) * columns
    if bias is not None:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    tl.store(out + to, total.to(out.dtype.element_ty), mask=n < columns)


@triton.jit(do_not_specialize=["groups"])  # of an embedding's rows there are as many as a step has tokens
def dequantize_kernel(
    packed, scales, biases, out, groups, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (blocks of groups,): groups lie one behind the other, whatever the shape of the weights."""
    WORDS: tl.constexpr = GROUP * BITS // 32
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live, k = group < groups, tl.arange(0, GROUP)
    if 32 % BITS == 0:
        word = tl.load(packed + group[:, None] * WORDS + tl.arange(0, WORDS)[None, :], mask=live[:, None], other=0)
        codes = word[:, :, None] >> (tl.arange(0, 32 // BITS) * BITS)[None, None, :]
        codes = tl.reshape(codes, (BLOCK, GROUP))
    else:
        number, shift = k * BITS // 32, k * BITS % 32
        at = packed + group[:, None] * WORDS + number[None, :]
        low = tl.load(at, mask=live[:, None], other=0).to(tl.uint32, bitcast=True)
        reaches_over = live[:, None] & (shift + BITS > 32)[None, :]  # into the next word
        high = tl.load(at + 1, mask=reaches_over, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        codes = (((high << 32) | low) >> shift[None, :].to(tl.uint64)).to(tl.int32)
    scale = tl.load(scales + group, mask=live, other=0.0).to(tl.float32)
    low_end = tl.load(biases + group, mask=live, other=0.0).to(tl.float32)
    numbers = scale[:, None] * (codes & ((1 << BITS) - 1)).to(tl.float32) + low_end[:, None]
    tl.store(out + group[:, None] * GROUP + k[None, :], numbers.to(out.dtype.element_ty), mask=live[:, None])


def affine_matmul(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int, *,
    bias: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x w^T + bias with w = scale * q + bias of its group.

    x [M, K] float16, bfloat16 or float32; packed int32 [N, K * bits / 32], the bits of MLX's uint32; scales and biases
    [N, K / group] and the optional `bias` [N] of any of these types; all contiguous; group 32, 64 or 128.

    With 4 or 8 bits and up to MOST_ROWS rows the weights are read packed, once for each tile of rows, and a row's
    result is the same bits alone or among up to MOST_ROWS: K is split by the shape of the weights alone. Otherwise they
    are written down in x's type, N * K numbers of scratch memory, and torch multiplies: a second path, with other bits.

    Returns [M, N] of x's dtype, in `out` if given. Raises ValueError when shapes, dtypes, devices, bits and group do
    not go together; nothing was launched then.
    """
    columns, depth = _check_weights(packed, scales, biases, bits, group)
    check_tensor("x", x, (None, depth), FLOAT_TYPES, packed.device)
    if bias is not None:
        check_tensor("bias", bias, (columns,), FLOAT_TYPES, packed.device)
    out = torch.empty(len(x), columns, dtype=x.dtype, device=x.device) if out is None else out
    check_tensor("out", out, (len(x), columns), (x.dtype,), x.device)
    arch = capability()
    if bits in PACKED_BITS and len(x) <= MOST_ROWS[arch]:
        if x.numel() and columns:
            _multiply(x, packed, scales, biases, bits, group, bias, out, arch)
        return out
    weights = dequantize(packed, scales, biases, bits, group, x.dtype)
    if bias is None:
        return torch.mm(x, weights.T, out=out)
    return torch.addmm(bias.to(x.dtype), x, weights.T, out=out)


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weights scale * q + bias, [N, K] of `dtype`, for all bits of the format: 2, 3, 4, 5, 6 and 8.

    Computed in float32 and rounded once. Arguments and errors are those of `affine_matmul`.
    """
    columns, depth = _check_weights(packed, scales, biases, bits, group)
    if dtype not in FLOAT_TYPES:
        raise ValueError(f"dtype is {dtype}; it must be {' or '.join(map(str, FLOAT_TYPES))}")
    capability()
    dense = torch.empty(columns, depth, dtype=dtype, device=packed.device)
    groups, block = scales.numel(), DEQUANTIZE_NUMBERS // group
    if groups:
        dequantize_kernel[(triton.cdiv(groups, block),)](
            packed, scales, biases, dense, groups, GROUP=group, BITS=bits, BLOCK=block, num_warps=4
        )  # fmt: skip
    return dense


def split_groups(columns: int, depth: int, group: int, block_n: int, programs: int) -> int:
    """How many groups of K one program adds up; the rows of x have no say in it."""
    groups = depth // group
    wanted = triton.cdiv(programs, triton.cdiv(columns, block_n))
    splits = max(1, min(wanted, groups // LEAST_GROUPS))
    return int(triton.cdiv(groups, splits))


def _multiply(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int,
    bias: torch.Tensor | None, out: torch.Tensor, arch: int,
) -> None:  # fmt: skip
    (rows, depth), columns = x.shape, len(packed)
    tiles = CONFIGS[arch][x.element_size(), group]
    block_m = next((height for height in tiles if rows <= height), max(tiles))
    config = tiles[block_m]
    # By the narrowest tile, whichever is used: the splits must be those of a single row.
    split = split_groups(columns, depth, group, tiles[min(tiles)].block_n, PROGRAMS[arch])
    splits = triton.cdiv(depth // group, split)
    code = CODES.get((x.dtype, bits), Codes(0, 0, 0))
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, config.block_n), splits)
    partial = out if splits == 1 else torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    affine_matmul_kernel[grid](
        x, packed, scales, biases, bias if splits == 1 else None, partial, rows, columns, code.exponent * 0x10001,
        K=depth, GROUP=group, BITS=bits, CODE=code, SPLIT=split, BLOCK_M=block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        affine_merge_kernel[(triton.cdiv(columns, MERGE_BLOCK), rows)](
            partial, bias, out, rows, columns, SPLITS=splits, BLOCK=MERGE_BLOCK, num_warps=4
        )  # fmt: skip


def _check_weights(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int
) -> tuple[int, int]:
    """(N, K); raises ValueError as `affine_matmul` says."""
    columns, depth = check_packed(packed, scales, biases, bits, group)
    check_tensor("packed", packed, (None, None), (torch.int32,), packed.device)
    for name, tensor in (("scales", scales), ("biases", biases)):
        check_tensor(name, tensor, (columns, depth // group), FLOAT_TYPES, packed.device)
    return columns, depth
