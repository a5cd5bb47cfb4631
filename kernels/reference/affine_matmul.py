"""A matrix product with weights in MLX's affine format, which are dequantised first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cortexstream.kernels.reference.rms_norm import Float

Floats = npt.NDArray[Any]
Words = npt.NDArray[np.uint32]

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def affine_matmul(
    x: npt.NDArray[Float], packed: Words, scales: Floats, biases: Floats, bits: int, group: int,
    bias: npt.NDArray[Float] | None = None,
) -> npt.NDArray[Float]:  # fmt: skip
    """x w^T + bias, with w as in `dequantize`.

    x [M, K] and bias [N], both float32 or both float64, in which it is computed; returns [M, N]. Raises ValueError when
    shapes, bits and group do not go together.
    """
    weights = dequantize(packed, scales.astype(x.dtype), biases.astype(x.dtype), bits, group)
    if x.shape[1:] != weights.shape[1:]:
        raise ValueError(f"x has shape {x.shape}; for weights {weights.shape} it must be [M, {weights.shape[1]}]")
    product: npt.NDArray[Float] = x @ weights.T
    return product if bias is None else product + bias


def dequantize(packed: Words, scales: Floats, biases: Floats, bits: int, group: int) -> Floats:
    """The weights scale * q + bias, [N, K] of the scales' dtype: the product is rounded, then the sum.

    packed uint32 [N, K * bits / 32]: each row is one little-endian stream of `bits`-bit numbers q. scales and biases
    [N, K / group]: those of each `group` neighbours in a row. Raises ValueError when shapes, bits and group do not go
    together.
    """
    rows, words = packed.shape
    columns = words * 32 // bits
    if bits not in BITS or group not in GROUPS:
        raise ValueError(f"{bits} bits in groups of {group} are not supported; bits are {BITS}, groups {GROUPS}")
    if columns * bits != words * 32 or columns % group or not scales.shape == biases.shape == (rows, columns // group):
        raise ValueError(
            f"packed {packed.shape}, scales {scales.shape} and biases {biases.shape} do not fit {bits} bits in groups "
            f"of {group}"
        )
    stream = np.unpackbits(np.ascontiguousarray(packed, "<u4").view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(rows, columns, bits) @ (1 << np.arange(bits))
    groups = codes.reshape(rows, -1, group).astype(scales.dtype)
    dense: Floats = (scales[..., None] * groups + biases[..., None]).reshape(rows, columns)
    return dense
