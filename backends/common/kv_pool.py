"""The KV memory of one kind of layer: blocks of slots, a slot per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cortexstream.backend import KVArray, KVQuantization, LayerKV
from cortexstream.backends.common.kv_store import MakeStore, Slots, Store
from cortexstream.errors import EngineError
from cortexstream.plan import KVRows, Move, ring_tokens


class KVPool:
    """`num_blocks` blocks of `block_tokens` slots; offset o of block b is slot b * block_tokens + o of every layer.

    Token-major, [slots, heads, ...]: a run's layout does not depend on its capacity, so one that grew or shrank in
    place needs no move. With a `window` a row's positions go round a ring of `ring_tokens` slots.
    """

    def __init__(
        self, make_store: MakeStore, layers: Mapping[int, LayerKV], num_blocks: int, block_tokens: int,
        window: int | None = None, quantization: KVQuantization | None = None,
    ) -> None:  # fmt: skip
        self.num_blocks, self.block_tokens, self.window = num_blocks, block_tokens, window
        self.ring_tokens = None if window is None else ring_tokens(window, block_tokens)

        def store(heads: int, dim: int) -> Store:
            return make_store(num_blocks * block_tokens, heads, dim, quantization)

        self._keys = {number: store(layer.num_kv_heads, layer.key_dim) for number, layer in layers.items()}
        self._values = {number: store(layer.num_kv_heads, layer.value_dim) for number, layer in layers.items()}
        self._stores = [*self._keys.values(), *self._values.values()]

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self._stores)

    def keys(self, layer: int) -> Store:
        return self._keys[layer]

    def values(self, layer: int) -> Store:
        return self._values[layer]

    def held(self, num_tokens: int) -> int:
        """Slots that a row of `num_tokens` tokens uses."""
        return num_tokens if self.ring_tokens is None else min(num_tokens, self.ring_tokens)

    def slots(self, kv: KVRows, start: int, count: int) -> Slots:
        """The slots of positions start .. start + count - 1; no slot comes twice if count is at most a ring's slots.

        Raises EngineError when the blocks do not hold positions 0 .. start + count - 1, or the ring's part of them.
        """
        self.check(kv, start, count)
        positions = np.arange(start, start + count)
        return self._where(kv, positions if self.ring_tokens is None else positions % self.ring_tokens)

    def slot(self, kv: KVRows, position: int) -> int:
        """The slot of one position of checked blocks."""
        offset = position if self.ring_tokens is None else position % self.ring_tokens
        return kv.blocks[offset // self.block_tokens] * self.block_tokens + offset % self.block_tokens

    def where(self, kv: KVRows, start: int, count: int) -> slice | Slots:
        """The same slots, as a slice if they are adjacent and rising."""
        slots = self.slots(kv, start, count)
        if count and kv.contiguous and slots[-1] - slots[0] == count - 1:
            return slice(slots[0], slots[0] + count)
        return slots

    def check(self, kv: KVRows, start: int, count: int) -> None:
        """Raises EngineError as `slots` does."""
        end, capacity = start + count, len(kv.blocks) * self.block_tokens
        if start < 0 or count < 0 or self.held(end) > capacity:
            blocks = f"{len(kv.blocks)} blocks of {self.block_tokens} tokens"
            positions = f"positions {start} to {end - 1}"
            if self.window is None:
                raise EngineError(f"{positions} are outside {blocks}")
            raise EngineError(
                f"{positions} need {self.held(end)} slots of a ring of window {self.window}; it has {blocks}"
            )
        if kv.blocks and (min(kv.blocks) < 0 or max(kv.blocks) >= self.num_blocks):
            outside = next(block for block in kv.blocks if not 0 <= block < self.num_blocks)
            raise EngineError(f"block {outside} is outside the {self.num_blocks} blocks of {self._name}")

    def append(self, layer: int, slots: Slots, k: Any, v: Any) -> None:
        """Write k and v [T, heads, dim] into `slots` [T]."""
        self._keys[layer].append(slots, k)
        self._values[layer].append(slots, v)

    def read(self, layer: int, where: slice | Slots) -> tuple[Any, Any]:
        """Keys and values in these slots, [T, heads, dim]; views of a slice if they are not quantised."""
        return self._keys[layer].read(where), self._values[layer].read(where)

    def rounded(self, layer: int, k: Any, v: Any) -> tuple[Any, Any]:
        """What `read` would give for k and v [T, heads, dim] if they were stored."""
        return self._keys[layer].rounded(k), self._values[layer].rounded(v)

    def to_host(self, layer: int, slots: Slots) -> tuple[KVArray, KVArray]:
        """Copies of keys and values in these slots, in numpy."""
        return self._keys[layer].to_host(slots), self._values[layer].to_host(slots)

    def from_host(self, layer: int, slots: Slots, k: KVArray, v: KVArray) -> None:
        """Write what `to_host` of a pool of this format gave."""
        self._keys[layer].from_host(slots, k)
        self._values[layer].from_host(slots, v)

    def take(self, kv: KVRows, num_tokens: int) -> list[list[Any]]:
        """Raw copies in host memory of what a row of `num_tokens` tokens holds: a list per layer's keys or values."""
        slots = self._where(kv, np.arange(self.held(num_tokens)))
        return [store.take(slots) for store in self._stores]

    def put(self, kv: KVRows, num_tokens: int, copies: list[list[Any]]) -> None:
        """Write what `take` gave, bit for bit, to another row's blocks."""
        slots = self._where(kv, np.arange(self.held(num_tokens)))
        for store, parts in zip(self._stores, copies, strict=True):
            store.put(slots, parts)

    def move(self, move: Move) -> None:
        """Copy a run's first `num_tokens` slots to where the target begins, as if through a temporary."""
        source, target = move.source * self.block_tokens, move.target * self.block_tokens
        if source == target:
            return
        for store in self._stores:
            store.move(source, target, move.num_tokens)

    def check_move(self, move: Move) -> None:
        """Raises EngineError when a run of `move` does not hold its tokens or lies outside the memory."""
        for start, blocks in ((move.source, move.source_blocks), (move.target, move.target_blocks)):
            inside = 0 <= start and 1 <= blocks and start + blocks <= self.num_blocks
            if not inside or not 0 <= move.num_tokens <= blocks * self.block_tokens:
                raise EngineError(
                    f"move of {move.num_tokens} tokens does not fit {blocks} blocks from {start}; {self._name} has "
                    f"{self.num_blocks} blocks of {self.block_tokens} tokens"
                )

    @property
    def _name(self) -> str:
        return "the KV memory" if self.window is None else f"the KV memory of window {self.window}"

    def _where(self, kv: KVRows, offsets: npt.NDArray[np.int64]) -> Slots:
        """Slots of a row's offsets: counted through its blocks as positions are."""
        if not len(offsets):
            return np.empty(0, np.int64)
        if kv.contiguous:
            return kv.blocks[0] * self.block_tokens + offsets
        return np.array(kv.blocks)[offsets // self.block_tokens] * self.block_tokens + offsets % self.block_tokens
