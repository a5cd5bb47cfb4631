"""The arena at one moment, as a value: who holds which blocks of which pool."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cortexstream.kv.handle import KVHandle
from cortexstream.kv.pool import Pool
from cortexstream.kv.stats import ArenaStats


class OwnerSnapshot(NamedTuple):
    """What one sequence holds in one pool."""

    label: str  # its number in order of place, from 1; the same in every pool of a snapshot
    blocks: tuple[int, ...]  # in order of position; in paged placement others may hold some of them, too
    filled_tokens: int  # slots that hold keys and values: the first ones of `blocks`


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """The blocks of one kind of layer."""

    num_blocks: int
    ring_tokens: int | None  # slots of a full ring; None: the pool of the full-attention layers
    owners: tuple[OwnerSnapshot, ...]  # in order of place in the first pool
    cached: tuple[int, ...]  # blocks that hold prefixes which nobody uses now, ascending


@dataclass(frozen=True, slots=True)
class ArenaSnapshot:
    """All pools, the full-attention layers' first. Later changes of the arena leave it alone."""

    block_tokens: int
    placement: str
    pools: tuple[PoolSnapshot, ...]
    stats: ArenaStats


def take_pools(
    pools: Sequence[Pool], handles: Collection[KVHandle], cached: Iterable[int], holders: Collection[KVHandle]
) -> tuple[PoolSnapshot, ...]:
    """The pools as values; the arena's lock must be held.

    `handles` are the sequences', `cached` the idle blocks of the first pool, `holders` the handles under which idle
    runs are kept in all pools.
    """
    order = sorted(handles, key=lambda handle: ([pool.claims[handle] for pool in pools], handle.position))
    taken = []
    for pool in pools:
        kept = cached if pool.index == 0 else [block for handle in holders for block in pool.claims[handle]]
        owners = [
            OwnerSnapshot(str(number), pool.claims[handle], pool.slots(handle.position))
            for number, handle in enumerate(order, 1)
        ]
        taken.append(PoolSnapshot(pool.num_blocks, pool.ring_tokens, tuple(owners), tuple(sorted(kept))))
    return tuple(taken)


def as_text(snapshot: ArenaSnapshot, block_map: str) -> str:
    """Configuration, state, sequences and block map, a line each."""
    stats, tokens = snapshot.stats, snapshot.block_tokens
    full, *rings = snapshot.pools
    lines = [
        f"configuration: {full.num_blocks} blocks of {tokens} tokens, placement {snapshot.placement}",
        f"state: {stats.used_blocks} used, {stats.free_blocks} free, fragmentation {stats.fragmentation:.2f}",
    ]
    for ring in rings:
        taken = len({block for owner in ring.owners for block in owner.blocks} | {*ring.cached})
        lines.append(f"rings of {ring.ring_tokens} tokens: {taken} of {ring.num_blocks} blocks")
    lines.append(f"sequences: {len(full.owners)}")
    for owner in full.owners:
        first = owner.blocks[0] if owner.blocks else "-"
        lines.append(
            f"  {owner.filled_tokens}/{len(owner.blocks) * tokens} tokens, blocks [{first}, +{len(owner.blocks)}]"
        )
    return "\n".join([*lines, "blocks ('X' used, 'o' kept for reuse, '.' free):", block_map])
