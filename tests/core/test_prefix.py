"""What one sequence has computed serves others that begin alike, as long as nobody needs the blocks (F83, F17, F20)."""

from __future__ import annotations

import pytest

from cortexstream.kv.prefix import common_prefix
from cortexstream.plan import Move
from tests.core.contents import World
from tests.core.support import PLACEMENTS, Placement

MODULUS = 2**61 - 1  # Python's hash of an int is its remainder: tokens so far apart have equal hashes


def text(start: int, length: int) -> list[int]:
    return [*range(start, start + length)]


def reuse(world: World) -> tuple[int, int, int]:
    stats = world.arena.stats()
    return stats.reused_tokens, stats.copied_tokens, stats.moved_tokens


def found(world: World, tokens: list[int]) -> int:
    """How many of these tokens a new sequence would not have to compute. Looks, and leaves the world as it was, but for
    what was used last."""
    handle = world.admit([*tokens, -9], reuse=len(tokens))
    position = handle.position
    world.flush()
    world.release(handle, 0 if world.arena.placement == "paged" else None)
    return position


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_the_second_of_1000_tokens_computes_none_of_them(placement: Placement) -> None:
    world = World(256, 16, placement)
    prompt = text(0, 1000)
    first = world.begin([*prompt, 7000], publish=True)
    second = world.admit([*prompt, 8000, 8001])
    assert second.position == 1000
    moves = world.flush()
    assert reuse(world) == (1000, 1000 if placement == "run" else 8, 0)
    if placement == "run":
        assert moves == (Move(first.blocks[0], 63, second.blocks[0], 63, 1000),)
        assert set(first.blocks).isdisjoint(second.blocks)
    else:
        assert moves == (Move(first.blocks[62], 1, second.blocks[62], 1, 8),)  # the block in which they part
        assert first.blocks[:62] == second.blocks[:62] and first.blocks[62] != second.blocks[62]
        assert world.arena.used_blocks == 64
    world.write(second, [8000, 8001])
    world.write(first, text(9000, 7))
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_a_conversation_goes_on_where_it_ended(placement: Placement) -> None:
    world = World(64, 16, placement, growth=1.25)
    handle = world.begin(text(0, 100), room=12)
    blocks, size = handle.blocks, len(handle.blocks)
    told = world.release(handle)
    assert world.arena.used_blocks == 0 and world.arena.stats().cached_blocks == (size if placement == "run" else 6)
    handle = world.admit([*told, 500, 501], room=size * 16 - 102)  # it needs just what is there
    if placement == "run":
        assert (handle.blocks, handle.position) == (blocks, 100)
        assert world.flush() == () and reuse(world) == (100, 0, 0)
    else:  # full blocks alone are kept
        assert (handle.blocks[:6], handle.position) == (blocks[:6], 96)
        assert world.flush() == () and reuse(world) == (96, 0, 0)
    assert world.arena.stats().cached_blocks == 0
    world.write(handle, [500, 501] if placement == "run" else [*text(96, 4), 500, 501])
    told = world.release(handle)
    handle = world.admit([*told, *text(600, 100)])  # now it does not fit
    assert handle.position == (102 if placement == "run" else 96)
    world.write(handle, [*told, *text(600, 100)][handle.position :])
    assert reuse(world)[1:] == ((0, 102) if placement == "run" else (0, 0))
    world.end()


def test_f83_a_run_is_taken_over_if_little_is_lost_and_else_copied() -> None:
    """What a continuation cuts off is at most a block of 16 tokens; a longer rest stays for others."""
    for length, rest in ((84, 16), (83, 17)):
        world = World(64, 16)
        told = world.release(world.begin(text(0, 100)))
        handle = world.admit([*told[:length], -1])
        assert handle.position == length and world.arena.stats().cached_blocks == (0 if rest == 16 else 7)
        world.flush()
        assert reuse(world) == (length, 0 if rest == 16 else length, length if rest == 16 else 0)  # one block less
        world.end()
    world = World(9, 16)
    told = world.release(world.begin(text(0, 100)))
    handle = world.admit([*told[:30], *text(500, 30)])  # 4 blocks: beside the 7 there are 2
    assert handle.position == 30 and world.arena.stats().cached_blocks == 0 and handle.blocks == (0, 1, 2, 3)
    world.write(handle, text(500, 30))
    world.end()


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 47, 48])
def test_f83_partial_blocks_count(placement: Placement, length: int, running: bool) -> None:
    """The beginning of `length` tokens of one that wrote 48 is found whole, and so is all that one of `length` wrote;
    of a finished one in paged placement only full blocks."""
    world = World(64, 16, placement)
    handle = world.begin(text(0, 48), publish=True)
    if not running:
        world.release(handle)
    assert found(world, [*text(0, length), -1, -2]) == length
    other = World(64, 16, placement)
    handle = other.begin(text(0, length), publish=True)
    if not running:
        other.release(handle)
    whole = running or placement == "run"
    assert found(other, [*text(0, length), -1, -2]) == (length if whole else length // 16 * 16)
    if running:  # and what it writes behind that is not disturbed
        other.arena.grow(handle, length + 9)
        other.write(handle, text(900, 9), publish=True)
        assert found(other, [*text(0, length), *text(900, 9), -1]) == length + 9
    for it in (world, other):
        it.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("running", [True, False])
def test_f83_a_wrong_prefix_never_matches(placement: Placement, running: bool) -> None:
    wrong = [[*text(0, at), at + 1000, *text(at + 1, 63 - at)] for at in range(64)]
    shifted = [text(offset, 64 - offset) for offset in (1, 15, 16, 17, 32)]  # the same tokens at another place
    for tokens, expected in [*zip(wrong, range(64), strict=True), *((t, 0) for t in [*shifted, []]), (text(0, 64), 64)]:
        world = World(12, 16, placement)
        handle = world.begin(text(0, 64), publish=True)
        if not running:
            world.release(handle)
        assert found(world, tokens) == expected
        world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("one", "other"), [(-1, -2), (5, 5 + MODULUS), (0, MODULUS), (3, 3 + 2 * MODULUS)])
def test_f83_equal_hashes_are_not_equal_tokens(placement: Placement, one: int, other: int) -> None:
    assert hash(one) == hash(other) and hash((one,) * 4) == hash((other,) * 4)
    world = World(64, 4, placement)
    for tokens in ([one] * 12, [other] * 12):
        assert found(world, tokens) == 0
        world.release(world.begin(tokens))
        assert found(world, tokens) == 12
    mixed = [one] * 5 + [other] * 7
    assert found(world, mixed) == 5
    world.release(world.begin(mixed))
    assert [found(world, tokens) for tokens in (mixed, [one] * 12, [other] * 12)] == [12, 12, 12]
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_lists_and_tuples_begin_alike(placement: Placement) -> None:
    """The scheduler has lists; what is known is kept in tuples."""
    world = World(64, 16, placement)
    handle = world.begin(text(0, 40))
    world.arena.publish(handle, [*text(0, 40)])
    for tokens in (text(0, 30), tuple(text(0, 30))):
        again = world.arena.admit(31, None, tokens)
        assert again.position == 30
        world.arena.release(again, tokens)
    assert common_prefix([1, 2, 3], (1, 2, 4)) == common_prefix((1, 2), [1, 2, 3]) == 2


def test_common_prefix_is_what_a_loop_finds() -> None:
    for length in range(9):
        for at in range(length + 1):
            other = text(0, length)
            other[at:] = [-1 - t for t in other[at:]]
            for extra in ([], [5]):
                assert (
                    common_prefix(text(0, length), other + extra) == at == common_prefix(other + extra, text(0, length))
                )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_shared_blocks_cost_an_admission_nothing(placement: Placement) -> None:
    """In paged placement a full arena admits who needs only what others hold; in runs nobody shares."""
    world = World(8, 4, placement)
    world.begin(text(0, 28), publish=True)
    tokens = (*text(0, 28), 1)
    assert world.arena.can_admit(29, None, tokens) == (placement == "paged")
    if placement == "paged":
        handle = world.admit([*tokens])
        assert handle.position == 28 and world.arena.used_blocks == 8
        world.write(handle, [1])
        assert not world.arena.can_admit(29, None, tokens)
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_caching_can_be_turned_off_and_cleared(placement: Placement) -> None:
    world = World(32, 4, placement, prefix_caching=False)
    world.begin(text(0, 20), publish=True)
    world.release(world.begin(text(0, 20)))
    assert not world.arena.prefix_caching and world.arena.stats().cached_blocks == 0
    assert found(world, text(0, 20)) == 0 and reuse(world) == (0, 0, 0)
    world = World(32, 4, placement)
    running = world.begin(text(0, 20), publish=True)
    world.release(world.begin(text(100, 20)))
    changes = world.arena.changes
    world.arena.clear()
    assert world.arena.changes > changes and world.arena.stats().cached_blocks == 0
    assert found(world, text(100, 20)) == 0
    assert [h for h, _ in world.arena.owners()] == [running]
    world.arena.clear()  # twice is as good
    world.arena.publish(running, tuple(text(0, 20)))  # what runs can be known again
    assert found(world, text(0, 20)) == 20
    world.end()


def test_f83_two_who_compute_the_same_hold_one_copy() -> None:
    world = World(16, 4, "paged")
    first, second = world.begin(text(0, 10)), world.begin(text(0, 10))
    assert world.arena.used_blocks == 6
    changes = world.arena.changes
    world.arena.publish(first, text(0, 10))
    world.arena.publish(second, text(0, 10))
    assert second.blocks[:2] == first.blocks[:2] and second.blocks[2] != first.blocks[2]
    assert world.arena.used_blocks == 4 and world.arena.changes > changes
    world.arena.release(first)
    del world.texts[first]
    world.arena.grow(second, 16)
    world.write(second, text(50, 6))
    world.end()


def test_f83_two_finished_runs_with_the_same_tokens_are_one() -> None:
    world = World(32, 4)
    handles = [world.begin(text(0, n)) for n in (20, 20, 12, 24)]
    cached = []
    for handle in handles:
        world.release(handle)
        cached.append(world.arena.stats().cached_blocks)
    assert cached == [5, 5, 5, 11]
    world.end()
