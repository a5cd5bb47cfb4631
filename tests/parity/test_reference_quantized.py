"""Quantised keys and values in the reference backend: how far off, and the same bits however a prompt is cut (F89)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.backend import Backend, BackendOptions, KVQuantization, PackedKV
from cortexstream.backends import reference
from cortexstream.errors import ModelLoadError
from cortexstream.kernels.reference.attention import attention
from cortexstream.kernels.reference.kv_quantize import dequantize, quantize
from cortexstream.models import tiny_folder
from cortexstream.plan import PlanRow, SampleSpec, SwapIn, SwapOut
from cortexstream.text.tokenizer import Tokenizer
from tests.conftest import require
from tests.kv_numbers import numbers, same
from tests.parity.reference_models import (
    EVERYTHING,
    VOCAB,
    distribution,
    load,
    make_folder,
    prefill,
    rows_for,
    run_step,
    step,
)

PROMPT = tuple(np.random.default_rng(5).integers(0, VOCAB, 61).tolist())
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (model_type, settings); groups of 64 and of 32
    "llama": ("llama", {"head_dim": 64}),
    "mistral-window": ("mistral", {"head_dim": 32, "sliding_window": 6}),
    "qwen3-windows": (
        "qwen3",
        {"head_dim": 64, "use_sliding_window": True, "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral-wide": ("mistral", {"head_dim": 32, "sliding_window": 64}),
    "mistral-full": ("mistral", {"head_dim": 32, "sliding_window": None}),
}  # fmt: skip
CHUNKS = (1, 3, 5, 11, 61)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    require("torch")
    require("transformers")
    return {
        name: make_folder(tmp_path_factory.mktemp(name), family, "float32", False, settings)
        for name, (family, settings) in MODELS.items()
    }


def centred_logits(kv_dtype: Any, tokens: list[int]) -> Any:
    """The embedded model's logits after every token less their mean, [T, V]: a common offset would flatter a cosine."""
    backend = load(tiny_folder(), "run", 16, kv_dtype)
    rows = []
    for position, token in enumerate(tokens):
        spec = SampleSpec(logprobs=backend.model.vocab_size)
        (row,) = step(backend, position + 1, [PlanRow(0, 0, (token,), position, rows_for(backend, 0), spec)])
        rows.append(distribution(row))
    return np.array(rows) - np.mean(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("kv_dtype", "lowest", "mean"), [("int8", 0.999, 0.9999), ("int4", 0.75, 0.98)]
)  # measured: 0.99983 and 0.99997; 0.80 and 0.991
def test_f89_logits_of_the_embedded_model(kv_dtype: str, lowest: float, mean: float) -> None:
    """The cosine to those with float32 KV, at every position of three prompts; int8 never changes a greedy token."""
    tokenizer = Tokenizer.from_folder(tiny_folder())
    word = "".join(chr(97 + letter) for letter in np.random.default_rng(0).integers(0, 26, 50))
    cosines, agree = [], []
    for text in ("copy: tide and the quick brown fox", "12+30=", f"copy: {word}\n{word}"):
        tokens = tokenizer.encode(text)
        want, found = (centred_logits(kind, tokens) for kind in ("auto", kv_dtype))
        norms = np.linalg.norm(want, axis=1) * np.linalg.norm(found, axis=1)
        cosines += ((want * found).sum(1) / norms).tolist()
        agree += (want.argmax(1) == found.argmax(1)).tolist()
    assert min(cosines) >= lowest and np.mean(cosines) >= mean
    assert all(agree) if kv_dtype == "int8" else np.mean(agree) >= 0.9
    assert max(cosines) < 1 - 1e-9, "nothing was quantised"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_f89_attention_errs_within_its_bound(bits: int, group: int) -> None:
    """With scores off by at most e and values by at most d, an output is off by d + (exp(2e) - 1) max |v| at most."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((40, heads, 64)).astype(np.float32) for heads in (4, 2, 2))
    near_k, near_v = (dequantize(quantize(x, bits, group), bits, group) for x in (k, v))
    got, want = attention(q, near_k, near_v, 0, 0.125), attention(q, k, v, 0, 0.125)
    off = 0.125 * np.abs(np.einsum("thd,lhd->htl", q, np.repeat(near_k - k, 2, axis=1))).max()
    bound = np.abs(near_v - v).max() + np.expm1(2 * off) * np.abs(v).max()
    assert 0 < np.abs(got - want).max() <= bound
    assert np.abs(got - want).max() < (0.03 if bits == 8 else 0.5)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_f89_the_same_bits_in_any_chunks_batch_and_layout(folders: dict[str, Path], name: str, kv_dtype: str) -> None:
    folder = folders[name]
    backend = load(folder, block_tokens=4, kv_dtype=kv_dtype)
    want = prefill(backend, PROMPT, 1, rows_for(backend, 0))
    for number, (layout, block_tokens) in enumerate((("run", 4), ("paged", 1), ("run", 16))):
        backend = load(folder, layout, block_tokens, kv_dtype)
        for chunk in CHUNKS:
            found = prefill(backend, PROMPT, chunk, rows_for(backend, number), step_before=100 * chunk)
            assert all(np.array_equal(found[position], want[position]) for position in found), (layout, chunk)
        rows = [PlanRow(n, n, PROMPT[: 20 * n + 1], 0, rows_for(backend, n), EVERYTHING) for n in range(4)]
        for n, row in enumerate(step(backend, 10**6, rows)):
            assert np.array_equal(distribution(row), want[20 * n])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_f89_a_ring_rounds_as_full_attention_does(folders: dict[str, Path], kv_dtype: str) -> None:
    """While a text is shorter than the window; the query's own key and value are rounded from the first token on."""
    found = []
    for name in ("mistral-wide", "mistral-full"):
        backend = load(folders[name], kv_dtype=kv_dtype)
        found.append(prefill(backend, PROMPT, 7, rows_for(backend, 1)))
    assert all(np.array_equal(found[0][position], found[1][position]) for position in found[0])
    backends = [load(folders["mistral-wide"], kv_dtype=kind) for kind in ("auto", kv_dtype)]
    exact, rounded = (prefill(backend, PROMPT[:1], 1, rows_for(backend, 0))[0] for backend in backends)
    assert np.array_equal(exact, rounded) == (kv_dtype == "auto")


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_f89_what_is_stored_is_the_definitions(folders: dict[str, Path], kv_dtype: Any) -> None:
    """Layer 0's keys and values, which no attention has touched: quantised after the rotary embedding."""
    backends = [load(folders["llama"], kv_dtype=kind) for kind in ("auto", kv_dtype)]
    for backend in backends:
        step(backend, 1, [PlanRow(0, 0, PROMPT, 0, rows_for(backend, 2), None)])
    exact, rounded = (backend.read_kv(rows_for(backend, 2), len(PROMPT))[0] for backend in backends)
    bits = 8 if kv_dtype == "int8" else 4
    for ours, theirs in zip(rounded, exact, strict=True):
        assert same(ours, PackedKV(*quantize(numbers(theirs), bits, 64)))


@pytest.mark.parametrize(
    ("kv_dtype", "quantization", "per_token"),
    [("auto", None, 4096), ("int8", KVQuantization(8, 64), 1152), ("int4", KVQuantization(4, 64), 640)],
)
def test_f18_bytes_of_the_embedded_model(kv_dtype: Any, quantization: KVQuantization | None, per_token: int) -> None:
    """4 layers x 2 heads x (key and value) of 64 numbers: with one group a head, 8 bytes of scale and bias each."""
    backend = reference.create(BackendOptions(str(tiny_folder()), kv_dtype=kv_dtype))
    assert backend.model.kv_quantization == quantization and backend.model.kv_item_bytes == 4
    assert backend.model.kv_bytes_per_token == per_token
    assert backend.allocate_kv(10) == 10 * 16 * per_token


def test_f89_head_dimensions_without_a_group_are_refused(tmp_path: Path) -> None:
    require("torch")
    require("transformers")
    folder = make_folder(tmp_path, "llama", "float32", False, {"head_dim": 48})
    assert load(folder).model.kv_quantization is None
    with pytest.raises(ModelLoadError, match="multiples of 32; this model has 48"):
        load(folder, kv_dtype="int8")


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3-windows"])
def test_f91_a_swapped_sequence_continues_with_the_same_bits(
    folders: dict[str, Path], name: str, kv_dtype: Any
) -> None:
    def continued(backend: Backend, swap: bool) -> Any:
        first, later = rows_for(backend, 0), rows_for(backend, 3)
        step(backend, 1, [PlanRow(0, 0, PROMPT[:40], 0, first, None)])
        kv = later if swap else first
        if swap:
            run_step(backend, 2, [PlanRow(1, 1, PROMPT[::-1], 0, first, None)], [SwapOut(5, first, 40)])
        last = PlanRow(0, 0, PROMPT[40:50], 40, kv, EVERYTHING)
        return distribution(run_step(backend, 3, [last], [SwapIn(5, later, 40)] if swap else []).rows[0])

    stayed, swapped = (continued(load(folders[name], kv_dtype=kv_dtype), swap) for swap in (False, True))
    assert np.array_equal(stayed, swapped)
