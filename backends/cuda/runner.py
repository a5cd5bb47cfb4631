"""A step's forward pass: rows in, logits out. Which attention it goes through, and whether a CUDA graph replays it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.cuda.attention import Attend
from cortexstream.backends.cuda.kernels import Kernels
from cortexstream.backends.cuda.models import LoadedModel
from cortexstream.backends.cuda.probe import forward
from cortexstream.backends.cuda.step import LastDraws, Span, inputs_of, spans_of
from cortexstream.plan import PlanRow


class Runner:
    """Runs steps whose rows were checked. `last` is what the slots drew."""

    def __init__(
        self, loaded: LoadedModel, memory: KVMemory, last: LastDraws, kernels: Kernels,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._loaded, self._memory, self._last, self._device = loaded, memory, last, device
        self._decode: Any = None  # a DecodeStep: its module needs triton
        if kernels.triton:
            from cortexstream.backends.cuda.block_tables import BlockTables
            from cortexstream.backends.cuda.decode import DecodeStep

            self._tables = BlockTables(memory, len(last), loaded.max_context_tokens, device)
            self._decode = DecodeStep(loaded, memory, self._tables, last, kernels.graphs, device)

    @property
    def notes(self) -> tuple[str, ...]:
        """Fallbacks in force."""
        return () if self._decode is None else self._decode.notes

    def logits(self, rows: Sequence[PlanRow]) -> torch.Tensor:
        """float32 [N, vocabulary]: for all draws in the order of the rows, then for all targets of scores; of the last
        token if there is neither."""
        if self._decode is None:
            spans = spans_of(rows)
            return self._flat(rows, spans, self._loaded.attention(self._memory, spans))
        self._tables.update((row.slot, row.kv) for row in rows)
        if all(len(row.tokens) == 1 and row.sample is not None and row.score is None for row in rows):
            logits: torch.Tensor = self._decode.logits(rows)
            return logits
        from cortexstream.backends.cuda.triton_attention import MixedAttention

        spans = spans_of(rows)
        return self._flat(rows, spans, MixedAttention(self._memory, spans, self._tables, self._device))

    def capture(self, batch: int) -> None:
        """Make what a step of `batch` decoding rows needs, if graphs are used."""
        if self._decode is not None:
            self._decode.capture(batch)

    def _flat(self, rows: Sequence[PlanRow], spans: Sequence[Span], attend: Attend) -> torch.Tensor:
        """All tokens of all rows in one pass."""
        inputs = inputs_of(rows, spans, self._device)
        tokens = self._last.fill(inputs.tokens, inputs.slots)
        with self._loaded.seat.taken(attend):
            return forward(self._loaded.model, tokens, inputs.positions, inputs.wanted).float()
