"""Every architecture on the CUDA backend's CPU device against plain transformers: chunks, joins, leaves, windows, sinks
(P3, F53, F55)."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM, ModelLoadError, SamplingParams
from cortexstream.backend import BackendOptions
from cortexstream.plan import KVRows, PlanRow, SampleSpec, StepPlan, ring_tokens
from tests.conftest import require
from tests.parity.torch_models import ARCHITECTURES, write_model

torch: Any = require("torch")
transformers: Any = require("transformers")
BLOCK, BLOCKS = 4, 20
PROMPTS = [[1 + (7 * i + 3 * n) % 150 for i in range(n)] for n in (7, 30, 1, 19)]
NEW = 6


class Judge:
    """transformers' own model, eager attention, no cache: logits of every position."""

    def __init__(self, folder: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self._model.eval()

    def logits(self, tokens: list[int]) -> Any:
        with torch.inference_mode():
            return self._model(torch.tensor([tokens]), use_cache=False).logits[0]


class Hand:
    """Plans made by hand, and the logits that every draw came from."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from cortexstream.backends.cuda import create

        module: Any = import_module("cortexstream.backends.cuda.runner")
        self.backend = create(BackendOptions(str(folder), block_tokens=BLOCK, extra={"device": "cpu"}))
        windows = self.backend.model.windows
        self._rings = [ring_tokens(w, BLOCK) // BLOCK for w in windows]
        self.backend.allocate_kv(4 * BLOCKS, tuple(4 * n for n in self._rings))
        self.logits: list[Any] = []
        forward = module.forward

        def watched(*arguments: Any) -> Any:
            self.logits.append(forward(*arguments))
            return self.logits[-1]

        monkeypatch.setattr(module, "forward", watched)
        self._step = 0

    def rows(self, row: int) -> KVRows:
        """Blocks of one row, scattered among those of the others."""

        def every_fourth(count: int) -> tuple[int, ...]:
            return tuple((4 * i + (row + i) % 4) for i in range(count))[::-1]

        return KVRows(every_fourth(BLOCKS), False, tuple(KVRows(every_fourth(n), False) for n in self._rings))

    def step(self, *rows: tuple[int, list[int], int, bool]) -> tuple[list[int], Any]:
        """(row, tokens, start, draws?) -> drawn tokens, logits of the drawing rows."""
        self._step += 1
        plan = StepPlan(
            self._step,
            tuple(PlanRow(r, r, tuple(t), s, self.rows(r), SampleSpec() if draws else None) for r, t, s, draws in rows),
        )
        result = self.backend.collect(self.backend.submit(plan))
        assert not any(row.error for row in result.rows)
        return [row.token for row in result.rows], self.logits[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_p3_logits_are_transformers(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 0 and 2 start whole while 1 and 3 come in chunks; then all decode; row 2 leaves before the end."""
    folder = write_model(tmp_path / architecture, architecture, ARCHITECTURES[architecture])
    judge, hand = Judge(folder), Hand(folder, monkeypatch)
    assert len(hand.backend.model.layers) == len({*range(len(hand.backend.model.layers))}) >= 3
    tokens = [list(p) for p in PROMPTS]
    worst = 0.0

    def compare(row: int, logits: Any) -> None:
        nonlocal worst
        expected = judge.logits(tokens[row])[-1]
        worst = max(worst, float((logits - expected).abs().max() / expected.abs().max()))

    drawn, logits = hand.step(
        (0, tokens[0], 0, True), (1, tokens[1][:13], 0, False), (2, tokens[2], 0, True), (3, tokens[3][:10], 0, False)
    )
    for place, row in enumerate((0, 2)):
        compare(row, logits[place])
        tokens[row].append(drawn[place])
    drawn, logits = hand.step(
        (2, tokens[2][-1:], 1, True), (3, tokens[3][10:], 10, True), (0, tokens[0][-1:], 7, True),
        (1, tokens[1][13:], 13, True),
    )  # fmt: skip
    for place, row in enumerate((2, 3, 0, 1)):
        compare(row, logits[place])
        tokens[row].append(drawn[place])
    for number in range(NEW):
        rows = [0, 1, 2, 3] if number < NEW // 2 else [3, 1, 0]
        drawn, logits = hand.step(*((r, tokens[r][-1:], len(tokens[r]) - 1, True) for r in rows))
        for place, row in enumerate(rows):
            compare(row, logits[place])
            tokens[row].append(drawn[place])
    assert worst < 1e-4
    hand.backend.close()


def test_at_least_twenty_architectures() -> None:
    assert len(ARCHITECTURES) >= 20


@pytest.mark.parametrize(
    ("architecture", "extra", "words"),
    [
        ("mamba", {"state_size": 8}, "attend through transformers' attention interface"),
        ("falcon", {"alibi": True}, "attention"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "attention"),
        ("bert", {}, "its tokens attend to later ones"),
        (
            "falcon_h1",
            {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64},
            "mixes neighbouring tokens outside of attention",
        ),
    ],
)
def test_other_architectures_are_refused_by_name(
    architecture: str, extra: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", architecture, extra)
    with pytest.raises(ModelLoadError, match=words):
        LLM(folder, backend="cuda", skip_tokenizer_init=True, backend_options={"device": "cpu"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_folders_run(dtype: str, tmp_path: Path) -> None:
    """In their own dtype within its rounding of float32, and in float32 when nothing is said on a CPU."""
    folder = write_model(tmp_path / "half", "llama", {}, dtype)
    prompt = {"prompt_token_ids": PROMPTS[1]}
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=5, ignore_eos=True)
    found = {}
    for asked in ("auto", dtype):
        with LLM(
            folder, backend="cuda", dtype=asked, skip_tokenizer_init=True, backend_options={"device": "cpu"}
        ) as llm:
            assert llm.info.dtype == ("float32" if asked == "auto" else dtype)
            assert llm.model.kv_item_bytes == (4 if asked == "auto" else 2)
            found[asked] = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    first, other = ((found[name].logprobs or ({},))[0] for name in ("auto", dtype))
    assert all(abs(first[token].logprob - other[token].logprob) < 0.1 for token in first.keys() & other.keys())
    assert len(first.keys() & other.keys()) >= 3


def test_foreign_quantisation_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", {})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelLoadError, match="quantised by 'awq'; use the original weights, or what mlx-lm quantised"):
        LLM(folder, backend="cuda", skip_tokenizer_init=True, backend_options={"device": "cpu"})


@pytest.mark.parametrize(
    ("architecture", "norm", "mlp", "qkv", "rotary"),
    [
        ("llama", 7, 3, 3, 3), ("qwen3", 13, 3, 3, 3), ("gemma2", 17, 4, 4, 4), ("phi3", 7, 3, 0, 3),
        ("mixtral", 7, 0, 3, 3), ("starcoder2", 0, 0, 3, 3), ("glm4", 13, 3, 3, 0), ("cohere", 0, 3, 3, 0),
    ],
)  # fmt: skip
def test_structural_rewrites_are_made_where_they_hold(
    architecture: str, norm: int, mlp: int, qkv: int, rotary: int, tmp_path: Path
) -> None:
    """Interleaved rotary embeddings (GLM, Cohere) turn other pairs than attention's: the check must find that."""
    from cortexstream.backends.cuda.fused import torch_ops
    from cortexstream.backends.cuda.models import load

    folder = write_model(tmp_path / "model", architecture, ARCHITECTURES[architecture])
    made = load(folder, "float32", torch.device("cpu"), torch_ops()).rewrites
    assert {name: made.get(name, 0) for name in ("norm", "mlp", "qkv", "rotary")} == {
        "norm": norm, "mlp": mlp, "qkv": qkv, "rotary": rotary,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["cohere", "olmo"])
def test_layer_norms_are_no_root_mean_square_norms(architecture: str, dtype: str, tmp_path: Path) -> None:
    """Wide vectors, small weights, half precision: where a mean near zero would hide the difference."""
    from cortexstream.backends.cuda.fused import torch_ops
    from cortexstream.backends.cuda.models import load

    wide = {**ARCHITECTURES[architecture], "hidden_size": 512, "num_hidden_layers": 1}
    folder = write_model(tmp_path / "model", architecture, wide, dtype=dtype, scale=0.02)
    made = load(folder, dtype, torch.device("cpu"), torch_ops()).rewrites
    assert "norm" not in made and bool(made["rotary"]) == (architecture == "olmo")


def test_a_rewritten_model_leaves_transformers_alone(tmp_path: Path) -> None:
    """Another model of the same class, loaded before or after, computes as before."""
    folder = write_model(tmp_path / "model", "qwen3", ARCHITECTURES["qwen3"])
    judge = Judge(folder)
    before = judge.logits(PROMPTS[0])
    with LLM(folder, backend="cuda", skip_tokenizer_init=True, backend_options={"device": "cpu"}) as llm:
        llm.generate({"prompt_token_ids": PROMPTS[0]}, SamplingParams(max_tokens=2), use_tqdm=False)
        assert torch.equal(judge.logits(PROMPTS[0]), before)
        assert torch.equal(Judge(folder).logits(PROMPTS[0]), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"drop": "model.layers.1.mlp.up_proj.weight"},
            "1 tensors are missing, such as model.layers.1.mlp.up_proj",
        ),
        ({"drop": "lm_head.weight"}, "1 tensors are missing, such as lm_head.weight"),
        ({"add": "model.layers.0.extra.weight"}, "1 tensors are unexpected, such as model.layers.0.extra.weight"),
        ({"config": {"num_hidden_layers": 4}}, "9 tensors are missing, such as model.layers.3"),
        ({"config": {"num_hidden_layers": 2}}, "9 tensors are unexpected, such as model.layers.2"),
        ({"config": {"intermediate_size": 80}}, "tensors are mismatched, such as .*mlp"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    """transformers would make up what is missing, other numbers every time."""
    from safetensors.numpy import load_file, save_file

    folder = write_model(tmp_path / "model", "llama", {})
    weights = load_file(folder / "model.safetensors")
    if "drop" in change:
        del weights[change["drop"]]
    if "add" in change:
        weights[change["add"]] = weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change.get("config", {})}))
    with pytest.raises(ModelLoadError, match=words):
        LLM(folder, backend="cuda", skip_tokenizer_init=True, backend_options={"device": "cpu"})


def test_longrope_keeps_to_the_context_in_which_rows_do_not_change_each_other(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    folder = write_model(tmp_path / "model", "phi3", {
        "rope_parameters": rope, "max_position_embeddings": 128, "original_max_position_embeddings": 32,
    })  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(folder, backend="cuda", skip_tokenizer_init=True, backend_options={"device": "cpu"}) as llm:
        assert llm.model.max_context_tokens == 32 and "the context is 32 tokens and not 128" in llm.notes[0]
        alone = llm.generate([PROMPTS[0]], params, use_tqdm=False)[0].outputs[0].token_ids
        beside = llm.generate([PROMPTS[0], PROMPTS[3]], params, use_tqdm=False)[0].outputs[0].token_ids
        assert alone == beside


def test_warm_up_fits_a_context_that_is_smaller_than_the_memory(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", {"max_position_embeddings": 64})
    with LLM(
        folder, backend="cuda", skip_tokenizer_init=True, backend_options={"device": "cpu"}, num_kv_blocks=40,
        block_tokens=16, max_num_seqs=4,
    ) as llm:  # fmt: skip
        assert len(llm.warmup(16, 4).steps) == 2
