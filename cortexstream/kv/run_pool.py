"""Placement "run": a handle holds adjacent blocks, so that its keys and values are one view."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from cortexstream.errors import ArenaError
from cortexstream.kv.allocator import Allocator, Run
from cortexstream.kv.compaction import cheapest_window, slides
from cortexstream.kv.handle import KVHandle
from cortexstream.kv.pool import Ledger, Pool
from cortexstream.plan import Move


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
        self._check_taken(owned)

    def _run(self, handle: KVHandle) -> Run:
        blocks = self.claims[handle]
        return Run(blocks[0], len(blocks))

    def _hole(self, size: int) -> Run:
        """A free run of `size` blocks, taken; others are moved together if no hole is large enough."""
        if self.allocator.largest_free_run >= size:
            return self.allocator.allocate(size)
        handles, runs = self._sorted()
        gaps = _gaps(runs, self.num_blocks)
        first, last = cheapest_window(gaps, [r.size for r in runs], size)
        self._slide(handles, runs, slides(gaps, runs, first, last, pivot=last))
        # Those in the window went left: the hole ends where the window does.
        end = runs[last].start if last < len(runs) else self.num_blocks
        return self._take(Run(end - sum(gaps[first : last + 1]), size))

    def _gather_after(self, handle: KVHandle, extra: int) -> Run:
        """Slide others so that `extra` free blocks follow this run, and take them; returns where the run now lies."""
        handles, runs = self._sorted()
        gaps = _gaps(runs, self.num_blocks)
        own = handles.index(handle)
        first, last = cheapest_window(gaps, [r.size for r in runs], extra, around=own)
        self._slide(handles, runs, slides(gaps, runs, first, last, pivot=own + 1))
        run = self._run(handle)
        self._take(Run(run.end, extra))
        return run

    def _take(self, run: Run) -> Run:
        if not self.allocator.take(run):
            raise ArenaError(f"compaction left blocks {run.start} to {run.end - 1} taken")
        return run

    def _slide(self, handles: list[KVHandle], runs: list[Run], moves: list[tuple[int, int]]) -> None:
        """Move runs (index, new start), in an order in which no move overwrites a run that is still to move."""
        self.ledger.compactions += bool(moves)
        for index, _ in moves:
            self.allocator.free(runs[index])
        for index, start in moves:
            target = Run(start, runs[index].size)
            self._take(target)
            self._move(handles[index], runs[index], target)

    def _move(self, handle: KVHandle, old: Run, new: Run) -> None:
        self.assign(handle, _blocks(new))
        slots = self.slots(handle.position)
        if slots:
            self.ledger.move(Move(old.start, old.size, new.start, new.size, slots, self.index))

    def _sorted(self) -> tuple[list[KVHandle], list[Run]]:
        handles = sorted(self.claims, key=lambda handle: self.claims[handle][0])
        return handles, [self._run(handle) for handle in handles]


def _capacity_classes(num_blocks: int, growth: float) -> list[int]:
    """1, 2, 3, ... growing by the factor, rounded up; the last is the whole pool."""
    sizes = [1]
    while sizes[-1] < num_blocks:
        sizes.append(min(num_blocks, max(sizes[-1] + 1, int(sizes[-1] * growth))))
    return sizes


def _blocks(run: Run) -> tuple[int, ...]:
    return tuple(range(run.start, run.end))


def _gaps(runs: list[Run], num_blocks: int) -> list[int]:
    """Free blocks before each run, and after the last: len(runs) + 1 numbers."""
    ends = [0, *(r.end for r in runs)]
    starts = [*(r.start for r in runs), num_blocks]
    return [start - end for end, start in zip(ends, starts, strict=True)]
