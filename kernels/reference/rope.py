"""Rotary position embedding (Su et al., "RoFormer", 2021) in the half-split convention of Llama checkpoints."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def rope(x: Floats, positions: npt.NDArray[np.int64], inv_freq: Floats) -> Floats:
    """Turn the pair (x[d], x[d + D/2]) of the vector at position p by the angle p * inv_freq[d], for every d < D/2.

    x [T, H, D] and inv_freq [D/2] float32, positions [T] integers at least 0 -> [T, H, D] float32. The angle is the
    float32 product of the float32 position and frequency: other devices that round it so get the same bits.
    Raises ValueError when the shapes do not go together.
    """
    if positions.shape != x.shape[:1] or 2 * len(inv_freq) != x.shape[-1]:
        raise ValueError(f"positions {positions.shape} and inv_freq {inv_freq.shape} do not fit x {x.shape}")
    angle = positions.astype(np.float32)[:, None, None] * inv_freq  # [T, 1, D/2]
    cos, sin = np.cos(angle), np.sin(angle)
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)
