"""Guessing ahead on real models: the same tokens with and without, greedy and seeded, alone and in a batch."""

from __future__ import annotations

import random
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM, RequestOutput, SamplingParams
from cortexstream.errors import InvalidRequestError, ModelLoadError
from cortexstream.models import tiny_folder
from cortexstream.text.tokenizer import Tokenizer
from tests.conftest import require_backend
from tests.parity.reference_models import make_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from tiny_tasks import TASKS

OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"backend": "reference"},
    "reference-run": {"backend": "reference", "kv_layout": "run"},
    "mlx": {"backend": "mlx"},
    "cuda": {"backend": "cuda", "backend_options": {"device": "cpu"}},
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
SMALL: dict[str, Any] = {"num_kv_blocks": 26, "block_tokens": 16, "max_num_seqs": 8, "max_num_batched_tokens": 96}


@cache
def workload() -> tuple[list[str], list[SamplingParams]]:
    """Tasks of the embedded model, half of them greedy; penalties, filters, stops, n and min_tokens here and there."""
    rng = random.Random(21)
    prompts, params = [], []
    for number, task in enumerate([*TASKS, *TASKS, "copy", "json", "recall", "story"]):
        item = TASKS[task](rng)
        prompts.append(item.prompt)
        params.append(
            SamplingParams(
                temperature=rng.choice([0.0, 0.0, 0.7, 1.2]), seed=rng.randrange(2**63),
                max_tokens=rng.randrange(8, 70),
                top_p=rng.choice([1.0, 0.9]), top_k=rng.choice([0, 0, 30]), min_tokens=rng.choice([0, 0, 6]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.2]), frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
                logit_bias={300: 2.0} if number % 5 == 0 else {}, stop=["zq", "e "] if number % 6 == 0 else [],
                n=2 if number % 7 == 0 else 1, logprobs=2 if number % 3 == 0 else None,
                regex="[a-z ]{3,30}" if number % 8 == 3 else None, ignore_eos=number % 8 == 1,
            )
        )  # fmt: skip
    return prompts, params


def same(expected: list[RequestOutput], got: list[RequestOutput]) -> None:
    for a, b in zip(expected, got, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            assert (x.token_ids, x.text, x.finish_reason, x.stop_reason, x.error) == (
                y.token_ids, y.text, y.finish_reason, y.stop_reason, y.error,
            ), a.prompt  # fmt: skip
            for before, after in zip(x.logprobs or (), y.logprobs or (), strict=True):
                assert before.keys() == after.keys()
                assert all(abs(before[t].logprob - after[t].logprob) < 1e-4 for t in before)


@cache
def plain(name: str) -> list[RequestOutput]:
    prompts, params = workload()
    with LLM(**OPTIONS[name]) as llm:
        return llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OPTIONS)
def test_p13_prompt_lookup_changes_no_token(name: str) -> None:
    """In a batch that outgrows the arena, and a few alone."""
    require_backend(name)
    prompts, params = workload()
    with LLM(**OPTIONS[name], **SMALL, speculative_config=NGRAM) as llm:
        same(plain(name), llm.generate(prompts, params, use_tqdm=False))
        llm.check()
        stats = llm.stats()
        assert stats.preemptions > 0 and stats.drafted_rows > 50 and stats.arena.used_blocks == 0
        assert 0.05 < stats.acceptance_rate < 0.95 and stats.tokens_per_drafted_row > 1.1
        for number in (0, 3, 11):
            same([plain(name)[number]], llm.generate([prompts[number]], params[number], use_tqdm=False))


@cache
def tokens_of(letters: str) -> list[int]:
    """The embedded model's tokens of one of these letters each; a letter may have two."""
    known = Tokenizer.from_folder(tiny_folder()).token_bytes() or []
    return [token for token, piece in enumerate(known) if piece and piece in {letter.encode() for letter in letters}]


@cache
def forms() -> tuple[list[str], list[SamplingParams], list[str]]:
    """Prompts, forms whose masks change at nearly every token, and expressions that their texts match in full."""
    colours = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 5, "maxItems": 7}
    colour = '"(red|green|blue)"'
    schema = {"type": "json_schema", "schema": colours}
    asked: list[tuple[str, dict[str, Any], str]] = [
        ("json: ", {"response_format": schema}, rf"\[{colour}(, ?{colour}){{4,6}}\]"),
        ("list: ", {"regex": "((ab|cd|ef)-){5,9}!"}, "((ab|cd|ef)-){5,9}!"),
        ("chat: ", {"choice": ["yes, yes, yes", "no, no, no, no"]}, "yes, yes, yes|no, no, no, no"),
        ("a", {"regex": "([a-f]{2}-){8}", "allowed_token_ids": tokens_of("abc-")}, "([abc]{2}-){8}"),
        ("b", {"regex": "[a-c]{24}", "stop_token_ids": tokens_of("c"), "min_tokens": 7}, "[ab]{7,24}"),
        ("c", {"regex": "(ab|cd){3,9}", "ignore_eos": True, "skip_special_tokens": False}, "(ab|cd){3,9}"),
        ("d", {"regex": "(0|10|110)+x", "n": 2, "frequency_penalty": 0.5, "logprobs": 1}, "(0|10|110)+x"),
    ]
    params = [
        SamplingParams(max_tokens=90, temperature=temperature, seed=seed, **given)
        for temperature, seed in ((0.0, 0), (1.3, 2))
        for _, given, _ in asked
    ]
    return [prompt for prompt, _, _ in asked] * 2, params, [pattern for _, _, pattern in asked] * 2


@pytest.mark.parametrize("name", OPTIONS)
def test_p13_p14_guesses_change_no_token_of_a_form(name: str) -> None:
    """The mask behind a guess is that of its own place, with all that else says what may be drawn there."""
    require_backend(name)
    prompts, params, patterns = forms()
    with LLM(**OPTIONS[name]) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    for output, pattern in zip(expected, patterns, strict=True):
        for one in output.outputs:
            assert one.finish_reason == "stop" and re.fullmatch(pattern, one.text), one
    with LLM(**OPTIONS[name], **SMALL, speculative_config=NGRAM) as llm:
        same(expected, llm.generate(prompts, params, use_tqdm=False))
        llm.check()
        stats = llm.stats()
    assert stats.accepted_tokens > 100 and stats.accepted_tokens < 0.95 * stats.drafted_tokens


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["reference", "mlx", "cuda"])
def test_p13_a_draft_model_changes_no_token(name: str, tmp_path: Path) -> None:
    """The model itself, which guesses right whatever the temperature; one with random weights, which never does."""
    require_backend(name)
    require_backend("cuda")  # which makes the random model
    prompts, params = workload()
    with LLM(**OPTIONS[name], speculative_config={"model": str(tiny_folder()), "num_speculative_tokens": 3}) as llm:
        steps = [step for step, _ in llm.warmup(8, 2).steps]
        assert any(step.startswith("draft model, ") for step in steps) and len(steps) % 2 == 0
        same(plain(name), llm.generate(prompts, params, use_tqdm=False))
        twin = llm.stats()
        assert llm.kv_bytes > 1.9 * llm.info.block_tokens * twin.arena.num_blocks * llm.model.kv_bytes_per_token
    # What it does not guess: frequency penalties and grammars, which the draft model is not told of.
    assert twin.acceptance_rate > 0.75 and twin.tokens_per_drafted_row > 3
    stranger = make_folder(tmp_path / "stranger", "llama", "float32", False, {"vocab_size": llm.model.vocab_size})
    with LLM(**OPTIONS[name], **SMALL, speculative_config={"model": str(stranger), "num_speculative_tokens": 2}) as llm:
        same(plain(name), llm.generate(prompts, params, use_tqdm=False))
        assert llm.stats().drafted_rows > 100 and llm.stats().acceptance_rate < 0.2


def test_p13_a_long_copy_takes_fewer_steps() -> None:
    prompt = "copy: " + "thequickbrownfoxjumpsoverthelazydogandrunsawayfromit" * 2 + "\n"
    greedy = SamplingParams(temperature=0, max_tokens=120)
    found = {}
    for name, config in (("plain", None), ("guessing", NGRAM)):
        with LLM(backend="reference", speculative_config=config) as llm:
            (output,) = llm.generate(prompt, greedy, use_tqdm=False)
            found[name] = output.outputs[0].token_ids, llm.stats()
    assert found["plain"][0] == found["guessing"][0]
    assert found["plain"][1].steps > 2 * found["guessing"][1].steps
    assert found["guessing"][1].acceptance_rate > 0.7


def test_prompts_logprobs_and_prefixes_beside_guesses() -> None:
    """A saved prefix, prompt logprobs and a conversation's next turn are what they are without guesses."""
    asked = replace(SamplingParams(temperature=0, max_tokens=30), prompt_logprobs=1)
    answers = []
    for config in (None, NGRAM):
        with LLM(backend="reference", speculative_config=config) as llm:
            first = llm.generate("copy: tide and time wait for none\n", asked, use_tqdm=False)[0]
            more = [*first.prompt_token_ids, *first.outputs[0].token_ids, 7, 8]
            second = llm.generate([more], replace(asked, prompt_logprobs=None), use_tqdm=False)[0]
            assert second.num_cached_tokens > 30
            answers.append((first.prompt_logprobs, first.outputs[0].text, second.outputs[0].token_ids))
    assert answers[0] == answers[1]


def test_speculation_is_refused_where_it_cannot_be_right(tmp_path: Path) -> None:
    require_backend("cuda")
    with pytest.raises(InvalidRequestError, match=r"speculative_config: has a model with 77 token ids; .* has 384"):
        stranger = make_folder(tmp_path / "other", "llama", "float32", False, {"vocab_size": 77})
        LLM(backend="reference", speculative_config={"model": str(stranger), "num_speculative_tokens": 2})
    windowed = make_folder(tmp_path / "windowed", "mistral", "float32", False, {"sliding_window": 8})
    with pytest.raises(InvalidRequestError, match="speculative_config: cannot be used: this model's sliding windows"):
        LLM(windowed, backend="reference", skip_tokenizer_init=True, speculative_config=NGRAM)
    with pytest.raises(ModelLoadError, match="nowhere"):
        LLM(backend="reference", speculative_config={"model": str(tmp_path / "nowhere"), "num_speculative_tokens": 2})
