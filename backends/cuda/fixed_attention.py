"""Attention of one step in torch with bits that do not depend on the step: see `kernels.torch.fixed_attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.common.kv_pool import KVPool
from cortexstream.backends.cuda.attention import Options
from cortexstream.backends.cuda.step import Span
from cortexstream.backends.cuda.torch_attention import TorchAttention
from cortexstream.kernels.torch.fixed_attention import SPLIT, FixedAttention
from cortexstream.kernels.torch.fixed_decode import Pieces, agreeing_batches, decode, pieces_of

NUMBERS_AT_ONCE = 1 << 22  # of the keys that are gathered, and of the values


class FixedStepAttention(TorchAttention):
    """The `Attend` of one step. Rows of one token are computed together, which changes no bit and saves launches."""

    def __init__(self, memory: KVMemory, spans: Sequence[Span], fixed: FixedAttention) -> None:
        super().__init__(memory, spans, fixed)
        self._fixed = fixed
        self._single = [row for row, span in enumerate(spans) if span.num_tokens == 1]

    def _attend(
        self, pool: KVPool, number: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        window: int | None, options: Options,
    ) -> list[torch.Tensor]:  # fmt: skip
        height = self._fixed.decode_height(q.shape[1] // k.shape[1])
        batches = () if height is None else agreeing_batches(k.shape[1], k.shape[2], v.shape[2], height, q.device)
        if height is None or not batches or len(self._single) < 2:
            return super()._attend(pool, number, layer, q, k, v, window, options)
        if pool.window is not None:  # a token takes the place of one that its own query no longer sees
            for row in self._single:
                span = self._spans[row]
                pool.append(layer, self._write(pool, number, row, span), k[span.where], v[span.where])
        found: dict[int, torch.Tensor] = {}
        for rows, pieces in self._groups(pool, number, k.shape[1] * max(k.shape[2], v.shape[2]), q.device):
            queries = q[[self._spans[row].where.start for row in rows]]
            keys, values = pool.read(layer, pieces.slots)
            out = decode(queries, keys, values, pieces, height, batches, *options)
            found |= dict(zip(rows, out.split(1), strict=True))
        return [
            found[row] if row in found else self._attend_row(pool, number, layer, row, q, k, v, window, options)
            for row in range(len(self._spans))
        ]

    def _groups(
        self, pool: KVPool, number: int, width: int, device: torch.device
    ) -> list[tuple[list[int], Pieces]]:  # fmt: skip
        """Rows of one token as they are computed together, and where their keys lie; the same for layers alike."""

        def find() -> list[tuple[list[int], Pieces]]:
            groups: list[list[int]] = []
            room = 0
            for row in self._single:
                seen = self._spans[row].start + 1 if pool.window is None else pool.window
                needed = (seen // SPLIT + 2) * SPLIT * width
                if needed > room:
                    groups.append([])
                    room = NUMBERS_AT_ONCE
                groups[-1].append(row)
                room -= needed
            return [(rows, self._pieces(pool, number, rows, device)) for rows in groups]

        found: list[tuple[list[int], Pieces]] = self._once(number, -width, find)
        return found

    def _pieces(self, pool: KVPool, number: int, rows: Sequence[int], device: torch.device) -> Pieces:
        ends = [self._spans[row].start + 1 for row in rows]
        first = [0 if pool.window is None else max(0, end - pool.window) for end in ends]
        slots = [
            pool.slots(self._rows(number, self._spans[row]), begin, end - begin)
            for row, begin, end in zip(rows, first, ends, strict=True)
        ]
        return pieces_of(slots, first, device)
