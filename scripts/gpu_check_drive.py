"""Sequences on a backend without an engine around it: prompts go in by chunks, then steps decode with one in flight."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any

import torch

from cortexstream.plan import PENDING, KVRows, PlanRow, SampleSpec, StepPlan

Guard = Callable[[], AbstractContextManager[object]]
STEPS = count(1)  # numbers of steps must rise, whoever drives a backend


@dataclass
class Row:
    """A sequence. `length` positions are computed; `output` is what came back; `waits` if its last draw has not."""

    number: int
    kv: KVRows
    spec: SampleSpec
    length: int = 0
    output: list[int] = field(default_factory=list)
    waits: bool = False

    def decoding(self) -> PlanRow:
        last = PENDING if self.waits else self.output[-1]
        spec = self.spec
        if spec.penalised:
            spec = spec._replace(output_tokens=(*self.output, *((PENDING,) if self.waits else ())))
        return PlanRow(self.number, self.number, (last,), self.length, self.kv, spec)


class Drive:
    """Rows of equal capacity on a backend whose KV memory was allocated; a row's blocks lie in random order."""

    def __init__(self, backend: Any, specs: Sequence[SampleSpec], capacity: int) -> None:
        self._backend = backend
        each = -(-capacity // backend.info.block_tokens)
        blocks = list(range(each * len(specs)))
        random.Random(0).shuffle(blocks)
        self.rows = [
            Row(number, KVRows(tuple(blocks[number * each : (number + 1) * each]), False), spec)
            for number, spec in enumerate(specs)
        ]

    def prefill(self, prompts: Sequence[Sequence[int]], most_tokens: int) -> None:
        """Compute a prompt per row, with at most so many tokens in a step; every row draws its first token."""
        for row in self.rows:
            row.length, row.output, row.waits = 0, [], False
        waiting = [(row, tuple(prompt)) for row, prompt in zip(self.rows, prompts, strict=True)]
        while waiting:
            room, rows, drawing = most_tokens, [], []
            while waiting and room:
                row, prompt = waiting[0]
                part = prompt[row.length : row.length + room]
                ends = row.length + len(part) == len(prompt)
                rows.append(PlanRow(row.number, row.number, part, row.length, row.kv, row.spec if ends else None))
                row.length, room = row.length + len(part), room - len(part)
                if ends:
                    waiting.pop(0)
                    drawing.append(row)
            self._collect(self._submit(rows), drawing)

    def decode(self, rows: Sequence[Row], steps: int, guard: Guard = nullcontext) -> list[float]:
        """Seconds of each step: submit it, within `guard`, then collect the one before."""
        before: Any = None
        times = []
        for _ in range(steps):
            began = perf_counter()
            planned = [row.decoding() for row in rows]
            with guard():
                ticket = self._submit(planned)
            if before is not None:
                self._collect(before, rows)
            for row in rows:
                row.length, row.waits = row.length + 1, True
            before = ticket
            times.append(perf_counter() - began)
        self._collect(before, rows)
        return times

    def _submit(self, rows: Sequence[PlanRow]) -> Any:
        return self._backend.submit(StepPlan(next(STEPS), tuple(rows)))

    def _collect(self, ticket: Any, drawing: Sequence[Row]) -> None:
        result = self._backend.collect(ticket)
        for row, drawn in zip(drawing, result.rows, strict=True):
            if drawn.error is not None:
                raise RuntimeError(f"row {row.number}: {drawn.error}")
            row.output.append(drawn.token)
            row.waits = False


@contextmanager
def forbid_waiting() -> Iterator[None]:
    """Within, whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def random_prompts(number: int, length: int, vocab_size: int, seed: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(number)]


def numbered(specs: Sequence[SampleSpec]) -> Iterator[SampleSpec]:
    """The same with a seed of its own each."""
    for number, spec in enumerate(specs):
        yield spec._replace(seed=1000 + number)
