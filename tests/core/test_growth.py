"""Sequences that outgrow their blocks: in place, by moving, by moving others (F20, F21)."""

from __future__ import annotations

import pytest

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv import KVArena
from cortexstream.plan import Move
from tests.core.support import PLACEMENTS, Placement, Store, side_by_side, snapshot


def test_f20_growth_in_place() -> None:
    arena, store = KVArena(64, 16, growth=1.0), Store(64, 16, head_major=True)
    handle = arena.admit(512)
    store.write(handle, 512)
    arena.grow(handle, 513)
    assert handle.blocks == tuple(range(33))
    moves = arena.take_moves()
    assert moves == (Move(0, 32, 0, 33, 512),)  # head-major rows depend on the capacity: they are laid out anew
    store.moves(moves)
    store.write(handle, 2)
    store.verify()
    assert handle.position == 514 and arena.stats().relocations == arena.stats().compactions == 0
    arena.grow(handle, 100)
    arena.grow(handle, 528)
    assert arena.take_moves() == ()  # there was room


@pytest.mark.parametrize("head_major", [False, True])
def test_f20_growth_by_relocation(head_major: bool) -> None:
    arena, store = KVArena(128, 16, growth=1.0), Store(128, 16, head_major)
    handle, neighbour = arena.admit(512), arena.admit(16)
    store.write(handle, 512)
    store.write(neighbour, 9)
    arena.grow(handle, 514)
    moves = arena.take_moves()
    assert handle.blocks == tuple(range(33, 66)) and moves == (Move(0, 32, 33, 33, 512),)
    store.moves(moves)
    store.write(handle, 2)
    store.verify()
    arena.check()
    stats = arena.stats()
    assert (stats.relocations, stats.compactions, stats.moved_tokens, stats.used_blocks) == (1, 0, 512, 34)
    assert arena.admit(512).blocks[0] == 0  # the old place is free


@pytest.mark.parametrize("head_major", [False, True])
def test_f20_growth_by_compaction(head_major: bool) -> None:
    arena, store = KVArena(40, 16, growth=1.0), Store(40, 16, head_major)
    first, gap, handle, second, last = side_by_side(arena, [2, 1, 32, 1, 3])
    for each, tokens in ((first, 32), (handle, 512), (second, 7), (last, 48)):
        store.write(each, tokens)
    store.forget(gap)
    arena.release(gap)
    handle.limit_blocks = 34  # admitted with room to 544 tokens
    arena.grow(handle, 514)
    assert len(handle.blocks) == 33
    store.moves(arena.take_moves())
    store.write(handle, 2)
    store.verify()
    arena.check()
    assert (arena.stats().relocations, arena.stats().compactions) == (0, 1)


def test_f20_growth_of_pages_moves_nothing() -> None:
    arena, store = KVArena(64, 16, "paged"), Store(64, 16, head_major=False)
    handle, neighbour = arena.admit(512), arena.admit(16)
    store.write(handle, 512)
    store.write(neighbour, 16)
    arena.grow(handle, 514)
    assert handle.blocks == (*range(32), 33) and arena.take_moves() == ()
    store.write(handle, 2)
    store.verify()
    arena.check()


def test_growth_prefers_a_tight_fit_to_a_refusal() -> None:
    arena = KVArena(20, 1, growth=2.0)
    handle, other = arena.admit(8), arena.admit(2)
    assert (len(handle.blocks), len(other.blocks)) == (8, 2)
    arena.grow(handle, 9)  # the class is 16: 8 more of the 10 free
    assert len(handle.blocks) == 16 and arena.free_blocks == 2
    arena.grow(other, 3)  # the class is 4
    assert len(other.blocks) == 4 and arena.free_blocks == 0
    arena.release(other)
    arena.grow(handle, 17)  # the class is the whole arena, 20
    assert len(handle.blocks) == 20
    tight = KVArena(12, 1, growth=2.0)
    handle, other = tight.admit(4), tight.admit(4)
    tight.admit(1)
    tight.grow(handle, 7)  # the class, 8, needs 4 blocks and 3 are free
    assert len(handle.blocks) == 7 and tight.free_blocks == 0
    before = snapshot(tight, [handle, other])
    with pytest.raises(ArenaFullError, match="growing to 5 tokens needs 1 blocks of 1; 0 of 12 are free"):
        tight.grow(other, 5)
    assert snapshot(tight, [handle, other]) == before


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f21_exact_capacity(placement: Placement) -> None:
    arena = KVArena(64, 16, placement)
    handle = arena.admit(510, 512)
    assert len(handle.blocks) == 32 and handle.capacity_tokens == 512
    handle.advance(510)
    for position in (511, 512):
        arena.grow(handle, position)
        handle.advance()
        assert handle.position == position
    assert handle.is_full and handle.remaining == 0
    before = snapshot(arena, [handle])
    with pytest.raises(ArenaFullError, match="513 tokens exceed this sequence's limit of 512 tokens"):
        arena.grow(handle, 513)
    with pytest.raises(ArenaError):
        handle.advance()
    assert snapshot(arena, [handle]) == before and arena.free_blocks == 32


def test_f20_a_hole_that_fits_exactly_is_taken() -> None:
    arena, store = KVArena(6, 4, growth=1.0), Store(6, 4, head_major=True)
    handle, neighbour = side_by_side(arena, [2, 1])
    handle.limit_blocks = 3
    store.write(handle, 8)
    store.write(neighbour, 4)
    arena.grow(handle, 9)
    moves = arena.take_moves()
    assert (handle.blocks, neighbour.blocks, moves) == ((3, 4, 5), (2,), (Move(0, 2, 3, 3, 8),))
    assert (arena.stats().relocations, arena.stats().compactions) == (1, 0)
    store.moves(moves)
    store.write(handle, 1)
    store.verify()
    arena.check()
