"""Attention of one step in torch, row by row: what the Triton kernels are held to, and what a CPU runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.common.kv_pool import KVPool
from cortexstream.backends.cuda.attention import Attend, Options, Rotary
from cortexstream.backends.cuda.step import Span
from cortexstream.kernels.torch.attention import attention
from cortexstream.kernels.torch.rms_norm import rms_norm
from cortexstream.plan import KVRows

Attention = Callable[..., torch.Tensor]
"""`kernels.torch.attention.attention`, or what computes the same."""


StepAttention = Callable[[KVMemory, Sequence[Span]], Attend]


class TorchAttention:
    """The `Attend` of one step.

    A query sees what the pool gives back, of its own chunk, too: how a prompt is cut changes nothing where a pool
    rounds. `memory` holds what `KVMemory.check_row` checked.
    """

    def __init__(self, memory: KVMemory, spans: Sequence[Span], attention: Attention = attention) -> None:
        self._memory, self._spans, self._attention = memory, spans, attention
        self._reads: dict[tuple[int, int], Any] = {}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        window: int | None, options: Options,
    ) -> torch.Tensor:  # fmt: skip
        if rotary is not None:
            q, k = finish(q, k, rotary)
        number = self._memory.pool_of[layer]
        pool = self._memory.pools[number]
        if pool.window is None:
            for row, span in enumerate(self._spans):
                pool.append(layer, self._write(pool, number, row, span), k[span.where], v[span.where])
        return torch.cat(self._attend(pool, number, layer, q, k, v, window, options))

    def _attend(
        self, pool: KVPool, number: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        window: int | None, options: Options,
    ) -> list[torch.Tensor]:  # fmt: skip
        """What the rows attend to, one after the other; with full attention their keys and values are stored."""
        rows = range(len(self._spans))
        return [self._attend_row(pool, number, layer, row, q, k, v, window, options) for row in rows]

    def _attend_row(
        self, pool: KVPool, number: int, layer: int, row: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        window: int | None, options: Options,
    ) -> torch.Tensor:  # fmt: skip
        span = self._spans[row]
        if pool.window is None:
            keys, values = pool.read(layer, self._read(pool, number, row, span))
            first = 0
        else:
            first, keys, values = self._in_ring(pool, number, layer, row, span, k[span.where], v[span.where])
        return self._attention(q[span.where], keys, values, span.start, first, window, *options)

    def _in_ring(
        self, pool: KVPool, number: int, layer: int, row: int, span: Span, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[int, torch.Tensor, torch.Tensor]:
        """The window before a chunk and the chunk; then write: a chunk may overwrite what its first queries see."""
        past_keys, past_values = pool.read(layer, self._read(pool, number, row, span))
        own_keys, own_values = pool.rounded(layer, k, v)
        slots = self._write(pool, number, row, span)
        keys, values = torch.cat((past_keys, own_keys)), torch.cat((past_values, own_values))
        pool.append(layer, slots, k[-len(slots) :], v[-len(slots) :])
        return span.start - len(past_keys), keys, values

    def _rows(self, number: int, span: Span) -> KVRows:
        return span.kv if number == 0 else span.kv.rings[number - 1]

    def _write(self, pool: KVPool, number: int, row: int, span: Span) -> Any:
        """Slots of a row's tokens; of a ring those of the last ones, as many as it keeps."""
        kept = pool.held(span.num_tokens)
        return self._once(
            number, 2 * row, lambda: pool.slots(self._rows(number, span), span.start + span.num_tokens - kept, kept)
        )

    def _read(self, pool: KVPool, number: int, row: int, span: Span) -> Any:
        """Slots of the keys: up to a row's last token, or of a ring the window before its first."""

        def find() -> Any:
            rows = self._rows(number, span)
            if pool.window is None:
                return pool.where(rows, 0, span.start + span.num_tokens)
            first = max(0, span.start - pool.window + 1)
            return pool.where(rows, first, span.start - first)

        return self._once(number, 2 * row + 1, find)

    def _once(self, number: int, item: int, find: Callable[[], Any]) -> Any:
        """The same for all layers of a pool."""
        if (number, item) not in self._reads:
            self._reads[number, item] = find()
        return self._reads[number, item]


def finish(q: torch.Tensor, k: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, Hq, D] and k [T, Hkv, D] as `rotary` leaves them, of their dtypes; each step is rounded, as in
    transformers' modules."""
    if rotary.norm is not None:
        q_weight, k_weight, eps, unit_offset = rotary.norm
        q, k = rms_norm(q, q_weight, eps, unit_offset=unit_offset), rms_norm(k, k_weight, eps, unit_offset=unit_offset)
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def attend_alone(
    layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None, window: int | None,
    options: Options,
) -> torch.Tensor:  # fmt: skip
    """The `Attend` of a row without a past, whose keys and values are kept nowhere."""
    if rotary is not None:
        q, k = finish(q, k, rotary)
    return attention(q, k, v, 0, 0, window, *options)
