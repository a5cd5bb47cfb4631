"""Table 1 of bench_kv.py: what an operation of the KV arena takes, and how that grows with the arena.

A steady random mix. While less than 70 % of the blocks are held, the next operation takes some, else it gives some
back, of an owner picked at random. Lengths are log-uniform, 16 to 1,000 tokens in blocks of 16, whatever the arena's
size. Every operation is timed alone, so what picks the next one costs nothing; a figure is the median over one
repeat's operations, then the median over the repeats; `cycle` is the sum of a row's figures. The mean is shown beside
it, because a median hides rare, dear operations such as a compaction; it also holds what the machine did meanwhile.
Every row runs the same number of operations, after a warm-up in which as many owners left as there are. Either ends
after half a minute, and the row says so.

`allocator`: `allocate` and `free` of adjacent blocks, first fit and buddy.
`arena`: `KVArena` with prefix caching. `admit` a prompt (one of 8 beginnings of 64 tokens, then random tokens),
`publish` it, `grow` a random sequence by one token beyond its capacity, `release` it with its tokens, which keeps
them: the 30 % that no sequence holds are full of kept prefixes, and each admission makes room among them. Half of the
operations grow.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from time import perf_counter, perf_counter_ns
from typing import Any, Literal, NamedTuple

from cortexstream.errors import ArenaFullError
from cortexstream.kv import Allocator, BlockAllocator, BuddyAllocator, KVArena, KVHandle, Run

SIZES, QUICK_SIZES = (2_000, 20_000, 200_000), (1_000, 4_000)  # blocks
BLOCK_TOKENS = 16
OCCUPANCY = 0.7
PATIENCE_S = 30.0  # for the warm-up, and again for the measurement
SHORTEST, LONGEST, MOST_OUTPUT = 16, 1000, 256  # tokens
BEGINNINGS, BEGINNING_TOKENS, VOCABULARY = 8, 64, 32_000


class Effort(NamedTuple):
    """How much is timed for each row."""

    repeats: int
    operations: int  # of each repeat


Times = dict[str, list[int]]  # operation -> nanoseconds of each call


def log_uniform(rng: random.Random, shortest: int, longest: int) -> int:
    return int(shortest * (longest / shortest) ** rng.random() + 0.5)


class AllocatorMix:
    """Runs of blocks come and go."""

    parts = ("allocate", "free")

    def __init__(self, allocator: Allocator, rng: random.Random) -> None:
        self._allocator = allocator
        self._rng = rng
        self._live: list[Run] = []
        self._target = int(OCCUPANCY * allocator.num_blocks)
        self._refused = False
        self.left = 0  # owners that came and went
        self.facts = {"refused": 0}

    @property
    def owners(self) -> int:
        return len(self._live)

    def step(self, times: Times) -> None:
        if self._allocator.num_used < self._target and not self._refused:
            size = -(-log_uniform(self._rng, SHORTEST, LONGEST) // BLOCK_TOKENS)
            started = perf_counter_ns()
            try:
                run = self._allocator.allocate(size)
            except ArenaFullError:  # no hole is large enough: the next operation frees
                self._refused = True
                self.facts["refused"] += 1
                return
            times["allocate"].append(perf_counter_ns() - started)
            self._live.append(run)
            return
        self._refused = False
        run = pop_random(self._live, self._rng)
        started = perf_counter_ns()
        self._allocator.free(run)
        times["free"].append(perf_counter_ns() - started)
        self.left += 1


class ArenaMix:
    """Sequences are admitted, grow and leave their prefix behind."""

    parts = ("admit", "publish", "grow", "release")

    def __init__(self, arena: KVArena, rng: random.Random) -> None:
        self._arena = arena
        self._rng = rng
        self._words = list(range(VOCABULARY))
        self._beginnings = [rng.choices(self._words, k=BEGINNING_TOKENS) for _ in range(BEGINNINGS)]
        self._live: list[tuple[KVHandle, list[int]]] = []  # with the tokens written so far
        self._target = int(OCCUPANCY * arena.num_blocks)
        self.left = 0

    @property
    def owners(self) -> int:
        return len(self._live)

    @property
    def facts(self) -> dict[str, int]:
        stats = self._arena.stats()
        return {"compactions": stats.compactions, "relocations": stats.relocations, "moved_tokens": stats.moved_tokens}

    def step(self, times: Times) -> None:
        if self._live and self._rng.random() < 0.5:
            self._grow(times)
        elif self._arena.used_blocks < self._target:
            self._admit(times)
        else:
            handle, tokens = pop_random(self._live, self._rng)
            started = perf_counter_ns()
            self._arena.release(handle, tokens)
            times["release"].append(perf_counter_ns() - started)
            self.left += 1
        self._arena.take_moves()

    def _admit(self, times: Times) -> None:
        own = log_uniform(self._rng, SHORTEST, LONGEST)
        tokens = (self._rng.choice(self._beginnings) + self._rng.choices(self._words, k=own))[:own]
        limit = own + log_uniform(self._rng, SHORTEST, MOST_OUTPUT)
        known = tokens[:-1]
        started = perf_counter_ns()
        handle = self._arena.admit(own, limit, known)
        admitted = perf_counter_ns()
        handle.advance(own - handle.position)
        advanced = perf_counter_ns()
        self._arena.publish(handle, tokens)
        times["publish"].append(perf_counter_ns() - advanced)
        times["admit"].append(admitted - started)
        self._live.append((handle, tokens))

    def _grow(self, times: Times) -> None:
        handle, tokens = self._rng.choice(self._live)
        if len(handle.blocks) >= handle.limit_blocks:
            return
        new = handle.capacity_tokens + 1 - handle.position
        if not handle.is_full:
            handle.advance(handle.remaining)
        started = perf_counter_ns()
        self._arena.grow(handle, handle.position + 1)
        times["grow"].append(perf_counter_ns() - started)
        handle.advance()
        tokens.extend(self._rng.choices(self._words, k=new))


def pop_random(items: list[Any], rng: random.Random) -> Any:
    index = rng.randrange(len(items))
    items[index], items[-1] = items[-1], items[index]
    return items.pop()


Mix = AllocatorMix | ArenaMix
Placement = Literal["run", "paged"]


def allocator_mix(kind: Callable[[int], Allocator]) -> Callable[[int, random.Random], Mix]:
    return lambda num_blocks, rng: AllocatorMix(kind(num_blocks), rng)


def arena_mix(placement: Placement) -> Callable[[int, random.Random], Mix]:
    return lambda num_blocks, rng: ArenaMix(KVArena(num_blocks, BLOCK_TOKENS, placement), rng)


MIXES: dict[tuple[str, str], Callable[[int, random.Random], Mix]] = {
    ("allocator", "first_fit"): allocator_mix(BlockAllocator),
    ("allocator", "buddy"): allocator_mix(BuddyAllocator),
    ("arena", "run"): arena_mix("run"),
    ("arena", "paged"): arena_mix("paged"),
}


def time_mix(mix: Mix, effort: Effort) -> dict[str, Any]:
    """Medians and means in microseconds, per operation and for a cycle of all of them."""
    scratch: Times = {part: [] for part in mix.parts}
    deadline = perf_counter() + PATIENCE_S
    while mix.left < max(1, mix.owners) and perf_counter() < deadline:
        mix.step(scratch)
    warm = perf_counter() < deadline
    before, repeats, done = dict(mix.facts), [], 0
    deadline = perf_counter() + PATIENCE_S
    for _ in range(effort.repeats):
        times: Times = {part: [] for part in mix.parts}
        repeats.append(times)
        for _ in range(effort.operations):
            mix.step(times)
            done += 1
            if perf_counter() > deadline and all(times.values()):
                break
        if perf_counter() > deadline:
            break

    def us(average: Callable[[list[int]], float]) -> dict[str, float]:
        return {part: statistics.median(average(times[part]) / 1000 for times in repeats) for part in mix.parts}

    median, mean = us(statistics.median), us(statistics.mean)
    return {
        "owners": mix.owners, "median_us": median, "mean_us": mean, "cycle_us": sum(median.values()),
        "mean_cycle_us": sum(mean.values()), "operations_done": done,
        "warm": warm, "cut_short": done < effort.repeats * effort.operations,
        "counted": {name: count - before[name] for name, count in mix.facts.items()},
    }  # fmt: skip


def measure(quick: bool) -> list[dict[str, Any]]:
    effort = Effort(repeats=2, operations=400) if quick else Effort(repeats=5, operations=4000)
    sizes = QUICK_SIZES if quick else SIZES
    rows = []
    for (level, policy), make in MIXES.items():
        first = 0.0
        for size in sizes:
            row = {"level": level, "policy": policy, "num_blocks": size, **effort._asdict()}
            row |= time_mix(make(size, random.Random(0)), effort)
            first = first or row["cycle_us"]
            rows.append(row | {"growth": row["cycle_us"] / first})
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'level':11}{'policy':11}{'blocks':>8}{'owners':>8}{'cycle, us':>11}{'mean':>9}{'growth':>8}  of which")
    for row in rows:
        parts = ", ".join(f"{part} {us:.1f}" for part, us in row["median_us"].items())
        if any(row["counted"].values()):
            parts += "; " + ", ".join(f"{count:,} {name}" for name, count in row["counted"].items())
        if not row["warm"]:
            parts += "; WARM-UP CUT SHORT"
        if row["cut_short"]:
            parts += f"; CUT SHORT after {row['operations_done']:,} operations"
        print(f"{row['level']:11}{row['policy']:11}{row['num_blocks']:8,}{row['owners']:8,}{row['cycle_us']:11.1f}"
              f"{row['mean_cycle_us']:9.1f}{row['growth']:8.2f}  {parts}")  # fmt: skip
    largest, smallest = rows[-1]["num_blocks"], rows[0]["num_blocks"]
    worst = max(row["growth"] for row in rows)
    print(
        f"from {smallest:,} to {largest:,} blocks a cycle takes at most {worst:.2f} times as long; the aim is below 3"
    )
