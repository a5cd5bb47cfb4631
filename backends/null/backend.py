"""A model of integers whose every token depends on every KV entry before it, read where the plan says it is.

A wrong block, a stale block, a missed write or a missed move changes the tokens. KV[p] depends on KV[p - 1], so a
cache that matched the wrong prefix cannot hide either. In the "run" layout entries are stored at an offset that
depends on the run's capacity, as a head-major layout does: a run that grows in place without a move is caught. With
the option `window` a second layer keeps its last entries in a ring, and every token depends on those, too.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

import numpy as np

from cortexstream.backend import BackendInfo, BackendOptions, LayerKV, LayerState, ModelInfo, PackedKV, WarmupReport
from cortexstream.errors import EngineError
from cortexstream.outputs import TokenMetadata
from cortexstream.plan import (
    PENDING,
    KVRows,
    MemoryOp,
    Move,
    PlanRow,
    RowResult,
    RowScores,
    SampleSpec,
    Score,
    StepPlan,
    StepResult,
    SwapIn,
    SwapOut,
    TokenScore,
    ring_tokens,
)
from cortexstream.sampling import unpack

MASK = (1 << 64) - 1
EMPTY = -1


def mix(state: int, value: int) -> int:
    """One round of FNV-1a on a 64-bit word."""
    return ((state ^ (value + 1)) * 1099511628211) & MASK


def next_token(context: list[int], spec: SampleSpec, vocab_size: int, window: int | None = None) -> int:
    """What the null model draws after `context`: the dense answer that the backend must agree with."""
    entry = summary = 0
    entries = []
    for token in context:
        entry = mix(entry, token)
        summary = mix(summary, entry)
        entries.append(entry)
    for entry in entries[-window:] if window else ():
        summary = mix(summary, entry)
    return draw(summary, len(context), spec, vocab_size, banned_by(spec, vocab_size))


def draw(summary: int, position: int, spec: SampleSpec, vocab_size: int, banned: Set[int]) -> int:
    state = mix(mix(mix(summary, spec.seed), position), spec.sample_index) if spec.temperature else summary
    token = (state >> 16) % vocab_size
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def banned_by(spec: SampleSpec, vocab_size: int) -> set[int]:
    """The tokens that must not be drawn. The mask is looked at once."""
    if spec.mask is None:
        return set(spec.banned)
    return {*spec.banned, *np.flatnonzero(~unpack(spec.mask(), vocab_size)).tolist()}


class NullTicket(NamedTuple):
    step: int
    result: StepResult


class NullBackend:
    """See the module's docstring. Options in `extra`: vocab_size, max_context_tokens, memory_bytes, eos_token_id,
    window."""

    def __init__(self, options: BackendOptions) -> None:
        extra = dict(options.extra)
        self._vocab_size = int(extra.pop("vocab_size", 97))
        window = extra.pop("window", None)
        self._window = None if window is None else int(window)
        eos = extra.pop("eos_token_id", None)
        layout = options.kv_layout or "run"
        self.info = BackendInfo(
            name="null", device="none", kv_layout=layout, block_tokens=options.block_tokens or 16,
            memory_bytes=int(extra.pop("memory_bytes", 1 << 24)), dtype="int64", batch_invariant=True,
            invariance="a token is drawn from whole numbers that its own sequence alone has written",
        )  # fmt: skip
        layers = (LayerKV(1, 2, 2),) if window is None else (LayerKV(1, 2, 2), LayerKV(1, 2, 2, self._window))
        self.model = ModelInfo(
            architecture="null",
            vocab_size=self._vocab_size,
            max_context_tokens=int(extra.pop("max_context_tokens", 4096)),
            eos_token_ids=frozenset() if eos is None else frozenset([int(eos)]),
            layers=layers,
            kv_item_bytes=4,
            weight_bytes=0,
        )
        if extra:
            raise EngineError(f"the null backend has no option {sorted(extra)[0]!r}")
        self._pools: list[list[int]] = []
        self._swapped: dict[int, tuple[list[int], ...]] = {}
        self._drawn: dict[int, int] = {}  # slot -> token of the last plan
        self._last_collected = 0

    def allocate_kv(self, num_blocks: int, ring_blocks: tuple[int, ...] = ()) -> int:
        if len(ring_blocks) != len(self.model.windows):
            raise EngineError(f"ring_blocks has {len(ring_blocks)} numbers for {len(self.model.windows)} windows")
        self._pools = [[EMPTY] * (blocks * self.info.block_tokens) for blocks in (num_blocks, *ring_blocks)]
        return sum(len(p) * b for p, b in zip(self._pools, self.model.pool_bytes_per_token, strict=True))

    def submit(self, plan: StepPlan) -> NullTicket:
        for op in plan.moves:
            self._execute(op)
        resolved = [self._resolve(row) for row in plan.rows]
        for row, tokens in zip(plan.rows, resolved, strict=True):  # every row writes before any row reads
            self._write(row, tokens)
        drawing = [(row, self._draws(row)) for row in plan.rows if row.sample is not None]
        self._drawn = {row.slot: results[-1].token for row, results in drawing if len(results) == 1}
        drawn = tuple(result for _, results in drawing for result in results)
        scores = tuple(self._score(row, row.score) for row in plan.rows if row.score is not None)
        return NullTicket(plan.step, StepResult(plan.step, drawn, scores=scores))

    def collect(self, ticket: NullTicket) -> StepResult:
        if ticket.step <= self._last_collected:
            raise EngineError(f"step {ticket.step} was collected already")
        self._last_collected = ticket.step
        return ticket.result

    def reset(self) -> None:
        self._drawn = {}
        self._swapped = {}

    def read_kv(self, kv: KVRows, num_tokens: int) -> list[LayerState]:
        """Each 64-bit entry as four float32, of 16 bits each: two for the key and two for the value."""
        states = [self._state(kv, range(num_tokens), 0)]
        if self._window is not None:
            states.append(self._state(kv, range(max(0, num_tokens - self._window), num_tokens), 1))
        return states

    def write_kv(self, kv: KVRows, num_tokens: int, layers: list[LayerState]) -> None:
        for pool, state in enumerate(layers):
            assert not isinstance(state.keys, PackedKV) and not isinstance(state.values, PackedKV)
            words = np.concatenate([state.keys[:, 0], state.values[:, 0]], axis=1)
            entries = np.ascontiguousarray(words.astype(np.uint16)).view(np.uint64)[:, 0].tolist()
            for position, entry in zip(range(num_tokens - len(entries), num_tokens), entries, strict=True):
                self._pools[pool][self._address(kv, position, pool)] = entry

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        return WarmupReport(())

    def memory_addresses(self) -> list[int]:
        return []

    def close(self) -> None:
        self._pools = []

    def _resolve(self, row: PlanRow) -> list[int]:
        tokens = list(row.tokens)
        if tokens[-1] == PENDING:
            if row.slot not in self._drawn:
                raise EngineError(f"slot {row.slot} has a pending token but drew none in the plan before")
            tokens[-1] = self._drawn[row.slot]
        if PENDING in tokens:
            raise EngineError("a pending token stands before the last")
        return tokens

    def _write(self, row: PlanRow, tokens: list[int]) -> None:
        entry = self._read(row.kv, row.start - 1) if row.start else 0
        for position, token in enumerate(tokens, row.start):
            entry = mix(entry, token)
            for pool in range(len(self._pools)):
                self._pools[pool][self._address(row.kv, position, pool)] = entry

    def _draws(self, row: PlanRow) -> list[RowResult]:
        first = row.start + len(row.tokens) - len(row.draws) + 1
        return [self._draw(row, spec, end) for end, spec in enumerate(row.draws, first)]

    def _draw(self, row: PlanRow, spec: SampleSpec, end: int) -> RowResult:
        """The draw for position `end`, from what is before it."""
        banned = banned_by(spec, self._vocab_size)
        if len(banned) >= self._vocab_size:
            return RowResult(row.seq_id, 0, error=f"all {self._vocab_size} tokens are banned; nothing can be drawn")
        summary = 0
        for position in range(end):
            summary = mix(summary, self._read(row.kv, position))
        for position in range(max(0, end - self._window), end) if self._window else ():
            summary = mix(summary, self._read(row.kv, position, 1))
        token = draw(summary, end, spec, self._vocab_size, banned)
        metadata = TokenMetadata(0.0, 1.0, len(banned)) if spec.metadata else None
        return RowResult(row.seq_id, token, None if spec.logprobs is None else -float(token), metadata=metadata)

    def _score(self, row: PlanRow, score: Score) -> RowScores:
        """A target's logprob is minus what KV is read before it, so a wrong place shows."""
        entries = [self._read(row.kv, row.start + i) % 1000 for i in range(len(score.targets))]
        return RowScores(row.seq_id, tuple(TokenScore(-float(entry), ()) for entry in entries))

    def _execute(self, op: MemoryOp) -> None:
        if isinstance(op, Move):
            self._move(op)
        elif isinstance(op, SwapOut):
            if op.key in self._swapped:
                raise EngineError(f"a copy is kept under {op.key} already")
            self._swapped[op.key] = tuple(
                [self._pools[pool][self._place(rows, slot)] for slot in range(slots)]
                for pool, rows, slots in self._held(op.kv, op.num_tokens)
            )
        else:
            copies = self._swapped.pop(op.key)
            if isinstance(op, SwapIn):
                for (pool, rows, _), copy in zip(self._held(op.kv, op.num_tokens), copies, strict=True):
                    for slot, entry in enumerate(copy):
                        self._pools[pool][self._place(rows, slot)] = entry

    def _held(self, kv: KVRows, num_tokens: int) -> list[tuple[int, KVRows, int]]:
        """(pool, rows, slots in use) of a sequence of so many tokens."""
        held = [(0, kv, num_tokens)]
        if self._window is not None:
            held.append((1, kv.rings[0], min(num_tokens, ring_tokens(self._window, self.info.block_tokens))))
        return held

    def _move(self, move: Move) -> None:
        contiguous = self.info.kv_layout == "run"
        source = KVRows(tuple(range(move.source, move.source + move.source_blocks)), contiguous)
        target = KVRows(tuple(range(move.target, move.target + move.target_blocks)), contiguous)
        pool = self._pools[move.pool]
        entries = [pool[self._place(source, slot)] for slot in range(move.num_tokens)]
        for slot, entry in enumerate(entries):
            pool[self._place(target, slot)] = entry

    def _read(self, kv: KVRows, position: int, pool: int = 0) -> int:
        entry = self._pools[pool][self._address(kv, position, pool)]
        if entry == EMPTY:
            raise EngineError(f"position {position} was never written")
        return entry

    def _state(self, kv: KVRows, positions: range, pool: int) -> LayerState:
        entries = np.array([self._read(kv, position, pool) for position in positions], np.uint64)
        words = entries.view(np.uint16).reshape(-1, 1, 4).astype(np.float32)
        return LayerState(words[:, :, :2].copy(), words[:, :, 2:].copy())

    def _address(self, kv: KVRows, position: int, pool: int = 0) -> int:
        if pool == 0:
            return self._place(kv, position)
        assert self._window is not None
        return self._place(kv.rings[pool - 1], position % ring_tokens(self._window, self.info.block_tokens))

    def _place(self, rows: KVRows, slot: int) -> int:
        block, offset = divmod(slot, self.info.block_tokens)
        if block >= len(rows.blocks):
            raise EngineError(f"slot {slot} is outside the {len(rows.blocks)} blocks of its row")
        if not rows.contiguous:
            return rows.blocks[block] * self.info.block_tokens + offset
        capacity = len(rows.blocks) * self.info.block_tokens
        return rows.blocks[0] * self.info.block_tokens + (capacity - 1 - slot)


def available() -> str | None:
    return None


def accelerator() -> str | None:
    return None


def create(options: BackendOptions) -> NullBackend:
    return NullBackend(options)
