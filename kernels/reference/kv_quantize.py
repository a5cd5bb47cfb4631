"""Keys and values as 4-bit or 8-bit integers, in MLX's affine format."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

BITS = (4, 8)
SMALLEST_SCALE = np.float32(1e-7)  # before rounding; a group whose numbers are all equal has no range


class Quantized(NamedTuple):
    """`packed` uint32 [..., D * bits / 32], first number in the lowest bits; `scales`, `biases` float32 [..., D / g].

    A number is scale * code + bias with the scale and bias of its group of g neighbours.
    """

    packed: Words
    scales: Floats
    biases: Floats


def quantize(x: Floats, bits: int, group: int) -> Quantized:
    """x float32 [..., D] -> codes, scales and biases as mx.quantize(x, group, bits) gives them on a CPU.

    The end of a group's range that is further from zero is the bias, exactly, and has code 0; the scale is negative
    where that is the upper end. The scale is such that 0 is a code's number, too, if it lies in the range. An error is
    at most |scale|; above half of that only near the other end, where the last code may fall short. A group with NaN,
    an infinity or a range beyond float32 gets a scale that is not finite: it stands for NaN.

    MLX on Metal takes 0 into the range of a group of negative numbers and rounds halves away from zero, where a CPU
    takes the even code: some groups get other codes there. Raises ValueError when x is not float32 or its last axis,
    the group and the bits do not go together.
    """
    _check_format(bits, group)
    if x.ndim < 1 or x.shape[-1] % group:
        raise ValueError(f"x {x.shape} does not divide into groups of {group} along its last axis")
    if x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype}; it must be float32")
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    last = np.float32((1 << bits) - 1)
    with np.errstate(invalid="ignore", over="ignore"):  # the scale tells
        low, high = groups.min(axis=-1), groups.max(axis=-1)
        below = np.abs(low) > np.abs(high)
        edge = np.where(below, low, high)
        scales = np.maximum((high - low) / last, SMALLEST_SCALE)
        scales = np.where(below, scales, -scales)
        steps = np.rint(edge / scales)  # whole steps from zero to the edge
        at_zero = steps == 0
        scales = np.where(at_zero, scales, edge / np.where(at_zero, np.float32(1), steps))
        biases = np.where(at_zero, np.float32(0), edge)
        codes = np.rint((groups - biases[..., None]) / scales[..., None])
    codes = np.clip(np.where(np.isnan(codes), np.float32(0), codes), 0, last).astype(np.uint8).reshape(x.shape)
    return Quantized(_pack(codes, bits), scales, biases)


def dequantize(stored: Quantized, bits: int, group: int) -> Floats:
    """scale * code + bias, float32 [..., D]: the product is rounded, then the sum, as mx.dequantize does on a CPU.

    Raises ValueError when the shapes, group and bits do not go together.
    """
    _check_format(bits, group)
    packed, scales, biases = stored
    dim = packed.shape[-1] * 32 // bits
    if dim % group or not scales.shape == biases.shape == (*packed.shape[:-1], dim // group):
        raise ValueError(
            f"packed {packed.shape}, scales {scales.shape} and biases {biases.shape} do not fit {bits} bits in groups "
            f"of {group}"
        )
    groups = _unpack(packed, bits).astype(np.float32).reshape(*scales.shape, group)
    with np.errstate(invalid="ignore", over="ignore"):
        dense: Floats = scales[..., None] * groups + biases[..., None]
    return dense.reshape(*packed.shape[:-1], dim)


def _check_format(bits: int, group: int) -> None:
    if bits not in BITS or group < 32 or group % 32:
        raise ValueError(f"{bits} bits in groups of {group} are not supported; bits are 4 or 8, groups multiples of 32")


def _pack(codes: npt.NDArray[np.uint8], bits: int) -> Words:
    """uint8 [..., D] -> uint32 [..., D * bits / 32], little-endian."""
    octets = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    return np.ascontiguousarray(octets).view("<u4").astype(np.uint32, copy=False)


def _unpack(packed: Words, bits: int) -> npt.NDArray[np.uint8]:
    """The inverse of `_pack`."""
    octets = np.ascontiguousarray(packed, "<u4").view(np.uint8)
    if bits == 8:
        return octets
    return np.stack((octets & 15, octets >> 4), axis=-1).reshape(*octets.shape[:-1], 2 * octets.shape[-1])
