"""The KV arena's bookkeeping: integers, never arrays. Tensors belong to the backend."""

from cortexstream.kv.allocator import Allocator
from cortexstream.kv.arena import KVArena
from cortexstream.kv.blocks import BlockAllocator, Run
from cortexstream.kv.buddy import BuddyAllocator
from cortexstream.kv.handle import KVHandle
from cortexstream.kv.stats import ArenaStats, Ring

__all__ = ["Allocator", "ArenaStats", "BlockAllocator", "BuddyAllocator", "KVArena", "KVHandle", "Ring", "Run"]
