"""Root-mean-square normalisation (Zhang and Sennrich, "Root mean square layer normalization", 2019)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x [..., D], weight [D] -> [..., D], all float32. Raises ValueError when the last axes differ.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {weight.shape}; for x {x.shape} it must have {x.shape[-1:]}")
    mean_square: Floats = np.mean(x * x, axis=-1, keepdims=True)
    result: Floats = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return result
