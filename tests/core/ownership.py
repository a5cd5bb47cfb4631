"""Who holds which block: books kept beside an arena over long random runs, and compared after every operation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import takewhile

import pytest

from cortexstream.errors import ArenaFullError
from cortexstream.kv import KVArena, KVHandle, Ring
from cortexstream.plan import KVRows, Move, ring_tokens
from tests.core.contents import Policy
from tests.core.support import Placement

BLOCK = 4
GROWTH = 1.25
DOCUMENTS = [tuple(1000 * number + i for i in range(96)) for number in range(8)]
"""What sequences consist of: no two begin alike, so a beginning is a document and a length."""


class Books:
    """For every live handle the document it writes and the blocks it holds, for every block how many hold it.

    Sequences of one document begin alike. `known` has, for paged placement, a document's blocks that the arena must
    find; for runs, `idle` has the finished sequences that it keeps, with document and length.
    """

    def __init__(
        self, num_blocks: int, placement: Placement, policy: Policy, rings: Sequence[Ring], caching: bool,
        headroom_tokens: int,
    ) -> None:  # fmt: skip
        self.arena = KVArena(
            num_blocks, BLOCK, placement, GROWTH, policy=policy, rings=rings, prefix_caching=caching,
            headroom_tokens=headroom_tokens,
        )  # fmt: skip
        self.exact = not headroom_tokens or placement == "paged"
        self.paged, self.caching, self.rings = placement == "paged", self.arena.prefix_caching, len(rings)
        self.sizes = [num_blocks, *(ring.num_blocks for ring in rings)]
        self.ring_slots = [ring_tokens(ring.window, BLOCK) for ring in rings]
        self.classes = [_classes(size) for size in self.sizes]
        self.holders = [[0] * size for size in self.sizes]
        self.used = [0] * len(self.sizes)  # blocks with holders
        self.document: dict[KVHandle, int] = {}
        self.rows: dict[KVHandle, KVRows] = {}
        self.published: dict[KVHandle, int] = {}
        self.idle: dict[KVHandle, tuple[int, int]] = {}
        self.known: list[list[int]] = [[] for _ in DOCUMENTS]
        self.refusals = 0
        self.refused: tuple[int, list[int], int, int] | None = None  # the last: changes, needs, document, reuse

    def admit(self, document: int, num_tokens: int, limit: int | None, reuse: int) -> None:
        tokens, arena = DOCUMENTS[document][:reuse], self.arena
        needs = [self._need(pool, num_tokens, limit) for pool in range(len(self.sizes))]
        fits = self._fits(needs, document, reuse)
        assert arena.can_admit(num_tokens, limit, tokens) == fits
        if not fits:
            self._refuse(lambda: arena.admit(num_tokens, limit, tokens))
            self.refused = arena.changes, needs, document, reuse
            return
        expected = self._found(document, reuse)
        free, shared = arena._full.num_free, self.known[document][: expected // BLOCK] if self.paged else []
        handle = arena.admit(num_tokens, limit, tokens)
        got = [len(blocks) for blocks in _blocks(handle.rows)]
        assert got == needs if self.exact else all(have >= need for have, need in zip(got, needs, strict=True))
        assert handle.position <= expected if self.rings else handle.position == expected
        assert handle.blocks[: len(shared)] == tuple(shared)
        self.document[handle], self.published[handle] = document, len(shared) * BLOCK
        self._given_out(handle.blocks[len(shared) :], free)
        self.settle()

    def grow(self, handle: KVHandle, num_tokens: int) -> None:
        arena = self.arena
        writes = handle.shares and num_tokens > handle.position
        rows = [handle.rows, *handle.rows.rings]
        extras = [max(0, self._blocks(pool, num_tokens) - len(row.blocks)) for pool, row in enumerate(rows)]
        if writes:
            extras[0] += self.holders[0][handle.blocks[handle.position // BLOCK]] > 1
        inside = num_tokens <= handle.capacity_tokens and not writes
        if not inside and (self._blocks(0, num_tokens) > handle.limit_blocks or not self._free(extras)):
            self._refuse(lambda: arena.grow(handle, num_tokens))
            return
        before, free = set(handle.blocks), arena._full.num_free
        arena.grow(handle, num_tokens)
        assert handle.capacity_tokens >= num_tokens and len(handle.blocks) <= handle.limit_blocks
        self._given_out([block for block in handle.blocks if block not in before] if self.paged else [], free)
        self.settle()

    def fork(self, handle: KVHandle) -> None:
        needs = [len(row.blocks) for row in (handle.rows, *handle.rows.rings)]
        if self.paged:
            needs[0] = 0
        if not self._free(needs):
            self._refuse(lambda: self.arena.fork(handle))
            return
        forked = self.arena.fork(handle)
        if self.paged:
            assert forked.blocks == handle.blocks[: self._blocks(0, handle.position)]
        self.document[forked] = self.document[handle]
        self.published[forked] = self.published[handle] // BLOCK * BLOCK if self.paged else 0
        self.settle()

    def publish(self, handle: KVHandle) -> None:
        document, length = self.document[handle], handle.position
        self.arena.publish(handle, DOCUMENTS[document][:length])
        if self.caching:
            self.published[handle] = max(length, self.published[handle])
            self._learn(handle.blocks, document, length)
            if self.paged:
                assert list(handle.blocks[: length // BLOCK]) == self.known[document][: length // BLOCK]
        self.settle()

    def release(self, handle: KVHandle, length: int) -> None:
        document = self.document[handle]
        if self.caching and self.paged:
            self._learn(handle.blocks, document, length)
        self.arena.release(handle, DOCUMENTS[document][:length])
        self._gone(handle)
        known = max([*self._lengths(document), 0])
        kept = self.caching and not self.paged and length > 0 and (self.rings or known < length)
        if kept:
            new = next(holder for holder in self.arena._cache.holders() if holder not in self.idle)
            self.idle[new] = document, length
        self.settle()

    def swap_out(self, handle: KVHandle, key: int) -> None:
        self.arena.swap_out(handle, key)
        self.arena.swap_drop(key)
        self._gone(handle)
        self.settle()

    def clear(self) -> None:
        self.arena.clear()
        self.known = [[] for _ in DOCUMENTS]
        self.published = dict.fromkeys(self.published, 0)
        self.settle()

    def settle(self) -> None:
        """After an operation: what moved is where the moves say, what was given up is nobody's, and counts agree."""
        arena = self.arena
        moves = [op for op in arena.take_moves() if isinstance(op, Move)]
        if not self.paged:
            for holder in self.idle.keys() - set(arena._cache.holders()):
                del self.idle[holder], self.rows[holder]
        for handle in [*self.document, *self.idle]:
            if self.rows.get(handle) is not handle.rows:
                self._hold(handle, moves)
        idle = arena._cache.idle_blocks(0)
        if not self.paged:
            assert idle == sum(len(holder.blocks) for holder in self.idle)
        elif idle != sum(not self.holders[0][block] for blocks in self.known for block in blocks):
            cells = arena.block_map(self.sizes[0])  # a fork's blocks stayed when those before them were given up
            self.known = [[*takewhile(lambda block: cells[block] != ".", blocks)] for blocks in self.known]
        assert (arena.used_blocks, arena.free_blocks) == (self.used[0], self.sizes[0] - self.used[0])
        if self.refused is not None and self.refused[0] == arena.changes:
            assert not self._fits(*self.refused[1:]), "room was made, and `changes` does not tell"

    def check(self) -> None:
        """The whole bitmap of every pool."""
        arena = self.arena
        arena.check()
        for pool, holders in enumerate(self.holders):
            assert max(holders) <= 1 or (self.paged and pool == 0)
            marks = [".X"[count > 0] for count in holders]
            kept = [block for holder in self.idle for block in _blocks(self.rows[holder])[pool]]
            if self.paged and pool == 0:
                kept = [block for blocks in self.known for block in blocks if not holders[block]]
                assert arena._pools[0].references == holders  # type: ignore[attr-defined]
            for block in kept:
                assert marks[block] == "."
                marks[block] = "o"
            if pool == 0:
                assert arena.block_map(len(marks)) == "".join(marks)
            taken = "".join(marks).replace("o", "X")
            assert arena._pools[pool].allocator.block_map(len(marks)) == taken
        assert dict(arena.owners()) == {handle: handle.blocks for handle in self.document}

    def _hold(self, handle: KVHandle, moves: list[Move]) -> None:
        """A handle shows other blocks than before. A run got there by moves, unless it is empty."""
        before, now = _blocks(self.rows[handle]) if handle in self.rows else [], _blocks(handle.rows)
        for pool, blocks in enumerate(now):
            old = before[pool] if before else ()
            if not self.paged and old and handle.position and blocks != old:
                places = {(old[0], len(old))}
                for move in moves:
                    if move.pool == pool and (move.source, move.source_blocks) in places:
                        places.add((move.target, move.target_blocks))
                assert (blocks[0], len(blocks)) in places and blocks == (*range(blocks[0], blocks[0] + len(blocks)),)
            if handle in self.document:
                self._count(pool, old, -1)
                self._count(pool, blocks, 1)
        self.rows[handle] = handle.rows

    def _count(self, pool: int, blocks: Sequence[int], step: int) -> None:
        holders, empty = self.holders[pool], 0 if step > 0 else 1
        for block in blocks:
            self.used[pool] += step * (holders[block] == empty)
            holders[block] += step

    def _gone(self, handle: KVHandle) -> None:
        for pool, blocks in enumerate(_blocks(self.rows.pop(handle))):
            self._count(pool, blocks, -1)
        del self.document[handle], self.published[handle]

    def _given_out(self, blocks: Sequence[int], free: int) -> None:
        """New blocks of a handle: what the arena knew of them, and behind them, is not known any more. Only as many as
        were missing may be taken from what is known."""
        taken = 0
        for block in blocks:
            for known in self.known:
                if block in known:
                    assert not self.holders[0][block], f"block {block} was in use"
                    del known[known.index(block) :]
                    taken = 1
        assert not taken or len(blocks) > free

    def _learn(self, blocks: Sequence[int], document: int, length: int) -> None:
        known = self.known[document]
        if self.paged:
            known += blocks[len(known) : length // BLOCK]

    def _found(self, document: int, reuse: int) -> int:
        """Tokens of a document that an admission finds; with rings at most so many."""
        if not self.caching:
            return 0
        if not self.paged:
            return max((min(length, reuse) for length in self._lengths(document)), default=0)
        full = min(len(self.known[document]), reuse // BLOCK)
        start, rest = full * BLOCK, min(reuse - full * BLOCK, BLOCK)
        ends = [n - start for h, n in self.published.items() if self.document[h] == document and n // BLOCK == full]
        return start + min(rest, max([*ends, BLOCK if len(self.known[document]) > full else 0]))

    def _lengths(self, document: int) -> list[int]:
        """What is known of a document, in tokens, by whom ever."""
        running = [n for handle, n in self.published.items() if self.document[handle] == document]
        return running + [n for number, n in self.idle.values() if number == document]

    def _need(self, pool: int, num_tokens: int, limit: int | None) -> int:
        blocks = self._blocks(pool, num_tokens)
        if self.paged or blocks > self.sizes[pool]:
            return blocks
        most = self.sizes[pool] if limit is None else min(self.sizes[pool], self._blocks(pool, limit))
        if pool:
            most = min(most, self.ring_slots[pool - 1] // BLOCK)
        return max(blocks, min(next(size for size in self.classes[pool] if size >= blocks), most))

    def _blocks(self, pool: int, num_tokens: int) -> int:
        return -(-(min(num_tokens, self.ring_slots[pool - 1]) if pool else num_tokens) // BLOCK)

    def _fits(self, needs: list[int], document: int, reuse: int) -> bool:
        """Are so many blocks not in use? One that is shared while in use costs nothing."""
        shared = sum(self.holders[0][block] > 0 for block in self.known[document][: reuse // BLOCK])
        return self._free([needs[0] - shared, *needs[1:]])

    def _free(self, needs: list[int]) -> bool:
        return all(need <= size - used for need, size, used in zip(needs, self.sizes, self.used, strict=True))

    def _refuse(self, call: Callable[[], object]) -> None:
        self.refusals += 1
        arena = self.arena
        before = arena.stats(), arena.owners(), arena.block_map(), arena.changes
        with pytest.raises(ArenaFullError):
            call()
        assert (arena.stats(), arena.owners(), arena.block_map(), arena.changes) == before
        assert arena.take_moves() == ()


def drive(books: Books, rng: random.Random, operations: int) -> None:
    """Random calls: as many begin like others as do not, and one in ten asks for more than there is."""
    live: list[KVHandle] = []
    capacity = books.arena.capacity_tokens
    for number in range(operations):
        action = rng.random()
        if action < 0.26 or not live:
            num_tokens = rng.randint(1, min(96, capacity // rng.choice((1, 4, 8))))
            limit = rng.choice((None, num_tokens, num_tokens + rng.randint(0, 40)))
            books.admit(rng.randrange(8), num_tokens, limit, rng.choice((0, num_tokens, rng.randint(0, num_tokens))))
        elif action < 0.60:
            handle = rng.choice(live)
            if handle.shares or not handle.remaining or action < 0.36:
                books.grow(handle, min(96, handle.position + rng.randint(1, 12)))
            elif handle.position < 96:
                handle.advance(rng.randint(1, min(handle.remaining, 96 - handle.position, 9)))
        elif action < 0.72:
            books.publish(rng.choice(live))
        elif action < 0.77:
            books.fork(rng.choice(live))
        elif action < 0.97 or number % 8:
            handle = rng.choice(live)
            books.release(handle, rng.choice((0, handle.position, rng.randint(0, handle.position))))
        elif number % 16 and (handle := rng.choice(live)).position:
            books.swap_out(handle, number)
        elif number % 16 == 0:
            books.clear()
        live = [*books.document]
        if number % 200 == 0:
            books.check()
    books.check()


def _blocks(rows: KVRows) -> list[tuple[int, ...]]:
    return [rows.blocks, *(ring.blocks for ring in rows.rings)]


def _classes(num_blocks: int) -> list[int]:
    """Capacity classes: 1, 2, 3, ... growing by the factor, rounded down, and the whole pool."""
    sizes = [1]
    while sizes[-1] < num_blocks:
        sizes.append(min(num_blocks, max(sizes[-1] + 1, int(sizes[-1] * GROWTH))))
    return sizes
