"""The KV memory: per layer one pool of keys and one of values, a slot per token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cortexstream.backend import LayerKV
from cortexstream.errors import EngineError, OutOfMemoryBudgetError
from cortexstream.kernels.reference.kv_append import kv_append
from cortexstream.plan import KVRows, Move

Floats = npt.NDArray[np.float32]


class KVPool:
    """`num_blocks` blocks of `block_tokens` slots; the token in block b at offset o has slot b * block_tokens + o.

    Token-major, float32 [slots, heads, dim]: a run's layout does not depend on its capacity, so one that grew in place
    needs no move. Raises OutOfMemoryBudgetError when the host has less than `memory_bytes` asks for.
    """

    def __init__(self, layers: tuple[LayerKV, ...], num_blocks: int, block_tokens: int, memory_bytes: int) -> None:
        if num_blocks < 1:
            raise EngineError(f"{num_blocks} KV blocks were asked for; at least 1 is needed")
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        slots = num_blocks * block_tokens
        self.nbytes = sum(4 * slots * layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
        if self.nbytes > memory_bytes:
            raise OutOfMemoryBudgetError(
                f"{num_blocks} KV blocks of {block_tokens} tokens take {self.nbytes} bytes; the host has "
                f"{memory_bytes}; ask for at most {memory_bytes * num_blocks // self.nbytes} blocks"
            )
        try:
            self._keys = [_touched_zeros(slots, layer.num_kv_heads, layer.key_dim) for layer in layers]
            self._values = [_touched_zeros(slots, layer.num_kv_heads, layer.value_dim) for layer in layers]
        except MemoryError:
            raise OutOfMemoryBudgetError(f"the host refused {self.nbytes} bytes for {num_blocks} KV blocks") from None

    def slots(self, kv: KVRows, start: int, count: int) -> npt.NDArray[np.int64]:
        """The slots of positions start .. start + count - 1. Raises EngineError when the blocks do not hold them."""
        if not kv.blocks or start < 0 or start + count > len(kv.blocks) * self.block_tokens:
            raise EngineError(
                f"positions {start} to {start + count - 1} are outside {len(kv.blocks)} blocks of {self.block_tokens} "
                f"tokens"
            )
        outside = [block for block in kv.blocks if not 0 <= block < self.num_blocks]
        if outside:
            raise EngineError(f"block {outside[0]} is outside the {self.num_blocks} blocks of the KV memory")
        positions = np.arange(start, start + count)
        if kv.contiguous:
            return kv.blocks[0] * self.block_tokens + positions
        return np.array(kv.blocks)[positions // self.block_tokens] * self.block_tokens + positions % self.block_tokens

    def append(self, layer: int, slots: npt.NDArray[np.int64], k: Floats, v: Floats) -> None:
        """Write k and v [T, heads, dim] into `slots` [T]."""
        kv_append(self._keys[layer], slots, k)
        kv_append(self._values[layer], slots, v)

    def read(self, layer: int, kv: KVRows, length: int) -> tuple[Floats, Floats]:
        """Keys and values of positions 0 .. length - 1, [length, heads, dim]; views if the row is contiguous."""
        slots = self.slots(kv, 0, length)
        where = slice(slots[0], slots[-1] + 1) if kv.contiguous else slots
        return self._keys[layer][where], self._values[layer][where]

    def move(self, move: Move) -> None:
        """Copy a run's first `num_tokens` slots to where the target begins, as if through a temporary."""
        source, target = move.source * self.block_tokens, move.target * self.block_tokens
        if source == target:
            return
        for pool in (*self._keys, *self._values):
            pool[target : target + move.num_tokens] = pool[source : source + move.num_tokens].copy()

    def check_move(self, move: Move) -> None:
        """Raises EngineError when a run of `move` does not hold its tokens or lies outside the memory."""
        for start, blocks in ((move.source, move.source_blocks), (move.target, move.target_blocks)):
            inside = 0 <= start and 1 <= blocks and start + blocks <= self.num_blocks
            if not inside or not 0 <= move.num_tokens <= blocks * self.block_tokens:
                raise EngineError(
                    f"move of {move.num_tokens} tokens does not fit {blocks} blocks from {start}; the KV memory has "
                    f"{self.num_blocks} blocks of {self.block_tokens} tokens"
                )


def _touched_zeros(*shape: int) -> Floats:
    """Zeros whose memory is there now: `np.zeros` would only promise it."""
    zeros = np.empty(shape, np.float32)
    zeros.fill(0)
    return zeros
