"""Writing the keys and values of new tokens into arrays that the caller owns."""

from __future__ import annotations

from cortexstream.cache.arrays import Array, Library, library_of
from cortexstream.cache.checks import integer, writable
from cortexstream.errors import CacheOverflowError, CacheValueError


def update_kv_cache(cache_k: Array, cache_v: Array, new_k: Array, new_v: Array, position: int) -> int:
    """cache_k[position + i] = new_k[i] and cache_v[position + i] = new_v[i] for every new token i, in place.

    cache_k and cache_v [capacity, heads, dim] and new_k and new_v [tokens, heads, dim]: numpy, torch or MLX arrays, all
    of one library and dtype; any dim, and keys and values may have different ones. Returns the position after the last
    token written.

    Everything is checked before anything is written. Raises CacheOverflowError when position + tokens exceeds the
    capacity, CacheValueError for no tokens, a negative position, and shapes, dtypes or devices that do not go together.
    On MLX the write is part of the lazy graph, and in place if nothing else refers to the arrays when it is evaluated.
    """
    library, position = library_of("cache_k", cache_k), integer("position", position)
    _check_pair(library, "k", cache_k, new_k)
    _check_pair(library, "v", cache_v, new_v)
    capacity, tokens = int(cache_k.shape[0]), int(new_k.shape[0])
    if cache_v.shape[0] != capacity or new_v.shape[0] != tokens:
        raise CacheValueError(
            f"cache_k and cache_v hold {capacity} and {cache_v.shape[0]} tokens, new_k and new_v {tokens} and "
            f"{new_v.shape[0]}; both numbers must agree"
        )
    if tokens == 0:
        raise CacheValueError("num_tokens must be positive")
    if position < 0:
        raise CacheValueError(f"position is {position}; must be at least 0")
    end = position + tokens
    if end > capacity:
        raise CacheOverflowError(
            f"KV cache overflow: position {end} exceeds max context length {capacity} "
            f"(tried to write {tokens} tokens at position {position})"
        )
    library.write(cache_k, 0, position, new_k)
    library.write(cache_v, 0, position, new_v)
    return end


def _check_pair(library: Library, letter: str, cache: Array, new: Array) -> None:
    cache_name, new_name = f"cache_{letter}", f"new_{letter}"
    if library_of(cache_name, cache).name != library.name:
        raise CacheValueError("cache_k and cache_v are arrays of different libraries")
    writable(library, new_name, cache, new)
    if len(cache.shape) != 3 or len(new.shape) != 3 or tuple(cache.shape[1:]) != tuple(new.shape[1:]):
        raise CacheValueError(
            f"{cache_name} has shape {tuple(cache.shape)} and {new_name} {tuple(new.shape)}; "
            "must be [capacity, heads, dim] and [tokens, heads, dim]"
        )
