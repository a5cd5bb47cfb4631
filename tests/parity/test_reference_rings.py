"""Sliding windows on rings against the same model whose rings are too long to wrap, and against transformers (F39)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.backend import kv_misfit
from cortexstream.plan import KVRows, Move, PlanRow, SampleSpec, SwapIn, SwapOut, ring_tokens
from tests.conftest import require
from tests.kv_numbers import same
from tests.parity.reference_models import (
    CASES,
    EVERYTHING,
    SEQUENCE_TOKENS,
    VOCAB,
    by_transformers,
    distribution,
    greedy,
    load,
    make_folder,
    prefill,
    rows_for,
    run_step,
    step,
)

WINDOWS = {"mistral-window": 6, "qwen2-windows": 5, "qwen3-windows": 5}
PROMPT = tuple(np.random.default_rng(5).integers(0, VOCAB, 97).tolist())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    require("torch")
    require("transformers")
    return {name: make_folder(tmp_path_factory.mktemp(name), *CASES[name]) for name in WINDOWS}


@pytest.fixture(scope="module")
def unwrapped(folders: dict[str, Path]) -> dict[str, dict[int, Any]]:
    """Per model the distribution after every position, token by token, with rings of 128 slots for 97 tokens."""
    found = {}
    for name, folder in folders.items():
        backend = load(folder, block_tokens=SEQUENCE_TOKENS)
        found[name] = prefill(backend, PROMPT, 1, rows_for(backend, 2))
    return found


@pytest.mark.parametrize("name", WINDOWS)
def test_f39_the_unwrapped_ring_is_transformers_window(
    folders: dict[str, Path], unwrapped: dict[str, dict[int, Any]], name: str
) -> None:
    judged = by_transformers(folders[name], PROMPT)
    assert list(unwrapped[name]) == list(range(97))
    np.testing.assert_allclose(np.array(list(unwrapped[name].values())), judged, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("layout", ["run", "paged"])
@pytest.mark.parametrize("block_tokens", [1, 4, 16])
def test_f39_a_ring_gives_the_same_bits_in_any_chunks(
    folders: dict[str, Path], unwrapped: dict[str, dict[int, Any]], name: str, layout: str, block_tokens: int
) -> None:
    """No window is a multiple of 4 or 16; with blocks of 1 the ring is exactly the window."""
    window = WINDOWS[name]
    backend = load(folders[name], layout, block_tokens)
    for number, chunk in enumerate((1, 3, window - 1, window, window + 5, len(PROMPT))):
        # Over what the runs before left behind: a ring shows nothing of it.
        found = prefill(backend, PROMPT, chunk, rows_for(backend, number % 4), step_before=100 * number)
        assert len(found) == -(-len(PROMPT) // chunk)
        for position, logprobs in found.items():
            assert np.array_equal(logprobs, unwrapped[name][position]), (chunk, position)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("layout", ["run", "paged"])
def test_f39_rows_of_many_lengths_decode_after_the_wrap(folders: dict[str, Path], name: str, layout: str) -> None:
    """Prompts of 1 to 80 tokens in one batch, in chunks beside rows that decode, each in a ring of its own."""
    prompts = [PROMPT[:1], PROMPT[10:14], PROMPT[3:40], PROMPT[:80]]
    want = [greedy(load(folders[name], block_tokens=SEQUENCE_TOKENS), [p], 30, chunk=80)[0] for p in prompts]
    for block_tokens, chunk in ((1, 7), (4, 13), (16, 80)):
        assert greedy(load(folders[name], layout, block_tokens), prompts, 30, chunk) == want
    judged = by_transformers(folders[name], [*prompts[3], *want[3]])[79:-1]
    assert judged.argmax(-1).tolist() == want[3]


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("layout", ["run", "paged"])
def test_f39_a_ring_grows_and_moves(
    folders: dict[str, Path], unwrapped: dict[str, dict[int, Any]], name: str, layout: str
) -> None:
    """While a sequence is short its ring has fewer blocks; moves carry slots, before and after the wrap."""
    backend = load(folders[name], layout, 2)
    full = ring_tokens(WINDOWS[name], 2) // 2  # 3 blocks
    run = layout == "run"
    whole = rows_for(backend, 0)
    last = (5, 6, 7) if run else (0, 11, 2)

    def moves(size: int, source: tuple[int, ...], target: tuple[int, ...]) -> list[Move]:
        """As each placement writes down that `size` blocks become `target`: one run, or block by block."""
        if run:
            return [Move(source[0], size, target[0], len(target), 2 * size, 1)]
        return [Move(old, 1, new, 1, 2, 1) for old, new in zip(source, target, strict=False)]

    stages: list[tuple[int, tuple[int, ...], list[Move]]] = [
        (2, (9,), []),
        (4, (9, 10), moves(1, (9,), (9, 10)) if run else []),  # grown in place
        (5, (4, 5, 6), moves(2, (9, 10), (4, 5, 6))),
        (30, (4, 5, 6), []),
        (33, last, moves(full, (4, 5, 6), last)),
    ]
    start = 0
    for number, (end, ring, todo) in enumerate(stages):
        kv = whole._replace(rings=(KVRows(ring, run),))
        (row,) = step(backend, number, [PlanRow(0, 0, PROMPT[start:end], start, kv, EVERYTHING)], todo)
        assert np.array_equal(distribution(row), unwrapped[name][end - 1]), end
        start = end


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("layout", ["run", "paged"])
@pytest.mark.parametrize("length", [2, 40])
def test_f91_swapped_out_overwritten_and_swapped_in_elsewhere(
    folders: dict[str, Path], unwrapped: dict[str, dict[int, Any]], name: str, layout: str, length: int
) -> None:
    """Bit by bit as if nothing had happened, also when the ring has wrapped; the time is told."""
    backend = load(folders[name], layout)
    first, other, later = rows_for(backend, 0), rows_for(backend, 1), rows_for(backend, 3)
    prompt = PlanRow(0, 0, PROMPT[:length], 0, first, None)
    step(backend, 1, [prompt, PlanRow(1, 1, PROMPT[:30], 0, other, None)])
    stranger = PlanRow(2, 2, PROMPT[::-1], 0, first, SampleSpec())
    out = run_step(backend, 2, [stranger], [SwapOut(7, first, length)])
    assert out.swap_s > 0
    rows = [
        PlanRow(0, 0, PROMPT[length : length + 9], length, later, EVERYTHING),
        PlanRow(1, 1, PROMPT[30:33], 30, other, EVERYTHING),
    ]
    back = run_step(backend, 3, rows, [SwapIn(7, later, length)])
    assert back.swap_s > 0
    assert np.array_equal(distribution(back.rows[0]), unwrapped[name][length + 8])
    assert np.array_equal(distribution(back.rows[1]), unwrapped[name][32])
    assert run_step(backend, 4, [], []).swap_s == 0.0


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("length", [1, 5, 6, 7, 8, 50])
def test_f91_state_read_and_written_elsewhere_continues(
    folders: dict[str, Path], unwrapped: dict[str, dict[int, Any]], name: str, length: int
) -> None:
    """Into another backend with other blocks: a ring of other slots, the other placement."""
    source, target = load(folders[name], "paged", 4), load(folders[name], "run", 1)
    kv = rows_for(source, 1)
    step(source, 1, [PlanRow(0, 0, PROMPT[:length], 0, kv, None)])
    state = source.read_kv(kv, length)
    for layer, held in zip(source.model.layers, state, strict=True):
        tokens = length if layer.window is None else min(length, layer.window)
        assert kv_misfit(held.keys, tokens, 2, layer.key_dim, None) is None
        assert kv_misfit(held.values, tokens, 2, layer.value_dim, None) is None
    place = rows_for(target, 2)
    target.write_kv(place, length, state)
    for ours, theirs in zip(target.read_kv(place, length), state, strict=True):
        assert same(ours.keys, theirs.keys) and same(ours.values, theirs.values)
    (row,) = step(target, 1, [PlanRow(0, 0, PROMPT[length : length + 9], length, place, EVERYTHING)])
    assert np.array_equal(distribution(row), unwrapped[name][length + 8])


def test_f39_state_is_in_order_of_position(folders: dict[str, Path]) -> None:
    """The window layer's keys are those of the last tokens, as the layer of the unwrapped model has them."""
    wrapped, whole = (load(folders["mistral-window"], block_tokens=size) for size in (4, SEQUENCE_TOKENS))
    for backend in (wrapped, whole):
        step(backend, 1, [PlanRow(0, 0, PROMPT[:50], 0, rows_for(backend, 0), None)])
    states = [backend.read_kv(rows_for(backend, 0), 50) for backend in (wrapped, whole)]
    whole_pool = whole._memory.pools[1]  # type: ignore[attr-defined]
    for layer, (ours, theirs) in enumerate(zip(*states, strict=True)):
        keys, values = whole_pool.read(layer, whole_pool.slots(rows_for(whole, 0).rings[0], 44, 6))
        for state in (ours, theirs):
            assert np.array_equal(state.keys, keys) and np.array_equal(state.values, values)
