"""Root-mean-square normalisation (Zhang and Sennrich, "Root mean square layer normalization", 2019)."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Float = TypeVar("Float", np.float32, np.float64)


def rms_norm(
    x: npt.NDArray[Float], weight: npt.NDArray[Float], eps: float, *, unit_offset: bool = False
) -> npt.NDArray[Float]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; with `unit_offset` times 1 + weight, as Gemma has it.

    x [..., D], weight [D] -> [..., D], all float32 or all float64. Raises ValueError when the last axes differ.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {weight.shape}; for x {x.shape} it must have {x.shape[-1:]}")
    if unit_offset:
        weight = weight + x.dtype.type(1)
    mean_square: npt.NDArray[Float] = np.mean(x * x, axis=-1, keepdims=True)
    result: npt.NDArray[Float] = x / np.sqrt(mean_square + x.dtype.type(eps)) * weight
    return result
