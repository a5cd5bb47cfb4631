"""What mlx-lm's models see as their KV cache: the pool, through mlx-lm 0.32's cache protocol.

A model calls, per layer, `make_mask` (once per kind of layer), reads `offset` for the rotary positions, and
`update_and_fetch(keys, values)`. The objects here live for one forward pass; nothing of them may survive it, because
a view that is still alive turns the next write into a copy of the whole pool.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from cortexstream.backends.mlx.attention import Ragged, RaggedNotPossible, Segment
from cortexstream.backends.mlx.pool import RowPool, Span, row_index


class Chunk:
    """A forward pass over several tokens of one sequence: positions start .. start + length."""

    def __init__(self, pool: RowPool, span: Span, start: int, length: int) -> None:
        self.pool, self.span, self.start, self.length = pool, span, start, length
        self._rows: dict[int, mx.array] = {}

    def caches(self) -> list[ChunkCache]:
        return [ChunkCache(self, layer) for layer in range(len(self.pool.layers))]

    def rows(self, heads: int) -> mx.array:
        if heads not in self._rows:
            self._rows[heads] = row_index(self.span, heads, np.arange(self.start, self.start + self.length))
        return self._rows[heads]


class _LayerCache:
    """The parts of mlx-lm's protocol that are the same for both kinds of pass."""

    def __init__(self, layer: int, pool: RowPool) -> None:
        self.layer = layer
        self.window = pool.layers[layer].window
        self.heads = pool.layers[layer].num_kv_heads

    def is_trimmable(self) -> bool:
        return False

    def empty(self) -> bool:
        return False


class ChunkCache(_LayerCache):
    """One layer of a Chunk: the sequence's own K and V as views, attention "causal"."""

    def __init__(self, chunk: Chunk, layer: int) -> None:
        super().__init__(layer, chunk.pool)
        self._chunk = chunk

    @property
    def offset(self) -> int:
        return self._chunk.start

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        start, window = self._chunk.start, self.window or window_size
        first = self._first(self.window)
        if not return_array and (window is None or start + length <= window):
            return None if length == 1 else "causal"
        if length == 1 and self.window is not None and not return_array:
            return None  # the view holds exactly the window
        queries = mx.arange(start, start + length)[:, None]
        keys = mx.arange(first, start + length)[None]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        chunk = self._chunk
        chunk.pool.write(self.layer, chunk.rows(self.heads), keys[0], values[0])
        first = self._first(self.window)
        return chunk.pool.view(self.layer, chunk.span, first, chunk.start + chunk.length - first)

    def _first(self, window: int | None) -> int:
        """The first position that any of the chunk's queries can see."""
        return 0 if window is None else max(0, self._chunk.start + 1 - window)


class Batch:
    """A forward pass over one token of each of several sequences, at `positions`.

    With `ragged`, attention gets one view per sequence, or per group of neighbours of equal capacity when `grouped`;
    else keys and values are gathered into padded arrays, which any model accepts and which copies them.
    """

    def __init__(self, pool: RowPool, spans: list[Span], positions: list[int], ragged: bool, grouped: bool) -> None:
        self.pool, self.spans, self.positions, self.ragged = pool, spans, positions, ragged
        self.offset = mx.array(positions, dtype=mx.int32)
        self._rows: dict[int, mx.array] = {}
        self._groups = _groups(spans) if grouped else [(i, 1) for i in range(len(spans))]
        self._segments: dict[int | None, list[Segment]] = {}

    def caches(self) -> list[BatchCache]:
        return [BatchCache(self, layer) for layer in range(len(self.pool.layers))]

    def rows(self, heads: int) -> mx.array:
        """Row numbers [sequences, heads] of the tokens that are written now."""
        if heads not in self._rows:
            first = np.array([s.first * heads + p for s, p in zip(self.spans, self.positions, strict=True)])
            capacity = np.array([s.capacity for s in self.spans])
            rows = first[:, None] + np.arange(heads)[None] * capacity[:, None]
            self._rows[heads] = mx.array(rows.astype(np.int32))
        return self._rows[heads]

    def segments(self, window: int | None) -> list[Segment]:
        """How the rows split into attention calls, and each call's mask; the same for all layers of one window."""
        if window not in self._segments:
            self._segments[window] = [self._segment(first, count, window) for first, count in self._groups]
        return self._segments[window]

    def _segment(self, first: int, count: int, window: int | None) -> Segment:
        ends = [p + 1 for p in self.positions[first : first + count]]
        starts = [0 if window is None else max(0, end - window) for end in ends]
        low, high = min(starts), max(ends)
        valid = None
        if count > 1:
            keys = np.arange(low, high)[None]
            valid = (keys >= np.array(starts)[:, None]) & (keys < np.array(ends)[:, None])
        return Segment(first, count, low, high - low, None if valid is None or valid.all() else valid)


class BatchCache(_LayerCache):
    """One layer of a Batch."""

    def __init__(self, batch: Batch, layer: int) -> None:
        super().__init__(layer, batch.pool)
        self._batch = batch

    @property
    def offset(self) -> mx.array:
        return self._batch.offset

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        if length != 1:
            raise RaggedNotPossible(f"a batch of single tokens was asked for a mask of {length}")
        if self._batch.ragged:
            if return_array or (self.window is None and window_size is not None):
                raise RaggedNotPossible("the model wants its mask as an array")
            return None
        positions = self._gathered()
        mask = (positions >= 0) & (positions <= np.array(self._batch.positions)[:, None])
        if self.window is None and window_size is not None:
            mask &= positions > np.array(self._batch.positions)[:, None] - window_size
        return mx.array(mask)[:, None, None, :]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        batch, pool = self._batch, self._batch.pool
        pool.write(self.layer, batch.rows(self.heads), keys[:, :, 0], values[:, :, 0])
        if not batch.ragged:
            return self._gather()
        segments = batch.segments(self.window)
        views = [pool.view(self.layer, batch.spans[s.first], s.start, s.length, s.rows) for s in segments]
        return Ragged([k for k, _ in views], segments), Ragged([v for _, v in views], segments)

    def _gathered(self) -> np.ndarray:
        """Positions [sequences, length] that a padded array holds; negative ones are padding."""
        ends = np.array(self._batch.positions) + 1
        length = int(ends.max()) if self.window is None else min(int(ends.max()), self.window)
        starts = np.zeros_like(ends) if self.window is None else np.maximum(ends - length, 0)
        positions = starts[:, None] + np.arange(length)[None]
        return np.where(positions < ends[:, None], positions, -1)

    def _gather(self) -> tuple[mx.array, mx.array]:
        """Padded copies [sequences, heads, length, dim]; padding repeats position 0, which is finite, and is masked."""
        positions = np.maximum(self._gathered(), 0)
        first = np.array([s.first for s in self._batch.spans]) * self.heads
        capacity = np.array([s.capacity for s in self._batch.spans])
        heads = np.arange(self.heads)[None, :] * capacity[:, None]
        index = first[:, None, None] + heads[:, :, None] + positions[:, None, :]
        rows = mx.array(index.astype(np.int32))
        pool = self._batch.pool
        return mx.take(pool.keys[self.layer], rows, axis=0), mx.take(pool.values[self.layer], rows, axis=0)


def _groups(spans: list[Span]) -> list[tuple[int, int]]:
    """(first row, count) of neighbours with equal capacity; rows are sorted by where their runs lie."""
    groups: list[tuple[int, int]] = []
    for row, span in enumerate(spans):
        if groups:
            first, count = groups[-1]
            head = spans[first]
            if span.capacity == head.capacity and span.first == head.first + count * head.capacity:
                groups[-1] = (first, count + 1)
                continue
        groups.append((row, 1))
    return groups
