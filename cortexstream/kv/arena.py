"""The logical level: which sequence owns which blocks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv.handle import KVHandle, whole
from cortexstream.kv.layout import check_lengths, check_options, check_tokens, lay_out
from cortexstream.kv.page_pool import PagePool
from cortexstream.kv.pool import Ledger
from cortexstream.kv.prefix import check_same
from cortexstream.kv.snapshot import ArenaSnapshot, as_text, take_pools
from cortexstream.kv.stats import ArenaStats, Ring
from cortexstream.plan import KVRows, MemoryOp, SwapDrop, SwapIn, SwapOut

GROWTH = 1.25
"""Ratio of neighbouring capacity classes of a run. Measured on one trace (docs/log.md, "Capacity classes"): 8 % of a
run is unused on average and an output token costs 5 copied ones; 1.5 wastes 12 % and costs 3, 1.125 5 % and 9."""

SMALL_PART = 4  # headroom may take one in so many of the blocks that are free


class KVArena:
    """Admit, grow and release sequences over a fixed number of blocks. Thread-safe: whatever changes it, or reads more
    than one number of it, takes one lock.

    placement "paged": a sequence owns any blocks, and may share them. placement "run": it owns adjacent blocks, as many
    as its capacity class has; when holes are too small the arena moves sequences together. Both admit a sequence if and
    only if the blocks that it needs are not in use by others; prefixes kept for reuse give way. With `rings`, layers
    with a sliding window keep the window alone, in a pool of their own per window.

    Copies are collected by `take_moves` and executed by the backend at the start of the next step; a handle's blocks
    are already the new ones. `policy` "first_fit" takes the lowest hole, "buddy" aligned pieces. A run gets room for
    `headroom_tokens` more than it needs while that is a small part of what is free.

    Invariants, which `check` proves:

        every taken block is held by a live handle, or kept for its known contents; every held block is taken
        run: a handle's blocks are consecutive, and nobody else's
        paged: a block has as many references as handles hold it; nobody writes a block that others hold or may find
        0 <= position <= capacity_tokens, len(blocks) <= limit_blocks
        what the prefix index knows is written, and of any prefix it knows the beginning
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int = 16,
        placement: Literal["run", "paged"] = "run",
        growth: float = GROWTH,
        *,
        policy: Literal["first_fit", "buddy"] = "first_fit",
        rings: Sequence[Ring] = (),
        prefix_caching: bool = True,
        headroom_tokens: int = 0,
    ) -> None:
        check_options(num_blocks, block_tokens, placement, growth, policy, rings, prefix_caching, headroom_tokens)
        self.block_tokens = block_tokens
        self.placement = placement
        self.rings = tuple(rings)
        self._headroom_tokens = headroom_tokens if placement == "run" else 0
        self._ledger = Ledger(1 + len(self.rings))
        self._pools, self._cache = lay_out(
            num_blocks, block_tokens, placement, growth, policy, self.rings, prefix_caching, self._ledger
        )
        self._full = self._pools[0]
        self._handles: set[KVHandle] = set()
        self._reused_tokens = 0
        self._swapped: dict[int, tuple[int, int, int]] = {}  # key -> what a handle must know of its tokens on the host
        self.changes = 0  # goes up whenever a sequence that could not be admitted might be
        self._lock = threading.RLock()

    @property
    def num_blocks(self) -> int:
        return self._full.num_blocks

    @property
    def used_blocks(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - self.free_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that a sequence can get: those that hold nothing, and those kept for reuse alone."""
        with self._lock:
            return self._full.num_free + self._cache.idle_blocks(0)

    @property
    def prefix_caching(self) -> bool:
        """Whether prefixes are kept and found."""
        return self._cache.enabled

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that this arena can ever hold."""
        slots = [(pool.num_blocks * self.block_tokens, pool.ring_tokens) for pool in self._pools]
        return min(held for held, ring in slots if ring is None or held < ring)

    def need_blocks(self, num_tokens: int, limit_tokens: int | None = None) -> int:
        """Blocks that a sequence of `num_tokens` takes: rounded up to its capacity class in `run`, but never beyond
        what `limit_tokens` (the longest it can become) needs. Refuses the same arguments as `admit`."""
        check_lengths(num_tokens, limit_tokens)
        return self._full.need(num_tokens, limit_tokens)

    def can_admit(self, num_tokens: int, limit_tokens: int | None = None, tokens: Sequence[int] = ()) -> bool:
        """Whether `admit` would succeed now; refuses the same arguments."""
        needs = self._needs(num_tokens, limit_tokens, tokens)
        with self._lock:
            return self._missing(needs, tokens) is None

    def admit(
        self, num_tokens: int, limit_tokens: int | None = None, tokens: Sequence[int] = (), spare_blocks: int = 0
    ) -> KVHandle:
        """Claim room for a sequence of `num_tokens` (at least 1) that will never exceed `limit_tokens`.

        `tokens` are those of its first tokens that need not be computed if some other sequence has; `position` of the
        handle then says how many were found. `spare_blocks` must be left for the growth of those that run. Raises
        ArenaFullError, changing nothing, if blocks are missing.
        """
        needs = self._needs(num_tokens, limit_tokens, tokens, spare_blocks)
        with self._lock:
            missing = self._missing(needs, tokens, spare_blocks)
            if missing is not None:
                raise ArenaFullError(f"{num_tokens} tokens need {missing}")
            handle = self._new_handle(self.num_blocks if limit_tokens is None else self._full.blocks_for(limit_tokens))
            wanted = [self._roomy(i, 0, need, num_tokens, limit_tokens) for i, need in enumerate(needs)]
            self._cache.admit(handle, needs, tokens, wanted)
            self._reused_tokens += handle.position
            self._place()
            return handle

    def fork(self, handle: KVHandle) -> KVHandle:
        """A second sequence that goes on from where this one is, with the same limit.

        In `paged` both hold the same blocks until one writes (copy on write, in `grow`); in `run` what is written is
        copied. Raises ArenaFullError, changing nothing, if blocks are missing.
        """
        with self._lock:
            self._check_owned(handle)
            needs = [len(pool.claims[handle]) for pool in self._pools]
            if self.placement == "paged":
                needs[0] = 0
            missing = self._missing(needs)
            if missing is not None:
                raise ArenaFullError(f"a fork of {handle.position} tokens needs {missing}")
            forked = self._new_handle(handle.limit_blocks)
            self._cache.fork(handle, forked, needs)
            self._place()
            return forked

    def grow(self, handle: KVHandle, num_tokens: int) -> None:
        """Make room for `num_tokens` in all, which this sequence alone may write from its position on.

        In place, else by moving this sequence, else by moving others; kept prefixes give way where blocks are missing.
        Raises ArenaFullError, changing nothing, when blocks in use are missing or the sequence's limit is reached.
        """
        check_lengths(num_tokens)
        with self._lock:
            self._check_owned(handle)
            if num_tokens <= (handle.position if handle.shares else handle.capacity_tokens):
                return
            if self._full.blocks_for(num_tokens) > handle.limit_blocks:
                raise ArenaFullError(
                    f"{num_tokens} tokens exceed this sequence's limit of "
                    f"{handle.limit_blocks * self.block_tokens} tokens"
                )
            shared = self._full.shared(handle, num_tokens) if isinstance(self._full, PagePool) else []
            targets = [self._target(index, handle, num_tokens) for index in range(len(self._pools))]
            extras = [
                max(0, target - len(pool.claims[handle])) for pool, target in zip(self._pools, targets, strict=True)
            ]
            extras[0] += len(shared)
            missing = self._missing(extras)
            if missing is not None:
                raise ArenaFullError(f"growing to {num_tokens} tokens needs {missing}")
            self._cache.make_room(extras)
            if isinstance(self._full, PagePool):
                self._full.separate(handle, shared)
            handle.shares = False
            self._cache.resize(handle, targets)
            self._place()

    def publish(self, handle: KVHandle, tokens: Sequence[int]) -> None:
        """The sequence's first tokens are these, and computed: new sequences may begin with them."""
        with self._lock:
            self._check_owned(handle)
            check_tokens(tokens)
            if len(tokens) > handle.position:
                raise ArenaError(f"{len(tokens)} tokens cannot be published: {handle.position} are written")
            check_same(self._cache.published(handle), tuple(tokens))
            if len(tokens) > handle.published_tokens:
                self.changes += 1
                self._cache.publish(handle, tokens)
                self._place()

    def release(self, handle: KVHandle, tokens: Sequence[int] = ()) -> None:
        """Free a sequence's blocks; the handle is dead. `tokens`, if given, are the first ones that it has computed:
        their keys and values are kept as long as nobody needs the blocks. Raises ArenaError for a dead or foreign
        handle."""
        with self._lock:
            self._check_owned(handle)
            check_tokens(tokens)
            if len(tokens) > handle.position:
                raise ArenaError(f"{len(tokens)} tokens cannot be kept: {handle.position} are written")
            check_same(self._cache.published(handle), tuple(tokens))
            if tokens and self._cache.enabled:
                self._cache.retire(handle, tokens, KVHandle(self.block_tokens, handle.limit_blocks))
            else:
                self._cache.discard(handle)
            self._handles.remove(handle)
            handle.live = False
            self.changes += 1
            self._place()

    def clear(self) -> None:
        """Forget every kept and known prefix, as after a failed step; sequences keep their blocks."""
        with self._lock:
            self._cache.clear()
            self.changes += 1

    def lose(self) -> None:
        """After a failed step nothing that was computed can be trusted: forget prefixes, contents in host memory, and
        the copies that were planned. Sequences keep their blocks."""
        with self._lock:
            self.clear()
            self._swapped.clear()
            self._ledger.take()

    def swap_out(self, handle: KVHandle, key: int) -> None:
        """Plan to keep the sequence's contents in host memory, and release it."""
        with self._lock:
            self._check_owned(handle)
            whole("key", key)
            if not handle.position:
                raise ArenaError("0 tokens are written: there are no contents to keep")
            if key in self._swapped:
                raise ArenaError(f"{self._swapped[key][0]} tokens are kept under {key} already")
            self._ledger.add(SwapOut(key, handle.rows, handle.position))
            self._swapped[key] = handle.position, handle.written, handle.shortest_reuse
            self.release(handle)

    def swap_in(self, handle: KVHandle, key: int, num_tokens: int) -> None:
        """Plan to bring contents back into a handle that was admitted for more than `num_tokens`."""
        with self._lock:
            self._check_owned(handle)
            whole("key", key)
            if handle.position:
                raise ArenaError(f"{handle.position} tokens are written already; contents come back into an empty one")
            kept, written, shortest_reuse = self._swapped.get(key, (0, 0, 0))
            if num_tokens != kept:
                raise ArenaError(f"{kept} tokens are kept under {key}, not {num_tokens}")
            handle.advance(num_tokens)
            handle.written, handle.shortest_reuse = written, shortest_reuse
            del self._swapped[key]
            self._ledger.add(SwapIn(key, handle.rows, num_tokens))

    def swap_drop(self, key: int) -> None:
        """Plan to forget contents that are in host memory."""
        whole("key", key)
        with self._lock:
            if self._swapped.pop(key, None) is None:
                raise ArenaError(f"0 tokens are kept under {key}")
            self._ledger.add(SwapDrop(key))

    def take_moves(self) -> tuple[MemoryOp, ...]:
        """The copies planned since the last call, in the order in which they must be executed."""
        with self._lock:
            return self._ledger.take()

    def fragmentation(self) -> float:
        """1 - largest free run / free blocks, of the blocks that hold nothing."""
        with self._lock:
            return self._full.allocator.fragmentation()

    def stats(self) -> ArenaStats:
        """A snapshot of sizes and counters."""
        with self._lock:
            ledger, allocator = self._ledger, self._full.allocator
            return ArenaStats(
                num_blocks=self.num_blocks, used_blocks=self.used_blocks, free_blocks=self.free_blocks,
                cached_blocks=self._cache.idle_blocks(0), largest_free_run=allocator.largest_free_run,
                fragmentation=allocator.fragmentation(), num_sequences=len(self._handles),
                used_tokens=sum(h.position for h in self._handles), moved_tokens=sum(ledger.moved_tokens),
                copied_tokens=sum(ledger.copied_tokens), reused_tokens=self._reused_tokens,
                relocations=ledger.relocations, compactions=ledger.compactions,
                moved_by_pool=tuple(ledger.moved_tokens), copied_by_pool=tuple(ledger.copied_tokens),
            )  # fmt: skip

    def block_map(self, width: int = 64) -> str:
        """One character a block of the full-attention layers: 'X' in use, 'o' kept for reuse, '.' free."""
        whole("width", width, 1)
        with self._lock:
            cells = list(self._full.allocator.block_map(width=self.num_blocks or 1))
            for block in self._cache.cached_blocks():
                cells[block] = "o"
        return "\n".join("".join(cells[i : i + width]) for i in range(0, len(cells), width))

    def owners(self) -> list[tuple[KVHandle, tuple[int, ...]]]:
        """Every sequence's handle and its blocks, in order of place."""
        with self._lock:
            return sorted(((h, h.blocks) for h in self._handles), key=lambda pair: pair[1])

    def describe(self) -> str:
        """Configuration, state and block map as text, for people."""
        with self._lock:
            return as_text(self.snapshot(), self.block_map())

    def snapshot(self) -> ArenaSnapshot:
        """Who holds which blocks of every pool now, and `stats`, as one value."""
        with self._lock:
            pools = take_pools(self._pools, self._handles, self._cache.cached_blocks(), [*self._cache.holders()])
            return ArenaSnapshot(self.block_tokens, self.placement, pools, self.stats())

    def check(self) -> None:
        """Prove the invariants of the class docstring; raises ArenaError on the first that fails. O(num_blocks)."""
        with self._lock:
            for handle in self._handles:
                if not handle.live or not 0 <= handle.position <= handle.capacity_tokens:
                    raise ArenaError(f"{handle} is dead or over-full")
                if len(handle.blocks) > handle.limit_blocks:
                    raise ArenaError(f"{handle} has more blocks than its limit {handle.limit_blocks}")
                shown = [handle.blocks, *(ring.blocks for ring in handle.rows.rings)]
                if shown != [pool.claims.get(handle) for pool in self._pools]:
                    raise ArenaError(f"{handle} shows other blocks than it holds")
            held = set(self._full.claims) - self._handles
            if not self._handles <= set(self._full.claims) or held != set(self._cache.holders()):
                raise ArenaError("blocks are held by nobody who is known, or a sequence holds none")
            self._cache.check()

    def _needs(
        self, num_tokens: int, limit_tokens: int | None, tokens: Sequence[int], spare_blocks: int = 0
    ) -> list[int]:
        check_lengths(num_tokens, limit_tokens, tokens, spare_blocks)
        return [pool.need(num_tokens, limit_tokens) for pool in self._pools]

    def _missing(self, needs: Sequence[int], tokens: Sequence[int] = (), spare_blocks: int = 0) -> str | None:
        """None if so many blocks can be had, and of the first pool as many be left, else what is missing, in words."""
        for index, blocks in enumerate(self._cache.new_blocks(needs, tokens)):
            pool = self._pools[index]
            free = pool.num_free + self._cache.idle_blocks(index)
            spare = 0 if index else spare_blocks  # a ring that is whole never grows
            if blocks + spare > free:
                of = f", and {spare} to spare" if spare else ""
                if pool.ring_tokens is not None:
                    of = f" of the ring of {pool.ring_tokens} tokens"
                return f"{blocks} blocks of {self.block_tokens}{of}; {free} of {pool.num_blocks} are free"
        return None

    def _target(self, index: int, handle: KVHandle, num_tokens: int) -> int:
        """Blocks to grow to in one pool: the capacity class, or what is needed where that is not to be had."""
        pool = self._pools[index]
        have = len(pool.claims[handle])
        if num_tokens <= handle.capacity_tokens:
            return have
        target = max(pool.need(num_tokens, handle.limit_blocks * self.block_tokens), have)
        if target - have > pool.num_free + self._cache.idle_blocks(index):
            return max(pool.blocks_for(num_tokens), have)  # better a tight fit than a preemption
        return self._roomy(index, have, target, num_tokens, handle.limit_blocks * self.block_tokens)

    def _roomy(self, index: int, have: int, target: int, num_tokens: int, limit_tokens: int | None) -> int:
        """`target` blocks, or those for `headroom_tokens` more tokens if that takes a small part of what is free: a run
        that does not outgrow its blocks is never copied."""
        if not self._headroom_tokens:
            return target
        pool, roomy = self._pools[index], num_tokens + self._headroom_tokens
        blocks = pool.need(roomy if limit_tokens is None else min(roomy, limit_tokens), limit_tokens)
        free = pool.num_free + self._cache.idle_blocks(index)
        return max(target, blocks) if SMALL_PART * (blocks - have) <= free else target

    def _new_handle(self, limit_blocks: int) -> KVHandle:
        handle = KVHandle(self.block_tokens, limit_blocks)
        self._handles.add(handle)
        return handle

    def _place(self) -> None:
        """Show every handle whose blocks changed its new ones."""
        contiguous = self.placement == "run"
        for handle in self._ledger.changed:
            if handle not in self._full.claims:
                continue  # it was given up within the same call
            rings = tuple([KVRows(pool.claims[handle], contiguous) for pool in self._pools[1:]])
            capacities = [pool.capacity_tokens(handle) for pool in self._pools]
            handle.place(
                KVRows(self._full.claims[handle], contiguous, rings), min(c for c in capacities if c is not None)
            )
        self._ledger.changed.clear()

    def _check_owned(self, handle: KVHandle) -> None:
        if not isinstance(handle, KVHandle):
            raise ArenaError(f"{handle!r} is no handle")
        handle.check_live()
        if handle not in self._handles:
            raise ArenaError(f"foreign handle: it belongs to another arena than this of {self.num_blocks} blocks")
