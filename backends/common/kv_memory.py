"""All KV memory of a model: a pool for the layers with full attention and one per window, and the swapped copies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cortexstream.backend import LayerState, ModelInfo, kv_misfit
from cortexstream.backends.common.kv_pool import KVPool
from cortexstream.backends.common.kv_store import MakeStore
from cortexstream.errors import EngineError, OutOfMemoryBudgetError
from cortexstream.plan import KVRows, MemoryOp, Move, SwapDrop, SwapIn, SwapOut


class Kept(NamedTuple):
    """A swapped sequence: raw copies, one list per pool."""

    num_tokens: int
    copies: list[list[list[Any]]]


class KVMemory:
    """Zero-filled pools of `blocks[p]` blocks, pool p as `ModelInfo.pool_of` numbers them.

    Raises EngineError for block counts that do not fit the model, and OutOfMemoryBudgetError when they take more than
    `memory_bytes` or the host refuses them.
    """

    def __init__(
        self, make_store: MakeStore, model: ModelInfo, blocks: tuple[int, ...], block_tokens: int, memory_bytes: int,
        device: str = "the host",
    ) -> None:  # fmt: skip
        windows = model.windows
        if len(blocks) != 1 + len(windows):
            raise EngineError(
                f"{len(blocks) - 1} numbers of ring blocks were given; the model has {len(windows)} windows"
            )
        if min(blocks) < 1:
            raise EngineError(f"{min(blocks)} KV blocks were asked for; at least 1 is needed")
        nbytes = sum(n * block_tokens * size for n, size in zip(blocks, model.pool_bytes_per_token, strict=True))
        asked = f"{_plus(blocks)} KV blocks of {block_tokens} tokens"
        if nbytes > memory_bytes:
            most = _plus(memory_bytes * n // nbytes for n in blocks)
            raise OutOfMemoryBudgetError(
                f"{asked} take {nbytes} bytes; {device} has {memory_bytes}; ask for at most {most} blocks"
            )
        self.block_tokens = block_tokens
        self._layers, self._quantization = model.layers, model.kv_quantization
        self.pool_of = [model.pool_of(layer) for layer in range(len(model.layers))]  # layer -> index of its pool
        self._kept: dict[int, Kept] = {}
        try:
            self.pools = tuple(
                KVPool(
                    make_store,
                    {layer: model.layers[layer] for layer, pool in enumerate(self.pool_of) if pool == number},
                    blocks[number], block_tokens, window, model.kv_quantization,
                )
                for number, window in enumerate((None, *windows))
            )  # fmt: skip
        except MemoryError:
            raise OutOfMemoryBudgetError(
                f"{device} refused {nbytes} bytes for {asked}; ask for fewer, or lower "
                "kv_cache_memory or memory_utilization"
            ) from None

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """One number per pool."""
        return tuple(pool.num_blocks for pool in self.pools)

    def whole(self) -> tuple[KVRows, int]:
        """A row over all blocks of pool 0 and a ring at the start of each other pool, and how many tokens it holds."""
        capacity, rings = self.pools[0].num_blocks * self.block_tokens, []
        for pool in self.pools[1:]:
            full = pool.held(capacity) // self.block_tokens
            if pool.num_blocks < full:
                capacity = pool.num_blocks * self.block_tokens
            rings.append(KVRows(tuple(range(min(full, pool.num_blocks))), True))
        return KVRows(tuple(range(self.pools[0].num_blocks)), True, tuple(rings)), capacity

    def check_row(self, kv: KVRows, start: int, count: int) -> None:
        """Raises EngineError when a row's blocks do not hold positions start .. start + count - 1."""
        for pool, rows in self._rows(kv):
            pool.check(rows, start, count)

    def check_ops(self, ops: Sequence[MemoryOp]) -> None:
        """Raises EngineError for the first of `ops` that could not be executed after the ones before it."""
        kept = {key: copy.num_tokens for key, copy in self._kept.items()}
        for op in ops:
            if isinstance(op, Move):
                if not 0 <= op.pool < len(self.pools):
                    raise EngineError(f"a move is for pool {op.pool}; the pools are 0 to {len(self.pools) - 1}")
                self.pools[op.pool].check_move(op)
            elif isinstance(op, SwapOut):
                if op.key in kept:
                    raise EngineError(f"a copy is kept under key {op.key} already: swap it in or drop it first")
                self.check_row(op.kv, 0, op.num_tokens)
                kept[op.key] = op.num_tokens
            else:
                if op.key not in kept:
                    raise EngineError(f"no copy is kept under key {op.key}; it was never swapped out, or is gone")
                num_tokens = kept.pop(op.key)
                if isinstance(op, SwapIn):
                    if op.num_tokens != num_tokens:
                        raise EngineError(f"the copy under key {op.key} has {num_tokens} tokens, not {op.num_tokens}")
                    self.check_row(op.kv, 0, op.num_tokens)

    def execute(self, ops: Sequence[MemoryOp]) -> float:
        """Do checked `ops` in order; returns the seconds that swaps took."""
        swap_s = 0.0
        for op in ops:
            if isinstance(op, Move):
                self.pools[op.pool].move(op)
            else:
                began_s = time.perf_counter()
                self._swap(op)
                swap_s += time.perf_counter() - began_s
        return swap_s

    def forget(self) -> None:
        """Drop all swapped copies."""
        self._kept.clear()

    def read(self, kv: KVRows, num_tokens: int) -> list[LayerState]:
        """See `Backend.read_kv`. Raises EngineError when the blocks do not hold so many tokens."""
        self.check_row(kv, 0, num_tokens)
        states = []
        for layer, (pool, rows) in enumerate(self._layer_rows(kv)):
            states.append(LayerState(*pool.to_host(layer, pool.slots(rows, *_span(pool, num_tokens)))))
        return states

    def write(self, kv: KVRows, num_tokens: int, layers: Sequence[LayerState]) -> None:
        """See `Backend.write_kv`. Raises EngineError, with nothing written, for arrays or blocks that do not fit."""
        self.check_row(kv, 0, num_tokens)
        if len(layers) != len(self._layers):
            raise EngineError(f"the state has {len(layers)} layers; the model has {len(self._layers)}")
        places = self._layer_rows(kv)
        for number, (layer, state) in enumerate(zip(self._layers, layers, strict=True)):
            _, count = _span(places[number][0], num_tokens)
            for name, array, dim in (("keys", state.keys, layer.key_dim), ("values", state.values, layer.value_dim)):
                problem = kv_misfit(array, count, layer.num_kv_heads, dim, self._quantization)
                if problem is not None:
                    raise EngineError(f"{name} of layer {number}, {num_tokens} tokens, are {problem}")
        for number, (state, (pool, rows)) in enumerate(zip(layers, places, strict=True)):
            pool.from_host(number, pool.slots(rows, *_span(pool, num_tokens)), *state)

    def _swap(self, op: SwapOut | SwapIn | SwapDrop) -> None:
        if isinstance(op, SwapOut):
            self._kept[op.key] = Kept(
                op.num_tokens, [pool.take(rows, op.num_tokens) for pool, rows in self._rows(op.kv)]
            )
            return
        kept = self._kept.pop(op.key)
        if isinstance(op, SwapIn):
            for (pool, rows), copies in zip(self._rows(op.kv), kept.copies, strict=True):
                pool.put(rows, op.num_tokens, copies)

    def _rows(self, kv: KVRows) -> list[tuple[KVPool, KVRows]]:
        """A row's blocks, pool by pool."""
        if len(kv.rings) != len(self.pools) - 1:
            raise EngineError(f"a row has {len(kv.rings)} rings; the model has {len(self.pools) - 1} windows")
        return list(zip(self.pools, (kv, *kv.rings), strict=True))

    def _layer_rows(self, kv: KVRows) -> list[tuple[KVPool, KVRows]]:
        """A row's blocks, layer by layer."""
        rows = self._rows(kv)
        return [rows[number] for number in self.pool_of]


def _span(pool: KVPool, num_tokens: int) -> tuple[int, int]:
    """(first, count) of the positions that a state of `num_tokens` tokens has: all, or the last window."""
    count = num_tokens if pool.window is None else min(num_tokens, pool.window)
    return num_tokens - count, count


def _plus(numbers: Iterable[int]) -> str:
    return " + ".join(map(str, numbers))
