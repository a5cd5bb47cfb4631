"""One forward pass over one token per row, by the fastest way that the model has proved to allow."""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from cortexstream.backends.mlx.cache import Batch, Chunk
from cortexstream.backends.mlx.pool import RowPool, finish
from cortexstream.plan import PlanRow

Mode = Literal["ragged", "gathered", "single"]
"""Attention over separate views of the pools, over padded copies, or one row at a time."""


class Forward:
    """Calls the model: builds the graph and, but for batches in mode "single", computes nothing."""

    def __init__(self, model: nn.Module, mode: Mode, grouped: bool, ring_step: int = 0) -> None:
        self.model: Any = model
        self.mode, self.grouped, self.ring_step = mode, grouped, ring_step

    def prefill(self, chunk: Chunk, tokens: tuple[int, ...]) -> mx.array:
        """Add to the pool's graph what writes the KV of a prompt chunk. The logits [tokens, vocabulary] are computed if
        somebody asks for them."""
        logits: mx.array = self.model(mx.array([tokens], dtype=mx.int32), cache=chunk.caches())
        return logits[0]

    def decode(self, pool: RowPool, rows: list[PlanRow], positions: list[int], tokens: mx.array) -> mx.array:
        """Logits [rows, vocabulary] of `tokens` int32 [rows] at `positions`, whose KV is written on the way."""
        if len(rows) == 1:
            only: mx.array = self.model(tokens[:, None], cache=Chunk(pool, rows[0].kv, positions[0], 1).caches())[:, -1]
            return only
        if self.mode == "single":
            return self._one_by_one(pool, rows, positions, tokens)
        batch = Batch(pool, [row.kv for row in rows], positions, self.mode == "ragged", self.grouped)
        result: mx.array = self.model(tokens[:, None], cache=batch.caches())[:, -1]
        return result

    def _one_by_one(self, pool: RowPool, rows: list[PlanRow], positions: list[int], tokens: mx.array) -> mx.array:
        """A forward pass per row, each finished before the next writes: two writes with a read between, in one
        evaluation, would copy the pools."""
        mx.synchronize()
        logits = []
        for number, (row, position) in enumerate(zip(rows, positions, strict=True)):
            chunk = Chunk(pool, row.kv, position, 1)
            logits.append(self.model(tokens[number : number + 1, None], cache=chunk.caches())[:, -1])
            finish(logits[-1], *pool.arrays)
        return mx.concatenate(logits)
