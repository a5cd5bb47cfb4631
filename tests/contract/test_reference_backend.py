"""The reference backend's own border: what `create` refuses, misuse of the protocol, draws that cannot be made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cortexstream.backend import Backend, BackendOptions, LayerKV
from cortexstream.backends import reference
from cortexstream.backends.common.draw import Drawn, draw_rows
from cortexstream.backends.common.kv_pool import KVPool
from cortexstream.backends.reference.store import make_store
from cortexstream.errors import EngineError, InvalidRequestError, ModelLoadError, OutOfMemoryBudgetError
from cortexstream.plan import PENDING, KVRows, Move, PlanRow, SampleSpec, StepPlan
from tests.contract.tiny_llama import CONFIG, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


@pytest.fixture
def backend(folder: Path) -> Backend:
    made = reference.create(BackendOptions(model=str(folder), block_tokens=4))
    made.allocate_kv(8)
    return made


def row(tokens: tuple[int, ...] = (1, 2), start: int = 0, slot: int = 0, **more: Any) -> PlanRow:
    values = {"seq_id": slot, "kv": KVRows((2 * slot, 2 * slot + 1), False), "sample": SampleSpec(), **more}
    return PlanRow(slot=slot, tokens=tokens, start=start, **values)


def test_f61_info_and_model(backend: Backend, folder: Path) -> None:
    assert reference.available() is None and reference.accelerator() is None
    assert (backend.info.name, backend.info.kv_layout, backend.info.dtype) == ("reference", "paged", "float32")
    assert backend.info.memory_bytes > 0 and backend.info.block_tokens == 4
    model = backend.model
    assert (model.vocab_size, model.max_context_tokens, model.eos_token_ids) == (11, 64, frozenset({3}))
    assert model.kv_bytes_per_token == 2 * 2 * 4 * 4  # layers x (key and value) x dim x bytes
    assert model.weight_bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": None}, "needs a model folder"),
        ({"dtype": "bfloat16"}, "dtype: is 'bfloat16'"),
        ({"kv_layout": "ring"}, "kv_layout 'ring' is unknown"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"extra": {"speed": 1}}, "no option 'speed'"),
    ],
)
def test_create_refuses_options(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ModelLoadError, InvalidRequestError), match=words):
        reference.create(BackendOptions(**{"model": str(folder), **options}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported .* llama, mistral, qwen2, qwen3"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": "11"}, "vocab_size is '11'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"num_key_value_heads": 3}, "2 attention heads cannot share 3"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size 8 is no multiple of 3"),
        ({"head_dim": 3}, "head_dim is 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_traditional": True}, "rope_traditional True is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not supported"),
        ({"rope_parameters": {"full_attention": {}}}, "must be one object for all layers"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_theta": 5, "rope_parameters": {"rope_theta": 6}}, "rope_theta is 5 and, in rope_parameters, 6"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types of 'sliding_attention' are not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types must be 2 times one of"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"model_type": "qwen3"}, "has no head_dim"),
        ({"tie_word_embeddings": False}, r"tensor lm_head\.weight of shape \(11, 8\) is missing"),
        ({"attention_bias": True}, r"tensor model\.layers\.0\.self_attn\.q_proj\.bias of shape \(8,\) is missing"),
        ({"num_hidden_layers": 1}, r"tensor model\.layers\.1\.\S+ has no place"),
        ({"intermediate_size": 16}, r"gate_proj\.weight has shape \(12, 8\); config.json asks for \(16, 8\)"),
    ],
)
def test_create_refuses_models(folder: Path, change: dict[str, Any], words: str) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(ModelLoadError, match=words):
        reference.create(BackendOptions(model=str(folder)))


def test_without_tie_word_embeddings_the_weights_decide(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "tie_word_embeddings"}))
    tensors = load_file(folder / "model.safetensors")
    tied = reference.create(BackendOptions(model=str(folder))).model.weight_bytes
    save_file({**tensors, "lm_head.weight": np.ones((11, 8), np.float32)}, folder / "model.safetensors")
    assert reference.create(BackendOptions(model=str(folder))).model.weight_bytes == tied + 11 * 8 * 4


def test_p7_kv_memory(folder: Path) -> None:
    backend = reference.create(BackendOptions(model=str(folder), block_tokens=4))
    with pytest.raises(EngineError, match="allocate_kv must be called"):
        backend.submit(StepPlan(1, (row(),)))
    with pytest.raises(EngineError, match="0 KV blocks"):
        backend.allocate_kv(0)
    with pytest.raises(OutOfMemoryBudgetError, match="ask for at most"):
        backend.allocate_kv(10**13)
    assert backend.allocate_kv(10) == 10 * 4 * backend.model.kv_bytes_per_token
    with pytest.raises(EngineError, match="allocated already"):
        backend.allocate_kv(10)


def test_f32_f22_kv_is_zero_at_first_and_a_contiguous_row_is_a_view() -> None:
    pool = KVPool(make_store, {3: LayerKV(2, 4, 3)}, 5, 4)
    run, scattered = KVRows((1, 2), True), KVRows((4, 0), False)
    for kv in (KVRows(tuple(range(5)), True), scattered):
        keys, values = pool.read(3, pool.where(kv, 0, 8))
        assert keys.shape == (8, 2, 4) and values.shape == (8, 2, 3)
        assert not keys.any() and not values.any()
    keys, _ = pool.read(3, pool.where(run, 0, 6))
    pool.append(3, pool.slots(run, 5, 1), np.ones((1, 2, 4), np.float32), np.ones((1, 2, 3), np.float32))
    assert keys[5].all() and not keys[:5].any()  # seen through the view that was made before
    assert pool.slots(scattered, 3, 3).tolist() == [19, 0, 1]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (StepPlan(5, (row((1,) * 9),)), "positions 0 to 8 are outside 2 blocks of 4 tokens"),
        (StepPlan(5, (row(kv=KVRows((8,), False)),)), "block 8 is outside the 8 blocks"),
        (StepPlan(5, (row(kv=KVRows((), False)),)), "outside 0 blocks"),
        (StepPlan(5, (row((11,)),)), r"feeds \[11\] tokens; ids are 0 to 10"),
        (StepPlan(5, (row(()),)), "feeds no tokens"),
        (StepPlan(5, (row((-2,)),)), r"feeds \[-2\]"),
        (StepPlan(5, (row(), row())), "two rows for one slot"),
        (StepPlan(5, (row((PENDING,), slot=3),)), "row 3 has a pending token, but its slot 3 drew none"),
        (StepPlan(5, (row((PENDING,), seq_id=9),)), "row 9 has a pending token, but its slot 0 drew none"),
        (StepPlan(5, (row((PENDING, 1)),)), r"feeds \[-1\]"),
        (StepPlan(5, (row((PENDING,), sample=SampleSpec(output_tokens=(PENDING, 1))),)), "pending output token before"),
        (StepPlan(5, (row(),), (Move(0, 1, 8, 1, 2),)), "move of 2 tokens does not fit 1 blocks from 8"),
        (StepPlan(5, (row(),), (Move(0, 1, 1, 1, 5),)), "move of 5 tokens does not fit"),
        (StepPlan(4, (row(),)), "step 4 was submitted after step 4"),
    ],
)
def test_f46_a_wrong_plan_raises_and_changes_nothing(
    backend: Backend, folder: Path, plan: StepPlan, words: str
) -> None:
    """The row in slot 0 still continues from its own KV and its own last draw."""
    backend.collect(backend.submit(StepPlan(4, (row(),))))
    with pytest.raises(EngineError, match=words):
        backend.submit(plan)
    follow = StepPlan(6, (row((PENDING,), start=2, sample=SampleSpec(logprobs=11)),))
    found = backend.collect(backend.submit(follow))
    untouched = reference.create(BackendOptions(model=str(folder), block_tokens=4))
    untouched.allocate_kv(8)
    untouched.collect(untouched.submit(StepPlan(4, (row(),))))
    assert found == untouched.collect(untouched.submit(follow))


def test_order_of_submit_and_collect(backend: Backend) -> None:
    first = backend.submit(StepPlan(1, (row(),)))
    second = backend.submit(StepPlan(2, (row((PENDING,), start=2),)))
    with pytest.raises(EngineError, match="step 3 was submitted while 2 steps wait"):
        backend.submit(StepPlan(3, ()))
    with pytest.raises(EngineError, match="step 2 cannot be collected now: step 1 is next"):
        backend.collect(second)
    assert [backend.collect(ticket).step for ticket in (first, second)] == [1, 2]
    with pytest.raises(EngineError, match="no step waits to be collected"):
        backend.collect(second)


def test_only_rows_that_sample_are_answered(backend: Backend) -> None:
    plan = StepPlan(1, (row(slot=0, sample=None), row(slot=1), row(slot=2, sample=None), row(slot=3)))
    assert [result.seq_id for result in backend.collect(backend.submit(plan)).rows] == [1, 3]
    assert backend.collect(backend.submit(StepPlan(2, ()))).rows == ()


def test_a_row_reads_what_another_writes_in_the_same_step(backend: Backend, folder: Path) -> None:
    """A shared prefix may be computed by one row while another already continues it, in either order."""
    writer = row((1, 2, 3, 4), sample=None)
    reader = row((5,), start=4, slot=1, kv=KVRows((0, 2), False), sample=SampleSpec(logprobs=11))
    together = backend.collect(backend.submit(StepPlan(1, (reader, writer)))).rows
    apart = reference.create(BackendOptions(model=str(folder), block_tokens=4))
    apart.allocate_kv(8)
    apart.collect(apart.submit(StepPlan(1, (writer,))))
    assert apart.collect(apart.submit(StepPlan(2, (reader,)))).rows == together


def test_f78_a_row_without_a_draw_fails_alone_and_so_does_what_hangs_on_it(backend: Backend) -> None:
    banned = SampleSpec(banned=tuple(range(11)))
    (bad, good) = backend.collect(backend.submit(StepPlan(1, (row(sample=banned), row(slot=1))))).rows
    assert bad.error is not None and "banned" in bad.error and good.error is None
    plan = StepPlan(2, (row((PENDING,), start=2), row((PENDING,), start=2, slot=1)))
    (still_bad, still_good) = backend.collect(backend.submit(plan)).rows
    assert still_bad.error == bad.error and still_good.error is None


def test_warmup_and_close(backend: Backend) -> None:
    report = backend.warmup(prompt_tokens=20, batch=5)
    assert [name for name, _ in report.steps] == ["prefill of 20 tokens", "decode of 5 rows"]
    assert all(seconds > 0 for _, seconds in report.steps)
    for prompt_tokens, batch in ((32, 1), (0, 1), (1, 0)):
        with pytest.raises(EngineError, match="needs 1 to 31 prompt tokens and at least 1 row"):
            backend.warmup(prompt_tokens, batch)
    ticket = backend.submit(StepPlan(1, (row(),)))
    with pytest.raises(EngineError, match="idle"):
        backend.warmup(4, 1)
    backend.close()
    backend.close()
    for call in (
        lambda: backend.collect(ticket),
        lambda: backend.submit(StepPlan(2, ())),
        lambda: backend.warmup(4, 1),
    ):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_f74_draw_rows_isolates_what_cannot_be_drawn() -> None:
    logits = np.tile(np.array([0.0, 2.0, 1.0, 2.0], np.float32), (5, 1))
    logits[1, 0], logits[2, 0], logits[3] = np.nan, np.inf, -np.inf
    logits[4, 1] = -np.inf
    found = draw_rows(logits, [SampleSpec(logprobs=2)] * 5, [7] * 5)
    assert [draw.error is None for draw in found] == [True, False, False, False, True]
    z = np.log(np.exp([0.0, 2.0, 1.0, 2.0]).sum())
    assert found[0].token == 1  # the lower id among equals
    assert found[0].logprob == pytest.approx(2 - z, abs=1e-6)
    assert [token for token, _ in found[0].top_logprobs] == [1, 3]
    assert found[4].token == 3
    assert draw_rows(logits[:1], [SampleSpec()], [7]) == [Drawn(1)]  # no logprobs unless asked for
    with pytest.raises(ValueError):
        draw_rows(logits, [SampleSpec()], [7])


def test_draw_rows_uses_seed_and_position_of_each_row() -> None:
    logits = np.zeros((2, 1000), np.float32)
    spec = SampleSpec(temperature=1.0, seed=5)
    both = [draw.token for draw in draw_rows(logits, [spec, spec], [3, 4])]
    assert both == [draw_rows(logits[:1], [spec], [position])[0].token for position in (3, 4)]
    assert both[0] != both[1]
