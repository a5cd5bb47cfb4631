"""Prefix reuse where sequences own pages: blocks with known contents are shared."""

from __future__ import annotations

from collections.abc import Sequence

from cortexstream.errors import ArenaError
from cortexstream.kv.handle import KVHandle
from cortexstream.kv.page_pool import PagePool
from cortexstream.kv.prefix import Node, PrefixTree, common_prefix

NONE = -1  # no block


class PageCache:
    """Which block holds which tokens behind which others.

    A node of the tree is a full block. A new sequence holds the blocks of its prefix together with others; of the block
    in which its tokens part from theirs it copies the common beginning. Blocks without references are given up least
    recently used first, and of one sequence the last ones first, so what is left of a prefix is always its beginning.
    With rings there is no reuse: a ring that has turned cannot be shared.
    """

    def __init__(self, pools: Sequence[PagePool], enabled: bool) -> None:
        self.pools = pools
        self.enabled = enabled and len(pools) == 1
        self._pool = pools[0]
        self._tree: PrefixTree[int] = PrefixTree(self._pool.block_tokens)
        self._node_of: dict[int, Node[int]] = {}  # block -> its node
        # Full block (or NONE) -> running sequence whose next block is partial -> the tokens in that.
        self._ends: dict[int, dict[KVHandle, tuple[int, ...]]] = {}
        self._end_of: dict[KVHandle, int] = {}  # running sequence -> where its entry in `_ends` is

    def idle_blocks(self, pool: int) -> int:
        """Cached blocks without references: free for whoever needs them."""
        return len(self.pools[pool].idle)

    def new_blocks(self, needs: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
        """What a sequence takes out of the free and idle blocks: shared ones in use by others cost nothing."""
        if not self.enabled:
            return needs
        shared = sum(self._pool.references[block] > 0 for block in self._match(tokens)[: needs[0]])
        return [needs[0] - shared, *needs[1:]]

    def admit(self, handle: KVHandle, needs: Sequence[int], tokens: Sequence[int], wanted: Sequence[int]) -> None:
        """Give `handle` `needs` blocks, with as many of `tokens` as can be had; pages are never given beforehand, so
        `wanted` is the same. The blocks are there."""
        blocks = self._match(tokens) if self.enabled else []
        length = len(blocks) * self._tree.chunk_tokens
        source, common = self._match_end(blocks, tokens[length : length + self._tree.chunk_tokens])
        self._pool.share(handle, blocks)
        self.make_room([needs[0] - len(blocks), *needs[1:]])
        self._pool.resize(handle, needs[0])
        for pool, need in zip(self.pools[1:], needs[1:], strict=True):
            pool.claim(handle, need)
        if common:
            # The source may have been given up just now; its contents are there until a later step writes it.
            self._pool.copy_block(source, self._pool.claims[handle][len(blocks)], common)
        handle.position = handle.written = length + common
        handle.published_tokens = handle.shared_tokens = length

    def fork(self, source: KVHandle, handle: KVHandle, needs: Sequence[int]) -> None:
        """Let `handle` hold the written blocks of `source`, too: each copies a partial one before it writes to it."""
        self.make_room([0, *needs[1:]])
        self._pool.share(handle, self._pool.claims[source][: self._pool.blocks_for(source.position)])
        for pool, need in zip(self.pools[1:], needs[1:], strict=True):  # rings are written all over: copied at once
            pool.claim(handle, need)
            pool.copy(source, handle, source.position)
        handle.position, handle.written = source.position, source.written
        handle.published_tokens = source.published_tokens
        source.shared_tokens = handle.shared_tokens = source.position
        source.shares = handle.shares = source.position % self._pool.block_tokens > 0

    def resize(self, handle: KVHandle, sizes: Sequence[int]) -> None:
        """Change a handle's blocks, which `make_room` made sure of."""
        for pool, size in zip(self.pools, sizes, strict=True):
            pool.resize(handle, size)

    def make_room(self, needs: Sequence[int]) -> None:
        """Give up idle blocks until every pool has `needs` free ones."""
        while self._pool.num_free < needs[0] and self._pool.idle:
            self._give_up(next(iter(self._pool.idle)))
        if any(pool.num_free < need for pool, need in zip(self.pools, needs, strict=True)):
            raise ArenaError(f"blocks {list(needs)} were promised, but {[p.num_free for p in self.pools]} are free")

    def publish(self, handle: KVHandle, tokens: Sequence[int]) -> None:
        """Others may begin with what a running sequence has computed: the first `len(tokens)` of its tokens.

        Where another sequence's block already holds the same tokens, that one is held instead, and one's own is freed.
        """
        if not self.enabled:
            return
        self._forget_end(handle)
        tree, size = self._tree, self._tree.chunk_tokens
        first = handle.published_tokens // size
        node = tree.root if not first else self._node_of.get(self._pool.claims[handle][first - 1])
        if node is None:  # its blocks were forgotten meanwhile
            node, first = tree.root, 0
        for index in range(first, len(tokens) // size):
            key = tuple(tokens[index * size : (index + 1) * size])
            child = tree.child(node, key)
            block = self._pool.claims[handle][index]
            if child is None:
                child = tree.add(node, key, block)
                self._node_of[block] = child
                self._pool.cached.add(block)
            elif child.value is not None and child.value != block:
                self._pool.replace(handle, index, child.value)
            node = child
        full = len(tokens) // size
        handle.published_tokens = full * size
        handle.shared_tokens = max(handle.shared_tokens, len(tokens))
        if len(tokens) % size:
            before = NONE if node.value is None else node.value
            self._ends.setdefault(before, {})[handle] = tuple(tokens[full * size :])
            self._end_of[handle] = before

    def published(self, handle: KVHandle) -> tuple[int, ...]:
        """The tokens that are known of a sequence, those in a partial block left out."""
        count = handle.published_tokens // self._tree.chunk_tokens
        node = self._node_of.get(self._pool.claims[handle][count - 1]) if count else None
        keys = []
        while node is not None:
            keys.append(node.key)
            node = node.parent
        return tuple(token for key in reversed(keys) for token in key)

    def retire(self, handle: KVHandle, tokens: Sequence[int], twin: KVHandle) -> None:
        """A sequence ended with these tokens computed: its full blocks are kept. `twin` is not needed here."""
        self.publish(handle, tokens[: len(tokens) // self._tree.chunk_tokens * self._tree.chunk_tokens])
        self.discard(handle)

    def discard(self, handle: KVHandle) -> None:
        """A sequence ended; what it published stays known."""
        self._forget_end(handle)
        for pool in self.pools:
            pool.release(handle)

    def clear(self) -> None:
        """Forget every prefix; running sequences keep their blocks."""
        for block in list(self._node_of):
            self._pool.forget(block)
        for handle in [*self._pool.claims]:
            handle.published_tokens = 0
        self._tree = PrefixTree(self._pool.block_tokens)
        self._node_of.clear()
        self._ends.clear()
        self._end_of.clear()

    def holders(self) -> Sequence[KVHandle]:
        """Nobody: pages are kept without a handle."""
        return ()

    def cached_blocks(self) -> list[int]:
        """Idle blocks of pool 0."""
        return list(self._pool.idle)

    def check(self) -> None:
        """Every node has a block of its own, who has published a block holds those before it, nobody will write a block
        that others hold or may find, and no partial block is known whose sequence is gone."""
        nodes = list(self._tree)
        if sorted(n.value for n in nodes if n.value is not None) != sorted(self._node_of) or any(
            self._node_of.get(n.value) is not n for n in nodes if n.value is not None
        ):
            raise ArenaError("the prefix index and its blocks do not match")
        for handle, blocks in self._pool.claims.items():
            node = self._tree.root
            for block in blocks[: handle.published_tokens // self._tree.chunk_tokens]:
                child = self._node_of.get(block)
                if child is None or child.parent is not node:
                    raise ArenaError(f"{handle} has published block {block}, which is not known behind what it holds")
                node = child
            if not handle.shares and self._pool.shared(handle, len(blocks) * self._pool.block_tokens):
                raise ArenaError(f"{handle} may write a block that others hold or may find")
        ends = {handle: before for before, ends in self._ends.items() for handle in ends}
        if ends != self._end_of or not ends.keys() <= self._pool.claims.keys():
            raise ArenaError("a partial block is known whose sequence is gone")
        for pool in self.pools:
            pool.check(list(self._node_of) if pool is self._pool else ())

    def _match(self, tokens: Sequence[int]) -> list[int]:
        """The blocks of the full chunks that are known."""
        return [node.value for node in self._tree.walk(tokens) if node.value is not None]

    def _match_end(self, blocks: Sequence[int], rest: Sequence[int]) -> tuple[int, int]:
        """Behind `blocks`, the block that begins with the most of `rest`, and with how many tokens."""
        if not self.enabled or not rest:
            return NONE, 0
        node = self._node_of[blocks[-1]] if blocks else self._tree.root
        child, best = self._tree.longest_child(node, rest)
        source = NONE if child is None or child.value is None else child.value
        for handle, tokens in self._ends.get(blocks[-1] if blocks else NONE, {}).items():
            common = common_prefix(tokens, rest)
            if common > best:
                source, best = self._pool.claims[handle][len(blocks)], common
        return source, best

    def _forget_end(self, handle: KVHandle) -> None:
        before = self._end_of.pop(handle, None)
        if before is not None:
            del self._ends[before][handle]
            if not self._ends[before]:
                del self._ends[before]

    def _give_up(self, block: int) -> None:
        """Forget an idle block, and what is known behind it: forks may hold that without having published it."""
        for node in reversed([*self._tree.below(self._node_of[block])]):
            assert node.value is not None
            del self._node_of[node.value]
            self._pool.forget(node.value)
            self._tree.remove(node)
