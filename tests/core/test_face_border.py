"""What is refused changes nothing, what was made is not changed, and what is dropped is cancelled (F04, F05, F81)."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cortexstream.async_llm import AsyncLLM
from cortexstream.errors import InvalidRequestError
from cortexstream.llm import LLM
from cortexstream.request import SamplingParams
from tests.core.test_face import OPTIONS, WAIT_S, greedy, only

BAD = SamplingParams(max_tokens=10, stop_token_ids=[999])


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(**OPTIONS) as made:
        yield made
        made.check()


def test_f04_what_is_refused_does_not_change_the_seeds_of_what_follows() -> None:
    """One request, the last of a batch, a label or a listener that is none, a form without a tokenizer."""

    def run(refused: bool) -> list[tuple[int, ...]]:
        with LLM(**OPTIONS, seed=4) as made:
            calls: list[Any] = [
                lambda: made.generate([[1]], BAD),
                lambda: made.generate([[1], [2]], [greedy(3), BAD]),
                lambda: made.submit([1], request_id=""),
                lambda: made.submit([1], listener=5),  # type: ignore[arg-type]
                lambda: made.submit([1], SamplingParams(regex="a")),
            ]
            for call in calls if refused else []:
                with pytest.raises(InvalidRequestError):
                    call()
            return [only(output) for output in made.generate([[1, 2]] * 3, SamplingParams(max_tokens=10))]

    assert run(True) == run(False)


@pytest.mark.parametrize("request_id", ["", 7, b"a", ["a"], True])
def test_f04_a_label_is_a_text(llm: LLM, request_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"request_id: is .*; must be a text of at least one character"):
        llm.submit([1], request_id=request_id)

    async def ask() -> None:
        async with AsyncLLM(**OPTIONS) as engine:
            with pytest.raises(InvalidRequestError, match="request_id: is "):
                await anext(engine.generate([1], greedy(2), request_id=request_id))
            assert (await asyncio.to_thread(engine.llm.stats)).requests_finished == 0

    asyncio.run(asyncio.wait_for(ask(), WAIT_S))


@pytest.mark.parametrize("params", [{"temperature": 1}, 0, [], "greedy"], ids=str)
def test_f04_parameters_are_sampling_params_for_asyncio_too(params: Any) -> None:
    async def ask() -> None:
        async with AsyncLLM(**OPTIONS) as engine:
            with pytest.raises(InvalidRequestError, match=r"sampling_params: is .*; must be SamplingParams"):
                await anext(engine.generate([1], params, request_id="a"))
            async for output in engine.generate([1], greedy(2), request_id="a"):  # the id is free again
                last = output
            assert last.finished

    asyncio.run(asyncio.wait_for(ask(), WAIT_S))


def test_f05_a_stream_that_is_dropped_before_its_first_token_is_cancelled(llm: LLM) -> None:
    stream = llm.stream([3, 4], greedy(1900))
    del stream
    gc.collect()
    deadline = time.monotonic() + WAIT_S
    while llm.stats().num_running + llm.stats().num_waiting:
        assert time.monotonic() < deadline
    assert llm.stats().output_tokens < 1900
    left = llm.stream([3], greedy(3))
    assert len(list(left)) == 3 and list(left) == []


def test_f04_as_many_tokens_as_fit(llm: LLM) -> None:
    """max_tokens=None is vLLM's way to say it."""
    (first,) = llm.generate([[5, 6]], greedy(1))
    most = llm.limits.max_tokens
    (done,) = llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=None))
    assert len(done.outputs[0].token_ids) == most - 2 and done.outputs[0].finish_reason == "length"
    assert first.outputs[0].token_ids == done.outputs[0].token_ids[:1]
    assert SamplingParams(max_tokens=None, min_tokens=9).min_tokens == 9


def test_f04_parameters_are_not_changed_once_they_are_made() -> None:
    params = SamplingParams(logit_bias={5: 1}, stop_token_ids=[3])
    bias: Any = params.logit_bias
    changes: list[Any] = [
        lambda: bias.__setitem__(5, "x"), lambda: bias.clear(), lambda: bias.update({6: 1.0}), lambda: bias.pop(5),
        lambda: bias.__delitem__(5), lambda: bias.setdefault(7, 1.0), lambda: bias.popitem(),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(TypeError, match="not changed once they are made"):
            change()
    assert params.logit_bias == {5: 1.0} and dict(params.logit_bias) == {5: 1.0}
    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), copy.copy(params)):
        assert other == params and other.logit_bias == {5: 1.0}


def test_p14_forms_are_not_changed_once_they_are_made(llm: LLM) -> None:
    schema: dict[str, Any] = {"type": "object"}
    choice, wanted = ["yes", "no"], {"type": "json_schema", "json_schema": {"schema": schema}}
    made = [SamplingParams(choice=choice, prompt_logprobs=1), SamplingParams(response_format=wanted)]
    choice.append(5)  # type: ignore[arg-type]
    schema["type"] = 5
    for params in made:
        assert replace(params, prompt_logprobs=None).structure == params.structure
    for wrong in (None, {"regex": "a"}):
        with pytest.raises(InvalidRequestError, match=r"sampling_params: is .*; must be SamplingParams"):
            llm.prepare(wrong)  # type: ignore[arg-type]


def test_f04_errors_reach_another_process() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(top_p=2)
    for error in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert type(error) is InvalidRequestError and error.field == "top_p" and str(error) == str(caught.value)


def test_f04_what_other_engines_callers_write() -> None:
    assert SamplingParams(logit_bias=None).logit_bias == {}  # type: ignore[arg-type]
    for name in ("stop_token_ids", "bad_token_ids", "allowed_token_ids", "stop"):
        with pytest.raises(InvalidRequestError, match=rf"{name}: is array\(1\); must be a list of items of type"):
            SamplingParams.from_dict({name: np.array(1)})
    with pytest.raises(InvalidRequestError, match=r"logit_bias: is 5; must map token ids to numbers"):
        SamplingParams(logit_bias=5)  # type: ignore[arg-type]
