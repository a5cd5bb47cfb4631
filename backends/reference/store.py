"""Where one layer's keys or values lie: as float32, or quantised."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cortexstream.backend import KVQuantization
from cortexstream.kernels.reference.kv_append import kv_append
from cortexstream.kernels.reference.kv_quantize import Quantized, dequantize, quantize

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int64]


class Store(Protocol):
    """A vector per slot and head. `parts` are its arrays, [slots, heads, ...] each: raw copies are made of those."""

    @property
    def parts(self) -> tuple[Array, ...]: ...

    def append(self, slots: Slots, new: Floats) -> None:
        """Write `new` [T, heads, dim] into `slots` [T]."""

    def read(self, where: slice | Slots) -> Floats:
        """What the slots hold, [T, heads, dim]."""

    def rounded(self, new: Floats) -> Floats:
        """What `read` would give for `new` [T, heads, dim] once it was appended."""


class DenseStore:
    """float32 [slots, heads, dim]."""

    def __init__(self, slots: int, heads: int, dim: int) -> None:
        self._vectors = touched_zeros(np.float32, slots, heads, dim)
        self.parts: tuple[Array, ...] = (self._vectors,)

    def append(self, slots: Slots, new: Floats) -> None:
        kv_append(self._vectors, slots, new)

    def read(self, where: slice | Slots) -> Floats:
        """A view if `where` is a slice."""
        return self._vectors[where]

    def rounded(self, new: Floats) -> Floats:
        return new


class QuantizedStore:
    """As `kernels.reference.kv_quantize` defines it: packed uint32 [slots, heads, dim * bits / 32], and scales and
    biases float32 [slots, heads, dim / group]."""

    def __init__(self, slots: int, heads: int, dim: int, quantization: KVQuantization) -> None:
        self._format = quantization
        bits, group = quantization
        scales, biases = (touched_zeros(np.float32, slots, heads, dim // group) for _ in range(2))
        self._stored = Quantized(touched_zeros(np.uint32, slots, heads, dim * bits // 32), scales, biases)
        self.parts: tuple[Array, ...] = tuple(self._stored)

    def append(self, slots: Slots, new: Floats) -> None:
        for part, values in zip(self._stored, quantize(new, *self._format), strict=True):
            kv_append(part, slots, values)

    def read(self, where: slice | Slots) -> Floats:
        packed, scales, biases = self._stored
        return dequantize(Quantized(packed[where], scales[where], biases[where]), *self._format)

    def rounded(self, new: Floats) -> Floats:
        return dequantize(quantize(new, *self._format), *self._format)


def touched_zeros(dtype: Any, *shape: int) -> Array:
    """Zeros whose memory is there now: `np.zeros` would only promise it."""
    zeros = np.empty(shape, dtype)
    zeros.fill(0)
    return zeros
