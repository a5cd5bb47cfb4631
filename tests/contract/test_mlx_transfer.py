"""The mlx backend's KV outside of its pools: swapped sequences, states read and written, and pools that stay."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.backend import LayerState
from cortexstream.errors import EngineError
from cortexstream.plan import PENDING, KVRows, MemoryOp, Move, PlanRow, StepPlan, SwapDrop, SwapIn, SwapOut
from tests.conftest import require
from tests.parity.by_hand import GREEDY, ByHand, Served, advance
from tests.parity.tiny_models import WINDOW, WINDOWED, write_model

mx = require("mlx")
require("mlx_lm")

KINDS: dict[str, dict[str, Any]] = {
    "float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"kv_dtype": "int8"},
    "int4 and bfloat16": {"dtype": "bfloat16", "kv_dtype": "int4"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gemma"), "gemma3_text", WINDOWED["gemma3_text"])


def make(folder: Path, **options: Any) -> ByHand:
    """24 blocks of 16 tokens for full attention; 8 full rings of 32 slots for the window of 24."""
    return ByHand(folder, num_blocks=24, ring_blocks=16, **options)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(200) for _ in range(length)]


def contents(hand: ByHand) -> list[np.ndarray]:
    """The pools, bit for bit."""
    words = {2: mx.uint16, 4: mx.uint32}
    copies = [np.array(array.view(words[array.dtype.size])) for array in hand.backend.pool.arrays]
    mx.synchronize()
    return copies


def same(before: list[np.ndarray], after: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def alone(hand: ByHand, length: int, outputs: int) -> list[int]:
    """What a prompt is answered with when nothing is swapped; its logits stay in `hand.logits` as sequence 99."""
    one = Served(99, prompt_of(length), hand.place(0, 8))
    for _ in range(outputs):
        advance(hand, [one])
    return one.tokens


@pytest.mark.parametrize("length", [10, 45], ids=["unwrapped", "wrapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_f91_a_swapped_sequence_goes_on_bit_for_bit(kind: str, length: int, folder: Path) -> None:
    """Out, overwritten by another sequence, and in again elsewhere, in memory and in rings; mid-answer."""
    hand = make(folder, **KINDS[kind])
    expected = alone(hand, length, 30)
    before = hand.backend.memory_addresses()
    one = Served(0, prompt_of(length), hand.place(0, 8))
    for _ in range(5):
        advance(hand, [one])
    other = Served(1, prompt_of(60, 7), hand.place(0, 8))
    advance(hand, [other], moves=(SwapOut(5, one.kv, one.done),))
    one.kv = hand.place(13, 8, ring=3)
    advance(hand, [one, other], moves=(SwapIn(5, one.kv, one.done),))
    while len(one.tokens) < len(expected):
        advance(hand, [one])
    assert one.tokens == expected and hand.swap_s > 0
    for position in range(length - 1, one.done):
        assert np.array_equal(hand.logits[0, position], hand.logits[99, position]), position
    assert hand.backend.memory_addresses() == before
    with pytest.raises(EngineError, match="no copy is kept under key 5"):
        hand.run(moves=(SwapDrop(5),))


def test_f91_operations_are_done_in_order(folder: Path) -> None:
    """Two sequences change places through host memory, and one is moved, in one plan."""
    hand = make(folder)
    expected = {n: alone(hand, n, 12) for n in (40, 50)}
    a, b = Served(0, prompt_of(40), hand.place(0, 6)), Served(1, prompt_of(50), hand.place(6, 6, ring=1))
    for _ in range(6):
        advance(hand, [a, b])
    a_kv, b_kv, third = a.kv, b.kv, hand.place(14, 6, ring=4)
    operations: tuple[MemoryOp, ...] = (
        SwapOut(1, a_kv, a.done), SwapOut(2, b_kv, b.done), SwapIn(1, b_kv, a.done), SwapIn(2, a_kv, b.done),
        Move(0, 6, 14, 6, b.done), Move(0, 2, 8, 2, 32, pool=1),
    )  # fmt: skip
    a.kv, b.kv = b_kv, third
    for number in range(6):
        advance(hand, [a, b], moves=() if number else operations)
    assert a.tokens == expected[40] and b.tokens == expected[50]


RING = KVRows((0, 1), True)
ROW = KVRows((0, 1, 2), True, (RING,))
BAD_OPERATIONS: dict[str, tuple[tuple[MemoryOp, ...], str]] = {
    "move from outside": ((Move(23, 2, 0, 2, 20),), "20 tokens do not fit 2 blocks of 16 from block 23 on in pool 0"),
    "move to outside": ((Move(0, 2, 23, 2, 20),), "which has 24"),
    "move below the pool": ((Move(0, 2, -1, 2, 20),), "from block -1"),
    "move more than fits": ((Move(0, 2, 4, 1, 20),), "20 tokens do not fit 1 blocks"),
    "move less than nothing": ((Move(0, 2, 4, 1, -1),), "-1 tokens are less than none"),
    "move outside a ring's pool": ((Move(0, 2, 15, 2, 20, pool=1),), "in pool 1, which has 16"),
    "move in no pool": ((Move(0, 2, 4, 2, 20, pool=2),), "pool 2 is none of the 2"),
    "swap in unknown": ((SwapIn(9, ROW, 20),), "no copy is kept under key 9"),
    "drop unknown": ((SwapDrop(9),), "no copy is kept under key 9"),
    "swap out twice": ((SwapOut(1, ROW, 20), SwapOut(1, ROW, 20)), "a copy is kept under key 1 already"),
    "swap in twice": ((SwapOut(1, ROW, 20), SwapIn(1, ROW, 20), SwapIn(1, ROW, 20)), "no copy is kept under key 1"),
    "swap in another length": ((SwapOut(1, ROW, 20), SwapIn(1, ROW, 21)), "under key 1 has 20 tokens"),
    "swap out too much": ((SwapOut(1, ROW, 49),), "49 tokens do not fit 3 blocks"),
    "swap in too much": ((SwapOut(1, ROW, 40), SwapIn(1, ROW._replace(blocks=(4, 5)), 40)), "40 tokens do not fit 2"),
    "swap a short ring": ((SwapOut(1, KVRows((0, 1, 2), True, (KVRows((3,), True),)), 40),), "32 tokens do not fit 1"),
    "swap without a ring": ((SwapOut(1, KVRows((0, 1, 2), True), 20),), "it has 0 rings, the model 1 windows"),
    "swap apart": ((SwapOut(1, KVRows((0, 2, 3), True, (RING,)), 20),), "in pool 0 are not a run of adjacent ones"),
    "a good one first": ((Move(0, 3, 8, 3, 40), SwapDrop(9)), "no copy is kept under key 9"),
}


@pytest.mark.parametrize("case", BAD_OPERATIONS)
def test_f91_operations_are_checked_before_any_is_done(case: str, folder: Path) -> None:
    hand = make(folder)
    operations, message = BAD_OPERATIONS[case]
    served = Served(0, prompt_of(40), hand.place(0, 8))
    advance(hand, [served])
    before = contents(hand)
    with pytest.raises(EngineError, match=message):
        hand.run(served.row(), moves=operations)
    assert same(before, contents(hand))
    for _ in range(2):  # nothing was left under key 1
        hand.run(moves=(SwapOut(1, served.kv, served.done), SwapDrop(1)))


BAD_ROWS = {
    "a ring outside its pool": (ROW._replace(rings=(KVRows((15, 16), True),)), 0, 20, "from block 15 on in pool 1"),
    "a ring too short": (ROW._replace(rings=(KVRows((3,), True),)), 10, 10, "20 tokens do not fit 1 blocks"),
    "a ring too short for a wrap": (ROW._replace(rings=(KVRows((3,), True),)), 40, 1, "32 tokens do not fit 1 blocks"),
    "no ring": (ROW._replace(rings=()), 0, 20, "it has 0 rings"),
    "no blocks in a ring": (ROW._replace(rings=(KVRows((), True),)), 0, 20, "in pool 1 are not a run"),
    "beyond its blocks": (ROW, 40, 9, "49 tokens do not fit 3 blocks"),
    "blocks outside the pool": (KVRows((22, 23, 24), True, (RING,)), 0, 20, "from block 22 on in pool 0, which has 24"),
    "a block table": (ROW._replace(contiguous=False), 0, 20, "in pool 0 are not a run"),
    "before the first position": (ROW, -1, 20, "from position 0 or later"),
    "nothing to feed": (ROW, 0, 0, "at least one token"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_f39_rows_are_checked_before_anything_is_written(case: str, folder: Path) -> None:
    """The first row and the move of the plan are right, and not done."""
    hand = make(folder)
    kv, start, count, message = BAD_ROWS[case]
    advance(hand, [Served(1, prompt_of(50), hand.place(4, 8, ring=4))])
    before = contents(hand)
    good = PlanRow(0, 0, (1, 2, 3), 0, hand.place(16, 4, ring=5), GREEDY)
    with pytest.raises(EngineError, match=message):
        hand.run(good, PlanRow(2, 2, (7,) * count, start, kv, GREEDY), moves=(Move(4, 8, 12, 8, 50),))
    assert same(before, contents(hand))


def test_a_pending_token_that_nobody_drew_is_refused_first(folder: Path) -> None:
    hand = make(folder)
    before = contents(hand)
    with pytest.raises(EngineError, match="slot 3 has a pending token but drew none"):
        hand.run(PlanRow(0, 0, (1, 2, 3), 0, hand.place(0, 4), GREEDY), PlanRow(1, 3, (PENDING,), 5, ROW, GREEDY))
    assert same(before, contents(hand))


def test_f91_reset_forgets_the_copies(folder: Path) -> None:
    hand = make(folder)
    served = Served(0, prompt_of(40), hand.place(0, 8))
    advance(hand, [served])
    hand.run(moves=(SwapOut(1, served.kv, 40),))
    assert hand.swap_s > 0, "a plan without rows tells, too"
    hand.backend.reset()
    with pytest.raises(EngineError, match="no copy is kept under key 1"):
        hand.run(moves=(SwapIn(1, served.kv, 40),))


@pytest.mark.parametrize("length", [13, 24, 45])
def test_read_kv_is_what_mlx_lms_caches_hold(length: int, folder: Path) -> None:
    """Full layers: everything; sliding layers: the last `window` positions in order."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache
    from mlx_lm.utils import load_model

    hand = make(folder)
    one = Served(0, prompt_of(length), hand.place(3, 6))
    while one.done < length:
        advance(hand, [one], 10)
    model, _ = load_model(folder)
    caches = make_prompt_cache(model)
    model(mx.array([prompt_of(length)]), cache=caches)
    for state, cache in zip(hand.backend.read_kv(one.kv, length), caches, strict=True):
        keep = length if type(cache) is KVCache else min(length, WINDOW)
        for mine, theirs in ((state.keys, cache.keys), (state.values, cache.values)):
            expected = np.array(theirs[0, :, :length][:, -keep:]).transpose(1, 0, 2)
            assert mine.dtype == np.float32 and mine.shape == expected.shape
            assert np.abs(mine - expected).max() < 1e-4


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_state_read_and_written_elsewhere_goes_on_the_same(kind: str, folder: Path) -> None:
    """Wrapped, on another backend, in a run of another capacity."""
    hand, other = make(folder, **KINDS[kind]), make(folder, **KINDS[kind])
    expected = alone(hand, 45, 30)
    one = Served(0, prompt_of(45), hand.place(13, 8, ring=7))
    for _ in range(10):
        advance(hand, [one])
    states = hand.backend.read_kv(one.kv, one.done)
    addresses = other.backend.memory_addresses()
    one.kv = other.place(2, 6, ring=4)
    other.backend.write_kv(one.kv, one.done, states)
    assert other.backend.memory_addresses() == addresses
    again = other.backend.read_kv(one.kv, one.done)
    assert all(np.array_equal(a, b) for x, y in zip(states, again, strict=True) for a, b in zip(x, y, strict=True))
    first = one.done
    while len(one.tokens) < len(expected):
        advance(other, [one])
    assert one.tokens == expected
    assert all(np.array_equal(other.logits[0, p], hand.logits[99, p]) for p in range(first, one.done))


def test_a_state_written_into_a_short_ring(folder: Path) -> None:
    """17 tokens in a ring of two blocks that was full of another sequence's, at other slots than they came from."""
    hand = make(folder)
    expected = alone(hand, 17, 30)
    one = Served(0, prompt_of(17), hand.place(0, 8))
    advance(hand, [one])
    states = hand.backend.read_kv(one.kv, one.done)
    advance(hand, [Served(1, prompt_of(60, 3), hand.place(12, 6, ring=6))])
    one.kv = hand.place(12, 5, ring=6)
    hand.backend.write_kv(one.kv, one.done, states)
    while len(one.tokens) < len(expected):
        advance(hand, [one])
    assert one.tokens == expected


def bad_states() -> dict[str, tuple[Any, str]]:
    def change(layer: int, **changes: Any) -> Any:
        def changed(states: list[LayerState]) -> list[LayerState]:
            replaced = {name: function(getattr(states[layer], name)) for name, function in changes.items()}
            return [*states[:layer], states[layer]._replace(**replaced), *states[layer + 1 :]]

        return changed

    def spoiled(value: float) -> Any:
        def spoil(numbers: Any) -> Any:
            copy = numbers.copy()
            copy[3, 1, 5] = value
            return copy

        return spoil

    return {
        "too few layers": (lambda states: states[1:], "the state has 5 layers, the model 6"),
        "too few tokens": (change(5, values=lambda v: v[1:]), r"values of layer 5 are float32 \(39, 2, 32\)"),
        "too many for a window": (change(0, keys=lambda k: np.vstack([k, k])), r"float32 \(24, 2, 32\) is needed"),
        "another type": (change(1, keys=lambda k: k.astype(np.float64)), "keys of layer 1 are float64"),
        "NaN": (change(4, values=spoiled(np.nan)), "values of layer 4 hold NaN, infinity"),
        "infinity": (change(5, keys=spoiled(-np.inf)), "keys of layer 5 hold NaN, infinity"),
        "too large for float16": (change(5, keys=spoiled(70000.0)), "beyond 65504, the largest of mlx.core.float16"),
    }


@pytest.mark.parametrize("case", bad_states())
def test_bad_states_are_refused_before_anything_is_written(case: str, folder: Path) -> None:
    changed, message = bad_states()[case]
    hand = make(folder, dtype="float16")
    one = Served(0, prompt_of(40), hand.place(0, 8))
    advance(hand, [one])
    states = hand.backend.read_kv(one.kv, 40)
    before = contents(hand)
    with pytest.raises(EngineError, match=message):
        hand.backend.write_kv(hand.place(10, 4, ring=5), 40, changed(states))
    for kv, tokens in ((hand.place(22, 4, ring=5), 40), (hand.place(10, 2, ring=5), 40)):
        with pytest.raises(EngineError, match="the keys and values of 40 tokens: 40 tokens do not fit"):
            hand.backend.write_kv(kv, tokens, states)
        with pytest.raises(EngineError, match="40 tokens do not fit"):
            hand.backend.read_kv(kv, tokens)
    assert same(before, contents(hand))


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_p9_f26_pools_stay_through_wraps_swaps_and_moves(kind: str, tmp_path: Path) -> None:
    """400 overlapping steps: two sequences decode far beyond their windows, a third comes as long chunks, is swapped
    out and in, moved and dropped. No address changes, and no step's peak memory grows by a quarter of one array."""
    folder = write_model(tmp_path, "gpt_oss", WINDOWED["gpt_oss"] | {"max_position_embeddings": 2048})
    hand = ByHand(folder, num_blocks=6000, ring_blocks=6000, **KINDS[kind])
    backend = hand.backend
    before, growth = backend.memory_addresses(), 0
    smallest = min(plane.arrays[0].nbytes for plane in backend.pool.keys)
    long = [Served(n, prompt_of(30, n), hand.place(n * 40, 40, ring=n)) for n in range(2)]
    mine = hand.place(90, 10, ring=5)
    elsewhere = hand.place(110, 10, ring=8)
    flight: list[Any] = []
    for step in range(400):
        rows = [one.row() if step == 0 else PlanRow(one.number, one.number, (PENDING,), one.done, one.kv, GREEDY)
                for one in long]  # fmt: skip
        moves: tuple[MemoryOp, ...] = ()
        match step % 10:
            case 0 | 1 | 2:  # prompt chunks of 37 tokens: the second and third meet a ring that is full
                rows.append(PlanRow(7, 7, (9,) * 37, step % 10 * 37, mine, None))
            case 3:
                moves = (SwapOut(step, mine, 111), SwapIn(step, elsewhere, 111))
            case 5:
                moves = (Move(110, 10, 90, 10, 111), Move(16, 2, 17, 2, 32, pool=1), SwapOut(step, elsewhere, 20))
            case 6:
                moves = (SwapDrop(step - 1),)
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        flight.append(backend.submit(StepPlan(100 + step, tuple(rows), moves)))
        for one, row in zip(long, rows, strict=False):
            one.done += len(row.tokens)
        if len(flight) == 2:
            backend.collect(flight.pop(0))
        growth = max(growth, mx.get_peak_memory() - active)
    backend.collect(flight.pop())
    assert backend.memory_addresses() == before
    assert all(one.done > 15 * WINDOW for one in long)
    assert growth < smallest / 4, f"a step took {growth} bytes; the smallest array has {smallest}"
