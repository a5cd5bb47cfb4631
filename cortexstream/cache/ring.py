"""The latest tokens of each batch entry, in a ring that never grows and is never rearranged."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Self

import numpy as np

from cortexstream.cache.arrays import Array, Slots, library
from cortexstream.cache.checks import integer, writable
from cortexstream.cache.tracker import MemoryTracker, Purpose
from cortexstream.errors import ArenaError, CacheIndexError, CacheMemoryError, CacheValueError


class RingState(NamedTuple):
    """Where one batch entry stands."""

    seq_len: int
    """Tokens that are held: min(total_tokens, max_seq_len)."""
    ring_pos: int
    """The slot that the next token takes; without sinks total_tokens % max_seq_len."""
    full_count: int
    """How often the ring has been filled; without sinks total_tokens // max_seq_len."""
    total_tokens: int
    """Tokens ever appended, and so the position of the next one."""


class RingView(NamedTuple):
    """One batch entry's tokens: keys and values [heads, length, head_dim]."""

    keys: Array
    values: Array
    length: int


class RingMetrics(NamedTuple):
    """What a ring has done since it was made. Calls that raised are not in it."""

    append_calls: int = 0
    append_bytes: int = 0
    """Bytes of keys and values written."""
    reset_calls: int = 0
    get_cache_calls: int = 0
    get_cache_bytes: int = 0
    """Bytes copied by `get_cache(ordered=True)`; a view copies nothing."""


class RingCache:
    """A ring of `max_seq_len` slots for each batch entry of one layer; attention over it sees a sliding window.

    The token at position p takes slot p while there is room, then the slot of the oldest token. Each entry's keys and
    values are [heads, max_seq_len, head_dim], a head's tokens side by side, allocated and zeroed once. An append writes
    one slot, before and after the first turn alike.

    Slot order is time order turned by some slots, and nothing is ever put back in order: softmax attention does not
    depend on the order of the keys, since keys carry their position from the rotary embedding. `positions` says
    which token is where, for whoever needs to know (ALiBi, a mask), and `get_cache(ordered=True)` copies.

    With `sinks` s the first s tokens stay for ever and the ring turns over the other slots (Xiao et al., "Efficient
    streaming language models with attention sinks", 2023; here tokens keep the positions that they were written with).

    `namespace` is the module numpy, torch or mlx.core, `dtype` float32, float16 or bfloat16, `device` for torch. A
    `tracker` counts the bytes of the memory now allocated. Metrics count calls and bytes and not time: on MLX and on a
    GPU a call returns before its work is done. Not thread-safe.
    """

    def __init__(
        self,
        namespace: ModuleType = np,
        *,
        dtype: str = "float32",
        device: Any = None,
        sinks: int = 0,
        tracker: MemoryTracker | None = None,
    ) -> None:
        if integer("sinks", sinks) < 0:
            raise CacheValueError(f"sinks is {sinks}; must be at least 0")
        self.sinks = sinks
        self._append_calls = self._append_bytes = self._reset_calls = self._get_calls = self._get_bytes = 0
        self.max_seq_len = self.num_heads = self.head_dim = 0
        self._dtype, self._tracker = dtype, tracker
        self._library = library(namespace, device)
        self._library.dtype(dtype)  # raises now, not when memory has been given back
        self._release: Callable[[], object] | None = None
        self._arrays: list[Array] = []  # keys and values in turn
        self._totals: list[int] = []

    def allocate(self, max_seq_len: int, batch_size: int, hidden_dim: int, num_heads: int) -> None:
        """Get zeroed memory for `batch_size` entries of `max_seq_len` tokens; `num_heads` are the heads of the keys.

        What was allocated before is given back first, with its tokens. Raises CacheValueError, changing nothing, for
        numbers that do not go together; CacheMemoryError, leaving nothing allocated, when the memory cannot be had.
        """
        given = {"max_seq_len": max_seq_len, "batch_size": batch_size, "hidden_dim": hidden_dim, "num_heads": num_heads}
        for name, value in given.items():
            if integer(name, value) <= 0:
                raise CacheValueError(f"All parameters must be > 0: {name} is {value}")
        if hidden_dim % num_heads:
            raise CacheValueError(f"hidden_dim must be divisible by num_heads: {hidden_dim} is not by {num_heads}")
        if self.sinks >= max_seq_len:
            raise CacheValueError(f"sinks is {self.sinks}; max_seq_len is {max_seq_len} and must be larger")
        self.close()
        shape = (num_heads, max_seq_len, hidden_dim // num_heads)
        try:
            self._arrays = self._library.allocate(2 * batch_size, shape, self._dtype)
        except CacheMemoryError as error:
            raise CacheMemoryError(
                f"Failed to allocate ring cache ({max_seq_len} tokens, {batch_size} batch entries): {error}"
            ) from error
        self.num_heads, self.max_seq_len, self.head_dim = shape
        self._totals = [0] * batch_size
        if self._tracker is not None:
            text = f"ring cache of {batch_size} entries, {max_seq_len} tokens"
            self._release = self._tracker.attach(self, self.memory_bytes, Purpose.KV_CACHE, text)

    @property
    def batch_size(self) -> int:
        return len(self._totals)

    @property
    def metrics(self) -> RingMetrics:
        """What was done so far, also before an `allocate` in between."""
        return RingMetrics(
            self._append_calls, self._append_bytes, self._reset_calls, self._get_calls, self._get_bytes
        )  # fmt: skip

    @property
    def memory_bytes(self) -> int:
        """Bytes of all keys and values. There are no others: what `get_cache(ordered=True)` returns is the caller's."""
        return sum(int(array.nbytes) for array in self._arrays)

    def append(self, k: Array, v: Array, seq_pos: int, batch_idx: int = 0) -> None:
        """Write a token's keys and values, [heads, head_dim] or [hidden_dim]; over the oldest one if the ring is full.

        `seq_pos` is the token's position and must be the number of tokens appended before. Raises CacheIndexError for
        a batch entry that is not there, CacheValueError for a wrong position, shape, dtype or library, before anything
        is written.
        """
        total = self._totals[self._check_batch(batch_idx)]
        if integer("seq_pos", seq_pos) != total:
            raise CacheValueError(f"seq_pos mismatch: expected {total} got {seq_pos}")
        keys, values = self._arrays[2 * batch_idx : 2 * batch_idx + 2]
        slot = self._slot(total)
        for name, new, array in (("k", k, keys), ("v", v, values)):
            writable(self._library, name, array, new)
            if tuple(new.shape) not in ((self.num_heads, self.head_dim), (self.num_heads * self.head_dim,)):
                raise CacheValueError(
                    f"{name} has shape {tuple(new.shape)}; must be ({self.num_heads}, {self.head_dim}) or "
                    f"({self.num_heads * self.head_dim},)"
                )
        for new, array in ((k, keys), (v, values)):
            self._library.write(array, 1, slot, new.reshape(self.num_heads, 1, self.head_dim))
        self._totals[batch_idx] += 1
        self._append_calls += 1
        self._append_bytes += int(k.nbytes) + int(v.nbytes)

    def get_cache(self, batch_idx: int = 0, ordered: bool = False) -> RingView:
        """What attention needs: keys and values [heads, seq_len, head_dim] of the tokens that are held.

        A view in slot order: one piece, no copy, before and after the first turn. On numpy and torch it shows later
        appends; on MLX it keeps what it shows, and if it is alive when a later append is evaluated, MLX copies the
        entry's array: drop it first. With `ordered` a copy, oldest token first, in memory of its own.
        Raises CacheIndexError for a batch entry that is not there.
        """
        total = self._totals[self._check_batch(batch_idx)]
        length = min(total, self.max_seq_len)
        pair = self._arrays[2 * batch_idx : 2 * batch_idx + 2]
        if ordered:
            order = self._slots_by_age(total)
            keys, values = (self._library.take(array, 1, order) for array in pair)
            self._get_bytes += int(keys.nbytes) + int(values.nbytes)
        else:
            keys, values = (array[:, :length] for array in pair)
        self._get_calls += 1
        return RingView(keys, values, length)

    def positions(self, batch_idx: int = 0, ordered: bool = False) -> Slots:
        """The position of each token that `get_cache` with the same arguments returns, [seq_len] int64."""
        total = self._totals[self._check_batch(batch_idx)]
        by_age = self._positions_by_age(total)
        if ordered:
            return by_age
        by_slot = np.empty_like(by_age)
        by_slot[self._slots_by_age(total)] = by_age
        return by_slot

    def state(self, batch_idx: int = 0) -> RingState:
        """Raises CacheIndexError for a batch entry that is not there."""
        total = self._totals[self._check_batch(batch_idx)]
        turns = max(0, total - self.sinks) // (self.max_seq_len - self.sinks)
        return RingState(min(total, self.max_seq_len), self._slot(total), turns, total)

    def reset(self, batch_idx: int = 0) -> None:
        """Forget an entry's tokens. The memory stays as it is: no view shows a slot that was not written since."""
        self._totals[self._check_batch(batch_idx)] = 0
        self._reset_calls += 1

    def reset_all(self) -> None:
        """Forget every entry's tokens; counts as one reset."""
        self._check_allocated()
        self._totals = [0] * len(self._totals)
        self._reset_calls += 1

    def close(self) -> None:
        """Give the memory back; what needs it raises ArenaError until `allocate` is called again."""
        self._arrays, self._totals = [], []
        self.max_seq_len = self.num_heads = self.head_dim = 0
        if self._release is not None:
            self._release()
            self._release = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slot(self, position: int) -> int:
        if position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % (self.max_seq_len - self.sinks)

    def _positions_by_age(self, total: int) -> Slots:
        first = min(total, self.sinks)
        return np.concatenate((np.arange(first), np.arange(max(first, total - self.max_seq_len + first), total)))

    def _slots_by_age(self, total: int) -> Slots:
        positions = self._positions_by_age(total)
        turned = self.sinks + (positions - self.sinks) % (self.max_seq_len - self.sinks)
        return np.where(positions < self.sinks, positions, turned)

    def _check_allocated(self) -> None:
        if not self._arrays:
            raise ArenaError("the ring cache has no memory; call allocate first")

    def _check_batch(self, batch_idx: int) -> int:
        self._check_allocated()
        if not 0 <= integer("batch_idx", batch_idx) < len(self._totals):
            raise CacheIndexError(f"batch_idx out of range: {batch_idx} (must be 0-{len(self._totals) - 1})")
        return batch_idx
