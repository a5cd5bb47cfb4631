"""Table 4 of bench_kv.py: how many sequences a full arena serves at once, by placement and policy.

One queue that never empties, the same for every row: prompts 16 to 4,000 and outputs 16 to 1,000 tokens, log-uniform,
in an arena of 131,072 tokens; each may ask for 1,000 tokens of output, and nobody knows before when it will end.
Every step adds one token to each running sequence. Admission is in order of arrival, a prompt at once. When a
sequence cannot grow, the youngest is preempted, goes back to the head of the queue, and nobody is admitted until
another has finished: the engine's rules, without its limits on slots and on tokens per step. Only `KVArena` works
here, nothing is computed. Prefix caching is off, so all memory is for sequences.

`run` and `paged` are the arena's placements. `no compaction` is `run` that takes only what a hole offers: a sequence
is admitted if `largest_free_run` holds its need, and grows if the blocks behind it are free or a hole holds its next
capacity class. `reserved` is `run` with room for 1,000 tokens of output from the start, so nothing ever grows.

The first quarter of the steps fills the arena and is not counted. Placement and growth depend on nothing but the
seed, so the figures are the same on every machine.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from bench_kv_alloc import log_uniform

from cortexstream.errors import ArenaFullError
from cortexstream.kv import KVArena, KVHandle

BLOCK_TOKENS = 16
SHORTEST, LONGEST_PROMPT, LONGEST_OUTPUT = 16, 4000, 1000  # tokens
LAYOUTS = ("run, reserved", "run, no compaction", "run", "paged")
POLICIES: tuple[Literal["first_fit", "buddy"], ...] = ("first_fit", "buddy")


class Sequence:
    """A request and how far it is."""

    __slots__ = ("end", "handle", "limit", "tokens")

    def __init__(self, prompt: int, output: int) -> None:
        self.tokens = prompt  # that have keys and values, or had before a preemption
        self.end = prompt + output
        self.limit = prompt + LONGEST_OUTPUT
        self.handle: KVHandle | None = None


class Count(NamedTuple):
    """What happened since the start."""

    output_tokens: int
    finished: int
    preemptions: int
    recomputed_tokens: int
    moved_tokens: int
    compactions: int
    stalled_steps: int  # the head of the queue found enough free blocks, but no hole


def queue(seed: int) -> Iterator[Sequence]:
    rng = random.Random(seed)
    while True:
        yield Sequence(log_uniform(rng, SHORTEST, LONGEST_PROMPT), log_uniform(rng, SHORTEST, LONGEST_OUTPUT))


class Simulation:
    """One arena under a queue that never empties."""

    def __init__(self, layout: str, policy: Literal["first_fit", "buddy"], num_blocks: int) -> None:
        self._reserves = layout == "run, reserved"
        self._compacts = layout != "run, no compaction"
        self.arena = KVArena(
            num_blocks, BLOCK_TOKENS, "paged" if layout == "paged" else "run", policy=policy, prefix_caching=False
        )
        self.running: list[Sequence] = []  # oldest first
        self._queue = queue(0)
        self._waiting: deque[Sequence] = deque()
        self._hold = False  # one was preempted and none has finished since
        self._output = self._finished = self._preemptions = self._recomputed = self._stalled = 0

    @property
    def live_tokens(self) -> int:
        return sum(sequence.tokens for sequence in self.running)

    def count(self) -> Count:
        stats = self.arena.stats()
        return Count(
            self._output, self._finished, self._preemptions, self._recomputed, stats.moved_tokens, stats.compactions,
            self._stalled,
        )  # fmt: skip

    def step(self) -> None:
        for sequence in list(self.running):
            if sequence.handle is not None and sequence.handle.is_full:
                while sequence.handle is not None and not self._grow(sequence.handle):
                    self._preempt()
        for sequence in list(self.running):
            self._draw(sequence)
        while not (self._hold and self.running) and self._admit():
            pass
        self.arena.take_moves()

    def _draw(self, sequence: Sequence) -> None:
        assert sequence.handle is not None
        sequence.handle.advance()
        sequence.tokens += 1
        self._output += 1
        if sequence.tokens == sequence.end:
            self.running.remove(sequence)
            self.arena.release(sequence.handle)
            self._finished += 1
            self._hold = False

    def _grow(self, handle: KVHandle) -> bool:
        if not self._compacts and not self._finds_hole(handle):
            return False
        try:
            self.arena.grow(handle, handle.position + 1)
        except ArenaFullError:
            return False
        return True

    def _finds_hole(self, handle: KVHandle) -> bool:
        """Can it grow as far as the arena would let it, while all others stay where they are?"""
        have, stats = len(handle.blocks), self.arena.stats()
        size = self.arena.need_blocks(handle.position + 1, handle.limit_blocks * BLOCK_TOKENS)
        if size - have > stats.free_blocks:
            size = have + 1
        if size <= stats.largest_free_run:
            return True
        behind = handle.blocks[-1] + 1
        return self.arena.block_map(width=stats.num_blocks)[behind : behind + size - have] == "." * (size - have)

    def _preempt(self) -> None:
        youngest = self.running.pop()
        assert youngest.handle is not None
        self.arena.release(youngest.handle)
        youngest.handle = None
        self._waiting.appendleft(youngest)
        self._preemptions += 1
        self._recomputed += youngest.tokens
        self._hold = True

    def _admit(self) -> bool:
        """Admit the head of the queue; False if it does not fit."""
        if not self._waiting:
            self._waiting.append(next(self._queue))
        sequence, arena = self._waiting[0], self.arena
        tokens = sequence.limit if self._reserves else sequence.tokens
        if not arena.can_admit(tokens, sequence.limit):
            return False
        if not self._compacts and arena.need_blocks(tokens, sequence.limit) > arena.stats().largest_free_run:
            self._stalled += 1
            return False
        sequence.handle = arena.admit(tokens, sequence.limit)
        sequence.handle.advance(sequence.tokens)
        self.running.append(self._waiting.popleft())
        return True


def simulate(layout: str, policy: Literal["first_fit", "buddy"], num_blocks: int, steps: int) -> dict[str, Any]:
    """Averages over the last three quarters of `steps`."""
    simulation = Simulation(layout, policy, num_blocks)
    for _ in range(steps // 4):
        simulation.step()
    before, counted = simulation.count(), steps - steps // 4
    running = live = 0
    for _ in range(counted):
        simulation.step()
        running += len(simulation.running)
        live += simulation.live_tokens
    simulation.arena.check()
    if simulation.arena.stats().used_tokens != simulation.live_tokens:
        raise SystemExit(f"{layout}: the arena holds other tokens than those of the sequences that run")
    done = Count(*[now - then for now, then in zip(simulation.count(), before, strict=True)])
    return {
        "layout": layout, "policy": policy, "num_blocks": num_blocks, "steps": counted,
        "running": running / counted, "live_share": live / counted / (num_blocks * BLOCK_TOKENS),
        "copied_per_output_token": done.moved_tokens / done.output_tokens,
        "recomputed_per_output_token": done.recomputed_tokens / done.output_tokens, **done._asdict(),
    }  # fmt: skip


def measure(quick: bool) -> list[dict[str, Any]]:
    num_blocks, steps = (1024, 200) if quick else (8192, 2000)
    return [simulate(layout, policy, num_blocks, steps) for layout in LAYOUTS for policy in POLICIES]


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'placement':20}{'policy':11}{'running':>9}{'live':>7}{'preempted':>11}{'copied':>9}{'recomputed':>12}"
          "   (tokens per output token)")  # fmt: skip
    for row in rows:
        print(f"{row['layout']:20}{row['policy']:11}{row['running']:9.1f}{row['live_share']:7.1%}{row['preemptions']:11,}"
              f"{row['copied_per_output_token']:9.2f}{row['recomputed_per_output_token']:12.2f}")  # fmt: skip
