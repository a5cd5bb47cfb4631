"""Saved prefixes on the null backend: what a file holds, and what is refused (the format and both private steps)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cortexstream import LLM, SamplingParams
from cortexstream.backend import LayerState
from cortexstream.errors import ArenaFullError, EngineError, InvalidRequestError, ModelLoadError
from cortexstream.prefix_file import FORMAT, Prefix, checkpoint_id, load, save

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPT = [7 * i % 90 for i in range(1, 51)]


def null(**options: Any) -> LLM:
    extra = options.pop("extra", {})
    return LLM(
        backend="null", backend_options=extra, **{"num_kv_blocks": 64, "block_tokens": 4, "max_num_seqs": 3, **options}
    )


def answer(llm: LLM, prompt: list[int]) -> tuple[tuple[int, ...], int]:
    output = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].error is None
    return output.outputs[0].token_ids, output.num_cached_tokens


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("layout", ["run", "paged"])
def test_a_saved_prefix_is_found_by_another_engine(tmp_path: Path, layout: Any, window: int | None) -> None:
    extra = {} if window is None else {"window": window}
    if window is not None and layout == "paged":
        with null(kv_layout=layout, extra=extra) as llm, pytest.raises(InvalidRequestError, match="not reused here"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "p")
        return
    path = tmp_path / "prompt.safetensors"
    with null(kv_layout=layout, extra=extra, max_num_batched_tokens=16) as llm:
        expected, _ = answer(llm, [*PROMPT, 3, 4])
        assert llm.save_prefix({"prompt_token_ids": PROMPT}, path) == 50
        llm.check()
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["format"] == FORMAT
        assert file.get_tensor("tokens").tolist() == PROMPT
        assert file.get_tensor("layers.0.keys").shape == (50, 1, 2)
        if window is not None:
            assert file.get_tensor("layers.1.values").shape == (window, 1, 2)
    with null(kv_layout=layout, extra=extra) as llm:
        found = llm.load_prefix(path)
        assert found == (50 if layout == "run" else 48)
        assert answer(llm, [*PROMPT, 3, 4]) == (expected, found)
        assert llm.stats().prompt_tokens == 52 - found
        llm.check()


def test_saving_computes_only_what_is_not_known_and_disturbs_nobody(tmp_path: Path) -> None:
    with null() as llm:
        alone, _ = answer(llm, PROMPT)
        steps = llm.stats().steps
        running = llm.submit(PROMPT[::-1], SamplingParams(temperature=0, max_tokens=60))
        assert llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "p") == 50
        assert llm.stats().steps >= steps
        assert len(running.result().outputs[0].token_ids) == 60
        assert answer(llm, PROMPT) == (alone, 49)
        llm.check()
    with null(enable_prefix_caching=False) as llm:
        assert (
            running.result().outputs[0].token_ids
            == llm.generate([PROMPT[::-1]], SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)[0]
            .outputs[0]
            .token_ids
        )


def test_refused_prefixes_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with null() as llm:
        for tokens, words in (
            ([], "0 tokens"),
            ([0] * 300, "300 tokens"),
            ([97], "token id 97"),
            ([-1], "token id -1"),
        ):
            with pytest.raises(InvalidRequestError, match=words):
                llm.save_prefix({"prompt_token_ids": tokens}, path)
        assert not path.exists()
        with pytest.raises(InvalidRequestError, match="cannot be written"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "nowhere" / "p")
        assert llm.save_prefix({"prompt_token_ids": PROMPT}, path) == 50
        data = path.read_bytes()
        ids = np.array(PROMPT, np.int32)
        ones = np.ones((50, 1, 2), np.float32)

        def broken(**tensors: Any) -> Path:
            made = tmp_path / f"broken{len(list(tmp_path.iterdir()))}"
            save_file({"tokens": ids, **tensors}, made, {"format": FORMAT, "checkpoint": "none"})
            return made

        for bad, kind, words in (
            (tmp_path / "missing", ModelLoadError, "cannot be read"),
            (broken(), InvalidRequestError, "has 0 layers; the model has 1"),
            (broken(**{"layers.0.keys": ones}), ModelLoadError, "cannot be read"),
            (broken(**{"layers.0.keys": ones[:9], "layers.0.values": ones}), InvalidRequestError, r"shape \(9, 1, 2\)"),
            (
                broken(**{"layers.0.keys": ones.astype(np.float64), "layers.0.values": ones}),
                ModelLoadError,
                "is not float32",
            ),
            (broken(**{"layers.0.keys": ones * np.inf, "layers.0.values": ones}), ModelLoadError, "not finite"),
        ):
            with pytest.raises(kind, match=words):
                llm.load_prefix(bad)
        for content, words in ((data[:100], "cannot be read"), (b"", "cannot be read"), (data[:-4], "cannot be read")):
            (tmp_path / "cut").write_bytes(content)
            with pytest.raises(ModelLoadError, match=words):
                llm.load_prefix(tmp_path / "cut")
        save_file({"tokens": ids}, tmp_path / "other", {"format": "x"})
        with pytest.raises(ModelLoadError, match="no saved prefix"):
            llm.load_prefix(tmp_path / "other")
        llm.check()
        assert llm.load_prefix(path) == 50
    with null(enable_prefix_caching=False) as llm, pytest.raises(InvalidRequestError, match="not reused here"):
        llm.load_prefix(path)


def test_a_full_arena_and_taken_slots_are_said(tmp_path: Path) -> None:
    with null(max_num_seqs=1, max_model_len=250) as llm:
        slot = llm._engine.call(lambda core: core.scheduler.borrow_slot())
        with pytest.raises(EngineError, match="all 1 sequences are in use"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "p")
        llm._engine.call(lambda core: core.scheduler.return_slot(slot))
    with null(max_model_len=250) as llm:
        llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "p")
        running = llm.submit([1] * 240, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        refused = 0
        while not running.done:
            try:
                llm.load_prefix(tmp_path / "p")
            except ArenaFullError as error:
                refused += "blocks" in str(error)
        assert running.result().outputs[0].error is None
        llm.check()


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": np.zeros(200_000, np.float32)}, folder / "model.safetensors")
    before = checkpoint_id(folder)
    assert before == checkpoint_id(folder) != checkpoint_id(None)
    state = LayerState(np.ones((2, 1, 1), np.float32), np.ones((2, 1, 1), np.float32))
    save(tmp_path / "p", before, Prefix((1, 2), [state]))
    assert load(tmp_path / "p", before).tokens == (1, 2)
    values = np.zeros(200_000, np.float32)
    values[100_000] = 1.0  # in the middle of the file
    save_file({"w": values}, folder / "model.safetensors")
    assert checkpoint_id(folder) != before
    with pytest.raises(ModelLoadError, match="another checkpoint"):
        load(tmp_path / "p", checkpoint_id(folder))
