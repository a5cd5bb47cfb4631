"""LLM and AsyncLLM on the null backend: threads, cancelling, listeners, closing (F05, F06, F81)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from cortexstream.async_llm import AsyncLLM
from cortexstream.engine import EngineCore, EngineStats
from cortexstream.errors import EngineError, InvalidRequestError, OutOfMemoryBudgetError
from cortexstream.llm import LLM
from cortexstream.outputs import RequestOutput, StreamChunk
from cortexstream.plan import StepPlan
from cortexstream.prompts import Prompt
from cortexstream.request import SamplingParams
from tests.core.support import dense, request

WAIT_S = 30  # longer than anything here takes: a hang is a failure
VOCAB = 97
OPTIONS: dict[str, Any] = {
    "backend": "null", "skip_tokenizer_init": True, "num_kv_blocks": 512, "block_tokens": 4, "max_num_seqs": 8,
    "backend_options": {"vocab_size": VOCAB}, "use_tqdm": False,
}  # fmt: skip


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(**OPTIONS) as made:
        yield made
        made.check()
        assert made.stats().arena.used_blocks == 0


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **more})


def alone(prompt: list[int], params: SamplingParams, index: int = 0) -> tuple[int, ...]:
    """What a prompt gets when nothing runs beside it."""
    asked = request(0, prompt, index, params.seed or 0, max_tokens=params.max_tokens, temperature=params.temperature)
    return tuple(dense(asked, VOCAB, 2048))


def only(output: RequestOutput) -> tuple[int, ...]:
    (completion,) = output.outputs
    return completion.token_ids


def test_f81_generate_stream_and_async_give_the_same_tokens(llm: LLM) -> None:
    prompts = [[i, i + 1, 3] for i in range(12)]
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=25)
    outputs = llm.generate(prompts, params)
    generated = [only(output) for output in outputs]
    assert generated == [alone(prompt, params) for prompt in prompts]
    assert [output.prompt_token_ids for output in outputs] == [tuple(prompt) for prompt in prompts]
    assert len({output.request_id for output in outputs}) == 12 and all(output.finished for output in outputs)
    streamed = [tuple(t for chunk in llm.stream(prompt, params) for t in chunk.token_ids) for prompt in prompts]
    assert streamed == generated

    async def one(engine: AsyncLLM, prompt: list[int]) -> tuple[int, ...]:
        seen = [only(output) async for output in engine.generate(prompt, params)]
        assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(seen))
        return seen[-1]

    async def everything() -> list[tuple[int, ...]]:
        async with AsyncLLM(**OPTIONS) as engine:
            return list(await asyncio.gather(*(one(engine, prompt) for prompt in prompts)))

    assert asyncio.run(everything()) == generated


def test_f81_one_prompt_several_and_none(llm: LLM) -> None:
    assert [only(o) for o in llm.generate([5, 6], greedy(3))] == [alone([5, 6], greedy(3))]
    prompts: list[Prompt] = [{"prompt_token_ids": [5, 6]}, [7]]
    mixed = llm.generate(prompts, [greedy(3), greedy(2)])
    assert [only(o) for o in mixed] == [alone([5, 6], greedy(3)), alone([7], greedy(2))]
    assert llm.generate([]) == []
    with pytest.raises(InvalidRequestError, match="sampling_params: has 1 items for 2 prompts"):
        llm.generate([[1], [2]], [greedy(1)])
    with pytest.raises(InvalidRequestError, match="sampling_params: is dict; must be SamplingParams"):
        llm.generate([[1]], [{"max_tokens": 3}])  # type: ignore[list-item]


def test_f81_several_completions_of_one_prompt(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=12)
    (output,) = llm.generate([[8, 9]], params)
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert [o.token_ids for o in output.outputs] == [alone([8, 9], params, index) for index in range(4)]
    assert len({o.token_ids for o in output.outputs}) == 4
    chunks = list(llm.submit([8, 9], params))
    for index in range(4):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert tuple(t for chunk in mine for t in chunk.token_ids) == output.outputs[index].token_ids
        assert [chunk.finish_reason for chunk in mine] == [None] * 11 + ["length"]


def test_f81_requests_without_a_seed_differ_and_repeat_with_the_engines() -> None:
    def run(seed: int) -> list[tuple[int, ...]]:
        with LLM(**OPTIONS, seed=seed) as made:
            return [only(o) for o in made.generate([[1, 2]] * 3, SamplingParams(max_tokens=10))]

    first = run(1)
    assert len(set(first)) == 3 and run(1) == first and not set(run(2)) & set(first)


def test_f81_from_many_threads(llm: LLM) -> None:
    answers: dict[int, list[tuple[int, ...]]] = {}

    def ask(number: int) -> None:
        answers[number] = [only(o) for o in llm.generate([[number, i] for i in range(5)], greedy(15))]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert answers == {n: [alone([n, i], greedy(15)) for i in range(5)] for n in range(8)}


def test_f05_cancel_from_another_thread_takes_effect_before_the_next_step(llm: LLM) -> None:
    def listener(chunk: StreamChunk) -> None:
        ready.wait(WAIT_S)
        seen.append(chunk)
        if len(seen) == 10:  # the engine's thread waits here, so that the step is known
            thread = threading.Thread(target=generation.cancel)
            thread.start()
            thread.join(WAIT_S)

    seen: list[StreamChunk] = []
    ready = threading.Event()
    generation = llm.submit([4, 5], greedy(1000), listener=listener)
    ready.set()
    output = generation.result(WAIT_S)
    (completion,) = output.outputs
    assert completion.finish_reason == "abort" and completion.error is None
    assert completion.token_ids == alone([4, 5], greedy(1000))[:10]  # what was drawn is kept
    assert [chunk.finish_reason for chunk in seen] == [None] * 10 + ["abort"] and seen[-1].token_ids == ()
    assert llm.stats().arena.used_blocks == 0
    generation.cancel()  # again, and after the end
    assert generation.done and generation.output() == output


def test_f05_cancel_before_it_starts_and_one_of_many(llm: LLM) -> None:
    long = [llm.submit([i], greedy(300)) for i in range(12)]  # more than there are slots
    for generation in long[::2]:
        generation.cancel()
    results = [generation.result(WAIT_S).outputs[0] for generation in long]
    assert {r.finish_reason for r in results[::2]} <= {"abort", "length"} and results[10].finish_reason == "abort"
    for number, result in enumerate(results):
        assert result.token_ids == alone([number], greedy(300))[: len(result.token_ids)]
        assert number % 2 == 0 or len(result.token_ids) == 300


def test_f05_leaving_a_stream_cancels(llm: LLM) -> None:
    stream = llm.stream([3, 4], greedy(1500))
    got = [next(stream).token_ids[0] for _ in range(4)]
    stream.close()  # type: ignore[attr-defined]
    assert got == list(alone([3, 4], greedy(4)))
    assert only(llm.generate([[6]], greedy(2))[0]) == alone([6], greedy(2))
    stats = llm.stats()
    assert stats.requests_finished == 2 and stats.num_running == 0


def test_f05_result_can_time_out_and_go_on(llm: LLM) -> None:
    hold = threading.Event()

    def slow(chunk: StreamChunk) -> None:
        hold.wait(WAIT_S)

    generation = llm.submit([1], greedy(3), listener=slow)
    with pytest.raises(TimeoutError, match=r"request \d+ is not finished after 0\.01 s"):
        generation.result(0.01)
    hold.set()
    assert only(generation.result(WAIT_S)) == alone([1], greedy(3))


def test_f06_listeners_get_every_token_in_order_and_one_finish(llm: LLM) -> None:
    heard: dict[int, list[StreamChunk]] = {i: [] for i in range(10)}
    generations = [llm.submit([i, 2], greedy(20 + i), listener=heard[i].append) for i in range(10)]
    for number, generation in enumerate(generations):
        tokens = only(generation.result(WAIT_S))
        assert tokens == alone([number, 2], greedy(20 + number))
    llm.stats()  # after the last listener
    for number, chunks in heard.items():
        assert tuple(t for chunk in chunks for t in chunk.token_ids) == only(generations[number].output())
        assert [chunk.finish_reason for chunk in chunks] == [None] * (19 + number) + ["length"]
        assert {chunk.request_id for chunk in chunks} == {generations[number].request_id}


def test_f06_a_raising_listener_fails_its_own_request(llm: LLM) -> None:
    def broken(chunk: StreamChunk) -> None:
        raise RuntimeError("no listener")

    bad = llm.submit([1, 2], greedy(50), listener=broken)
    good = llm.submit([3, 4], greedy(50))
    (failed,) = bad.result(WAIT_S).outputs
    assert failed.finish_reason == "error" and failed.error is not None and "no listener" in failed.error
    assert only(good.result(WAIT_S)) == alone([3, 4], greedy(50))
    assert llm.stats().requests_failed == 1


def test_a_listener_must_not_wait_for_its_own_thread(llm: LLM) -> None:
    caught: list[BaseException] = []

    def listener(chunk: StreamChunk) -> None:
        try:
            llm.stats()
        except EngineError as error:
            caught.append(error)

    llm.submit([1], greedy(1), listener=listener).result(WAIT_S)
    llm.stats()
    assert len(caught) == 1 and "would wait for itself for ever" in str(caught[0])


def test_one_bad_prompt_starts_nothing(llm: LLM) -> None:
    cases: list[tuple[Any, str]] = [
        ([], "is empty"), ([VOCAB], "has token id 97"), ([1] * 5000, "at most 2048 fit"), ([1.5], "has 1.5"),
        ("text", "is text, but .* give token ids"),
    ]  # fmt: skip
    for bad, words in cases:
        with pytest.raises(InvalidRequestError, match=words):
            llm.generate([[1, 2], [3], bad], greedy(5))
    with pytest.raises(InvalidRequestError, match="stop_token_ids: has token id 1000"):
        llm.generate([[1, 2], [3]], [greedy(5), greedy(5, stop_token_ids=(1000,))])
    with pytest.raises(InvalidRequestError, match="stop: needs a tokenizer"):
        llm.generate([[1]], greedy(5, stop="x"))
    stats = llm.stats()
    assert (stats.steps, stats.requests_finished, stats.num_waiting, stats.num_running) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_kv_blocks": 3}, r"has 50 tokens; .* at most 12 fit \(the KV arena holds 12 tokens; raise kv_cache"),
        ({"max_model_len": 40}, r"at most 39 fit \(max_model_len is 40\)"),
        ({"backend_options": {"max_context_tokens": 50}}, r"at most 49 fit \(the model's context is 50 tokens\)"),
    ],
)
def test_prompts_that_can_never_fit_are_refused_with_numbers(options: dict[str, Any], words: str) -> None:
    with LLM(**{**OPTIONS, **options}) as made:
        with pytest.raises(InvalidRequestError, match=words):
            made.generate([[1] * 50], greedy(5))
        assert made.stats().arena.used_blocks == 0
        assert len(only(made.generate([[1]], greedy(5))[0])) == 5


def test_loading_errors_are_raised_here() -> None:
    with pytest.raises(OutOfMemoryBudgetError, match="the KV budget of 63 bytes holds no block of 4 tokens"):
        LLM(**{**OPTIONS, "num_kv_blocks": None, "kv_cache_memory": 63})
    with pytest.raises(EngineError, match="the null backend has no option 'speed'"):
        LLM(**{**OPTIONS, "backend_options": {"speed": 9}})
    with pytest.raises(TypeError, match=r"unknown option 'max_seqs'; known are .*max_num_seqs"):
        LLM(**OPTIONS, max_seqs=3)


def test_closing_answers_everybody() -> None:
    made = LLM(**OPTIONS)
    first = threading.Event()
    running = [made.submit([i], greedy(2000), listener=lambda chunk: first.set()) for i in range(8)]
    waiting = [made.submit([i], greedy(2000)) for i in range(8)]
    assert first.wait(WAIT_S)
    results: list[Any] = []
    blocked = threading.Thread(target=lambda: results.append(waiting[0].result(WAIT_S)))
    blocked.start()
    made.close()
    blocked.join(WAIT_S)
    for generation in running + waiting:
        (completion,) = generation.result(WAIT_S).outputs
        assert (completion.finish_reason, completion.error) == ("error", "the engine was closed")
    assert results == [waiting[0].output()]
    assert [chunk.finish_reason for chunk in waiting[-1]] == ["error"]  # iterating ends, too
    made.close()
    for call in (made.stats, made.check, made.describe_arena, lambda: made.generate([[1]], greedy(1))):
        with pytest.raises(EngineError, match="the engine is closed"):
            call()
    running[0].cancel()  # nothing to do, and no error


def test_closing_from_the_engines_own_thread() -> None:
    made = LLM(**OPTIONS)
    generation = made.submit([1], greedy(500), listener=lambda chunk: made.close())
    (completion,) = generation.result(WAIT_S).outputs
    assert completion.finish_reason == "error" and 1 <= len(completion.token_ids) < 500
    made.close()


def test_closing_answers_calls_that_wait() -> None:
    made = LLM(**OPTIONS)
    answers: list[EngineStats] = []
    asking = threading.Thread(target=lambda: answers.append(made.stats()), daemon=True)

    def listener(chunk: StreamChunk) -> None:  # on the engine's thread, in the middle of a step
        if asking.ident is None:
            asking.start()
            while made._engine._calls.empty():
                time.sleep(0.001)
            made.close()

    made.submit([1], greedy(500), listener=listener).result(WAIT_S)
    asking.join(WAIT_S)
    assert [answer.num_running for answer in answers] == [1]


def test_calls_that_race_with_closing_get_an_answer() -> None:
    made = LLM(**OPTIONS)
    answers: list[str] = []

    def ask() -> None:
        try:
            while True:
                made.stats()
        except EngineError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    made.generate([[1]] * 3, greedy(20))
    made.close()
    for thread in threads:
        thread.join(WAIT_S)
    assert answers == ["the engine is closed"] * 6


def test_reports(llm: LLM) -> None:
    assert llm.kv_bytes == 512 * 4 * 16 and llm.info.name == "null" and llm.model.vocab_size == VOCAB
    assert llm.describe_arena().startswith("configuration: 512 blocks of 4 tokens, placement run\nstate: 0 used, 512")
    (output,) = llm.generate([[1, 2]], greedy(3, logprobs=0))
    (completion,) = output.outputs
    assert completion.logprobs is not None and len(completion.logprobs) == 3
    assert completion.cumulative_logprob == sum(-float(token) for token in completion.token_ids)
    assert llm.generate([[1, 2]], greedy(3))[0].outputs[0].cumulative_logprob is None
    for field, value in (("prompt_tokens", 0), ("prompt_tokens", 2049), ("batch", 0), ("batch", 9)):
        with pytest.raises(InvalidRequestError, match=f"^{field}: is {value}; must be a whole number, 1 to "):
            llm.warmup(**{field: value})
    assert llm.warmup().steps == ()


def slow_down(core: EngineCore) -> None:
    """2 ms a step: a request of 1,500 tokens cannot end before a busy machine gets round to cancelling it."""
    right = core.backend.submit

    def slow(plan: StepPlan) -> Any:
        time.sleep(0.002)
        return right(plan)

    core.backend.submit = slow  # type: ignore[method-assign]


def test_f81_async_cancelling_and_aborting() -> None:
    async def everything() -> None:
        async with AsyncLLM(**OPTIONS) as engine:
            await asyncio.to_thread(engine.llm._engine.call, slow_down)
            stream = engine.stream([1, 2], greedy(1500), request_id="a")
            first = await anext(stream)
            assert first.request_id == "a" and first.token_ids == alone([1, 2], greedy(1))
            with pytest.raises(InvalidRequestError, match="request_id: 'a' is in use"):
                await anext(engine.stream([1], greedy(3), request_id="a"))
            await engine.abort("a")
            await engine.abort("unknown")
            rest = [chunk async for chunk in stream]
            assert rest[-1].finish_reason == "abort"

            async def consume() -> None:
                async for _ in engine.generate([3], greedy(1500), request_id="a"):  # the id is free again
                    started.set()

            started = asyncio.Event()
            task = asyncio.create_task(consume())
            await asyncio.wait_for(started.wait(), WAIT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async for output in engine.generate([5], greedy(4), request_id="a"):
                last = output
            assert only(last) == alone([5], greedy(4))
            stats = await asyncio.to_thread(engine.llm.stats)
            assert stats.requests_finished == 3 and stats.arena.used_blocks == 0

    asyncio.run(asyncio.wait_for(everything(), 2 * WAIT_S))
