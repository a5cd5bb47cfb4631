"""Where one layer's keys or values lie: as float32, or quantised."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cortexstream.backend import KVArray, KVQuantization, PackedKV
from cortexstream.backends.common.kv_store import Slots, Store
from cortexstream.kernels.reference.kv_append import kv_append
from cortexstream.kernels.reference.kv_quantize import Quantized, dequantize, quantize

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


def make_store(slots: int, heads: int, dim: int, quantization: KVQuantization | None) -> Store:
    """See `backends.common.kv_store.MakeStore`."""
    return DenseStore(slots, heads, dim) if quantization is None else QuantizedStore(slots, heads, dim, quantization)


class _Parts:
    """The raw side of a store: arrays [slots, heads, ...] that are copied as they are."""

    parts: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def move(self, source: int, target: int, count: int) -> None:
        for part in self.parts:
            part[target : target + count] = part[source : source + count].copy()

    def take(self, slots: Slots) -> list[Array]:
        return [part[slots] for part in self.parts]

    def put(self, slots: Slots, copies: list[Array]) -> None:
        for part, copy in zip(self.parts, copies, strict=True):
            part[slots] = copy


class DenseStore(_Parts):
    """float32 [slots, heads, dim]."""

    def __init__(self, slots: int, heads: int, dim: int) -> None:
        self._vectors = touched_zeros(np.float32, slots, heads, dim)
        self.parts = (self._vectors,)

    def append(self, slots: Slots, new: Floats) -> None:
        kv_append(self._vectors, slots, new)

    def read(self, where: slice | Slots) -> Floats:
        """A view if `where` is a slice."""
        return self._vectors[where]

    def rounded(self, new: Floats) -> Floats:
        return new

    def to_host(self, slots: Slots) -> Floats:
        return self.read(slots)

    def from_host(self, slots: Slots, new: KVArray) -> None:
        assert not isinstance(new, PackedKV)
        self.append(slots, new)


class QuantizedStore(_Parts):
    """As `kernels.reference.kv_quantize` defines it: packed uint32 [slots, heads, dim * bits / 32], and scales and
    biases float32 [slots, heads, dim / group]."""

    def __init__(self, slots: int, heads: int, dim: int, quantization: KVQuantization) -> None:
        self._format = quantization
        bits, group = quantization
        scales, biases = (touched_zeros(np.float32, slots, heads, dim // group) for _ in range(2))
        self._stored = Quantized(touched_zeros(np.uint32, slots, heads, dim * bits // 32), scales, biases)
        self.parts = tuple(self._stored)

    def append(self, slots: Slots, new: Floats) -> None:
        for part, values in zip(self._stored, quantize(new, *self._format), strict=True):
            kv_append(part, slots, values)

    def read(self, where: slice | Slots) -> Floats:
        packed, scales, biases = self._stored
        return dequantize(Quantized(packed[where], scales[where], biases[where]), *self._format)

    def rounded(self, new: Floats) -> Floats:
        return dequantize(quantize(new, *self._format), *self._format)

    def to_host(self, slots: Slots) -> PackedKV:
        return PackedKV(*self.take(slots))

    def from_host(self, slots: Slots, new: KVArray) -> None:
        self.put(slots, list(new))


def touched_zeros(dtype: Any, *shape: int) -> Array:
    """Zeros whose memory is there now: `np.zeros` would only promise it."""
    zeros = np.empty(shape, dtype)
    zeros.fill(0)
    return zeros
