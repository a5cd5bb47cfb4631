"""What was computed once serves later requests and other backends, and changes no token (F83, F90, F91)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM, ModelLoadError, SamplingParams
from cortexstream.outputs import RequestOutput
from tests.conftest import require, require_backend
from tests.parity.tiny_models import WINDOWED, write_model

SYSTEM = "copy: " + " ".join("the fox and the owl met by the river at noon".split() * 6) + " "
BACKENDS = ("mlx", "reference", "reference-run", "cuda")
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SEEDED = SamplingParams(temperature=0.9, top_p=0.9, seed=11, max_tokens=24, n=3, logprobs=2)


def open_llm(name: str, **options: Any) -> LLM:
    require_backend(name)
    if name == "cuda":
        options = {"block_tokens": 16, "backend_options": {"device": "cpu"}, **options}
    backend, _, layout = name.partition("-")
    return LLM(backend=backend, **{"num_kv_blocks": 400, "kv_layout": layout or None, **options})


def said(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    assert all(c.error is None for o in outputs for c in o.outputs)
    return [c.token_ids for o in outputs for c in o.outputs]


def logprobs(outputs: list[RequestOutput]) -> list[float]:
    return [c.cumulative_logprob for o in outputs for c in o.outputs if c.cumulative_logprob is not None]


@pytest.mark.parametrize("name", BACKENDS)
def test_f83_outputs_are_the_same_with_reuse_and_without(name: str) -> None:
    """A common beginning, n completions, a conversation's next turns, a retry: seeded and greedy."""
    found: dict[bool, Any] = {}
    for caching in (True, False):
        with open_llm(name, enable_prefix_caching=caching) as llm:
            outputs = llm.generate([SYSTEM + "apple", SYSTEM + "pear"], GREEDY, use_tqdm=False)
            turn = [*outputs[0].prompt_token_ids, *outputs[0].outputs[0].token_ids]
            for extra in ([40, 41, 42], [50]):
                outputs += llm.generate([[*turn, *extra]], SEEDED, use_tqdm=False)
                turn = [*outputs[-1].prompt_token_ids, *outputs[-1].outputs[0].token_ids]
            outputs += llm.generate([SYSTEM + "apple"], GREEDY, use_tqdm=False)
            llm.check()
            stats = llm.stats()
            found[caching] = said(outputs), logprobs(outputs), stats.prompt_tokens
            assert (stats.arena.reused_tokens > 0) is caching
            assert (outputs[-1].num_cached_tokens == len(outputs[-1].prompt_token_ids) - 1) is caching
    assert found[True][0] == found[False][0]
    if name.startswith("reference"):  # bitwise; the matrix products of MLX and torch round a chunk as it is cut
        assert found[True][1] == found[False][1]
    assert found[True][1] == pytest.approx(found[False][1], abs=1e-4)
    assert found[True][2] < 0.4 * found[False][2]


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("name", BACKENDS)
def test_f91_preempted_requests_end_as_if_they_were_alone(name: str, mode: str) -> None:
    prompts = [SYSTEM[: 60 + 20 * i] + "abc"[i % 3] for i in range(5)]
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=80, ignore_eos=True)
    with open_llm(name) as llm:
        alone = [said(llm.generate([p], params, use_tqdm=False))[0] for p in prompts]
    tight = {"num_kv_blocks": 28, "preemption_mode": mode, "swap_memory": "64MiB", "enable_prefix_caching": False}
    with open_llm(name, **tight) as llm:
        together = said(llm.generate(prompts, params, use_tqdm=False))
        llm.check()
        stats = llm.stats()
        assert stats.preemptions > 0 and (stats.swaps > 0) is (mode == "swap")
    assert together == alone


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("mlx", "reference"), ("reference-run", "mlx"), ("mlx", "mlx"), ("mlx", "cuda"), ("cuda", "mlx")],
)
def test_a_prefix_saved_by_one_backend_serves_the_other(tmp_path: Path, writer: str, reader: str) -> None:
    path = tmp_path / "system.safetensors"
    with open_llm(writer) as llm:
        saved = llm.save_prefix(SYSTEM, path)
        expected = said(llm.generate([SYSTEM + "kiwi"], GREEDY, use_tqdm=False))
    with open_llm(reader) as llm:
        found = llm.load_prefix(path)
        assert saved - 16 < found <= saved
        outputs = llm.generate([SYSTEM + "kiwi"], GREEDY, use_tqdm=False)
        assert found - 1 <= outputs[0].num_cached_tokens
        assert said(outputs) == expected
        llm.check()


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
@pytest.mark.parametrize(
    ("writer", "reader"), [("reference", "reference"), ("mlx", "mlx"), ("mlx", "reference"), ("reference", "cuda")]
)
def test_a_quantised_prefix_is_saved_as_it_is_stored(tmp_path: Path, writer: str, reader: str, kv_dtype: str) -> None:
    """Rounding what was rounded would give other tokens; and numbers of another kind are refused."""
    path = tmp_path / "system.safetensors"
    with open_llm(writer, kv_dtype=kv_dtype) as llm:
        llm.save_prefix(SYSTEM, path)
    with open_llm(reader, kv_dtype=kv_dtype) as llm:
        expected = said(llm.generate([SYSTEM + "kiwi"], GREEDY, use_tqdm=False))
    with open_llm(reader, kv_dtype=kv_dtype) as llm:
        found = llm.load_prefix(path)
        outputs = llm.generate([SYSTEM + "kiwi"], GREEDY, use_tqdm=False)
        assert found - 1 <= outputs[0].num_cached_tokens and said(outputs) == expected
    with open_llm(reader) as llm, pytest.raises(ModelLoadError, match=f"numbers of kind '{kv_dtype} in groups of 64"):
        llm.load_prefix(path)


@pytest.mark.parametrize("model", sorted(WINDOWED))
def test_f39_f83_windows_reuse_what_their_rings_still_hold(model: str, tmp_path: Path) -> None:
    """Conversations on models with sliding windows, longer than the window; saved and loaded, too."""
    require("mlx")
    require("mlx_lm")
    require("torch")
    folder = write_model(tmp_path / model, model, WINDOWED[model])
    prompt = [3 + 7 * i % 90 for i in range(60)]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    found = {}
    for caching in (True, False):
        with LLM(
            folder, backend="mlx", skip_tokenizer_init=True, num_kv_blocks=60, enable_prefix_caching=caching
        ) as llm:
            outputs, turn = [], prompt
            for extra in (5, 6, 7):
                outputs += llm.generate([turn], params, use_tqdm=False)
                turn = [*turn, *outputs[-1].outputs[0].token_ids, extra]
            found[caching] = said(outputs)
            if caching:
                assert outputs[1].num_cached_tokens == 60 + 8 and outputs[2].num_cached_tokens == 70 + 8
                llm.save_prefix({"prompt_token_ids": turn}, tmp_path / "turns")
            llm.check()
            last = said(llm.generate([[*turn, 8]], params, use_tqdm=False))
    assert found[True] == found[False]
    with LLM(folder, backend="mlx", skip_tokenizer_init=True, num_kv_blocks=60) as llm:
        assert llm.load_prefix(tmp_path / "turns") == len(turn)
        output = llm.generate([[*turn, 8]], params, use_tqdm=False)
        assert output[0].num_cached_tokens == len(turn) and said(output) == last
