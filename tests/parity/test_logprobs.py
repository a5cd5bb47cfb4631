"""What is told about tokens: logprobs of prompts and draws, and metadata, on every backend and against transformers."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cortexstream import LLM, RequestOutput, SamplingParams
from cortexstream.models import tiny_folder
from tests.conftest import require, require_backend

OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"backend": "reference"},
    "mlx": {"backend": "mlx"},
    "cuda": {"backend": "cuda", "backend_options": {"device": "cpu"}},
}
PROMPTS = [[1], [1, 300, 5, 290, 300, 12, 299], [1 + (7 * i * i + 3 * i) % 350 for i in range(211)]]
SCORED = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=3)
SAMPLED = SamplingParams(
    temperature=0.8, seed=4, max_tokens=12, top_k=6, repetition_penalty=1.3, frequency_penalty=0.2, bad_token_ids=[7],
    logprobs=6, logprobs_mode="processed_logprobs", sampling_metadata=True, ignore_eos=True,
)  # fmt: skip


@cache
def answers(name: str) -> list[RequestOutput]:
    """All prompts scored and sampled, in one batch, in chunks of at most 48 tokens."""
    with LLM(**OPTIONS[name], max_num_batched_tokens=48) as llm:
        return llm.generate(PROMPTS * 2, [SCORED] * 3 + [SAMPLED] * 3, use_tqdm=False)


@cache
def model() -> Any:
    torch = require("torch")
    transformers = require("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(str(tiny_folder()), dtype=torch.float32)


@cache
def judge(tokens: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Transformers' own model, alone: logits [tokens, vocabulary]."""
    torch = require("torch")
    with torch.inference_mode():
        found: npt.NDArray[np.float64] = model()(torch.tensor([tokens])).logits[0].double().numpy()
    return found


def log_softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = z - z.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_f10_prompt_logprobs_are_transformers_own(name: str) -> None:
    require_backend(name)
    for output in answers(name)[:3]:
        tokens, found = output.prompt_token_ids, output.prompt_logprobs
        expected = log_softmax(judge(tokens))
        assert found is not None and len(found) == len(tokens) and found[0] is None
        for position, scores in enumerate(found[1:], 1):
            assert scores is not None and tokens[position] in scores and 3 <= len(scores) <= 4
            row = expected[position - 1]
            for token, score in scores.items():
                assert abs(score.logprob - row[token]) < 1e-4
                assert score.rank is None or abs(np.sort(row)[-score.rank] - row[token]) < 2e-4
            assert sorted(s.rank for s in scores.values() if s.rank) == [1, 2, 3]


@pytest.mark.parametrize("name", OPTIONS)
def test_f10_a_completion_scored_as_a_prompt_has_the_same_logprobs(name: str) -> None:
    require_backend(name)
    whole = [[*o.prompt_token_ids, *o.outputs[0].token_ids, 5] for o in answers(name)[:3]]
    with LLM(**OPTIONS[name]) as llm:
        again = llm.generate(whole, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3), use_tqdm=False)
    for first, second in zip(answers(name)[:3], again, strict=True):
        start, drawn = len(first.prompt_token_ids), first.outputs[0].logprobs
        assert drawn is not None and second.prompt_logprobs is not None
        for before, after in zip(drawn, second.prompt_logprobs[start:-1], strict=True):
            assert after is not None and before.keys() == after.keys()
            assert all(abs(before[token].logprob - after[token].logprob) < 1e-4 for token in before)


@pytest.mark.parametrize("name", OPTIONS)
def test_processed_logprobs_are_what_is_drawn_from(name: str) -> None:
    """Six tokens are left, whose probabilities sum to 1; by hand, from transformers' logits."""
    require_backend(name)
    for output in answers(name)[3:]:
        context, done = list(output.prompt_token_ids), output.outputs[0]
        assert done.logprobs is not None and done.sampling_metadata is not None
        for token, told, metadata in zip(done.token_ids, done.logprobs, done.sampling_metadata, strict=True):
            z, made = judge(tuple(context))[-1].copy(), context[len(output.prompt_token_ids) :]
            raw = log_softmax(z)
            z[7] = -np.inf
            seen = sorted(set(context))
            z[seen] = np.where(z[seen] > 0, z[seen] / 1.3, z[seen] * 1.3)
            z = (z - 0.2 * np.bincount(made, minlength=len(z))) / 0.8
            kept = np.argsort(-z)[:6]
            expected = log_softmax(z[kept])
            assert abs(sum(math.exp(value.logprob) for value in told.values()) - 1) < 1e-5
            assert sorted(told) == sorted(kept.tolist())
            for other, value in zip(kept.tolist(), expected.tolist(), strict=True):
                assert abs(told[other].logprob - value) < 1e-3
            assert metadata.num_filtered == len(z) - 6
            assert abs(metadata.chosen_prob - math.exp(told[token].logprob)) < 1e-6
            assert abs(metadata.entropy + float((np.exp(raw) * raw).sum())) < 1e-4
            context.append(token)


@pytest.mark.parametrize("name", ["mlx", "cuda"])
def test_p5_backends_tell_the_same(name: str) -> None:
    require_backend(name)
    for a, b in zip(answers("reference"), answers(name), strict=True):
        (x,), (y,) = a.outputs, b.outputs
        assert x.token_ids == y.token_ids
        for before, after in zip(x.logprobs or (), y.logprobs or (), strict=True):
            assert before.keys() == after.keys()
            assert all(abs(before[t].logprob - after[t].logprob) < 1e-4 for t in before)
        for m, n in zip(x.sampling_metadata or (), y.sampling_metadata or (), strict=True):
            assert m.num_filtered == n.num_filtered
            assert abs(m.entropy - n.entropy) < 1e-4 and abs(m.chosen_prob - n.chosen_prob) < 1e-4


def test_n_completions_have_one_set_of_prompt_logprobs() -> None:
    with LLM(backend="reference") as llm:
        (output,) = llm.generate([PROMPTS[1]], SamplingParams(n=3, max_tokens=2, prompt_logprobs=0), use_tqdm=False)
        (alone,) = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=2, prompt_logprobs=0), use_tqdm=False)
        (without,) = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert output.prompt_logprobs == alone.prompt_logprobs and without.prompt_logprobs is None
    assert output.prompt_logprobs is not None and [len(s) for s in output.prompt_logprobs[1:] if s] == [1] * 6
    assert all(completion.sampling_metadata is None for completion in output.outputs)
