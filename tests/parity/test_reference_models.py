"""The reference backend against transformers and mlx-lm on tiny random models (F53, F55, F59, F62, P2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.plan import PENDING, KVRows, Move, PlanRow, RowResult, SampleSpec
from cortexstream.sampling import draw
from tests.conftest import require
from tests.parity.reference_models import (
    CASES,
    EVERYTHING,
    PROMPTS,
    by_transformers,
    distribution,
    greedy,
    load,
    make_folder,
    prefill,
    rows_for,
    step,
)

MLX_CASES = ["llama", "llama-linear-tied-bf16-sharded", "llama-llama3-mha", "mistral-full", "qwen2-tied", "qwen3"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    require("torch")
    require("transformers")
    return {name: make_folder(tmp_path_factory.mktemp(name), *case) for name, case in CASES.items()}


def by_mlx_lm(folder: Path, tokens: Sequence[int]) -> Any:
    require("mlx")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    logits = model(mx.array([list(tokens)]))[0]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["run", "paged"])
def test_f53_f51_logprobs_are_transformers_in_chunks_of_1_7_64(
    folders: dict[str, Path], name: str, layout: str
) -> None:
    want = by_transformers(folders[name], PROMPTS[2])
    for chunk in (1, 7, 64):
        backend = load(folders[name], layout)
        found = prefill(backend, PROMPTS[2], chunk, rows_for(backend, 1))
        assert len(found) == -(-len(PROMPTS[2]) // chunk)
        for position, logprobs in found.items():
            np.testing.assert_allclose(logprobs, want[position], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_f55_a_ragged_batch_continues_like_transformers(folders: dict[str, Path], name: str) -> None:
    """Prompts of 1, 13 and 30 tokens, drawn ahead of the host; the judge recomputes everything for every token."""
    found = greedy(load(folders[name]), PROMPTS, 8)
    assert greedy(load(folders[name], "run"), PROMPTS, 8) == found
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        judged = by_transformers(folders[name], [*prompt, *tokens])[len(prompt) - 1 : -1]
        assert judged.argmax(-1).tolist() == tokens


@pytest.mark.parametrize("name", MLX_CASES)
def test_f53_logprobs_are_mlx_lms(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    folder = with_old_rope_keys(folders[name], tmp_path)
    backend = load(folder)
    found = prefill(backend, PROMPTS[2], 64, rows_for(backend, 0))
    np.testing.assert_allclose(found[29], by_mlx_lm(folder, PROMPTS[2])[29], atol=1e-4, rtol=0)


def with_old_rope_keys(folder: Path, target: Path) -> Path:
    """The same model with rope_theta and rope_scaling as transformers 4 wrote them, which is what mlx-lm reads."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 32), (4, 64), (5, 32), (6, 32), (8, 64)])
@pytest.mark.parametrize("name", ["qwen2-tied", "llama-linear-tied-bf16-sharded", "llama"])
def test_p2_f62_a_folder_quantised_by_mlx_lm(
    folders: dict[str, Path], name: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    """One layer stays dense and the down projections have a packing of their own."""
    require("mlx")
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    (tmp_path / "dense").mkdir()
    source = with_old_rope_keys(folders[name], tmp_path / "dense")

    def how(path: str, _: Any) -> bool | dict[str, Any]:
        if path.endswith("layers.1.self_attn.o_proj"):
            return False
        return {"group_size": 32, "bits": 8, "mode": "affine"} if path.endswith("down_proj") else True

    model, config = load_model(source)
    model, config = quantize_model(model, config, group_size, bits, quant_predicate=how)
    (tmp_path / "packed").mkdir()
    save_model(tmp_path / "packed", model)
    save_config(config, config_path=tmp_path / "packed" / "config.json")
    saved = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization"]
    assert saved["model.layers.0.mlp.down_proj"]["bits"] == 8 and saved["bits"] == bits
    backend = load(tmp_path / "packed")
    found = prefill(backend, PROMPTS[2], 64, rows_for(backend, 0))
    np.testing.assert_allclose(found[29], by_mlx_lm(tmp_path / "packed", PROMPTS[2])[29], atol=1e-4, rtol=0)


def test_p4_bits_do_not_depend_on_batch_chunk_or_layout(folders: dict[str, Path]) -> None:
    """F73: the same logprobs, bit by bit, alone, in a batch of three, in chunks of 1, 7 and 64, run or paged."""
    folder = folders["qwen3"]
    backend = load(folder)
    whole = prefill(backend, PROMPTS[2], 64, rows_for(backend, 0))[29]
    for layout in ("run", "paged"):
        for chunk in (1, 7):
            backend = load(folder, layout)
            assert np.array_equal(prefill(backend, PROMPTS[2], chunk, rows_for(backend, 2))[29], whole)
        backend = load(folder, layout)
        rows = [PlanRow(n, n, prompt, 0, rows_for(backend, n), EVERYTHING) for n, prompt in enumerate(PROMPTS)]
        assert np.array_equal(distribution(step(backend, 1, rows)[2]), whole)


def test_f17_moves_keep_contents_and_order(folders: dict[str, Path]) -> None:
    """Two runs slide to the left over each other's old place, with overlap; the drawn distributions stay the same."""
    folder = folders["llama"]
    first, second = PROMPTS[2], PROMPTS[1]
    still, moving = load(folder, "run"), load(folder, "run")
    old = [KVRows(tuple(range(3, 13)), True), KVRows(tuple(range(20, 30)), True)]
    new = [KVRows(tuple(range(0, 10)), True), KVRows(tuple(range(10, 20)), True)]
    moves = [Move(3, 10, 0, 10, len(first)), Move(20, 10, 10, 10, len(second))]
    results = []
    for backend, after, todo in ((still, old, []), (moving, new, moves)):
        step(
            backend,
            1,
            [PlanRow(n, n, p, 0, kv, None) for n, (p, kv) in enumerate(zip((first, second), old, strict=True))],
        )
        rows = [
            PlanRow(0, 0, (5,), len(first), after[0], EVERYTHING),
            PlanRow(1, 1, (6,), len(second), after[1], EVERYTHING),
        ]
        results.append([distribution(row) for row in step(backend, 2, rows, todo)])
    assert np.array_equal(results[0], results[1])
    grown = step(moving, 3, [PlanRow(0, 0, (7,), len(first) + 1, KVRows(tuple(range(12)), True), EVERYTHING)],
                 [Move(0, 10, 0, 12, len(first) + 1)])  # fmt: skip
    want = step(still, 3, [PlanRow(0, 0, (7,), len(first) + 1, old[0], EVERYTHING)])
    assert np.array_equal(distribution(grown[0]), distribution(want[0]))


def test_pending_reaches_the_penalties(folders: dict[str, Path]) -> None:
    """A pending output token is penalised as a known one is: by enough to change what is drawn."""

    def second(token: int, spec: SampleSpec) -> tuple[int, RowResult]:
        backend = load(folders["qwen2-tied"])
        kv = rows_for(backend, 0)
        (first,) = step(backend, 1, [PlanRow(4, 3, PROMPTS[1], 0, kv, SampleSpec())])
        fed = PENDING if token == PENDING else first.token
        return first.token, step(backend, 2, [PlanRow(4, 3, (fed,), 13, kv, spec)])[0]

    first, free = second(PENDING, EVERYTHING)
    logprobs = distribution(free)
    assert free.token != first
    # A bias that makes the first token win again by 1, and a penalty of 4 for having been drawn.
    bias = SampleSpec(logit_bias=((first, float(logprobs.max() - logprobs[first]) + 1.0),))
    penalty = bias._replace(frequency_penalty=2.0, presence_penalty=2.0)
    assert second(PENDING, bias)[1].token == first
    assert second(PENDING, penalty._replace(output_tokens=(PENDING,)))[1].token == free.token
    assert second(first, penalty._replace(output_tokens=(first,)))[1].token == free.token


@pytest.mark.parametrize("name", ["qwen2-windows", "mistral-window", "qwen3-windows", "qwen3"])
def test_windows_reach_the_core_and_max_window_layers_means_layer_types(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """transformers 5 writes layer_types; older qwen2 files have max_window_layers alone."""
    want = {"qwen2-windows": [None, 5], "mistral-window": [6, 6], "qwen3-windows": [5, None], "qwen3": [None, None]}[
        name
    ]
    assert [layer.window for layer in load(folders[name]).model.layers] == want
    if name == "qwen2-windows":
        older = with_old_rope_keys(folders[name], tmp_path)
        config = json.loads((older / "config.json").read_text())
        assert config.pop("layer_types") == ["full_attention", "sliding_attention"]
        (older / "config.json").write_text(json.dumps(config))
        assert [layer.window for layer in load(older).model.layers] == want


def test_f73_draws_are_keyed_by_the_position_of_the_drawn_token(folders: dict[str, Path]) -> None:
    """Seeded draws are `sampling.draw` on the backend's own distribution, for the position after the last fed one."""
    backend = load(folders["llama"])
    kv = rows_for(backend, 0)
    spec = EVERYTHING._replace(temperature=1.5, seed=2**40 + 3, top_k=60)
    fed: tuple[int, ...] = PROMPTS[1]
    start = 0
    for number in range(8):
        (row,) = step(backend, number + 1, [PlanRow(0, 0, fed, start, kv, spec)])
        logprobs = np.array([logprob for _, logprob in sorted(row.top_logprobs)], np.float32)
        start += len(fed)
        assert row.token == draw(logprobs, spec, start)
        assert row.logprob == logprobs[row.token]
        fed = (row.token,)
