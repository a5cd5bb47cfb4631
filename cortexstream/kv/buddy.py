"""A buddy allocator without the waste of the textbook one: any pool size, and what is handed out is not rounded."""

from __future__ import annotations

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv.blocks import Run


class BuddyAllocator:
    """Binary buddies (Knowlton, CACM 1965): a free piece of order k has 2^k blocks and starts at a multiple of 2^k.

    A request takes a piece of the smallest order that holds it, splits it, and gives the unused tail back at
    once, so nothing is lost to rounding. Freed blocks merge with their buddy (start XOR 2^k) as far as they can. Blocks
    handed out are aligned to the next power of two above their size: fewer, larger holes than first fit, but a run
    cannot be found that crosses an alignment border.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ArenaError(f"num_blocks is {num_blocks}; must be at least 0")
        self.num_blocks = num_blocks
        self.num_free = 0
        self._pieces: list[set[int]] = [set() for _ in range(num_blocks.bit_length() + 1)]
        self._taken = bytearray(b"\1" * num_blocks)
        if num_blocks:
            self._give(Run(0, num_blocks))

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def largest_free_run(self) -> int:
        """Blocks of the largest free piece; two adjacent pieces that are not buddies count apart."""
        return max((1 << k for k, pieces in enumerate(self._pieces) if pieces), default=0)

    def allocate(self, size: int) -> Run:
        """`size` adjacent blocks. Raises ArenaFullError when no single piece holds them."""
        if size <= 0:
            raise ArenaError(f"block count is {size}; must be at least 1")
        order = (size - 1).bit_length()
        fitting = next((k for k in range(order, len(self._pieces)) if self._pieces[k]), None)
        if fitting is None:
            raise ArenaFullError(f"no piece of {1 << order} blocks for {size}: {self.num_free} blocks are free")
        run = Run(self._pieces[fitting].pop(), size)
        self._taken[run.start : run.end] = b"\1" * size
        self.num_free -= 1 << fitting
        self._give(Run(run.end, (1 << fitting) - size))
        return run

    def free(self, run: Run) -> None:
        """Give blocks back. Raises ArenaError, changing nothing, if any of them is not taken."""
        if run.size <= 0 or run.start < 0 or run.end > self.num_blocks:
            raise ArenaError(f"blocks {run.start} to {run.end - 1} are not inside 0 to {self.num_blocks - 1}")
        if self._taken.count(1, run.start, run.end) != run.size:
            raise ArenaError(f"double free: of blocks {run.start} to {run.end - 1} some are free already")
        self._give(run)

    def check(self) -> None:
        """Pieces are aligned, disjoint, merged as far as possible, and exactly the blocks that are not taken."""
        free = bytearray(b"\1" * self.num_blocks)
        for order, pieces in enumerate(self._pieces):
            for start in pieces:
                size = 1 << order
                if start % size or any(b == 0 for b in free[start : start + size]):
                    raise ArenaError(f"the piece of {size} blocks at {start} is misaligned or overlaps another")
                if start ^ size in pieces:
                    raise ArenaError(f"buddies of {size} blocks at {start} and {start ^ size} are both free")
                free[start : start + size] = bytes(size)
        if free != self._taken or self.num_free != free.count(0):
            raise ArenaError("the free pieces do not match the blocks that are not taken")

    def _give(self, run: Run) -> None:
        """Cut a run into aligned pieces, largest possible first, and merge each with its buddies."""
        self._taken[run.start : run.end] = bytes(run.size)
        self.num_free += run.size
        start = run.start
        while start < run.end:
            aligned = (start & -start).bit_length() - 1 if start else self.num_blocks.bit_length()
            order = min(aligned, (run.end - start).bit_length() - 1)
            self._merge(start, order)
            start += 1 << order

    def _merge(self, start: int, order: int) -> None:
        while start ^ (1 << order) in self._pieces[order]:
            self._pieces[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._pieces[order].add(start)
