"""A model of integers whose every token depends on every KV entry before it, read where the plan says it is.

A wrong block, a stale block, a missed write or a missed move changes the tokens. KV[p] depends on KV[p - 1], so a
cache that matched the wrong prefix cannot hide either. In the "run" layout entries are stored at an offset that
depends on the run's capacity, as a head-major layout does: a run that grows in place without a move is caught.
"""

from __future__ import annotations

from typing import NamedTuple

from cortexstream.backend import BackendInfo, BackendOptions, LayerKV, ModelInfo, WarmupReport
from cortexstream.errors import EngineError
from cortexstream.plan import PENDING, KVRows, Move, PlanRow, RowResult, SampleSpec, StepPlan, StepResult

MASK = (1 << 64) - 1
EMPTY = -1


def mix(state: int, value: int) -> int:
    """One round of FNV-1a on a 64-bit word."""
    return ((state ^ (value + 1)) * 1099511628211) & MASK


def next_token(context: list[int], spec: SampleSpec, vocab_size: int) -> int:
    """What the null model draws after `context`: the dense answer that the backend must agree with."""
    entry = summary = 0
    for token in context:
        entry = mix(entry, token)
        summary = mix(summary, entry)
    return draw(summary, len(context), spec, vocab_size)


def draw(summary: int, position: int, spec: SampleSpec, vocab_size: int) -> int:
    state = mix(mix(mix(summary, spec.seed), position), spec.sample_index) if spec.temperature else summary
    token = (state >> 16) % vocab_size
    while token in spec.banned:
        token = (token + 1) % vocab_size
    return token


class NullTicket(NamedTuple):
    step: int
    result: StepResult


class NullBackend:
    """See the module's docstring. Options in `extra`: vocab_size, max_context_tokens, memory_bytes, eos_token_id."""

    def __init__(self, options: BackendOptions) -> None:
        extra = dict(options.extra)
        self._vocab_size = int(extra.pop("vocab_size", 97))
        eos = extra.pop("eos_token_id", None)
        layout = options.kv_layout or "run"
        self.info = BackendInfo(
            name="null", device="none", kv_layout=layout, block_tokens=options.block_tokens or 16,
            memory_bytes=int(extra.pop("memory_bytes", 1 << 24)), dtype="int64",
        )  # fmt: skip
        self.model = ModelInfo(
            architecture="null", vocab_size=self._vocab_size, layers=(LayerKV(1, 1, 1),), kv_item_bytes=8,
            weight_bytes=0, max_context_tokens=int(extra.pop("max_context_tokens", 4096)), eos_token_ids=frozenset()
            if eos is None else frozenset([int(eos)]),
        )  # fmt: skip
        if extra:
            raise EngineError(f"the null backend has no option {sorted(extra)[0]!r}")
        self._kv: list[int] = []
        self._drawn: dict[int, int] = {}  # slot -> token of the last plan
        self._last_collected = 0

    def allocate_kv(self, num_blocks: int) -> int:
        self._kv = [EMPTY] * (num_blocks * self.info.block_tokens)
        return len(self._kv) * self.model.kv_bytes_per_token

    def submit(self, plan: StepPlan) -> NullTicket:
        for move in plan.moves:
            self._move(move)
        resolved = [self._resolve(row) for row in plan.rows]
        for row, tokens in zip(plan.rows, resolved, strict=True):  # every row writes before any row reads
            self._write(row, tokens)
        results = [self._draw(row) for row in plan.rows if row.sample is not None]
        slots = [row.slot for row in plan.rows if row.sample is not None]
        self._drawn = {slot: result.token for slot, result in zip(slots, results, strict=True)}
        return NullTicket(plan.step, StepResult(plan.step, tuple(results)))

    def collect(self, ticket: NullTicket) -> StepResult:
        if ticket.step <= self._last_collected:
            raise EngineError(f"step {ticket.step} was collected already")
        self._last_collected = ticket.step
        return ticket.result

    def reset(self) -> None:
        self._drawn = {}

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        return WarmupReport(())

    def memory_addresses(self) -> list[int]:
        return []

    def close(self) -> None:
        self._kv = []

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
            self._kv[self._address(row.kv, position)] = entry

    def _draw(self, row: PlanRow) -> RowResult:
        assert row.sample is not None
        if len(set(row.sample.banned)) >= self._vocab_size:
            return RowResult(row.seq_id, 0, error=f"all {self._vocab_size} tokens are banned; nothing can be drawn")
        end = row.start + len(row.tokens)
        summary = 0
        for position in range(end):
            summary = mix(summary, self._read(row.kv, position))
        token = draw(summary, end, row.sample, self._vocab_size)
        return RowResult(row.seq_id, token, None if row.sample.logprobs is None else -float(token))

    def _move(self, move: Move) -> None:
        source = KVRows(tuple(range(move.source, move.source + move.source_blocks)), True)
        target = KVRows(tuple(range(move.target, move.target + move.target_blocks)), True)
        entries = [self._read(source, position) for position in range(move.num_tokens)]
        for position, entry in enumerate(entries):
            self._kv[self._address(target, position)] = entry

    def _read(self, kv: KVRows, position: int) -> int:
        entry = self._kv[self._address(kv, position)]
        if entry == EMPTY:
            raise EngineError(f"position {position} was never written")
        return entry

    def _address(self, kv: KVRows, position: int) -> int:
        block, offset = divmod(position, self.info.block_tokens)
        if block >= len(kv.blocks):
            raise EngineError(f"position {position} is outside the {len(kv.blocks)} blocks of its row")
        if not kv.contiguous:
            return kv.blocks[block] * self.info.block_tokens + offset
        capacity = len(kv.blocks) * self.info.block_tokens
        return kv.blocks[0] * self.info.block_tokens + (capacity - 1 - position)


def available() -> str | None:
    return None


def accelerator() -> str | None:
    return None


def create(options: BackendOptions) -> NullBackend:
    return NullBackend(options)
