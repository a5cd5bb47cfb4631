"""Writing new keys or values into a pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def kv_append(pool: npt.NDArray[Any], slots: npt.NDArray[np.int64], new: npt.NDArray[Any]) -> None:
    """pool[slots[t]] = new[t] for every t, in place.

    pool [S, H, D], slots [T] distinct integers in 0 .. S - 1, new [T, H, D] of the pool's dtype. Everything is checked
    before anything is written: raises IndexError for a slot outside the pool, ValueError for a slot named twice and for
    shapes or dtypes that do not go together; the pool is then unchanged.
    """
    if new.shape != (*slots.shape, *pool.shape[1:]) or slots.ndim != 1:
        raise ValueError(f"new {new.shape} does not fit {slots.shape} slots of a pool {pool.shape}")
    if new.dtype != pool.dtype:
        raise ValueError(f"new is {new.dtype}, the pool {pool.dtype}; convert it first, nothing is rounded in silence")
    outside = slots[(slots < 0) | (slots >= len(pool))]
    if len(outside):
        raise IndexError(f"slot {outside[0]} is outside the pool of {len(pool)} slots; nothing was written")
    if len(np.unique(slots)) != len(slots):
        raise ValueError("a slot is named twice; which of the two stays is not defined, so nothing was written")
    pool[slots] = new
