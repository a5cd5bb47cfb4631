"""What happens when the arena is full while sequences run (F70)."""

from __future__ import annotations

import pytest

from cortexstream.plan import PENDING, StepPlan
from cortexstream.request import FinishReason
from cortexstream.scheduler import Scheduler
from cortexstream.sequence import SequenceState
from cortexstream.swap import SwapPolicy
from tests.core.steps import EOS, answer, drain, finishes, ids, scheduler, step, tokens_of
from tests.core.support import PLACEMENTS, Placement, Receiver, dense, engine, null_backend, request


@pytest.mark.parametrize("layout", ["run", "paged"])
def test_f70_three_requests_in_an_arena_for_two(layout: str) -> None:
    """Each needs 8 of the 16 blocks; all draw what they draw with room for everybody, and the counters tell."""

    def serve(num_blocks: int) -> tuple[list[list[int]], int, int]:
        core, _ = engine(layout, num_blocks=num_blocks, block_tokens=4, max_model_len=33)
        sinks = [Receiver() for _ in range(3)]
        for number, sink in enumerate(sinks):
            core.add(request(number, [number] * 9, max_tokens=24, temperature=1.0, seed=number), sink)
        while core.has_work:
            core.step()
            core.check()
        stats = core.stats()
        assert (stats.requests_finished, stats.requests_failed, stats.arena.used_blocks) == (3, 0, 0)
        return [sink.tokens for sink in sinks], stats.preemptions, stats.prompt_tokens

    free, none, prompt = serve(64)
    tight, preemptions, recomputed = serve(16)
    assert none == 0 and prompt == 27
    assert tight == free and [len(tokens) for tokens in tight] == [24] * 3
    assert preemptions >= 1 and recomputed > prompt
    assert free == [
        dense(request(n, [n] * 9, max_tokens=24, temperature=1.0, seed=n), 97, 33) for n in range(3)
    ]  # fmt: skip


def crowded() -> tuple[Scheduler, StepPlan]:
    """Two sequences in an arena of four blocks, the younger just preempted with its row still in flight."""
    it = scheduler(num_blocks=4, context=16)
    for number in (0, 1):
        it.add(request(number, 4, max_tokens=12))
    before = it.plan()
    for _ in range(20):
        plan = it.plan()
        assert before is not None and plan is not None
        if it.preemptions:
            assert ids(before) == [0, 1] and ids(plan) == [0]
            it.commit(answer(before))
            return it, plan
        it.commit(answer(before))
        before = plan
    raise AssertionError("no preemption")


def test_f70_a_preempted_sequence_keeps_the_token_in_flight() -> None:
    it, plan = crowded()
    sequence, other = it.get(1), it.get(0)
    assert sequence is not None and other is not None
    assert sequence.state is SequenceState.WAITING and sequence.draws_pending == 0 and sequence.slot == -1
    assert sequence.tokens == [1, 2, 3, 4, *range(104, 100 + len(sequence.tokens))]
    assert sequence.num_output == other.num_output  # its row was not lost
    assert sequence.num_computed == 0
    events = it.commit(answer(plan)) + drain(it)
    assert tokens_of(events, 0)[-1] == tokens_of(events, 1)[-1] == 115
    assert finishes(events) == {0: FinishReason.LENGTH, 1: FinishReason.LENGTH}
    assert it.preemptions == 1 and it.arena.used_blocks == 0


def test_f70_nobody_is_admitted_until_one_finishes() -> None:
    it, plan = crowded()
    it.add(request(2, 1, max_tokens=1))
    before: StepPlan | None = plan
    while it.get(0) is not None:
        now = it.plan()
        assert set(ids(now)) <= {0}
        it.commit(answer(before))
        before = now
    assert before is None or ids(before) == [0]
    if before is not None:
        it.commit(answer(before))
    assert it.plan() is not None and it.num_running == 2  # the preempted one first, then the new one
    sequence = it.get(1)
    assert sequence is not None and sequence.state is SequenceState.RUNNING


def test_f70_a_newcomer_does_not_take_the_blocks_that_a_preemption_freed() -> None:
    """The preempted sequence is gone and one block is free; the older one will need it, so nobody else gets it."""
    it, plan = crowded()
    assert it.abort(1) is not None
    it.add(request(2, 2, max_tokens=6))
    assert it.arena.can_admit(2, 7)
    events = it.commit(answer(plan)) + drain(it)
    assert it.preemptions == 1
    order = [event.request_id for event in events]
    assert order == sorted(order) and finishes(events) == {0: FinishReason.LENGTH, 2: FinishReason.LENGTH}


def test_f70_a_preempted_sequence_comes_back_before_those_that_wait() -> None:
    it = scheduler(num_blocks=4, context=16, seqs=2)
    for number in (0, 1):
        it.add(request(number, 4, max_tokens=12))
    it.add(request(2, 2, max_tokens=1))  # waits for a slot
    first_seen: list[int] = []
    back = 0  # the step in which the preempted sequence starts again
    while it.has_work:
        plan = it.plan()
        assert plan is not None
        first_seen += [number for number in ids(plan) if number not in first_seen]
        for row in plan.rows:
            if row.seq_id == 1 and row.start == 0 and plan.step > 1:
                back = plan.step
                assert 2 not in ids(plan)[: ids(plan).index(1)]
        it.commit(answer(plan))
    assert it.preemptions == 1 and back and first_seen == [0, 1, 2]


def test_f70_a_preempted_sequence_can_be_aborted_and_can_stop() -> None:
    it, plan = crowded()
    assert it.abort(1) is not None and it.num_waiting == 0
    assert finishes(it.commit(answer(plan)) + drain(it)) == {0: FinishReason.LENGTH}
    assert it.arena.used_blocks == 0

    it = scheduler(num_blocks=4, context=16)
    for number in (0, 1):
        it.add(request(number, 4, max_tokens=12))
    before = it.plan()
    while not it.preemptions:
        plan_now = it.plan()
        if it.preemptions:
            # Its row in flight turns out to be a stop: it ends while it waits.
            events = it.commit(answer(before, lambda row: EOS if row.seq_id == 1 else 50))
            assert finishes(events) == {1: FinishReason.STOP} and it.num_waiting == 0
        else:
            it.commit(answer(before))
        before = plan_now
    assert finishes(it.commit(answer(before)) + drain(it)) == {0: FinishReason.LENGTH}
    assert it.arena.used_blocks == 0


def test_f70_a_sequence_is_not_taken_back_before_its_token_is_known() -> None:
    it = scheduler(num_blocks=4, context=16)
    for number in (0, 1):
        it.add(request(number, 4, max_tokens=12))
    before = it.plan()
    while True:
        plan = it.plan()
        if it.preemptions:
            break
        it.commit(answer(before))
        before = plan
    # The older one ends: the preempted one could be admitted, but the token in flight is not known yet.
    it.abort(0)
    sequence = it.get(1)
    assert sequence is not None and sequence.draws_pending == 1
    it.commit(answer(before))
    assert sequence.draws_pending == 0
    after = it.plan()
    assert after is not None and ids(after) == [1] and PENDING not in after.rows[0].tokens
    assert after.rows[0].tokens == tuple(sequence.tokens) and after.rows[0].start == 0
    it.commit(answer(plan))
    it.commit(answer(after))
    assert finishes(drain(it)) == {1: FinishReason.LENGTH}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f70_a_prompt_that_needs_every_block_is_served(placement: Placement) -> None:
    """Blocks are spared for those that run; when nobody does, sparing them would keep it waiting for ever."""
    it = scheduler(num_blocks=100, placement=placement, context=400)
    assert it._spare_blocks == 2
    it.add(request(0, 397, max_tokens=2))
    assert tokens_of(drain(it, steps=20), 0) == [497, 498]
    it.add(request(1, 8, max_tokens=9))
    step(it)
    it.add(request(2, 385, max_tokens=2))  # 97 blocks of the 98 that are free: two are spared for the one that runs
    step(it)
    assert it.num_running == 1
    assert finishes(drain(it)) == {1: FinishReason.LENGTH, 2: FinishReason.LENGTH}


def test_f83_what_a_sequence_finds_of_itself_was_not_computed_for_another() -> None:
    """Preempted while it decodes, it comes back and finds its own blocks: `num_cached_tokens` stays 0."""
    it = scheduler(num_blocks=6, placement="paged", context=25, prefix_caching=True)
    for number in (0, 1):
        it.add(request(number, [50 + number] * 8, max_tokens=9))
    events = drain(it)
    assert it.preemptions == 1 and it.arena.stats().reused_tokens > 0
    assert [event.num_cached_tokens for event in events] == [0] * 18


def test_f83_nor_was_a_prompt_that_was_preempted_in_the_middle() -> None:
    """Preempted before its first token is drawn, it finds what it computed of its prompt."""
    it = scheduler(num_blocks=9, placement="paged", context=37, budget=5, prefix_caching=True)
    it.add(request(0, 4, max_tokens=6))
    step(it)
    it.add(request(1, [50] * 28, max_tokens=1))
    events = drain(it)
    assert it.preemptions == 1 and it.arena.stats().reused_tokens >= 4
    assert [event.num_cached_tokens for event in events] == [0] * 6


def test_f91_what_comes_back_from_host_memory_waits_for_nobody() -> None:
    """It brings what it had with it. A prompt that begins with the same tokens, and is not computed yet, is nothing to
    wait for: it cannot be used."""
    policy = SwapPolicy(null_backend().model, 4, 1 << 20, "swap")
    it = scheduler(num_blocks=37, placement="paged", budget=8, prefix_caching=True, swap=policy)
    it.add(request(0, [9], max_tokens=5))
    it.add(request(1, [8] * 100, max_tokens=1))  # takes all of the budget that is left
    it.add(request(2, [5, *range(101, 140)], max_tokens=1))  # what the last one will draw
    it.add(request(3, [5], max_tokens=20))
    while it.get(0) is not None:
        step(it)
    back, like = it.get(3), it.get(2)
    assert back is not None and like is not None and it.swaps == 1
    assert back.tokens == [5, 101, 102, 103, 104] and back.swapped_tokens == 4 and like.num_computed == 0
    plan = it.plan()
    assert back.state is SequenceState.RUNNING and back.swapped_tokens == 0 and 3 in ids(plan)
    it.commit(answer(plan))
    assert set(finishes(drain(it)).values()) == {FinishReason.LENGTH}
