"""The mlx backend's memory: views without copies, moves that keep contents, pools that never move."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.backend import BackendOptions, KVQuantization, LayerKV, ModelInfo
from cortexstream.config import EngineConfig
from cortexstream.engine import EngineCore
from cortexstream.errors import EngineError, InvalidRequestError, OutOfMemoryBudgetError
from cortexstream.kv import KVArena
from cortexstream.plan import Move
from cortexstream.request import Request, SamplingParams
from tests.conftest import require
from tests.parity.tiny_models import WINDOWED, write_model

mx = require("mlx")
require("mlx_lm")
BLOCK = 16


def make_pool(num_blocks: int, dtype: Any = None, window: int | None = None, ring_blocks: int = 0) -> Any:
    """Two layers, the second of which may have a window."""
    from cortexstream.backends.mlx.pool import RowPool

    dtype = dtype or mx.float32
    layers = (LayerKV(2, 8, 8), LayerKV(3, 8, 4, window))
    model = ModelInfo("stub", 10, 100, frozenset(), layers, kv_item_bytes=dtype.size, weight_bytes=0)
    return RowPool(model, (num_blocks,) if window is None else (num_blocks, ring_blocks), BLOCK, dtype)


def fill(pool: Any, span: Any, slots: range, seed: int, number: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Write random keys and values to the layers of a pool; returns them per layer, [heads, slots, dim]."""
    from cortexstream.backends.mlx.pool import finish, row_index

    rng = np.random.default_rng(seed)
    written = []
    for layer in layers_of(pool, number):
        sides = []
        for plane in (pool.keys[layer], pool.values[layer]):
            numbers = rng.standard_normal((plane.heads, len(slots), plane.dim), dtype=np.float32)
            plane.store(row_index(span, plane.heads, np.array(slots)), plane.encode(mx.array(numbers)))
            sides.append(numbers)
        written.append((sides[0], sides[1]))
    finish(*pool.arrays)
    return written


def read(pool: Any, span: Any, length: int, number: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    views = [
        [side[layer].view(span, 0, length) for side in (pool.keys, pool.values)] for layer in layers_of(pool, number)
    ]
    return [(np.array(k[0]), np.array(v[0])) for k, v in views]


def layers_of(pool: Any, number: int) -> list[int]:
    return [layer for layer in range(len(pool.layers)) if pool.pool_of[layer] == number]


def test_f18_pool_size_dtype_and_zeros() -> None:
    pool = make_pool(4, mx.bfloat16)
    assert pool.nbytes == 4 * BLOCK * (2 * (8 + 8) + 3 * (8 + 4)) * 2
    assert all(not mx.any(array).item() and array.dtype == mx.bfloat16 for array in pool.arrays)


def test_f22_views_are_the_memory_itself() -> None:
    """Token 20 of a run of 16-token blocks, written through the pool, is read by the view for every head; the view lies
    inside the pool and costs nothing."""
    from cortexstream.backends.mlx.plane import Span
    from cortexstream.backends.mlx.pool import address, finish, row_index

    pool = make_pool(8)
    span = Span(2 * BLOCK, 3 * BLOCK)
    value = np.arange(16, dtype=np.float32).reshape(2, 1, 8)
    rows = row_index(span, 2, np.array([20]))
    pool.keys[0].store(rows, [mx.array(value)])
    pool.values[0].store(rows, [mx.array(-value)])
    finish(*pool.arrays)
    base = pool.addresses()[0]
    mx.synchronize()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    keys, values = pool.keys[0].view(span, 0, 21), pool.values[0].view(span, 0, 21)
    mx.eval(keys, values)
    assert mx.get_peak_memory() <= active, "a view allocated memory"
    assert np.array_equal(np.array(keys)[0, :, 20], value[:, 0]) and np.array_equal(
        np.array(values)[0, :, 20], -value[:, 0]
    )
    assert base <= address(keys) < base + pool.keys[0].arrays[0].nbytes


@pytest.mark.parametrize(
    ("source", "target"), [((0, 2), (4, 3)), ((3, 2), (2, 2)), ((2, 2), (3, 2)), ((1, 2), (1, 4)), ((4, 3), (0, 2))],
    ids=["apart", "overlap-left", "overlap-right", "grow-in-place", "shrink"],
)  # fmt: skip
def test_f17_f20_a_move_keeps_every_bit(source: tuple[int, int], target: tuple[int, int]) -> None:
    from cortexstream.backends.mlx.plane import Span

    pool = make_pool(8)
    written = fill(pool, Span(source[0] * BLOCK, source[1] * BLOCK), range(29), seed=3)
    before = pool.addresses()
    pool.move(Move(*source, *target, 29))
    moved = read(pool, Span(target[0] * BLOCK, target[1] * BLOCK), 29)
    for (k, v), (k2, v2) in zip(written, moved, strict=True):
        assert np.array_equal(k, k2) and np.array_equal(v, v2)
    assert pool.addresses() == before


def test_f39_a_ring_moves_without_the_rest() -> None:
    """A move in pool 1 takes the layer with a window along, and nothing of the layer without."""
    from cortexstream.backends.mlx.plane import Span

    pool = make_pool(4, window=20, ring_blocks=6)
    kept = fill(pool, Span(0, 4 * BLOCK), range(64), seed=1)
    ring = fill(pool, Span(BLOCK, 2 * BLOCK), range(32), seed=2, number=1)
    before = pool.addresses()
    pool.move(Move(1, 2, 3, 3, 32, pool=1))
    for number, span, written, length in ((0, Span(0, 64), kept, 64), (1, Span(3 * BLOCK, 3 * BLOCK), ring, 32)):
        for (k, v), (k2, v2) in zip(written, read(pool, span, length, number), strict=True):
            assert np.array_equal(k, k2) and np.array_equal(v, v2)
    assert pool.addresses() == before
    assert pool.shapes[1].slots == 32, "a window of 20 is rounded up to whole blocks"


@pytest.mark.parametrize(("window", "slots"), [(1, 1), (1, 4), (5, 8), (8, 8), (9, 12)])
def test_f39_what_a_ring_shows(window: int, slots: int) -> None:
    """Against the tokens themselves, written one by one; the view holds nothing that is not seen until it must."""
    from cortexstream.backends.mlx.pool import PoolShape

    shape, held = PoolShape(1, window, slots), [-1] * slots
    for position in range(4 * slots):
        held[position % slots] = position
        seen = range(max(0, position + 1 - window), position + 1)
        visible = shape.visible(np.array([position]), np.arange(slots))
        assert sorted(np.array(held)[visible]) == list(seen)
        first, end = shape.in_view(position)
        assert (first, end) == ((seen[0], position + 1) if position < slots else (0, slots))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_f26_f89_writes_are_in_place(bits: int | None) -> None:
    """One token at a time into arrays of megabytes: nothing of their size is ever allocated, and nothing moves."""
    from cortexstream.backends.mlx.plane import Plane, Span
    from cortexstream.backends.mlx.pool import address, finish, row_index

    quantization = None if bits is None else KVQuantization(bits, 64)
    plane = Plane(1 << 18, 4, 128, mx.float32, quantization)
    finish(*plane.arrays)
    before = [address(array) for array in plane.arrays]
    mx.synchronize()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    rng = np.random.default_rng(0)
    for position in range(200):
        numbers = mx.array(rng.standard_normal((4, 1, 128), dtype=np.float32))
        stored = plane.encode(numbers)
        plane.store(row_index(Span(64, 1 << 10), 4, np.array([position])), stored)
        finish(*plane.arrays)
        seen = plane.view(Span(64, 1 << 10), position, 1)
        assert np.array_equal(np.array(seen)[0], np.array(plane.decode(stored)))
        del seen
        mx.synchronize()
    assert mx.get_peak_memory() - active < 1 << 20 < min(array.nbytes for array in plane.arrays)
    assert [address(array) for array in plane.arrays] == before


@pytest.mark.parametrize(
    ("ring_blocks", "message"),
    [((), "needs 2 numbers of at least 1"), ((4, 4), "needs 2 numbers"), ((0,), "at least 1"), ((10**9,), "take")],
)
def test_f39_the_ring_pools_are_asked_for(ring_blocks: tuple[int, ...], message: str, tmp_path: Path) -> None:
    from cortexstream.backends import mlx as module

    backend = module.create(BackendOptions(str(write_model(tmp_path, "gemma3_text", WINDOWED["gemma3_text"]))))
    with pytest.raises((EngineError, OutOfMemoryBudgetError), match=message):
        backend.allocate_kv(8, ring_blocks)
    assert backend.allocate_kv(8, (3,)) == backend.pool.nbytes


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("block_tokens", [1, 16, 50])
def test_f39_warm_up_with_rings(block_tokens: int, kv_dtype: Any, tmp_path: Path) -> None:
    """A prompt beyond the window and as many rows as the smallest pool holds; nothing is left to collect."""
    from cortexstream.backends import mlx as module

    folder = write_model(tmp_path, "gpt_oss", WINDOWED["gpt_oss"])
    backend = module.create(BackendOptions(str(folder), block_tokens=block_tokens, kv_dtype=kv_dtype))
    backend.allocate_kv(-(-200 // block_tokens), (-(-60 // block_tokens),))
    before = backend.memory_addresses()
    names = [name for name, _ in backend.warmup(90, 4).steps]
    rows = min(4, -(-60 // block_tokens))
    assert names == ["prefill of 90 tokens", *(f"decode step of {n} rows" for n in (1, 2, 4) if n <= rows)]
    assert backend.memory_addresses() == before and backend.info.notes == ()
    with pytest.raises(EngineError, match="do not fit"):
        backend.warmup(300, 1)
    backend.close()
    backend.close()


def test_p8_compaction_keeps_the_survivors() -> None:
    """Random admissions, growth and releases: after every operation each live sequence still reads what it wrote."""
    from cortexstream.backends.mlx.plane import Span

    rng = random.Random(5)
    arena, pool = KVArena(24, BLOCK), make_pool(24)
    live: dict[Any, list[tuple[np.ndarray, np.ndarray]]] = {}
    compactions = 0
    for operation in range(150):
        if live and rng.random() < 0.45:
            handle = rng.choice(list(live))
            del live[handle]
            arena.release(handle)
        elif arena.can_admit(tokens := rng.randint(1, 100)):
            handle = arena.admit(tokens)
            for move in arena.take_moves():
                pool.move(move)
            handle.advance(tokens)
            span = Span(handle.blocks[0] * BLOCK, handle.capacity_tokens)
            live[handle] = fill(pool, span, range(tokens), operation)
        compactions = arena.stats().compactions
        for handle, written in live.items():
            for (k, v), (k2, v2) in zip(
                written,
                read(pool, Span(handle.blocks[0] * BLOCK, handle.capacity_tokens), handle.position),
                strict=True,
            ):
                assert np.array_equal(k, k2) and np.array_equal(v, v2)
    assert compactions > 3, "the trace must exercise compaction"


def serve(folder: Path, steps: int, blocks: int) -> tuple[Any, int]:
    """Random requests until `steps` steps were made; returns (core, largest growth of peak memory in one step)."""
    from cortexstream.backends import mlx as module

    backend = module.create(BackendOptions(str(folder), max_num_seqs=6))
    core = EngineCore(backend, EngineConfig(num_kv_blocks=blocks, max_num_seqs=6, max_num_batched_tokens=32))
    rng = random.Random(1)
    before, number, growth = backend.pool.addresses(), 0, 0
    while core.stats().steps < steps:
        if core.scheduler.num_waiting < 2:
            ids = tuple(rng.randrange(200) for _ in range(rng.randint(1, 60)))
            core.add(
                Request(number, ids, SamplingParams(max_tokens=rng.randint(1, 25), temperature=0), 0), lambda e: False
            )
            number += 1
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        core.step()
        growth = max(growth, mx.get_peak_memory() - active)
    core.run()
    assert backend.pool.addresses() == before
    return core, growth


def test_p9_pools_stay_in_place_for_1000_steps(tmp_path: Path) -> None:
    """1,000 steps with joins, leaves, growth, compaction and preemption: addresses unchanged, and no step's peak memory
    grows by a pool (an address could come back after two copies; the peak could not hide them)."""
    from cortexstream.backends.mlx.pool import RowPool

    folder = write_model(tmp_path, "llama", {"num_hidden_layers": 2, "head_dim": 64})
    core, growth = serve(folder, 1000, blocks=14)
    stats = core.stats()
    assert stats.arena.compactions and stats.arena.relocations and stats.preemptions
    large, large_growth = serve(folder, 200, blocks=4000)
    pool = large.backend.pool
    assert isinstance(pool, RowPool) and large_growth < pool.keys[0].arrays[0].nbytes / 4, "a step copied a pool"
    assert growth < 8 << 20


def test_self_test_falls_back_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the pools moved in the start-up test, steps stop overlapping, a note says so, and answers are the same."""
    from cortexstream.backends import mlx as module
    from cortexstream.backends.mlx.pool import RowPool

    calls = iter(range(100))
    right = RowPool.addresses
    monkeypatch.setattr(RowPool, "addresses", lambda self: [next(calls)])
    folder = write_model(tmp_path, "llama", {})
    backend = module.create(BackendOptions(str(folder), max_num_seqs=2))
    core = EngineCore(backend, EngineConfig(num_kv_blocks=8, max_num_seqs=2))
    monkeypatch.setattr(RowPool, "addresses", right)
    assert "do not overlap" in backend.info.notes[0] and "do not overlap" in caplog.text
    tokens: list[int | None] = []

    def keep(event: Any) -> bool:
        tokens.append(event.token)
        return False

    core.add(Request(0, (1, 2, 3), SamplingParams(max_tokens=5, temperature=0), 0), keep)
    while core.has_work:
        core.step()
        assert not backend._running, "in synchronous mode nothing is left running when submit returns"
    assert len(tokens) == 5


def test_paged_layout_is_refused(tmp_path: Path) -> None:
    from cortexstream.backends import mlx as module

    folder = write_model(tmp_path, "llama", {})
    with pytest.raises(InvalidRequestError, match="kv_layout: is 'paged'"):
        module.create(BackendOptions(str(folder), kv_layout="paged"))
