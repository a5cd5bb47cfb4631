"""Sequences on a backend without an engine around it: prompts go in by chunks, then steps decode with one in flight."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any

import torch

from cortexstream.plan import PENDING, KVRows, PlanRow, RowResult, SampleSpec, Score, StepPlan, StepResult

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
        spec = self._behind((PENDING,) if self.waits else ())
        return PlanRow(self.number, self.number, (last,), self.length, self.kv, spec)

    def guessing(self, guesses: tuple[int, ...]) -> PlanRow:
        """A draw after the last token, and one after each guess at what follows it."""
        *drafts, last = (self._behind(guesses[:count]) for count in range(len(guesses) + 1))
        tokens = (self.output[-1], *guesses)
        return PlanRow(self.number, self.number, tokens, self.length, self.kv, last, tuple(drafts))

    def keep(self, guesses: Sequence[int], drawn: Sequence[RowResult]) -> None:
        """Of draws after the last token and after each guess those that count: up to the first that was not guessed."""
        for number, one in enumerate(drawn):
            self.output.append(one.token)
            self.length += 1
            if one.token not in guesses[number : number + 1]:
                return

    def _behind(self, more: tuple[int, ...]) -> SampleSpec:
        """How to draw behind the output and what follows it."""
        return self.spec._replace(output_tokens=(*self.output, *more)) if self.spec.penalised else self.spec


class Drive:
    """Rows of equal capacity on a backend whose KV memory was allocated; a row's blocks lie in random order."""

    def __init__(self, backend: Any, specs: Sequence[SampleSpec], capacity: int) -> None:
        self._backend = backend
        self.drawn = 0  # draws that came back
        self._plans: deque[StepPlan] = deque()  # in flight
        each = -(-capacity // backend.info.block_tokens)
        blocks = list(range(each * len(specs)))
        random.Random(0).shuffle(blocks)
        self.rows = [
            Row(number, KVRows(tuple(blocks[number * each : (number + 1) * each]), False), spec)
            for number, spec in enumerate(specs)
        ]

    def prefill(
        self, prompts: Sequence[Sequence[int]], most_tokens: int, scored: int | None = None, guard: Guard = nullcontext
    ) -> int:
        """Compute a prompt per row, with at most so many tokens in a step; every row draws its first token. With
        `scored` the steps tell the prompts' logprobs, and so many of the likeliest. Returns the number of steps."""
        for row in self.rows:
            row.length, row.output, row.waits = 0, [], False
        waiting = [(row, tuple(prompt)) for row, prompt in zip(self.rows, prompts, strict=True)]
        steps = 0
        while waiting:
            room, rows, drawing = most_tokens, [], []
            while waiting and room:
                row, prompt = waiting[0]
                part = prompt[row.length : row.length + room]
                ends = row.length + len(part) == len(prompt)
                spec, targets = row.spec if ends else None, prompt[row.length + 1 : row.length + len(part) + 1]
                score = Score(targets, scored) if scored is not None and targets else None
                rows.append(PlanRow(row.number, row.number, part, row.length, row.kv, spec, (), score))
                row.length, room = row.length + len(part), room - len(part)
                if ends:
                    waiting.pop(0)
                    drawing.append(row)
            with guard():
                ticket = self._submit(rows)
            self._collect(ticket, drawing)
            steps += 1
        return steps

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

    def guess(self, rows: Sequence[Row], steps: int, count: int, guard: Guard = nullcontext) -> None:
        """Steps in which each row draws behind `count` guesses, too: that its last token is repeated. A step is
        collected before the next one is planned, as no row may go on from a draw that is not known."""
        for _ in range(steps):
            planned = [row.guessing((row.output[-1],) * count) for row in rows]
            with guard():
                ticket = self._submit(planned)
            drawn = self._collected(ticket).rows
            for place, row in enumerate(rows):
                row.keep(planned[place].tokens[1:], drawn[place * (count + 1) : (place + 1) * (count + 1)])

    def _submit(self, rows: Sequence[PlanRow]) -> Any:
        plan = StepPlan(next(STEPS), tuple(rows))
        ticket = self._backend.submit(plan)
        self._plans.append(plan)
        return ticket

    def _collect(self, ticket: Any, drawing: Sequence[Row]) -> None:
        for row, drawn in zip(drawing, self._collected(ticket).rows, strict=True):
            row.output.append(drawn.token)
            row.waits = False

    def _collected(self, ticket: Any) -> StepResult:
        """The result of the oldest step in flight. Raises RuntimeError if a row failed, or lacks what it asked for."""
        result: StepResult = self._backend.collect(ticket)
        rows = self._plans.popleft().rows
        draws = [(row.seq_id, spec) for row in rows for spec in row.draws]
        for (number, spec), drawn in zip(draws, result.rows, strict=True):
            if drawn.error is not None:
                raise RuntimeError(f"row {number}: {drawn.error}")
            if (spec.logprobs is None) != (drawn.logprob is None) or spec.metadata != (drawn.metadata is not None):
                raise RuntimeError(f"row {number}: a draw lacks what it asked for, or tells more")
        told = [len(scores.scores) for scores in result.scores]
        if told != [len(row.score.targets) for row in rows if row.score is not None]:
            raise RuntimeError(f"a step scored {told} tokens of its prompts, which are not as many as it asked for")
        self.drawn += len(draws)
        return result


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
