"""Attention of any number of queries per row to keys and values that lie in a pool."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cortexstream.kernels.reference.attention import Float, attention
from cortexstream.kernels.reference.block_table import Integers, table_slots


def prefill_attention(
    q: npt.NDArray[Float], k_pool: npt.NDArray[Float], v_pool: npt.NDArray[Float], tables: Integers,
    query_tokens: list[int], kv_tokens: list[int], *, block_tokens: int | None, scale: float,
    causal: bool = True, window: int | None = None, softcap: float | None = None,
    sinks: npt.NDArray[Float] | None = None,
) -> npt.NDArray[Float]:  # fmt: skip
    """Row r's query_tokens[r] queries are the last of its kv_tokens[r] positions, whose keys are in the pool already.

    q [T, Hq, D] holds the rows' queries one row after the other; pools and tables as in `decode_attention`. With
    `causal` a query sees its own position and those before (aligned at the bottom right), else all of its row. Without
    `causal` a row may have more queries than keys; with no key at all they give zeros. Returns [T, Hq, Dv].
    """
    result = np.zeros((*q.shape[:2], v_pool.shape[2]), q.dtype)
    begin = 0
    for table, queries, keys in zip(tables, query_tokens, kv_tokens, strict=True):
        own = slice(begin, begin + queries)
        begin = own.stop
        slots = table_slots(table, keys, block_tokens)
        k, v = k_pool[slots], v_pool[slots]
        if causal:
            result[own] = attention(q[own], k, v, keys - queries, scale, window, sinks, softcap=softcap)
        elif keys:  # as if each query were the last position
            last = [attention(one[None], k, v, keys - 1, scale, None, sinks, softcap=softcap) for one in q[own]]
            result[own] = np.concatenate(last) if last else result[own]
    return result
