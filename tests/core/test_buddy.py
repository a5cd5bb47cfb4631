"""Buddies: any pool size, no rounding, merged as far as possible (F16)."""

from __future__ import annotations

import random

import pytest

from cortexstream.errors import ArenaFullError
from cortexstream.kv import BuddyAllocator, Run
from tests.core.bitmap import BuddyBitmap, refused, state


def pieces(blocks: BuddyAllocator) -> list[Run]:
    """The free pieces, lowest first: tree nodes whose blocks are all free, under a node where they are not."""
    found, leaves = [], blocks._leaves
    for node in range(1, 2 * leaves):
        order = leaves.bit_length() - node.bit_length()
        if blocks._tree[node] == 1 << order and (node == 1 or blocks._tree[node // 2] != 2 << order):
            found.append(Run((node << order) - leaves, 1 << order))
    return sorted(found)


def test_f16_every_single_block_can_be_had() -> None:
    blocks = BuddyAllocator(1024)
    assert [blocks.allocate(1).start for _ in range(1024)] == [*range(1024)]
    message = "no 1 adjacent blocks: 0 of 1024 are free, the largest aligned piece has 0"
    refused(blocks, lambda: blocks.allocate(1), message, ArenaFullError)
    order = [*range(1024)]
    random.Random(16).shuffle(order)
    for block in order:
        blocks.free(Run(block, 1))
    assert pieces(blocks) == [Run(0, 1024)] and blocks.largest_free_run == 1024
    assert blocks.fragmentation() == 0.0
    assert blocks.allocate(1024) == Run(0, 1024)


def test_f16_a_pool_that_is_no_power_of_two_loses_nothing() -> None:
    blocks = BuddyAllocator(100)
    fresh = state(blocks)
    assert pieces(blocks) == [Run(0, 64), Run(64, 32), Run(96, 4)]
    assert blocks.num_free == 100 and blocks.largest_free_run == 64
    runs = [blocks.allocate(size) for size in (33, 17, 5, 1, 9)]
    runs += [blocks.allocate(1) for _ in range(35)]
    assert blocks.num_used == 100 and blocks.num_free == 0
    assert sorted(b for run in runs for b in range(run.start, run.end)) == [*range(100)]
    for run in runs[::2] + runs[1::2]:
        blocks.free(run)
        blocks.check()
    assert state(blocks) == fresh


@pytest.mark.parametrize("num_blocks", [*range(20), 100, 1000, 1023, 1025])
def test_f16_full_free_leaves_the_fewest_aligned_pieces(num_blocks: int) -> None:
    blocks = BuddyAllocator(num_blocks)
    fresh = state(blocks)
    bits = [1 << k for k in reversed(range(11)) if num_blocks >> k & 1]
    assert [piece.size for piece in pieces(blocks)] == bits
    assert blocks.largest_free_run == (bits[0] if bits else 0)
    taken = [blocks.allocate(1) for _ in range(num_blocks)]
    random.Random(num_blocks).shuffle(taken)
    for run in taken:
        blocks.free(run)
    assert state(blocks) == fresh


def test_f16_the_rest_of_a_piece_is_free_at_once() -> None:
    blocks = BuddyAllocator(64)
    assert blocks.allocate(33) == Run(0, 33)  # a textbook buddy allocator would take all 64
    assert blocks.num_used == 33
    assert pieces(blocks) == [Run(33, 1), Run(34, 2), Run(36, 4), Run(40, 8), Run(48, 16)]
    blocks.free(Run(10, 3))  # any portion of a run can be given back
    assert pieces(blocks)[:2] == [Run(10, 2), Run(12, 1)]
    blocks.check()


def test_f16_the_lowest_of_the_smallest_fitting_pieces_is_used() -> None:
    blocks = BuddyAllocator(64)
    assert blocks.take(Run(0, 64))
    for run in (Run(48, 4), Run(32, 8), Run(0, 16), Run(24, 4)):
        blocks.free(run)
    assert blocks.allocate(3) == Run(24, 3)  # 4 blocks at 24 and 48 fit best
    assert blocks.allocate(4) == Run(48, 4)
    assert blocks.allocate(1) == Run(27, 1)  # what the 3 left over
    assert blocks.allocate(3) == Run(32, 3)
    assert blocks.allocate(5) == Run(0, 5)
    assert blocks.allocate(8) == Run(8, 8)
    blocks.check()


def test_f16_alignment_is_the_price() -> None:
    blocks = BuddyAllocator(100)
    message = "no 65 adjacent blocks: 100 of 100 are free, the largest aligned piece has 64"
    refused(blocks, lambda: blocks.allocate(65), message, ArenaFullError)
    assert blocks.free_after(0) == 100 and blocks.free_after(37) == 63
    assert blocks.fragmentation() == 1 - 64 / 100
    for size in range(1, 65):
        run = blocks.allocate(size)
        assert run.size == size and run.start % (1 << (size - 1).bit_length()) == 0
        blocks.free(run)


def test_f16_take_and_free_cross_pieces() -> None:
    blocks = BuddyAllocator(100)
    fresh = state(blocks)
    assert blocks.take(Run(3, 95))  # out of three pieces
    assert pieces(blocks) == [Run(0, 2), Run(2, 1), Run(98, 2)]
    assert not blocks.take(Run(2, 2)) and not blocks.take(Run(97, 1)) and not blocks.take(Run(98, 3))
    blocks.check()
    blocks.free(Run(3, 95))
    assert state(blocks) == fresh
    first, second = blocks.allocate(32), blocks.allocate(64)
    assert (first, second) == (Run(64, 32), Run(0, 64))
    blocks.free(Run(0, 96))  # two runs at once
    assert state(blocks) == fresh
    assert blocks.take(Run(0, 100)) and blocks.num_free == 0
    blocks.free(Run(0, 100))
    assert state(blocks) == fresh


@pytest.mark.parametrize("num_blocks", [7, 8, 11])
def test_f16_pieces_depend_on_the_taken_blocks_alone(num_blocks: int) -> None:
    """Every subset of a small pool, however it came about, gives the same pieces and the same next run."""
    for subset in range(1 << num_blocks):
        oracle = BuddyBitmap(num_blocks)
        oracle.mark([b for b in range(num_blocks) if subset >> b & 1], 1)
        taking, freeing = BuddyAllocator(num_blocks), BuddyAllocator(num_blocks)
        assert freeing.take(Run(0, num_blocks))
        for block in range(num_blocks):
            if oracle.taken[block]:
                assert taking.take(Run(block, 1))
            else:
                freeing.free(Run(block, 1))
        assert state(taking) == state(freeing)
        assert pieces(taking) == oracle.holes()
        for size in range(1, num_blocks + 1):
            want = oracle.place(size)
            assert (want is not None) == (size <= taking.largest_free_run)
            if want is not None:
                assert taking.allocate(size) == want
                taking.free(want)
