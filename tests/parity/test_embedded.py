"""The embedded model through the whole product, with mlx-lm and transformers as judges."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream import LLM, AsyncLLM, RequestOutput, SamplingParams
from cortexstream.models import tiny_folder
from tests.conftest import require

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from tiny_tasks import TASKS, Item, held_out, is_right, word

GREEDY = SamplingParams(temperature=0, max_tokens=450)


@pytest.fixture(scope="module", params=["reference", "mlx"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    if request.param == "mlx":
        require("mlx")
        require("mlx_lm")
    with LLM(backend=request.param, max_num_seqs=16, kv_cache_memory="64MiB") as model:
        yield model


def text(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def sample(task: str, count: int) -> list[Item]:
    rng = random.Random(f"test {task}")
    items = (TASKS[task](rng) for _ in iter(int, 1))
    return [next(i for i in items if held_out(i)) for _ in range(count)]


@pytest.mark.parametrize("task", TASKS)
def test_p19_held_out_prompts(llm: LLM, task: str) -> None:
    """A sample of what `scripts/train_tiny.py --evaluate` measures at length: at most one of twenty may be wrong."""
    items = sample(task, 20 if task != "long copy" else 4)
    prompts = [llm.render_chat([{"role": "user", "content": i.prompt}]) if i.chat else i.prompt for i in items]
    answers = text(
        llm.generate([{"prompt_token_ids": ids(llm, p, i.chat)} for p, i in zip(prompts, items, strict=True)], GREEDY)
    )
    assert sum(is_right(item, answer) for item, answer in zip(items, answers, strict=True)) >= len(items) - 1


def ids(llm: LLM, prompt: str, chat: bool) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(prompt, add_special_tokens=not chat)


def test_the_readme_prompts(llm: LLM) -> None:
    assert text(llm.generate(["12+30=", "copy: tide"], GREEDY)) == ["42", "\ntide"]


def test_long_copies_side_by_side(llm: LLM) -> None:
    """A wrong block, a stale row or a lost chunk shows as a wrong letter hundreds of tokens on."""
    rng = random.Random(3)
    strings = [word(rng, n, n) for n in (180, 60, 240, 120, 200)]
    assert text(llm.generate([f"copy: {s}" for s in strings], GREEDY)) == ["\n" + s for s in strings]


def test_f08_stop_strings_across_tokens(llm: LLM) -> None:
    """Every character is a token, so every stop string crosses tokens; streamed text never holds any of it."""
    params = SamplingParams(temperature=0, max_tokens=60, stop=["fgh", "zzz"])
    (output,) = llm.generate("copy: abcdefghijkl", params)
    assert output.outputs[0].text == "\nabcde"
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason == "fgh"
    assert output.outputs[0].token_ids[-1] == ids(llm, "h", True)[0], "tokens end where the stop string is complete"
    chunks = list(llm.stream("copy: abcdefghijkl", params))
    assert "".join(chunk.text for chunk in chunks) == "\nabcde" and chunks[-1].finish_reason == "stop"
    included = SamplingParams(temperature=0, max_tokens=60, stop=["fgh"], include_stop_str_in_output=True)
    assert text(llm.generate("copy: abcdefghijkl", included)) == ["\nabcdefgh"]
    assert llm.stats().arena.used_blocks == 0


def test_f07_limits(llm: LLM) -> None:
    (length,) = llm.generate("copy: abcdefgh", SamplingParams(temperature=0, max_tokens=3))
    assert length.outputs[0].text == "\nab" and length.outputs[0].finish_reason == "length"
    e = ids(llm, "e", True)[0]
    (stop,) = llm.generate("copy: abcdefgh", SamplingParams(temperature=0, stop_token_ids=[e]))
    assert stop.outputs[0].text == "\nabcd" and stop.outputs[0].stop_reason == e
    assert stop.outputs[0].token_ids[-1] == e and stop.outputs[0].finish_reason == "stop"
    (longer,) = llm.generate("12+30=", SamplingParams(temperature=0, min_tokens=9, max_tokens=20))
    assert len(longer.outputs[0].token_ids) >= 9
    (free,) = llm.generate("12+30=", SamplingParams(temperature=0, ignore_eos=True, max_tokens=20))
    assert len(free.outputs[0].token_ids) == 20 and free.outputs[0].finish_reason == "length"


def test_f81_three_routes_give_the_same_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=80, n=2)
    prompt = "story: Ada the fox"
    (batch,) = llm.generate(prompt, params)
    assert batch.outputs[0].token_ids != batch.outputs[1].token_ids, "n samples must differ"
    streamed: dict[int, list[int]] = {0: [], 1: []}
    texts = {0: "", 1: ""}
    for chunk in llm.stream(prompt, params):
        streamed[chunk.index] += chunk.token_ids
        texts[chunk.index] += chunk.text

    async def route() -> RequestOutput:
        engine = AsyncLLM.from_llm(llm)
        outputs = [output async for output in engine.generate(prompt, params, request_id="r1")]
        assert all(len(b.outputs[0].text) >= len(a.outputs[0].text) for a, b in itertools.pairwise(outputs))
        return outputs[-1]

    cumulative = asyncio.run(route())
    for i in (0, 1):
        assert tuple(streamed[i]) == batch.outputs[i].token_ids == cumulative.outputs[i].token_ids
        assert texts[i] == batch.outputs[i].text == cumulative.outputs[i].text


def test_f05_cancel_keeps_what_there_is(llm: LLM) -> None:
    generation = llm.submit("copy: " + "a" * 40, SamplingParams(temperature=0, ignore_eos=True, max_tokens=1500))
    for seen, _ in enumerate(generation):
        if seen == 5:
            generation.cancel()
    output = generation.result(timeout_s=60).outputs[0]
    assert output.finish_reason == "abort" and 5 < len(output.token_ids) < 1500
    llm.check()
    assert llm.stats().arena.used_blocks == 0


def test_f10_logprobs_are_the_raw_distribution(llm: LLM) -> None:
    """Checked against each other: greedy takes rank 1; the k likeliest are sorted; temperature does not change them."""
    cold = llm.generate("12+30=", SamplingParams(temperature=0, max_tokens=1, logprobs=5))[0].outputs[0]
    hot = llm.generate("12+30=", SamplingParams(temperature=2.0, seed=3, max_tokens=1, logprobs=5))[0].outputs[0]
    assert cold.logprobs is not None and hot.logprobs is not None
    top = [(value.rank, value.logprob) for value in cold.logprobs[0].values()]
    assert [rank for rank, _ in top] == [1, 2, 3, 4, 5] and top == sorted(top, key=lambda pair: -pair[1])
    assert cold.logprobs[0][cold.token_ids[0]].rank == 1 and cold.cumulative_logprob == top[0][1]
    for token, value in cold.logprobs[0].items():
        assert abs(hot.logprobs[0][token].logprob - value.logprob) < 1e-5


def test_chat_keeps_to_the_turn(llm: LLM) -> None:
    (answer,) = llm.chat([{"role": "user", "content": "What is 12+30?"}], GREEDY)
    assert answer.outputs[0].text == "42" and answer.outputs[0].finish_reason == "stop"
    turns = [
        {"role": "user", "content": "What is 20+21?"}, {"role": "assistant", "content": "41"},
        {"role": "user", "content": "Please copy sand"},
    ]  # fmt: skip
    assert text(llm.chat([turns, turns[:1]], GREEDY)) == ["sand", "41"]


def test_loads_in_transformers_unchanged() -> None:
    torch, transformers = require("torch"), require("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder())
    with LLM(backend="reference", num_kv_blocks=32) as llm:
        prompt = "copy: the quick brown fox"
        encoded = tokenizer(prompt, return_tensors="pt")
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=40, logprobs=0))[0]
        assert tuple(encoded["input_ids"][0].tolist()) == output.prompt_token_ids
        generated = model.generate(**encoded, do_sample=False, max_new_tokens=40)[0].tolist()
        assert tuple(generated[len(output.prompt_token_ids) :]) == output.outputs[0].token_ids
        assert (
            tokenizer.decode(generated[len(output.prompt_token_ids) :], skip_special_tokens=True)
            == output.outputs[0].text
        )
        messages = [{"role": "user", "content": "What is 1+2?"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == llm.render_chat(
            messages
        )


def test_loads_in_mlx_lm_unchanged() -> None:
    require("mlx")
    mlx_lm: Any = require("mlx_lm")
    model, tokenizer = mlx_lm.load(str(tiny_folder()))
    assert mlx_lm.generate(model, tokenizer, prompt="copy: tide", max_tokens=20) == "\ntide"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_by_mlx_lm(bits: int, tmp_path: Path) -> None:
    """mlx-lm's own converter makes the folder; mlx and reference serve it, and agree with mlx-lm alone."""
    mx = require("mlx")
    require("mlx_lm")
    from mlx_lm import convert
    from mlx_lm.utils import load_model

    folder = tmp_path / "quantised"
    convert(str(tiny_folder()), mlx_path=str(folder), quantize=True, q_bits=bits, q_group_size=64)
    prompts = ["12+30=", "copy: tide", "copy: abcdefghijklmnopqrstuvwxyz"]
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=0)
    answers = {}
    for backend in ("mlx", "reference"):
        with LLM(folder, backend=backend, num_kv_blocks=64) as llm:
            assert llm.model.weight_bytes < 8_000_000 or backend == "reference"
            answers[backend] = llm.generate(prompts, params, use_tqdm=False)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    for a, b in zip(answers["mlx"], answers["reference"], strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        whole = [*a.prompt_token_ids, *a.outputs[0].token_ids]
        logits = np.array(model(mx.array([whole[:-1]]))[0, len(a.prompt_token_ids) - 1 :])
        logprobs = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        for step, (token, values) in enumerate(zip(a.outputs[0].token_ids, a.outputs[0].logprobs or (), strict=True)):
            assert abs(logprobs[step][token] - values[token].logprob) < 1e-4
    assert answers["mlx"][1].outputs[0].text == "\ntide"
