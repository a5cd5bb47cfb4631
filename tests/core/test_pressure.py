"""What happens when memory runs out: refuse, shorten, wait, defer, give up, swap (F27, F91)."""

from __future__ import annotations

from typing import Any

import pytest

from cortexstream.engine import EngineCore
from cortexstream.errors import InvalidRequestError
from cortexstream.plan import SwapDrop, SwapIn, SwapOut
from cortexstream.request import FinishReason
from cortexstream.swap import SwapPolicy
from tests.core.support import PLACEMENTS, Placement, Receiver, dense, engine, null_backend, request
from tests.core.test_reuse import computed, serve


def test_f27_reject_what_can_never_fit() -> None:
    core, _ = engine(num_blocks=4, block_tokens=4)
    with pytest.raises(InvalidRequestError, match="has 17 tokens; with one token of output at most 16 fit"):
        core.add(request(0, 17), Receiver())
    assert not core.has_work and core.arena.used_blocks == 0


def test_f27_reduce_the_answer_to_what_fits() -> None:
    core, _ = engine(num_blocks=4, block_tokens=4)
    sink = Receiver()
    core.add(request(0, 10, max_tokens=1000), sink)
    core.run()
    core.check()
    assert len(sink.tokens) == 7 and sink.finish is FinishReason.LENGTH  # 16 tokens of KV, and one that needs none


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f27_wait_for_blocks(placement: Placement) -> None:
    core, _ = engine(placement, num_blocks=8, block_tokens=4)
    sinks = [Receiver(), Receiver()]
    for number, sink in enumerate(sinks):
        core.add(request(number, [number] * 20, max_tokens=4), sink)
    core.step()
    assert (core.scheduler.num_running, core.scheduler.num_waiting) == (1, 1)
    core.run()
    core.check()
    assert [len(s.tokens) for s in sinks] == [4, 4] and core.stats().preemptions == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f27_defer_the_youngest(placement: Placement) -> None:
    core, _ = engine(placement, num_blocks=8, block_tokens=4)
    asked = [request(i, [i + 1] * 8, max_tokens=20) for i in range(2)]
    sinks = [Receiver(), Receiver()]
    for it, sink in zip(asked, sinks, strict=True):
        core.add(it, sink)
    core.run()
    core.check()
    assert [s.tokens for s in sinks] == [dense(it, 97, 33) for it in asked]
    assert core.stats().preemptions and core.arena.used_blocks == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f27_evict_what_nobody_uses(placement: Placement) -> None:
    core, _ = engine(placement, num_blocks=12, block_tokens=4)
    for number in range(6):
        serve(core, number, [number + 1] * 16, max_tokens=5)
    assert core.stats().preemptions == 0 and core.arena.stats().cached_blocks >= 8
    reused = core.arena.stats().reused_tokens
    serve(core, 6, [1] * 16, max_tokens=5)  # the oldest: given up long ago
    assert core.arena.stats().reused_tokens == reused
    serve(core, 7, [6] * 16, max_tokens=5)  # one of the newest
    assert core.arena.stats().reused_tokens > reused


def swapping(budget_bytes: int, **options: Any) -> tuple[EngineCore, Any]:
    core, backend = engine("run", num_blocks=8, block_tokens=4, prefix_caching=False, **options)
    core.swap.mode = "swap"
    core.swap.budget_bytes = budget_bytes
    return core, backend


def test_f91_swapped_sequences_come_back_with_what_they_had() -> None:
    core, backend = swapping(1 << 20)
    asked = [request(i, [i + 1] * 8, max_tokens=20) for i in range(2)]
    sinks = [Receiver(), Receiver()]
    for it, sink in zip(asked, sinks, strict=True):
        core.add(it, sink)
    core.run()
    core.check()
    assert [s.tokens for s in sinks] == [dense(it, 97, 33) for it in asked]
    ops = [op for plan in backend.plans for op in plan.moves]
    out = [op for op in ops if isinstance(op, SwapOut)]
    back = [op for op in ops if isinstance(op, SwapIn)]
    assert len(out) == len(back) == core.stats().swaps == core.stats().preemptions > 0
    assert computed(core) == 16  # nothing twice
    assert core.swap.used_bytes == 0 and not backend.inner._swapped


def test_f91_the_budget_of_host_memory_holds() -> None:
    core, _ = swapping(8 * 16 - 1)  # a byte less than eight tokens take
    for number in range(2):
        core.add(request(number, [number + 1] * 8, max_tokens=20), Receiver())
    core.run()
    assert core.stats().preemptions > core.stats().swaps == 0


def test_f91_an_aborted_request_leaves_no_copy() -> None:
    core, backend = swapping(1 << 20)
    for number in range(2):
        core.add(request(number, [number + 1] * 8, max_tokens=20), Receiver())
    while not core.stats().swaps:
        core.step()
    assert core.swap.used_bytes
    core.abort(1)
    core.run()
    assert any(isinstance(op, SwapDrop) for plan in backend.plans for op in plan.moves)
    assert core.swap.used_bytes == 0 and not backend.inner._swapped


def test_f91_a_failed_step_loses_the_copies_and_nothing_else() -> None:
    core, backend = swapping(1 << 20)
    asked = [request(i, [i + 1] * 8, max_tokens=20) for i in range(2)]
    sinks = [Receiver(), Receiver()]
    for it, sink in zip(asked, sinks, strict=True):
        core.add(it, sink)
    while not core.stats().swaps:
        core.step()
    core.step()
    core.step()

    def fail(call: str, step: int) -> None:
        raise RuntimeError("the device is gone")

    backend.fault = fail
    core.step()
    backend.fault = lambda call, step: None
    assert sinks[0].finish is FinishReason.ERROR and sinks[1].finish is None and core.swap.used_bytes == 0
    core.run()
    core.check()
    assert sinks[1].tokens == dense(asked[1], 97, 33)


def test_f91_the_cheaper_way_is_chosen() -> None:
    policy = SwapPolicy(null_backend().model, 16, 1 << 20)
    assert policy.bytes_of(10) == 160
    assert not policy.wants(10)  # no prompt was timed yet
    policy.observe_step(100, 1.0)  # 10 ms a token; 32 bytes at 1 GB/s are nothing
    assert policy.wants(10)
    for _ in range(60):
        policy.observe_swap(16, 1.0)
    assert not policy.wants(10)
    policy.observe_step(0, 0.0)
    policy.observe_step(1, 1000.0)  # says nothing about the price of a token
    assert policy.prefill_s_per_token == pytest.approx(0.0105, abs=0.0006)
    policy.mode = "swap"
    assert policy.wants(10) and not policy.wants(0)
    policy.take(65_530)
    assert policy.used_bytes == 65_530 * 16 and policy.wants(6) and not policy.wants(7)
    policy.give_back(65_530)
    assert policy.used_bytes == 0
    policy.mode = "recompute"
    assert not policy.wants(10)
    ringed = SwapPolicy(null_backend(window=20).model, 16, 1 << 20)
    assert ringed.bytes_of(10) == 2 * 160 and ringed.bytes_of(100) == 1600 + 32 * 16


def test_f91_nothing_is_remembered_of_copies_that_were_lost() -> None:
    core, backend = swapping(1 << 20)
    for number in range(2):
        core.add(request(number, [number + 1] * 8, max_tokens=20), Receiver())
    while not core.stats().swaps:
        core.step()

    def fail(call: str, step: int) -> None:
        raise RuntimeError("once")

    backend.fault = fail
    core.step()
    backend.fault = lambda call, step: None
    assert core.arena._swapped == {} and core._swap_bytes == {}
    core.run()


def test_f91_the_price_of_a_prompt_token_is_that_of_its_step() -> None:
    """Whether a backend computes a plan when it takes it or when it takes the next one."""
    for late in (False, True):
        policy = SwapPolicy(null_backend().model, 16, 1 << 20)
        tokens = [60, 0, 0, 64, 64, 30, 0, 0, 200, 0]
        spent = [0.01 * n for n in tokens]
        for count, seconds in zip(tokens, [0.0, *spent[:-1]] if late else spent, strict=True):
            policy.observe_step(count, seconds)
        assert policy.prefill_s_per_token == pytest.approx(0.01, rel=0.06)
        policy.observe_step(0, 1000.0)
        assert policy.prefill_s_per_token == pytest.approx(0.01, rel=0.06)  # no prompt, no price


def test_f91_swapping_costs_both_ways() -> None:
    policy = SwapPolicy(null_backend().model, 16, 1 << 20)
    policy.swap_s_per_byte = 1.0
    policy.observe_step(100, 100 * 31.0)
    assert not policy.wants(10)  # 16 bytes a token, out and in: 32 s against 31 s
    dearer = SwapPolicy(null_backend().model, 16, 1 << 20)
    dearer.swap_s_per_byte = 1.0
    dearer.observe_step(100, 100 * 33.0)
    assert dearer.wants(10)
