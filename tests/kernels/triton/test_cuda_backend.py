"""The CUDA backend on the Triton kernels, on a CPU in the interpreter: the tokens are those of torch's kernels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM, SamplingParams
from cortexstream.backend import BackendOptions
from cortexstream.plan import PENDING, KVRows, PlanRow, SampleSpec, StepPlan, ring_tokens
from tests.conftest import require
from tests.kernels.host_numbers import host_numbers
from tests.parity.torch_models import ARCHITECTURES, write_model

torch: Any = require("torch")
require("triton")
require("transformers")

BLOCK = 16
PROMPTS = [[1 + (7 * i + 3 * n) % 150 for i in range(n)] for n in (7, 40, 1)]
PARAMS = [SamplingParams(max_tokens=3, temperature=t, seed=5, ignore_eos=True) for t in (0.0, 0.9, 0.0)]
NAMES = ["llama", "qwen3", "gemma2", "gpt_oss"]  # plain; norms of heads; caps and rings; sinks and rings


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    layers = {"num_hidden_layers": 2}
    return {name: write_model(root / name, name, {**ARCHITECTURES[name], **layers}) for name in NAMES}


def generate(folder: Path, kernels: str, **options: Any) -> list[tuple[int, ...]]:
    with LLM(
        str(folder), backend="cuda", skip_tokenizer_init=True, block_tokens=BLOCK, max_num_batched_tokens=24,
        num_kv_blocks=40, backend_options={"device": "cpu", "kernels": kernels}, **options,
    ) as llm:  # fmt: skip
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert llm.notes == () or "rings" in llm.notes[0]
        return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_f53_f58_tokens_are_those_of_torch(name: str, folders: dict[str, Path]) -> None:
    """Chunks of prompts beside decoding rows, then decoding rows alone."""
    assert generate(folders[name], "triton") == generate(folders[name], "torch")


def test_p13_f10_guesses_scores_and_masks_through_triton(folders: dict[str, Path]) -> None:
    """Rows that draw several times, prompts that are scored, and masks: tokens and numbers are those of torch."""
    repeats = [[1, 9, 8, 7, 9, 8, 7, 9, 8], [3, 4] * 9]
    asked = [
        SamplingParams(max_tokens=8, temperature=0, logprobs=2, ignore_eos=True, allowed_token_ids=[7, 8, 9, 11]),
        SamplingParams(max_tokens=5, temperature=0.9, seed=3, prompt_logprobs=2, top_k=9, ignore_eos=True,
                       sampling_metadata=True, logprobs=1, logprobs_mode="processed_logprobs"),
    ]  # fmt: skip
    answers = {}
    for kernels in ("torch", "triton"):
        with LLM(
            str(folders["llama"]), backend="cuda", skip_tokenizer_init=True, num_kv_blocks=20, block_tokens=BLOCK,
            speculative_config={"num_speculative_tokens": 3}, backend_options={"device": "cpu", "kernels": kernels},
        ) as llm:  # fmt: skip
            answers[kernels] = llm.generate(repeats, asked, use_tqdm=False)
            assert llm.stats().accepted_tokens > 0
    for one, other in zip(answers["torch"], answers["triton"], strict=True):
        (x,), (y,) = one.outputs, other.outputs
        assert x.token_ids == y.token_ids
        scored = zip(one.prompt_logprobs or (), other.prompt_logprobs or (), strict=True)
        for a, b in [*zip(x.logprobs or (), y.logprobs or (), strict=True), *scored]:
            assert (a is None) == (b is None)
            assert all(abs(a[t].logprob - b[t].logprob) < 1e-4 for t in a or () if b is not None and a is not None)
    assert {t for t in answers["triton"][0].outputs[0].token_ids} <= {7, 8, 9, 11}


@pytest.mark.parametrize(("name", "kv_dtype"), [("llama", "int8"), ("mistral", "int4")])
def test_f89_quantised_kv(name: str, kv_dtype: str, tmp_path: Path) -> None:
    """Codes, scales and biases; of rings, too, which chunks of prompts leave and re-enter as they are stored."""
    folder = write_model(tmp_path, name, {**ARCHITECTURES[name], "head_dim": 32, "num_hidden_layers": 2})
    assert generate(folder, "triton", kv_dtype=kv_dtype) == generate(folder, "torch", kv_dtype=kv_dtype)


def test_p2_packed_layers_multiply_by_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that mlx-lm packed: fused projections, the head and the embedding all go through Triton's kernels."""
    require("mlx_lm")
    from cortexstream.kernels.triton import affine_matmul
    from tests.parity.test_quantized_linear import quantize
    from tests.parity.tiny_models import write_model as write_packable

    folder = quantize(
        write_packable(tmp_path / "llama", "llama", {"hidden_size": 128, "intermediate_size": 256}), 4, 64
    )
    seen: list[int] = []
    inner = affine_matmul.affine_matmul

    def watched(x: Any, packed: Any, *rest: Any, **options: Any) -> Any:
        seen.append(len(packed))
        return inner(x, packed, *rest, **options)

    expected = generate(folder, "torch")
    monkeypatch.setattr(affine_matmul, "affine_matmul", watched)
    assert generate(folder, "triton") == expected
    assert 512 in seen and len(set(seen)) >= 4  # gate and up as one; qkv, o and down, and the head


class Replayed:
    """In place of a CUDA graph: what was captured runs when it is replayed, on the same tensors."""

    def __init__(self, step: Any, numbers: Any, logits: Any) -> None:
        self._step, self._numbers, self._logits = step, numbers, logits

    def replay(self) -> None:
        self._logits.copy_(self._step._run(self._numbers, self._step._tables.max_tokens, one_launch=True))


@pytest.mark.parametrize("name", ["gemma2"])
def test_what_a_graph_replays_serves_fewer_rows_of_any_length(name: str, folders: dict[str, Path]) -> None:
    """Three rows in a graph for four, at lengths that grow: what the other form of the kernels gives. Not bit for bit,
    since a CPU's matrix product of four rows has other bits than that of three."""
    from cortexstream.backends.cuda import create
    from cortexstream.backends.cuda.decode import Captured, DecodeStep

    def backend() -> Any:
        made = create(BackendOptions(str(folders[name]), block_tokens=BLOCK, max_num_seqs=8,
                                     extra={"device": "cpu", "kernels": "triton"}))  # fmt: skip
        made.allocate_kv(24, tuple(4 * (ring_tokens(w, BLOCK) // BLOCK) for w in made.model.windows))
        return made

    def captured(self: Any, size: int) -> Captured:
        if size not in self._graphs:
            numbers = torch.tensor(self._numbers((), size))
            logits = self._run(numbers, self._tables.max_tokens, one_launch=True)
            self._graphs[size] = Captured(Replayed(self, numbers, logits), numbers, logits)
        graph: Captured = self._graphs[size]
        return graph

    plain, replayed = backend(), backend()
    step = replayed._run_rows._decode
    step._graphs = {}
    step._captured = captured.__get__(step, DecodeStep)
    logits: list[list[Any]] = [[], []]
    for which, made in enumerate((plain, replayed)):
        decode = made._run_rows._decode
        inner = decode.logits

        def watched(rows: Any, inner: Any = inner, which: int = which) -> Any:
            logits[which].append(inner(rows).clone())
            return logits[which][-1]

        decode.logits = watched
        drawn = [[row.token for row in made.collect(made.submit(plan)).rows] for plan in plans(made)]
        assert len(drawn) == 4
    assert set(step._graphs) == {4, 2}
    for a, b in zip(*logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def plans(backend: Any) -> list[StepPlan]:
    """Three prompts, then three decoding rows, twice, then two of them: the tokens are pending draws."""
    rings = [ring_tokens(w, BLOCK) // BLOCK for w in backend.model.windows]

    def kv(slot: int) -> KVRows:
        own = tuple(range(6 * slot, 6 * slot + 6))[::-1]
        return KVRows(own, False, tuple(KVRows(tuple(range(n * slot, n * slot + n)), True) for n in rings))

    known = [kv(slot) for slot in range(3)]
    rows = [PlanRow(slot, slot, tuple(PROMPTS[slot]), 0, known[slot], SampleSpec()) for slot in range(3)]
    made = [StepPlan(1, tuple(rows))]
    for step in range(3):
        live = range(3) if step < 2 else (0, 2)
        made.append(StepPlan(2 + step, tuple(
            PlanRow(slot, slot, (-1,), len(PROMPTS[slot]) + step, known[slot], SampleSpec()) for slot in live
        )))  # fmt: skip
    return made


def test_heads_that_are_too_wide_go_through_torch_with_a_note(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama", {"head_dim": 260, "num_hidden_layers": 1})
    with LLM(
        str(folder), backend="cuda", skip_tokenizer_init=True, backend_options={"device": "cpu", "kernels": "triton"}
    ) as llm:
        (output,) = llm.generate(PROMPTS[:1], PARAMS[0], use_tqdm=False)
        assert "heads of 260 numbers; the kernels take at most 256" in llm.notes[0]
        assert len(output.outputs[0].token_ids) == 3 and output.outputs[0].error is None


def specs() -> list[SampleSpec]:
    """Every parameter of a draw, alone and together; the output of some ends with a token that nobody has seen."""
    history: dict[str, Any] = {"prompt_tokens": (3, 4, 5, 5), "output_tokens": (7, 7, 8)}
    waiting: dict[str, Any] = {"prompt_tokens": (3, 4), "output_tokens": (7, 9, PENDING)}
    return [
        SampleSpec(), SampleSpec(temperature=0.7, seed=3), SampleSpec(temperature=1.2, seed=2**64 - 5, sample_index=3),
        SampleSpec(temperature=0.9, seed=2**63, top_k=5), SampleSpec(temperature=0.9, seed=9, top_p=0.6, min_p=0.02),
        SampleSpec(logit_bias=((4, 9.0), (5, -9.0))), SampleSpec(temperature=1.0, seed=1, banned=tuple(range(0, 90))),
        SampleSpec(repetition_penalty=3.0, **history), SampleSpec(presence_penalty=2.0, **history),
        SampleSpec(frequency_penalty=2.0, **history), SampleSpec(frequency_penalty=2.0, **waiting),
        SampleSpec(repetition_penalty=2.0, presence_penalty=1.0, temperature=0.8, seed=4, top_p=0.8, **waiting),
        SampleSpec(banned=(7,), logit_bias=((8, 2.0),), presence_penalty=0.5, temperature=0.5, seed=6, **history),
        *(SampleSpec(temperature=2.0, seed=8, top_k=k) for k in (99, 100, 2**31, 2**32 + 1, 2**63, 2**70)),
    ]  # fmt: skip


def test_f71_f75_the_draw_by_triton_is_the_draw_by_torch() -> None:
    """Tilted towards the tokens of the histories, so that each parameter matters to some row."""
    from cortexstream.backends.cuda import sample, triton_sample

    asked = specs()
    pending = [torch.tensor(7) if PENDING in spec.output_tokens else None for spec in asked]
    for seed in range(6):
        logits = torch.randn(len(asked), 100, generator=torch.Generator().manual_seed(seed))
        logits[:, 3:10] += 3.0
        positions = [40 + seed + n for n in range(len(asked))]
        expected, broken = sample.draw(logits, asked, positions, pending)
        found, also_broken = triton_sample.draw(logits, asked, positions, pending)
        assert found.tolist() == expected.tolist() and also_broken.tolist() == broken.tolist()


def test_p11_a_draw_takes_no_number_from_the_host() -> None:
    """Every parameter of a draw, with both kinds of kernels; and the control of the check."""
    from cortexstream.backends.cuda import sample, triton_sample

    asked = specs()
    pending = [torch.tensor(7) if PENDING in spec.output_tokens else None for spec in asked]
    logits, i = torch.zeros(len(asked), 100), torch.arange(3)
    for draw in (sample.draw, triton_sample.draw):
        assert host_numbers(partial(draw, logits, asked, list(range(len(asked))), pending)) == []
    assert host_numbers(lambda: logits.__setitem__((i, i), -5.0)) == [-5.0]


class Recorded:
    """A kernel that notes what it would be compiled for."""

    def __init__(self, kernel: Any, launched: set[str]) -> None:
        self._kernel, self._launched = kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **compiled: Any) -> None:
            self._launched.add(f"{self._kernel.__name__}: {compiled}")
            self._kernel[grid](*args, **compiled)

        return launch


def test_f47_long_rows_compile_nothing_after_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 600 tokens has two splits in a layer of full attention, whose merge ran before the first step. That
    wrote nothing."""
    from cortexstream.backends.cuda import create
    from cortexstream.kernels.triton import decode_attention

    launched: set[str] = set()
    for name in ("decode_split_kernel", "decode_merge_kernel"):
        monkeypatch.setattr(decode_attention, name, Recorded(getattr(decode_attention, name), launched))
    folder = write_model(
        tmp_path, "gemma2", {**ARCHITECTURES["gemma2"], "num_hidden_layers": 2, "max_position_embeddings": 1024}
    )
    backend: Any = create(
        BackendOptions(str(folder), block_tokens=64, max_num_seqs=2, extra={"device": "cpu", "kernels": "triton"})
    )
    backend.allocate_kv(16, (1,))
    assert {name.split(":")[0] for name in launched} == {"decode_split_kernel", "decode_merge_kernel"}
    assert not any(part.any() for pool in backend._memory.pools for store in pool._stores for part in store.parts)
    before = set(launched)
    ring = (KVRows((0,), True),)
    rows = [PlanRow(0, 0, (5,), 600, KVRows(tuple(range(16)), False, ring), SampleSpec())]
    launched.clear()
    backend.collect(backend.submit(StepPlan(1, tuple(rows))))
    assert launched == before


def test_f53_slots_that_change_hands_and_two_kinds_of_rotary(tmp_path: Path) -> None:
    """Two slots for five prompts of several lengths, on a model whose two layers turn by other angles."""
    kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    folder = write_model(tmp_path, "gemma3_text", {**ARCHITECTURES["gemma3_text"], **kinds})
    prompts = [[1 + (7 * i + 3 * n) % 150 for i in range(n)] for n in (20, 3, 18, 2, 9)]
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    found = []
    for kernels in ("triton", "torch"):
        with LLM(
            str(folder), backend="cuda", skip_tokenizer_init=True, block_tokens=BLOCK, num_kv_blocks=12, max_num_seqs=2,
            backend_options={"device": "cpu", "kernels": kernels},
        ) as llm:  # fmt: skip
            found.append([tuple(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)])
    assert found[0] == found[1]


def test_the_angles_of_a_step_are_laid_out_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from cortexstream.backends.cuda.triton_attention import Appender

    made: list[int] = []
    table = Appender._table

    def watched(self: Any, rotary: Any) -> Any:
        found = table(self, rotary)
        made.append(len(self._angles))
        return found

    monkeypatch.setattr(Appender, "_table", watched)
    generate(folders["llama"], "triton")
    assert len(made) >= 4 and set(made) == {1}
