"""AsyncLLM while a grammar is compiled: ids are taken, abort and cancel count, the loop goes on (F81, P14)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from cortexstream import AsyncLLM, RequestOutput, SamplingParams
from cortexstream.errors import EngineError, InvalidRequestError

FORM = SamplingParams(regex="[a-z ]{300}", max_tokens=400)


class Held:
    """An engine whose compiler waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = AsyncLLM(backend="reference", num_kv_blocks=100)
        self.started, self.go = asyncio.Event(), threading.Event()
        loop, prepare = asyncio.get_running_loop(), self.engine.llm.prepare

        def wait(params: SamplingParams) -> None:
            loop.call_soon_threadsafe(self.started.set)
            assert self.go.wait(30)
            prepare(params)

        monkeypatch.setattr(self.engine.llm, "prepare", wait)

    async def last(self, request_id: str, params: SamplingParams = FORM) -> RequestOutput:
        async for output in self.engine.generate("story: ", params, request_id):
            found = output
        return found


def run(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def opened() -> None:
        held = Held(monkeypatch)
        async with held.engine:
            await work(held)
            assert not held.engine._running and not held.engine._aborted

    asyncio.run(asyncio.wait_for(opened(), 60))


def test_f81_an_id_is_taken_while_its_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(held: Held) -> None:
        task = asyncio.create_task(held.last("z"))
        await held.started.wait()
        with pytest.raises(InvalidRequestError, match="request_id: 'z' is in use"):
            await held.last("z")
        free = await held.last("y", SamplingParams(temperature=0, max_tokens=4))  # others are served meanwhile
        assert free.finished and not task.done()
        held.go.set()
        assert len((await task).outputs[0].text) == 300

    run(work, monkeypatch)


def test_f81_abort_counts_while_a_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(held: Held) -> None:
        task = asyncio.create_task(held.last("r"))
        await held.started.wait()
        await held.engine.abort("r")
        held.go.set()
        (completion,) = (await task).outputs
        assert completion.finish_reason == "abort" and len(completion.token_ids) < 10
        assert (await held.last("r", SamplingParams(max_tokens=3))).outputs[0].finish_reason != "abort"

    run(work, monkeypatch)


def test_f81_cancelling_counts_while_a_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(held: Held) -> None:
        task = asyncio.create_task(held.last("q"))
        await held.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.go.set()
        await asyncio.sleep(0.3)
        stats = await asyncio.to_thread(held.engine.llm.stats)
        assert stats.num_running == stats.num_waiting == stats.output_tokens == 0

    run(work, monkeypatch)


def test_f81_leaving_the_loop_frees_the_id_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(held: Held) -> None:
        free = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        for form in (held.engine.generate, held.engine.stream):
            for _ in range(3):
                answers: AsyncGenerator[object, None] = form("story: ", free, "same")
                await anext(answers)
                await answers.aclose()
        stats = await asyncio.to_thread(held.engine.llm.stats)
        assert stats.num_running == 0

    run(work, monkeypatch)


def test_f81_closing_answers_those_whose_grammars_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are compiled at a time, and who asks later; with one error for all."""

    async def work(held: Held) -> None:
        tasks = [asyncio.create_task(held.last(str(n))) for n in range(7)]
        await held.started.wait()
        closing = asyncio.create_task(held.engine.close())
        await asyncio.sleep(0.1)
        held.go.set()
        await closing
        found = [*await asyncio.gather(*tasks, return_exceptions=True)]
        found += await asyncio.gather(held.last("late"), return_exceptions=True)
        assert [type(error) for error in found] == [EngineError] * 8

    run(work, monkeypatch)
