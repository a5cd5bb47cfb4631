"""Prefix reuse where sequences own runs: a finished run waits for its continuation, or is copied from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from cortexstream.errors import ArenaError
from cortexstream.kv.handle import KVHandle
from cortexstream.kv.pool import Pool
from cortexstream.kv.prefix import Node, PrefixTree

SCAN = 8  # holders of one node that are looked at: the newest
GIVE_UP = 4  # times the blocks that are needed: so many idle ones go for a hole before others are moved together


class Entry:
    """A run whose tokens are known: a running sequence's, or (idle) a finished one's under a handle of our own."""

    __slots__ = ("handle", "path", "tokens")

    def __init__(self, handle: KVHandle) -> None:
        self.handle = handle
        self.tokens: tuple[int, ...] = ()
        self.path: list[Node[dict[Entry, None]]] = []


class RunCache:
    """Which runs begin with which tokens, and which of them nobody uses any more.

    An idle run whose tokens a new sequence continues is taken over as it is. Any other match is copied: that costs a
    hundredth of computing it, or less, and leaves the source to others. Idle runs are given up when their blocks are
    needed, least recently used first. With rings, a match counts only if the ring still has the window before it.
    """

    def __init__(self, pools: Sequence[Pool], enabled: bool) -> None:
        self.pools = pools
        self.enabled = enabled
        self.idle: OrderedDict[Entry, None] = OrderedDict()  # least recently used first
        self._tree: PrefixTree[dict[Entry, None]] = PrefixTree(pools[0].block_tokens)
        self._entries: dict[KVHandle, Entry] = {}
        self._idle_blocks = [0] * len(pools)

    def idle_blocks(self, pool: int) -> int:
        """Blocks of idle runs: free for whoever needs them."""
        return self._idle_blocks[pool]

    def new_blocks(self, needs: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
        """What a sequence takes out of the free and idle blocks: all of `needs`, since runs are never shared."""
        return needs

    def admit(self, handle: KVHandle, needs: Sequence[int], tokens: Sequence[int], wanted: Sequence[int]) -> None:
        """Give `handle` `wanted` blocks, with as many of `tokens` as can be had; a run that is taken over and has
        `needs` stays as it is. The blocks are there."""
        entry, length = self._match(tokens)
        if entry is not None:
            idle = entry in self.idle
            if idle and (len(entry.tokens) - length <= self._tree.chunk_tokens or not self._fits(wanted, entry)):
                self._take_over(entry, handle, needs, wanted, length)
                return
            if idle:
                self.idle.move_to_end(entry)
        self.make_room(wanted, keep=entry)
        self._claim(handle, wanted, keep=entry)
        if entry is not None:
            self._copy(entry.handle, handle, length)

    def fork(self, source: KVHandle, handle: KVHandle, needs: Sequence[int]) -> None:
        """Give `handle` a copy of what `source` has written."""
        self.make_room(needs)
        self._claim(handle, needs)
        self._copy(source, handle, source.position)

    def resize(self, handle: KVHandle, sizes: Sequence[int]) -> None:
        """Change a handle's blocks, which `make_room` made sure of."""
        for pool, size in zip(self.pools, sizes, strict=True):
            blocks = pool.claims[handle]
            extra = size - len(blocks)
            if extra > 0 and pool.allocator.free_after(blocks[-1] + 1) < extra:
                self._make_hole(pool, size)
            pool.resize(handle, size)

    def make_room(self, needs: Sequence[int], keep: Entry | None = None) -> None:
        """Give up idle runs, but not `keep`, until every pool has `needs` free blocks."""
        while any(pool.num_free < need for pool, need in zip(self.pools, needs, strict=True)):
            entry = next((e for e in self.idle if e is not keep), None)
            if entry is None:
                raise ArenaError(f"blocks {list(needs)} were promised, but {[p.num_free for p in self.pools]} are free")
            self._give_up(entry)

    def publish(self, handle: KVHandle, tokens: Sequence[int]) -> None:
        """Others may begin with what a running sequence has computed: the first `len(tokens)` of its tokens."""
        if self.enabled:
            entry = self._entries.get(handle)
            if entry is None:
                entry = self._entries[handle] = Entry(handle)
            self._extend(entry, tokens)
            handle.published_tokens = len(entry.tokens)

    def published(self, handle: KVHandle) -> tuple[int, ...]:
        """The tokens that are known of a sequence."""
        entry = self._entries.get(handle)
        return () if entry is None else entry.tokens

    def retire(self, handle: KVHandle, tokens: Sequence[int], twin: KVHandle) -> None:
        """A sequence ended with these tokens computed: keep its run under `twin`, unless another run has them, too."""
        self._withdraw(handle)
        same = self._match(tokens)
        if not self.enabled or not tokens or (same[1] == len(tokens) and len(self.pools) == 1):
            if same[0] in self.idle and same[1] == len(tokens):
                self.idle.move_to_end(same[0])  # type: ignore[arg-type]
            self._release(handle)
            return
        twin.position, twin.written, twin.shortest_reuse = len(tokens), handle.written, handle.shortest_reuse
        for index, pool in enumerate(self.pools):
            pool.transfer(handle, twin)
            self._idle_blocks[index] += len(pool.claims[twin])
        entry = self._entries[twin] = Entry(twin)
        self._extend(entry, tokens)
        self.idle[entry] = None

    def discard(self, handle: KVHandle) -> None:
        """A sequence ended, and nobody may use what it computed."""
        self._withdraw(handle)
        self._release(handle)

    def clear(self) -> None:
        """Forget every prefix; running sequences keep their blocks."""
        for entry in list(self.idle):
            self._give_up(entry)
        for handle in list(self._entries):
            self._withdraw(handle)

    def holders(self) -> Iterable[KVHandle]:
        """The handles of idle runs, least recently used first."""
        return (entry.handle for entry in self.idle)

    def cached_blocks(self) -> list[int]:
        """Idle blocks of pool 0."""
        return [block for entry in self.idle for block in self.pools[0].claims[entry.handle]]

    def check(self) -> None:
        """Entries are where their tokens lead, nodes hold nothing else, and idle blocks add up."""
        held: dict[int, set[Entry]] = {}
        for entry in self._entries.values():
            keys = [key for node in entry.path for key in node.key]
            if tuple(keys) != entry.tokens or any(entry not in (node.value or {}) for node in entry.path):
                raise ArenaError(f"the prefix index has lost {entry.handle}")
            if len(entry.tokens) > entry.handle.position:
                raise ArenaError(f"{entry.handle} is published with {len(entry.tokens)} tokens")
            for node in entry.path:
                held.setdefault(id(node), set()).add(entry)
        for node in self._tree:
            if not node.value or set(node.value) != held.get(id(node)):
                raise ArenaError("a node of the prefix index is held by nobody, or by a run that is gone")
        for index, pool in enumerate(self.pools):
            blocks = sum(len(pool.claims[e.handle]) for e in self.idle)
            if blocks != self._idle_blocks[index]:
                raise ArenaError(f"pool {index}: {self._idle_blocks[index]} idle blocks are counted, {blocks} there")
            pool.check(())

    def _match(self, tokens: Sequence[int]) -> tuple[Entry | None, int]:
        """The run that has the most of `tokens`, and how many."""
        if not self.enabled or not tokens:
            return None, 0
        path = self._tree.walk(tokens)
        last = path[-1] if path else self._tree.root
        size = self._tree.chunk_tokens
        child, common = self._tree.longest_child(last, tokens[last.depth_tokens : last.depth_tokens + size])
        candidates = [] if child is None else [(child, last.depth_tokens + common)]
        candidates += [(node, node.depth_tokens) for node in reversed(path)]
        for node, length in candidates if len(self.pools) > 1 else candidates[:1]:
            found = self._pick(node, length)
            if found is not None:
                return found, length
        return None, 0

    def _pick(self, node: Node[dict[Entry, None]], length: int) -> Entry | None:
        """Of a node's newest holders one that can be taken over, else any that has what is needed."""
        best: Entry | None = None
        for _, entry in zip(range(SCAN), reversed(node.value or {}), strict=False):
            if self._usable(entry, length):
                if entry in self.idle and len(entry.tokens) - length <= self._tree.chunk_tokens:
                    return entry
                best = best or entry
        return best

    def _usable(self, entry: Entry, length: int) -> bool:
        """Do the rings still hold the window before position `length`?"""
        return length >= entry.handle.shortest_reuse and all(
            pool.ring_tokens is None or max(0, length + 1 - pool.ring_tokens) >= entry.handle.written - pool.ring_tokens
            for pool in self.pools
        )

    def _fits(self, needs: Sequence[int], keep: Entry) -> bool:
        """Are there `needs` blocks beside the idle run `keep`?"""
        return all(
            need <= pool.num_free + self._idle_blocks[i] - len(pool.claims[keep.handle])
            for i, (pool, need) in enumerate(zip(self.pools, needs, strict=True))
        )

    def _take_over(
        self, entry: Entry, handle: KVHandle, needs: Sequence[int], wanted: Sequence[int], length: int
    ) -> None:
        self._leave_idle(entry)
        self._withdraw(entry.handle)
        sizes, extras = [], []
        for pool, need, want in zip(self.pools, needs, wanted, strict=True):
            pool.transfer(entry.handle, handle)
            have = len(pool.claims[handle])
            sizes.append(have if need <= have <= want else want)
            extras.append(max(0, sizes[-1] - have))
        self._start(handle, entry.handle, length)
        self.make_room(extras)
        self.resize(handle, sizes)

    def _claim(self, handle: KVHandle, needs: Sequence[int], keep: Entry | None = None) -> None:
        for pool, need in zip(self.pools, needs, strict=True):
            self._make_hole(pool, need, keep)
            pool.claim(handle, need)

    def _make_hole(self, pool: Pool, size: int, keep: Entry | None = None) -> None:
        """Give up idle runs for a hole of `size` blocks. Once they fill the arena nothing is adjacent any more, and
        every admission and growth would move half of it; what is given up here is the oldest, and not much of it."""
        enough = pool.num_free + GIVE_UP * size
        while pool.allocator.largest_free_run < size and pool.num_free < enough:
            entry = next((e for e in self.idle if e is not keep), None)
            if entry is None:
                return
            self._give_up(entry)

    def _copy(self, source: KVHandle, handle: KVHandle, length: int) -> None:
        for pool in self.pools:
            pool.copy(source, handle, length)
        self._start(handle, source, length)

    def _start(self, handle: KVHandle, source: KVHandle, length: int) -> None:
        """`handle` goes on behind the first `length` tokens of `source`, whose rings may have turned further."""
        handle.position = length
        wrapped = any(pool.ring_tokens is not None and source.written > pool.ring_tokens for pool in self.pools)
        handle.written = source.written if wrapped else length
        handle.shortest_reuse = source.shortest_reuse

    def _extend(self, entry: Entry, tokens: Sequence[int]) -> None:
        """Make the tree know more of an entry's tokens."""
        tree, size = self._tree, self._tree.chunk_tokens
        if entry.path and len(entry.path[-1].key) < size:
            self._leave(entry, entry.path.pop())
        node = entry.path[-1] if entry.path else tree.root
        for start in range(node.depth_tokens, len(tokens), size):
            key = tuple(tokens[start : start + size])
            child = tree.child(node, key)
            if child is None:
                child = tree.add(node, key, {})
            assert child.value is not None
            child.value[entry] = None
            entry.path.append(child)
            node = child
        entry.tokens = tuple(tokens)

    def _withdraw(self, handle: KVHandle) -> None:
        """Forget what the tree knows of a handle."""
        entry = self._entries.pop(handle, None)
        if entry is not None:
            for node in reversed(entry.path):
                self._leave(entry, node)
            handle.published_tokens = 0

    def _leave(self, entry: Entry, node: Node[dict[Entry, None]]) -> None:
        assert node.value is not None
        del node.value[entry]
        if not node.value:
            self._tree.remove(node)

    def _leave_idle(self, entry: Entry) -> None:
        del self.idle[entry]
        for index, pool in enumerate(self.pools):
            self._idle_blocks[index] -= len(pool.claims[entry.handle])

    def _give_up(self, entry: Entry) -> None:
        self._leave_idle(entry)
        self._withdraw(entry.handle)
        self._release(entry.handle)

    def _release(self, handle: KVHandle) -> None:
        for pool in self.pools:
            pool.release(handle)
