"""KV between the pools and host memory: swapped sequences bit for bit, and states that other machines can read.

Everything goes through evaluated temporaries and is waited for, so the pools stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from cortexstream.backend import KVArray, LayerState, PackedKV, kv_misfit
from cortexstream.backends.mlx.plane import Plane
from cortexstream.backends.mlx.pool import RowPool, finish, row_index
from cortexstream.errors import EngineError
from cortexstream.plan import KVRows, MemoryOp, Move, SwapDrop, SwapIn, SwapOut

BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
"""Types of the same width that numpy knows; it has no bfloat16."""


class Copy(NamedTuple):
    """A sequence in host memory: per plane (keys of all layers, then values) its arrays as raw bits."""

    num_tokens: int
    planes: list[list[npt.NDArray[Any]]]


class SwapSpace:
    """The copies of sequences that left the pools for a while, by key."""

    def __init__(self) -> None:
        self._copies: dict[int, Copy] = {}

    def clear(self) -> None:
        self._copies.clear()

    def check(self, pool: RowPool, operations: Sequence[MemoryOp]) -> None:
        """Raises EngineError for the first operation that cannot be done once those before it are; does none."""
        kept = {key: copy.num_tokens for key, copy in self._copies.items()}
        for operation in operations:
            problem = self._problem(pool, kept, operation)
            if problem is not None:
                raise EngineError(f"{operation}: {problem}")

    def run(self, pool: RowPool, operations: Sequence[MemoryOp]) -> float:
        """Do checked operations in order; returns the seconds that swaps took. Nothing may be in flight."""
        seconds = 0.0
        for operation in operations:
            if isinstance(operation, Move):
                pool.move(operation)
                continue
            started = perf_counter()
            if isinstance(operation, SwapOut):
                self._copies[operation.key] = _copy_out(pool, operation.kv, operation.num_tokens)
            elif isinstance(operation, SwapIn):
                _copy_in(pool, operation.kv, self._copies.pop(operation.key))
            else:
                del self._copies[operation.key]
            seconds += perf_counter() - started
        return seconds

    @staticmethod
    def _problem(pool: RowPool, kept: dict[int, int], operation: MemoryOp) -> str | None:
        """Why an operation cannot be done, given the tokens kept under each key, which it updates."""
        if isinstance(operation, Move):
            return pool.move_misfit(operation)
        if isinstance(operation, SwapOut):
            if operation.key in kept:
                return f"a copy is kept under key {operation.key} already"
            kept[operation.key] = operation.num_tokens
            return pool.misfit(operation.kv, operation.num_tokens)
        if operation.key not in kept:
            return f"no copy is kept under key {operation.key}"
        num_tokens = kept.pop(operation.key)
        if isinstance(operation, SwapDrop):
            return None
        if operation.num_tokens != num_tokens:
            return f"the copy kept under key {operation.key} has {num_tokens} tokens"
        return pool.misfit(operation.kv, num_tokens)


def read_kv(pool: RowPool, kv: KVRows, num_tokens: int) -> list[LayerState]:
    """One entry per layer: see `cortexstream.backend.LayerState`. Nothing may be in flight.

    Raises EngineError when the blocks of `kv` do not hold so many tokens.
    """
    _check_fit(pool, kv, num_tokens)
    states = []
    for layer in range(len(pool.layers)):
        rows = _rows_in_order(pool, kv, num_tokens, layer)
        sides = []
        for plane in (pool.keys[layer], pool.values[layer]):
            stored = [part if part.dtype == mx.uint32 else part.astype(mx.float32) for part in plane.take(rows)]
            finish(*stored)
            parts = [np.ascontiguousarray(np.array(part).transpose(1, 0, 2)) for part in stored]
            sides.append(PackedKV(*parts) if len(parts) > 1 else parts[0])
        states.append(LayerState(*sides))
    return states


def write_kv(pool: RowPool, kv: KVRows, num_tokens: int, layers: list[LayerState]) -> None:
    """The inverse of `read_kv`. Nothing may be in flight.

    Raises EngineError, before anything is written, for blocks or arrays that do not fit, and for numbers that are not
    finite in the pools' type: a masked key that is not finite spoils the attention of whoever has the block later.
    """
    _check_fit(pool, kv, num_tokens)
    if len(layers) != len(pool.layers):
        raise EngineError(f"the state has {len(layers)} layers, the model {len(pool.layers)}")
    for layer, state in enumerate(layers):
        tokens = min(num_tokens, pool.shapes[pool.pool_of[layer]].window)
        for name, plane, numbers in (
            ("keys", pool.keys[layer], state.keys),
            ("values", pool.values[layer], state.values),
        ):
            _check_numbers(f"{name} of layer {layer}", plane, tokens, numbers)
    for layer, state in enumerate(layers):
        rows = _rows_in_order(pool, kv, num_tokens, layer)
        for plane, numbers in ((pool.keys[layer], state.keys), (pool.values[layer], state.values)):
            parts = [mx.array(np.ascontiguousarray(part.transpose(1, 0, 2))) for part in _parts(numbers)]
            stored = [part if part.dtype == mx.uint32 else part.astype(plane.dtype) for part in parts]
            finish(*stored)
            plane.store(rows, stored)
            finish(*plane.arrays)


def _check_fit(pool: RowPool, kv: KVRows, num_tokens: int) -> None:
    problem = pool.misfit(kv, num_tokens)
    if problem is not None:
        raise EngineError(f"the keys and values of {num_tokens} tokens: {problem}")


def _check_numbers(what: str, plane: Plane, tokens: int, numbers: KVArray) -> None:
    problem = kv_misfit(numbers, tokens, plane.heads, plane.dim, plane.quantization)
    if problem is not None:
        raise EngineError(f"{what} are {problem}")
    limit = float(mx.finfo(plane.dtype).max)
    floats = [part for part in _parts(numbers) if part.dtype == np.float32]
    if tokens and not all(np.abs(part).max() <= limit for part in floats):
        raise EngineError(f"{what} hold NaN, infinity or a number beyond {limit:.5g}, the largest of {plane.dtype}")


def _parts(numbers: KVArray) -> tuple[npt.NDArray[Any], ...]:
    return tuple(numbers) if isinstance(numbers, PackedKV) else (numbers,)


def _rows_in_order(pool: RowPool, kv: KVRows, num_tokens: int, layer: int) -> mx.array:
    """Row numbers [heads, tokens] of what a layer's queries can see next, in order of position."""
    number = pool.pool_of[layer]
    shape = pool.shapes[number]
    positions = np.arange(max(0, num_tokens - shape.window), num_tokens)
    return row_index(pool.spans(kv)[number], pool.layers[layer].num_kv_heads, positions % shape.slots)


def _slot_rows(pool: RowPool, kv: KVRows, num_tokens: int) -> list[mx.array]:
    """Per layer the row numbers [heads, slots] of all slots that hold something."""
    spans, rows = pool.spans(kv), []
    for layer, spec in enumerate(pool.layers):
        number = pool.pool_of[layer]
        slots = np.arange(min(num_tokens, pool.shapes[number].slots))
        rows.append(row_index(spans[number], spec.num_kv_heads, slots))
    return rows


def _copy_out(pool: RowPool, kv: KVRows, num_tokens: int) -> Copy:
    rows = _slot_rows(pool, kv, num_tokens)
    planes = []
    for plane, index in zip((*pool.keys, *pool.values), (*rows, *rows), strict=True):
        kept = plane.take(index)
        finish(*kept)
        planes.append([np.array(array.view(BITS[array.dtype.size])) for array in kept])
    return Copy(num_tokens, planes)


def _copy_in(pool: RowPool, kv: KVRows, copy: Copy) -> None:
    rows = _slot_rows(pool, kv, copy.num_tokens)
    for plane, index, kept in zip((*pool.keys, *pool.values), (*rows, *rows), copy.planes, strict=True):
        stored = [mx.array(bits).view(array.dtype) for bits, array in zip(kept, plane.arrays, strict=True)]
        finish(*stored)
        plane.store(index, stored)
        finish(*plane.arrays)
