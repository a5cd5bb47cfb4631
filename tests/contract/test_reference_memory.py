"""The reference backend's KV memory: a pool per window, moves, swaps, states; what it refuses, and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.backend import Backend, BackendOptions, KVQuantization, LayerKV, LayerState, ModelInfo, PackedKV
from cortexstream.backends import reference
from cortexstream.backends.common.kv_format import kv_quantization
from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.reference.store import make_store
from cortexstream.errors import EngineError, ModelLoadError, OutOfMemoryBudgetError
from cortexstream.kernels.reference.kv_quantize import quantize
from cortexstream.plan import KVRows, MemoryOp, Move, PlanRow, SampleSpec, StepPlan, SwapDrop, SwapIn, SwapOut
from tests.contract.tiny_llama import write_folder
from tests.kv_numbers import numbers
from tests.kv_numbers import same as same_array

LAYERS = (LayerKV(2, 32, 64, 10), LayerKV(1, 32, 96), LayerKV(2, 64, 32, 5), LayerKV(2, 32, 64, 10))
INFO = ModelInfo("test", 11, 64, frozenset(), LAYERS, 4, 0)
FORMATS = [None, KVQuantization(8, 32), KVQuantization(4, 32)]
BLOCKS = (10, 6, 9)  # for full attention, for the window of 5 (a ring of 8), for that of 10 (12)


def memory(quantization: KVQuantization | None = None, memory_bytes: int = 10**7) -> KVMemory:
    return KVMemory(make_store, replace(INFO, kv_quantization=quantization), BLOCKS, 4, memory_bytes)


def noisy(quantization: KVQuantization | None = None) -> KVMemory:
    """All its bits are random, NaN among the floats."""
    made, rng = memory(quantization), np.random.default_rng(3)
    for part in parts(made):
        part.view(np.uint32)[:] = rng.integers(0, 2**32, part.shape, np.uint32)
    return made


def parts(made: KVMemory, *pools: int) -> list[Any]:
    stores: list[Any] = [store for number in pools or range(3) for store in made.pools[number]._stores]
    return [part for store in stores for part in store.parts]


def bits(made: KVMemory) -> list[Any]:
    return [part.view(np.uint32).copy() for part in parts(made)]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def row(first: int, size: int = 3, contiguous: bool = True) -> KVRows:
    """Blocks from `first` in each pool; the rings of full length."""
    order = 1 if contiguous else -1

    def share(count: int) -> KVRows:
        return KVRows(tuple(range(first, first + count))[::order], contiguous)

    return share(size)._replace(rings=(share(2), share(3)))


def state(num_tokens: int, seed: int = 0) -> list[LayerState]:
    rng = np.random.default_rng(seed)

    def array(layer: LayerKV, dim: int) -> Any:
        count = min(num_tokens, layer.window or num_tokens)
        return rng.standard_normal((count, layer.num_kv_heads, dim)).astype(np.float32)

    return [LayerState(array(layer, layer.key_dim), array(layer, layer.value_dim)) for layer in LAYERS]


@pytest.mark.parametrize("quantization", FORMATS)
def test_f18_bytes_are_what_the_model_says(quantization: KVQuantization | None) -> None:
    made = memory(quantization)
    assert INFO.windows == (5, 10) and [INFO.pool_of(layer) for layer in range(4)] == [2, 0, 1, 2]
    assert made.pool_of == [2, 0, 1, 2] and made.num_blocks == BLOCKS
    per_token = {  # bytes of pool 0 (128 numbers of a token), pool 1 (192), pool 2 (384); 8 bytes per group of 32
        None: (512, 768, 1536), FORMATS[1]: (128 + 32, 192 + 48, 384 + 96), FORMATS[2]: (64 + 32, 96 + 48, 192 + 96),
    }[quantization]  # fmt: skip
    assert replace(INFO, kv_quantization=quantization).pool_bytes_per_token == per_token
    assert [pool.nbytes for pool in made.pools] == [4 * n * size for n, size in zip(BLOCKS, per_token, strict=True)]
    assert made.nbytes == sum(part.nbytes for part in parts(made))
    assert not any(part.any() for part in parts(made))


def test_f89_the_group_follows_from_the_head_dimensions() -> None:
    def choice(kv_dtype: str, *dims: int) -> KVQuantization | None:
        return kv_quantization(
            kv_dtype, [LayerKV(1, key, value) for key, value in zip(dims[::2], dims[1::2], strict=True)]
        )

    assert choice("auto", 5, 7) is None
    assert choice("int8", 64, 128) == (8, 64) and choice("int4", 64, 128, 192, 64) == (4, 64)
    assert choice("int8", 64, 64, 64, 96) == (8, 32) and choice("int4", 32, 64) == (4, 32)
    with pytest.raises(ModelLoadError, match=r"'int8' needs head dimensions that are multiples of 32; .* has 64, 80;"):
        choice("int8", 64, 64, 64, 80)
    with pytest.raises(ModelLoadError, match="kv_dtype 'int2' is unknown; use 'auto', 'int8', 'int4'"):
        choice("int2", 64, 64)


def test_p7_block_counts_and_budget() -> None:
    for blocks, words in (
        ((10,), "0 numbers of ring blocks were given; the model has 2 windows"),
        ((10, 6, 9, 1), "3 numbers of ring blocks"),
        ((10, 0, 9), "0 KV blocks were asked for"),
    ):
        with pytest.raises(EngineError, match=words):
            KVMemory(make_store, INFO, blocks, 4, 10**7)
    exact = memory().nbytes
    assert memory(memory_bytes=exact).nbytes == exact == 94208
    words = (
        r"10 \+ 6 \+ 9 KV blocks of 4 tokens take 94208 bytes; the host has 94207; ask for at most 9 \+ 5 \+ 8 blocks"
    )
    with pytest.raises(OutOfMemoryBudgetError, match=words):
        memory(memory_bytes=exact - 1)


def test_f23_a_ring_maps_positions_to_slots() -> None:
    ring = memory().pools[1]  # window 5, 8 slots
    assert ring.ring_tokens == 8
    run, table = KVRows((3, 4), True), KVRows((5, 2), False)
    assert ring.slots(run, 6, 4).tolist() == [18, 19, 12, 13] and ring.slots(table, 6, 4).tolist() == [10, 11, 20, 21]
    assert ring.slots(table, 800, 8).tolist() == [20, 21, 22, 23, 8, 9, 10, 11]
    assert ring.where(run, 8, 8) == slice(12, 20) and isinstance(ring.where(run, 9, 8), np.ndarray)
    assert ring.slots(KVRows((5,), False), 1, 3).tolist() == [21, 22, 23]  # short: one block is enough


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("pool", [0, 1, 2])
@pytest.mark.parametrize(
    ("source", "target", "slots"),
    [(0, 3, 8), (2, 1, 11), (1, 2, 9), (4, 4, 7)],
    ids=["apart", "left", "right", "place"],
)
def test_f17_a_move_copies_slots_of_its_pool_alone(
    quantization: KVQuantization | None, pool: int, source: int, target: int, slots: int
) -> None:
    made = noisy(quantization)
    before = bits(made)
    op = Move(source, 3, target, 3, slots, pool) if source != target else Move(4, 2, 4, 1, 4, pool)
    if pool == 1 and target == 3:
        op = op._replace(source=1)
    made.check_ops([op])
    assert made.execute([op]) == 0.0
    for old in bits_of_pool(made, before, pool):
        old[4 * target : 4 * target + slots] = old[4 * op.source : 4 * op.source + slots].copy()
    assert same(bits(made), before)


def bits_of_pool(made: KVMemory, all_bits: list[Any], pool: int) -> list[Any]:
    owners = [number for number in range(3) for _ in parts(made, number)]
    return [part for part, owner in zip(all_bits, owners, strict=True) if owner == pool]


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("num_tokens", [0, 3, 7, 11])
def test_f91_swapped_bits_come_back_and_no_others_change(quantization: KVQuantization | None, num_tokens: int) -> None:
    """Two rows change places in one plan, in order; each pool holds the positions or, of a ring, its slots."""
    made, plain = noisy(quantization), noisy(quantization)
    here, there = row(0), row(3, contiguous=False)
    ops: list[MemoryOp] = [
        SwapOut(1, here, num_tokens), SwapOut(2, there, num_tokens), SwapIn(1, there, num_tokens),
        SwapIn(2, here, num_tokens),
    ]  # fmt: skip
    made.check_ops(ops)
    assert made.execute(ops) > 0
    for number, ring in enumerate((None, 8, 12)):
        held = np.arange(num_tokens if ring is None else min(num_tokens, ring))
        a, b = (kv if number == 0 else kv.rings[number - 1] for kv in (here, there))
        first = a.blocks[0] * 4 + held
        second = np.array(b.blocks)[held // 4] * 4 + held % 4
        for part, old in zip(parts(made, number), parts(plain, number), strict=True):
            want = old.view(np.uint32).copy()
            want[first], want[second] = want[second], want[first]
            assert np.array_equal(part.view(np.uint32), want)
    with pytest.raises(EngineError, match="no copy is kept under key 1"):
        made.check_ops([SwapIn(1, here, num_tokens)])


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (Move(0, 1, 1, 1, 2, 3), "for pool 3; the pools are 0 to 2"),
        (Move(0, 1, 1, 1, 2, -1), "for pool -1"),
        (Move(5, 2, 0, 2, 8, 1), "of 8 tokens does not fit 2 blocks from 5; the KV memory of window 5 has 6 blocks"),
        (Move(0, 1, 1, 1, 5, 2), "move of 5 tokens does not fit 1 blocks from 0; the KV memory of window 10"),
        (Move(0, 2, 0, 1, 5, 2), "move of 5 tokens does not fit 1 blocks from 0"),  # shrunk below what it carries
        (Move(9, 1, 10, 1, 2, 0), "does not fit 1 blocks from 10; the KV memory has 10 blocks of 4 tokens"),
        (Move(0, 0, 1, 1, 0, 0), "move of 0 tokens does not fit 0 blocks from 0"),
        (SwapOut(7, row(3), 5), "a copy is kept under key 7 already"),
        (SwapOut(9, row(3), 5), "a copy is kept under key 9 already"),  # by an operation before it
        (SwapOut(8, row(3), 13), "positions 0 to 12 are outside 3 blocks of 4 tokens"),
        (SwapOut(8, row(7), 5), "block 6 is outside the 6 blocks|block 7 is outside the 6 blocks"),
        (SwapOut(8, KVRows((1,), True), 2), "a row has 0 rings; the model has 2 windows"),
        (SwapIn(8, row(3), 5), "no copy is kept under key 8"),
        (SwapIn(7, row(3), 4), "the copy under key 7 has 5 tokens, not 4"),
        (SwapIn(7, KVRows((3, 4), True, (KVRows((3,), True), KVRows((3, 4), True))), 5),
         "positions 0 to 4 need 5 slots of a ring of window 5; it has 1 blocks of 4 tokens"),
        (SwapDrop(8), "no copy is kept under key 8"),
        (SwapDrop(10), "no copy is kept under key 10"),  # dropped by an operation before it
    ],
)  # fmt: skip
def test_f91_what_cannot_be_done_is_refused_with_the_operations_before_it(op: MemoryOp, words: str) -> None:
    made = noisy()
    made.execute([SwapOut(7, row(0), 5), SwapOut(10, row(0), 5)])
    before = bits(made)
    with pytest.raises(EngineError, match=words):
        made.check_ops([Move(0, 1, 5, 1, 4), SwapOut(9, row(0), 2), SwapDrop(10), op])
    assert same(bits(made), before)
    made.check_ops([SwapIn(7, row(3), 5), SwapIn(10, row(3), 5), SwapOut(9, row(0), 2)])  # nothing was done


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 6, 8, 11, 12])
def test_f91_a_state_is_read_as_it_was_written(num_tokens: int, contiguous: bool) -> None:
    made = noisy()
    place = row(2, contiguous=contiguous)
    wanted = state(num_tokens)
    made.write(place, num_tokens, wanted)
    for ours, theirs in zip(made.read(place, num_tokens), wanted, strict=True):
        assert np.array_equal(ours.keys, theirs.keys) and np.array_equal(ours.values, theirs.values)
    copy = made.read(place, num_tokens)
    made.write(place, num_tokens, state(num_tokens, seed=1))
    assert all(np.array_equal(a.keys, b.keys) for a, b in zip(copy, wanted, strict=True)), "read gave a view"


@pytest.mark.parametrize("quantization", FORMATS[1:])
def test_f89_a_quantised_state_is_read_and_written_as_it_is_stored(quantization: KVQuantization) -> None:
    """Bit for bit: rounding what was rounded would change it again."""
    made = memory(quantization)
    packed = [
        LayerState(*(PackedKV(*quantize(numbers(array), *quantization)) for array in layer)) for layer in state(11)
    ]
    made.write(row(1), 11, packed)
    for ours, theirs in zip(made.read(row(1), 11), packed, strict=True):
        assert all(isinstance(a, PackedKV) and same_array(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(EngineError, match=r"keys of layer 0, 11 tokens, are float32 .*; uint32 .* is needed"):
        made.write(row(1), 11, state(11))


def test_f91_a_state_that_does_not_fit_is_refused() -> None:
    made = noisy()
    before = bits(made)
    good = state(11)
    wide = [*good[:2], good[2]._replace(values=good[2].keys), good[3]]
    long = [
        *good[:3],
        LayerState(*(np.concatenate((a, a[:1])) for a in map(numbers, good[3]))),
    ]  # 11 tokens, where 10 are the window
    double = [*good[:3], good[3]._replace(keys=numbers(good[3].keys).astype(np.float64))]
    for num_tokens, layers, place, words in (
        (11, good[:3], row(0), "the state has 3 layers; the model has 4"),
        (11, wide, row(0), r"values of layer 2, 11 tokens, are float32 \(5, 2, 64\); float32 \(5, 2, 32\) is needed"),
        (11, long, row(0), r"keys of layer 3, 11 tokens, are float32 \(11, 2, 32\); float32 \(10, 2, 32\) is needed"),
        (11, double, row(0), r"keys of layer 3, 11 tokens, are float64"),
        (12, good, row(0), r"values of layer 1|keys of layer 1"),
        (11, good, row(0, size=2), "positions 0 to 10 are outside 2 blocks"),
        (11, good, KVRows((0, 1, 2), True), "a row has 0 rings"),
    ):
        with pytest.raises(EngineError, match=words):
            made.write(place, num_tokens, layers)
        assert same(bits(made), before)
    for num_tokens, place, words in (
        (13, row(0), "positions 0 to 12"), (-1, row(0), "positions 0 to -2"), (1, KVRows((0,), True), "0 rings"),
    ):  # fmt: skip
        with pytest.raises(EngineError, match=words):
            made.read(place, num_tokens)


@pytest.fixture
def windowed(tmp_path: Path) -> Backend:
    """mistral: both layers have a window of 6, so no layer uses pool 0; its ring has 8 slots."""
    folder = write_folder(tmp_path, model_type="mistral", sliding_window=6)
    backend = reference.create(BackendOptions(model=str(folder), block_tokens=4))
    assert backend.model.windows == (6,) and backend.model.pool_bytes_per_token == (0, 2 * 2 * 4 * 4)
    assert backend.allocate_kv(20, (6,)) == 6 * 4 * 64
    return backend


def planned(tokens: int, start: int, ring: tuple[int, ...], **more: Any) -> PlanRow:
    kv = KVRows(tuple(range(10)), True, (KVRows(ring, False),))
    values = {"kv": kv, "sample": SampleSpec(logprobs=11), **more}
    return PlanRow(0, 0, tuple(n % 11 for n in range(start, start + tokens)), start, **values)


@pytest.mark.parametrize(
    ("row", "moves", "words"),
    [
        (planned(1, 7, (2,)), (), "positions 7 to 7 need 8 slots of a ring of window 6; it has 1 blocks of 4 tokens"),
        (planned(1, 7, (2, 6)), (), "block 6 is outside the 6 blocks of the KV memory of window 6"),
        (planned(1, 7, (-1, 2)), (), "block -1 is outside the 6 blocks of the KV memory of window 6"),
        (planned(1, 7, ()), (), "it has 0 blocks"),
        (planned(1, 7, (2, 0), kv=KVRows((0, 1), True)), (), "a row has 0 rings; the model has 1 windows"),
        (planned(1, 40, (2, 0)), (), "positions 40 to 40 are outside 10 blocks"),
        (planned(1, 7, (2, 0)), (Move(4, 1, 2, 1, 4, 1), SwapIn(1, KVRows((), True), 1)), "no copy is kept"),
        (planned(1, 7, (2, 0)), (SwapOut(1, planned(1, 7, (2, 0)).kv, 7), Move(4, 1, 2, 1, 4, 2)), "for pool 2"),
    ],
)  # fmt: skip
def test_f46_a_plan_with_a_wrong_ring_or_operation_changes_nothing(
    windowed: Backend, tmp_path: Path, row: PlanRow, moves: tuple[MemoryOp, ...], words: str
) -> None:
    windowed.collect(windowed.submit(StepPlan(4, (planned(7, 0, (2, 0)),))))
    with pytest.raises(EngineError, match=words):
        windowed.submit(StepPlan(5, (row,), moves))
    follow = StepPlan(6, (planned(1, 7, (2, 0)),))
    found = windowed.collect(windowed.submit(follow))
    untouched = reference.create(BackendOptions(model=str(tmp_path), block_tokens=4))
    untouched.allocate_kv(20, (6,))
    untouched.collect(untouched.submit(StepPlan(4, (planned(7, 0, (2, 0)),))))
    assert found == untouched.collect(untouched.submit(follow))


def test_f91_reset_forgets_the_copies(windowed: Backend) -> None:
    kv = planned(1, 0, (2, 0)).kv
    windowed.collect(windowed.submit(StepPlan(1, (planned(7, 0, (2, 0)),), (SwapOut(1, kv, 0),))))
    windowed.reset()
    with pytest.raises(EngineError, match="no copy is kept under key 1"):
        windowed.submit(StepPlan(2, (), (SwapDrop(1),)))
    assert windowed.collect(windowed.submit(StepPlan(3, (), (SwapOut(1, kv, 7), SwapDrop(1))))).swap_s > 0


def test_states_need_memory(tmp_path: Path) -> None:
    backend = reference.create(BackendOptions(model=str(write_folder(tmp_path)), block_tokens=4))
    for call in (lambda: backend.read_kv(KVRows((0,), True), 1), lambda: backend.write_kv(KVRows((0,), True), 1, [])):
        with pytest.raises(EngineError, match="allocate_kv must be called"):
            call()
        backend.reset()
    backend.close()
    with pytest.raises(EngineError, match="closed"):
        backend.read_kv(KVRows((0,), True), 1)


def test_warmup_uses_what_rings_there_are(windowed: Backend, tmp_path: Path) -> None:
    report = windowed.warmup(prompt_tokens=70, batch=3)
    assert [name for name, _ in report.steps] == ["prefill of 70 tokens", "decode of 3 rows"]
    with pytest.raises(EngineError, match="needs 1 to 79 prompt tokens"):
        windowed.warmup(80, 1)
    small = reference.create(BackendOptions(model=str(tmp_path), block_tokens=4))
    small.allocate_kv(20, (1,))  # half a ring
    small.warmup(prompt_tokens=3, batch=1)
    with pytest.raises(EngineError, match="needs 1 to 3 prompt tokens"):
        small.warmup(4, 1)


def test_f91_the_seconds_of_all_swaps_of_a_step_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("cortexstream.backends.common.kv_memory.time.perf_counter", lambda: float(next(ticks)))
    made = noisy()
    swaps = (SwapOut(1, row(0), 11), Move(0, 1, 1, 1, 3, 0), SwapIn(1, row(1), 11), SwapOut(2, row(1), 11), SwapDrop(2))
    made.check_ops(swaps)
    assert made.execute(swaps) == 4.0
