"""Which runs to slide, and where to, so that scattered free blocks become one hole. Integers in, integers out.

Picture: gap g_i lies before run i, and g_n after the last.

    g0 [run 0] g1 [run 1] g2 [run 2] g3

Merging gaps first..last means sliding runs first..last-1. Those left of a pivot slide left and the others right, so
that the hole appears at the pivot.
"""

from __future__ import annotations

from collections.abc import Sequence

from cortexstream.errors import ArenaError
from cortexstream.kv.blocks import Run


def cheapest_window(gaps: Sequence[int], sizes: Sequence[int], need: int, around: int | None = None) -> tuple[int, int]:
    """Gaps (first, last) whose free blocks add up to `need` while the runs between them are smallest.

    With `around`, the hole must appear right after that run, so the window must hold the gap there. Two pointers:
    O(number of runs).
    """
    needed = len(gaps) if around is None else around + 1  # gap that the window must not shrink past
    best: tuple[int, int, int] | None = None
    free = cost = first = 0
    for last, gap in enumerate(gaps):
        free += gap
        cost += sizes[last - 1] if last else 0
        if around is not None and last < needed:
            continue
        while first < min(last, needed) and free - gaps[first] >= need:
            free -= gaps[first]
            cost -= sizes[first]
            first += 1
        if free >= need and (best is None or cost < best[0]):
            best = (cost, first, last)
    if best is None:
        raise ArenaError(f"no window of gaps holds {need} free blocks; {sum(gaps)} are free")
    return best[1], best[2]


def slides(gaps: Sequence[int], runs: Sequence[Run], first: int, last: int, pivot: int) -> list[tuple[int, int]]:
    """(run index, new start) for runs first..last-1, in a safe order: those below `pivot` slide left, lowest first; the
    others slide right, highest first. Runs that stay where they are are left out."""
    moves: list[tuple[int, int]] = []
    edge = runs[first].start - gaps[first] if first < len(runs) else 0
    for index in range(first, min(pivot, last)):
        moves.append((index, edge))
        edge += runs[index].size
    edge = runs[last - 1].end + gaps[last] if last else 0
    for index in range(last - 1, max(pivot, first) - 1, -1):
        edge -= runs[index].size
        moves.append((index, edge))
    return [(index, start) for index, start in moves if runs[index].start != start]
