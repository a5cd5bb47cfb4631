"""Which parts an arena is made of: pools and the cache over them, by placement and policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from cortexstream.config import MAX_KV_BLOCKS
from cortexstream.errors import ArenaError, shown
from cortexstream.kv.allocator import Allocator
from cortexstream.kv.blocks import BlockAllocator
from cortexstream.kv.buddy import BuddyAllocator
from cortexstream.kv.handle import whole
from cortexstream.kv.page_cache import PageCache
from cortexstream.kv.page_pool import PagePool
from cortexstream.kv.pool import Ledger, Pool
from cortexstream.kv.run_cache import RunCache
from cortexstream.kv.run_pool import RunPool
from cortexstream.kv.stats import Ring
from cortexstream.plan import ring_tokens

POLICIES: dict[str, Callable[[int], Allocator]] = {"first_fit": BlockAllocator, "buddy": BuddyAllocator}


def check_options(
    num_blocks: int, block_tokens: int, placement: str, growth: float, policy: str, rings: Sequence[Ring],
    prefix_caching: bool, headroom_tokens: int,
) -> None:  # fmt: skip
    """Raise ArenaError for what no arena can be made of, such as more than MAX_KV_BLOCKS in a pool; nothing is
    allocated before."""
    whole("num_blocks", num_blocks, 0, MAX_KV_BLOCKS)
    whole("block_tokens", block_tokens, 1)
    whole("headroom_tokens", headroom_tokens, 0)
    if not isinstance(growth, (int, float)) or isinstance(growth, bool) or not 1.0 <= growth < math.inf:
        raise ArenaError(f"growth is {shown(growth)}; must be at least 1, and finite")
    if placement not in ("run", "paged") or policy not in tuple(POLICIES):
        given = f"placement {shown(placement)} with policy {shown(policy)}"
        raise ArenaError(f"{given}: use run or paged, {' or '.join(POLICIES)}")
    if not isinstance(prefix_caching, bool):
        raise ArenaError(f"prefix_caching is {shown(prefix_caching)}; must be True or False")
    if not isinstance(rings, (list, tuple)) or not all(isinstance(ring, Ring) for ring in rings):
        raise ArenaError(f"rings is {shown(rings)}; must be a list or tuple of Ring(window, num_blocks)")
    for ring in rings:
        whole("a ring's window", ring.window, 1)
        whole("a ring's num_blocks", ring.num_blocks, 0, MAX_KV_BLOCKS)


def lay_out(
    num_blocks: int, block_tokens: int, placement: Literal["run", "paged"], growth: float, policy: str,
    rings: Sequence[Ring], prefix_caching: bool, ledger: Ledger,
) -> tuple[Sequence[Pool], RunCache | PageCache]:  # fmt: skip
    """The pool of the full-attention layers, then one per ring, and the cache; `check_options` has seen the numbers."""
    pools: list[tuple[int, Allocator, int, int | None, Ledger]] = [
        (0, POLICIES[policy](num_blocks), block_tokens, None, ledger)
    ]
    for index, (window, blocks) in enumerate(rings, 1):
        pools.append((index, POLICIES[policy](blocks), block_tokens, ring_tokens(window, block_tokens), ledger))
    if placement == "run":
        runs = [RunPool(*pool, growth) for pool in pools]
        return runs, RunCache(runs, prefix_caching)
    pages = [PagePool(*pool) for pool in pools]
    return pages, PageCache(pages, prefix_caching)


def check_lengths(
    num_tokens: int, limit_tokens: int | None = None, tokens: Sequence[int] = (), spare_blocks: int = 0
) -> None:
    """Raise ArenaError for lengths that make no sense together, and for `tokens` that are none."""
    whole("num_tokens", num_tokens, 1)
    whole("spare_blocks", spare_blocks, 0)
    if limit_tokens is not None:
        whole("limit_tokens", limit_tokens)
        if limit_tokens < num_tokens:
            raise ArenaError(f"limit_tokens is {limit_tokens}; must be at least num_tokens, {num_tokens}")
    check_tokens(tokens)
    if len(tokens) > num_tokens:
        raise ArenaError(f"{len(tokens)} tokens may be reused of a sequence of num_tokens, {num_tokens}")


def check_tokens(tokens: Sequence[int]) -> None:
    """Raise ArenaError unless `tokens` is a list or tuple of ints. An array's elements, floats and bools are refused:
    they are equal to ints that they are not, or cannot be looked up. Once per admission and per published chunk, so it
    has to be quick: about 10 ns a token."""
    if not isinstance(tokens, (list, tuple)):
        raise ArenaError(f"tokens is of type {type(tokens).__name__}; must be a list or tuple of ints")
    types = list(map(type, tokens))
    if types.count(int) != len(tokens):
        index = next(i for i, kind in enumerate(types) if kind is not int)
        raise ArenaError(f"token {index} is of type {types[index].__name__}; must be an int")
