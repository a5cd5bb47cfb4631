"""First fit: the default way to choose blocks."""

from __future__ import annotations

from cortexstream.errors import ArenaError
from cortexstream.kv.allocator import Run, TreeAllocator

__all__ = ["BlockAllocator", "Run"]


class BlockAllocator(TreeAllocator):
    """First fit, lowest address, immediate coalescing; every operation takes O(log num_blocks) steps.

    Free blocks form extents (maximal runs of free blocks). Invariants, which `check` proves:

        taken     1 1 1 0 0 0 1 0 0 0 0 1        one byte a block
        extents         3 ----  7 ------         start -> size in the tree's leaves, end -> start in `_start_of`
        no two extents touch; taken + free = num_blocks; the tree's inner nodes are the maximum below them

    The maximum tree finds the lowest extent that is large enough by walking down from the root.
    """

    def __init__(self, num_blocks: int) -> None:
        self._start_of: dict[int, int] = {}
        super().__init__(num_blocks)

    @property
    def largest_free_run(self) -> int:
        """Blocks of the largest extent, 0 when nothing is free."""
        return self._tree[1]

    def free_after(self, block: int) -> int:
        if not 0 <= block < self.num_blocks or self._taken[block]:
            return 0
        return self._extent_at(block).end - block

    def check(self) -> None:
        super().check()
        block, extents = 0, {}
        while block < self.num_blocks:
            end = self._taken.find(1, block)
            end = self.num_blocks if end < 0 else end
            if end > block:
                extents[end] = block
            block = end + 1
        if extents != self._start_of:
            raise ArenaError(f"extents are {self._start_of}, but the taken map says {extents}")
        leaves = [0] * self._leaves
        for end, start in extents.items():
            leaves[start] = end - start
        if leaves != self._tree[self._leaves :]:
            raise ArenaError("the tree's leaves do not match the extents")
        if any(self._tree[i] != max(self._tree[2 * i : 2 * i + 2]) for i in range(1, self._leaves)):
            raise ArenaError("an inner node of the tree is not the maximum of its children")

    def _find(self, size: int) -> int:
        node = 1
        while node < self._leaves:
            node *= 2
            if self._tree[node] < size:
                node += 1
        return node - self._leaves

    def _insert(self, run: Run) -> None:
        """Make an extent of the run and the extents that touch it."""
        start, end = run.start, run.end
        if start in self._start_of:
            start = self._start_of.pop(start)
            self._set(start, 0)
        if size := self._tree[self._leaves + end]:
            self._set(end, 0)
            del self._start_of[end + size]
            end += size
        self._put(Run(start, end - start))

    def _remove(self, run: Run) -> None:
        """Cut the run out of the extent that holds it."""
        extent = self._extent_at(run.start)
        self._set(extent.start, 0)
        del self._start_of[extent.end]
        if run.start > extent.start:
            self._put(Run(extent.start, run.start - extent.start))
        if run.end < extent.end:
            self._put(Run(run.end, extent.end - run.end))

    def _extent_at(self, block: int) -> Run:
        """The extent that holds a free block: the nearest one that starts at or before it."""
        tree, node = self._tree, self._leaves + block
        if not tree[node]:
            while not (node & 1 and tree[node - 1]):
                node >>= 1
            node -= 1
            while node < self._leaves:
                node = 2 * node + 1 if tree[2 * node + 1] else 2 * node
        return Run(node - self._leaves, tree[node])

    def _put(self, extent: Run) -> None:
        self._start_of[extent.end] = extent.start
        self._set(extent.start, extent.size)

    def _set(self, leaf: int, value: int) -> None:
        tree, node = self._tree, self._leaves + leaf
        tree[node] = value
        node >>= 1
        while node:
            left, right = tree[2 * node], tree[2 * node + 1]
            best = left if left > right else right
            if tree[node] == best:
                break
            tree[node] = best
            node >>= 1
