"""What happens to a token's projections before attention: head norms, rotary embedding, keys and values to the pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cortexstream.kernels.reference.kv_append import kv_append
from cortexstream.kernels.reference.rms_norm import Float, rms_norm


def rotate(x: npt.NDArray[Float], turns: npt.NDArray[Float]) -> npt.NDArray[Float]:
    """Rotary embedding from a table: x [T, H, D], turns [T, R] (R / 2 cosines, then R / 2 sines) -> [T, H, D].

    The pair (x[d], x[d + R / 2]) is turned for every d < R / 2; dimensions from R on stay.
    """
    half = turns.shape[1] // 2
    cos, sin = turns[:, None, :half], turns[:, None, half:]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate((low * cos - high * sin, high * cos + low * sin, rest), axis=-1)


def rope_append(
    q: npt.NDArray[Float], k: npt.NDArray[Float], v: npt.NDArray[Float], k_pool: npt.NDArray[Any],
    v_pool: npt.NDArray[Any], table: npt.NDArray[Float], positions: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int64], *, q_weight: npt.NDArray[Float] | None = None,
    k_weight: npt.NDArray[Float] | None = None, eps: float = 1e-6, unit_offset: bool = False,
) -> npt.NDArray[Float]:  # fmt: skip
    """Normalise (if weights are given) and rotate q and k, then write k and v to their slots; returns q [T, Hq, D].

    q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv]; weights [D] for `rms_norm` over each head; table [positions, R]: row p
    is what `rotate` turns by at position p; positions and slots [T]. A token whose slot is negative is padding: nothing
    is written for it, and its q comes back as zeros. Errors as in `kv_append`.
    """
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps, unit_offset=unit_offset)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps, unit_offset=unit_offset)
    live = slots >= 0
    turns = table[positions[live]]
    result = np.zeros_like(q)
    result[live] = rotate(q[live], turns)
    kv_append(k_pool, slots[live], rotate(k[live], turns).astype(k_pool.dtype))
    kv_append(v_pool, slots[live], v[live].astype(v_pool.dtype))
    return result
