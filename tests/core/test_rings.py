"""Layers with a sliding window keep the window alone, in a ring: what is claimed, moved, copied and found there."""

from __future__ import annotations

import pytest

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv import KVArena, KVHandle, Ring
from cortexstream.plan import Move
from tests.core.contents import World
from tests.core.support import PLACEMENTS, Placement
from tests.core.test_fork import go_on
from tests.core.test_prefix import text


def ring_blocks(handle: KVHandle) -> list[int]:
    return [len(ring.blocks) for ring in handle.rows.rings]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("prompt", "blocks"), [(1, [1, 1]), (4, [1, 1]), (5, [2, 1]), (9, [2, 1]), (50, [2, 1])])
def test_f20_a_ring_has_the_window_in_whole_blocks(placement: Placement, prompt: int, blocks: list[int]) -> None:
    """A window of 7 tokens is two blocks of 4, one of 4 is one; a prompt that is shorter needs less, until it grows."""
    world = World(64, 4, placement, rings=[Ring(7, 8), Ring(4, 8)])
    handle = world.begin(text(0, prompt))
    assert ring_blocks(handle) == blocks and handle.capacity_tokens == -(-prompt // 4) * 4
    for number in range(1, 9):
        go_on(world, handle, text(100 * number, 3))
    assert ring_blocks(handle) == [2, 1]
    world.arena.grow(handle, 200)
    assert ring_blocks(handle) == [2, 1] and handle.capacity_tokens == 200
    world.write(handle, text(5000, 200 - handle.position))
    with pytest.raises(ArenaError, match="position 201 exceeds the capacity of 200 tokens"):
        handle.advance()
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f19_admission_counts_every_pool(placement: Placement) -> None:
    world = World(64, 4, placement, rings=[Ring(8, 5), Ring(100, 20)])
    handles = [world.begin(text(100 * number, 8)) for number in range(2)]
    assert not world.arena.can_admit(5) and world.arena.can_admit(4)
    with pytest.raises(ArenaFullError, match="5 tokens need 2 blocks of 4 of the ring of 8 tokens; 1 of 5 are free"):
        world.arena.admit(5)
    small = world.begin(text(500, 3))
    with pytest.raises(ArenaFullError, match="growing to 5 tokens needs 1 blocks of 4 of the ring of 8 tokens; 0 of 5"):
        world.arena.grow(small, 5)
    assert ring_blocks(small) == [1, 1] and len(small.blocks) == 1
    world.release(handles[0], keep=0)
    go_on(world, small, text(600, 2))
    with pytest.raises(ArenaFullError, match="growing to 90 tokens needs 21 blocks of 4 of the ring of 100 tokens; 16"):
        world.arena.grow(small, 90)
    assert "rings of 8 tokens: 4 of 5 blocks" in world.arena.describe()
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f19_a_ring_that_is_too_small_limits_every_sequence(placement: Placement) -> None:
    """A window of 100 tokens in 3 blocks of 4 never gets full, so nobody gets beyond 12 tokens."""
    world = World(64, 4, placement, rings=[Ring(8, 2), Ring(100, 3)])
    assert world.arena.capacity_tokens == 12
    handle = world.begin(text(0, 12))
    assert world.arena.free_blocks == 61
    with pytest.raises(
        ArenaFullError, match="13 tokens needs 1 blocks of 4 of the ring of 100 tokens; 0 of 3 are free"
    ):
        world.arena.grow(handle, 13)
    world.release(handle, keep=0)
    with pytest.raises(ArenaFullError, match="13 tokens need 4 blocks of 4 of the ring of 100 tokens; 3 of 3 are free"):
        world.arena.admit(13)
    world.end()
    assert World(64, 4, placement, rings=[Ring(8, 2)]).arena.capacity_tokens == 256


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f21_the_smallest_pool_says_how_far_a_sequence_gets(placement: Placement) -> None:
    """Of the full layers a run gets the next class, 8 blocks; of the ring there are only the 5 that it needs."""
    world = World(64, 4, placement, growth=2.0, rings=[Ring(100, 5)])
    handle = world.begin(text(0, 17))
    assert len(handle.blocks) == (8 if placement == "run" else 5) and ring_blocks(handle) == [5]
    assert handle.capacity_tokens == 20
    world.write(handle, text(17, 3))
    with pytest.raises(ArenaError, match="position 21 exceeds the capacity of 20 tokens"):
        handle.advance()
    with pytest.raises(ArenaFullError, match="needs 1 blocks of 4 of the ring of 100 tokens; 0 of 5 are free"):
        world.arena.grow(handle, 21)
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f70_spare_blocks_are_those_of_the_full_layers(placement: Placement) -> None:
    """A ring's pool is as small as the windows are: what is spared for growth there would keep everybody out."""
    world = World(16, 4, placement, rings=[Ring(8, 3)])
    with pytest.raises(ArenaFullError, match="8 tokens need 2 blocks of 4, and 15 to spare; 16 of 16 are free"):
        world.arena.admit(8, None, (), 15)
    world.admit(text(0, 8), spare=14)
    with pytest.raises(ArenaFullError, match="5 tokens need 2 blocks of 4 of the ring of 8 tokens; 1 of 3 are free"):
        world.arena.admit(5, None, (), 3)
    world.admit(text(0, 4), spare=13)
    world.end()


def test_rings_that_cannot_be_are_refused() -> None:
    for window in (0, -3):
        with pytest.raises(ArenaError, match=f"a ring's window is {window}; must be at least 1"):
            KVArena(8, 4, rings=[Ring(window, 4)])
    with pytest.raises(ArenaError, match="num_blocks is -1; must be at least 0"):
        KVArena(8, 4, rings=[Ring(4, -1)])


def test_f20_growth_moves_what_a_ring_holds() -> None:
    world = World(64, 4, growth=1.0, rings=[Ring(12, 5)])
    first, second, third = world.begin(text(0, 4)), world.begin(text(100, 4)), world.begin(text(200, 30))
    assert [h.rows.rings[0].blocks for h in (first, second, third)] == [(0,), (1,), (2, 3, 4)]
    world.release(first, keep=0)
    world.arena.grow(second, 5)  # its neighbour is full, the hole is too small: it slides, and grows behind itself
    in_ring = [op for op in world.flush() if isinstance(op, Move) and op.pool == 1]
    assert in_ring == [Move(1, 1, 0, 1, 4, 1), Move(0, 1, 0, 2, 4, 1)]
    assert world.arena.stats().moved_by_pool == (4, 8)
    go_on(world, second, text(150, 4))
    world.end()


def test_f17_a_turned_ring_moves_whole() -> None:
    world = World(64, 4, growth=1.0, rings=[Ring(8, 6)])
    handles = [world.begin(text(100 * number, length)) for number, length in enumerate((3, 22, 3, 22))]
    assert [h.rows.rings[0].blocks for h in handles] == [(0,), (1, 2), (3,), (4, 5)]
    world.release(handles[0], keep=0)
    world.release(handles[2], keep=0)
    world.begin(text(500, 5))
    assert world.ops[-1] == Move(1, 2, 0, 2, 8, 1)
    go_on(world, handles[1], text(600, 3))
    world.end()


@pytest.mark.parametrize("length", range(1, 23))
@pytest.mark.parametrize("written", [6, 8, 9, 22])
def test_f83_a_kept_run_is_used_only_if_its_rings_have_the_window(written: int, length: int) -> None:
    """A conversation of 22 tokens, or of fewer, and a new prompt that has its first `length`. In a ring that has not
    turned yet every position is still there. In one that has turned, of 8 tokens, the position before the window of the
    next token is overwritten by the last but one at the latest: then only the end, or one token less, can go on."""
    if length > written:
        return
    world = World(64, 4, rings=[Ring(8, 20), Ring(30, 20)])
    told = world.release(world.begin(text(0, written)))
    handle = world.admit([*told[:length], -1, -2])
    assert handle.position == (length if written <= 8 or length >= written - 1 else 0)
    go_on(world, handle, [*told[handle.position : length], *text(900, 20)])
    world.end()


@pytest.mark.parametrize("others", [0, 1, 5])
def test_f83_another_run_whose_rings_have_the_window_is_found(others: int) -> None:
    """The one that has the most tokens has turned too far; a shorter one has not."""
    world = World(200, 4, rings=[Ring(8, 90)])
    world.begin(text(0, 13), publish=True)
    for number in range(1 + others):
        world.release(world.begin([*text(0, 18), *text(1000 * number, 20)]))
    handle = world.admit([*text(0, 18), -1])
    assert handle.position == 12  # of the short one's 13, what is in full blocks
    world.write(handle, [*text(12, 6), -1])
    world.end()


def test_f83_a_running_sequence_is_copied_from_while_its_window_is_there() -> None:
    world = World(64, 4, rings=[Ring(8, 20)])
    first = world.begin(text(0, 13), publish=True)
    second = world.admit([*text(0, 13), -1])
    assert second.position == 13
    copies = [op for op in world.flush() if isinstance(op, Move)]
    assert [(op.pool, op.num_tokens) for op in copies] == [(0, 13), (1, 8)]
    world.write(second, [-1])
    go_on(world, first, [13, 14])
    world.release(second, keep=0)
    third = world.admit([*text(0, 13), -2])  # the first is two tokens further: position 6 of the window is gone
    assert third.position == 0
    world.write(third, [*text(0, 13), -2])
    world.end()


def test_f83_with_rings_pages_are_not_reused() -> None:
    world = World(64, 4, "paged", rings=[Ring(8, 20)])
    assert not world.arena.prefix_caching
    world.begin(text(0, 20), publish=True)
    told = world.release(world.begin(text(0, 20)))
    assert world.arena.stats().cached_blocks == 0
    assert world.admit([*told, 1]).position == 0
    world.end()


def test_f83_kept_runs_give_way_for_the_sake_of_a_ring() -> None:
    world = World(64, 4, rings=[Ring(8, 4)])
    for number in range(2):
        world.release(world.begin(text(100 * number, 8)))
    assert world.arena.stats().cached_blocks == 4
    third = world.begin(text(200, 3))
    assert world.arena.stats().cached_blocks == 2  # plenty of blocks are free, but of the ring none was
    assert ring_blocks(third) == [1] and world.arena.can_admit(8)
    world.begin(text(300, 8))
    assert world.arena.stats().cached_blocks == 0 and not world.arena.can_admit(8)
    go_on(world, third, [1])
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("written", [5, 8, 9, 30])
def test_f80_swapping_brings_the_rings_back(placement: Placement, written: int) -> None:
    world = World(32, 4, placement, rings=[Ring(8, 9), Ring(3, 9)])
    key = world.swap_out(world.begin(text(0, written)))
    world.begin(text(500, 11))
    handle = world.swap_in(key)
    world.check()
    go_on(world, handle, text(600, 12))
    world.end()


def test_f80_swapping_remembers_how_far_a_ring_had_turned() -> None:
    """12 tokens were written, 11 are known: the next one goes on there, its ring has position 11 instead of 5. Out to
    host memory and in again, and what begins with 10 of the tokens must not be given that ring."""
    world = World(64, 3, rings=[Ring(6, 20)])
    world.release(world.begin(text(0, 12)), keep=11)
    handle = world.admit([*text(0, 11), -1])
    assert (handle.position, handle.written) == (11, 12)
    handle = world.swap_in(world.swap_out(handle))
    world.release(handle)
    handle = world.admit([*text(0, 10), -2])
    assert handle.position == 0
    world.write(handle, [*text(0, 10), -2])
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_a_ring_has_overwritten_stays_so_after_a_reset(placement: Placement) -> None:
    world = World(64, 4, placement, rings=[Ring(8, 20)])
    handle = world.begin(text(0, 30))
    world.reset(handle)
    world.write(handle, text(100, 5))
    told = world.release(handle)
    handle = world.admit([*told[:3], -1])
    assert handle.position in (0, 3)
    world.write(handle, [*told[handle.position : 3], -1])
    world.end()


@pytest.mark.parametrize("way", ["taken over", "copied", "swapped"])
def test_f78_what_a_file_lacked_nobody_finds_later(way: str) -> None:
    """A prefix of 11 tokens from a file has the last 9 of them in its ring. Who goes on from it lacks the others, too:
    another prompt that begins with 5 of its tokens cannot be given that ring."""
    world = World(64, 4, rings=[Ring(9, 30)])
    origin = world.begin(text(0, 11), publish=True)
    origin.shortest_reuse = 10
    if way != "copied":
        world.release(origin)
    handle = world.admit([*text(0, 11), -1])
    assert handle.position == 11 and (handle.blocks == origin.blocks) == (way != "copied")
    if way == "swapped":
        handle = world.swap_in(world.swap_out(handle))
    world.write(handle, [-1])
    assert world.release(handle) == [*text(0, 11), -1]
    assert world.admit([*text(0, 5), -2]).position == 0
    assert world.admit([*text(0, 11), -3]).position == 11
    world.end()


def test_f20_a_ring_never_gets_more_blocks_than_the_window_has() -> None:
    """Whatever the capacity class, and though no limit is known: 9 tokens are 3 blocks of 4, and the class is 4."""
    world = World(64, 4, growth=2.0, rings=[Ring(12, 20)])
    handle = world.begin(text(0, 9))
    assert len(handle.blocks) == 4 and ring_blocks(handle) == [3]
    other = world.begin(text(100, 5))
    assert ring_blocks(other) == [2]
    go_on(world, other, text(200, 30))
    assert ring_blocks(other) == [3]
    world.end()
