"""The KV arena's bookkeeping: integers, never arrays. Tensors belong to the backend."""

from cortexstream.kv.allocator import Allocator
from cortexstream.kv.arena import ArenaStats, KVArena, Ring
from cortexstream.kv.blocks import BlockAllocator, Run
from cortexstream.kv.buddy import BuddyAllocator
from cortexstream.kv.handle import KVHandle

__all__ = ["Allocator", "ArenaStats", "BlockAllocator", "BuddyAllocator", "KVArena", "KVHandle", "Ring", "Run"]
