"""The logical level: which sequence owns which blocks."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv.blocks import BlockAllocator, Run
from cortexstream.kv.compaction import cheapest_window, slides
from cortexstream.kv.handle import KVHandle
from cortexstream.plan import Move

GROWTH = 1.25
"""Ratio of neighbouring capacity classes of a run. Measured on one trace (docs/log.md, "Capacity classes"): 8 % of a
run is unused on average and an output token costs 5 copied ones; 1.5 wastes 12 % and costs 3, 1.125 5 % and 9."""


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """A snapshot. `moved_tokens` counts the positions copied by growth and compaction since the start."""

    num_blocks: int
    used_blocks: int
    free_blocks: int
    largest_free_run: int
    fragmentation: float
    num_sequences: int
    used_tokens: int
    moved_tokens: int
    relocations: int
    compactions: int


class KVArena:
    """Admit, grow and release sequences over a fixed number of blocks. Thread-safe: whatever changes it, or reads more
    than one number of it, takes one lock.

    placement "paged": a sequence owns any blocks. placement "run": it owns adjacent blocks, as many as its capacity
    class has; when holes are too small the arena moves sequences together. Both admit a sequence if and only if
    `need_blocks` blocks are free in total. Moves are collected by `take_moves` and executed by the backend at the
    start of the next step; a handle's blocks are already the new ones.

    Invariants, which `check` proves:

        every taken block belongs to exactly one live handle; every handle's blocks are taken
        run: a handle's blocks are consecutive         0 <= position <= capacity_tokens, len(blocks) <= limit_blocks
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int = 16,
        placement: Literal["run", "paged"] = "run",
        growth: float = GROWTH,
    ) -> None:
        if block_tokens <= 0:
            raise ArenaError(f"block_tokens is {block_tokens}; must be at least 1")
        if growth < 1.0:
            raise ArenaError(f"growth is {growth}; must be at least 1")
        self.block_tokens = block_tokens
        self.placement = placement
        self._allocator = BlockAllocator(num_blocks)
        self._classes = _capacity_classes(num_blocks, growth) if placement == "run" else []
        self._handles: set[KVHandle] = set()
        self._moves: list[Move] = []
        self._lock = threading.RLock()
        self._moved_tokens = self._relocations = self._compactions = 0

    @property
    def num_blocks(self) -> int:
        return self._allocator.num_blocks

    @property
    def used_blocks(self) -> int:
        return self._allocator.num_used

    @property
    def free_blocks(self) -> int:
        return self._allocator.num_free

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that this arena can ever hold."""
        return self._allocator.num_blocks * self.block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens, without the rounding of capacity classes."""
        return -(-num_tokens // self.block_tokens)

    def need_blocks(self, num_tokens: int, limit_tokens: int | None = None) -> int:
        """Blocks that a sequence of `num_tokens` takes: rounded up to its capacity class in `run`, but never beyond
        what `limit_tokens` (the longest it can become) needs."""
        blocks = self.blocks_for(num_tokens)
        if self.placement == "paged" or blocks > self.num_blocks:
            return blocks
        limit = self.num_blocks if limit_tokens is None else min(self.blocks_for(limit_tokens), self.num_blocks)
        return max(blocks, min(self._classes[bisect_left(self._classes, blocks)], limit))

    def can_admit(self, num_tokens: int, limit_tokens: int | None = None) -> bool:
        """Exactly when `admit` would succeed."""
        return self.need_blocks(num_tokens, limit_tokens) <= self.free_blocks

    def admit(self, num_tokens: int, limit_tokens: int | None = None) -> KVHandle:
        """Claim room for a sequence of `num_tokens` (at least 1) that will never exceed `limit_tokens`.

        Raises ArenaFullError, changing nothing, if fewer than `need_blocks` blocks are free.
        """
        if num_tokens <= 0:
            raise ArenaError(f"num_tokens is {num_tokens}; must be at least 1")
        if limit_tokens is not None and limit_tokens < num_tokens:
            raise ArenaError(f"limit_tokens is {limit_tokens}; must be at least num_tokens, {num_tokens}")
        with self._lock:
            need = self.need_blocks(num_tokens, limit_tokens)
            if need > self.free_blocks:
                raise ArenaFullError(
                    f"{num_tokens} tokens need {need} blocks of {self.block_tokens}; "
                    f"{self.free_blocks} of {self.num_blocks} are free"
                )
            limit = self.num_blocks if limit_tokens is None else self.blocks_for(limit_tokens)
            if self.placement == "paged":
                blocks = tuple(self._allocator.allocate_any(need))
            else:
                blocks = _blocks(self._hole(need))
            handle = KVHandle(blocks, self.block_tokens, self.placement == "run", limit)
            self._handles.add(handle)
            return handle

    def grow(self, handle: KVHandle, num_tokens: int) -> None:
        """Make room for `num_tokens` in all: in place, else by moving this sequence, else by moving others.

        Raises ArenaFullError, changing nothing, when free blocks are missing or the sequence's limit is reached.
        """
        with self._lock:
            self._check_owned(handle)
            if num_tokens <= handle.capacity_tokens:
                return
            if self.blocks_for(num_tokens) > handle.limit_blocks:
                raise ArenaFullError(
                    f"{num_tokens} tokens exceed this sequence's limit of "
                    f"{handle.limit_blocks * self.block_tokens} tokens"
                )
            target = self.need_blocks(num_tokens, handle.limit_blocks * self.block_tokens)
            if target - len(handle.blocks) > self.free_blocks:
                target = self.blocks_for(num_tokens)  # better a tight fit than a preemption
            extra = target - len(handle.blocks)
            if extra > self.free_blocks:
                raise ArenaFullError(
                    f"{extra} more blocks are needed, {self.free_blocks} of {self.num_blocks} are free"
                )
            if self.placement == "paged":
                handle.place(handle.blocks + tuple(self._allocator.allocate_any(extra, after=handle.blocks[-1] + 1)))
            else:
                self._grow_run(handle, target)

    def release(self, handle: KVHandle) -> None:
        """Free a sequence's blocks; the handle is dead. Raises ArenaError for a dead or foreign handle."""
        with self._lock:
            self._check_owned(handle)
            self._handles.remove(handle)
            handle.live = False
            for run in _runs(handle.blocks):
                self._allocator.free(run)

    def take_moves(self) -> tuple[Move, ...]:
        """The moves planned since the last call, in the order in which they must be executed."""
        with self._lock:
            moves, self._moves = tuple(self._moves), []
            return moves

    def fragmentation(self) -> float:
        """1 - largest free run / free blocks."""
        with self._lock:
            return self._allocator.fragmentation()

    def stats(self) -> ArenaStats:
        """A snapshot of sizes and counters."""
        with self._lock:
            return ArenaStats(
                self.num_blocks, self.used_blocks, self.free_blocks, self._allocator.largest_free_run,
                self._allocator.fragmentation(), len(self._handles), sum(h.position for h in self._handles),
                self._moved_tokens, self._relocations, self._compactions,
            )  # fmt: skip

    def describe(self) -> str:
        """Configuration, state and block map as text, for people."""
        with self._lock:
            stats = self.stats()
            sequences = sorted(self._handles, key=lambda h: h.blocks)
            return "\n".join([
                f"configuration: {self.num_blocks} blocks of {self.block_tokens} tokens, placement {self.placement}",
                f"state: {stats.used_blocks} used, {stats.free_blocks} free, fragmentation {stats.fragmentation:.2f}",
                f"sequences: {len(sequences)}",
                *(f"  {h.position}/{h.capacity_tokens} tokens, blocks [{h.blocks[0]}, +{len(h.blocks)}]" for h in
                sequences), "blocks ('X' used, '.' free):", self._allocator.block_map(),
            ])  # fmt: skip

    def check(self) -> None:
        """Prove the invariants of the class docstring; raises ArenaError on the first that fails. O(num_blocks)."""
        with self._lock:
            self._allocator.check()
            owned: set[int] = set()
            for handle in self._handles:
                if not handle.live or not 0 <= handle.position <= handle.capacity_tokens:
                    raise ArenaError(f"{handle} is dead or over-full")
                if len(handle.blocks) > handle.limit_blocks:
                    raise ArenaError(f"{handle} has more blocks than its limit {handle.limit_blocks}")
                if self.placement == "run" and handle.blocks != _blocks(Run(handle.blocks[0], len(handle.blocks))):
                    raise ArenaError(f"{handle} is not contiguous: {handle.blocks}")
                if not owned.isdisjoint(handle.blocks) or len(set(handle.blocks)) != len(handle.blocks):
                    raise ArenaError(f"{handle} shares a block with another sequence or with itself")
                owned.update(handle.blocks)
            taken = {i for i, c in enumerate(self._allocator.block_map(width=self.num_blocks or 1)) if c == "X"}
            if owned != taken:
                raise ArenaError(f"blocks {sorted(owned ^ taken)[:8]} are taken without an owner, or owned but free")

    def _check_owned(self, handle: KVHandle) -> None:
        if not handle.live:
            raise ArenaError("stale handle: the sequence was released already")
        if handle not in self._handles:
            raise ArenaError("foreign handle: it belongs to another arena")

    def _grow_run(self, handle: KVHandle, target: int) -> None:
        old = Run(handle.blocks[0], len(handle.blocks))
        extra = target - old.size
        if self._allocator.take(Run(old.end, extra)):
            new = Run(old.start, target)
        elif self._allocator.largest_free_run >= target:
            new = self._allocator.allocate(target)
            self._allocator.free(old)
            self._relocations += 1
        else:
            old = self._gather_after(handle, extra)
            if not self._allocator.take(Run(old.end, extra)):
                raise ArenaError(f"compaction left no {extra} free blocks after block {old.end - 1}")
            new = Run(old.start, target)
        self._move(handle, old, new)

    def _hole(self, size: int) -> Run:
        """A free run of `size` blocks, taken; sequences are moved together if no hole is large enough."""
        if self._allocator.largest_free_run < size:
            runs = self._sorted_runs()
            gaps = _gaps(runs, self.num_blocks)
            first, last = cheapest_window(gaps, [r.size for r in runs], size)
            self._slide(runs, slides(gaps, runs, first, last, pivot=last))
            self._compactions += 1
        return self._allocator.allocate(size)

    def _gather_after(self, handle: KVHandle, extra: int) -> Run:
        """Slide sequences so that `extra` free blocks follow this one's; returns where it now lies."""
        runs = self._sorted_runs()
        gaps = _gaps(runs, self.num_blocks)
        own = runs.index(Run(handle.blocks[0], len(handle.blocks)))
        first, last = cheapest_window(gaps, [r.size for r in runs], extra, around=own)
        self._slide(runs, slides(gaps, runs, first, last, pivot=own + 1))
        self._compactions += 1
        return Run(handle.blocks[0], len(handle.blocks))

    def _slide(self, runs: list[Run], moves: list[tuple[int, int]]) -> None:
        """Move runs (index, new start), in an order in which no move overwrites a run that is still to move."""
        owner = {h.blocks[0]: h for h in self._handles}
        handles = [owner[run.start] for run in runs]
        for index, _ in moves:
            self._allocator.free(runs[index])
        for index, start in moves:
            target = Run(start, runs[index].size)
            if not self._allocator.take(target):
                raise ArenaError(f"compaction planned a move onto blocks {start} to {target.end - 1}, which are taken")
            self._move(handles[index], runs[index], target)

    def _move(self, handle: KVHandle, old: Run, new: Run) -> None:
        handle.place(_blocks(new))
        if handle.position:
            self._moves.append(Move(old.start, old.size, new.start, new.size, handle.position))
            self._moved_tokens += handle.position

    def _sorted_runs(self) -> list[Run]:
        return sorted(Run(h.blocks[0], len(h.blocks)) for h in self._handles)


def _capacity_classes(num_blocks: int, growth: float) -> list[int]:
    """1, 2, 3, ... growing by the factor, rounded up; the last is the whole arena."""
    sizes = [1]
    while sizes[-1] < num_blocks:
        sizes.append(min(num_blocks, max(sizes[-1] + 1, int(sizes[-1] * growth))))
    return sizes


def _blocks(run: Run) -> tuple[int, ...]:
    return tuple(range(run.start, run.end))


def _runs(blocks: tuple[int, ...]) -> list[Run]:
    """Adjacent blocks joined into runs, so that a run is freed in one operation."""
    runs: list[Run] = []
    for block in blocks:
        if runs and block == runs[-1].end:
            runs[-1] = Run(runs[-1].start, runs[-1].size + 1)
        else:
            runs.append(Run(block, 1))
    return runs


def _gaps(runs: list[Run], num_blocks: int) -> list[int]:
    """Free blocks before each run, and after the last: len(runs) + 1 numbers."""
    ends = [0, *(r.end for r in runs)]
    starts = [*(r.start for r in runs), num_blocks]
    return [start - end for end, start in zip(ends, starts, strict=True)]
