"""The physical level: F12 to F16."""

from __future__ import annotations

import random
import threading

import pytest

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv import BlockAllocator, BuddyAllocator, KVArena, Run

Allocator = BlockAllocator | BuddyAllocator


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
    with pytest.raises(ArenaFullError, match="no 100 adjacent blocks: 0 of 100 are free, the largest run has 0"):
        blocks.allocate(100)
    blocks.free(Run(10, 20))
    blocks.free(Run(50, 30))
    with pytest.raises(ArenaFullError, match="no 31 adjacent blocks: 50 of 100 are free, the largest run has 30"):
        blocks.allocate(31)
    with pytest.raises(ArenaFullError, match="51 blocks are needed, 50 of 100 are free"):
        blocks.allocate_any(51)
    assert (blocks.num_free, blocks.num_used) == (50, 50)
    assert blocks.allocate_any(50) == [*range(10, 30), *range(50, 80)]
    blocks.check()


class Bitmap:
    """The oracle: one byte a block, searched from the start."""

    def __init__(self, num_blocks: int) -> None:
        self.taken = bytearray(num_blocks)

    def allocate(self, size: int) -> Run | None:
        start = self.taken.find(bytes(size))
        return None if start < 0 else self.mark(Run(start, size))

    def allocate_any(self, count: int, after: int) -> list[int] | None:
        if count > self.taken.count(0):
            return None
        blocks: list[int] = []
        # From `after` on while that is free, then the lowest free block; a found extent is used to its end.
        block = after if after < len(self.taken) and not self.taken[after] else self.taken.find(0)
        while len(blocks) < count:
            if block >= len(self.taken) or self.taken[block]:
                block = self.taken.find(0)
            self.taken[block] = 1
            blocks.append(block)
            block += 1
        return blocks

    def mark(self, run: Run, value: int = 1) -> Run:
        self.taken[run.start : run.end] = bytes([value]) * run.size
        return run

    def largest(self) -> int:
        return max(map(len, bytes(self.taken).split(b"\1")), default=0)


@pytest.mark.parametrize(("num_blocks", "operations"), [(1, 500), (7, 4_500), (64, 25_000), (97, 70_000)])
def test_f12_random_operations_agree_with_a_bitmap(num_blocks: int, operations: int) -> None:
    rng = random.Random(num_blocks)
    blocks, oracle = BlockAllocator(num_blocks), Bitmap(num_blocks)
    for number in range(operations):
        action = rng.random()
        size = rng.randint(1, max(1, num_blocks // rng.choice((1, 4, 12))))
        start = rng.randrange(num_blocks)
        if action < 0.35:
            want = oracle.allocate(size)
            if want is None:
                with pytest.raises(ArenaFullError):
                    blocks.allocate(size)
            else:
                assert blocks.allocate(size) == want
        elif action < 0.45:
            free = start + size <= num_blocks and not any(oracle.taken[start : start + size])
            assert blocks.take(Run(start, size)) == free
            if free:
                oracle.mark(Run(start, size))
        elif action < 0.55:
            # `after` follows a taken block, as a growing sequence's next block does, or is block 0.
            after = start + 1 if oracle.taken[start] else 0
            if after == 0 and oracle.taken[0]:
                after = num_blocks
            if size <= oracle.taken.count(0):
                assert blocks.allocate_any(size, after) == oracle.allocate_any(size, after)
            else:
                with pytest.raises(ArenaFullError):
                    blocks.allocate_any(size, after)
        else:
            run = Run(start, min(size, num_blocks - start))
            if all(oracle.taken[run.start : run.end]):
                blocks.free(run)
                oracle.mark(run, 0)
            else:
                with pytest.raises(ArenaError, match="double free"):
                    blocks.free(run)
        assert blocks.num_free == oracle.taken.count(0) and blocks.num_used + blocks.num_free == num_blocks
        assert blocks.largest_free_run == oracle.largest()
        if number % 200 == 0:
            blocks.check()
            assert blocks.block_map(num_blocks) == "".join(".X"[taken] for taken in oracle.taken)
    blocks.check()


@pytest.mark.parametrize("make", [BlockAllocator, BuddyAllocator])
@pytest.mark.parametrize("count", [0, -1, -1000])
def test_f13_counts_must_be_positive(make: type[Allocator], count: int) -> None:
    blocks = make(8)
    with pytest.raises(ArenaError, match=f"block count is {count}; must be at least 1"):
        blocks.allocate(count)
    with pytest.raises(ArenaError):
        blocks.free(Run(2, count))
    assert blocks.num_free == 8
    blocks.check()


def test_f13_counts_of_take_and_any_must_be_positive() -> None:
    blocks = BlockAllocator(8)
    for count in (0, -3):
        with pytest.raises(ArenaError, match=f"block count is {count}"):
            blocks.take(Run(0, count))
        with pytest.raises(ArenaError, match=f"block count is {count}"):
            blocks.allocate_any(count)
    for make in (BlockAllocator, BuddyAllocator):
        with pytest.raises(ArenaError, match="num_blocks is -1; must be at least 0"):
            make(-1)


@pytest.mark.parametrize("make", [BlockAllocator, BuddyAllocator])
@pytest.mark.parametrize(
    "run", [Run(0, 4), Run(2, 4), Run(4, 5), Run(-1, 2), Run(14, 3), Run(16, 1), Run(-4, 4), Run(100, 2)]
)
def test_f13_bad_frees_change_nothing_and_never_alias(make: type[Allocator], run: Run) -> None:
    blocks = make(16)
    first, second = blocks.allocate(4), blocks.allocate(4)
    assert (first, second) == (Run(0, 4), Run(4, 4))
    blocks.free(first)
    with pytest.raises(ArenaError):
        blocks.free(run)  # freed before, partly free, or outside
    assert blocks.num_free == 12
    blocks.check()
    taken = {*range(second.start, second.end)}
    while blocks.num_free:
        fresh = blocks.allocate(1)
        assert fresh.start not in taken
        taken.add(fresh.start)
    assert taken == set(range(16))


def test_f13_take_outside_is_refused() -> None:
    blocks = BlockAllocator(8)
    assert not blocks.take(Run(-1, 2)) and not blocks.take(Run(8, 1)) and not blocks.take(Run(6, 3))
    assert blocks.take(Run(6, 2)) and not blocks.take(Run(6, 1))
    blocks.check()


def test_an_empty_pool() -> None:
    for make in (BlockAllocator, BuddyAllocator):
        blocks = make(0)
        assert (blocks.num_free, blocks.num_used, blocks.largest_free_run) == (0, 0, 0)
        with pytest.raises(ArenaFullError):
            blocks.allocate(1)
        blocks.check()
    assert BlockAllocator(0).fragmentation() == 0.0 and BlockAllocator(0).block_map() == ""


class Counting(list[int]):
    """A list that counts how often its items are read or written."""

    touched = 0

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        self.touched += 1
        return super().__getitem__(key)

    def __setitem__(self, key, value):  # type: ignore[no-untyped-def]
        self.touched += 1
        super().__setitem__(key, value)


def touches_per_operation(num_blocks: int) -> float:
    """Tree nodes touched by an operation, on a pool that is a comb: every second block is taken."""
    blocks = BlockAllocator(num_blocks)
    blocks.allocate(num_blocks)
    for block in range(0, num_blocks, 2):
        blocks.free(Run(block, 1))
    tree = Counting(blocks._tree)
    blocks._tree = tree
    rng = random.Random(1)
    rounds = 300
    for _ in range(rounds):
        block = 2 * rng.randrange(1, num_blocks // 2 - 1)
        blocks.free(Run(block + 1, 1))
        assert blocks.take(Run(block + 1, 1))
        run = blocks.allocate(1)
        blocks.free(run)
        (one,) = blocks.allocate_any(1, after=block)
        blocks.free(Run(one, 1))
    touched = tree.touched
    blocks.check()
    return touched / (6 * rounds)


def test_f14_work_per_operation_grows_with_the_logarithm() -> None:
    """Counted, not timed: from 2,000 to 200,000 blocks an operation touches less than three times as many nodes."""
    small, middle, large = (touches_per_operation(n) for n in (2_000, 20_000, 200_000))
    assert 1 < small and middle < 3 * small and large < 3 * small
    assert large < 18 * 4  # a few per level of the tree


def test_f15_fragmentation() -> None:
    blocks = BlockAllocator(1000)
    assert blocks.fragmentation() == 0.0
    runs = [blocks.allocate(100) for _ in range(3)]
    assert blocks.fragmentation() == 0.0
    blocks.free(runs[1])
    assert blocks.fragmentation() == pytest.approx(1 - 700 / 800) == 0.125
    blocks.free(runs[0])
    assert blocks.fragmentation() == pytest.approx(1 - 700 / 900)
    blocks.free(runs[2])
    assert blocks.fragmentation() == 0.0
    blocks.allocate(1000)
    assert blocks.fragmentation() == 0.0  # nothing is free: nothing is scattered


def test_f15_block_map() -> None:
    blocks = BlockAllocator(130)
    blocks.allocate(66)
    blocks.free(Run(2, 3))
    assert blocks.block_map() == "XX...XX" + "X" * 57 + "\n" + "XX" + "." * 62 + "\n" + ".."
    assert BlockAllocator(5).block_map(2) == "..\n..\n."


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


def test_f16_every_single_block_can_be_had() -> None:
    blocks = BuddyAllocator(1024)
    assert {blocks.allocate(1).start for _ in range(1024)} == set(range(1024))
    with pytest.raises(ArenaFullError, match="no piece of 1 blocks for 1: 0 blocks are free"):
        blocks.allocate(1)
    for block in range(1024):
        blocks.free(Run(block, 1))
    assert blocks.largest_free_run == 1024
    assert blocks.allocate(1024) == Run(0, 1024)


def test_f16_a_pool_that_is_no_power_of_two_loses_nothing() -> None:
    blocks = BuddyAllocator(100)
    fresh = [set(pieces) for pieces in blocks._pieces]
    assert blocks.num_free == 100 and blocks.largest_free_run == 64
    runs = [blocks.allocate(size) for size in (33, 17, 5, 1, 9)]
    runs += [blocks.allocate(1) for _ in range(35)]
    assert blocks.num_used == 100 and blocks.num_free == 0
    assert {b for run in runs for b in range(run.start, run.end)} == set(range(100))
    for run in runs[::2] + runs[1::2]:
        blocks.free(run)
        blocks.check()
    assert blocks._pieces == fresh  # merged back into what it was


@pytest.mark.parametrize("num_blocks", [1, 37, 64, 100])
def test_f16_random_operations_keep_the_pieces_exact(num_blocks: int) -> None:
    rng = random.Random(num_blocks)
    blocks = BuddyAllocator(num_blocks)
    fresh = [set(pieces) for pieces in blocks._pieces]
    live: list[Run] = []
    for _ in range(3000):
        if rng.random() < 0.55:
            size = rng.randint(1, max(1, num_blocks // 4))
            fits = (1 << (size - 1).bit_length()) <= blocks.largest_free_run
            if fits:
                run = blocks.allocate(size)
                assert run.size == size and run.start % (1 << (size - 1).bit_length()) == 0
                live.append(run)
            else:
                with pytest.raises(ArenaFullError):
                    blocks.allocate(size)
        elif live:
            blocks.free(live.pop(rng.randrange(len(live))))
        owned = [b for run in live for b in range(run.start, run.end)]
        assert len(set(owned)) == len(owned) == blocks.num_used
        blocks.check()
    for run in live:
        blocks.free(run)
    assert blocks._pieces == fresh


def test_check_finds_broken_bookkeeping() -> None:
    def broken(damage: str) -> BlockAllocator:
        blocks = BlockAllocator(16)
        blocks.allocate(4)
        blocks.free(Run(1, 1))
        blocks.check()
        if damage == "count":
            blocks.num_free += 1
        elif damage == "taken":
            blocks._taken[1], blocks._taken[2] = 1, 0
        elif damage == "leaf":
            blocks._tree[blocks._leaves + 1] = 2
        else:
            blocks._tree[1] = 3
        return blocks

    for damage, words in (("count", "free count"), ("taken", "extents"), ("leaf", "leaves"), ("node", "inner node")):
        with pytest.raises(ArenaError, match=words):
            broken(damage).check()
    buddies = BuddyAllocator(16)
    buddies.allocate(3)
    buddies._pieces[0].clear()
    with pytest.raises(ArenaError, match="do not match"):
        buddies.check()
