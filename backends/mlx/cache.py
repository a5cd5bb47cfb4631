"""What mlx-lm's models see as their KV cache: the pool, through mlx-lm 0.32's cache protocol.

A model calls, per layer, `make_mask` (once per kind of layer), reads `offset` for the rotary positions, and
`update_and_fetch(keys, values)`. The objects here live for one forward pass; nothing of them may survive it, because
a view that is still alive turns the next write into a copy of the whole pool.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from cortexstream.backends.mlx.attention import Ragged, RaggedNotPossible, Segment
from cortexstream.backends.mlx.plane import Plane, Span
from cortexstream.backends.mlx.pool import RowPool, finish, row_index
from cortexstream.plan import KVRows


class _LayerCache:
    """The parts of mlx-lm's protocol that are the same for both kinds of pass."""

    def __init__(self, layer: int, pool: RowPool) -> None:
        self.layer = layer
        self.number = pool.pool_of[layer]
        self.shape = pool.shapes[self.number]
        self.window = pool.layers[layer].window
        self.heads = pool.layers[layer].num_kv_heads
        self.planes = pool.keys[layer], pool.values[layer]

    def _in_order(self, plane: Plane, span: Span, first: int, end: int) -> mx.array:
        """Numbers [1, heads, end - first, dim] of a ring's positions first .. end - 1; of those that it no longer
        holds, other ones."""
        if end <= self.shape.slots:
            return plane.view(span, first, end - first)
        rows = row_index(span, self.heads, np.arange(first, end) % self.shape.slots)
        return plane.decode(plane.take(rows))[None]

    def is_trimmable(self) -> bool:
        return False

    def empty(self) -> bool:
        return False


class Chunk:
    """A forward pass over `length` tokens of one sequence, from position `start` on.

    A single token is written and then reads the pool. So do several, unless they overwrite what is in a ring: then
    attention takes what the ring held, copied by `read_back`, followed by the chunk, and the pool is only written.
    """

    def __init__(self, pool: RowPool, kv: KVRows, start: int, length: int) -> None:
        self.pool, self.spans, self.start, self.length = pool, pool.spans(kv), start, length
        self.end = start + length
        self._rows: dict[tuple[int, int], mx.array] = {}
        self._old: dict[int, tuple[list[mx.array], list[mx.array]]] = {}

    def caches(self) -> list[ChunkCache]:
        return [ChunkCache(self, layer) for layer in range(len(self.pool.layers))]

    def overwrites(self, number: int) -> bool:
        """Whether pool `number` is a ring in which the chunk's tokens take the places of those they must see."""
        return self.length > 1 and self.end > self.pool.shapes[number].slots

    @property
    def needs_read_back(self) -> bool:
        return self.start > 0 and any(map(self.overwrites, range(len(self.pool.shapes))))

    def read_back(self) -> None:
        """Copy what the chunk sees of the rings that it overwrites. Nothing may be in flight; this waits for the copies
        to be done, because a write that meets a reader copies the pool."""
        for layer, spec in enumerate(self.pool.layers):
            number = self.pool.pool_of[layer]
            shape = self.pool.shapes[number]
            positions = np.arange(shape.first_read(self.start), self.start)
            if self.overwrites(number) and positions.size:
                rows = row_index(self.spans[number], spec.num_kv_heads, positions % shape.slots)
                self._old[layer] = self.pool.keys[layer].take(rows), self.pool.values[layer].take(rows)
        finish(*(array for sides in self._old.values() for stored in sides for array in stored))

    def old(self, layer: int) -> tuple[list[mx.array] | None, list[mx.array] | None]:
        """What was read back of a layer's keys and values, as stored, [heads, positions, ..]."""
        return self._old.get(layer, (None, None))

    def rows(self, number: int, heads: int) -> mx.array:
        """Row numbers [heads, written] of the tokens that stay: all, or the last that a ring holds."""
        if (number, heads) not in self._rows:
            slots = self.pool.shapes[number].slots
            positions = np.arange(max(self.start, self.end - slots), self.end)
            self._rows[number, heads] = row_index(self.spans[number], heads, positions % slots)
        return self._rows[number, heads]


class ChunkCache(_LayerCache):
    """One layer of a Chunk: the sequence's own K and V, attention "causal" where that says it all."""

    def __init__(self, chunk: Chunk, layer: int) -> None:
        super().__init__(layer, chunk.pool)
        self._chunk = chunk

    @property
    def offset(self) -> int:
        return self._chunk.start

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        start, window = self._chunk.start, self.window or window_size
        if length == 1 and self.window is not None and not self.shape.step:
            first, end = self.shape.in_view(start)
            if end - first <= self.window and not return_array:
                return None
            return mx.array(self.shape.visible(np.array([[start]]), np.arange(first, end)))
        first = self.shape.first_read(start)
        if not return_array and (window is None or start + length - first <= window):
            return None if length == 1 else "causal"
        queries = mx.arange(start, start + length)[:, None]
        keys = mx.arange(first, start + length)[None]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        old_keys, old_values = self._chunk.old(self.layer)
        k, v = self.planes
        return self._append(k, keys[0], old_keys), self._append(v, values[0], old_values)

    def _append(self, plane: Plane, numbers: mx.array, old: list[mx.array] | None) -> mx.array:
        """Store numbers [heads, length, dim]; returns what attention sees, [1, heads, keys, dim]. The chunk's own
        tokens are seen as they are stored, so that it makes no difference how a prompt is cut."""
        chunk = self._chunk
        rows, stored = chunk.rows(self.number, self.heads), plane.encode(numbers)
        if not chunk.overwrites(self.number):
            plane.store(rows, stored)
            first, end = self.shape.first_read(chunk.start), chunk.end
            if self.shape.step:
                return self._in_order(plane, chunk.spans[self.number], first, end)
            if chunk.length == 1:
                first, end = self.shape.in_view(chunk.start)
            return plane.view(chunk.spans[self.number], first, end - first)
        plane.store(rows, [array[:, -rows.shape[1] :] for array in stored])
        seen = plane.decode(stored)
        return (seen if old is None else mx.concatenate([plane.decode(old), seen], axis=1))[None]


class Batch:
    """A forward pass over one token of each of several sequences, at `positions`.

    With `ragged`, attention gets one view per sequence, or per group of neighbours of equal capacity when `grouped`;
    else keys and values are gathered into padded arrays, which any model accepts and which copies them.
    """

    def __init__(self, pool: RowPool, kv: list[KVRows], positions: list[int], ragged: bool, grouped: bool) -> None:
        self.pool, self.ragged, self._grouped = pool, ragged, grouped
        self.positions = np.array(positions)
        self.spans = list(zip(*(pool.spans(rows) for rows in kv), strict=True))  # [pool][row]
        self.offset = mx.array(positions, dtype=mx.int32)
        self._rows: dict[tuple[int, int], mx.array] = {}
        self._segments: dict[int, list[Segment]] = {}
        self._gather_rows: dict[tuple[int, int], mx.array] = {}

    def caches(self) -> list[BatchCache]:
        return [BatchCache(self, layer) for layer in range(len(self.pool.layers))]

    def rows(self, number: int, heads: int) -> mx.array:
        """Row numbers [sequences, heads] of the tokens that are written now."""
        if (number, heads) not in self._rows:
            slots = self.positions[:, None] % self.pool.shapes[number].slots
            self._rows[number, heads] = self._index(number, heads, slots)[:, :, 0]
        return self._rows[number, heads]

    def segments(self, number: int) -> list[Segment]:
        """How the rows split into attention calls, and each call's mask; the same for all layers of one pool."""
        if number not in self._segments:
            spans = self.spans[number]
            alike = self._grouped and not self.pool.shapes[number].step
            groups = _groups(spans) if alike else [(row, 1) for row in range(len(spans))]
            self._segments[number] = [self._segment(number, first, count) for first, count in groups]
        return self._segments[number]

    def _segment(self, number: int, first: int, count: int) -> Segment:
        shape, positions = self.pool.shapes[number], self.positions[first : first + count]
        if shape.step:
            end, low = int(positions[0]) + 1, shape.first_read(int(positions[0]))
            seen = np.arange(low, end)[None] >= shape.first_seen(end - 1)
            return Segment(first, 1, low, end - low, None if seen.all() else seen)
        views = [shape.in_view(int(position)) for position in positions]
        low, high = min(start for start, _ in views), max(end for _, end in views)
        if high - low <= shape.window and len(set(views)) == 1:
            return Segment(first, count, low, high - low, None)
        return Segment(first, count, low, high - low, shape.visible(positions[:, None], np.arange(low, high)[None]))

    def gathered(self, number: int) -> npt.NDArray[np.int64]:
        """Positions [sequences, length] that a padded array holds; negative ones are padding."""
        ends = self.positions + 1
        shape = self.pool.shapes[number]
        length = min(int(ends.max()), shape.window + shape.step)
        first = np.maximum(ends - length, 0)
        if shape.step:
            first = np.array([shape.first_read(int(position)) for position in self.positions])
        positions = first[:, None] + np.arange(length)[None]
        return np.where(positions < ends[:, None], positions, -1)

    def gather_rows(self, number: int, heads: int) -> mx.array:
        """Row numbers [sequences, heads, length]; padding repeats position 0, which is finite, and is masked."""
        if (number, heads) not in self._gather_rows:
            slots = np.maximum(self.gathered(number), 0) % self.pool.shapes[number].slots
            self._gather_rows[number, heads] = self._index(number, heads, slots)
        return self._gather_rows[number, heads]

    def _index(self, number: int, heads: int, slots: npt.NDArray[np.int64]) -> mx.array:
        """Row numbers [sequences, heads, n] of each sequence's `slots` [sequences, n]."""
        first, capacity = np.array(self.spans[number]).T[:, :, None, None]
        rows = first * heads + np.arange(heads)[None, :, None] * capacity + slots[:, None, :]
        return mx.array(rows.astype(np.int32))


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
        positions, last = self._batch.gathered(self.number), self._batch.positions[:, None]
        mask = (positions >= 0) & (positions <= last)
        window = self.window or window_size
        if window is not None:
            mask &= positions > last - window
        return mx.array(mask)[:, None, None, :]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        k, v = self.planes
        return self._append(k, keys[:, :, 0]), self._append(v, values[:, :, 0])

    def _append(self, plane: Plane, numbers: mx.array) -> Ragged | mx.array:
        """Store numbers [sequences, heads, dim], and read what attention sees."""
        batch = self._batch
        plane.store(batch.rows(self.number, self.heads), plane.encode(numbers))
        if not batch.ragged:
            return plane.decode(plane.take(batch.gather_rows(self.number, self.heads)))
        segments, spans = batch.segments(self.number), batch.spans[self.number]
        if self.shape.step:
            return Ragged(
                [self._in_order(plane, spans[s.first], s.start, s.start + s.length) for s in segments], segments
            )
        return Ragged([plane.view(spans[s.first], s.start, s.length, s.rows) for s in segments], segments)


def _groups(spans: tuple[Span, ...]) -> list[tuple[int, int]]:
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
