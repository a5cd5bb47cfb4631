"""What is kept for reuse gives way, the oldest first and never what is in use; and how it moves (F83, F17, F20)."""

from __future__ import annotations

import random

import pytest

from cortexstream.errors import ArenaFullError
from cortexstream.kv import KVArena, run_cache
from cortexstream.plan import Move
from tests.core.contents import World
from tests.core.support import PLACEMENTS, Placement
from tests.core.test_prefix import found, reuse, text


@pytest.mark.parametrize("hit", [False, True])
def test_f83_who_is_copied_from_is_used(hit: bool) -> None:
    world = World(20, 4)
    for start in (0, 100):
        world.release(world.begin(text(start, 32)))
    if hit:
        copy = world.begin([*text(0, 8), -1])
        assert world.arena.stats().copied_tokens == 8
        world.release(copy, keep=0)
    world.begin(text(500, 20))
    assert [found(world, text(start, 30)) for start in ((0, 100) if hit else (100, 0))] == [30, 0]
    world.end()


@pytest.mark.parametrize("give_up", [0, 4])
def test_f83_others_give_way_to_a_continuation(give_up: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_cache, "GIVE_UP", give_up)
    world = World(12, 4)
    told = world.release(world.begin(text(0, 16)))
    world.release(world.begin(text(100, 32)))
    assert world.arena.stats().free_blocks == world.arena.stats().cached_blocks == 12
    handle = world.admit([*told, *text(200, 8)])
    assert (handle.position, handle.blocks) == (16, (0, 1, 2, 3, 4, 5))
    world.write(handle, text(200, 8))
    assert reuse(world)[1] == 0
    world.end()


@pytest.mark.parametrize("used", range(3))
def test_f83_a_hole_is_not_made_of_what_is_copied(used: int) -> None:
    """Three kept runs with holes between them. The two that are not used go; if that leaves two holes that are too
    small, the one in the middle is moved and not given up."""
    world = World(15, 4)
    handles = [world.begin(text(100 * number, 8 if number % 2 else 12)) for number in range(6)]
    for handle in handles[1::2]:
        world.release(handle, keep=0)
    for handle in handles[::2]:
        world.release(handle)
    assert world.arena.block_map() == "ooo.." * 3
    handle = world.admit([*text(200 * used, 2), *text(900, 30)])
    assert handle.position == 2 and world.arena.stats().compactions == (used == 1)
    world.write(handle, text(900, 30))
    assert world.arena.stats().cached_blocks == 3 and found(world, text(200 * used, 12)) == 12
    world.end()


def test_f20_pages_grow_behind_themselves_first() -> None:
    world = World(16, 4, "paged")
    first, second = world.begin(text(0, 4)), world.begin(text(100, 12))
    world.release(first, keep=0)
    world.arena.grow(second, 20)
    assert [*second.blocks] == [1, 2, 3, 4, 5]
    world.begin(text(200, 8))
    world.arena.grow(second, 24)
    assert [*second.blocks] == [1, 2, 3, 4, 5, 7]  # 0 and 6 are taken
    world.end()


def test_f20_runs_get_room_to_grow_while_much_is_free() -> None:
    world = World(64, 4, headroom_tokens=16)
    handle = world.begin(text(0, 5))
    assert len(handle.blocks) == 6  # 21 tokens, at most a quarter of what is free
    assert len(world.begin(text(100, 5), room=3).blocks) == 6 and len(world.admit([1, 2], limit=7).blocks) == 2
    world.arena.grow(handle, 25)
    assert len(handle.blocks) == 11 and world.arena.stats().relocations == 1
    world.begin(text(200, 100))
    assert world.arena.free_blocks == 20
    world.release(world.begin(text(300, 5)))
    again = world.admit([*text(300, 5), 7])
    assert (again.position, len(again.blocks)) == (5, 2)  # 6 would be more than a quarter; it stays as it is
    world.write(again, [7])
    world.arena.grow(again, 9)
    assert len(again.blocks) == 3
    world.end()
    assert len(World(64, 4, "paged", headroom_tokens=16).begin(text(0, 5)).blocks) == 2


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("others", range(5))
def test_f83_what_was_used_longest_ago_is_given_up_first(placement: Placement, others: int) -> None:
    """Four finished ones fill the arena, the oldest is used once more, and then others need their blocks."""
    for number, start in enumerate((100, 200, 300, 0)):
        world = World(16, 4, placement)
        for first in (0, 100, 200, 300):
            world.release(world.begin(text(first, 16)))
        again = world.admit(text(0, 16))
        assert again.position == 15
        world.write(again, [15])
        world.release(again)
        assert world.arena.stats().cached_blocks == 16 and world.arena.free_blocks == 16
        for other in range(others):
            world.begin(text(1000 * (other + 1), 16))
        assert world.arena.stats().cached_blocks == 16 - 4 * others
        if others < 4:
            assert world.arena.admit(16, None, text(start, 15)).position == (15 if number >= others else 0)


def test_f83_of_one_sequence_the_end_is_given_up_first() -> None:
    world = World(8, 4, "paged")
    told = world.release(world.begin(text(0, 32)))
    for kept in (7, 4, 1):
        world.release(world.begin(text(1000, 4 * (8 - kept))), keep=0)
        assert world.arena.stats().cached_blocks == kept
        assert world.arena._cache._match(told) == [*range(kept)]
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_what_is_in_use_is_never_given_up(placement: Placement) -> None:
    world = World(12, 4, placement)
    running = world.begin(text(0, 16), publish=True)
    told = world.release(world.begin(text(100, 16)))
    again = world.admit([*told, 1])  # in use again, and with one block more
    assert world.arena.free_blocks == 3
    for blocks in (4, 12):
        with pytest.raises(ArenaFullError, match=f"{4 * blocks} tokens need {blocks} blocks of 4; 3 of 12 are free"):
            world.arena.admit(4 * blocks)
    world.begin(text(500, 12))
    world.write(again, [1])
    assert world.arena.free_blocks == 0 and running.live
    world.end()


def test_f17_compaction_moves_kept_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_cache, "GIVE_UP", 0)  # as when no more may be given up for a hole
    world = World(20, 4)
    handles = [world.begin(text(100 * number, 16)) for number in range(5)]
    world.release(handles[0], keep=0)
    world.release(handles[2], keep=0)
    told = world.release(handles[1])  # blocks 4 to 7, between two holes
    assert world.arena.block_map() == "." * 4 + "o" * 4 + "." * 4 + "X" * 8
    big = world.admit(text(500, 32))  # the empty blocks suffice: nothing is given up
    stats = world.arena.stats()
    assert (stats.compactions, stats.cached_blocks, stats.free_blocks) == (1, 4, 4)
    assert len(big.blocks) == 8 and world.flush() == (Move(4, 4, 0, 4, 16),)
    assert world.arena.block_map() == "oooo" + "X" * 16
    again = world.admit([*told[:15], 7])
    assert (again.position, again.blocks) == (15, (0, 1, 2, 3))
    world.write(again, [7])
    world.end()


def test_f20_growth_in_place_relocation_and_compaction_keep_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_cache, "GIVE_UP", 0)
    world = World(20, 4)
    first, second, third = (world.begin(text(100 * number, 16)) for number in range(3))
    world.arena.grow(third, 17)
    assert world.flush() == (Move(8, 4, 8, 5, 16),)  # in place, laid out anew
    world.arena.grow(first, 17)
    assert world.flush() == (Move(0, 4, 13, 5, 16),)  # behind it is the second
    assert world.arena.stats().relocations == 1
    world.release(second)
    told = text(100, 16)
    world.begin(text(500, 4))
    assert world.arena.block_map() == "X...oooo" + "X" * 10 + ".."
    world.arena.grow(third, 24)  # one more: the hole behind it is two blocks further on
    assert world.arena.stats().compactions == 1 and world.flush()
    world.write(third, text(700, 8))
    assert found(world, told) == 16
    world.end()


def test_f17_old_prefixes_go_before_anything_is_moved() -> None:
    """Kept runs fill what is free, so nothing is adjacent; moving them for each request would copy a hundred tokens for
    each that is made."""
    arena = KVArena(200, 4)
    rng = random.Random(5)
    for number in range(400):
        handle = arena.admit(rng.randint(4, 80), 100)
        handle.advance(rng.randint(1, handle.capacity_tokens))
        arena.release(handle, [number] * handle.position)
        arena.check()
    stats = arena.stats()
    assert stats.cached_blocks > 100  # much is kept all the same
    assert stats.compactions == stats.moved_tokens == 0
    live = [arena.admit(40, 40) for _ in range(4)]
    newest = arena.admit(20, 24, [399] * 3)
    assert newest.position == 3  # the last one to go
    for handle in (*live, newest):
        arena.release(handle)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f20_growth_gives_kept_prefixes_up(placement: Placement) -> None:
    world = World(12, 4, placement)
    handle = world.begin(text(0, 16))
    world.release(world.begin(text(100, 16)))
    world.release(world.begin(text(200, 16)))
    assert world.arena.stats().cached_blocks == 8 and world.arena.free_blocks == 8
    world.arena.grow(handle, 17)
    world.write(handle, [1])
    assert world.arena.stats().cached_blocks == (4 if placement == "run" else 7)
    assert found(world, text(200, 12)) == 12
    world.arena.grow(handle, 48)
    assert world.arena.stats().cached_blocks == 0 and world.arena.free_blocks == 0
    with pytest.raises(ArenaFullError, match="49 tokens exceed this sequence's limit of 48 tokens"):
        world.arena.grow(handle, 49)
    world.write(handle, text(300, 31))
    world.end()


def test_f20_a_run_that_is_taken_over_and_suffices_stays_as_it_is() -> None:
    """More room would be nice to have, but not at the price of a copy."""
    world = World(64, 4, headroom_tokens=16)
    told = world.release(world.begin(text(0, 5)))
    handle = world.admit([*told, *text(500, 5)])  # needs 3 blocks, has 6, and with headroom would get 7
    assert (handle.position, handle.blocks, world.flush()) == (5, (0, 1, 2, 3, 4, 5), ())
    assert len(world.admit(text(900, 10)).blocks) == 7
    world.write(handle, text(500, 5))
    assert reuse(world)[1:] == (0, 0)
    world.end()


@pytest.mark.parametrize("again", [False, True])
def test_f83_a_second_run_with_the_same_tokens_refreshes_the_first(again: bool) -> None:
    """It is not kept, one is enough; but that the tokens were asked for again counts as a use."""
    world = World(12, 4)
    for start in (0, 100):
        world.release(world.begin(text(start, 16)))
    if again:
        handle = world.admit(text(0, 16), reuse=0)
        world.write(handle, text(0, 16))
        world.release(handle)
    assert world.arena.stats().cached_blocks == 8
    for start in (500, 600):
        world.begin(text(start, 16))
    assert world.arena.stats().cached_blocks == 4
    kept = {start: world.arena._cache._match(text(start, 16))[1] for start in (0, 100)}
    assert kept == ({0: 16, 100: 0} if again else {0: 0, 100: 16})
    world.end()


@pytest.mark.parametrize(("size", "kept"), [(2, 22), (3, 17), (5, 7)])
def test_f17_for_a_hole_four_times_its_blocks_are_given_up(size: int, kept: int) -> None:
    """32 kept runs of a block, no two of them adjacent. Those of the blocks that are needed go in any case, then as
    many as four times that, the oldest first; after that others are moved, and the rest is kept."""
    world = World(64, 4)
    handles = [world.begin(text(100 * number, 4)) for number in range(64)]
    for handle in handles[::2]:
        world.release(handle)
    assert world.arena.block_map(64) == "oX" * 32
    world.begin(text(9000, 4 * size))
    stats = world.arena.stats()
    assert (stats.cached_blocks, stats.compactions) == (kept, 1)
    assert next(iter(world.arena._cache.holders())).position == 4
    assert found(world, text(100 * 62, 4)) == 4
    world.end()
