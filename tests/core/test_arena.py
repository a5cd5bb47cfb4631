"""The logical level: handles, admission, growth, compaction and reports (F17 to F24, F28, P8)."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable

import pytest

from cortexstream.backend import LayerKV, ModelInfo
from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv import ArenaStats, KVArena, KVHandle
from cortexstream.plan import MemoryOp, Move
from tests.core.support import PLACEMENTS, Placement, Store, side_by_side, snapshot


def tokens_of(move: MemoryOp) -> int:
    assert isinstance(move, Move)
    return move.num_tokens


@pytest.mark.parametrize("head_major", [False, True])
def test_f17_compaction_serves_a_run_that_no_hole_holds(head_major: bool) -> None:
    arena = KVArena(128, 4, "run")
    store = Store(128, 4, head_major)
    handles = [arena.admit(64, 64) for _ in range(8)]
    for number, handle in enumerate(handles):
        store.write(handle, 57 + number)
    for handle in handles[1::2]:
        store.forget(handle)
        arena.release(handle)
    assert (arena.free_blocks, arena.stats().largest_free_run, arena.fragmentation()) == (64, 16, 0.75)
    assert arena.can_admit(128, 128)
    big = arena.admit(128, 128)
    assert len(big.blocks) == 32
    moves = arena.take_moves()
    assert moves and arena.stats().compactions == 1
    store.moves(moves)
    store.write(big, 128)
    store.verify()
    arena.check()
    assert arena.stats().moved_tokens == sum(tokens_of(m) for m in moves) <= 2 * 64  # two gaps join, no more is moved


def test_f18_bytes_per_token() -> None:
    def info(layers: int, heads: int, dim: int, item_bytes: int) -> ModelInfo:
        return ModelInfo("x", 10, 4096, frozenset(), (LayerKV(heads, dim, dim),) * layers, item_bytes, 0)

    assert 32768 * info(32, 32, 64, 4).kv_bytes_per_token == 17_179_869_184
    assert 2048 * info(24, 2, 64, 2).kv_bytes_per_token == 25_165_824
    assert 4096 * info(32, 8, 128, 2).kv_bytes_per_token == 536_870_912
    assert 32768 * info(32, 8, 128, 2).kv_bytes_per_token == 4_294_967_296
    mixed = ModelInfo("x", 10, 64, frozenset(), (LayerKV(2, 8, 4), LayerKV(1, 16, 16, window=8)), 2, 0)
    assert mixed.kv_bytes_per_token == (2 * 12 + 1 * 32) * 2


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f19_eight_of_ten_fit(placement: Placement) -> None:
    arena = KVArena(2048 // 16, 16, placement)
    handles = [arena.admit(256, 256) for _ in range(8)]
    assert arena.capacity_tokens == 2048 and not arena.can_admit(256, 256)
    before = snapshot(arena, handles)
    with pytest.raises(ArenaFullError, match="256 tokens need 16 blocks of 16; 0 of 128 are free"):
        arena.admit(256, 256)
    assert snapshot(arena, handles) == before
    arena.release(handles[3])
    again = arena.admit(256, 256)
    assert again.position == 0 and len(again.blocks) == 16
    arena.check()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f19_stale_and_foreign_handles(placement: Placement) -> None:
    arena, other = KVArena(8, 4, placement), KVArena(8, 4, placement)
    dead, alive, foreign = arena.admit(8, 8), arena.admit(8, 8), other.admit(8, 8)
    arena.release(dead)
    heir = arena.admit(8, 8)
    assert heir.blocks == dead.blocks  # the same blocks, another handle
    before = snapshot(arena, [dead, alive, heir]), snapshot(other, [foreign])
    calls: list[Callable[[KVHandle], None]] = [arena.release, lambda h: arena.grow(h, 12)]
    for call in calls:
        with pytest.raises(ArenaError, match="stale handle: the sequence was released already"):
            call(dead)
        with pytest.raises(ArenaError, match="foreign handle: it belongs to another arena"):
            call(foreign)
    with pytest.raises(ArenaError, match="stale handle"):
        dead.advance()
    assert (snapshot(arena, [dead, alive, heir]), snapshot(other, [foreign])) == before
    assert "released" in repr(dead) and "0/8 tokens" in repr(alive)
    arena.check()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ArenaError, match="block_tokens is 0; must be at least 1"):
        KVArena(8, 0)
    with pytest.raises(ArenaError, match=r"growth is 0\.5; must be at least 1"):
        KVArena(8, 4, growth=0.5)
    arena = KVArena(8, 4)
    for count in (0, -1):
        with pytest.raises(ArenaError, match=f"num_tokens is {count}; must be at least 1"):
            arena.admit(count)
    with pytest.raises(ArenaError, match="limit_tokens is 3; must be at least num_tokens, 4"):
        arena.admit(4, 3)
    with pytest.raises(ArenaFullError, match="33 tokens need 9 blocks of 4; 8 of 8 are free"):
        arena.admit(33)
    assert arena.used_blocks == 0 and arena.capacity_tokens == 32


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f23_locate_is_a_bijection(placement: Placement) -> None:
    arena = KVArena(8, 4, placement, growth=1.0)
    hole = arena.admit(4, 4)
    arena.admit(4, 4)
    arena.release(hole)
    handle = arena.admit(12, 12)
    places = [handle.locate(position) for position in range(12)]
    assert len(set(places)) == 12
    assert set(places) == {(block, offset) for block in handle.blocks for offset in range(4)}
    assert places == [(handle.blocks[p // 4], p % 4) for p in range(12)]
    for position in (-1, 12, 1000):
        with pytest.raises(ArenaError, match=f"position {position} is outside the capacity of 12 tokens"):
            handle.locate(position)
    handle.advance(5)
    assert handle.locate(handle.position) == (handle.blocks[1], 1)  # where the next token goes


def test_handle_position_contract() -> None:
    handle = KVArena(5, 2).admit(10, 10)
    assert (handle.position, handle.is_full, handle.remaining) == (0, False, 10)
    for step, remaining in ((1, 9), (3, 6), (6, 0)):
        handle.advance(step)
        assert handle.remaining == remaining
    assert handle.is_full
    message = r"^KV cache overflow: position 11 exceeds the capacity of 10 tokens \(tried to advance by 1 tokens\)$"
    with pytest.raises(ArenaError, match=message):
        handle.advance()
    assert (handle.position, handle.remaining) == (10, 0)
    handle.reset()
    assert (handle.position, handle.is_full, handle.capacity_tokens) == (0, False, 10)
    handle.advance(5)
    with pytest.raises(ArenaError, match=r"position 11 exceeds .* \(tried to advance by 6 tokens\)"):
        handle.advance(6)
    for count in (0, -1):
        with pytest.raises(ArenaError, match=r"^num_tokens must be positive$"):
            handle.advance(count)
    assert handle.position == 5
    assert handle.rows is handle.rows and handle.rows.blocks == handle.blocks and handle.rows.contiguous


def test_f24_stats_and_text() -> None:
    arena = KVArena(70, 4, "run", growth=1.0)
    first, hole, last = side_by_side(arena, [3, 2, 4])
    first.advance(9)
    last.advance(16)
    arena.release(hole)
    assert arena.stats() == ArenaStats(
        num_blocks=70, used_blocks=7, free_blocks=63, largest_free_run=61, fragmentation=1 - 61 / 63,
        num_sequences=2, used_tokens=25, moved_tokens=0, relocations=0, compactions=0, cached_blocks=0,
        copied_tokens=0, reused_tokens=0, moved_by_pool=(0,), copied_by_pool=(0,),
    )  # fmt: skip
    assert arena.describe().splitlines() == [
        "configuration: 70 blocks of 4 tokens, placement run",
        "state: 7 used, 63 free, fragmentation 0.03",
        "sequences: 2",
        "  9/12 tokens, blocks [0, +3]",
        "  16/16 tokens, blocks [5, +4]",
        "blocks ('X' used, 'o' kept for reuse, '.' free):",
        "X" * 3 + ".." + "X" * 4 + "." * 55,
        "." * 6,
    ]


CLASSES = {
    1.0: [*range(1, 21)],
    1.25: [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20],
    1.5: [1, 2, 3, 4, 6, 9, 13, 19, 20],
    2.0: [1, 2, 4, 8, 16, 20],
}


@pytest.mark.parametrize("growth", CLASSES)
def test_need_is_the_next_capacity_class_within_the_limit(growth: float) -> None:
    arena = KVArena(20, 4, "run", growth)
    for tokens in range(1, 81):
        blocks = -(-tokens // 4)
        rounded = next(size for size in CLASSES[growth] if size >= blocks)
        assert arena.need_blocks(tokens) == rounded
        for limit in (tokens, tokens + 1, tokens + 7, 79, 1000):
            if limit >= tokens:
                assert arena.need_blocks(tokens, limit) == max(blocks, min(rounded, -(-limit // 4)))
        assert KVArena(20, 4, "paged", growth).need_blocks(tokens) == blocks
    assert arena.need_blocks(81) == 21  # more than there are: never admitted


@pytest.mark.parametrize("growth", [1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("seed", range(6))
def test_p8_exact_admission_and_unharmed_contents(placement: Placement, growth: float, seed: int) -> None:
    """Admitted if and only if enough blocks are free; grown if and only if the missing ones are; moves harm nothing."""
    rng = random.Random(f"{placement} {growth} {seed}")
    num_blocks, block_tokens = rng.choice((5, 24, 61)), rng.choice((1, 3, 4))
    arena = KVArena(num_blocks, block_tokens, placement, growth)
    store = Store(num_blocks, block_tokens, head_major=placement == "run" and seed % 2 == 0)
    live: list[KVHandle] = []
    for _ in range(350):
        action = rng.random()
        before = snapshot(arena, live)
        if action < 0.35 or not live:
            tokens = rng.randint(1, max(1, num_blocks * block_tokens // rng.choice((2, 4, 8))))
            limit = rng.choice((None, tokens, tokens + rng.randint(0, 40)))
            need = arena.need_blocks(tokens, limit)
            if need <= num_blocks - sum(len(h.blocks) for h in live):
                assert arena.can_admit(tokens, limit)
                handle = arena.admit(tokens, limit)
                assert len(handle.blocks) == need and handle.capacity_tokens >= tokens
                live.append(handle)
            else:
                assert not arena.can_admit(tokens, limit)
                with pytest.raises(ArenaFullError):
                    arena.admit(tokens, limit)
                assert snapshot(arena, live) == before
        elif action < 0.70:
            handle = rng.choice(live)
            tokens = handle.position + rng.randint(1, 3 * block_tokens)
            blocks = -(-tokens // block_tokens)
            if blocks <= handle.limit_blocks and blocks - len(handle.blocks) <= arena.free_blocks:
                arena.grow(handle, tokens)
                assert handle.capacity_tokens >= tokens and len(handle.blocks) <= handle.limit_blocks
            else:
                with pytest.raises(ArenaFullError):
                    arena.grow(handle, tokens)
                assert snapshot(arena, live) == before
        elif action < 0.9:
            handle = rng.choice(live)
            if rng.random() < 0.8:  # else several operations share one set of moves
                store.moves(arena.take_moves())
                if handle.remaining:
                    store.write(handle, rng.randint(1, handle.remaining))
        else:
            handle = live.pop(rng.randrange(len(live)))
            store.moves(arena.take_moves())
            store.forget(handle)
            arena.release(handle)
        arena.check()
        if placement == "paged":
            assert arena.take_moves() == ()
        if rng.random() < 0.5:
            store.moves(arena.take_moves())
            store.verify()
    store.moves(arena.take_moves())
    store.verify()
    for handle in live:
        arena.release(handle)
    arena.check()
    assert arena.used_blocks == 0 and arena.stats().num_sequences == 0
    if placement == "run" and num_blocks > 5:
        assert arena.stats().compactions and arena.stats().relocations  # the paths were taken


def test_moves_are_counted_and_empty_sequences_move_for_nothing() -> None:
    arena = KVArena(10, 1, growth=1.0)
    handles = [arena.admit(2, 2) for _ in range(5)]
    handles[1].advance(1)
    for index in (0, 2, 4):
        arena.release(handles[index])
    arena.admit(6, 6)  # moves both: one with a token, one without
    moves = arena.take_moves()
    assert [tokens_of(m) for m in moves] == [1]
    assert arena.stats().moved_tokens == 1
    assert arena.take_moves() == ()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f28_eight_threads(placement: Placement) -> None:
    arena = KVArena(96, 2, placement)
    errors: list[BaseException] = []
    operations = 10_000

    def work(number: int) -> None:
        rng = random.Random(number)
        live: list[KVHandle] = []
        try:
            for _ in range(operations):
                if live and (len(live) > 3 or rng.random() < 0.4):
                    arena.release(live.pop(rng.randrange(len(live))))
                    continue
                try:
                    if live and rng.random() < 0.5:
                        arena.grow(live[0], live[0].capacity_tokens + 1)
                    else:
                        live.append(arena.admit(rng.randint(1, 10)))
                except ArenaFullError:
                    pass  # others hold the blocks
            for handle in live:
                arena.release(handle)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as many switches between bytecodes as can be had
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert not errors
    arena.check()
    assert arena.used_blocks == 0 and arena.stats().num_sequences == 0


def test_check_finds_broken_ownership() -> None:
    def arena_with_two() -> tuple[KVArena, KVHandle, KVHandle]:
        arena = KVArena(16, 2, growth=1.0)
        first, second = arena.admit(4), arena.admit(4)
        arena.check()
        return arena, first, second

    def lie(arena: KVArena, handle: KVHandle, blocks: tuple[int, ...]) -> None:
        arena._full.assign(handle, blocks)
        arena._place()

    arena, first, _ = arena_with_two()
    first.position = 5
    with pytest.raises(ArenaError, match="over-full"):
        arena.check()
    arena, first, second = arena_with_two()
    first.place(second.rows)
    with pytest.raises(ArenaError, match="shows other blocks than it holds"):
        arena.check()
    arena, first, second = arena_with_two()
    lie(arena, first, second.blocks)
    with pytest.raises(ArenaError, match="shares a block"):
        arena.check()
    arena, first, _ = arena_with_two()
    lie(arena, first, (1, 0))
    with pytest.raises(ArenaError, match="not contiguous"):
        arena.check()
    arena, first, _ = arena_with_two()
    first.limit_blocks = 1
    with pytest.raises(ArenaError, match="more blocks than its limit 1"):
        arena.check()
    arena, first, _ = arena_with_two()
    arena._handles.remove(first)
    with pytest.raises(ArenaError, match="held by nobody who is known"):
        arena.check()
