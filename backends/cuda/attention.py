"""Attention of one step over the KV memory, and how transformers' models come to call it.

transformers' attention modules look their function up by name in a registry. Ours is `NAME`. It finds the step that is
being computed in the `Seat` that was put on every attention module at load, so there is no global state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface

from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.common.kv_pool import KVPool
from cortexstream.kernels.torch.attention import attention
from cortexstream.plan import KVRows

NAME = "cortexstream"
SEAT = "_cortexstream_seat"


class Options(NamedTuple):
    """What a model says about one layer's attention."""

    scale: float
    soft_cap: float | None
    sinks: torch.Tensor | None  # [query heads]: logits that take part in the softmax and carry no value


class Attend(Protocol):
    """Store k and v of a layer, and attend over all that is stored: q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] ->
    [T, Hq, Dv]. `window` is the model's sliding window in this layer."""

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, options: Options
    ) -> torch.Tensor: ...


class Seat:
    """Where the modules of one model find the step that is being computed."""

    def __init__(self) -> None:
        self.attend: Attend | None = None


def register() -> None:
    """Make the name known to transformers. Idempotent."""
    AttentionInterface.register(NAME, _from_transformers)


def take_seats(model: torch.nn.Module, seat: Seat) -> None:
    """Put `seat` on every module that may call attention."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            object.__setattr__(module, SEAT, seat)  # not a submodule, not a buffer


def _from_transformers(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""
    seat: Seat = getattr(module, SEAT)
    if seat.attend is None:
        raise RuntimeError("attention was called outside of a step")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: Any = module.layer_idx
    out = seat.attend(layer, q, k, v, sliding_window or None, Options(scale, softcap, s_aux))
    return out[None], None


class Span(NamedTuple):
    """A row's tokens: positions from `start`, at `where` among all of the step's; its past and they lie in `kv`."""

    kv: KVRows
    start: int
    where: slice


class StepAttention:
    """The `Attend` of one step, row by row in torch: what the Triton kernels are held to, and what a CPU runs.

    A query sees what the pool gives back, of its own chunk, too: how a prompt is cut changes nothing where a pool
    rounds. `memory` holds what `KVMemory.check_row` checked.
    """

    def __init__(self, memory: KVMemory, spans: Sequence[Span]) -> None:
        self._memory, self._spans = memory, spans
        self._reads: dict[tuple[int, int], Any] = {}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, options: Options
    ) -> torch.Tensor:
        number = self._memory.pool_of[layer]
        pool = self._memory.pools[number]
        if pool.window is None:
            for row, span in enumerate(self._spans):
                pool.append(layer, self._write(pool, number, row, span), k[span.where], v[span.where])
        parts = []
        for row, span in enumerate(self._spans):
            if pool.window is None:
                keys, values = pool.read(layer, self._read(pool, number, row, span))
                first = 0
            else:
                first, keys, values = self._in_ring(pool, number, layer, row, span, k[span.where], v[span.where])
            parts.append(attention(q[span.where], keys, values, span.start, first, window, *options))
        return torch.cat(parts)

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
        return self._once(number, 2 * row, lambda: pool.slots(self._rows(number, span), *_written(pool, span)))

    def _read(self, pool: KVPool, number: int, row: int, span: Span) -> Any:
        """Slots of the keys: up to a row's last token, or of a ring the window before its first."""

        def find() -> Any:
            rows = self._rows(number, span)
            if pool.window is None:
                return pool.where(rows, 0, span.start + span.where.stop - span.where.start)
            first = max(0, span.start - pool.window + 1)
            return pool.where(rows, first, span.start - first)

        return self._once(number, 2 * row + 1, find)

    def _once(self, number: int, item: int, find: Callable[[], Any]) -> Any:
        """The same for all layers of a pool."""
        if (number, item) not in self._reads:
            self._reads[number, item] = find()
        return self._reads[number, item]


def _written(pool: KVPool, span: Span) -> tuple[int, int]:
    count = span.where.stop - span.where.start
    kept = pool.held(count)
    return span.start + count - kept, kept
