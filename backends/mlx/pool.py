"""The KV memory: per layer one K and one V array of rows, written in place for ever.

A sequence owns a run of blocks. Inside its run the rows are head-major:

    row of (head h, position p) = first row of the run + h * capacity + p

so that keys and values of one sequence are a strided view [1, heads, length, dim] of the pool, without a copy, and
runs of equal capacity that lie side by side are one batched view. Because a row's place depends on the run's
capacity, a run that grows in place is laid out anew (a planned move).

MLX writes into a pool in place only while nothing else refers to it: no view may outlive the step that made it, and
no two evaluations that touch a pool may be in flight. `addresses` is how that is proved.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from cortexstream.backend import LayerKV
from cortexstream.errors import OutOfMemoryBudgetError
from cortexstream.plan import KVRows, Move


class Span(NamedTuple):
    """Where a run lies, in tokens: multiply by a layer's heads to get rows."""

    first: int
    capacity: int

    @staticmethod
    def of(kv: KVRows, block_tokens: int) -> Span:
        return Span(kv.blocks[0] * block_tokens, len(kv.blocks) * block_tokens)


class RowPool:
    """K and V of every layer: arrays [num_tokens * heads, dim]."""

    def __init__(self, layers: tuple[LayerKV, ...], num_blocks: int, block_tokens: int, dtype: mx.Dtype) -> None:
        self.layers = layers
        self.block_tokens = block_tokens
        self.num_tokens = num_blocks * block_tokens
        try:
            self.keys = [mx.zeros((self.num_tokens * layer.num_kv_heads, layer.key_dim), dtype) for layer in layers]
            self.values = [mx.zeros((self.num_tokens * layer.num_kv_heads, layer.value_dim), dtype) for layer in layers]
            mx.eval(self.keys, self.values)  # also touches every page: no request pays for it later
        except RuntimeError as error:
            needed = sum(la.num_kv_heads * (la.key_dim + la.value_dim) for la in layers) * dtype.size * self.num_tokens
            raise OutOfMemoryBudgetError(
                f"{needed:,} bytes of KV for {num_blocks} blocks could not be allocated ({error}): "
                "lower kv_cache_memory"
            ) from error

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def write(self, layer: int, rows: mx.array, keys: mx.array, values: mx.array) -> None:
        """Store keys and values [*rows.shape, dim] at row numbers `rows`: one scatter each."""
        self.keys[layer][rows] = keys
        self.values[layer][rows] = values

    def view(self, layer: int, span: Span, start: int, length: int, count: int = 1) -> tuple[mx.array, mx.array]:
        """Keys and values [count, heads, length, dim] of positions start.. of `count` runs side by side, not copied."""
        heads = self.layers[layer].num_kv_heads
        views = []
        for pool in (self.keys[layer], self.values[layer]):
            dim = pool.shape[1]
            strides = (heads * span.capacity * dim, span.capacity * dim, dim, 1)
            views.append(
                mx.as_strided(pool, (count, heads, length, dim), strides, (span.first * heads + start) * dim)
            )  # fmt: skip
        return views[0], views[1]

    def move(self, move: Move) -> None:
        """Copy a sequence's tokens to another run, which may overlap the first.

        The rows go through an evaluated temporary: assigning a view of a pool to the pool itself would copy all of it.
        """
        tokens = self.block_tokens
        source = Span(move.source * tokens, move.source_blocks * tokens)
        target = Span(move.target * tokens, move.target_blocks * tokens)
        positions = np.arange(move.num_tokens)
        for layer, spec in enumerate(self.layers):
            heads = spec.num_kv_heads
            kept = [
                mx.take(pool[layer], row_index(source, heads, positions), axis=0) for pool in (self.keys, self.values)
            ]
            _finish(*kept)
            self.write(layer, row_index(target, heads, positions), kept[0], kept[1])
            _finish(self.keys[layer], self.values[layer])

    def addresses(self) -> list[int]:
        """Where each array's data lies in memory; waits for what is being computed."""
        mx.synchronize()
        found = [_address(array) for array in (*self.keys, *self.values)]
        mx.synchronize()  # reading made views; a write that meets one copies the pool
        return found


def row_index(span: Span, heads: int, positions: np.ndarray) -> mx.array:
    """Row numbers [heads, positions] of one run."""
    rows = span.first * heads + np.arange(heads)[:, None] * span.capacity + positions[None]
    return mx.array(rows.astype(np.int32))


def _finish(*arrays: mx.array) -> None:
    """Compute, and wait until nothing on the device refers to the inputs any more (mx.eval alone does not)."""
    mx.async_eval(*arrays)
    mx.synchronize()


def _address(array: mx.array) -> int:
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    view = np.array(array.view(words), copy=False)  # numpy has no bfloat16
    return int(view.__array_interface__["data"][0])
