"""The physical level: which blocks are free. Knows blocks, not sequences."""

from __future__ import annotations

from typing import NamedTuple

from cortexstream.errors import ArenaError, ArenaFullError


class Run(NamedTuple):
    """`size` adjacent blocks from `start`."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class BlockAllocator:
    """First fit, lowest address, exact sizes, immediate coalescing; every operation is O(log num_blocks).

    Free blocks form extents (maximal runs of free blocks). Invariants, which `check` proves:

        taken     1 1 1 0 0 0 1 0 0 0 0 1        one byte a block
        extents         3 ----  7 ------         start -> size in the tree's leaves, end -> start in `_start_of`
        no two extents touch; taken + free = num_blocks; the tree's inner nodes are the maximum below them

    The maximum tree finds the lowest extent that is large enough by walking down from the root.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ArenaError(f"num_blocks is {num_blocks}; must be at least 0")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._leaves = 1 << max(num_blocks - 1, 0).bit_length()
        self._tree = [0] * (2 * self._leaves)
        self._start_of: dict[int, int] = {}
        self._taken = bytearray(num_blocks)
        if num_blocks:
            self._put(Run(0, num_blocks))

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def largest_free_run(self) -> int:
        """Blocks of the largest extent, 0 when nothing is free."""
        return self._tree[1]

    def allocate(self, size: int) -> Run:
        """The lowest `size` adjacent free blocks. Raises ArenaFullError, with the numbers, when there are none."""
        self._check_count(size)
        if self._tree[1] < size:
            raise ArenaFullError(
                f"no {size} adjacent blocks: {self.num_free} of {self.num_blocks} are free, "
                f"the largest run has {self.largest_free_run}"
            )
        node = 1
        while node < self._leaves:
            node *= 2
            if self._tree[node] < size:
                node += 1
        start = node - self._leaves
        run = Run(start, size)
        self._take(run, Run(start, self._tree[node]))
        return run

    def take(self, run: Run) -> bool:
        """Take exactly these blocks if all of them are free; how a run grows in place or is moved to."""
        self._check_count(run.size)
        extent = self._extent_at(run.start) if 0 <= run.start < self.num_blocks else None
        if extent is None or extent.end < run.end:
            return False
        self._take(run, extent)
        return True

    def free_after(self, block: int) -> int:
        """How many blocks are free from `block` on, for a block that follows a taken one; 0 past the end."""
        return self._tree[self._leaves + block] if 0 <= block < self.num_blocks else 0

    def allocate_any(self, count: int, after: int = 0) -> list[int]:
        """Any `count` free blocks: those from `after` on if they are free, else the lowest ones. All or nothing."""
        self._check_count(count)
        if count > self.num_free:
            raise ArenaFullError(f"{count} blocks are needed, {self.num_free} of {self.num_blocks} are free")
        blocks: list[int] = []
        while len(blocks) < count:
            start = after if self.free_after(after) else self._lowest()
            extent = Run(start, self.free_after(start))
            run = Run(start, min(count - len(blocks), extent.size))
            self._take(run, extent)
            blocks.extend(range(run.start, run.end))
            after = run.end
        return blocks

    def free(self, run: Run) -> None:
        """Give blocks back. Raises ArenaError, changing nothing, if any of them is not taken."""
        self._check_count(run.size)
        if run.start < 0 or run.end > self.num_blocks:
            raise ArenaError(f"blocks {run.start} to {run.end - 1} are outside the arena's 0 to {self.num_blocks - 1}")
        if self._taken.count(1, run.start, run.end) != run.size:
            raise ArenaError(f"double free: of blocks {run.start} to {run.end - 1} some are free already")
        self._taken[run.start : run.end] = bytes(run.size)
        self.num_free += run.size
        start, end = run.start, run.end
        if start in self._start_of:
            start = self._start_of.pop(start)
            self._set(start, 0)
        if end < self.num_blocks and (size := self._tree[self._leaves + end]):
            self._set(end, 0)
            del self._start_of[end + size]
            end += size
        self._put(Run(start, end - start))

    def fragmentation(self) -> float:
        """1 - largest free run / free blocks: 0 is one hole (or none), near 1 is dust."""
        return 1.0 - self.largest_free_run / self.num_free if self.num_free else 0.0

    def block_map(self, width: int = 64) -> str:
        """One character a block, '.' free and 'X' taken, `width` to a line."""
        text = self._taken.translate(bytes([ord("."), ord("X")]) + bytes(254)).decode()
        return "\n".join(text[i : i + width] for i in range(0, len(text), width))

    def check(self) -> None:
        """Prove the invariants in the class docstring; raises ArenaError on the first that fails. O(num_blocks)."""
        if self.num_free != self._taken.count(0):
            raise ArenaError(f"free count is {self.num_free}, but {self._taken.count(0)} blocks are not taken")
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

    def _check_count(self, count: int) -> None:
        if count <= 0:
            raise ArenaError(f"block count is {count}; must be at least 1")

    def _lowest(self) -> int:
        node = 1
        while node < self._leaves:
            node *= 2
            if not self._tree[node]:
                node += 1
        return node - self._leaves

    def _extent_at(self, block: int) -> Run | None:
        """The extent that holds a block: the nearest one that starts at or before it, if it reaches so far."""
        node = self._leaves + block
        if not self._tree[node]:
            while node > 1 and not (node & 1 and self._tree[node - 1]):
                node >>= 1
            if node == 1:
                return None
            node -= 1
            while node < self._leaves:
                node = 2 * node + 1 if self._tree[2 * node + 1] else 2 * node
        extent = Run(node - self._leaves, self._tree[node])
        return extent if extent.end > block else None

    def _take(self, run: Run, extent: Run) -> None:
        """Cut a run out of the extent that holds it."""
        self._taken[run.start : run.end] = b"\1" * run.size
        self.num_free -= run.size
        self._set(extent.start, 0)
        del self._start_of[extent.end]
        if run.start > extent.start:
            self._put(Run(extent.start, run.start - extent.start))
        if run.end < extent.end:
            self._put(Run(run.end, extent.end - run.end))

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
