"""The physical level: what holds for both allocators, and first fit (F12 to F15)."""

from __future__ import annotations

import random
import threading

import pytest

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv import Allocator, BlockAllocator, BuddyAllocator, KVArena, Run
from tests.core.bitmap import ALLOCATORS, Make, refused, state

both = pytest.mark.parametrize("make", ALLOCATORS)


def test_f12_adjacent_and_lowest() -> None:
    blocks = BlockAllocator(1000)
    assert [blocks.allocate(100) for _ in range(3)] == [Run(0, 100), Run(100, 100), Run(200, 100)]
    blocks.free(Run(100, 100))
    assert blocks.allocate(40) == Run(100, 40)
    assert blocks.allocate(61) == Run(300, 61)  # 60 are left of the hole: too small
    assert blocks.allocate(60) == Run(140, 60)
    blocks.check()


def test_f12_all_or_nothing() -> None:
    blocks = BlockAllocator(100)
    assert blocks.allocate(100) == Run(0, 100)
    message = "no 100 adjacent blocks: 0 of 100 are free, the largest run has 0"
    refused(blocks, lambda: blocks.allocate(100), message, ArenaFullError)
    blocks.free(Run(10, 20))
    blocks.free(Run(50, 30))
    message = "no 31 adjacent blocks: 50 of 100 are free, the largest run has 30"
    refused(blocks, lambda: blocks.allocate(31), message, ArenaFullError)
    refused(blocks, lambda: blocks.allocate_any(51), "51 blocks are needed, 50 of 100 are free", ArenaFullError)
    assert (blocks.num_free, blocks.num_used) == (50, 50)
    assert blocks.allocate_any(50) == [*range(10, 30), *range(50, 80)]
    blocks.check()


@both
def test_f12_all_or_nothing_of_scattered_blocks(make: Make) -> None:
    blocks = make(24)
    assert blocks.take(Run(0, 24))
    for block in range(1, 24, 3):
        blocks.free(Run(block, 1))
    refused(blocks, lambda: blocks.allocate_any(9), "9 blocks are needed, 8 of 24 are free", ArenaFullError)
    before = state(blocks)
    assert not blocks.take(Run(1, 2)) and not blocks.take(Run(0, 2)) and not blocks.take(Run(0, 24))
    assert state(blocks) == before
    assert blocks.allocate_any(8) == [*range(1, 24, 3)]
    assert (blocks.num_free, blocks.num_used, blocks.largest_free_run) == (0, 24, 0)
    blocks.check()


@both
def test_f12_take_has_the_blocks_that_it_names(make: Make) -> None:
    blocks = make(30)
    assert blocks.take(Run(10, 10))
    assert [blocks.free_after(block) for block in (0, 4, 9, 10, 19, 20, 29, 30, -1)] == [10, 6, 1, 0, 0, 10, 1, 0, 0]
    assert blocks.take(Run(20, 3))  # grow in place
    assert not blocks.take(Run(20, 4)) and not blocks.take(Run(9, 2))
    assert blocks.take(Run(9, 1)) and blocks.take(Run(0, 9)) and blocks.take(Run(23, 7))
    assert blocks.num_free == 0
    blocks.free(Run(0, 30))
    assert blocks.free_after(0) == 30
    blocks.check()


@both
def test_f12_any_blocks_follow_their_neighbour_first(make: Make) -> None:
    blocks = make(40)
    assert blocks.take(Run(10, 10)) and blocks.take(Run(24, 2))
    assert blocks.allocate_any(2, after=20) == [20, 21]
    assert blocks.allocate_any(5, after=22) == [22, 23, 0, 1, 2]
    assert blocks.allocate_any(2, after=24) == [3, 4]  # 24 is taken
    assert blocks.allocate_any(1, after=40) == [5]
    assert blocks.allocate_any(1, after=-3) == [6]
    assert blocks.allocate_any(2, after=33) == [33, 34]  # in the middle of a hole
    assert blocks.allocate_any(1) == [7]
    assert blocks.allocate_any(12, after=38) == [38, 39, 8, 9, 26, 27, 28, 29, 30, 31, 32, 35]
    blocks.check()


def test_f12_the_same_calls_give_the_same_blocks() -> None:
    def answers(make: Make) -> list[object]:
        blocks, rng = make(300), random.Random(12)
        given: list[object] = []
        for _ in range(400):
            run = Run(rng.randrange(290), rng.randint(1, 9))
            if rng.random() < 0.6 and blocks.largest_free_run >= run.size:
                given += [blocks.allocate(run.size), blocks.allocate_any(1, run.start)]
            elif not blocks.take(run) and blocks.free_after(run.start) == 0:
                blocks.free(Run(run.start, 1))
        return given

    for make in ALLOCATORS:
        assert answers(make) == answers(make)
    assert answers(BlockAllocator) != answers(BuddyAllocator)


@both
@pytest.mark.parametrize("count", [0, -1, -1000])
def test_f13_counts_must_be_positive(make: Make, count: int) -> None:
    blocks = make(8)
    assert blocks.take(Run(0, 4))
    message = f"block count is {count}; must be at least 1"
    refused(blocks, lambda: blocks.allocate(count), message)
    refused(blocks, lambda: blocks.allocate_any(count), message)
    refused(blocks, lambda: blocks.take(Run(6, count)), message)
    refused(blocks, lambda: blocks.free(Run(2, count)), message)
    refused(blocks, lambda: blocks.block_map(count), f"width is {count}; must be at least 1")
    with pytest.raises(ArenaError, match="num_blocks is -1; must be at least 0"):
        make(-1)


@both
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run(0, 4), "double free: of blocks 0 to 3, 4 are free already, the first is 0"),
        (Run(2, 4), "double free: of blocks 2 to 5, 2 are free already, the first is 2"),
        (Run(4, 5), "double free: of blocks 4 to 8, 1 are free already, the first is 8"),
        (Run(-1, 2), "blocks -1 to 0 are outside the arena of 16 blocks"),
        (Run(14, 3), "blocks 14 to 16 are outside the arena of 16 blocks"),
        (Run(16, 1), "blocks 16 to 16 are outside the arena of 16 blocks"),
        (Run(-4, 4), "blocks -4 to -1 are outside the arena of 16 blocks"),
        (Run(100, 2), "blocks 100 to 101 are outside the arena of 16 blocks"),
    ],
)
def test_f13_bad_frees_change_nothing_and_never_alias(make: Make, run: Run, message: str) -> None:
    blocks = make(16)
    first, second = blocks.allocate(4), blocks.allocate(4)
    assert (first, second) == (Run(0, 4), Run(4, 4))
    blocks.free(first)
    refused(blocks, lambda: blocks.free(run), message)
    blocks.check()
    taken = {*range(second.start, second.end)}
    while blocks.num_free:
        fresh = blocks.allocate(1)
        assert fresh.start not in taken
        taken.add(fresh.start)
    assert taken == set(range(16))


@both
def test_f13_take_outside_is_refused(make: Make) -> None:
    blocks = make(8)
    before = state(blocks)
    assert not blocks.take(Run(-1, 2)) and not blocks.take(Run(8, 1)) and not blocks.take(Run(6, 3))
    assert not blocks.take(Run(-8, 4)) and not blocks.take(Run(0, 9)) and not blocks.take(Run(-1, 1))
    assert state(blocks) == before
    assert blocks.take(Run(6, 2)) and not blocks.take(Run(6, 1))
    blocks.check()


@both
def test_an_empty_pool(make: Make) -> None:
    blocks = make(0)
    assert (blocks.num_free, blocks.num_used, blocks.largest_free_run, blocks.free_after(0)) == (0, 0, 0, 0)
    for take in (blocks.allocate, blocks.allocate_any):
        with pytest.raises(ArenaFullError):
            take(1)
    assert not blocks.take(Run(0, 1))
    refused(blocks, lambda: blocks.free(Run(0, 1)), "blocks 0 to 0 are outside the arena of 0 blocks")
    assert blocks.fragmentation() == 0.0 and blocks.block_map() == ""
    blocks.check()


class Counting(list[int]):
    """A list that counts how many of its items are read or written."""

    touched = 0

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        self.touched += 1
        return super().__getitem__(key)

    def __setitem__(self, key, value):  # type: ignore[no-untyped-def]
        self.touched += len(value) if isinstance(key, slice) else 1
        super().__setitem__(key, value)


def singles(blocks: Allocator, rng: random.Random) -> int:
    """Operations on single blocks, anywhere on the comb; returns how many."""
    for _ in range(200):
        block = 2 * rng.randrange(1, blocks.num_blocks // 4 - 1)
        blocks.free(Run(block + 1, 1))
        assert blocks.free_after(block) == 3
        assert blocks.take(Run(block + 1, 1))
        blocks.free(blocks.allocate(1))
        (one,) = blocks.allocate_any(1, after=block)
        blocks.free(Run(one, 1))
    return 200 * 7


def runs(blocks: Allocator, rng: random.Random) -> int:
    """Runs of up to 12 blocks come and go behind the comb; returns how many times."""
    half = blocks.num_blocks // 2
    live: list[Run] = []
    for _ in range(1000):
        if live and rng.random() < 0.5:
            blocks.free(live.pop(rng.randrange(len(live))))
        elif rng.random() < 0.5:
            live.append(blocks.allocate(rng.randint(1, 12)))
        else:
            run = Run(half + rng.randrange(half - 12), rng.randint(1, 12))
            live += [run] if blocks.take(run) else []
    return 1000


def touches_per_operation(make: Make, num_blocks: int) -> list[float]:
    """Tree nodes touched by an operation on a pool whose lower half is a comb: every second block is taken."""
    blocks = make(num_blocks)
    for block in range(1, num_blocks // 2, 2):
        assert blocks.take(Run(block, 1))
    rng, means = random.Random(14), []
    for work in (singles, runs):
        tree = vars(blocks)["_tree"] = Counting(vars(blocks)["_tree"])
        operations = work(blocks, rng)
        means.append(tree.touched / operations)
    blocks.check()
    return means


@both
def test_f14_work_per_operation_grows_with_the_logarithm(make: Make) -> None:
    """Counted, not timed: from 2,000 to 200,000 blocks an operation touches less than three times as many nodes."""
    small, large = touches_per_operation(make, 2_000), touches_per_operation(make, 200_000)
    for few, many in zip(small, large, strict=True):
        assert 1 < few and many < 3 * few
        assert many < 18 * 12  # reads and writes: a dozen per level of the tree


def test_f15_fragmentation() -> None:
    blocks = BlockAllocator(1000)
    assert blocks.fragmentation() == 0.0
    runs = [blocks.allocate(100) for _ in range(3)]
    assert blocks.fragmentation() == 0.0
    blocks.free(runs[1])
    assert blocks.fragmentation() == 1 - 700 / 800 == 0.125
    blocks.free(runs[0])
    assert blocks.fragmentation() == 1 - 700 / 900
    blocks.free(runs[2])
    assert blocks.fragmentation() == 0.0
    blocks.allocate(1000)
    assert blocks.fragmentation() == 0.0  # nothing is free: nothing is scattered


def test_f15_fragmentation_of_buddies() -> None:
    blocks = BuddyAllocator(1000)  # pieces of 512, 256, 128, 64, 32 and 8
    assert blocks.fragmentation() == 1 - 512 / 1000
    runs = [blocks.allocate(100) for _ in range(3)]
    assert runs == [Run(768, 100), Run(512, 100), Run(640, 100)]
    blocks.free(runs[1])
    assert blocks.fragmentation() == 1 - 512 / 800
    blocks.allocate(512)
    assert blocks.fragmentation() == 1 - 128 / 288
    assert blocks.take(Run(512, 128))
    blocks.allocate_any(160)
    assert blocks.num_free == 0 and blocks.fragmentation() == 0.0


@both
def test_f15_block_map(make: Make) -> None:
    blocks = make(130)
    assert blocks.take(Run(0, 66))
    blocks.free(Run(2, 3))
    assert blocks.block_map() == "XX...XX" + "X" * 57 + "\n" + "XX" + "." * 62 + "\n" + ".."
    assert blocks.block_map(1000) == "XX...XX" + "X" * 59 + "." * 64
    assert make(5).block_map(2) == "..\n..\n."


def test_f15_reports_under_load_from_eight_threads() -> None:
    arena = KVArena(64, 4)
    stop = threading.Event()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        try:
            while not stop.is_set():
                try:
                    handle = arena.admit(rng.randint(1, 60))
                except ArenaFullError:
                    continue
                assert "placement run" in arena.describe()
                assert 0.0 <= arena.fragmentation() <= 1.0
                stats = arena.stats()
                assert stats.used_blocks + stats.free_blocks == 64 and stats.used_blocks > 0
                arena.release(handle)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert not errors
    arena.check()
    assert arena.used_blocks == 0


def damaged(blocks: BlockAllocator | BuddyAllocator, damage: str) -> Allocator:
    """A pool of 16 blocks, of which 0, 2 and 3 are taken, with one thing wrong."""
    assert blocks.take(Run(0, 4))
    blocks.free(Run(1, 1))
    blocks.check()
    if damage == "count":
        blocks.num_free += 1
    elif damage == "taken":
        blocks._taken[1], blocks._taken[2] = 1, 0
    elif damage == "leaf":
        blocks._tree[blocks._leaves + 1] += 1
    elif damage == "end":
        blocks._tree[blocks._leaves + 16] = 1
    elif damage == "node":
        blocks._tree[blocks._leaves // 2] += 1
    else:
        blocks._tree[1] += 1
    return blocks


@pytest.mark.parametrize(
    ("make", "damage", "words"),
    [
        (BlockAllocator, "count", "free count is 14, but 13 blocks are not taken"),
        (BlockAllocator, "taken", "extents are .*, but the taken map says"),
        (BlockAllocator, "leaf", "the tree's leaves do not match the extents"),
        (BlockAllocator, "end", "the tree's leaves do not match the extents"),
        (BlockAllocator, "node", "an inner node of the tree is not the maximum of its children"),
        (BlockAllocator, "root", "an inner node of the tree is not the maximum of its children"),
        (BuddyAllocator, "count", "free count is 14, but 13 blocks are not taken"),
        (BuddyAllocator, "taken", "the tree's leaves do not match the blocks that are not taken"),
        (BuddyAllocator, "leaf", "the tree's leaves do not match the blocks that are not taken"),
        (BuddyAllocator, "end", "the tree's leaves do not match the blocks that are not taken"),
        (BuddyAllocator, "node", "node 16 of the tree, of order 1, does not follow from its children"),
        (BuddyAllocator, "root", "node 1 of the tree, of order 5, does not follow from its children"),
    ],
)
def test_check_finds_broken_bookkeeping(make: type[BlockAllocator | BuddyAllocator], damage: str, words: str) -> None:
    with pytest.raises(ArenaError, match=words):
        damaged(make(16), damage).check()
