"""mlx's affine packed weights, in numpy: what `mlx_lm.convert --quantize` writes.

A quantised linear layer or embedding `name` is stored as three tensors. `name.weight` uint32 [out, in * bits / 32]:
each row is one little-endian stream of `bits`-bit numbers q. `name.scales` and `name.biases` [out, in / group_size]: a
weight is scale * q + bias with the scale and bias of its group of `group_size` neighbours in a row. config.json says
"quantization": {"group_size": 64, "bits": 4, "<name>": {"group_size": .., "bits": ..} or false, ...}, where an entry
with a layer's name overrides the two numbers for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cortexstream.errors import ModelLoadError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (16, 32, 64, 128)
ROWS_AT_ONCE = 256  # the 64-bit intermediates of a whole matrix would be twice its size

Array = npt.NDArray[Any]


class Packing(NamedTuple):
    """How one layer is packed: `group_size` weights share a scale and a bias, each is `bits` wide."""

    group_size: int
    bits: int


def packing_of(config: dict[str, Any], name: str) -> Packing | None:
    """How config.json says that layer `name` ("model.layers.0.mlp.up_proj") is packed; None if it is said to be dense.

    Raises ModelLoadError for another format than mlx's affine one.
    """
    settings = config.get("quantization")
    if settings is None:
        other = config.get("quantization_config")
        if other is None:
            return None
        method = other.get("quant_method", "unknown") if isinstance(other, dict) else "unknown"
        raise ModelLoadError(
            f"config.json: quantization_config of method {method!r} cannot be read; only mlx's affine format can, "
            f"which mlx_lm.convert --quantize makes"
        )
    if not isinstance(settings, dict):
        raise ModelLoadError(
            f"config.json: quantization is {settings!r}; it must be an object with group_size and bits"
        )
    own = settings.get(name, True)
    if own is False:
        return None
    own = own if isinstance(own, dict) else settings
    mode, group_size, bits = own.get("mode", "affine"), own.get("group_size"), own.get("bits")
    if mode != "affine":
        raise ModelLoadError(
            f"config.json: quantization mode {mode!r} of {name} cannot be read; only 'affine' can, which "
            f"mlx_lm.convert --quantize makes"
        )
    if type(bits) is not int or type(group_size) is not int or bits not in BITS or group_size not in GROUP_SIZES:
        raise ModelLoadError(
            f"config.json: quantization of {name} has bits {bits!r} and group_size {group_size!r}; bits may be "
            f"{BITS}, group_size {GROUP_SIZES}; quantise the original weights so"
        )
    return Packing(group_size, bits)


def dequantize(packed: Array, scales: Array, biases: Array, group_size: int, bits: int) -> npt.NDArray[np.float32]:
    """The weights scale * q + bias, float32 [out, in].

    `packed` uint32 [out, in * bits / 32]; `scales` and `biases` float32 [out, in / group_size]. Raises ValueError when
    shapes, group_size and bits do not go together.
    """
    rows, words = packed.shape
    columns = words * 32 // bits
    if words * 32 % bits or columns % group_size or not scales.shape == biases.shape == (rows, columns // group_size):
        raise ValueError(
            f"packed {packed.shape}, scales {scales.shape} and biases {biases.shape} do not fit {bits} bits in groups "
            f"of {group_size}"
        )
    first_bit = np.arange(columns) * bits
    word, shift = first_bit // 32, (first_bit % 32).astype(np.uint64)
    mask = np.uint64((1 << bits) - 1)
    dense = np.empty((rows, columns), np.float32)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        # A number may begin in one word and end in the next, so it is cut out of both.
        low = packed[part].astype(np.uint64)
        high = np.pad(low[:, 1:], ((0, 0), (0, 1))) << np.uint64(32)
        q = ((low | high)[:, word] >> shift & mask).astype(np.float32)
        groups = q.reshape(len(q), -1, group_size)
        dense[part] = (scales[part, :, None] * groups + biases[part, :, None]).reshape(len(q), columns)
    return dense


def dense_weights(weights: dict[str, Array], config: dict[str, Any]) -> dict[str, Array]:
    """`weights` with every packed layer replaced by its dense float32 [out, in]; takes the packed ones out of it.

    Raises ModelLoadError when a layer is packed otherwise than config.json says.
    """
    for name in [key.removesuffix(".scales") for key in weights if key.endswith(".scales")]:
        packing = packing_of(config, name)
        if packing is None:
            raise ModelLoadError(
                f"tensor {name}.scales is there, but config.json does not say that {name} is quantised"
            )
        parts = [weights.pop(f"{name}.{part}", None) for part in ("weight", "scales", "biases")]
        packed, scales, biases = parts
        if packed is not None and packed.ndim == 3:
            raise ModelLoadError(
                f"{name} holds packed weights of all experts of a layer, which only the mlx backend reads; use that, "
                f"or the original weights"
            )
        if packed is None or scales is None or biases is None or packed.dtype != np.uint32 or packed.ndim != 2:
            raise ModelLoadError(f"{name} is quantised and needs {name}.weight (U32, two axes), .scales and .biases")
        try:
            weights[f"{name}.weight"] = dequantize(packed, scales, biases, *packing)
        except ValueError as error:
            raise ModelLoadError(f"{name}: {error}; config.json and the weights do not match") from None
    for name, tensor in weights.items():
        if tensor.dtype != np.float32:
            raise ModelLoadError(f"tensor {name} is packed ({tensor.dtype}) but has no scales; fetch the weights again")
    return weights
