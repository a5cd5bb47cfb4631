"""The mlx backend against plain mlx-lm, by architecture: same weights, same tokens, every logit compared."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.backend import BackendOptions
from cortexstream.config import EngineConfig
from cortexstream.engine import EngineCore
from cortexstream.errors import ModelLoadError
from cortexstream.request import Request, SamplingParams
from tests.conftest import require
from tests.parity.tiny_models import FULL, REFUSED, WINDOWED, write_model

mx = require("mlx")
require("mlx_lm")

PROMPTS = (41, 7, 90, 33)  # tokens; the last joins while the others decode
OUTPUTS = (30, 12, 18, 25)  # the second leaves first
CHUNK = 16


class Recorder:
    """Keeps the logits of every decode row that a backend computes, by sequence and position."""

    def __init__(self, backend: Any) -> None:
        self.logits: dict[tuple[int, int], np.ndarray] = {}
        self._right = backend._forward.decode
        backend._forward.decode = self

    def __call__(self, pool: Any, rows: Any, positions: list[int], tokens: Any) -> Any:
        logits = self._right(pool, rows, positions, tokens)
        for row, position, values in zip(rows, positions, np.array(logits.astype(mx.float32)), strict=True):
            self.logits[row.seq_id, position] = values
        return logits


def run(folder: Path, group: bool) -> tuple[dict[int, list[int]], dict[tuple[int, int], np.ndarray], Any]:
    """Serve PROMPTS with chunked prefill, a join and a leave; returns all tokens, all logits and the backend."""
    from cortexstream.backends import mlx as module

    backend = module.create(BackendOptions(str(folder), max_num_seqs=4, extra={"group_attention": group}))
    core = EngineCore(backend, EngineConfig(num_kv_blocks=40, max_num_seqs=4, max_num_batched_tokens=CHUNK))
    recorder = Recorder(backend)
    rng = random.Random(0)
    tokens: dict[int, list[int]] = {}
    before = backend.pool.addresses()
    for number, (prompt, output) in enumerate(zip(PROMPTS, OUTPUTS, strict=True)):
        ids = [rng.randrange(200) for _ in range(prompt)]
        tokens[number] = list(ids)
        request = Request(number, tuple(ids), SamplingParams(max_tokens=output, temperature=0, ignore_eos=True), 0)

        def sink(event: Any, number: int = number) -> bool:
            tokens[number].append(event.token)
            return False

        if number == 3:
            while core.scheduler.get(1) is not None:
                core.step()
        core.add(request, sink)
    core.run()
    core.check()
    assert backend.pool.addresses() == before, "a pool was copied"
    return tokens, recorder.logits, backend


def plain_logits(folder: Path, tokens: list[int], prompt: int) -> np.ndarray:
    """mlx-lm alone: the prompt but its last token at once, then one token at a time; logits [steps, vocabulary]."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    if prompt > 1:
        model(mx.array([tokens[: prompt - 1]]), cache=cache)
    steps = [model(mx.array([[token]]), cache=cache)[0, -1] for token in tokens[prompt - 1 : -1]]
    return np.array(mx.stack(steps).astype(mx.float32))


@pytest.mark.parametrize("group", [False, True], ids=["rows", "groups"])
@pytest.mark.parametrize("architecture", [*FULL, *WINDOWED])
def test_every_logit_equals_plain_mlx_lm(architecture: str, group: bool, tmp_path: Path) -> None:
    """P3's start: chunked prefill, batched decode, a join and a leave. Exact for full attention (row-wise calls, on a
    CPU); within 1e-4 for windows, whose plain cache is a ring with its keys in another order."""
    folder = write_model(tmp_path, architecture, {**FULL, **WINDOWED}[architecture])
    tokens, logits, backend = run(folder, group)
    assert backend.info.notes == (), "this architecture should decode from separate views"
    worst = 0.0
    for number, prompt in enumerate(PROMPTS):
        assert len(tokens[number]) == prompt + OUTPUTS[number]
        for step, expected in enumerate(plain_logits(folder, tokens[number], prompt)):
            worst = max(worst, float(np.abs(logits[number, prompt - 1 + step] - expected).max()))
    exact = architecture in FULL and not group and not mx.metal.is_available()
    assert worst == 0.0 if exact else worst < 1e-4


def test_a_model_that_cannot_follow_views_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback gives the same logits and says so in `info.notes`."""
    from cortexstream.backends.mlx import backend as module

    folder = write_model(tmp_path, "gemma3_text", WINDOWED["gemma3_text"])
    monkeypatch.setattr(module, "teach", lambda model: False)
    tokens, logits, backend = run(folder, group=False)
    assert len(backend.info.notes) == 1 and "padded copies" in backend.info.notes[0]
    for number, prompt in enumerate(PROMPTS):
        for step, expected in enumerate(plain_logits(folder, tokens[number], prompt)):
            assert np.abs(logits[number, prompt - 1 + step] - expected).max() < 1e-4


def test_probe_sees_a_wrong_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: an attention that reads one key too few is not accepted as a way to decode."""
    from cortexstream.backends.mlx import cache

    right = cache.Batch._segment

    def short(self: Any, number: int, first: int, count: int) -> Any:
        segment = right(self, number, first, count)
        segment.length -= 1
        return segment

    monkeypatch.setattr(cache.Batch, "_segment", short)
    folder = write_model(tmp_path, "llama", {})
    _, _, backend = run(folder, group=False)
    assert "padded copies" in backend.info.notes[0]


@pytest.mark.parametrize("architecture", REFUSED)
def test_other_cache_kinds_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    from cortexstream.backends import mlx as module

    folder = write_model(tmp_path, architecture, REFUSED[architecture])
    with pytest.raises(ModelLoadError, match=rf"{architecture} keeps the state of layer 0 in a ArraysCache"):
        module.create(BackendOptions(str(folder)))


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    from cortexstream.backends import mlx as module

    folder = write_model(tmp_path, "llama", {})
    config = (folder / "config.json").read_text().replace('"llama"', '"no_such_model"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelLoadError, match="no_such_model"):
        module.create(BackendOptions(str(folder)))


def answers(folder: Path, backend: str, prompts: list[list[int]]) -> list[Any]:
    from cortexstream import LLM

    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    with LLM(folder, backend=backend, skip_tokenizer_init=True, num_kv_blocks=60, max_num_batched_tokens=CHUNK) as llm:
        return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


CHANGES: dict[str, dict[str, Any]] = {
    "mistral with a window": {"model_type": "mistral", "sliding_window": 10},
    "rope_parameters with a theta": {
        "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
    "rope_parameters, linear": {
        "rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "rope_parameters, llama3": {
        "rope_theta": None,
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_settings_that_mlx_lm_alone_would_ignore(case: str, tmp_path: Path) -> None:
    """The reference backend is the judge; the last line shows that the setting matters to the tokens."""
    folder = write_model(tmp_path / "changed", "llama", {}, scale=0.3)
    plain = write_model(tmp_path / "plain", "llama", {}, scale=0.3)
    config = json.loads((folder / "config.json").read_text()) | CHANGES[case]
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    rng = random.Random(4)
    prompts = [[rng.randrange(200) for _ in range(n)] for n in (60, 45, 7)]
    for a, b in zip(answers(folder, "mlx", prompts), answers(folder, "reference", prompts), strict=True):
        assert a.token_ids == b.token_ids and abs(a.cumulative_logprob - b.cumulative_logprob) < 1e-3
    assert [a.token_ids for a in answers(plain, "mlx", prompts)] != [
        a.token_ids for a in answers(folder, "mlx", prompts)
    ]


def test_windows_in_some_layers_only_are_refused(tmp_path: Path) -> None:
    from cortexstream.backends import mlx as module

    extra = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    folder = write_model(tmp_path, "qwen2", {})
    config = json.loads((folder / "config.json").read_text()) | extra
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="qwen2 model has a sliding window in some layers only"):
        module.create(BackendOptions(str(folder)))


def test_one_row_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last fallback: no batched decode at all. Right logits, a note, and no pool copied (asserted in run)."""
    from cortexstream.backends.mlx import forward as module
    from cortexstream.backends.mlx.attention import RaggedNotPossible

    def impossible(*_: Any) -> None:
        raise RaggedNotPossible("not today")

    monkeypatch.setattr(module, "Batch", impossible)
    folder = write_model(tmp_path, "llama", {})
    tokens, logits, backend = run(folder, group=False)
    assert "one row at a time" in backend.info.notes[0]
    for number, prompt in enumerate(PROMPTS):
        for step, expected in enumerate(plain_logits(folder, tokens[number], prompt)):
            assert np.abs(logits[number, prompt - 1 + step] - expected).max() < 1e-5
