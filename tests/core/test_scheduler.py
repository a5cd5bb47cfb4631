"""Who runs when: F07, F64, F65, F68, F70, and every way to misuse the scheduler."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from cortexstream.errors import EngineError, InvalidRequestError
from cortexstream.plan import PENDING, RowResult, StepResult
from cortexstream.request import FinishReason
from cortexstream.scheduler import TokenEvent
from cortexstream.sequence import SequenceState
from tests.core.steps import EOS, Script, answer, drain, finishes, ids, scheduler, step, tokens_of
from tests.core.support import request


def test_f64_queries() -> None:
    it = scheduler(seqs=2)
    assert not it.has_work and it.plan() is None and it.get(0) is None
    for number in range(3):
        it.add(request(number, 3, max_tokens=2))
    assert (it.num_waiting, it.num_running, it.has_work) == (3, 0, True)
    pending = it.get(2)
    assert pending is not None and pending.state is SequenceState.WAITING  # visible while it waits
    plan = it.plan()
    assert (it.num_waiting, it.num_running) == (1, 2) and ids(plan) == [0, 1]
    it.commit(answer(plan))
    events = step(it)
    assert finishes(events) == {0: FinishReason.LENGTH, 1: FinishReason.LENGTH}
    assert it.get(0) is None and it.get(2) is pending and it.has_work
    drain(it)
    assert not it.has_work and it.plan() is None and it.arena.used_blocks == 0


def test_f64_duplicates_are_refused() -> None:
    it = scheduler()
    it.add(request(5, 3, max_tokens=1))
    with pytest.raises(InvalidRequestError, match=r"^request_id: 5 is in use by a request that is not finished"):
        it.add(request(5, 4))
    assert it.num_waiting == 1
    drain(it)
    it.add(request(5, 3, max_tokens=1))  # finished: the id is free again
    assert finishes(drain(it)) == {5: FinishReason.LENGTH}


@pytest.mark.parametrize("placement", ["run", "paged"])
def test_f64_first_come_first_served(placement: Literal["run", "paged"]) -> None:
    it = scheduler(seqs=3, placement=placement)
    for number in range(9):
        it.add(request(number, 1 + number % 4, max_tokens=3))
    first_step: dict[int, int] = {}
    while it.has_work:
        plan = it.plan()
        assert plan is not None
        for number in ids(plan):
            first_step.setdefault(number, plan.step)
        it.commit(answer(plan))
    order = [first_step[number] for number in range(9)]
    assert order == sorted(order) and order[2] < order[3] and order[5] < order[6]


def test_f64_nobody_overtakes_a_request_that_waits_for_memory() -> None:
    it = scheduler(num_blocks=8)
    it.add(request(0, 16, max_tokens=4))
    it.add(request(1, 24, max_tokens=1))  # six blocks: must wait for the first
    it.add(request(2, 1, max_tokens=1))  # would fit at once
    for _ in range(4):
        plan = it.plan()
        assert ids(plan) == [0] and it.num_waiting == 2
        it.commit(answer(plan))
    assert sorted(ids(it.plan())) == [1, 2]


def test_f65_a_request_joins_the_next_step_and_short_ones_finish_first() -> None:
    it = scheduler()
    it.add(request(0, 4, max_tokens=40))
    for _ in range(5):
        step(it)
    it.add(request(1, 4, max_tokens=3))
    plan = it.plan()
    assert plan is not None and [(r.seq_id, len(r.tokens)) for r in plan.rows] == [(0, 1), (1, 4)]
    events = it.commit(answer(plan)) + step(it) + step(it)
    assert finishes(events) == {1: FinishReason.LENGTH}
    assert len(tokens_of(events, 0)) == 3 and it.num_running == 1
    assert finishes(drain(it)) == {0: FinishReason.LENGTH}


def test_f65_many_rows() -> None:
    it = scheduler(num_blocks=512, seqs=48, budget=200)
    for number in range(48):
        it.add(request(number, 4, max_tokens=5))
    assert ids(it.plan()) == list(range(48))
    it.commit(StepResult(1, tuple(RowResult(i, 9) for i in range(48))))
    plan = it.plan()
    assert plan is not None and len(plan.rows) == 48 and plan.num_tokens == 48
    assert sorted(row.slot for row in plan.rows) == list(range(48))
    it.commit(answer(plan))
    assert set(finishes(drain(it)).values()) == {FinishReason.LENGTH}


def test_f68_no_step_exceeds_the_budget_and_long_prompts_complete() -> None:
    it = scheduler(num_blocks=1400, budget=96, context=6000, seqs=4)
    it.add(request(0, [7] * 5000, max_tokens=3))
    it.add(request(1, 200, max_tokens=60))
    chunks: list[int] = []
    events: list[TokenEvent] = []
    while it.has_work:
        plan = it.plan()
        assert plan is not None and 0 < plan.num_tokens <= 96
        for row in plan.rows:
            if row.seq_id == 0:
                assert (row.sample is None) == (row.start + len(row.tokens) < 5000)
                chunks.append(len(row.tokens))
        events += it.commit(answer(plan))
    assert chunks == [96] * 52 + [8, 1, 1]
    assert tokens_of(events, 0) == [5100, 5101, 5102]
    assert tokens_of(events, 1) == [100 + p for p in range(200, 260)]


def test_f68_decoding_goes_before_prefill_and_the_oldest_prompt_first() -> None:
    it = scheduler(budget=10)
    for number, length in enumerate((3, 20, 20)):
        it.add(request(number, length, max_tokens=9))
    sizes = []
    for _ in range(4):
        plan = it.plan()
        assert plan is not None
        sizes.append({row.seq_id: len(row.tokens) for row in plan.rows})
        it.commit(answer(plan))
    assert sizes == [{0: 3, 1: 7}, {0: 1, 1: 9}, {0: 1, 1: 4, 2: 5}, {0: 1, 1: 1, 2: 8}]


def test_f68_a_budget_of_one_token_serves_everybody() -> None:
    it = scheduler(budget=1)
    for number in range(3):
        it.add(request(number, 5, max_tokens=4))
    while it.has_work:
        plan = it.plan()
        assert plan is not None and plan.num_tokens == 1
        it.commit(answer(plan))
    assert it.arena.used_blocks == 0


def scripted(values: list[int]) -> Script:
    """Output token i of any request is values[i]; prompts have three tokens."""
    return lambda row: values[row.start + len(row.tokens) - 3]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("sampling", "values", "want", "reason"),
    [
        ({"max_tokens": 5}, [9, 8, EOS, 7, 7, 7], [9, 8, EOS], FinishReason.STOP),
        ({"max_tokens": 5, "stop_token_ids": (8,)}, [9, 8, EOS, 7, 7, 7], [9, 8], FinishReason.STOP),
        ({"max_tokens": 4}, [9, 9, 9, 9, 9, 9], [9, 9, 9, 9], FinishReason.LENGTH),
        ({"max_tokens": 1}, [9, 9], [9], FinishReason.LENGTH),
        ({"max_tokens": 3}, [9, 9, EOS, 9], [9, 9, EOS], FinishReason.STOP),  # both at once: it did stop
        ({"max_tokens": 4, "ignore_eos": True}, [EOS] * 6, [EOS] * 4, FinishReason.LENGTH),
        ({"max_tokens": 4, "ignore_eos": True, "stop_token_ids": (EOS,)}, [EOS] * 6, [EOS], FinishReason.STOP),
    ],
)
def test_f07_how_a_request_ends(
    overlap: bool, sampling: dict[str, Any], values: list[int], want: list[int], reason: FinishReason
) -> None:
    it = scheduler()
    it.add(request(0, 3, **sampling))
    script = scripted(values)
    events = drain(it, script) if overlap else [e for _ in want for e in step(it, script)]
    assert tokens_of(events, 0) == want
    assert [e.finish for e in events] == [None] * (len(want) - 1) + [reason]
    assert not it.has_work and it.arena.used_blocks == 0


def test_f07_the_context_ends_a_request() -> None:
    it = scheduler(context=10)
    it.add(request(0, 7, max_tokens=50))
    events = drain(it)
    assert tokens_of(events, 0) == [107, 108, 109] and finishes(events) == {0: FinishReason.LENGTH}
    it = scheduler(num_blocks=2, context=9)  # the last token's KV is never needed: 8 places hold 9 tokens
    it.add(request(0, 4, max_tokens=5))
    assert len(tokens_of(drain(it), 0)) == 5 and it.preemptions == 0


def test_f07_no_row_runs_past_the_limit() -> None:
    it = scheduler()
    it.add(request(0, 3, max_tokens=2))
    first, second = it.plan(), it.plan()
    assert ids(first) == ids(second) == [0]
    assert it.commit(answer(first))[0].finish is None
    assert it.plan() is None  # the token in flight is the last
    assert it.commit(answer(second))[0].finish is FinishReason.LENGTH


@pytest.mark.parametrize("overlap", [False, True])
def test_f07_min_tokens_bans_the_stops(overlap: bool) -> None:
    it = scheduler()
    it.add(request(0, 3, max_tokens=5, min_tokens=2, stop_token_ids=(8,)))
    bans = []
    plans = []
    while it.has_work:
        plan = it.plan()
        if plan is not None:
            plans.append(plan)
            bans += [row.sample.banned for row in plan.rows if row.sample is not None]
        if plan is None or not overlap or len(plans) > 1:
            it.commit(answer(plans.pop(0)))
    assert bans == [(EOS, 8), (EOS, 8), (), (), ()]


def test_logprobs_pass_through() -> None:
    it = scheduler()
    it.add(request(0, 3, max_tokens=1, logprobs=1))
    plan = it.plan()
    assert plan is not None and plan.rows[0].sample is not None and plan.rows[0].sample.logprobs == 1
    (event,) = it.commit(StepResult(1, (RowResult(0, 9, -0.5, ((9, -0.5),)),)))
    assert event == TokenEvent(0, 9, -0.5, ((9, -0.5),), FinishReason.LENGTH)


def test_commit_refuses_what_was_not_planned() -> None:
    it = scheduler()
    with pytest.raises(EngineError, match="step 1 is not the oldest in flight"):
        it.commit(StepResult(1, ()))
    it.add(request(0, 3))
    it.add(request(1, 3))
    first = it.plan()
    second = it.plan()
    with pytest.raises(EngineError, match="step 2 is not the oldest in flight"):
        it.commit(answer(second))
    with pytest.raises(EngineError, match="two plans are in flight already"):
        it.plan()
    assert len(it.commit(answer(first))) == len(it.commit(answer(second))) == 2


@pytest.mark.parametrize("rows", [(), (0,), (1, 0), (0, 1, 1), (0, 7)])
def test_commit_refuses_missing_and_misordered_rows(rows: tuple[int, ...]) -> None:
    it = scheduler()
    it.add(request(0, 3))
    it.add(request(1, 3))
    it.plan()
    with pytest.raises(EngineError, match="step 1: the backend's results are not the plan's draws and scores in order"):
        it.commit(StepResult(1, tuple(RowResult(i, 9) for i in rows)))
    for number in (0, 1):
        sequence = it.get(number)
        assert sequence is not None and sequence.num_output == 0  # nothing was taken over
    assert len(it.abort_all("broken")) == 2 and it.arena.used_blocks == 0


def test_a_stopped_sequence_costs_one_dead_row() -> None:
    it = scheduler()
    it.add(request(0, 3, max_tokens=9))
    first, second = it.plan(), it.plan()
    assert second is not None and second.rows[0].tokens == (PENDING,)
    (event,) = it.commit(answer(first, lambda row: EOS))
    assert event.finish is FinishReason.STOP and it.arena.used_blocks == 0
    assert it.has_work and it.plan() is None
    assert it.commit(answer(second)) == [] and not it.has_work  # the token is dropped


def test_a_dead_row_does_not_disturb_the_heir_of_its_slot() -> None:
    it = scheduler(seqs=1)
    it.add(request(0, 3, max_tokens=9))
    it.add(request(1, 3, max_tokens=2))
    first, second = it.plan(), it.plan()
    it.commit(answer(first, lambda row: EOS))
    third = it.plan()
    assert third is not None and ids(third) == [1] and third.rows[0].slot == 0
    assert it.commit(answer(second)) == []
    events = it.commit(answer(third)) + drain(it)
    assert tokens_of(events, 1) == [103, 104]


def test_a_failed_row_ends_its_request_alone() -> None:
    it = scheduler()
    it.add(request(0, 3, max_tokens=2))
    it.add(request(1, 3, max_tokens=2))
    it.plan()
    bad, good = it.commit(StepResult(1, (RowResult(0, 0, error="the logits are not finite"), RowResult(1, 9))))
    assert bad == TokenEvent(0, None, None, (), FinishReason.ERROR, "sequence 0, step 1: the logits are not finite")
    assert good.token == 9 and finishes(drain(it)) == {1: FinishReason.LENGTH}
    assert it.arena.used_blocks == 0


def test_abort_unknown_finished_and_twice() -> None:
    it = scheduler()
    assert it.abort(0) is None
    it.add(request(0, 3, max_tokens=1))
    drain(it)
    assert it.abort(0) is None
    it.add(request(1, 3))
    assert it.abort(1) == TokenEvent(1, None, None, (), FinishReason.ABORT)
    assert it.abort(1) is None and not it.has_work


def test_abort_while_waiting_and_in_the_middle_of_a_prompt() -> None:
    it = scheduler(seqs=1, budget=4)
    it.add(request(0, 12, max_tokens=2))
    it.add(request(1, 3, max_tokens=2))
    it.add(request(2, 3, max_tokens=2))
    step(it)
    assert it.abort(1) is not None and it.num_waiting == 1 and it.get(1) is None
    assert it.abort(0, FinishReason.STOP) == TokenEvent(0, None, None, (), FinishReason.STOP)
    assert it.arena.used_blocks == 0 and (it.num_running, it.num_waiting) == (0, 1)
    assert finishes(drain(it)) == {2: FinishReason.LENGTH}


def test_abort_with_rows_in_flight_frees_at_once() -> None:
    it = scheduler(seqs=1)
    it.add(request(0, 3, max_tokens=9))
    first, second = it.plan(), it.plan()
    assert it.abort(0) is not None and it.arena.used_blocks == 0 and it.has_work
    it.add(request(0, (5, 5), max_tokens=2))  # even the id may be used again
    assert it.commit(answer(first)) == []
    third = it.plan()
    assert third is not None and third.rows[0].tokens == (5, 5)
    assert it.commit(answer(second)) == []
    assert tokens_of(it.commit(answer(third)) + drain(it), 0) == [102, 103]


def test_abort_all() -> None:
    it = scheduler(seqs=2)
    for number in range(3):
        it.add(request(number, 3))
    it.plan()
    it.plan()
    events = it.abort_all("the device is gone")
    assert [(e.request_id, e.finish, e.error) for e in events] == [
        (n, FinishReason.ERROR, "the device is gone") for n in range(3)
    ]
    assert not it.has_work and it.arena.used_blocks == 0 and it.arena.take_moves() == ()
    it.add(request(0, 3, max_tokens=2))
    assert finishes(drain(it)) == {0: FinishReason.LENGTH}
    assert it.abort_all("again") == []


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ((), {}, "^prompt: is empty; it needs at least one token"),
        ((1,) * 200, {}, r"^prompt: has 200 tokens; .* at most 199 fit \(the model's context is 200 tokens\)"),
        ((1, 1000), {}, "^prompt: has token id 1000; the vocabulary has ids 0 to 999"),
        ((-1, 5), {}, "^prompt: has token id -1; "),
        ((5,), {"stop_token_ids": (3, 1000)}, "^stop_token_ids: has token id 1000; "),
        ((5,), {"stop_token_ids": (-3,)}, "^stop_token_ids: has token id -3; "),
        ((5,), {"logit_bias": {1000: 1.0}}, "^logit_bias: has token id 1000; "),
        ((5,), {"logit_bias": {-1: 1.0}}, "^logit_bias: has token id -1; "),
    ],
)
def test_f64_requests_that_can_never_be_served(prompt: tuple[int, ...], sampling: Any, words: str) -> None:
    it = scheduler()
    with pytest.raises(InvalidRequestError, match=words):
        it.add(request(0, prompt, **sampling))
    assert not it.has_work and it.get(0) is None


def test_f64_the_border_itself_is_served() -> None:
    it = scheduler(num_blocks=64)
    it.add(request(0, (0, 999) + (1,) * 197, max_tokens=9, stop_token_ids=(999,), logit_bias={0: 1.0}))
    assert tokens_of(drain(it), 0) == [299]


def test_slots_come_back() -> None:
    it = scheduler(seqs=3, num_blocks=100)
    for number in range(30):
        it.add(request(number, 2, max_tokens=1 + number % 3))
    seen = set()
    while it.has_work:
        plan = it.plan()
        if plan is None:
            continue
        assert len(plan.rows) <= 3 and it.num_running <= 3
        seen |= {row.slot for row in plan.rows}
        it.commit(answer(plan))
    assert seen == {0, 1, 2}
