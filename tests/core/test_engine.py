"""The engine on the null backend: random workloads, failures, leaks (F12, F70, F80, P8, P11's counters)."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from cortexstream.config import EngineConfig
from cortexstream.engine import EngineCore
from cortexstream.errors import EngineError, InvalidRequestError
from cortexstream.plan import RowResult
from cortexstream.request import FinishReason, Request
from tests.core.support import AuditedBackend, Receiver, dense, engine, null_backend, request

VOCAB = 97


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "cortexstream.engine")  # failures are provoked here; their traces are noise


def random_request(rng: random.Random, number: int, longest: int) -> Request:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, min(longest - 1, rng.choice((3, 10, 30)))))]
    max_tokens = rng.randint(1, rng.choice((4, 25)))
    return request(
        number, prompt, index=rng.randrange(3), seed=rng.getrandbits(64), max_tokens=max_tokens,
        min_tokens=rng.randint(0, min(max_tokens, longest - len(prompt))), temperature=rng.choice((0.0, 1.0)),
        stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice((0, 0, 3, 12)))), ignore_eos=rng.random() < 0.3,
    )  # fmt: skip


def random_engine(rng: random.Random) -> tuple[EngineCore, AuditedBackend]:
    block_tokens = rng.randint(1, 8)
    longest = rng.randint(8, 48)
    enough = -(-longest // block_tokens)  # blocks of one sequence of full length
    num_blocks = enough + rng.choice((0, 1, enough, 4 * enough))
    return engine(
        rng.choice(("run", "paged")), block_tokens=block_tokens, num_blocks=num_blocks, seqs=rng.randint(1, 12),
        budget=rng.randint(1, 48), max_model_len=longest, vocab_size=VOCAB, eos_token_id=rng.randrange(VOCAB),
    )  # fmt: skip


def run_workload(seed: int) -> tuple[int, int]:
    """One random workload; returns how often sequences were preempted and moved."""
    rng = random.Random(seed)
    core, backend = random_engine(rng)
    aborts = seed % 3 == 0
    waiting = [random_request(rng, number, core.limits.max_tokens) for number in range(rng.randint(1, 14))]
    sinks: dict[int, Receiver] = {}
    asked: dict[int, Request] = {each.id: each for each in waiting}
    patience = 10 + 2 * core.arena.capacity_tokens // min(core.limits.max_batched_tokens, 8)
    idle = produced = 0
    while waiting or core.has_work:
        while waiting and (not core.has_work or rng.random() < 0.4):
            each = waiting.pop(0)
            sinks[each.id] = Receiver()
            core.add(each, sinks[each.id])
        if aborts and rng.random() < 0.1:
            core.abort(rng.choice(list(asked)))
        core.step()
        core.check()
        now = sum(len(sink.tokens) for sink in sinks.values())
        idle = idle + 1 if now == produced else 0
        produced = now
        assert aborts or idle <= patience, "no token in many steps"
    assert core.arena.used_blocks == 0 and core.arena.stats().num_sequences == 0
    for number, sink in sinks.items():
        want = dense(asked[number], VOCAB, core.limits.max_tokens, backend.model.eos_token_ids)
        if sink.finish is FinishReason.ABORT:
            assert aborts and sink.tokens == want[: len(sink.tokens)]
        else:
            assert sink.tokens == want
            stops = core.backend.model.eos_token_ids if not asked[number].sampling.ignore_eos else frozenset()
            stopped = want[-1] in stops | set(asked[number].sampling.stop_token_ids)
            assert sink.finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    stats = core.stats()
    assert stats.requests_finished == len(asked) and stats.requests_failed == 0
    assert stats.output_tokens == produced and stats.steps == len(backend.plans)
    assert (stats.num_waiting, stats.num_running) == (0, 0)
    return stats.preemptions, stats.arena.moved_tokens


@pytest.mark.parametrize("part", range(8))
def test_random_workloads_give_the_dense_answer(part: int) -> None:
    """150 seeds each: every request's tokens are those that it draws alone, whatever ran beside it."""
    preempted = moved = 0
    for seed in range(part * 150, part * 150 + 150):
        try:
            preemptions, moves = run_workload(seed)
        except BaseException as error:
            error.add_note(f"workload {seed}")
            raise
        preempted += preemptions > 0
        moved += moves > 0
    assert preempted >= 20 and moved >= 20  # the paths that matter were taken


def test_f80_nothing_leaks_after_a_thousand_mixed_outcomes() -> None:
    rng = random.Random(80)
    core, backend = engine(num_blocks=40, block_tokens=4, seqs=8, budget=24, max_model_len=60, vocab_size=VOCAB)

    def stop_at(count: int) -> Callable[[int], bool]:
        return lambda tokens: tokens >= count

    def raise_at(count: int) -> Callable[[int], bool]:
        def react(tokens: int) -> bool:
            if tokens >= count:
                raise RuntimeError("the receiver is broken")
            return False

        return react

    asked: list[Request] = []
    sinks: list[Receiver] = []
    kinds = ["plain", "sink stops", "sink raises", "row fails", "abort"]
    spoilt = {number for number in range(1000) if kinds[number % 5] == "row fails"}
    backend.spoil = lambda row: row._replace(error="not finite") if row.seq_id in spoilt and row.token % 3 == 0 else row
    for number in range(1000):
        kind = kinds[number % 5]
        react = {"sink stops": stop_at(rng.randint(1, 5)), "sink raises": raise_at(rng.randint(1, 5))}.get(kind)
        each = random_request(rng, number, 60)
        asked.append(each)
        sinks.append(Receiver(react))
        core.add(each, sinks[-1])
    while core.has_work:
        core.step()
        if rng.random() < 0.5:
            core.abort(5 * rng.randrange(200) + 4)
    core.check()
    assert core.arena.used_blocks == 0 and core.arena.stats().num_sequences == 0
    assert sorted(core.scheduler._slots) == list(range(8)) and not core._sinks
    outcomes = {kind: {sink.finish for sink in sinks[i::5]} for i, kind in enumerate(kinds)}
    assert outcomes["plain"] == {FinishReason.STOP, FinishReason.LENGTH}
    assert FinishReason.ABORT in outcomes["abort"] and FinishReason.ERROR not in outcomes["abort"]
    assert FinishReason.ERROR in outcomes["row fails"] and FinishReason.ERROR in outcomes["sink raises"]
    assert FinishReason.ERROR not in outcomes["sink stops"]
    for each, sink in zip(asked, sinks, strict=True):
        want = dense(each, VOCAB, 60)
        assert sink.finish is not None and sink.tokens == want[: len(sink.tokens)]
        assert sink.finish is not FinishReason.LENGTH or sink.tokens == want
    stats = core.stats()
    assert stats.requests_finished == 1000
    assert stats.requests_failed == sum(sink.finish is FinishReason.ERROR for sink in sinks) > 100
    assert stats.preemptions > 0


@pytest.mark.parametrize("layout", ["run", "paged"])
@pytest.mark.parametrize("call", ["submit", "collect"])
@pytest.mark.parametrize("when", [1, 2, 3, 7])
def test_a_failing_step_ends_what_runs_and_nothing_else(layout: str, call: str, when: int) -> None:
    core, backend = engine(layout, num_blocks=12, seqs=3, budget=8, max_model_len=40, vocab_size=VOCAB)
    failures: list[int] = []

    def fault(name: str, step: int) -> None:
        if name == call and step == when and not failures:
            failures.append(step)
            raise RuntimeError("the device fell over")

    backend.fault = fault
    sinks = [Receiver() for _ in range(5)]
    for number, sink in enumerate(sinks):
        core.add(request(number, [number] * 5, max_tokens=20), sink)
    while core.has_work:
        core.step()
        core.check()
    assert failures and core.arena.used_blocks == 0
    failed = [sink for sink in sinks if sink.finish is FinishReason.ERROR]
    assert 1 <= len(failed) <= 3, "who ran ends; who waited is served"
    for number, sink in enumerate(sinks):
        want = dense(request(number, [number] * 5, max_tokens=20), VOCAB, 40)
        assert sink.tokens == (want[: len(sink.tokens)] if sink in failed else want)
        assert sink.error == ("the step failed: the device fell over" if sink in failed else None)
    later = [request(number, [number + 1] * 7, max_tokens=9) for number in range(4)]  # numbers may come again
    after = [Receiver() for _ in later]
    for each, sink in zip(later, after, strict=True):
        core.add(each, sink)
    core.run()
    core.check()
    assert [sink.tokens for sink in after] == [dense(each, VOCAB, 40) for each in later]
    stats = core.stats()
    assert (stats.requests_finished, stats.requests_failed) == (9, len(failed))


def test_a_backend_that_always_fails_ends_everything() -> None:
    core, backend = engine()

    def fault(name: str, step: int) -> None:
        raise RuntimeError("dead")

    backend.fault = fault
    sinks = [Receiver() for _ in range(20)]
    for number, sink in enumerate(sinks):
        core.add(request(number, 3), sink)
    for _ in range(3):
        core.step()
    assert not core.has_work and {sink.finish for sink in sinks} == {FinishReason.ERROR}
    core.check()


def test_wrong_results_are_a_failed_step_and_not_wrong_tokens() -> None:
    core, backend = engine()
    backend.spoil = lambda row: RowResult(row.seq_id + 1, row.token)
    sink = Receiver()
    core.add(request(0, 3), sink)
    core.run()
    assert sink.finish is FinishReason.ERROR and sink.tokens == []
    assert sink.error is not None and "not the plan's draws" in sink.error
    core.check()


def test_a_row_error_fails_that_row_alone() -> None:
    core, backend = engine(vocab_size=VOCAB)
    backend.spoil = lambda row: row._replace(error="its logits are not finite") if row.seq_id == 1 else row
    sinks = [Receiver() for _ in range(3)]
    for number, sink in enumerate(sinks):
        core.add(request(number, [number] * 4, max_tokens=6), sink)
    core.run()
    core.check()
    assert sinks[1].finish is FinishReason.ERROR and sinks[1].error == "sequence 1, step 1: its logits are not finite"
    for number in (0, 2):
        assert sinks[number].tokens == dense(request(number, [number] * 4, max_tokens=6), VOCAB, 4096)


@pytest.mark.parametrize("at", [1, 3, 6])
def test_f06_a_sink_that_raises_fails_its_own_request(at: int) -> None:
    core, _ = engine(vocab_size=VOCAB)

    def broken(tokens: int) -> bool:
        if tokens == at:
            raise ValueError("no")
        return False

    sinks = [Receiver(), Receiver(broken), Receiver()]
    for number, sink in enumerate(sinks):
        core.add(request(number, [number] * 4, max_tokens=6), sink)
    core.run()
    core.check()
    for number in (0, 2):
        assert sinks[number].tokens == dense(request(number, [number] * 4, max_tokens=6), VOCAB, 4096)
        assert sinks[number].finish is FinishReason.LENGTH
    assert len(sinks[1].tokens) == at
    if at < 6:
        assert sinks[1].finish is FinishReason.ERROR
        assert sinks[1].error == "the receiver of its tokens raised ValueError('no')"
        assert core.stats().requests_failed == 1
    else:
        assert sinks[1].finish is FinishReason.LENGTH and core.stats().requests_failed == 0  # it had ended


def test_a_sink_that_raises_at_everything_is_survived() -> None:
    core, _ = engine(vocab_size=VOCAB)

    def sink(event: object) -> bool:
        raise ValueError("never")

    good = Receiver()
    core.add(request(0, 3), sink)
    core.add(request(1, 3, max_tokens=5), good)
    core.run()
    core.check()
    assert len(good.tokens) == 5 and core.stats().requests_failed == 1
    core.add(request(2, 3), sink)
    core.fail_all("over")
    assert not core.has_work
    core.check()


def test_a_sink_may_stop_its_request() -> None:
    core, _ = engine(vocab_size=VOCAB)
    sinks = [Receiver(lambda tokens: tokens == 3), Receiver(lambda tokens: True), Receiver(lambda tokens: tokens == 6)]
    for number, sink in enumerate(sinks):
        core.add(request(number, 4, max_tokens=6), sink)
    core.run()
    core.check()
    assert [len(sink.tokens) for sink in sinks] == [3, 1, 6]
    assert [sink.finish for sink in sinks] == [FinishReason.STOP, FinishReason.STOP, FinishReason.LENGTH]
    assert core.stats().requests_failed == 0 and core.stats().requests_finished == 3


def test_a_sink_may_abort_itself_and_others() -> None:
    core, _ = engine(vocab_size=VOCAB)

    def abort(*numbers: int, then: Callable[[], bool]) -> Callable[[int], bool]:
        def react(tokens: int) -> bool:
            if tokens == 2:
                for number in numbers:
                    core.abort(number)
                return then()
            return False

        return react

    def fail() -> bool:
        raise ValueError("after the abort")

    reactions = [abort(1, 5, then=lambda: False), None, abort(2, then=lambda: True), abort(3, then=fail), None, None]
    sinks = [Receiver(react) for react in reactions]
    for number, sink in enumerate(sinks):
        core.add(request(number, 3, max_tokens=5), sink)
    core.run()
    core.check()
    assert [sink.finish for sink in sinks] == [
        FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ABORT, FinishReason.ABORT, FinishReason.LENGTH,
        FinishReason.ABORT,
    ]  # fmt: skip
    assert [len(sink.tokens) for sink in sinks] == [5, 1, 2, 2, 5, 1]
    assert core.stats().requests_finished == 6 and core.stats().requests_failed == 0 and not core._sinks


def test_fail_all_and_close() -> None:
    core, backend = engine(seqs=2)
    sinks = [Receiver() for _ in range(4)]
    for number, sink in enumerate(sinks):
        core.add(request(number, 3, max_tokens=50), sink)
    core.step()
    core.step()
    core.fail_all("the engine was closed")
    assert {(sink.finish, sink.error) for sink in sinks} == {(FinishReason.ERROR, "the engine was closed")}
    assert not core.has_work and core.arena.used_blocks == 0
    stats = core.stats()
    assert (stats.requests_finished, stats.requests_failed) == (4, 4)
    core.close()
    assert backend.closed


def test_refused_requests_leave_nothing() -> None:
    core, _ = engine(num_blocks=4, block_tokens=4)
    with pytest.raises(InvalidRequestError, match=r"has 17 tokens; .* at most 16 fit \(the KV arena holds 16 tokens"):
        core.add(request(0, 17), Receiver())
    sink = Receiver()
    core.add(request(1, 3, max_tokens=1), sink)
    with pytest.raises(InvalidRequestError, match="request_id: 1 is in use"):
        core.add(request(1, 3), Receiver())
    assert len(core._sinks) == 1
    core.run()
    assert sink.finish is FinishReason.LENGTH and not core._sinks


def test_check_notices_blocks_that_nobody_holds() -> None:
    core, _ = engine()
    core.check()
    core.arena.admit(5)
    with pytest.raises(EngineError, match="2 blocks are held by no request"):
        core.check()


def test_one_plan_is_in_flight_and_rows_are_counted() -> None:
    core, backend = engine(vocab_size=VOCAB)
    sink = Receiver()
    core.add(request(0, 10, max_tokens=5), sink)
    core.step()
    assert len(backend.plans) == 1 and sink.tokens == []  # submitted, not read yet
    core.step()
    assert len(backend.plans) == 2 and len(sink.tokens) == 1
    core.run()
    stats = core.stats()
    assert (stats.steps, stats.prompt_tokens, stats.output_tokens) == (5, 10, 5)
    assert stats.host_s > 0 and stats.backend_s > 0


def test_f73_a_promise_that_cannot_be_kept_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Asked for and not had: a note, which `doctor` prints; had, or not asked for: none."""
    caplog.set_level(logging.WARNING, "cortexstream.engine")
    for holds, asked, told in ((False, True, True), (True, True, False), (False, None, False), (False, False, False)):
        backend = null_backend()
        backend.info = replace(backend.info, batch_invariant=holds, invariance="not here: its sums differ")
        caplog.clear()
        core = EngineCore(backend, EngineConfig(backend="null", num_kv_blocks=4, batch_invariant=asked))
        expected = "batch_invariant was asked for and cannot be had: not here: its sums differ"
        assert core.notes == ((expected,) if told else ()) and (expected in caplog.text) == told
