"""Keys and values as integers, in torch: `kernels.reference.kv_quantize` is the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cortexstream.kernels.reference.kv_quantize import SMALLEST_SCALE


class Quantized(NamedTuple):
    """`packed` int32 [..., D * bits / 32], the bits of the definition's uint32; `scales`, `biases` [..., D / group]."""

    packed: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor


def quantize(x: torch.Tensor, bits: int, group: int) -> Quantized:
    """x [..., D] -> codes, scales and biases, the latter of x's dtype. In float32 all bits are the definition's."""
    groups = x.float().unflatten(-1, (-1, group))
    last = float((1 << bits) - 1)
    low, high = groups.amin(-1), groups.amax(-1)
    below = low.abs() > high.abs()
    edge = torch.where(below, low, high)
    scales = ((high - low) / last).clamp_min(float(SMALLEST_SCALE))
    scales = torch.where(below, scales, -scales)
    steps = torch.round(edge / scales)  # whole steps from zero to the edge, even ones at a tie
    at_zero = steps == 0
    scales = torch.where(at_zero, scales, edge / torch.where(at_zero, 1.0, steps)).to(x.dtype)
    biases = torch.where(at_zero, 0.0, edge).to(x.dtype)
    codes = torch.round((groups - biases.float()[..., None]) / scales.float()[..., None])
    codes = codes.nan_to_num(0.0).clamp(0, last).to(torch.int64).flatten(-2)
    return Quantized(_pack(codes, bits), scales, biases)


def dequantize(stored: Sequence[torch.Tensor], bits: int, group: int) -> torch.Tensor:
    """scale * code + bias, [..., D] of the scales' dtype: the product is rounded, then the sum."""
    packed, scales, biases = stored
    per_word = 32 // bits
    shifts = torch.arange(per_word, device=packed.device, dtype=torch.int32) * bits
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    groups = codes.flatten(-2).unflatten(-1, (-1, group)).to(scales.dtype)
    return (scales[..., None] * groups + biases[..., None]).flatten(-2)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 [..., D] -> int32 [..., D * bits / 32], the first number in the lowest bits."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, device=codes.device) * bits
    words = (codes.unflatten(-1, (-1, per_word)) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
