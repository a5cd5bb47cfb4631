"""The KV arena's bookkeeping: integers, never arrays. Tensors belong to the backend."""

from cortexstream.kv.arena import ArenaStats, KVArena
from cortexstream.kv.blocks import BlockAllocator, Run
from cortexstream.kv.buddy import BuddyAllocator
from cortexstream.kv.handle import KVHandle

__all__ = ["ArenaStats", "BlockAllocator", "BuddyAllocator", "KVArena", "KVHandle", "Run"]
