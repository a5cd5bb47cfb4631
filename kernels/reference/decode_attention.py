"""Attention of one query per row to keys and values that lie in a pool."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cortexstream.kernels.reference.attention import Float, attention
from cortexstream.kernels.reference.block_table import Integers, table_slots


def decode_attention(
    q: npt.NDArray[Float], k_pool: npt.NDArray[Float], v_pool: npt.NDArray[Float], tables: Integers, lengths: Integers,
    *, block_tokens: int | None, scale: float, window: int | None = None, softcap: float | None = None,
    sinks: npt.NDArray[Float] | None = None,
) -> npt.NDArray[Float]:  # fmt: skip
    """Row r's query is its last position and sees positions 0 .. lengths[r] - 1, itself included.

    q [R, Hq, D]; k_pool [S, Hkv, D] and v_pool [S, Hkv, Dv]; tables [R, blocks] block numbers, or [R, 1] first slots if
    `block_tokens` is None (`table_slots`); lengths [R]. A row of length 0 is padding and gives zeros. The rest is as in
    `kernels.reference.attention`. Returns [R, Hq, Dv].
    """
    result = np.zeros((*q.shape[:2], v_pool.shape[2]), q.dtype)
    for row, length in enumerate(lengths.tolist()):
        if length:
            slots = table_slots(tables[row], length, block_tokens)
            result[row] = attention(
                q[row : row + 1], k_pool[slots], v_pool[slots], length - 1, scale, window, sinks, softcap=softcap
            )[0]
    return result
