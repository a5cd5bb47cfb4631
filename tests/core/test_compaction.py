"""Which runs slide, and where to: against brute force (F17)."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from cortexstream.errors import ArenaError
from cortexstream.kv import Run
from cortexstream.kv.compaction import cheapest_window, slides


def random_gaps(rng: random.Random) -> tuple[list[int], list[Run]]:
    sizes = [rng.randint(1, 5) for _ in range(rng.randint(1, 8))]
    gaps = [rng.randint(0, 4) for _ in range(len(sizes) + 1)]
    runs, edge = [], 0
    for gap, size in zip(gaps, sizes, strict=False):
        runs.append(Run(edge + gap, size))
        edge += gap + size
    return gaps, runs


def test_the_cheapest_window_is_cheapest() -> None:
    rng = random.Random(5)
    for _ in range(3000):
        gaps, runs = random_gaps(rng)
        sizes = [run.size for run in runs]
        need = rng.randint(1, 10)
        around = rng.choice((None, rng.randrange(len(runs))))
        windows = [
            (first, last)
            for first in range(len(gaps))
            for last in range(first, len(gaps))
            if sum(gaps[first : last + 1]) >= need and (around is None or first <= around + 1 <= last)
        ]
        if not windows:
            with pytest.raises(ArenaError, match=f"no window of gaps holds {need} free blocks"):
                cheapest_window(gaps, sizes, need, around)
            continue
        found = cheapest_window(gaps, sizes, need, around)
        assert found in windows
        cost = {window: sum(sizes[window[0] : window[1]]) for window in windows}
        assert cost[found] == min(cost.values())


def test_slides_open_the_hole_and_overwrite_nothing() -> None:
    rng = random.Random(6)
    for _ in range(3000):
        gaps, runs = random_gaps(rng)
        first = rng.randrange(len(gaps))
        last = rng.randrange(first, len(gaps))
        pivot = rng.randint(first, last)
        cells = np.full(sum(gaps) + sum(r.size for r in runs), -1)
        for index, run in enumerate(runs):
            cells[run.start : run.end] = index
        place = dict(enumerate(runs))
        for index, start in slides(gaps, runs, first, last, pivot):
            old = place[index]
            assert (cells[old.start : old.end] == index).all(), "a run was overwritten before it moved"
            assert start >= 0 and start + old.size <= len(cells)
            cells[start : start + old.size] = cells[old.start : old.end].copy()
            place[index] = Run(start, old.size)
        now = sorted(place.values())
        assert all(a.end <= b.start for a, b in pairwise(now))
        ends, begins = [0, *(r.end for r in now)], [*(r.start for r in now), len(cells)]
        assert begins[pivot] - ends[pivot] == sum(gaps[first : last + 1])
        assert all(place[i] == runs[i] for i in range(len(runs)) if not first <= i < last)
