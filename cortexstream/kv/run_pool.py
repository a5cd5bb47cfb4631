"""Placement "run": a handle holds adjacent blocks, so that its keys and values are one view."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

from cortexstream.errors import ArenaError
from cortexstream.kv.allocator import Allocator, Run
from cortexstream.kv.compaction import cheapest_window, slides
from cortexstream.kv.handle import KVHandle
from cortexstream.kv.pool import Ledger, Pool
from cortexstream.plan import Move

NEAR = 256
"""Runs on each side of the largest hole, or of the run that grows, that compaction looks at first; so that it takes as
long in a large arena as in a small one."""


class Neighbours(NamedTuple):
    """Some runs that follow each other: whose they are, and the free blocks before each and behind the last."""

    handles: list[KVHandle]
    runs: list[Run]
    gaps: list[int]
    end: int  # the block behind the last gap


class RunPool(Pool):
    """Runs in capacity classes, each `growth` times the one before. A run grows in place if the blocks behind it are
    free, else into a hole, else after its neighbours were slid aside; a new one that fits no hole makes room likewise.
    """

    def __init__(
        self, index: int, allocator: Allocator, block_tokens: int, ring_tokens: int | None, ledger: Ledger,
        growth: float,
    ) -> None:  # fmt: skip
        super().__init__(index, allocator, block_tokens, ring_tokens, ledger)
        self._classes = _capacity_classes(allocator.num_blocks, growth)
        self._starts: list[int] = []  # of all runs, rising
        self._owners: dict[int, KVHandle] = {}  # start -> whose run begins there

    def assign(self, handle: KVHandle, blocks: tuple[int, ...]) -> None:
        old = self.claims.get(handle)
        if old is None or old[0] != blocks[0]:
            if old is not None:
                self._forget(old[0])
            insort(self._starts, blocks[0])
        self._owners[blocks[0]] = handle
        super().assign(handle, blocks)

    def transfer(self, source: KVHandle, target: KVHandle) -> None:
        self._forget(self.claims[source][0])
        super().transfer(source, target)

    def need(self, num_tokens: int, limit_tokens: int | None) -> int:
        blocks = self.blocks_for(num_tokens)
        if blocks > self.num_blocks:
            return blocks
        limit = self.num_blocks if limit_tokens is None else min(self.blocks_for(limit_tokens), self.num_blocks)
        if self.ring_tokens is not None:
            limit = min(limit, self.ring_tokens // self.block_tokens)
        return max(blocks, min(self._classes[bisect_left(self._classes, blocks)], limit))

    def claim(self, handle: KVHandle, size: int) -> None:
        self.assign(handle, _blocks(self._hole(size)))

    def resize(self, handle: KVHandle, size: int) -> None:
        old = self._run(handle)
        if size == old.size:
            return
        if size < old.size:
            new = Run(old.start, size)
            self.allocator.free(Run(new.end, old.size - size))
        elif self.allocator.take(Run(old.end, size - old.size)):
            new = Run(old.start, size)
        elif self.allocator.largest_free_run >= size:
            new = self.allocator.allocate(size)
            self.allocator.free(old)
            self.ledger.relocations += 1
        else:
            old = self._gather_after(handle, size - old.size)
            new = Run(old.start, size)
        self._move(handle, old, new)

    def copy(self, source: KVHandle, target: KVHandle, num_tokens: int) -> None:
        old, new = self._run(source), self._run(target)
        slots = self.slots(num_tokens)
        if slots:
            self.ledger.copy(Move(old.start, old.size, new.start, new.size, slots, self.index))

    def release(self, handle: KVHandle) -> None:
        run = self._run(handle)
        self._forget(run.start)
        del self.claims[handle]
        self.allocator.free(run)

    def check(self, cached: Sequence[int]) -> None:
        owned: set[int] = set()
        for handle, blocks in self.claims.items():
            if blocks != _blocks(Run(blocks[0], len(blocks))):
                raise ArenaError(f"pool {self.index}: {handle} is not contiguous: {blocks}")
            if not owned.isdisjoint(blocks):
                raise ArenaError(f"pool {self.index}: {handle} shares a block with another sequence or with itself")
            owned.update(blocks)
        if {h: b[0] for h, b in self.claims.items()} != {self._owners[s]: s for s in self._starts}:
            raise ArenaError(f"pool {self.index}: the order of the runs is not theirs")
        if sorted(self._owners) != self._starts:
            raise ArenaError(f"pool {self.index}: {len(self._starts)} runs are in order, {len(self._owners)} are known")
        self._check_taken(owned)

    def _run(self, handle: KVHandle) -> Run:
        blocks = self.claims[handle]
        return Run(blocks[0], len(blocks))

    def _hole(self, size: int) -> Run:
        """A free run of `size` blocks, taken; others are moved together if no hole is large enough."""
        if self.allocator.largest_free_run >= size:
            return self.allocator.allocate(size)
        middle = bisect_left(self._starts, self.allocator.place_of(self.allocator.largest_free_run))
        near = self._near(middle, size)
        first, last = cheapest_window(near.gaps, [r.size for r in near.runs], size)
        # Those in the window go left: the hole ends where the window does.
        end = near.runs[last].start if last < len(near.runs) else near.end
        self._slide(near, slides(near.gaps, near.runs, first, last, pivot=last))
        return self._take(Run(end - sum(near.gaps[first : last + 1]), size))

    def _gather_after(self, handle: KVHandle, extra: int) -> Run:
        """Slide others so that `extra` free blocks follow this run, and take them; returns where the run now lies."""
        near = self._near(bisect_left(self._starts, self.claims[handle][0]), extra)
        own = near.handles.index(handle)
        first, last = cheapest_window(near.gaps, [r.size for r in near.runs], extra, around=own)
        self._slide(near, slides(near.gaps, near.runs, first, last, pivot=own + 1))
        run = self._run(handle)
        self._take(Run(run.end, extra))
        return run

    def _near(self, middle: int, need: int) -> Neighbours:
        """Runs around the one with the index `middle`, among which `need` blocks are free: NEAR on each side, or as
        many more as it takes."""
        reach = NEAR
        while True:
            low, high = max(0, middle - reach), min(len(self._starts), middle + reach)
            handles = [self._owners[start] for start in self._starts[low:high]]
            runs = [self._run(handle) for handle in handles]
            before = self._run(self._owners[self._starts[low - 1]]).end if low else 0
            after = self._starts[high] if high < len(self._starts) else self.num_blocks
            gaps = _gaps(runs, before, after)
            if sum(gaps) >= need or (low == 0 and high == len(self._starts)):
                return Neighbours(handles, runs, gaps, after)
            reach *= 2

    def _forget(self, start: int) -> None:
        del self._starts[bisect_left(self._starts, start)]
        del self._owners[start]

    def _take(self, run: Run) -> Run:
        if not self.allocator.take(run):
            raise ArenaError(f"compaction left blocks {run.start} to {run.end - 1} taken")
        return run

    def _slide(self, near: Neighbours, moves: list[tuple[int, int]]) -> None:
        """Move runs (index, new start), in an order in which no move overwrites a run that is still to move."""
        self.ledger.compactions += bool(moves)
        for index, _ in moves:
            self.allocator.free(near.runs[index])
        for index, start in moves:
            target = Run(start, near.runs[index].size)
            self._take(target)
            self._move(near.handles[index], near.runs[index], target)

    def _move(self, handle: KVHandle, old: Run, new: Run) -> None:
        self.assign(handle, _blocks(new))
        slots = self.slots(handle.position)
        if slots:
            self.ledger.move(Move(old.start, old.size, new.start, new.size, slots, self.index))


def _capacity_classes(num_blocks: int, growth: float) -> list[int]:
    """1, 2, 3, ... growing by the factor, rounded up; the last is the whole pool."""
    sizes = [1]
    while sizes[-1] < num_blocks:
        sizes.append(min(num_blocks, max(sizes[-1] + 1, int(sizes[-1] * growth))))
    return sizes


def _blocks(run: Run) -> tuple[int, ...]:
    return tuple(range(run.start, run.end))


def _gaps(runs: list[Run], before: int, after: int) -> list[int]:
    """Free blocks before each run, from block `before` on, and behind the last up to `after`: len(runs) + 1 numbers."""
    ends = [before, *(r.end for r in runs)]
    starts = [*(r.start for r in runs), after]
    return [start - end for end, start in zip(ends, starts, strict=True)]
