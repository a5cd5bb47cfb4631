"""Logits that are no numbers end the request that they belong to, with its sequence and step named, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM, SamplingParams
from tests.conftest import require, require_backend
from tests.parity.reference_models import make_folder

BROKEN = 11  # a token whose embedding is NaN
PROMPTS = [[1, 5, 6], [1, 5, BROKEN, 7], [1, 40, 41, 42], [3, 3, 3]]
OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"backend": "reference"},
    "mlx": {"backend": "mlx"},
    "cuda": {"backend": "cuda", "backend_options": {"device": "cpu"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("torch")
    require("transformers")
    import torch
    from safetensors.torch import load_file, save_file

    made = make_folder(tmp_path_factory.mktemp("broken"), "llama", "float32", False, {})
    tensors = load_file(made / "model.safetensors")
    tensors["model.embed_tokens.weight"][BROKEN] = torch.nan
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.mark.parametrize("guesses", [None, {"num_speculative_tokens": 3}], ids=["single", "guessing"])
@pytest.mark.parametrize("name", OPTIONS)
def test_f74_nan_logits_fail_that_request_alone(name: str, guesses: Any, folder: Path) -> None:
    """In a prompt, and in the middle of an answer that a bias makes draw the broken token; neighbours are untouched."""
    require_backend(name)
    clean = SamplingParams(temperature=0, max_tokens=12, bad_token_ids=[BROKEN], ignore_eos=True)
    broken = SamplingParams(
        temperature=0.8, seed=2, max_tokens=12, logit_bias={BROKEN: 100.0}, min_tokens=12, logprobs=2, ignore_eos=True
    )
    params = [clean, clean, broken, clean]
    with LLM(folder, skip_tokenizer_init=True, speculative_config=guesses, **OPTIONS[name]) as llm:
        expected = llm.generate([PROMPTS[0], PROMPTS[3]], clean, use_tqdm=False)
        for _ in range(2):  # what failed leaves nothing behind
            first, in_prompt, in_answer, last = llm.generate(PROMPTS, params, use_tqdm=False)
            assert [first.outputs, last.outputs] == [output.outputs for output in expected]
            assert in_prompt.outputs[0].finish_reason == in_answer.outputs[0].finish_reason == "error"
            assert in_prompt.outputs[0].token_ids == () and in_answer.outputs[0].token_ids == (BROKEN,)
            for output in (in_prompt, in_answer):
                error = output.outputs[0].error
                assert error is not None and re.match(r"sequence \d+, step \d+: .*NaN", error) and "\n" not in error
        llm.check()
        assert llm.stats().requests_failed == 4 and llm.stats().arena.used_blocks == 0


def test_p13_a_draft_model_with_nan_guesses_nothing_and_hurts_nobody(folder: Path, tmp_path: Path) -> None:
    """The large model is sound: with a broken draft model all answers are what they are without one."""
    sound = make_folder(tmp_path / "sound", "llama", "float32", False, {})
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    answers = []
    for config in (None, {"model": str(folder), "num_speculative_tokens": 3}):
        with LLM(sound, backend="reference", skip_tokenizer_init=True, speculative_config=config) as llm:
            answers.append([output.outputs for output in llm.generate(PROMPTS, greedy, use_tqdm=False)])
    assert answers[0] == answers[1] and not any(completion.error for (completion,) in answers[1])
