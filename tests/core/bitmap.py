"""Oracles of the block allocators: one byte a block, everything found by searching. And what compares the two."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv import Allocator, BlockAllocator, BuddyAllocator, Run

Make = Callable[[int], Allocator]
ALLOCATORS = (BlockAllocator, BuddyAllocator)


def state(blocks: Allocator) -> str:
    """Everything that an allocator remembers, in full."""
    return repr(vars(blocks))


def refused(blocks: Allocator, call: Callable[[], object], message: str, error: type[ArenaError] = ArenaError) -> None:
    """The call raises exactly this error with exactly this message, and changes nothing."""
    before = state(blocks)
    with pytest.raises(ArenaError, match=f"^{re.escape(message)}$") as caught:
        call()
    assert type(caught.value) is error
    assert state(blocks) == before


class Bitmap:
    """First fit, the plain way."""

    hole = "run"

    def __init__(self, num_blocks: int) -> None:
        self.taken = bytearray(num_blocks)

    def holes(self) -> list[Run]:
        """What `allocate` chooses from: here all maximal runs of free blocks."""
        found, start = [], 0
        for part in bytes(self.taken).split(b"\1"):
            if part:
                found.append(Run(start, len(part)))
            start += len(part) + 1
        return found

    def place(self, size: int) -> Run | None:
        """Where `allocate` must put so many blocks: in the lowest hole that is large enough."""
        return next((Run(hole.start, size) for hole in self.holes() if hole.size >= size), None)

    def place_any(self, count: int, after: int) -> list[int]:
        """From `after` on up to the next taken block, then the lowest."""
        chosen: list[int] = []
        while 0 <= after < len(self.taken) and not self.taken[after] and len(chosen) < count:
            chosen.append(after)
            after += 1
        rest = (block for block, taken in enumerate(self.taken) if not taken and block not in chosen)
        return chosen + [next(rest) for _ in range(count - len(chosen))]

    def inside(self, run: Run) -> bool:
        return run.start >= 0 and run.end <= len(self.taken)

    def mark(self, blocks: list[int], taken: int) -> None:
        for block in blocks:
            assert self.taken[block] != taken, f"block {block} has two owners, or none"
            self.taken[block] = taken


class BuddyBitmap(Bitmap):
    """Buddies, the plain way: what is free is cut into the fewest aligned pieces, from the left, greedily."""

    hole = "aligned piece"

    def holes(self) -> list[Run]:
        found = []
        for start, left in super().holes():
            while left:
                size = 1
                while start % (2 * size) == 0 and 2 * size <= left:
                    size *= 2
                found.append(Run(start, size))
                start, left = start + size, left - size
        return found

    def place(self, size: int) -> Run | None:
        """The front of the smallest piece that is large enough, the lowest of these."""
        fitting = [(piece.size, piece.start) for piece in self.holes() if piece.size >= size]
        return Run(min(fitting)[1], size) if fitting else None


class Pair:
    """An allocator and its oracle: every operation is done to both, and every answer compared."""

    def __init__(self, make: Make, num_blocks: int) -> None:
        self.blocks = make(num_blocks)
        self.oracle = BuddyBitmap(num_blocks) if make is BuddyAllocator else Bitmap(num_blocks)
        self.num_blocks = num_blocks

    def allocate(self, size: int) -> None:
        want = self.oracle.place(size) if size > 0 else None
        if size <= 0:
            self._bad_count(lambda: self.blocks.allocate(size), size)
        elif want is not None:
            assert size <= self.blocks.largest_free_run
            assert self.blocks.allocate(size) == want
            self.oracle.mark([*range(want.start, want.end)], 1)
        else:
            assert size > self.blocks.largest_free_run
            message = (
                f"no {size} adjacent blocks: {self.num_free} of {self.num_blocks} are free, "
                f"the largest {self.oracle.hole} has {self.largest}"
            )
            refused(self.blocks, lambda: self.blocks.allocate(size), message, ArenaFullError)

    def allocate_any(self, count: int, after: int) -> None:
        if count <= 0:
            self._bad_count(lambda: self.blocks.allocate_any(count, after), count)
        elif count <= self.num_free:
            want = self.oracle.place_any(count, after)
            assert self.blocks.allocate_any(count, after) == want
            self.oracle.mark(want, 1)
        else:
            message = f"{count} blocks are needed, {self.num_free} of {self.num_blocks} are free"
            refused(self.blocks, lambda: self.blocks.allocate_any(count, after), message, ArenaFullError)

    def take(self, run: Run) -> None:
        if run.size <= 0:
            self._bad_count(lambda: self.blocks.take(run), run.size)
        elif self.oracle.inside(run) and not any(self.oracle.taken[run.start : run.end]):
            assert self.blocks.take(run)
            self.oracle.mark([*range(run.start, run.end)], 1)
        else:
            before = state(self.blocks)
            assert not self.blocks.take(run)
            assert state(self.blocks) == before

    def free(self, run: Run) -> None:
        span = f"blocks {run.start} to {run.end - 1}"
        free = [block for block, taken in enumerate(self.oracle.taken) if not taken and run.start <= block < run.end]
        if run.size <= 0:
            self._bad_count(lambda: self.blocks.free(run), run.size)
        elif not self.oracle.inside(run):
            message = f"{span} are outside the arena of {self.num_blocks} blocks"
            refused(self.blocks, lambda: self.blocks.free(run), message)
        elif free:
            message = f"double free: of {span}, {len(free)} are free already, the first is {free[0]}"
            refused(self.blocks, lambda: self.blocks.free(run), message)
        else:
            self.blocks.free(run)
            self.oracle.mark([*range(run.start, run.end)], 0)

    def agree(self, block: int) -> None:
        """All that can be read is equal; `free_after` at one block."""
        blocks = self.blocks
        assert (blocks.num_blocks, blocks.num_free) == (self.num_blocks, self.num_free)
        assert blocks.num_used + blocks.num_free == self.num_blocks
        assert blocks.largest_free_run == self.largest
        follows = self.oracle.taken[max(block, 0) :].find(1) if 0 <= block < self.num_blocks else 0
        assert blocks.free_after(block) == (follows if follows >= 0 else self.num_blocks - block)

    def check(self) -> None:
        """The allocator's invariants, and what is dear to read."""
        self.blocks.check()
        assert self.blocks.block_map(self.num_blocks or 1) == "".join(".X"[taken] for taken in self.oracle.taken)
        assert self.blocks.fragmentation() == (1 - self.largest / self.num_free if self.num_free else 0.0)

    @property
    def num_free(self) -> int:
        return self.oracle.taken.count(0)

    @property
    def largest(self) -> int:
        return max((hole.size for hole in self.oracle.holes()), default=0)

    def _bad_count(self, call: Callable[[], object], count: int) -> None:
        refused(self.blocks, call, f"block count is {count}; must be at least 1")
