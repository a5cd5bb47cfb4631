"""Gated activations of feed-forward layers (Shazeer, "GLU variants improve Transformer", 2020)."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Float = TypeVar("Float", np.float32, np.float64)

ERF = np.vectorize(math.erf, otypes=[np.float64])


def gated(x: npt.NDArray[Float], activation: str) -> npt.NDArray[Float]:
    """act(x[..., :F]) * x[..., F:] for x [..., 2F], float32 or float64 -> [..., F].

    act is "silu", "gelu" or "gelu_tanh" (Hendrycks and Gimpel, "Gaussian error linear units", 2016, the latter being
    the approximation given there). Raises ValueError for another one, or when the last axis has no two halves.
    """
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}; its last axis must have two halves")
    g, up = np.split(x, 2, axis=-1)
    share: Any
    if activation == "silu":
        share = 1 / (1 + np.exp(-g))
    elif activation == "gelu":
        share = (1 + ERF(g / math.sqrt(2)).astype(x.dtype)) / 2
    elif activation == "gelu_tanh":
        share = (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2
    else:
        raise ValueError(f"activation is {activation!r}; it must be silu, gelu or gelu_tanh")
    result: npt.NDArray[Float] = g * share * up
    return result
