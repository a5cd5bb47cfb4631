"""Keys and values of one sequence, up to a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

import numpy as np

from cortexstream.cache.arrays import ITEM_BYTES, Array, library
from cortexstream.cache.checks import integer
from cortexstream.cache.tracker import MemoryTracker, Purpose
from cortexstream.cache.update import update_kv_cache
from cortexstream.errors import ArenaError, CacheIndexError, CacheMemoryError, CacheOverflowError, CacheValueError


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """The size of a cache; `num_kv_heads` and not the query's heads, `max_context_length` in tokens.

    Raises CacheValueError for a number that is not positive, and for a dtype other than float16, bfloat16 and float32.
    """

    num_layers: int
    max_context_length: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float16"

    def __post_init__(self) -> None:
        for name in ("num_layers", "max_context_length", "num_kv_heads", "head_dim"):
            if integer(name, getattr(self, name)) <= 0:
                raise CacheValueError(f"{name} must be positive")
        if self.dtype not in tuple(ITEM_BYTES):  # a dict would want to hash it
            raise CacheValueError(f"dtype is {self.dtype!r}; must be one of {', '.join(ITEM_BYTES)}")


class KVCache:
    """One sequence's keys and values in every layer, allocated and zeroed once, written in place ever after.

    A forward pass writes its tokens in each layer with `update`, and then counts them once with `advance`: all layers
    of a pass write at the same `position`, and attend to `position` plus their own tokens.

        cache = KVCache(KVCacheConfig(num_layers=24, max_context_length=2048, num_kv_heads=2, head_dim=64), numpy)
        for layer ...: keys, values = cache.update(layer, new_keys, new_values)   # then attend to keys and values
        cache.advance(tokens)

    Arrays are token-major, [tokens, heads, dim] of `config.dtype`. On numpy and torch they lie in one allocation, layer
    after layer, keys before values, and every slice is a view that shows later writes. On MLX each is an allocation of
    its own: write, then slice, then evaluate what was computed, once a step, and drop the slices before the next
    step is evaluated. A slice that is still alive then makes MLX copy that layer's array first: right, but slow.

    `namespace` is the module numpy, torch or mlx.core; `device` is for torch. A `tracker` counts the bytes until the
    cache is closed or collected; a view that outlives it keeps the memory, but is the caller's. Not thread-safe.
    Raises CacheMemoryError when the memory cannot be had.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        namespace: ModuleType = np,
        *,
        device: Any = None,
        tracker: MemoryTracker | None = None,
    ) -> None:
        self.config = config
        self._position = 0
        self._library = library(namespace, device)
        shape = (config.max_context_length, config.num_kv_heads, config.head_dim)
        try:
            self._arrays = self._library.allocate(2 * config.num_layers, shape, config.dtype)
        except CacheMemoryError as error:
            raise CacheMemoryError(
                f"Failed to allocate KV cache ({self.calculate_size(config) // 10**6} MB, {config.max_context_length} "
                f"tokens, {config.num_layers} layers): {error}"
            ) from error
        self._release: Callable[[], object] | None = None
        if tracker is not None:
            text = f"KV cache of {config.num_layers} layers, {config.max_context_length} tokens"
            self._release = tracker.attach(self, self.size_bytes, Purpose.KV_CACHE, text)

    @staticmethod
    def calculate_size(config: KVCacheConfig) -> int:
        """Bytes of a cache: 2 (keys, values) x layers x tokens x heads x dim x bytes of the dtype; allocates none."""
        per_token = config.num_layers * config.num_kv_heads * config.head_dim * ITEM_BYTES[config.dtype]
        return 2 * config.max_context_length * per_token

    @property
    def size_bytes(self) -> int:
        """Bytes held now; 0 once closed."""
        return sum(int(array.nbytes) for array in self._arrays)

    @property
    def position(self) -> int:
        """Tokens stored, and so where the next one goes."""
        return self._position

    @property
    def is_full(self) -> bool:
        return self._position >= self.config.max_context_length

    @property
    def remaining(self) -> int:
        """Tokens that still fit."""
        return self.config.max_context_length - self._position

    def keys(self, layer: int) -> Array:
        """All keys of a layer, [max_context_length, heads, dim]: the memory itself, those past `position` too.

        Raises CacheIndexError (an IndexError) for a layer that is not there, ArenaError when the cache is closed.
        """
        return self._arrays[2 * self._check_layer(layer)]

    def values(self, layer: int) -> Array:
        """All values of a layer, as `keys`."""
        return self._arrays[2 * self._check_layer(layer) + 1]

    def update(self, layer: int, new_keys: Array, new_values: Array) -> tuple[Array, Array]:
        """Write new tokens [tokens, heads, dim] at `position`; returns keys and values [position + tokens, heads, dim].

        The results are views of the cache: what these tokens attend to. `position` stays, for the other layers.
        Raises CacheOverflowError, CacheIndexError and CacheValueError before anything is written.
        """
        keys, values = self.keys(layer), self.values(layer)
        end = update_kv_cache(keys, values, new_keys, new_values, self._position)
        return keys[:end], values[:end]

    def advance(self, num_tokens: int = 1) -> None:
        """Count tokens as stored, once a forward pass. Raises CacheOverflowError, changing nothing, if they do not fit.

        CacheValueError for a number that is not positive, ArenaError when the cache is closed.
        """
        self._check_open()
        if integer("num_tokens", num_tokens) <= 0:
            raise CacheValueError("num_tokens must be positive")
        if self._position + num_tokens > self.config.max_context_length:
            raise CacheOverflowError(
                f"KV cache overflow: position {self._position + num_tokens} exceeds max context length "
                f"{self.config.max_context_length} (tried to advance by {num_tokens} tokens)"
            )
        self._position += num_tokens

    def reset(self, zero: bool = True) -> None:
        """Start again at position 0, and fill the memory with zeros in place unless `zero` is False."""
        self._check_open()
        if zero:
            for array in self._arrays:
                self._library.clear(array)
        self._position = 0

    def close(self) -> None:
        """Give the memory back; every later use but `close` raises ArenaError."""
        self._arrays = []
        if self._release is not None:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._arrays:
            raise ArenaError("the KV cache is closed; make a new one")

    def _check_layer(self, layer: int) -> int:
        self._check_open()
        if not 0 <= integer("layer", layer) < self.config.num_layers:
            raise CacheIndexError(f"Layer index out of range: {layer} (must be 0-{self.config.num_layers - 1})")
        return layer
