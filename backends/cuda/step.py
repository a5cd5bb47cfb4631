"""The rows of one step as numbers on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cortexstream.plan import PENDING, KVRows, PlanRow


class Span(NamedTuple):
    """A row's tokens: positions from `start`, at `where` among all of the step's; its past and they lie in `kv`."""

    kv: KVRows
    start: int
    where: slice
    slot: int

    @property
    def num_tokens(self) -> int:
        return int(self.where.stop - self.where.start)


class Inputs(NamedTuple):
    """What a model takes: int64 on the device. T tokens of all rows, one row after the other; after N of them logits
    are wanted."""

    tokens: torch.Tensor  # [T]; PENDING stands for what the token's slot drew last
    slots: torch.Tensor  # [T]: each token's slot
    positions: torch.Tensor  # [T]
    wanted: torch.Tensor  # [N]: indices of the tokens; those that draw, then those that score a prompt


def upload(device: torch.device, *parts: Sequence[int]) -> list[torch.Tensor]:
    """Lists of numbers as int64 tensors on the device, by one copy that does not wait for it."""
    numbers = [number for part in parts for number in part]
    # Pinned memory that is freed is not reused before the copies from it have happened: PyTorch sees to that.
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return list(host.to(device, non_blocking=True).split([len(part) for part in parts]))


def spans_of(rows: Sequence[PlanRow]) -> list[Span]:
    spans, end = [], 0
    for row in rows:
        spans.append(Span(row.kv, row.start, slice(end, end + len(row.tokens)), row.slot))
        end += len(row.tokens)
    return spans


def inputs_of(rows: Sequence[PlanRow], spans: Sequence[Span], device: torch.device) -> Inputs:
    """Without a row that wants any the last token's logits are wanted: a model computes some always."""
    tokens = [token for row in rows for token in row.tokens]
    slots = [span.slot for span in spans for _ in range(span.num_tokens)]
    positions = [span.start + i for span in spans for i in range(span.num_tokens)]
    wanted = [
        span.where.stop - len(row.draws) + i
        for row, span in zip(rows, spans, strict=True)
        for i in range(len(row.draws))
    ]
    for row, span in zip(rows, spans, strict=True):
        if row.score is not None:
            wanted += range(span.where.start, span.where.start + len(row.score.targets))
    return Inputs(*upload(device, tokens, slots, positions, wanted or [len(tokens) - 1]))


class LastDraws:
    """What every slot drew last, on the device, and whose draw that was.

    A row goes on from what its slot drew in the step before: PENDING stands for it. A slot that drew no token, because
    its logits were broken, stays broken for the steps that follow on it.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.broken = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._drew: dict[int, int] = {}  # slot -> sequence, of the last step

    def __len__(self) -> int:
        return len(self.tokens)

    def has(self, slot: int, seq_id: int) -> bool:
        """Did this sequence draw a token here in the last step?"""
        return self._drew.get(slot) == seq_id

    def fill(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """`tokens` [T] with the slots' last draws in place of PENDING."""
        return torch.where(tokens == PENDING, self.tokens[slots], tokens)

    def record(self, rows: Sequence[PlanRow], slots: torch.Tensor, tokens: torch.Tensor, broken: torch.Tensor) -> None:
        """The rows drew `tokens` [N] for their `slots` [N], one each."""
        self.tokens[slots] = tokens
        self.broken[slots] = broken
        self._drew = {row.slot: row.seq_id for row in rows}

    def forget(self) -> None:
        self._drew = {}
