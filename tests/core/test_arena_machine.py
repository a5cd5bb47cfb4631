"""Any history of the arena: contents, admission, sharing and refusals are what the oracles say (F17, F20, F83, F90)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv import KVArena, KVHandle, Ring
from tests.core.arena_oracle import ArenaOracle
from tests.core.contents import Policy, World
from tests.core.ownership import Books, drive
from tests.core.support import PLACEMENTS, Placement

PICK = st.integers(0, 1 << 16)
COUNT = st.integers(1, 30)
POLICIES: tuple[Policy, ...] = ("first_fit", "buddy")
ALPHABET = 3  # few different tokens, so that beginnings coincide


def state(arena: KVArena) -> object:
    """All that a refused call must leave as it was."""
    owners = [(h, h.rows, h.position, h.capacity_tokens, h.shares, h.published_tokens) for h, _ in arena.owners()]
    holders = [(h, h.blocks, h.position) for h in arena._cache.holders()]
    return arena.stats(), owners, holders, arena.block_map(), arena.changes, tuple(arena._ledger._ops)


def refused(arena: KVArena, error: type[ArenaError], call: Callable[[], object]) -> None:
    """The call raises and changes nothing."""
    before = state(arena)
    with pytest.raises(ArenaError) as caught:
        call()
    assert type(caught.value) is error
    assert state(arena) == before


class History:
    """An arena between its two oracles. Every method is one call with any arguments, right or wrong."""

    def __init__(
        self, num_blocks: int, block_tokens: int, placement: Placement, growth: float, policy: Policy,
        rings: list[Ring], prefix_caching: bool, headroom_tokens: int,
    ) -> None:  # fmt: skip
        self.world = World(
            num_blocks, block_tokens, placement, growth, policy=policy, rings=rings, prefix_caching=prefix_caching,
            headroom_tokens=headroom_tokens,
        )  # fmt: skip
        self.arena = self.world.arena
        self.oracle = ArenaOracle(self.arena, growth)
        self.texts: list[list[int]] = [[0]]  # all that was ever written, to begin like it
        self.fresh = 0

    def pick(self, number: int) -> KVHandle | None:
        handles = [*self.world.texts]
        return handles[number % len(handles)] if handles else None

    def prompt(self, like: int, keep: int, more: int) -> list[int]:
        """`keep` tokens of an earlier text, and then others, of which some repeat."""
        rng = random.Random(f"{like} {keep} {more}")
        return self.texts[like % len(self.texts)][:keep] + [rng.randrange(ALPHABET) for _ in range(more)]

    def admit(self, tokens: list[int], room: int, more: int | None, reuse: int, spare: int) -> None:
        num_tokens = len(tokens) + room
        limit = None if more is None else num_tokens + more
        reusable = tuple(tokens[: max(0, len(tokens) - reuse)])
        assert self.arena.can_admit(num_tokens, limit, reusable) == self.oracle.can_admit(num_tokens, limit, reusable)
        if not self.oracle.can_admit(num_tokens, limit, reusable, spare):
            refused(self.arena, ArenaFullError, lambda: self.arena.admit(num_tokens, limit, reusable, spare))
            return
        low, high = self.oracle.found(reusable)
        before = self.arena.stats()
        handle = self.world.admit(tokens, room, limit, len(reusable), spare)
        assert low <= handle.position <= high
        assert self.arena.stats().reused_tokens == before.reused_tokens + handle.position
        assert handle.limit_blocks == (self.arena.num_blocks if limit is None else -(-limit // self.arena.block_tokens))
        self.oracle.admitted(handle, reusable)

    def write(self, number: int, num_tokens: int, publish: bool) -> None:
        handle = self.pick(number)
        if handle is None:
            return
        if handle.shares or num_tokens > handle.remaining:
            refused(self.arena, ArenaError, lambda: handle.advance(num_tokens))
            return
        rng = random.Random(f"{number} {num_tokens}")
        self.world.write(handle, [rng.randrange(ALPHABET) for _ in range(num_tokens)], publish)
        tokens = self.world.texts[handle].tokens
        self.texts.append([*tokens])
        if publish:
            self.oracle.published(handle, tuple(tokens))

    def publish(self, number: int, keep: int) -> None:
        handle = self.pick(number)
        if handle is not None:
            tokens = tuple(self.world.texts[handle].tokens[:keep])
            self.world.flush()
            self.arena.publish(handle, tokens)
            self.oracle.published(handle, tokens)

    def grow(self, number: int, more: int) -> None:
        handle = self.pick(number)
        if handle is None:
            return
        num_tokens = max(1, handle.position + more)
        if self.oracle.can_grow(handle, num_tokens):
            before = handle.blocks
            self.arena.grow(handle, num_tokens)
            assert handle.capacity_tokens >= num_tokens and len(handle.blocks) <= handle.limit_blocks
            self.oracle.grown(handle, before, num_tokens)
        else:
            refused(self.arena, ArenaFullError, lambda: self.arena.grow(handle, num_tokens))

    def fork(self, number: int) -> None:
        handle = self.pick(number)
        if handle is None:
            return
        if self.oracle.can_fork(handle):
            self.oracle.forked(self.world.fork(handle), handle)
        else:
            refused(self.arena, ArenaFullError, lambda: self.arena.fork(handle))

    def release(self, number: int, keep: int | None) -> None:
        handle = self.pick(number)
        if handle is not None:
            tokens = tuple(self.world.texts[handle].tokens[:keep])
            kept = self.oracle.releasing(handle, tokens)
            self.world.release(handle, len(tokens))
            self.oracle.released(kept, tokens)

    def swap_out(self, number: int) -> None:
        handle = self.pick(number)
        if handle is None:
            return
        if not handle.position:
            refused(self.arena, ArenaError, lambda: self.arena.swap_out(handle, 10**9))
            return
        self.oracle.releasing(handle, ())
        self.world.swap_out(handle)
        self.oracle.released(False, ())

    def swap_in(self, number: int) -> None:
        if self.world.swapped:
            key = [*self.world.swapped][number % len(self.world.swapped)]
            num_tokens = len(self.world.swapped[key][0].tokens) + 1
            if self.oracle.can_admit(num_tokens, None, ()):
                self.oracle.admitted(self.world.swap_in(key), ())
            else:
                refused(self.arena, ArenaFullError, lambda: self.arena.admit(num_tokens))

    def reset(self, number: int) -> None:
        handle = self.pick(number)
        if handle is None:
            return
        if handle.published_tokens or handle.shared_tokens:
            refused(self.arena, ArenaError, handle.reset)
        else:
            self.world.reset(handle)

    def clear(self) -> None:
        self.arena.clear()
        self.oracle.cleared()

    def wrong_use(self, kind: int, number: int) -> None:
        arena, handle = self.arena, self.pick(number)
        dead = KVArena(1, 1).admit(1)
        if kind % 2:
            dead.live = False
        arguments: list[Callable[[], object]] = [
            lambda: arena.admit(-number), lambda: arena.admit(5, 4), lambda: arena.admit(2, None, (1, 2, 3)),
            lambda: arena.admit(1, None, (), -1 - number),
            lambda: arena.release(dead), lambda: arena.grow(dead, 1), lambda: arena.publish(dead, ()),
            lambda: arena.fork(dead), lambda: arena.swap_out(dead, 1), lambda: arena.swap_in(dead, 1, 1),
        ]  # fmt: skip
        if handle is not None:
            some, many = handle, (0,) * (handle.position + 1)
            arguments += [
                lambda: some.advance(-number), lambda: some.advance(some.remaining + 1),
                lambda: arena.publish(some, many), lambda: arena.release(some, many),
                lambda: arena.swap_in(some, 10**9, some.remaining + 1), lambda: arena.grow(some, -number),
            ]  # fmt: skip
        refused(arena, ArenaError, arguments[kind % len(arguments)])

    def agree(self) -> None:
        self.arena.check()
        self.oracle.settle()

    def end(self) -> None:
        self.world.end()


class Machine(RuleBasedStateMachine):
    """Histories as hypothesis finds them, and shortens them when one fails."""

    placement: Placement
    policies: tuple[Policy, ...] = POLICIES
    steps = 0  # of all histories

    @initialize(
        num_blocks=st.integers(1, 24), block_tokens=st.sampled_from([1, 2, 3, 4]), data=st.data(),
        growth=st.sampled_from([1.0, 1.25, 2.0]), number=PICK,
        windows=st.lists(st.integers(1, 9), max_size=2), caching=st.sampled_from([True, True, False]),
        headroom=st.sampled_from([0, 0, 10]),
    )  # fmt: skip
    def start(
        self, num_blocks: int, block_tokens: int, data: st.DataObject, growth: float, number: int,
        windows: list[int], caching: bool, headroom: int,
    ) -> None:  # fmt: skip
        rings = [Ring(window, data.draw(st.integers(1, 2 * num_blocks))) for window in windows]
        policy = type(self).policies[number % len(type(self).policies)]
        self.it = History(num_blocks, block_tokens, type(self).placement, growth, policy, rings, caching, headroom)

    @rule(like=PICK, keep=st.integers(0, 30), more=st.integers(1, 9), room=st.integers(0, 9),
          limit=st.none() | st.integers(0, 20), reuse=st.integers(0, 2), spare=st.sampled_from([0, 0, 5]))  # fmt: skip
    def admit(self, like: int, keep: int, more: int, room: int, limit: int | None, reuse: int, spare: int) -> None:
        self.it.admit(self.it.prompt(like, keep, more), room, limit, reuse, spare)

    @rule(number=PICK, num_tokens=st.integers(1, 9), publish=st.booleans())
    def write(self, number: int, num_tokens: int, publish: bool) -> None:
        self.it.write(number, num_tokens, publish)

    @rule(number=PICK, keep=st.integers(0, 30))
    def publish(self, number: int, keep: int) -> None:
        self.it.publish(number, keep)

    @rule(number=PICK, more=st.integers(-3, 12))
    def grow(self, number: int, more: int) -> None:
        self.it.grow(number, more)

    @rule(number=PICK)
    def fork(self, number: int) -> None:
        self.it.fork(number)

    @rule(number=PICK, keep=st.none() | st.integers(0, 30))
    def release(self, number: int, keep: int | None) -> None:
        self.it.release(number, keep)

    @rule(number=PICK)
    def swap_out(self, number: int) -> None:
        self.it.swap_out(number)

    @rule(number=PICK)
    def swap_in(self, number: int) -> None:
        self.it.swap_in(number)

    @rule(number=PICK)
    def reset(self, number: int) -> None:
        self.it.reset(number)

    @rule(really=st.sampled_from([True, False, False, False]))
    def clear(self, really: bool) -> None:
        if really:
            self.it.clear()

    @rule(kind=PICK, number=PICK)
    def wrong_use(self, kind: int, number: int) -> None:
        self.it.wrong_use(kind, number)

    @rule()
    def step(self) -> None:
        self.it.world.flush()

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "it"):
            self.it.agree()
            type(self).steps += 1

    def teardown(self) -> None:
        if hasattr(self, "it"):
            self.it.end()


class RunMachine(Machine):
    placement = "run"


class PagedMachine(Machine):
    placement = "paged"


SETTINGS = settings(max_examples=150, stateful_step_count=50, deadline=None, derandomize=True)


@pytest.mark.parametrize("machine", [RunMachine, PagedMachine])
def test_f83_f90_any_short_history_agrees_with_the_oracles(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.full_grid
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("machine", [RunMachine, PagedMachine])
def test_f17_f20_f90_100_000_steps_of_hypothesis(machine: type[Machine], policy: Policy) -> None:
    """The same for each policy, for as long as it takes: a minute each."""
    kind: Any = type("Long", (machine,), {"policies": (policy,), "steps": 0})
    run_state_machine_as_test(kind, settings=settings(SETTINGS, max_examples=2500))
    assert kind.steps >= 100_000


def random_history(seed: int, placement: Placement) -> History:
    """250 calls of all kinds on an arena of any shape, small or large."""
    rng = random.Random(f"{seed} {placement}")
    num_blocks = rng.choice((rng.randint(1, 12), rng.randint(20, 100)))
    rings = [Ring(rng.randint(1, 9), rng.randint(1, 2 * num_blocks)) for _ in range(rng.choice((0, 0, 1, 2)))]
    it = History(
        num_blocks, rng.choice((1, 2, 3, 4)), placement, rng.choice((1.0, 1.25, 2.0)),
        rng.choice(POLICIES), rings, rng.random() < 0.85, rng.choice((0, 0, 5, 30)),
    )  # fmt: skip

    def admit() -> None:
        tokens = it.prompt(rng.getrandbits(16), rng.randint(0, 30), rng.randint(1, 9))
        spare = rng.choice((0, 0, 0, rng.randint(1, 9)))
        it.admit(tokens, rng.choice((0, 0, 3, 9)), rng.choice((None, 0, 5, 20)), rng.choice((0, 1, 1, 2)), spare)

    calls: dict[Callable[[], None], int] = {
        admit: 22,
        lambda: it.write(rng.getrandbits(16), rng.randint(1, 9), rng.random() < 0.5): 23,
        lambda: it.publish(rng.getrandbits(16), rng.randint(0, 30)): 5,
        lambda: it.grow(rng.getrandbits(16), rng.randint(-3, 12)): 16,
        lambda: it.fork(rng.getrandbits(16)): 6,
        lambda: it.release(rng.getrandbits(16), rng.choice((None, None, None, 0, 5, 17))): 14,
        lambda: it.swap_out(rng.getrandbits(16)): 2,
        lambda: it.swap_in(rng.getrandbits(16)): 3,
        lambda: it.reset(rng.getrandbits(16)): 1,
        lambda: it.clear() if rng.random() < 0.5 else None: 1,
        lambda: it.wrong_use(rng.getrandbits(16), rng.getrandbits(16)): 3,
        lambda: it.agree(): 4,
    }
    for call in rng.choices([*calls], [*calls.values()], k=250):
        call()
        it.agree()
    return it


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f83_f90_long_histories_agree_with_the_oracles(placement: Placement) -> None:
    reused = copied = moved = 0
    for seed in range(40):
        it = random_history(seed, placement)
        stats = it.arena.stats()
        reused, copied = reused + stats.reused_tokens, copied + stats.copied_tokens
        moved += stats.compactions * stats.relocations
        it.end()
    assert reused and copied and bool(moved) == (placement == "run")  # the paths were taken


@pytest.mark.parametrize("near", [1, 2, 3])
def test_f17_compaction_that_looks_at_few_runs_is_as_right(near: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In large arenas it sees a part of the runs; here of one, two or three on each side, or more where it must."""
    monkeypatch.setattr("cortexstream.kv.run_pool.NEAR", near)
    compactions = 0
    for seed in range(40):
        it = random_history(seed, "run")
        compactions += it.arena.stats().compactions
        it.end()
    assert compactions > 100


def test_f17_an_arena_of_more_runs_than_compaction_looks_at() -> None:
    """3,000 runs of two blocks, every other one freed: then runs of seven, which fit no hole."""
    arena = KVArena(6000, 1, "run", 1.0)
    handles = [arena.admit(2, 9) for _ in range(3000)]
    for handle in handles[::2]:
        arena.release(handle)
    for handle in handles[1::60]:
        handle.advance(2)
        arena.grow(handle, 9)
    larger = [arena.admit(7) for _ in range(300)]
    assert arena.stats().compactions > 100
    arena.check()
    blocks = [block for _, owned in arena.owners() for block in owned]
    assert len(set(blocks)) == len(blocks) and all(len(handle.blocks) == 7 for handle in larger)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f17_f20_f90_100_000_operations_agree_with_a_bitmap(placement: Placement, policy: Policy) -> None:
    """Ownership alone, in an arena of 96 blocks: with prefix reuse, with rings, and with neither."""
    parts: list[tuple[int, list[Ring], bool, int]] = [
        (30_000, [], True, 0), (20_000, [], True, 16), (20_000, [Ring(9, 40)], True, 0),
        (20_000, [Ring(5, 30), Ring(16, 64)], True, 9), (10_000, [], False, 0),
    ]  # fmt: skip
    for seed, (operations, rings, caching, headroom) in enumerate(parts):
        books = Books(96, placement, policy, rings, caching, headroom)
        drive(books, random.Random(seed), operations)
        stats = books.arena.stats()
        assert books.refusals > operations // 20 and stats.copied_tokens
        assert bool(stats.reused_tokens) == books.arena.prefix_caching
        assert bool(stats.relocations and stats.compactions) == (placement == "run")
