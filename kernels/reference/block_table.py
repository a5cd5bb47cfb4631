"""Where a row's keys and values lie: block tables and runs, turned into slots."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]


def table_slots(table: Integers, count: int, block_tokens: int | None) -> npt.NDArray[np.int64]:
    """The slots [count] of positions 0 .. count - 1 of one row.

    Position p lies in slot table[p // block_tokens] * block_tokens + p % block_tokens; with `block_tokens` None the row
    is a run and `table` [1] its first slot. Raises ValueError when the table is shorter than the positions need.
    """
    positions = np.arange(count)
    if block_tokens is None:
        return np.asarray(table[0] + positions, np.int64)
    if len(table) * block_tokens < count:
        raise ValueError(f"{count} positions need more than a table of {len(table)} blocks of {block_tokens} tokens")
    return np.asarray(table[positions // block_tokens] * np.int64(block_tokens) + positions % block_tokens, np.int64)
