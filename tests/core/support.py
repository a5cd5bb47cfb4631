"""Parts that the tests of the core share: stored contents that follow moves, scripted results, dense answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cortexstream.backend import Backend, BackendInfo, BackendOptions, LayerState, ModelInfo, WarmupReport
from cortexstream.backends.null.backend import NullBackend, NullTicket, create, next_token
from cortexstream.config import EngineConfig
from cortexstream.engine import EngineCore
from cortexstream.kv import ArenaStats, KVArena, KVHandle
from cortexstream.plan import PENDING, KVRows, MemoryOp, Move, RowResult, SampleSpec, StepPlan, StepResult
from cortexstream.request import FinishReason, Request, SamplingParams
from cortexstream.scheduler import TokenEvent
from cortexstream.speculation import Drafter

Ints = npt.NDArray[np.int64]
HEADS = 2
Placement = Literal["run", "paged"]
PLACEMENTS: tuple[Placement, ...] = ("run", "paged")


class Store:
    """What a device holds: one number per (token, head), laid out token-major or head-major inside a run.

    `write` fills a handle's next positions, `moves` executes planned moves as a backend does, `verify` compares what
    every live handle reads with what was written for it.
    """

    def __init__(self, num_blocks: int, block_tokens: int, head_major: bool) -> None:
        self.block_tokens = block_tokens
        self.head_major = head_major
        self._cells: Ints = np.full(num_blocks * block_tokens * HEADS, -1, np.int64)
        self._written: dict[KVHandle, Ints] = {}
        self._next = 0

    def write(self, handle: KVHandle, num_tokens: int) -> None:
        """Advance a handle and give its new positions values that occur nowhere else."""
        start = handle.position
        handle.advance(num_tokens)
        values = np.arange(self._next, self._next + num_tokens * HEADS).reshape(num_tokens, HEADS)
        self._next += num_tokens * HEADS
        before = self._written.get(handle, np.empty((0, HEADS), np.int64))
        self._written[handle] = np.concatenate([before, values])
        self._cells[self._rows(handle.blocks, start, handle.position)] = values

    def moves(self, moves: Iterable[MemoryOp]) -> None:
        for move in moves:
            assert isinstance(move, Move)
            source = tuple(range(move.source, move.source + move.source_blocks))
            target = tuple(range(move.target, move.target + move.target_blocks))
            copied = self._cells[self._rows(source, 0, move.num_tokens)].copy()
            self._cells[self._rows(target, 0, move.num_tokens)] = copied

    def forget(self, handle: KVHandle) -> None:
        """The handle was released: its cells may be overwritten by anything, so poison them."""
        self._cells[self._rows(handle.blocks, 0, handle.capacity_tokens)] = -2
        self._written.pop(handle, None)

    def verify(self) -> None:
        for handle, values in self._written.items():
            assert handle.position == len(values)
            np.testing.assert_array_equal(self._cells[self._rows(handle.blocks, 0, len(values))], values)

    def _rows(self, blocks: Sequence[int], start: int, end: int) -> Ints:
        position = np.arange(start, end)[:, None]
        head = np.arange(HEADS)[None, :]
        if self.head_major:
            capacity = len(blocks) * self.block_tokens
            rows: Ints = blocks[0] * self.block_tokens * HEADS + head * capacity + position
            return rows
        block = np.asarray(blocks)[position // self.block_tokens]
        rows = (block * self.block_tokens + position % self.block_tokens) * HEADS + head
        return rows


def snapshot(arena: KVArena, handles: list[KVHandle]) -> tuple[ArenaStats, list[tuple[tuple[int, ...], int, bool]]]:
    return arena.stats(), [(h.blocks, h.position, h.live) for h in handles]


def side_by_side(arena: KVArena, sizes: list[int]) -> list[KVHandle]:
    """Admit runs of exactly so many blocks, next to each other from block 0."""
    handles = [arena.admit(size * arena.block_tokens, size * arena.block_tokens) for size in sizes]
    assert [h.blocks[0] for h in handles] == [sum(sizes[:i]) for i in range(len(sizes))]
    return handles


def request(number: int, prompt: Sequence[int] | int, index: int = 0, seed: int = 0, **sampling: Any) -> Request:
    """A request whose prompt is given, or is `prompt` different tokens; greedy unless said otherwise."""
    tokens = tuple(range(1, prompt + 1)) if isinstance(prompt, int) else tuple(prompt)
    return Request(number, tokens, SamplingParams(**{"temperature": 0.0, **sampling}), seed, index)


def dense(asked: Request, vocab_size: int, max_tokens: int, eos: frozenset[int] = frozenset()) -> list[int]:
    """The tokens that the null model gives a request served alone, without blocks, steps or a scheduler.

    `max_tokens` is the longest sequence, prompt and output together.
    """
    sampling = asked.sampling
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else eos)
    spec = SampleSpec(temperature=sampling.temperature, seed=asked.seed, sample_index=asked.index)
    context = list(asked.prompt_token_ids)
    output: list[int] = []
    assert sampling.max_tokens is not None
    while len(output) < sampling.max_tokens and len(context) < max_tokens:
        banned = tuple(stops) if len(output) < sampling.min_tokens else ()
        token = next_token(context, spec._replace(banned=banned), vocab_size)
        context.append(token)
        output.append(token)
        if token in stops:
            break
    return output


class Receiver:
    """A sink that keeps what it got and insists on the rules: events in order, one finish, nothing after it."""

    def __init__(self, react: Callable[[int], bool] | None = None) -> None:
        self.tokens: list[int] = []
        self.events: list[TokenEvent] = []
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self._react = react  # told the number of tokens so far; returns True to stop, or raises

    def __call__(self, event: TokenEvent) -> bool:
        assert self.finish is None, f"an event after the end: {event}"
        self.events.append(event)
        self.finish, self.error = event.finish, event.error
        if event.token is None:
            assert event.finish is not None
            return False
        self.tokens.append(event.token)
        if self._react is None:
            return False
        stop = self._react(len(self.tokens))
        if stop and self.finish is None:
            self.finish = FinishReason.STOP
        return stop


class AuditedBackend:
    """The null backend behind checks of every plan: what the contract in `plan.py` says a plan is.

    `fault(call, step)` runs before submit and collect and may raise; `spoil(row)` may replace a row's result.
    """

    def __init__(self, inner: Backend, max_num_seqs: int, max_batched_tokens: int) -> None:
        self.inner = inner
        self.fault: Callable[[str, int], None] = lambda call, step: None
        self.spoil: Callable[[RowResult], RowResult] = lambda row: row
        self.plans: list[StepPlan] = []
        self.closed = False
        self._max_num_seqs = max_num_seqs
        self._max_batched_tokens = max_batched_tokens
        self._in_flight = 0
        self._last_step = 0
        self._drew: dict[int, int] = {}  # slot -> sequence, in the plan before

    @property
    def info(self) -> BackendInfo:
        return self.inner.info

    @property
    def model(self) -> ModelInfo:
        return self.inner.model

    def allocate_kv(self, num_blocks: int, ring_blocks: tuple[int, ...] = ()) -> int:
        return self.inner.allocate_kv(num_blocks, ring_blocks)

    def submit(self, plan: StepPlan) -> Any:
        self.fault("submit", plan.step)
        self._audit(plan)
        self.plans.append(plan)
        return self.inner.submit(plan)

    def collect(self, ticket: NullTicket) -> StepResult:
        self.fault("collect", ticket.step)
        result = self.inner.collect(ticket)
        return result._replace(rows=tuple(self.spoil(row) for row in result.rows))

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        return self.inner.warmup(prompt_tokens, batch)

    def reset(self) -> None:
        self.inner.reset()
        self._drew = {}

    def read_kv(self, kv: KVRows, num_tokens: int) -> list[LayerState]:
        return self.inner.read_kv(kv, num_tokens)

    def write_kv(self, kv: KVRows, num_tokens: int, layers: list[LayerState]) -> None:
        self.inner.write_kv(kv, num_tokens, layers)

    def memory_addresses(self) -> list[int]:
        return self.inner.memory_addresses()

    def close(self) -> None:
        self.closed = True
        self.inner.close()

    def _audit(self, plan: StepPlan) -> None:
        assert plan.step > self._last_step
        assert plan.num_tokens <= self._max_batched_tokens
        assert len(plan.rows) <= self._max_num_seqs
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots) and all(0 <= slot < self._max_num_seqs for slot in slots)
        assert len({row.seq_id for row in plan.rows}) == len(plan.rows)
        self._audit_blocks(plan)
        drew = {}
        for row in plan.rows:
            assert row.tokens and PENDING not in row.tokens[:-1]
            assert row.start + len(row.tokens) <= len(row.kv.blocks) * self.info.block_tokens
            if row.tokens[-1] == PENDING:
                assert plan.step == self._last_step + 1 and self._drew.get(row.slot) == row.seq_id
            if row.drafts:
                assert len(row.draws) == len(row.tokens) and PENDING not in row.tokens
            elif row.sample is not None:
                drew[row.slot] = row.seq_id
            if row.score is not None:
                assert 0 < len(row.score.targets) <= len(row.tokens)
        self._last_step, self._drew = plan.step, drew

    def _audit_blocks(self, plan: StepPlan) -> None:
        """Two rows may share blocks, but none that either of them writes."""
        size = self.info.block_tokens
        written = Counter[int]()
        for row in plan.rows:
            first, last = row.start // size, (row.start + len(row.tokens) - 1) // size
            written.update(row.kv.blocks[first : last + 1])
        held = Counter(block for row in plan.rows for block in row.kv.blocks)
        assert all(held[block] == 1 for block in written), "a row writes a block that another one holds"
        if self.info.kv_layout == "run":
            assert not held or max(held.values()) == 1, "two rows share a block"


def engine(
    layout: str = "run", *, block_tokens: int = 4, num_blocks: int = 64, seqs: int = 8, budget: int = 32,
    max_model_len: int | None = None, prefix_caching: bool = True, drafter: Drafter | None = None, **extra: Any,
) -> tuple[EngineCore, AuditedBackend]:  # fmt: skip
    """An engine core on the audited null backend."""
    options = BackendOptions(None, max_num_seqs=seqs, block_tokens=block_tokens, kv_layout=layout, extra=extra)  # type: ignore[arg-type]
    backend = AuditedBackend(create(options), seqs, budget)
    config = EngineConfig(
        backend="null", max_num_seqs=seqs, max_num_batched_tokens=budget, num_kv_blocks=num_blocks,
        max_model_len=max_model_len, enable_prefix_caching=prefix_caching,
    )  # fmt: skip
    return EngineCore(backend, config, drafter), backend


def null_backend(**extra: Any) -> NullBackend:
    return create(BackendOptions(None, extra=extra))
