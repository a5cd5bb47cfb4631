"""Forks: two sequences that go on from one, copy on write where they share blocks (F90)."""

from __future__ import annotations

import pytest

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv import KVHandle, Ring
from cortexstream.plan import Move
from tests.core.contents import World
from tests.core.support import PLACEMENTS, Placement
from tests.core.test_prefix import found, text


def references(world: World) -> list[int]:
    counts: list[int] = world.arena._full.references  # type: ignore[attr-defined]
    return counts


def go_on(world: World, handle: KVHandle, tokens: list[int], publish: bool = False) -> None:
    world.arena.grow(handle, handle.position + len(tokens))
    world.write(handle, tokens, publish)


@pytest.mark.parametrize("first", ["parent", "fork"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f90_a_write_inside_a_shared_block_leaves_the_other_intact(placement: Placement, first: str) -> None:
    world = World(32, 16, placement)
    parent = world.begin(text(0, 40), room=60)
    fork = world.fork(parent)
    assert fork.position == 40 and fork.limit_blocks == parent.limit_blocks
    if placement == "paged":
        assert fork.blocks == parent.blocks[:3] and references(world)[:7] == [2, 2, 2, 1, 1, 1, 1]
        assert world.flush() == () and world.arena.used_blocks == 7
    else:
        assert world.flush() == (Move(parent.blocks[0], 7, fork.blocks[0], 7, 40),)
        assert set(fork.blocks).isdisjoint(parent.blocks)
    pair = [parent, fork] if first == "parent" else [fork, parent]
    shared = parent.blocks[2]
    world.arena.grow(pair[0], 41)
    moves = world.flush()
    if placement == "paged":
        assert moves == (Move(shared, 1, pair[0].blocks[2], 1, 8),)  # what is written of the block, and no more
        assert pair[0].blocks[2] != shared == pair[1].blocks[2]
    world.write(pair[0], [500])
    world.arena.grow(pair[1], 41)
    assert world.flush() == ()  # alone now
    world.write(pair[1], [600])
    go_on(world, pair[0], text(700, 30))
    go_on(world, pair[1], text(800, 50))
    assert world.arena.stats().copied_tokens == (40 if placement == "run" else 8)
    world.end()
    assert placement == "run" or not any(references(world))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f90_a_chain_of_forks(placement: Placement) -> None:
    """Each forks from the one before, some in the middle of a block, and writes on; they end in any order."""
    world = World(64, 4, placement)
    handles = [world.begin(text(0, 6), room=2)]
    for number in range(1, 7):
        handles.append(world.fork(handles[-1]))
        go_on(world, handles[-1], text(100 * number, 1 + number % 4))
    go_on(world, handles[0], [77])
    for index in (3, 0, 6, 1, 5):
        world.check()
        world.release(handles[index])
    go_on(world, handles[4], text(900, 9))
    world.end()
    assert placement == "run" or not any(references(world))


def test_f90_many_forks_of_one_copy_all_but_once() -> None:
    world = World(32, 4, "paged")
    parent = world.begin(text(0, 6))
    forks = [world.fork(parent) for _ in range(4)]
    assert references(world)[:2] == [5, 5] and world.arena.used_blocks == 2
    for number, handle in enumerate([*forks, parent]):
        go_on(world, handle, [100 + number])
    assert world.arena.stats().copied_tokens == 4 * 2  # the last one is alone with the old block
    assert references(world)[:2] == [5, 1] and world.arena.used_blocks == 6
    world.end()


def test_f90_only_what_is_written_is_shared() -> None:
    """Empty blocks stay with the parent: a fork that grows gets blocks of its own behind the last written one."""
    world = World(32, 4, "paged")
    parent = world.begin(text(0, 5), room=11)
    fork = world.fork(parent)
    assert (len(parent.blocks), len(fork.blocks)) == (4, 2) and fork.capacity_tokens == 8
    world.arena.grow(fork, 6)
    world.write(fork, [100])
    with pytest.raises(ArenaError, match="position 9 exceeds the capacity of 8 tokens"):
        fork.advance(3)
    world.arena.grow(parent, 6)
    world.write(parent, text(200, 11))
    go_on(world, fork, text(300, 10))
    assert set(fork.blocks[1:]).isdisjoint(parent.blocks[1:]) and fork.blocks[0] == parent.blocks[0]
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f90_forks_of_empty_and_of_full_blocks(placement: Placement) -> None:
    world = World(16, 4, placement)
    for written in (0, 4, 8):
        parent = world.admit(text(0, 8))
        if written:
            world.write(parent, text(0, written))
        fork = world.fork(parent)
        assert not fork.shares and not parent.shares  # no block holds tokens of both and room for more
        assert "sequences: 2" in world.arena.describe()
        go_on(world, fork, text(100, 5))
        go_on(world, parent, text(200, 5))
        assert world.arena.stats().copied_tokens == (0 if placement == "paged" else {0: 0, 4: 4, 8: 12}[written])
        world.end()


def test_f90_nothing_is_written_before_the_block_is_ones_own() -> None:
    world = World(8, 4, "paged")
    parent = world.begin(text(0, 6))
    fork = world.fork(parent)
    for handle in (parent, fork):
        for num_tokens in (1, 4, 6):  # growing to what is there promises nothing about what is behind it
            world.arena.grow(handle, num_tokens)
            with pytest.raises(ArenaError, match=r"may be shared with another sequence: grow\(\) must come before"):
                handle.advance()
        with pytest.raises(ArenaError, match="6 tokens are shared with other sequences and cannot be written again"):
            handle.reset()
    world.arena.grow(fork, 7)
    with pytest.raises(ArenaError, match="6 tokens are shared"):
        fork.reset()  # the first block is the parent's, too
    world.write(fork, [100])
    world.end()


def test_f90_a_fork_of_a_run_needs_a_run() -> None:
    world = World(5, 4)
    parent = world.begin(text(0, 10))
    with pytest.raises(ArenaFullError, match="a fork of 10 tokens needs 3 blocks of 4; 2 of 5 are free"):
        world.fork(parent)
    assert world.arena.stats().num_sequences == 1
    world.release(world.begin(text(100, 8)))
    world.release(parent)
    parent = world.begin(text(200, 8))
    world.begin(text(300, 4))
    world.fork(parent)  # what is kept gives way
    assert world.arena.free_blocks == 0 and world.arena.stats().cached_blocks == 0
    world.end()


def test_f90_a_fork_of_pages_needs_a_block_when_it_writes() -> None:
    world = World(5, 4, "paged")
    parent = world.begin(text(0, 10))
    fork, other = world.fork(parent), world.begin(text(100, 8))
    assert world.arena.free_blocks == 0
    for handle in (parent, fork):
        with pytest.raises(ArenaFullError, match="growing to 11 tokens needs 1 blocks of 4; 0 of 5 are free"):
            world.arena.grow(handle, 11)
        assert handle.shares
    world.release(other)  # kept, but given up for the copy
    go_on(world, fork, [1])
    go_on(world, parent, [2])
    world.end()


def test_f90_forks_publish_the_block_that_they_share() -> None:
    """Both say what is in the partial block; one copies it, the other ends: the next one finds what is still there."""
    world = World(16, 4, "paged")
    parent = world.begin(text(0, 6))
    fork = world.fork(parent)
    for handle in (parent, fork):
        world.arena.publish(handle, text(0, 6))
        world.arena.check()
    world.arena.grow(fork, 7)
    world.write(fork, [100])
    world.release(parent, keep=0)
    world.begin(text(500, 8))  # into what the parent had
    world.check()
    again = world.admit([*text(0, 6), 7])
    assert again.position == 6
    world.write(again, [7])
    world.end()


def test_f90_a_fork_holds_blocks_behind_others_that_are_given_up() -> None:
    """The parent's first block is replaced by an equal one of a third. When both have ended, that is given up, although
    the fork still holds the block that is known behind it; the fork's own beginning is not lost."""
    world = World(8, 4, "paged")
    parent = world.begin(text(0, 8))
    fork = world.fork(parent)
    third = world.begin(text(0, 4), publish=True)
    world.arena.publish(parent, text(0, 8))
    assert parent.blocks == (third.blocks[0], fork.blocks[1]) and fork.blocks[0] != parent.blocks[0]
    world.check()
    world.release(third)
    world.check()
    world.release(parent)
    assert world.arena.stats().cached_blocks == 1 and world.arena.free_blocks == 6
    assert found(world, text(0, 8)) == 8
    big = world.begin(text(500, 24))
    assert world.arena.free_blocks == 0
    world.arena.publish(fork, text(0, 8))  # now it says itself what it has
    world.check()
    world.release(big, keep=0)
    assert found(world, text(0, 8)) == 8
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f90_a_fork_knows_what_its_parent_published(placement: Placement) -> None:
    world = World(32, 4, placement)
    parent = world.begin(text(0, 10), publish=True)
    fork = world.fork(parent)
    world.release(parent, keep=0)
    assert found(world, [*text(0, 10), -1]) == (0 if placement == "run" else 8)
    go_on(world, fork, text(10, 6), publish=True)
    assert found(world, [*text(0, 16), -1]) == 16
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("written", [3, 9, 30])
def test_f90_a_fork_copies_the_rings(placement: Placement, written: int) -> None:
    """A ring is written all over, so it is copied at once, in both placements: all that it holds."""
    world = World(64, 4, placement, rings=[Ring(8, 20), Ring(3, 20)])
    parent = world.begin(text(0, written), room=4)
    fork = world.fork(parent)
    for pool in (1, 2):
        mine, yours = parent.rows.rings[pool - 1].blocks, fork.rows.rings[pool - 1].blocks
        assert set(mine).isdisjoint(yours) and len(mine) == len(yours)
        copied = min(written, world.device.ring_slots[pool] or 0)
        assert world.arena.stats().copied_by_pool[pool] == copied
    go_on(world, parent, text(100, 2))
    go_on(world, fork, text(200, 11))
    go_on(world, parent, text(300, 9))
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f90_a_fork_needs_room_for_its_rings(placement: Placement) -> None:
    world = World(64, 4, placement, rings=[Ring(8, 3)])
    parent = world.begin(text(0, 9))
    with pytest.raises(ArenaFullError, match="needs 2 blocks of 4 of the ring of 8 tokens; 1 of 3 are free"):
        world.fork(parent)
    world.end()
