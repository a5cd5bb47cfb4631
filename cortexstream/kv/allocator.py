"""What an allocator of blocks promises, and what the two of them share. Knows blocks, not sequences."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, Protocol

from cortexstream.errors import ArenaError, ArenaFullError


class Run(NamedTuple):
    """`size` adjacent blocks from `start`."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Allocator(Protocol):
    """Which of the blocks 0 to num_blocks - 1 are taken. The same calls give the same blocks, always.

    Sizes are exact: what is taken is what was asked for. A method that raises, ArenaError for wrong use and
    ArenaFullError when blocks are missing, has changed nothing. Not thread-safe: whoever owns it holds a lock.
    """

    num_blocks: int
    num_free: int

    @property
    def num_used(self) -> int:
        """Blocks that are taken."""

    @property
    def largest_free_run(self) -> int:
        """The largest size for which `allocate` succeeds, 0 when nothing is free."""

    def allocate(self, size: int) -> Run:
        """Take `size` adjacent blocks; which ones is the policy. Raises ArenaFullError, with the numbers, if and only
        if `size` is above `largest_free_run`."""

    def place_of(self, size: int) -> int:
        """Where `allocate` would take `size` blocks, at most `largest_free_run`; 0 for none."""

    def take(self, run: Run) -> bool:
        """Take exactly these blocks if all of them are free; how a run grows in place or is moved to. False, changing
        nothing, if one is taken or outside."""

    def free_after(self, block: int) -> int:
        """How many adjacent blocks are free from `block` on: 0 if it is taken or outside."""

    def allocate_any(self, count: int, after: int = 0) -> list[int]:
        """Take any `count` blocks: those from `after` on up to the next taken one, then the lowest ones. Raises
        ArenaFullError if fewer are free."""

    def free(self, run: Run) -> None:
        """Give blocks back, in any portions. Raises ArenaError if one of them is not taken or outside."""

    def fragmentation(self) -> float:
        """1 - largest free run / free blocks: 0 is one hole (or none), near 1 is dust."""

    def block_map(self, width: int = 64) -> str:
        """One character a block, '.' free and 'X' taken, `width` to a line."""

    def check(self) -> None:
        """Prove the invariants of the class docstring; raises ArenaError on the first that fails. O(num_blocks)."""


class TreeAllocator(Allocator):
    """One byte a block, and a binary tree over the blocks that a policy searches and keeps up to date.

    The tree is an array: node i has the children 2i and 2i + 1, and the leaf of block b is `_leaves` + b. There is at
    least one leaf more than blocks. It stays 0, as a taken block does, so that no walk to the right has to look for
    the end. The leftmost leaf that is not 0 belongs to the lowest free block.

    An operation on a run of n blocks visits O(log num_blocks) nodes, and scans or fills O(n) entries in bulk.
    """

    _hole = "run"
    """What `largest_free_run` measures, for error messages."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ArenaError(f"num_blocks is {num_blocks}; must be at least 0")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._leaves = 1 << num_blocks.bit_length()
        try:
            self._taken = bytearray(num_blocks)
            self._tree = [0] * (2 * self._leaves)
        except MemoryError:
            raise ArenaError(
                f"num_blocks is {num_blocks}; the host has no memory to keep account of so many; ask for fewer"
            ) from None
        if num_blocks:
            self._insert(Run(0, num_blocks))

    @abstractmethod
    def _find(self, size: int) -> int:
        """Where to allocate `size` blocks, which is at most `largest_free_run`."""

    @abstractmethod
    def _insert(self, run: Run) -> None:
        """Enter blocks that became free into the tree."""

    @abstractmethod
    def _remove(self, run: Run) -> None:
        """Remove blocks that became taken from the tree."""

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, size: int) -> Run:
        self._check_count(size)
        if size > self.largest_free_run:
            raise ArenaFullError(
                f"no {size} adjacent blocks: {self.num_free} of {self.num_blocks} are free, "
                f"the largest {self._hole} has {self.largest_free_run}"
            )
        return self._take(Run(self._find(size), size))

    def place_of(self, size: int) -> int:
        return self._find(size) if size else 0

    def take(self, run: Run) -> bool:
        self._check_count(run.size)
        if run.start < 0 or run.end > self.num_blocks or self._taken.find(1, run.start, run.end) >= 0:
            return False
        self._take(run)
        return True

    def allocate_any(self, count: int, after: int = 0) -> list[int]:
        self._check_count(count)
        if count > self.num_free:
            raise ArenaFullError(f"{count} blocks are needed, {self.num_free} of {self.num_blocks} are free")
        blocks: list[int] = []
        while len(blocks) < count:
            size = self.free_after(after)
            if not size:
                after = self._lowest()
                size = self.free_after(after)
            run = self._take(Run(after, min(size, count - len(blocks))))
            blocks.extend(range(run.start, run.end))
            after = run.end
        return blocks

    def free(self, run: Run) -> None:
        self._check_count(run.size)
        if run.start < 0 or run.end > self.num_blocks:
            raise ArenaError(f"blocks {run.start} to {run.end - 1} are outside the arena of {self.num_blocks} blocks")
        if free := self._taken.count(0, run.start, run.end):
            first = self._taken.find(0, run.start, run.end)
            raise ArenaError(
                f"double free: of blocks {run.start} to {run.end - 1}, {free} are free already, the first is {first}"
            )
        self._taken[run.start : run.end] = bytes(run.size)
        self.num_free += run.size
        self._insert(run)

    def fragmentation(self) -> float:
        return 1.0 - self.largest_free_run / self.num_free if self.num_free else 0.0

    def block_map(self, width: int = 64) -> str:
        if width <= 0:
            raise ArenaError(f"width is {width}; must be at least 1")
        text = self._taken.translate(bytes([ord("."), ord("X")]) + bytes(254)).decode()
        return "\n".join(text[i : i + width] for i in range(0, len(text), width))

    def check(self) -> None:
        if self.num_free != self._taken.count(0):
            raise ArenaError(f"free count is {self.num_free}, but {self._taken.count(0)} blocks are not taken")

    def _check_count(self, count: int) -> None:
        if not isinstance(count, int) or isinstance(count, bool):
            raise ArenaError(f"block count is {count!r}; must be a whole number")
        if count <= 0:
            raise ArenaError(f"block count is {count}; must be at least 1")

    def _take(self, run: Run) -> Run:
        """Take blocks that are known to be free."""
        self._taken[run.start : run.end] = b"\1" * run.size
        self.num_free -= run.size
        self._remove(run)
        return run

    def _lowest(self) -> int:
        """The lowest free block; there is one."""
        node = 1
        while node < self._leaves:
            node *= 2
            if not self._tree[node]:
                node += 1
        return node - self._leaves
