"""A scheduler driven by hand: plans in, scripted tokens out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cortexstream.kv import KVArena
from cortexstream.limits import Limits
from cortexstream.plan import PlanRow, RowResult, StepPlan, StepResult
from cortexstream.request import FinishReason
from cortexstream.scheduler import Scheduler, TokenEvent
from cortexstream.swap import SwapPolicy

Script = Callable[[PlanRow], int]
EOS = 2


def scheduler(
    *, num_blocks: int = 64, block_tokens: int = 4, placement: Literal["run", "paged"] = "run", seqs: int = 4,
    budget: int = 64, context: int = 200, eos: frozenset[int] = frozenset({EOS}), prefix_caching: bool = False,
    swap: SwapPolicy | None = None,
) -> Scheduler:  # fmt: skip
    limits = Limits(1000, context, f"the model's context is {context} tokens", eos, seqs, budget)
    return Scheduler(KVArena(num_blocks, block_tokens, placement, prefix_caching=prefix_caching), limits, swap)


def position(row: PlanRow) -> int:
    """A script: every row draws 100 + the position of its token."""
    return 100 + row.start + len(row.tokens)


def answer(plan: StepPlan | None, script: Script = position) -> StepResult:
    assert plan is not None
    return StepResult(plan.step, tuple(RowResult(r.seq_id, script(r)) for r in plan.rows if r.sample is not None))


def step(it: Scheduler, script: Script = position) -> list[TokenEvent]:
    """One plan, committed at once."""
    return it.commit(answer(it.plan(), script))


def drain(it: Scheduler, script: Script = position, steps: int = 1000) -> list[TokenEvent]:
    """Run to the end with one plan in flight, as the engine does."""
    events: list[TokenEvent] = []
    before: StepPlan | None = None
    for _ in range(steps):
        if not it.has_work:
            return events
        plan = it.plan()
        if before is not None:
            events += it.commit(answer(before, script))
        before = plan
        it.arena.check()
    raise AssertionError("the scheduler makes no progress")


def tokens_of(events: list[TokenEvent], request_id: int) -> list[int]:
    return [e.token for e in events if e.request_id == request_id and e.token is not None]


def finishes(events: list[TokenEvent]) -> dict[int, FinishReason]:
    ends = [(e.request_id, e.finish) for e in events if e.finish is not None]
    assert len(dict(ends)) == len(ends), "a request finished twice"
    return dict(ends)


def ids(plan: StepPlan | None) -> list[int]:
    return [] if plan is None else [row.seq_id for row in plan.rows]
