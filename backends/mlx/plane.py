"""Keys or values of one layer: rows of numbers that are written in place for ever."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from cortexstream.backend import KVQuantization


class Span(NamedTuple):
    """Where a run lies, in tokens: multiply by a layer's heads to get rows."""

    first: int
    capacity: int


class Plane:
    """`num_rows` rows of `dim` numbers: one array [rows, dim], or with `quantization` three, in `mx.quantize`'s affine
    format: packed codes uint32 [rows, dim * bits / 32], scales and biases [rows, dim / group].

    `stored` in the methods is a list of as many arrays, whose last axes are those of the plane's.
    """

    def __init__(
        self, num_rows: int, heads: int, dim: int, dtype: mx.Dtype, quantization: KVQuantization | None
    ) -> None:
        self.heads, self.dim, self.dtype, self.quantization = heads, dim, dtype, quantization
        if quantization is None:
            self.arrays = [mx.zeros((num_rows, dim), dtype)]
        else:
            bits, group = quantization
            self.arrays = [mx.zeros((num_rows, dim * bits // 32), mx.uint32)]
            self.arrays += [mx.zeros((num_rows, dim // group), dtype) for _ in range(2)]

    def encode(self, numbers: mx.array) -> list[mx.array]:
        """Numbers [.., dim] as they are stored."""
        numbers = numbers.astype(self.dtype)
        if self.quantization is None:
            return [numbers]
        return list(mx.quantize(numbers, group_size=self.quantization.group, bits=self.quantization.bits))

    def decode(self, stored: list[mx.array]) -> mx.array:
        """The numbers [.., dim] that attention sees."""
        if self.quantization is None:
            return stored[0]
        codes, scales, biases = stored
        dense: mx.array = mx.dequantize(
            codes, scales, biases, group_size=self.quantization.group, bits=self.quantization.bits
        )
        return dense

    def store(self, rows: mx.array, stored: list[mx.array]) -> None:
        """Write [*rows.shape, ..] at row numbers `rows`: one scatter an array."""
        for array, new in zip(self.arrays, stored, strict=True):
            array[rows] = new

    def take(self, rows: mx.array) -> list[mx.array]:
        """Copies of rows, as stored, [*rows.shape, ..]; not computed yet."""
        return [mx.take(array, rows, axis=0) for array in self.arrays]

    def view(self, span: Span, start: int, length: int, count: int = 1) -> mx.array:
        """Numbers [count, heads, length, dim] of slots start .. of `count` runs side by side: the memory itself, or a
        dequantised copy of so much."""
        views = []
        for array in self.arrays:
            width = array.shape[1]
            shape = (count, self.heads, length, width)
            strides = (self.heads * span.capacity * width, span.capacity * width, width, 1)
            views.append(mx.as_strided(array, shape, strides, (span.first * self.heads + start) * width))
        return self.decode(views)
