"""What one step's rows do in a layer: store their keys and values, and attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.common.kv_pool import KVPool
from cortexstream.backends.common.kv_store import Slots
from cortexstream.kernels.reference.attention import attention
from cortexstream.plan import KVRows

Floats = npt.NDArray[np.float32]


class Span(NamedTuple):
    """A row's tokens: positions from `start`, at `where` among all of the step's; its past and they lie in `kv`."""

    kv: KVRows
    start: int
    where: slice


class Access(NamedTuple):
    """What a row reads and writes in every layer of one pool."""

    first: int  # position of the first key that it reads
    read: slice | Slots  # with full attention up to its last token; in a ring up to the token before its first
    write: Slots  # of its tokens; in a ring of the last ones, as many as the ring keeps


class StepAttention:
    """The `Attend` of one step (`backends.reference.model`).

    A query sees what the pool gives back, of its own chunk, too: how a prompt is cut changes nothing where a pool
    rounds. `memory` holds what `KVMemory.check_row` checked.
    """

    def __init__(self, memory: KVMemory, spans: Sequence[Span], scale: float) -> None:
        self._memory, self._spans, self._scale = memory, spans, scale
        self._accesses = [
            [_access(pool, span.kv if number == 0 else span.kv.rings[number - 1], span) for span in spans]
            for number, pool in enumerate(memory.pools)
        ]

    def __call__(self, layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        number = self._memory.pool_of[layer]
        pool, accesses = self._memory.pools[number], self._accesses[number]
        rows = list(zip(self._spans, accesses, strict=True))
        if pool.window is not None:
            parts = [self._in_ring(pool, layer, access, span, q, k, v) for span, access in rows]
            return np.concatenate(parts)
        for (_, _, where), access in rows:
            pool.append(layer, access.write, k[where], v[where])
        parts = []
        for (_, start, where), access in rows:  # all have written: one may read what another wrote in this step
            parts.append(attention(q[where], *pool.read(layer, access.read), start, self._scale))
        return np.concatenate(parts)

    def _in_ring(self, pool: KVPool, layer: int, access: Access, span: Span, q: Floats, k: Floats, v: Floats) -> Floats:
        """Attend, then write: a chunk may overwrite what its first queries see. A row reads no ring but its own."""
        k, v = k[span.where], v[span.where]
        past_keys, past_values = pool.read(layer, access.read)
        own_keys, own_values = pool.rounded(layer, k, v)
        keys, values = np.concatenate((past_keys, own_keys)), np.concatenate((past_values, own_values))
        result = attention(q[span.where], keys, values, span.start, self._scale, pool.window, first=access.first)
        kept = len(access.write)
        pool.append(layer, access.write, k[-kept:], v[-kept:])
        return result


def _access(pool: KVPool, kv: KVRows, span: Span) -> Access:
    count = span.where.stop - span.where.start
    end = span.start + count
    if pool.window is None:
        return Access(0, pool.where(kv, 0, end), pool.slots(kv, span.start, count))
    first, kept = max(0, span.start - pool.window + 1), pool.held(count)
    return Access(first, pool.where(kv, first, span.start - first), pool.slots(kv, end - kept, kept))
