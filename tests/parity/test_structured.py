"""Structured output through the engine, on every backend: what was asked for comes out, beside other requests."""

from __future__ import annotations

import asyncio
import json
import random
import re
from functools import cache
from typing import Any

import pytest

from cortexstream import LLM, AsyncLLM, RequestOutput, SamplingParams
from cortexstream.errors import InvalidRequestError
from tests.conftest import require_backend
from tests.text.schemas import judge, random_schema

OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"backend": "reference"},
    "mlx": {"backend": "mlx"},
    "cuda": {"backend": "cuda", "backend_options": {"device": "cpu"}},
}
SMALL: dict[str, Any] = {"num_kv_blocks": 90, "block_tokens": 16, "max_num_seqs": 16, "max_num_batched_tokens": 128}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SUM = 'start: NUMBER " + " NUMBER " = " NUMBER\nNUMBER: /[1-9][0-9]{0,2}/\n'
CLOSING = ('"', "}", "]", '"}', ",", ":")


@cache
def closing_bias() -> dict[int, float]:
    """The embedded model knows no schemas: without a push towards the end it writes strings until it is cut off."""
    with LLM(backend="reference", num_kv_blocks=8) as llm:
        assert llm.tokenizer is not None
        known = llm.tokenizer.token_bytes() or []
    return {token: 9.0 for token, piece in enumerate(known) if piece is not None and piece.decode("latin1") in CLOSING}


def schemas(count: int, seed: int) -> list[Any]:
    rng = random.Random(seed)
    return [random_schema(rng) for _ in range(count)]


def asked(schema: Any, number: int) -> SamplingParams:
    return SamplingParams(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        temperature=[0.0, 0.7, 1.3][number % 3], seed=number, max_tokens=400, logit_bias=closing_bias(),
        repetition_penalty=1.1 if number % 4 == 0 else 1.0, logprobs=1 if number % 5 == 0 else None,
    )  # fmt: skip


def all_validate(name: str, count: int, seed: int) -> None:
    """`count` random schemas in batches that outgrow the arena, free requests among them."""
    require_backend(name)
    wanted = schemas(count, seed)
    params = [asked(schema, number) for number, schema in enumerate(wanted)]
    free = SamplingParams(temperature=0, max_tokens=12)
    with LLM(**OPTIONS[name], **SMALL) as llm:
        (alone,) = llm.generate("12+30=", free, use_tqdm=False)
        outputs = llm.generate(["json: "] * count + ["12+30="] * 3, [*params, free, free, free], use_tqdm=False)
        llm.check()
        assert llm.stats().arena.used_blocks == 0 and llm.stats().requests_failed == 0
    cut_off = 0
    for schema, output in zip(wanted, outputs, strict=False):
        completion = output.outputs[0]
        if completion.finish_reason == "length":
            cut_off += 1
            continue
        assert completion.finish_reason == "stop" and completion.error is None
        judge(schema, completion.text)
    assert cut_off <= count // 10
    assert all(output.outputs == alone.outputs for output in outputs[count:])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OPTIONS)
def test_p14_random_schemas_validate(name: str) -> None:
    all_validate(name, 30, seed=1)


@pytest.mark.full_grid
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", OPTIONS)
def test_p14_500_random_schemas_validate_on_every_backend(name: str) -> None:
    all_validate(name, 500, seed=2)


def requests() -> list[tuple[str, SamplingParams]]:
    """Each kind of form, with what it may be combined with."""
    person = {"type": "json_schema", "json_schema": {"schema": PERSON}}
    common: dict[str, Any] = {"max_tokens": 60}
    return [
        ("json: ", SamplingParams(response_format=person, temperature=0, logit_bias=closing_bias(), **common)),
        ("story: ", SamplingParams(regex="[a-c]{2,4}(-[0-9]{2})?", temperature=1.0, seed=3, **common)),
        ("chat: ", SamplingParams(choice=["yes", "no", "perhaps, perhaps not"], temperature=1.5, seed=4, **common)),
        ("copy: ", SamplingParams(grammar=SUM, temperature=1.2, seed=5, logprobs=2, sampling_metadata=True, **common)),
        ("a", SamplingParams(regex="[a-z]{40}", stop=["e"], temperature=1.0, seed=6, **common)),
        ("b", SamplingParams(regex="x{3,}", temperature=0.9, seed=8, n=3, presence_penalty=1.5, **common)),
        ("c", SamplingParams(choice=["one", "two"], bad_token_ids=[300], min_tokens=5, seed=9, **common)),
        ("12+30=", SamplingParams(temperature=0, **common)),
        ("d", SamplingParams(response_format={"type": "text"}, temperature=0.5, seed=10, max_tokens=9)),
    ]


@cache
def answers(name: str) -> list[RequestOutput]:
    prompts, params = zip(*requests(), strict=True)
    with LLM(**OPTIONS[name]) as llm:
        return llm.generate(list(prompts), list(params), use_tqdm=False)


@pytest.mark.parametrize("name", OPTIONS)
def test_p14_every_form_with_what_it_is_combined_with(name: str) -> None:
    require_backend(name)
    person, pattern, choice, total, stopped, several, early, free, text = (output.outputs for output in answers(name))
    assert set(json.loads(person[0].text)) == {"name", "age"}
    judge(PERSON, person[0].text)
    assert re.fullmatch("[a-c]{2,4}(-[0-9]{2})?", pattern[0].text)
    assert choice[0].text in ("yes", "no", "perhaps, perhaps not")
    assert re.fullmatch(r"[1-9]\d{0,2} \+ [1-9]\d{0,2} = [1-9]\d{0,2}", total[0].text)
    assert total[0].logprobs is not None and len(total[0].logprobs) == len(total[0].token_ids)
    assert total[0].sampling_metadata is not None
    # What the grammar forbids counts as filtered; before the first digit nearly all of the vocabulary is.
    assert total[0].sampling_metadata[0].num_filtered > 300
    assert re.fullmatch("[a-z]*", stopped[0].text) and "e" not in stopped[0].text
    assert stopped[0].stop_reason == "e" or len(stopped[0].text) == 40
    assert all(re.fullmatch("x+", one.text) for one in several) and len(several) == 3
    assert early[0].text in ("one", "two") and early[0].finish_reason == "stop"
    assert free[0].text.startswith("42") and text[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("name", ["mlx", "cuda"])
def test_p14_backends_agree(name: str) -> None:
    require_backend(name)
    for a, b in zip(answers("reference"), answers(name), strict=True):
        assert [(c.token_ids, c.text, c.finish_reason) for c in a.outputs] == [
            (c.token_ids, c.text, c.finish_reason) for c in b.outputs
        ]


def test_p14_alone_and_streamed() -> None:
    """The same text alone, and piece by piece."""
    with LLM(backend="reference") as llm:
        for (prompt, params), together in zip(requests(), answers("reference"), strict=True):
            (alone,) = llm.generate(prompt, params, use_tqdm=False)
            assert [c.text for c in alone.outputs] == [c.text for c in together.outputs]
            if params.n == 1:
                assert "".join(chunk.text for chunk in llm.stream(prompt, params)) == together.outputs[0].text


def test_p14_asynchronously() -> None:
    """Grammars are compiled beside the loop: another request's tokens come meanwhile."""

    async def both() -> tuple[str, str]:
        async with AsyncLLM(backend="reference") as llm:

            async def one(params: SamplingParams) -> str:
                text = ""
                async for output in llm.generate("12+30=", params):
                    text = output.outputs[0].text
                return text

            formed, free = await asyncio.gather(
                one(SamplingParams(regex="[a-c]{5}", temperature=1.0, seed=2)),
                one(SamplingParams(temperature=0, max_tokens=2)),
            )
            return formed, free

    formed, free = asyncio.run(both())
    assert re.fullmatch("[a-c]{5}", formed) and free == "42"


@pytest.mark.parametrize(
    "given, field",
    [
        ({"response_format": {"type": "json_schema", "schema": {"type": "nothing"}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {
            "type": "string", "minLength": 5, "maxLength": 3}}}}, "response_format"),
        ({"regex": "[a-"}, "regex"),
        ({"grammar": "start: missing_rule"}, "grammar"),
        ({"grammar": "start: " + "a" * 70_000}, "grammar"),
        ({"choice": []}, "choice"),
        ({"regex": "a", "choice": ["b"]}, ""),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)  # fmt: skip
def test_an_impossible_grammar_is_refused_and_nothing_is_left(given: dict[str, Any], field: str) -> None:
    with LLM(backend="reference") as llm:
        running = llm.submit("12+30=", SamplingParams(temperature=0, max_tokens=8))
        with pytest.raises(InvalidRequestError) as caught:
            llm.generate(["copy: tide", "copy: tide"], [SamplingParams(), SamplingParams(**given)], use_tqdm=False)
        assert str(caught.value).startswith(field) and "\n" not in str(caught.value)
        assert running.result(timeout_s=60).outputs[0].text.startswith("42")
        assert llm.stats().requests_finished == 1 and not llm.stats().num_waiting


def test_a_form_needs_a_tokenizer() -> None:
    with (
        LLM(backend="reference", skip_tokenizer_init=True) as llm,
        pytest.raises(InvalidRequestError, match="regex: needs a tokenizer"),
    ):
        llm.generate([[1, 2]], SamplingParams(regex="a"), use_tqdm=False)
