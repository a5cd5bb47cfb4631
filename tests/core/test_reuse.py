"""What one request computed serves the next: counted on the null backend (F83, F90), and what happens under memory
pressure (F27, F91)."""

from __future__ import annotations

from typing import Any

import pytest

from cortexstream.engine import EngineCore
from cortexstream.errors import InvalidRequestError
from cortexstream.plan import RowResult, SwapDrop, SwapIn, SwapOut
from cortexstream.request import FinishReason
from cortexstream.swap import SwapPolicy
from tests.core.support import PLACEMENTS, Placement, Receiver, dense, engine, null_backend, request

SYSTEM = [7 * i % 89 for i in range(1000)]


def serve(core: EngineCore, number: int, prompt: list[int], **sampling: Any) -> Receiver:
    it, sink = request(number, prompt, **sampling), Receiver()
    core.add(it, sink)
    core.run()
    core.check()
    assert sink.tokens == dense(it, 97, core.limits.max_tokens)
    return sink


def computed(core: EngineCore) -> int:
    return core.stats().prompt_tokens


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_a_second_request_computes_only_its_own_part(placement: Placement) -> None:
    core, _ = engine(placement, block_tokens=16, num_blocks=200, budget=256)
    serve(core, 0, [*SYSTEM, *range(30)], max_tokens=4)
    assert computed(core) == 1030
    before = core.arena.stats()
    serve(core, 1, [*SYSTEM, 91, 92], max_tokens=4)
    after = core.arena.stats()
    assert computed(core) == 1030 + 2
    assert after.reused_tokens == 1000
    # A run is copied once; pages are shared, and of the block in which the prompts part 1000 - 62 * 16 tokens copied.
    assert after.copied_tokens - before.copied_tokens == (1000 if placement == "run" else 8)


def test_f83_a_conversation_goes_on_in_its_own_run() -> None:
    core, _ = engine("run", block_tokens=16, num_blocks=200, budget=256)
    prompt, number = SYSTEM[:500], 0
    for turn in range(5):
        sink = serve(core, number, prompt, max_tokens=9)
        number += 1
        if turn:
            assert core.arena.stats().copied_tokens == 0
        prompt = [*prompt, *sink.tokens, 90 + turn]
    # The last token drawn was not fed, so each turn computes that and the user's.
    assert computed(core) == 500 + 4 * 2
    assert core.arena.stats().reused_tokens == sum(500 + 10 * turn + 8 for turn in range(4))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f90_completions_of_one_prompt_share_it(placement: Placement) -> None:
    core, backend = engine(placement, block_tokens=16, num_blocks=200, budget=512)
    sinks = [Receiver() for _ in range(4)]
    asked = [request(i, SYSTEM[:203], index=i, temperature=1.0, seed=5, max_tokens=30) for i in range(4)]
    for it, sink in zip(asked, sinks, strict=True):
        core.add(it, sink)
    core.step()
    assert [row.seq_id for row in backend.plans[0].rows] == [0]  # the others wait for what it computes
    core.step()
    assert core.arena.used_blocks <= (4 * 15 if placement == "run" else 13 + 3)
    core.run()
    core.check()
    assert [s.tokens for s in sinks] == [dense(it, 97, 4096) for it in asked]
    assert len({tuple(s.tokens) for s in sinks}) == 4
    assert computed(core) == 203 + 3 * 1
    stats = core.arena.stats()
    assert stats.reused_tokens == 3 * 202
    assert stats.copied_tokens == 3 * (202 if placement == "run" else 202 % 16)


def test_f83_only_those_that_begin_alike_wait() -> None:
    core, backend = engine("run", block_tokens=4, num_blocks=200, seqs=4, budget=16)
    prompts = [[1] * 40, [1] * 30 + [2], [1, 1, 1] + [3] * 5, [1] * 40]
    sinks = [Receiver() for _ in prompts]
    for number, (prompt, sink) in enumerate(zip(prompts, sinks, strict=True)):
        core.add(request(number, prompt, max_tokens=2), sink)
    core.run()
    core.check()
    first = {row.seq_id: plan.step for plan in reversed(backend.plans) for row in plan.rows}
    # 32 tokens are there after two steps; the third request shares no whole block; the fourth needs all 40.
    assert (first[1], first[2], first[3]) == (3, 3, 4)
    assert computed(core) == 40 + 1 + 5 + 1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_a_preempted_sequence_finds_what_is_left_of_it(placement: Placement) -> None:
    core, _ = engine(placement, block_tokens=4, num_blocks=24, seqs=2, budget=64)
    sinks = [Receiver(), Receiver()]
    asked = [request(i, [i] * 20, max_tokens=50) for i in range(2)]
    for it, sink in zip(asked, sinks, strict=True):
        core.add(it, sink)
    core.run()
    core.check()
    assert core.stats().preemptions and [s.tokens for s in sinks] == [dense(it, 97, 4096) for it in asked]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_nothing_is_reused_after_a_row_or_a_step_failed(placement: Placement) -> None:
    core, backend = engine(placement, block_tokens=4)
    serve(core, 0, [5] * 30, max_tokens=3)
    assert core.arena.stats().cached_blocks
    backend.spoil = lambda row: RowResult(row.seq_id, 0, error="NaN") if row.seq_id == 1 else row
    sink = Receiver()
    core.add(request(1, [5] * 31, max_tokens=9), sink)
    core.run()
    assert sink.finish is FinishReason.ERROR and core.arena.stats().cached_blocks == 0
    serve(core, 2, [5] * 30, max_tokens=3)
    assert core.arena.stats().cached_blocks
    reused = core.arena.stats().reused_tokens

    def fail(call: str, step: int) -> None:
        raise RuntimeError("the device is gone")

    backend.fault = fail
    core.add(request(3, [5] * 31), Receiver())
    core.step()
    backend.fault = lambda call, step: None
    assert core.arena.stats().cached_blocks == 0
    reused = core.arena.stats().reused_tokens
    serve(core, 4, [5] * 30, max_tokens=3)
    assert core.arena.stats().reused_tokens == reused
    core.warmup(8, 2)  # writes to blocks that are kept
    assert core.arena.stats().cached_blocks == 0


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
    policy.observe_prefill(100, 1.0)  # 10 ms a token; 32 bytes at 1 GB/s are nothing
    assert policy.wants(10)
    for _ in range(60):
        policy.observe_swap(16, 1.0)
    assert not policy.wants(10)
    policy.observe_prefill(1, 1000.0)  # says nothing about the price of a token
    assert policy.prefill_s_per_token == pytest.approx(0.01)
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
