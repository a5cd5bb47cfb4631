"""What guesses cost those who wait: long prompts are indexed in parts; what a draft model cannot do is said once."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cortexstream import LLM, EngineConfig, SamplingParams, platform
from cortexstream.backend import Backend, BackendOptions
from cortexstream.backends.common.checkpoint import read_weights
from cortexstream.engine.drafting import make_core
from cortexstream.models import tiny_folder
from cortexstream.speculation import INDEXED_AT_ONCE, NgramIndex

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


class Counted(list[int]):
    """Counts the pieces that are taken out of it."""

    taken = 0

    def __getitem__(self, where):  # type: ignore[no-untyped-def]
        self.taken += 1
        return super().__getitem__(where)


def test_p13_a_long_prompt_is_indexed_over_several_steps() -> None:
    """And then its guesses are those of an index that was made at once."""
    count = 5 * INDEXED_AT_ONCE // 2
    tokens = Counted([*range(count), 7, 8])
    index = NgramIndex(2, 3)
    found = []
    for _ in range(4):
        tokens.taken = 0
        found.append(index.find(tokens, 3))
        assert tokens.taken <= 2 * INDEXED_AT_ONCE + 4
    assert found[0] == (9, 10, 11)  # from what is known so far
    late = Counted([*tokens, count - 4, count - 3])
    assert index.find(late, 2) == (count - 2, count - 1)
    fresh = NgramIndex(2, 3)
    assert fresh.find(late, 2) == ()  # it has read the beginning only


def broken_draft(folder: Path) -> Path:
    """The embedded model, whose last norm is NaN."""
    shutil.copytree(tiny_folder(), folder)
    weights = {name: np.asarray(tensor, np.float32) for name, tensor in read_weights(folder).items()}
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert np.isnan(load_file(folder / "model.safetensors")["model.norm.weight"]).all()
    return folder


def test_p13_a_draft_model_that_cannot_draw_is_asked_once_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    prompts = ["12+30=", "copy: tide tide tide"]
    with LLM(backend="reference") as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    options = {"model": str(broken_draft(tmp_path / "draft")), "num_speculative_tokens": 3}
    with caplog.at_level(logging.WARNING), LLM(backend="reference", speculative_config=options) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        asked = llm._engine.call(lambda core: core.scheduler.speculation.drafter._core.stats())  # type: ignore[union-attr]
        assert asked.requests_finished == len(prompts), "each is asked for once"
    said = [record.message for record in caplog.records if "the draft model cannot guess" in record.message]
    assert len(said) == 1 and "NaN" in said[0]


def test_p13_what_a_draft_model_does_without_is_noted() -> None:
    """Its sliding windows, in pages, keep it from finding what it computed: each guess computes the prompt again."""

    def loaded(**extra: int) -> Backend:
        options = BackendOptions(None, kv_layout="paged", block_tokens=4, extra={"vocab_size": 97, **extra})
        return platform.load("null", options)

    config = EngineConfig(num_kv_blocks=200, speculative_config={"model": "second", "num_speculative_tokens": 2})
    for extra, noted in (({"window": 8}, True), ({}, False)):
        core = make_core(loaded(), config, loaded(**extra))
        assert any(note.startswith("draft model: prefixes are not reused") for note in core.notes) is noted
        core.close()
