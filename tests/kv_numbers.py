"""Keys and values of a `LayerState` as numbers, whatever they are stored as."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cortexstream.backend import KVArray, PackedKV
from cortexstream.kernels.reference.kv_quantize import Quantized, dequantize


def numbers(array: KVArray, bits: int = 0) -> npt.NDArray[np.float32]:
    """float32 [tokens, heads, dim]; `bits` of packed ones."""
    if not isinstance(array, PackedKV):
        return array
    dim = array.packed.shape[-1] * 32 // bits
    return dequantize(Quantized(*array), bits, dim // array.scales.shape[-1])


def same(one: KVArray, other: KVArray) -> bool:
    """Equal bit for bit."""
    pairs = zip(parts(one), parts(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def parts(array: KVArray) -> tuple[npt.NDArray[np.float32] | npt.NDArray[np.uint32], ...]:
    return tuple(array) if isinstance(array, PackedKV) else (array,)
