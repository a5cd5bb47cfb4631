"""The reference backend against transformers and mlx-lm on tiny random models (F53, F55, F59, F62, P2)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.backend import Backend, BackendOptions
from cortexstream.backends import reference
from cortexstream.plan import PENDING, KVRows, Move, PlanRow, RowResult, SampleSpec, StepPlan
from cortexstream.sampling import draw
from tests.conftest import require

VOCAB = 97
BLOCK = 4
EVERYTHING = SampleSpec(logprobs=VOCAB)  # greedy, and the whole distribution
PROMPTS = [tuple(np.random.default_rng(n).integers(0, VOCAB, n).tolist()) for n in (1, 13, 30)]

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}

# name: (model_type, dtype, sharded, settings beside the common ones)
CASES: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "llama": ("llama", "float32", False, {}),
    "llama-biases": ("llama", "float16", False, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-linear-tied-bf16-sharded": (
        "llama", "bfloat16", True, {"rope_parameters": LINEAR, "tie_word_embeddings": True},
    ),
    "llama-llama3-mha": ("llama", "float32", False, {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    "mistral-full": ("mistral", "bfloat16", False, {"sliding_window": None, "head_dim": 20}),
    "mistral-window": ("mistral", "float32", True, {"sliding_window": 6}),
    "qwen2-tied": ("qwen2", "float32", False, {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2", "float32", False, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "bfloat16", True, {"head_dim": 24}),
    "qwen3-windows": (
        "qwen3", "float32", False,
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip
MLX_CASES = ["llama", "llama-linear-tied-bf16-sharded", "llama-llama3-mha", "mistral-full", "qwen2-tied", "qwen3"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    require("torch")
    require("transformers")
    return {name: make_folder(tmp_path_factory.mktemp(name), *case) for name, case in CASES.items()}


def make_folder(folder: Path, model_type: str, dtype: str, sharded: bool, settings: dict[str, Any]) -> Path:
    """A random model as transformers saves it. All parameters are random: zero biases and unit norms hide mistakes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2,
        "bos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **settings}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2 if parameter.ndim == 1 else 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return folder


def by_transformers(folder: Path, tokens: Sequence[int]) -> Any:
    """Log-probabilities after every token, [T, V]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1).numpy()


def by_mlx_lm(folder: Path, tokens: Sequence[int]) -> Any:
    require("mlx")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    logits = model(mx.array([list(tokens)]))[0]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def load(folder: Path, layout: str = "paged", blocks: int = 64) -> Backend:
    backend = reference.create(BackendOptions(model=str(folder), kv_layout=layout, block_tokens=BLOCK))  # type: ignore[arg-type]
    assert backend.info.kv_layout == layout
    backend.allocate_kv(blocks)
    return backend


def rows_for(number: int, layout: str) -> KVRows:
    """16 of 64 blocks for one of four sequences: adjacent, or every fourth one, backwards."""
    return KVRows(tuple(range(16 * number, 16 * number + 16)), True) if layout == "run" else KVRows(
        tuple(range(63 - number, -1, -4)), False
    )  # fmt: skip


def step(backend: Backend, number: int, rows: Iterable[PlanRow], moves: Iterable[Move] = ()) -> tuple[RowResult, ...]:
    result = backend.collect(backend.submit(StepPlan(number, tuple(rows), tuple(moves))))
    assert result.step == number
    return result.rows


def distribution(row: RowResult) -> Any:
    assert row.error is None and row.logprob == row.top_logprobs[0][1]
    return np.array([logprob for _, logprob in sorted(row.top_logprobs)])


def prefill(backend: Backend, tokens: Sequence[int], chunk: int, kv: KVRows) -> dict[int, Any]:
    """Position -> log-probabilities after it, at the end of every chunk."""
    found = {}
    for start in range(0, len(tokens), chunk):
        part = tuple(tokens[start : start + chunk])
        (row,) = step(backend, start + 1, [PlanRow(0, 0, part, start, kv, EVERYTHING)])
        found[start + len(part) - 1] = distribution(row)
    return found


def greedy(
    backend: Backend, prompts: Sequence[Sequence[int]], count: int, layout: str, chunk: int = 5
) -> list[list[int]]:
    """Continue all prompts at once, one plan in flight, prompts in chunks beside rows that decode already."""
    done = [0] * len(prompts)
    fed = [0] * len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    ticket, number = None, 0
    while ticket is not None or min(done) < count:
        rows = []
        for seq, prompt in enumerate(prompts):
            if fed[seq] < len(prompt):
                part = tuple(prompt[fed[seq] : fed[seq] + chunk])
                last = fed[seq] + len(part) == len(prompt)
            elif done[seq] < count:
                part, last = (PENDING,), True
            else:
                continue
            rows.append(PlanRow(seq, seq, part, fed[seq], rows_for(seq, layout), SampleSpec() if last else None))
            fed[seq] += len(part)
            done[seq] += last
        number += 1
        following = backend.submit(StepPlan(number, tuple(rows))) if rows else None
        if ticket is not None:
            for row in backend.collect(ticket).rows:
                tokens[row.seq_id].append(row.token)
        ticket = following
    return tokens


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["run", "paged"])
def test_f53_f51_logprobs_are_transformers_in_chunks_of_1_7_64(
    folders: dict[str, Path], name: str, layout: str
) -> None:
    want = by_transformers(folders[name], PROMPTS[2])
    for chunk in (1, 7, 64):
        found = prefill(load(folders[name], layout), PROMPTS[2], chunk, rows_for(1, layout))
        assert len(found) == -(-len(PROMPTS[2]) // chunk)
        for position, logprobs in found.items():
            np.testing.assert_allclose(logprobs, want[position], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_f55_a_ragged_batch_continues_like_transformers(folders: dict[str, Path], name: str) -> None:
    """Prompts of 1, 13 and 30 tokens, drawn ahead of the host; the judge recomputes everything for every token."""
    found = greedy(load(folders[name]), PROMPTS, 8, "paged")
    assert greedy(load(folders[name], "run"), PROMPTS, 8, "run") == found
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        judged = by_transformers(folders[name], [*prompt, *tokens])[len(prompt) - 1 : -1]
        assert judged.argmax(-1).tolist() == tokens


@pytest.mark.parametrize("name", MLX_CASES)
def test_f53_logprobs_are_mlx_lms(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    folder = with_old_rope_keys(folders[name], tmp_path)
    found = prefill(load(folder), PROMPTS[2], 64, rows_for(0, "paged"))
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
    found = prefill(backend, PROMPTS[2], 64, rows_for(0, "paged"))
    np.testing.assert_allclose(found[29], by_mlx_lm(tmp_path / "packed", PROMPTS[2])[29], atol=1e-4, rtol=0)


def test_p4_bits_do_not_depend_on_batch_chunk_or_layout(folders: dict[str, Path]) -> None:
    """F73: the same logprobs, bit by bit, alone, in a batch of three, in chunks of 1, 7 and 64, run or paged."""
    folder = folders["qwen3"]
    whole = prefill(load(folder), PROMPTS[2], 64, rows_for(0, "paged"))[29]
    for layout in ("run", "paged"):
        for chunk in (1, 7):
            assert np.array_equal(prefill(load(folder, layout), PROMPTS[2], chunk, rows_for(2, layout))[29], whole)
        rows = [PlanRow(n, n, prompt, 0, rows_for(n, layout), EVERYTHING) for n, prompt in enumerate(PROMPTS)]
        assert np.array_equal(distribution(step(load(folder, layout), 1, rows)[2]), whole)


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
    kv = rows_for(0, "paged")

    def second(token: int, spec: SampleSpec) -> tuple[int, RowResult]:
        backend = load(folders["qwen2-tied"])
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
    backend, kv = load(folders["llama"]), rows_for(0, "paged")
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
