"""Which parts an arena is made of: pools and the cache over them, by placement and policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from cortexstream.errors import ArenaError
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


def lay_out(
    num_blocks: int, block_tokens: int, placement: Literal["run", "paged"], growth: float, policy: str,
    rings: Sequence[Ring], prefix_caching: bool, ledger: Ledger,
) -> tuple[Sequence[Pool], RunCache | PageCache]:  # fmt: skip
    """The pool of the full-attention layers, then one per ring, and the cache. Raises ArenaError for bad numbers."""
    for name, value in (("num_blocks", num_blocks), ("block_tokens", block_tokens)):
        whole(name, value)
    if block_tokens <= 0:
        raise ArenaError(f"block_tokens is {block_tokens}; must be at least 1")
    if not 1.0 <= growth < math.inf:
        raise ArenaError(f"growth is {growth}; must be at least 1, and finite")
    if placement not in ("run", "paged") or policy not in POLICIES:
        raise ArenaError(f"placement {placement!r} with policy {policy!r}: use run or paged, {' or '.join(POLICIES)}")
    pools: list[tuple[int, Allocator, int, int | None, Ledger]] = [
        (0, POLICIES[policy](num_blocks), block_tokens, None, ledger)
    ]
    for index, (window, blocks) in enumerate(rings, 1):
        if window <= 0:
            raise ArenaError(f"a ring's window is {window}; must be at least 1")
        pools.append((index, POLICIES[policy](blocks), block_tokens, ring_tokens(window, block_tokens), ledger))
    if placement == "run":
        runs = [RunPool(*pool, growth) for pool in pools]
        return runs, RunCache(runs, prefix_caching)
    pages = [PagePool(*pool) for pool in pools]
    return pages, PageCache(pages, prefix_caching)


def check_lengths(
    num_tokens: int, limit_tokens: int | None = None, tokens: Sequence[int] = (), spare_blocks: int = 0
) -> None:
    """Raise ArenaError for lengths that make no sense together."""
    whole("num_tokens", num_tokens)
    whole("spare_blocks", spare_blocks)
    if num_tokens <= 0:
        raise ArenaError(f"num_tokens is {num_tokens}; must be at least 1")
    if spare_blocks < 0:
        raise ArenaError(f"spare_blocks is {spare_blocks}; must be at least 0")
    if limit_tokens is not None:
        whole("limit_tokens", limit_tokens)
        if limit_tokens < num_tokens:
            raise ArenaError(f"limit_tokens is {limit_tokens}; must be at least num_tokens, {num_tokens}")
    if len(tokens) > num_tokens:
        raise ArenaError(f"{len(tokens)} tokens may be reused of a sequence of num_tokens, {num_tokens}")
