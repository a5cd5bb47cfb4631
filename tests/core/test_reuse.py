"""What one request computed serves the next: counted on the null backend (F83, F90)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM, SamplingParams
from cortexstream.backends.null.backend import next_token
from cortexstream.engine import EngineCore
from cortexstream.engine.private import export_prefix
from cortexstream.errors import EngineError, InvalidRequestError
from cortexstream.plan import RowResult, SampleSpec
from cortexstream.request import FinishReason
from tests.core.support import PLACEMENTS, Placement, Receiver, dense, engine, request

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
    serve(core, 9, [6] * 30, max_tokens=3)  # nothing that the failed request began with: forgotten all the same
    assert core.arena.stats().cached_blocks
    backend.spoil = lambda row: RowResult(row.seq_id, 0, error="NaN", finite=False) if row.seq_id == 1 else row
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


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_what_a_failed_request_made_serves_nobody(placement: Placement) -> None:
    """Its logits were numbers, so what others left stays known. In pages the beginning of its own prompt does, too:
    that was there for all as soon as it was planned."""
    core, backend = engine(placement, block_tokens=4)
    serve(core, 0, [6] * 30, max_tokens=3)
    failed, sink = request(1, [5] * 30, max_tokens=40), Receiver()
    backend.spoil = lambda row: row._replace(error="refused") if len(sink.tokens) == 9 else row
    core.add(failed, sink)
    core.run()
    core.check()
    assert sink.finish is FinishReason.ERROR and len(sink.tokens) == 9
    backend.spoil = lambda row: row
    again = serve(core, 2, [*failed.prompt_token_ids, *sink.tokens, 5], max_tokens=2)
    assert again.events[0].num_cached_tokens <= (0 if placement == "run" else 28)
    other = serve(core, 3, [*[6] * 30, 7], max_tokens=2)
    assert other.events[0].num_cached_tokens == 30


@pytest.mark.parametrize("layout", ["run", "paged"])
def test_f83_a_loaded_prefix_is_used_only_with_its_window(layout: str, tmp_path: Path) -> None:
    """A file has the last window of a ring, so a prompt that leaves the prefix earlier computes its own."""
    options: dict[str, Any] = {"kv_layout": layout, "block_tokens": 3, "num_kv_blocks": 12}
    if layout == "run":
        options["backend_options"] = {"window": 5}
    for shared in range(1, 7):
        with LLM(backend="null", **options) as llm:
            llm.save_prefix({"prompt_token_ids": [1, 2, 3, 4, 5, 6]}, tmp_path / "p")
        with LLM(backend="null", **options) as llm:
            prompt = [*range(1, shared + 1), 9, 9]
            params = SamplingParams(temperature=0, max_tokens=6)
            llm.generate([[7] * 20], params, use_tqdm=False)  # leaves its own numbers in the blocks
            assert llm.load_prefix(tmp_path / "p") == 6
            found = llm.generate([prompt], params, use_tqdm=False)[0]
            window = 5 if layout == "run" else None
            expected = dense_windowed(prompt, 6, window)
            assert list(found.outputs[0].token_ids) == expected
            assert found.num_cached_tokens == (shared if layout == "paged" or shared >= 5 else 0)


def dense_windowed(prompt: list[int], count: int, window: int | None) -> list[int]:
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context, SampleSpec(), 97, window))
    return context[len(prompt) :]


def test_f78_a_failed_save_leaves_the_queue_alone() -> None:
    core, backend = engine("run", block_tokens=4)
    it, sink = request(0, [5] * 9, max_tokens=4), Receiver()
    core.add(it, sink)

    def fail(call: str, step: int) -> None:
        raise RuntimeError("once")

    backend.fault = fail
    with pytest.raises(EngineError, match="the step failed: once"):
        export_prefix(core, [1, 2, 3, 4])
    backend.fault = lambda call, step: None
    core.run()
    core.check()
    assert sink.tokens == dense(it, 97, 4096)


def test_f83_a_whole_block_is_worth_waiting_for() -> None:
    core, backend = engine("run", block_tokens=4, num_blocks=200, seqs=4, budget=8)
    for number, shared in enumerate((20, 12, 11)):  # after one step 8 are there: 4 more are a block, 3 are not
        core.add(request(number, [1] * shared + [number + 2] * 9, max_tokens=1), Receiver())
    core.run()
    first = {row.seq_id: plan.step for plan in reversed(backend.plans) for row in plan.rows}
    assert first[1] > 2
    core, backend = engine("run", block_tokens=4, num_blocks=200, seqs=4, budget=8)
    for number, shared in enumerate((20, 11)):
        core.add(request(number, [1] * shared + [number + 2] * 9, max_tokens=1), Receiver())
    core.step()
    core.step()
    assert core.scheduler.num_running == 2  # admitted while the first is still being computed


def test_a_prompt_moves_on_however_many_decode() -> None:
    core, _ = engine("run", block_tokens=4, num_blocks=200, seqs=4, budget=1)
    core.add(request(0, [1], max_tokens=300), Receiver())
    core.step()
    core.step()
    sink = Receiver()
    core.add(request(1, [2] * 6, max_tokens=1), sink)
    for _ in range(20):
        core.step()
    assert sink.finish is not None
    core.run()
    core.check()


def test_no_token_left_is_refused() -> None:
    core, _ = engine("run", vocab_size=7)
    with pytest.raises(InvalidRequestError, match="min_tokens: is 2, but every token that may be drawn ends the text"):
        core.add(request(0, [1, 2], max_tokens=4, min_tokens=2, stop_token_ids=list(range(7))), Receiver())
