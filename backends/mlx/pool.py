"""The KV memory: per layer K and V as rows, written in place for ever.

A sequence owns a run of blocks in each pool. Inside its run the rows are head-major:

    row of (head h, slot s) = first row of the run + h * capacity + s

so that keys and values of one sequence are a strided view [1, heads, length, dim] of the pool, without a copy, and
runs of equal capacity that lie side by side are one batched view. Because a row's place depends on the run's
capacity, a run that grows in place is laid out anew (a planned move).

In pool 0 (full attention) a slot is a position. A layer with a sliding window keeps a ring: the token at position p
lies in slot p % ring size. Keys carry their rotary position, so attention over a ring needs no order.

MLX writes into a pool in place only while nothing else refers to it: no view may outlive the step that made it, and
no two evaluations that touch a pool may be in flight. `addresses` is how that is proved.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from cortexstream.backend import ModelInfo
from cortexstream.backends.mlx.plane import Plane, Span
from cortexstream.errors import OutOfMemoryBudgetError
from cortexstream.plan import KVRows, Move, ring_tokens

NEVER = 1 << 31
"""Slots before pool 0 wraps: more than it has, since row numbers are 32 bits wide."""


class PoolShape(NamedTuple):
    """One pool's size, and its ring: the token at position p lies in slot p % slots, and the query at p sees the last
    `window` positions. Pool 0 is a ring that never wraps."""

    num_blocks: int
    window: int
    slots: int
    step: int = (
        0  # keys are read in order of position, from a multiple of this on; 0: as they lie, which copies nothing
    )

    def first_seen(self, position: int) -> int:
        """The first position that the query at `position` sees."""
        return max(0, position + 1 - self.window)

    def first_read(self, position: int) -> int:
        """The first position that is read for queries from `position` on; those before `first_seen` are masked."""
        first = self.first_seen(position)
        return first - first % self.step if self.step else first

    def in_view(self, position: int) -> tuple[int, int]:
        """(first, end) of the slots that hold all that the query at `position` sees."""
        return (0, self.slots) if position >= self.slots else (self.first_seen(position), position + 1)

    def visible(self, positions: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether queries at `positions`, once written, see what is in `slots`; the arguments broadcast."""
        age = (positions - slots) % self.slots
        return age < np.minimum(positions + 1, self.window)


class RowPool:
    """K and V of every layer as planes of [tokens of the layer's pool * heads] rows."""

    def __init__(
        self, model: ModelInfo, num_blocks: tuple[int, ...], block_tokens: int, dtype: mx.Dtype, ring_step: int = 0
    ) -> None:
        """`num_blocks` of each pool: the full-attention layers', then one number per window. `ring_step` is the `step`
        of the rings."""
        self.layers, self.block_tokens, self.num_blocks = model.layers, block_tokens, num_blocks
        self.pool_of = [model.pool_of(layer) for layer in range(len(model.layers))]
        rings = [(window, ring_tokens(window, block_tokens), ring_step) for window in model.windows]
        self.shapes = [
            PoolShape(blocks, *ring) for blocks, ring in zip(num_blocks, [(NEVER, NEVER, 0), *rings], strict=True)
        ]
        try:
            self.keys = [self._plane(model, layer, spec.key_dim, dtype) for layer, spec in enumerate(model.layers)]
            self.values = [self._plane(model, layer, spec.value_dim, dtype) for layer, spec in enumerate(model.layers)]
            mx.eval(self.arrays)  # also touches every page: no request pays for it later
        except RuntimeError as error:
            needed = sum(n * size for n, size in zip(num_blocks, model.pool_bytes_per_token, strict=True))
            raise OutOfMemoryBudgetError(
                f"{needed * block_tokens:,} bytes of KV for {num_blocks} blocks could not be allocated ({error}): "
                "lower kv_cache_memory"
            ) from error

    def _plane(self, model: ModelInfo, layer: int, dim: int, dtype: mx.Dtype) -> Plane:
        heads = model.layers[layer].num_kv_heads
        rows = self.num_blocks[self.pool_of[layer]] * self.block_tokens * heads
        return Plane(rows, heads, dim, dtype, model.kv_quantization)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for plane in (*self.keys, *self.values) for array in plane.arrays]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def spans(self, kv: KVRows) -> tuple[Span, ...]:
        """Where a sequence's runs lie, in every pool."""
        tokens = self.block_tokens
        return tuple(Span(rows.blocks[0] * tokens, len(rows.blocks) * tokens) for rows in (kv, *kv.rings))

    def misfit(self, kv: KVRows, num_tokens: int) -> str | None:
        """Why the runs of `kv` cannot hold positions 0 .. num_tokens - 1, as a clause; None if they can.

        MLX reads and writes wherever an index points, outside a pool too: everything that comes from a plan is checked
        here first.
        """
        if len(kv.rings) != len(self.shapes) - 1:
            return f"it has {len(kv.rings)} rings, the model {len(self.shapes) - 1} windows"
        for number, (rows, shape) in enumerate(zip((kv, *kv.rings), self.shapes, strict=True)):
            needed = min(num_tokens, shape.slots)
            if not rows.contiguous or not rows.blocks or rows.blocks[-1] - rows.blocks[0] != len(rows.blocks) - 1:
                return f"its blocks in pool {number} are not a run of adjacent ones"
            if (wrong := self._outside(number, rows.blocks[0], len(rows.blocks), needed)) is not None:
                return wrong
        return None

    def move_misfit(self, move: Move) -> str | None:
        """Why a move cannot be done, as a clause; None if it can."""
        if not 0 <= move.pool < len(self.shapes):
            return f"pool {move.pool} is none of the {len(self.shapes)}"
        if move.num_tokens < 0:
            return f"{move.num_tokens} tokens are less than none"
        return self._outside(move.pool, move.source, move.source_blocks, move.num_tokens) or self._outside(
            move.pool, move.target, move.target_blocks, move.num_tokens
        )

    def _outside(self, number: int, first: int, count: int, needed: int) -> str | None:
        """Why `needed` tokens do not fit `count` blocks from `first` on in a pool."""
        blocks = self.shapes[number].num_blocks
        if first >= 0 and count >= 1 and first + count <= blocks and 0 <= needed <= count * self.block_tokens:
            return None
        return (
            f"{needed} tokens do not fit {count} blocks of {self.block_tokens} from block {first} on in pool {number}, "
            f"which has {blocks}"
        )

    def move(self, move: Move) -> None:
        """Copy a run's slots to another run, which may overlap the first.

        The rows go through an evaluated temporary: assigning a view of a pool to the pool itself would copy all of it.
        """
        tokens = self.block_tokens
        source = Span(move.source * tokens, move.source_blocks * tokens)
        target = Span(move.target * tokens, move.target_blocks * tokens)
        slots = np.arange(move.num_tokens)
        for layer, spec in enumerate(self.layers):
            if self.pool_of[layer] != move.pool:
                continue
            old, new = (row_index(span, spec.num_kv_heads, slots) for span in (source, target))
            for plane in (self.keys[layer], self.values[layer]):
                kept = plane.take(old)
                finish(*kept)
                plane.store(new, kept)
                finish(*plane.arrays)

    def addresses(self) -> list[int]:
        """Where each array's data lies in memory; waits for what is being computed."""
        mx.synchronize()
        found = [address(array) for array in self.arrays]
        mx.synchronize()  # reading made views; a write that meets one copies the pool
        return found


def row_index(span: Span, heads: int, slots: npt.NDArray[np.int64]) -> mx.array:
    """Row numbers [heads, slots] of one run."""
    rows = span.first * heads + np.arange(heads)[:, None] * span.capacity + slots[None]
    return mx.array(rows.astype(np.int32))


def finish(*arrays: mx.array) -> None:
    """Compute, and wait until nothing on the device refers to the inputs any more (mx.eval alone does not)."""
    mx.async_eval(*arrays)
    mx.synchronize()


def address(array: mx.array) -> int:
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    view = np.array(array.view(words), copy=False)  # numpy has no bfloat16
    return int(view.__array_interface__["data"][0])
