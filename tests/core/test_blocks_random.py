"""Both allocators against a bitmap: long random runs from fixed seeds, and hypothesis' search for short ones."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cortexstream.kv import BlockAllocator, BuddyAllocator, Run
from tests.core.bitmap import Make, Pair

POOLS = [(1, 1_000), (7, 9_000), (64, 30_000), (97, 60_000)]
"""(blocks, operations): 100,000 operations an allocator."""


def act(pair: Pair, rng: random.Random) -> None:
    """One random operation; about one in ten is wrong use or more than there is."""
    n = pair.num_blocks
    size = rng.randint(1, max(1, n // rng.choice((1, 4, 12))))
    start = rng.randrange(n)
    action = rng.random()
    if action < 0.30:
        pair.allocate(min(size, pair.largest) or 1)
    elif action < 0.40:
        pair.take(Run(start, size))
    elif action < 0.50:
        pair.allocate_any(min(size, pair.num_free) or 1, rng.randint(-1, n))
    elif action < 0.92:
        run = Run(start, min(size, n - start))
        taken = pair.oracle.taken
        while not taken[run.start] and run.size > 1:  # most frees are right: skip what is free in front
            run = Run(run.start + 1, run.size - 1)
        free = taken.find(0, run.start, run.end)
        pair.free(run if free <= run.start else Run(run.start, free - run.start))
    else:
        wrong_use(pair, rng, start, size)


def wrong_use(pair: Pair, rng: random.Random, start: int, size: int) -> None:
    n = pair.num_blocks
    method = rng.randrange(8)
    if method == 0:
        pair.allocate(pair.largest + 1)
    elif method == 1:
        pair.allocate_any(pair.num_free + 1, start)
    elif method == 2:
        partly_free = Run(start, min(size, n - start))
        pair.free(rng.choice([Run(-1, size), Run(n, size), Run(n - size + 1, size), partly_free]))
    elif method == 3:
        pair.take(rng.choice([Run(-1, size), Run(n, size), Run(n - size + 1, size)]))
    elif method == 4:
        pair.allocate(-rng.randrange(3))
    elif method == 5:
        pair.allocate_any(-rng.randrange(3), start)
    elif method == 6:
        pair.take(Run(start, -rng.randrange(3)))
    else:
        pair.free(Run(start, -rng.randrange(3)))


def drive(make: Make, num_blocks: int, operations: int) -> None:
    rng, pair = random.Random(num_blocks), Pair(make, num_blocks)
    for number in range(operations):
        act(pair, rng)
        pair.agree(rng.randint(-1, num_blocks))
        if number % 100 == 0:
            pair.check()
    pair.check()


@pytest.mark.parametrize(("num_blocks", "operations"), POOLS)
def test_f12_random_operations_agree_with_a_bitmap(num_blocks: int, operations: int) -> None:
    drive(BlockAllocator, num_blocks, operations)


@pytest.mark.parametrize(("num_blocks", "operations"), POOLS)
def test_f16_random_operations_agree_with_a_bitmap(num_blocks: int, operations: int) -> None:
    drive(BuddyAllocator, num_blocks, operations)


COUNTS = st.integers(-1, 12)
PLACES = st.integers(-2, 26)


class Machine(RuleBasedStateMachine):
    """Any operation at any time with any argument: the oracle knows whether it must succeed."""

    make: Make
    steps = 0  # of all histories

    @initialize(num_blocks=st.integers(0, 24))
    def start(self, num_blocks: int) -> None:
        self.pair = Pair(type(self).make, num_blocks)

    @rule(size=COUNTS)
    def allocate(self, size: int) -> None:
        self.pair.allocate(size)

    @rule(count=COUNTS, after=PLACES)
    def allocate_any(self, count: int, after: int) -> None:
        self.pair.allocate_any(count, after)

    @rule(start=PLACES, size=COUNTS)
    def take(self, start: int, size: int) -> None:
        self.pair.take(Run(start, size))

    @rule(start=PLACES, size=COUNTS)
    def free(self, start: int, size: int) -> None:
        self.pair.free(Run(start, size))

    @rule(start=PLACES)
    def free_to_the_next_hole(self, start: int) -> None:
        used = self.pair.oracle.taken[max(start, 0) :].partition(b"\0")[0]
        self.pair.free(Run(start, len(used)))

    @invariant()
    def agree(self) -> None:
        for block in range(-1, self.pair.num_blocks + 1):
            self.pair.agree(block)
        self.pair.check()
        type(self).steps += 1


class FirstFitMachine(Machine):
    make = BlockAllocator


class BuddyMachine(Machine):
    make = BuddyAllocator


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


def test_f12_any_short_history_agrees_with_a_bitmap() -> None:
    run_state_machine_as_test(FirstFitMachine, settings=SETTINGS)


def test_f16_any_short_history_agrees_with_a_bitmap() -> None:
    run_state_machine_as_test(BuddyMachine, settings=SETTINGS)


@pytest.mark.full_grid
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [FirstFitMachine, BuddyMachine])
def test_f12_f16_100_000_steps_of_hypothesis(machine: type[Machine]) -> None:
    """For as long as it takes: a minute each."""
    kind: Any = type("Long", (machine,), {"steps": 0})
    run_state_machine_as_test(kind, settings=settings(SETTINGS, max_examples=2900))
    assert kind.steps >= 100_000
