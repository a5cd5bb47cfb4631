"""Wrong use of arenas and handles changes nothing and says why; readers get along with writers (F13, F15, F28, F29)."""

from __future__ import annotations

import math
import random
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cortexstream.errors import ArenaError, ArenaFullError
from cortexstream.kv import KVArena, KVHandle, Ring
from cortexstream.plan import SwapOut
from tests.core.contents import Text, World
from tests.core.support import PLACEMENTS, Placement
from tests.core.test_arena_machine import state
from tests.core.test_prefix import text


def refused(arena: KVArena, call: Callable[[], object], message: str, error: type[ArenaError] = ArenaError) -> None:
    """The call raises exactly this, and changes nothing."""
    before = state(arena)
    with pytest.raises(ArenaError, match=f"^{re.escape(message)}") as caught:
        call()
    assert type(caught.value) is error and state(arena) == before
    arena.check()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f13_dead_and_foreign_handles_are_refused_everywhere(placement: Placement) -> None:
    world, other = World(16, 4, placement), World(16, 4, placement)
    arena = world.arena
    dead, foreign = world.begin(text(0, 5)), other.begin(text(0, 5))
    world.release(dead)
    heir = world.begin(text(100, 5))
    calls: list[Callable[[KVHandle], object]] = [
        arena.release, arena.fork, lambda h: arena.grow(h, 5), lambda h: arena.publish(h, (0,)),
        lambda h: arena.release(h, (0,)), lambda h: arena.swap_out(h, 1), lambda h: arena.swap_in(h, 1, 5),
    ]  # fmt: skip
    for call in calls:
        refused(arena, lambda call=call: call(dead), "stale handle: the sequence was released already")  # type: ignore[misc]
        refused(arena, lambda call=call: call(foreign), "foreign handle: it belongs to another arena")  # type: ignore[misc]
    with pytest.raises(ArenaError, match="stale handle"):
        dead.advance()
    assert heir.position == 5 and foreign.live
    world.end()
    other.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f13_counts_that_make_no_sense_are_refused(placement: Placement) -> None:
    world = World(16, 4, placement)
    arena, handle = world.arena, world.begin(text(0, 5))
    for call in (arena.admit, arena.can_admit):
        for count in (0, -3):
            refused(arena, lambda: call(count), f"num_tokens is {count}; must be at least 1")  # noqa: B023
        refused(arena, lambda: call(5, 4), "limit_tokens is 4; must be at least num_tokens, 5")  # noqa: B023
        refused(arena, lambda: call(2, None, (1, 2, 3)), "3 tokens may be reused of a sequence of num_tokens, 2")  # noqa: B023
    for count in (0, -3):
        refused(arena, lambda: arena.grow(handle, count), f"num_tokens is {count}; must be at least 1")  # noqa: B023
        refused(arena, lambda: handle.advance(count), "num_tokens must be positive")  # noqa: B023
        refused(arena, lambda: arena.block_map(count), f"width is {count}; must be at least 1")  # noqa: B023
        refused(arena, lambda: arena.need_blocks(count), f"num_tokens is {count}; must be at least 1")  # noqa: B023
    refused(arena, lambda: arena.need_blocks(5, 4), "limit_tokens is 4; must be at least num_tokens, 5")
    refused(arena, lambda: arena.admit(5, None, (), -1), "spare_blocks is -1; must be at least 0")
    bad: Any
    for bad in (1.5, 0.5, True, "2", math.nan, None):
        calls: dict[str, list[Callable[[], object]]] = {
            "num_tokens": [
                lambda: arena.admit(bad), lambda: arena.can_admit(bad), lambda: arena.need_blocks(bad),  # noqa: B023
                lambda: arena.grow(handle, bad), lambda: handle.advance(bad),  # noqa: B023
            ],
            "spare_blocks": [lambda: arena.admit(5, None, (), bad)],  # noqa: B023
            "key": [lambda: arena.swap_out(handle, bad), lambda: arena.swap_drop(bad)],  # noqa: B023
            "position": [lambda: handle.locate(bad)], "width": [lambda: arena.block_map(bad)],  # noqa: B023
        }  # fmt: skip
        for name, each in calls.items():
            for refusal in each:
                refused(arena, refusal, f"{name} is {bad!r}; must be a whole number")
    refused(arena, lambda: arena.swap_in(handle, [1], 5), "key is [1]; must be a whole number")  # type: ignore[arg-type]
    for growth in (0.99, -1.0, math.nan, math.inf):
        with pytest.raises(ArenaError, match=f"growth is {growth}; must be at least 1, and finite"):
            KVArena(4, 4, placement, growth)
    with pytest.raises(ArenaError, match=r"placement 'run' with policy 'best': use run or paged, first_fit or buddy"):
        KVArena(4, 4, policy="best")  # type: ignore[arg-type]
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": -1}, "num_blocks is -1; must be at least 0"),
        ({"num_blocks": 4.0}, "num_blocks is 4.0; must be a whole number"),
        ({"num_blocks": 2**31}, "num_blocks is 2147483648; more than 2147483647 cannot be managed"),
        ({"num_blocks": 10**13}, "num_blocks is 10000000000000; more than 2147483647 cannot be managed"),
        ({"num_blocks": 10**5000}, "num_blocks is a whole number of 16610 bits; more than 2147483647 cannot be"),
        ({"block_tokens": True}, "block_tokens is True; must be a whole number"),
        ({"headroom_tokens": 1.5}, "headroom_tokens is 1.5; must be a whole number"),
        ({"headroom_tokens": True}, "headroom_tokens is True; must be a whole number"),
        ({"headroom_tokens": -1}, "headroom_tokens is -1; must be at least 0"),
        ({"growth": "x"}, "growth is 'x'; must be at least 1, and finite"),
        ({"growth": True}, "growth is True; must be at least 1, and finite"),
        ({"policy": ["a"]}, "placement '{placement}' with policy ['a']: use run or paged, first_fit or buddy"),
        ({"placement": {}}, "placement {{}} with policy 'first_fit': use run or paged, first_fit or buddy"),
        ({"prefix_caching": "no"}, "prefix_caching is 'no'; must be True or False"),
        ({"rings": 5}, "rings is 5; must be a list or tuple of Ring(window, num_blocks)"),
        ({"rings": [(4, 4)]}, "rings is [(4, 4)]; must be a list or tuple of Ring(window, num_blocks)"),
        ({"rings": [Ring(4, 4), Ring(math.nan, 4)]}, "a ring's window is nan; must be a whole number"),  # type: ignore[arg-type]
        ({"rings": [Ring(2.5, 4)]}, "a ring's window is 2.5; must be a whole number"),  # type: ignore[arg-type]
        ({"rings": [Ring(4, 2.5)]}, "a ring's num_blocks is 2.5; must be a whole number"),  # type: ignore[arg-type]
        ({"rings": [Ring(4, -1)]}, "a ring's num_blocks is -1; must be at least 0"),
        ({"rings": [Ring(4, 2**31)]}, "a ring's num_blocks is 2147483648; more than 2147483647 cannot be managed"),
    ],
)
def test_f13_arenas_that_cannot_be_are_refused(placement: Placement, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArenaError, match=f"^{re.escape(message.format(placement=placement))}") as caught:
        KVArena(**{"num_blocks": 8, "block_tokens": 4, "placement": placement, **options})
    assert len(str(caught.value)) < 150


BAD_TOKENS: list[tuple[Any, str]] = [
    (np.arange(5), "tokens is of type ndarray; must be a list or tuple of ints"),
    ("abcde", "tokens is of type str; must be"), (range(5), "tokens is of type range; must be"),
    ({0, 1}, "tokens is of type set; must be"), (None, "tokens is of type NoneType; must be"),
    ([[1]] * 5, "token 0 is of type list; must be an int"), ([0, 1, 2, [1], 4], "token 3 is of type list; must be"),
    ((0, 1, 2, 3, 4.0), "token 4 is of type float; must be"), ([0, True, 2], "token 1 is of type bool; must be"),
    ([*np.arange(5)], "token 0 is of type int64; must be"), ([0, 1, None], "token 2 is of type NoneType; must be"),
]  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("rings", [(), (Ring(6, 16),)], ids=["full", "rings"])
@pytest.mark.parametrize(("tokens", "message"), BAD_TOKENS)
def test_f13_tokens_are_plain_ints(placement: Placement, rings: tuple[Ring, ...], tokens: Any, message: str) -> None:
    """Looked at before blocks change hands: neither a handle without blocks nor one that is unknown is left."""
    world = World(16, 4, placement, rings=rings)
    arena, handle = world.arena, world.begin(text(0, 6))
    world.release(world.begin(text(0, 5)))
    calls: list[Callable[[], object]] = [
        lambda: arena.admit(8, None, tokens), lambda: arena.can_admit(8, None, tokens),
        lambda: arena.publish(handle, tokens), lambda: arena.release(handle, tokens),
    ]  # fmt: skip
    for call in calls:
        refused(arena, call, message)
    assert arena.describe() and arena.snapshot() and handle.live
    arena.publish(handle, text(0, 6))
    for call in calls:
        refused(arena, call, message)
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f91_what_was_lost_is_not_copied_any_more(placement: Placement) -> None:
    """After a failed step the backend is new: it must not be told to copy what it never had."""
    world = World(16, 4, placement)
    arena, handle, other = world.arena, world.begin(text(0, 6), publish=True), world.begin(text(100, 6))
    arena.swap_out(other, 1)
    copy = arena.admit(8, None, text(0, 6))
    assert copy.position == 6 and isinstance(arena._ledger._ops[0], SwapOut) and len(arena._ledger._ops) == 2
    arena.lose()
    assert arena.take_moves() == ()
    refused(arena, lambda: arena.swap_drop(1), "0 tokens are kept under 1")
    assert handle.live and copy.live


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f29_one_token_too_many(placement: Placement) -> None:
    world = World(16, 4, placement)
    arena, handle = world.arena, world.admit(text(0, 8), limit=10)
    world.write(handle, text(0, 7))
    refused(
        arena, lambda: handle.advance(2),
        "KV cache overflow: position 9 exceeds the capacity of 8 tokens (tried to advance by 2 tokens)",
    )  # fmt: skip
    for call, verb in ((arena.publish, "published"), (arena.release, "kept")):
        refused(arena, lambda: call(handle, text(0, 8)), f"8 tokens cannot be {verb}: 7 are written")  # noqa: B023
    refused(
        arena, lambda: arena.grow(handle, 13), "13 tokens exceed this sequence's limit of 12 tokens", ArenaFullError
    )
    handle.advance()
    refused(arena, handle.advance, "KV cache overflow: position 9 exceeds the capacity of 8 tokens")
    assert (handle.is_full, handle.remaining, handle.position) == (True, 0, 8)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f13_swapping_the_wrong_thing(placement: Placement) -> None:
    world = World(16, 4, placement)
    arena, handle = world.arena, world.begin(text(0, 5))
    empty = world.admit([1])
    refused(arena, lambda: arena.swap_out(empty, 9), "0 tokens are written: there are no contents to keep")
    refused(arena, lambda: arena.swap_in(empty, 9, 5), "0 tokens are kept under 9, not 5")
    refused(arena, lambda: arena.swap_drop(9), "0 tokens are kept under 9")
    key = world.swap_out(handle)
    small, other = world.arena.admit(2), world.begin(text(100, 3))
    world.texts[small] = Text()
    refused(
        arena, lambda: arena.swap_in(other, key, 5), "3 tokens are written already; contents come back into an empty"
    )
    refused(arena, lambda: arena.swap_in(small, key, 4), f"5 tokens are kept under {key}, not 4")
    refused(
        arena, lambda: arena.swap_in(small, key, 5), "KV cache overflow: position 5 exceeds the capacity of 4 tokens"
    )
    again = world.swap_in(key)
    refused(arena, lambda: arena.swap_drop(key), f"0 tokens are kept under {key}")
    refused(arena, lambda: arena.swap_in(empty, key, 5), f"0 tokens are kept under {key}, not 5")
    world.write(again, [5])
    world.swap_drop(world.swap_out(again))
    world.end()


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f29_what_others_may_read_is_never_written_again(placement: Placement, length: int) -> None:
    """Not even a part of the first block; and where blocks are shared not even after everything was forgotten."""
    world = World(16, 4, placement)
    handle = world.begin(text(0, 8))
    world.reset(handle)  # nobody knows of it yet
    world.write(handle, text(50, 8))
    world.arena.publish(handle, text(50, length))
    message = f"{length} tokens are shared with other sequences and cannot be written again: release this handle"
    refused(world.arena, handle.reset, message)
    other = world.admit([*text(50, length), 7])
    assert other.position == length
    world.arena.clear()
    if placement == "run":
        world.reset(handle)  # the other one has its copy
        world.write(handle, text(80, 8))
    else:
        refused(world.arena, handle.reset, message)
        if length >= 4:
            refused(world.arena, other.reset, f"{length // 4 * 4} tokens are shared")
    world.write(other, [7])
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f20_growing_to_less_changes_nothing(placement: Placement) -> None:
    world = World(16, 4, placement)
    handle = world.begin(text(0, 9))
    before = state(world.arena)
    for num_tokens in (1, 9, 12):
        world.arena.grow(handle, num_tokens)
        assert state(world.arena) == before
    world.end()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f70_changes_tell_who_waits_for_blocks(placement: Placement) -> None:
    """Whoever was refused need not ask again while `changes` stays."""
    world = World(16, 4, placement)
    handles = [world.begin(text(100 * number, 16)) for number in range(3)]
    calls: list[Callable[[], object]] = [
        lambda: world.release(handles[0], keep=0), lambda: world.release(handles[1]),
        lambda: world.swap_out(handles[2]), world.arena.clear,
    ]  # fmt: skip
    for call in calls:
        before = world.arena.changes
        call()
        assert world.arena.changes > before
    world.end()


def work(arena: KVArena, number: int, operations: int) -> None:
    """One thread's random sequences: they begin alike with those of the others."""
    rng, capacity = random.Random(number), 40
    live: list[KVHandle] = []
    tokens = text(0, capacity)
    for _ in range(operations):
        try:
            if not live or rng.random() < 0.3:
                num_tokens = rng.randint(1, 20)
                live.append(arena.admit(num_tokens, capacity, tokens[: num_tokens - 1]))
            handle = rng.choice(live)
            if rng.random() < 0.1:
                live.append(arena.fork(handle))
            if handle.position < capacity:
                arena.grow(handle, min(capacity, handle.position + rng.randint(1, 4)))
                handle.advance()
                arena.publish(handle, tokens[: handle.position])
        except ArenaFullError:
            pass  # others hold the blocks
        while len(live) > 3:
            handle = live.pop(rng.randrange(len(live)))
            arena.release(handle, tokens[: rng.choice((0, handle.position))])
    for handle in live:
        arena.release(handle)


def read(arena: KVArena, kind: int) -> None:
    """One look at the arena, of eight kinds; what is read is whole."""
    if kind == 0:
        stats = arena.stats()
        assert stats.used_blocks + stats.free_blocks == stats.num_blocks and stats.cached_blocks <= stats.free_blocks
        assert stats.largest_free_run <= stats.free_blocks - stats.cached_blocks
    elif kind == 1:
        shown = arena.describe()
        assert f"sequences: {shown.count('tokens, blocks')}\n" in shown
    elif kind == 2:
        assert set(arena.block_map(7)) <= set("Xo.\n")
    elif kind == 3:
        assert 0.0 <= arena.fragmentation() < 1.0
    elif kind == 4:
        assert len({handle for handle, _ in arena.owners()}) <= arena.num_blocks * 4
    elif kind == 5:
        arena.check()
    elif kind == 6:
        assert 0 <= arena.used_blocks <= arena.num_blocks
    else:
        arena.can_admit(9, None, text(0, 8))
        arena.take_moves()


class Held:
    """A lock that counts how often it was taken."""

    def __init__(self) -> None:
        self.inner = threading.RLock()
        self.taken = 0

    def __enter__(self) -> None:
        self.inner.acquire()
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self.inner.release()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f28_every_call_takes_the_lock(placement: Placement) -> None:
    world = World(16, 4, placement)
    arena, handle, other = world.arena, world.begin(text(0, 5)), world.begin(text(100, 5))
    lock = arena._lock = Held()  # type: ignore[assignment]
    calls: list[Callable[[], object]] = [
        lambda: arena.used_blocks, lambda: arena.free_blocks, lambda: arena.can_admit(4), arena.fragmentation,
        arena.stats, arena.block_map, arena.owners, arena.describe, arena.snapshot, arena.check,
        lambda: arena.publish(handle, text(0, 5)), lambda: arena.grow(handle, 9), lambda: arena.fork(handle),
        lambda: arena.swap_out(other, 1), lambda: arena.swap_in(arena.admit(6), 1, 5), arena.take_moves,
        lambda: arena.swap_out(arena.owners()[-1][0], 2), lambda: arena.swap_drop(2),
        lambda: arena.release(handle, text(0, 5)), arena.clear,
    ]  # fmt: skip
    for number, call in enumerate(calls):
        before = lock.taken
        call()
        assert lock.taken > before, f"call {number} of the list looks without the lock"


@pytest.mark.parametrize("rings", [[], [Ring(6, 40)]])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f28_f15_eight_readers_and_four_writers(placement: Placement, rings: list[Ring]) -> None:
    arena = KVArena(64, 2, placement, rings=rings)
    errors: list[BaseException] = []
    done = threading.Event()

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)
            done.set()

    def watch(kind: int) -> None:
        while not done.is_set():
            read(arena, kind)

    writers = [threading.Thread(target=run, args=(lambda n=n: work(arena, n, 1500),), daemon=True) for n in range(4)]
    readers = [threading.Thread(target=run, args=(lambda n=n: watch(n),), daemon=True) for n in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as many switches between bytecodes as can be had
    try:
        for thread in [*readers, *writers]:
            thread.start()
        for thread in writers:
            thread.join(timeout=60)
        done.set()
        for thread in readers:
            thread.join(timeout=60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in [*readers, *writers]), "a deadlock"
    assert not errors
    arena.check()
    assert arena.used_blocks == 0 and arena.stats().num_sequences == 0
    assert arena.prefix_caching == (arena.stats().reused_tokens > 0)
