"""Placement "paged": a handle holds any blocks, and several handles may share one."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from cortexstream.errors import ArenaError
from cortexstream.kv.allocator import Allocator, Run
from cortexstream.kv.handle import KVHandle
from cortexstream.kv.pool import Ledger, Pool
from cortexstream.plan import Move


class PagePool(Pool):
    """Blocks with reference counts. A new block is the one behind the sequence's last if that is free, else the lowest.

    `cached` names the blocks whose contents the prefix index knows: nobody writes them again, and when the last
    reference goes they are kept, in `idle`, until the index gives them up.
    """

    def __init__(
        self, index: int, allocator: Allocator, block_tokens: int, ring_tokens: int | None, ledger: Ledger
    ) -> None:
        super().__init__(index, allocator, block_tokens, ring_tokens, ledger)
        self.references = [0] * allocator.num_blocks
        self.cached: set[int] = set()
        self.idle: OrderedDict[int, None] = OrderedDict()  # cached and without references, least recently used first

    def need(self, num_tokens: int, limit_tokens: int | None) -> int:
        return self.blocks_for(num_tokens)

    def claim(self, handle: KVHandle, size: int) -> None:
        self.assign(handle, tuple(self._allocate(size, 0)))

    def resize(self, handle: KVHandle, size: int) -> None:
        blocks = self.claims[handle]
        if size < len(blocks):
            raise ArenaError(f"{handle} has {len(blocks)} blocks; a block table never shrinks to {size}")
        if size > len(blocks):
            after = blocks[-1] + 1 if blocks else 0
            self.assign(handle, blocks + tuple(self._allocate(size - len(blocks), after)))

    def share(self, handle: KVHandle, blocks: Sequence[int]) -> None:
        """Give a handle blocks that others hold, or that are idle, as its first ones."""
        for block in blocks:
            self.references[block] += 1
            self.idle.pop(block, None)
        self.assign(handle, tuple(blocks))

    def shared(self, handle: KVHandle, num_tokens: int) -> list[int]:
        """Indices of the blocks that hold a handle's positions from `position` to `num_tokens` and must be copied
        before it writes them."""
        blocks = self.claims[handle]
        window = range(handle.position // self.block_tokens, min(len(blocks), self.blocks_for(num_tokens)))
        return [i for i in window if self.references[blocks[i]] > 1 or blocks[i] in self.cached]

    def separate(self, handle: KVHandle, indices: Sequence[int]) -> None:
        """Copy on write: replace these blocks by new ones with the same contents up to `position`."""
        blocks = list(self.claims[handle])
        for index, new in zip(indices, self._allocate(len(indices), 0) if indices else [], strict=True):
            used = min(handle.position - index * self.block_tokens, self.block_tokens)
            if used > 0:
                self.ledger.copy(Move(blocks[index], 1, new, 1, used, self.index))
            self._drop(blocks[index])
            blocks[index] = new
        self.assign(handle, tuple(blocks))

    def replace(self, handle: KVHandle, index: int, block: int) -> None:
        """Hold `block`, which has the same contents, in place of one's own."""
        blocks = self.claims[handle]
        self.references[block] += 1
        self.idle.pop(block, None)
        self._drop(blocks[index])
        self.assign(handle, (*blocks[:index], block, *blocks[index + 1 :]))

    def copy(self, source: KVHandle, target: KVHandle, num_tokens: int) -> None:
        self._copy(self.claims[source], self.claims[target], self.slots(num_tokens))

    def copy_block(self, source: int, target: int, num_tokens: int) -> None:
        """Plan to copy the first `num_tokens` slots of one block."""
        self.ledger.copy(Move(source, 1, target, 1, num_tokens, self.index))

    def release(self, handle: KVHandle) -> None:
        freed = []
        for block in reversed(self.claims.pop(handle)):  # so that of one sequence the end is given up first
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self.cached:
                    self.idle[block] = None
                else:
                    freed.append(block)
        for run in _runs(sorted(freed)):
            self.allocator.free(run)

    def forget(self, block: int) -> None:
        """The index gives a block up."""
        self.cached.discard(block)
        if block in self.idle:
            del self.idle[block]
            self.allocator.free(Run(block, 1))

    def check(self, cached: Sequence[int]) -> None:
        counts = Counter(block for blocks in self.claims.values() for block in blocks)
        for handle, blocks in self.claims.items():
            if len(set(blocks)) != len(blocks):
                raise ArenaError(f"pool {self.index}: {handle} holds a block twice: {blocks}")
        for block, references in enumerate(self.references):
            if references != counts[block]:
                raise ArenaError(f"pool {self.index}: block {block} counts {references} holders, has {counts[block]}")
        if self.cached != set(cached):
            raise ArenaError(f"pool {self.index}: cached blocks differ from the index's: {self.cached ^ set(cached)}")
        if self.idle.keys() != {block for block in cached if not counts[block]}:
            raise ArenaError(f"pool {self.index}: idle blocks are {sorted(self.idle)[:8]} ..., which does not fit")
        self._check_taken(set(counts) | self.cached)

    def _allocate(self, count: int, after: int) -> list[int]:
        blocks = self.allocator.allocate_any(count, after) if count else []
        for block in blocks:
            self.references[block] = 1
        return blocks

    def _drop(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block] == 0:
            if block in self.cached:
                self.idle[block] = None
            else:
                self.allocator.free(Run(block, 1))

    def _copy(self, source: Sequence[int], target: Sequence[int], slots: int) -> None:
        for old, new in zip(source, target, strict=False):
            used = min(slots, self.block_tokens)
            if used <= 0:
                return
            self.copy_block(old, new, used)
            slots -= used


def _runs(blocks: Sequence[int]) -> list[Run]:
    """Ascending blocks joined into runs, so that a run is freed in one operation."""
    runs: list[Run] = []
    for block in blocks:
        if runs and block == runs[-1].end:
            runs[-1] = Run(runs[-1].start, runs[-1].size + 1)
        else:
            runs.append(Run(block, 1))
    return runs
