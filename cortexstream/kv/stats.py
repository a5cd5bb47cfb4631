"""What an arena is made of and what it counted: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Ring(NamedTuple):
    """The layers of one window: of every sequence they keep the last `window` tokens, in `num_blocks` blocks."""

    window: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """A snapshot. Blocks are those of the full-attention layers; the copies are summed over all pools."""

    num_blocks: int
    used_blocks: int  # held by sequences
    cached_blocks: int  # hold prefixes that nobody uses now; they are given up when needed
    free_blocks: int  # num_blocks - used_blocks: what a sequence can get
    largest_free_run: int  # of the blocks that hold nothing
    fragmentation: float
    num_sequences: int
    used_tokens: int
    moved_tokens: int  # copied by growth and compaction since the start
    copied_tokens: int  # copied by prefix hits and forks
    reused_tokens: int  # not computed, because another sequence had computed them
    relocations: int
    compactions: int
    moved_by_pool: tuple[int, ...] = ()
    copied_by_pool: tuple[int, ...] = ()
