"""How decoding rows are split: a split is a fixed number of positions, counted from position 0.

What a row's splits are depends on its length and window alone. So its result is the same bits alone, in any batch, and
in both forms of `decode_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cortexstream.kernels.triton._common import check_tensor

BLOCK = 256  # rows that the kernel takes at a time


@triton.jit
def splits_of(length, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    """(lowest position seen, first split, number of splits) for lengths of any shape; 0 positions make one split."""
    low = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else length * 0
    first = low // SPLIT
    return low, first, tl.maximum(tl.cdiv(length, SPLIT) - first, 1)


@triton.jit(do_not_specialize=["limit", "rows"], do_not_specialize_on_alignment=["lengths", "offsets"])
def split_offsets_kernel(
    lengths, offsets, limit, rows, WINDOW: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: running sums of the rows' numbers of splits, from 0."""
    before = limit * 0
    tl.store(offsets, before)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        length = tl.minimum(tl.load(lengths + row, mask=row < rows, other=0), limit)
        _, _, count = splits_of(length, WINDOW, SPLIT)
        count = tl.where(row < rows, count, 0)
        tl.store(offsets + 1 + row, before + tl.cumsum(count, 0), mask=row < rows)
        before += tl.sum(count, 0)


def most_splits(max_tokens: int, window: int | None, split: int) -> int:
    """How many splits a row of at most `max_tokens` positions can have, with or without a window."""
    splits = max(1, -(-max_tokens // split))
    return splits if window is None else min(splits, -(-(window - 1) // split) + 1)


def split_offsets(
    lengths: torch.Tensor, *, max_tokens: int, split: int, window: int | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The work list of `decode_attention` in one launch, made on the device; once a step for all layers of a window.

    lengths int32 [R]; `max_tokens` and `window` as there, `split` from its Config. Returns int32 [R + 1], in `out` if
    given: the splits of row r are items result[r] .. result[r + 1] - 1. Raises ValueError for other shapes or types.
    """
    rows = len(lengths)
    check_tensor("lengths", lengths, (rows,), (torch.int32,), lengths.device)
    if out is None:
        out = torch.empty(rows + 1, dtype=torch.int32, device=lengths.device)
    check_tensor("out", out, (rows + 1,), (torch.int32,), lengths.device)
    split_offsets_kernel[(1,)](lengths, out, max_tokens, rows, WINDOW=window or 0, SPLIT=split, BLOCK=BLOCK)
    return out
