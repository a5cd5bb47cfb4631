"""What an arena must say to the next call, found by searching: who gets in, what is reused, which blocks are whose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cortexstream.kv import KVArena, KVHandle
from cortexstream.plan import ring_tokens

Tokens = tuple[int, ...]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def claimed(handle: KVHandle) -> list[tuple[int, ...]]:
    """Blocks per pool, as a handle shows them."""
    return [handle.blocks, *(ring.blocks for ring in handle.rows.rings)]


class ArenaOracle:
    """Told of every success, asked before every call. `live` are the handles, with what they have published."""

    def __init__(self, arena: KVArena, growth: float) -> None:
        self.arena = arena
        self.block_tokens = arena.block_tokens
        self.growth = growth
        self.paged = arena.placement == "paged"
        self.sizes = [arena.num_blocks, *(ring.num_blocks for ring in arena.rings)]
        self.ring_slots = [None, *(ring_tokens(ring.window, arena.block_tokens) for ring in arena.rings)]
        self.caching = arena.prefix_caching
        self.live: dict[KVHandle, Tokens] = {}
        self.idle: dict[KVHandle, Tokens] = {}  # run: the arena's own handles -> tokens
        self.index: dict[Tokens, int] = {}  # paged: tokens up to a full block's end -> that block
        self.sharing: set[KVHandle] = set()  # paged: forked inside of a block

    def in_use(self, pool: int) -> Counter[int]:
        """Live holders of each block."""
        return Counter(block for handle in self.live for block in claimed(handle)[pool])

    def available(self, pool: int) -> int:
        return self.sizes[pool] - len(self.in_use(pool))

    def blocks_for(self, pool: int, num_tokens: int) -> int:
        slots = self.ring_slots[pool]
        return -(-(num_tokens if slots is None else min(num_tokens, slots)) // self.block_tokens)

    def need(self, pool: int, num_tokens: int, limit: int | None) -> int:
        """In `run` the next capacity class, but no more than the pool, the limit or the whole ring has."""
        blocks, size = self.blocks_for(pool, num_tokens), 1
        if self.paged or blocks > self.sizes[pool]:
            return blocks
        while size < blocks:
            size = max(size + 1, int(size * self.growth))
        most = self.sizes[pool] if limit is None else min(self.sizes[pool], self.blocks_for(pool, limit))
        slots = self.ring_slots[pool]
        if slots is not None:
            most = min(most, slots // self.block_tokens)
        return max(blocks, min(size, most))

    def chain(self, tokens: Tokens) -> list[int]:
        """Known full blocks that tokens begin with."""
        blocks: list[int] = []
        end = self.block_tokens
        while end <= len(tokens) and tokens[:end] in self.index:
            blocks.append(self.index[tokens[:end]])
            end += self.block_tokens
        return blocks

    def found(self, tokens: Tokens) -> tuple[int, int]:
        """The fewest and the most tokens that an admission must find now."""
        if not self.caching:
            return 0, 0
        if self.paged:
            start = len(self.chain(tokens)) * self.block_tokens
            known = [*self.index, *(t for t in self.live.values() if len(t) % self.block_tokens)]
            ends = [common(t, tokens) for t in known if 0 < len(t) - start <= self.block_tokens]
            length = max([start, *ends])
            return length, length
        entries = {**{h: t for h, t in self.live.items() if t}, **self.idle}
        most = max((common(known, tokens) for known in entries.values()), default=0)
        if len(self.sizes) == 1:
            return most, most
        if len(entries) > 8:
            return 0, most
        turned = [any(slots is not None and h.written > slots for slots in self.ring_slots) for h in entries]
        whole = [
            common(known, tokens) // self.block_tokens * self.block_tokens
            for known, gone in zip(entries.values(), turned, strict=True)
            if not gone
        ]
        return max(whole, default=0), most

    def can_admit(self, num_tokens: int, limit: int | None, tokens: Tokens, spare: int = 0) -> bool:
        needs = [self.need(pool, num_tokens, limit) for pool in range(len(self.sizes))]
        held = self.in_use(0)
        if self.caching and self.paged:
            needs[0] -= sum(block in held for block in self.chain(tokens))
        needs[0] += spare
        return all(need <= self.available(pool) for pool, need in enumerate(needs))

    def can_grow(self, handle: KVHandle, num_tokens: int) -> bool:
        writes = handle in self.sharing and num_tokens > handle.position
        if num_tokens <= handle.capacity_tokens and not writes:
            return True
        if self.blocks_for(0, num_tokens) > handle.limit_blocks:
            return False
        extras = [
            max(0, self.blocks_for(pool, num_tokens) - len(blocks)) for pool, blocks in enumerate(claimed(handle))
        ]
        if writes:
            extras[0] += self.in_use(0)[handle.blocks[handle.position // self.block_tokens]] > 1
        return all(extra <= self.available(pool) for pool, extra in enumerate(extras))

    def can_fork(self, handle: KVHandle) -> bool:
        needs = [len(blocks) for blocks in claimed(handle)]
        if self.paged:
            needs[0] = 0
        return all(need <= self.available(pool) for pool, need in enumerate(needs))

    def admitted(self, handle: KVHandle, tokens: Tokens) -> None:
        shared = self.chain(tokens) if self.caching and self.paged else []
        assert handle.blocks[: len(shared)] == tuple(shared)
        self._taken(set(handle.blocks[len(shared) :]))
        self.live[handle] = tokens[: len(shared) * self.block_tokens]
        self.settle()

    def grown(self, handle: KVHandle, before: Tokens, num_tokens: int) -> None:
        self._taken(set(handle.blocks) - set(before))
        if num_tokens > handle.position:
            self.sharing.discard(handle)
        self.settle()

    def forked(self, handle: KVHandle, source: KVHandle) -> None:
        published = self.live[source] if self.paged else ()
        self.live[handle] = published[: len(published) // self.block_tokens * self.block_tokens]
        if self.paged:
            held = self.blocks_for(0, source.position)
            assert handle.blocks == source.blocks[:held]
            if source.position % self.block_tokens:
                self.sharing |= {handle, source}
        self.settle()

    def published(self, handle: KVHandle, tokens: Tokens) -> None:
        known = self.live[handle]
        if self.caching and len(tokens) > (
            len(known) // self.block_tokens * self.block_tokens if self.paged else len(known)
        ):
            self.live[handle] = tokens
            self._learn(handle.blocks, tokens)
            if self.paged:
                assert list(handle.blocks[: len(tokens) // self.block_tokens]) == self.chain(tokens)
        self.settle()

    def releasing(self, handle: KVHandle, tokens: Tokens) -> bool:
        """Before the release: will the run be kept?"""
        self.sharing.discard(handle)
        del self.live[handle]
        if self.paged and self.caching:
            self._learn(handle.blocks, tokens)
        known = any(common(t, tokens) == len(tokens) for t in [*self.live.values(), *self.idle.values()])
        return not self.paged and self.caching and len(tokens) > 0 and (len(self.sizes) > 1 or not known)

    def released(self, kept: bool, tokens: Tokens) -> None:
        new = [handle for handle in self.arena._cache.holders() if handle not in self.idle]
        assert len(new) == kept
        for handle in new:
            self.idle[handle] = tokens
            assert handle.position == len(tokens)
        self.settle()

    def cleared(self) -> None:
        self.live = dict.fromkeys(self.live, ())
        self.index = {}
        self.settle()
        assert not self.idle

    def settle(self) -> None:
        """Forget what was given up, and compare the maps."""
        cells = self.arena.block_map(width=self.sizes[0] or 1)
        used = self.in_use(0)
        assert {i for i, cell in enumerate(cells) if cell == "X"} == set(used)
        kept = {i for i, cell in enumerate(cells) if cell == "o"}
        if self.paged:
            for prefix in sorted(self.index, key=len):
                parent = prefix[: -self.block_tokens]
                if cells[self.index[prefix]] == "." or (parent and parent not in self.index):
                    del self.index[prefix]
            assert kept == {block for block in self.index.values() if block not in used}
            references = self.arena._pools[0].references  # type: ignore[attr-defined]
            assert references == [used[block] for block in range(self.sizes[0])]
        else:
            assert not used or max(used.values()) == 1
            holders = set(self.arena._cache.holders())
            assert holders <= set(self.idle)
            self.idle = {handle: tokens for handle, tokens in self.idle.items() if handle in holders}
            assert sum(len(handle.blocks) for handle in holders) == len(kept)
            for handle in [*self.live, *holders]:
                assert all(list(b) == list(range(b[0], b[0] + len(b))) for b in claimed(handle))
        for pool in range(1, len(self.sizes)):
            assert max(self.in_use(pool).values(), default=1) == 1
        stats = self.arena.stats()
        assert (stats.used_blocks, stats.cached_blocks) == (len(used), len(kept))
        assert stats.free_blocks == self.arena.free_blocks == self.available(0) and stats.num_sequences == len(
            self.live
        )

    def _taken(self, blocks: set[int]) -> None:
        """Blocks that were given out: what they held is not known any more."""
        self.index = {prefix: block for prefix, block in self.index.items() if block not in blocks}

    def _learn(self, blocks: Tokens, tokens: Tokens) -> None:
        if self.paged:
            for index in range(len(tokens) // self.block_tokens):
                self.index.setdefault(tokens[: (index + 1) * self.block_tokens], blocks[index])
