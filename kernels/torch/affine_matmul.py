"""A matrix product with packed weights, in torch; `kernels.reference.affine_matmul` is the definition."""

from __future__ import annotations

import torch

from cortexstream.kernels.reference.affine_matmul import BITS, GROUPS

NUMBERS_AT_ONCE = 1 << 22  # a code takes eight bytes on its way


def affine_matmul(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int, *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [M, K] times the dequantised weights, plus `bias` [N]: [M, N], all of x's dtype, on any device.

    packed, scales and biases are as in `dequantize`. Raises ValueError when shapes, bits and group do not go together.
    """
    rows, columns = check_packed(packed, scales, biases, bits, group)
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [any, {columns}]")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{rows}]")
    weights = dequantize(packed, scales, biases, bits, group, x.dtype)
    return torch.nn.functional.linear(x, weights, None if bias is None else bias.to(x.dtype))


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weights scale * q + bias, [N, K] of `dtype`, computed in float32 and rounded once.

    packed int32 [N, K * bits / 32], the bits of the definition's uint32; scales and biases [N, K / group] of any float
    type; bits 2, 3, 4, 5, 6 or 8 and group 32, 64 or 128. Raises ValueError when these do not go together.
    """
    rows, columns = check_packed(packed, scales, biases, bits, group)
    dense = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    step = max(1, NUMBERS_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes = _codes(packed[part], bits).view(-1, columns // group, group)
        numbers = scales[part].float()[..., None] * codes + biases[part].float()[..., None]
        dense[part] = numbers.flatten(1)
    return dense


def check_packed(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int, group: int
) -> tuple[int, int]:
    """(N, K) of packed weights. Raises ValueError unless the three tensors, bits and group go together."""
    if bits not in BITS or group not in GROUPS:
        raise ValueError(f"{bits} bits in groups of {group} are not supported; bits are {BITS}, groups {GROUPS}")
    if packed.ndim != 2 or packed.dtype != torch.int32:
        raise ValueError(f"packed is {packed.dtype} {list(packed.shape)}; it must be torch.int32 with two axes")
    rows, words = packed.shape
    columns = words * 32 // bits
    wanted = (rows, columns // group)
    if columns == 0 or columns % group or columns * bits != words * 32:
        raise ValueError(
            f"packed has shape {list(packed.shape)}; its rows are no whole groups of {group} x {bits} bits"
        )
    for name, tensor in (("scales", scales), ("biases", biases)):
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; for this packed it must be {list(wanted)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be of a float type")
    return rows, columns


def _codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [N, words] -> the numbers in the stream, int64 [N, words * 32 / bits]. 32 numbers fill `bits` words."""
    first = torch.arange(32, device=packed.device) * bits
    words = (packed.long() & 0xFFFFFFFF).unflatten(1, (-1, bits))
    low = words[..., first // 32]
    following = (first // 32 + 1).clamp_max(bits - 1)  # none is needed of the last word
    both = low | words[..., following] << 32
    return (both >> first % 32 & (1 << bits) - 1).flatten(1)
