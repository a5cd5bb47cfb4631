"""Key-value caches to use on their own, without engine and arena, on numpy, torch or MLX arrays.

`KVCache` holds one sequence up to a fixed length and refuses what does not fit; `RingCache` holds the latest tokens of
each batch entry for ever; `update_kv_cache` writes into arrays that the caller owns; `MemoryTracker` says who holds how
many bytes. Only numpy is imported here: torch or mlx.core is passed in as `namespace`.
"""

from cortexstream.cache.arrays import address_of
from cortexstream.cache.kv_cache import KVCache, KVCacheConfig
from cortexstream.cache.ring import RingCache, RingMetrics, RingState, RingView
from cortexstream.cache.tracker import Allocation, MemoryTracker, Purpose
from cortexstream.cache.update import update_kv_cache

__all__ = [
    "Allocation",
    "KVCache",
    "KVCacheConfig",
    "MemoryTracker",
    "Purpose",
    "RingCache",
    "RingMetrics",
    "RingState",
    "RingView",
    "address_of",
    "update_kv_cache",
]
