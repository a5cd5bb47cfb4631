"""The `Backend` protocol over the numpy model: `submit` computes a plan's tokens, `collect` hands them out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cortexstream.backend import (
    BackendInfo,
    BackendOptions,
    LayerKV,
    LayerState,
    ModelInfo,
    Ticket,
    WarmupReport,
)
from cortexstream.backends.common.affine import dense_weights
from cortexstream.backends.common.checkpoint import eos_token_ids, read_config, read_weights
from cortexstream.backends.common.draw import draw_rows
from cortexstream.backends.common.kv_format import kv_quantization
from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.common.memory import host_memory_bytes
from cortexstream.backends.common.rows import misformed
from cortexstream.backends.common.score import score_tokens
from cortexstream.backends.reference.attend import Span, StepAttention
from cortexstream.backends.reference.model import Model
from cortexstream.backends.reference.settings import Settings, settings_from
from cortexstream.backends.reference.store import make_store
from cortexstream.errors import EngineError, InvalidRequestError, ModelLoadError
from cortexstream.plan import PENDING, KVRows, PlanRow, RowResult, RowScores, SampleSpec, StepPlan, StepResult

Floats = npt.NDArray[np.float32]

BLOCK_TOKENS = 16
APART = (
    "tokens and logprobs are the same bits in any batch, chunked, preempted or with a prefix hit: every token is "
    "multiplied by itself, and attends by itself to exactly what it sees"
)
TOGETHER = "off: a step's tokens are multiplied together, and how many they are decides how a product rounds"
MAX_IN_FLIGHT = 2  # one plan whose tokens are not read yet, and the one after it


def available() -> str | None:
    """None: numpy is always there."""
    return None


def accelerator() -> str | None:
    """None: this backend runs on the CPU."""
    return None


def create(options: BackendOptions) -> ReferenceBackend:
    """Load the model folder `options.model`. Raises ModelLoadError."""
    if options.model is None:
        raise ModelLoadError("the reference backend needs a model folder; none was given")
    if options.dtype not in ("auto", "float32"):
        raise InvalidRequestError("dtype", f"is {options.dtype!r}; the reference backend computes in float32 only")
    if options.kv_layout not in (None, "run", "paged"):
        raise ModelLoadError(f"kv_layout {options.kv_layout!r} is unknown; use 'run' or 'paged'")
    if options.block_tokens is not None and options.block_tokens < 1:
        raise ModelLoadError(f"block_tokens is {options.block_tokens}; it must be at least 1")
    if options.extra:
        raise ModelLoadError(f"the reference backend has no option {sorted(options.extra)[0]!r}")
    return ReferenceBackend(Path(options.model), options)


class ReferenceTicket(NamedTuple):
    """A computed step that waits to be collected."""

    step: int
    result: StepResult


class LiveRow(NamedTuple):
    """A plan row with its tokens known, and where its tokens stand among all of the step's."""

    row: PlanRow
    tokens: tuple[int, ...]
    where: slice


class ReferenceBackend:
    """See `cortexstream.backend.Backend`. Made by `create`; one thread uses it."""

    def __init__(self, folder: Path, options: BackendOptions) -> None:
        config = read_config(folder)
        settings = settings_from(config)
        apart = options.batch_invariant is not False  # also where that costs much: this backend says what is right
        eos = eos_token_ids(folder, config)
        self._model: Model | None = Model(settings, dense_weights(read_weights(folder), config), apart)
        self.model = _model_info(settings, eos, self._model.weight_bytes, options.kv_dtype)
        self.info = BackendInfo(
            name="reference",
            device="CPU (numpy)",
            kv_layout=options.kv_layout or "paged",
            block_tokens=options.block_tokens or BLOCK_TOKENS,
            memory_bytes=host_memory_bytes(),
            dtype="float32",
            memory_share=0.25,  # the host has other work, too
            batch_invariant=apart,
            invariance=TOGETHER if not apart else APART,
        )
        self._settings = settings
        self._memory: KVMemory | None = None
        self._in_flight: deque[ReferenceTicket] = deque()
        self._last_step: int | None = None
        self._drawn: dict[int, RowResult] = {}  # slot -> what it drew in the plan submitted last, if that was one token

    def allocate_kv(self, num_blocks: int, ring_blocks: tuple[int, ...] = ()) -> int:
        """Make the zero-filled KV pools; returns their bytes. Raises OutOfMemoryBudgetError, EngineError if misused."""
        self._loaded()
        if self._memory is not None:
            raise EngineError(f"the KV memory was allocated already, with {self._memory.num_blocks} blocks")
        blocks = (num_blocks, *ring_blocks)
        self._memory = KVMemory(make_store, self.model, blocks, self.info.block_tokens, host_memory_bytes())
        return self._memory.nbytes

    def submit(self, plan: StepPlan) -> ReferenceTicket:
        """Run the plan. Raises EngineError, before anything is written, for a plan that breaks the contract."""
        self._ready()
        if len(self._in_flight) == MAX_IN_FLIGHT:
            raise EngineError(f"step {plan.step} was submitted while {MAX_IN_FLIGHT} steps wait to be collected")
        if self._last_step is not None and plan.step <= self._last_step:
            raise EngineError(f"step {plan.step} was submitted after step {self._last_step}; steps must rise")
        result = self._run(plan)
        ticket = ReferenceTicket(plan.step, result)
        self._last_step = plan.step
        self._in_flight.append(ticket)
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        """The submitted step's result. Raises EngineError unless `ticket` is the oldest that was not collected."""
        self._loaded()
        if not self._in_flight or self._in_flight[0] is not ticket:
            oldest = f"step {self._in_flight[0].step} is next" if self._in_flight else "no step waits to be collected"
            raise EngineError(f"step {ticket.step} cannot be collected now: {oldest}")
        return self._in_flight.popleft().result

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        """Run a prefill of `prompt_tokens` and one decode step of `batch` rows; overwrites blocks from 0 on."""
        kv, capacity = self._ready().whole()
        if not 1 <= prompt_tokens < capacity or batch < 1:
            raise EngineError(
                f"a warm-up of {prompt_tokens} prompt tokens and {batch} rows needs 1 to {capacity - 1} prompt tokens "
                f"and at least 1 row"
            )
        if self._in_flight:
            raise EngineError(f"warm-up needs an idle backend; step {self._in_flight[0].step} waits to be collected")
        spec = SampleSpec()
        prefill = PlanRow(0, 0, (0,) * prompt_tokens, 0, kv, spec)
        # The rows may share their block: what the tokens are does not matter here.
        decode = [PlanRow(slot, slot, (0,), prompt_tokens, kv, spec) for slot in range(batch)]
        steps = []
        for name, rows in ((f"prefill of {prompt_tokens} tokens", [prefill]), (f"decode of {batch} rows", decode)):
            began_s = time.perf_counter()
            self._run(StepPlan(0, tuple(rows)))
            steps.append((name, time.perf_counter() - began_s))
        return WarmupReport(tuple(steps))

    def reset(self) -> None:
        self._in_flight.clear()
        self._drawn = {}
        if self._memory is not None:
            self._memory.forget()

    def read_kv(self, kv: KVRows, num_tokens: int) -> list[LayerState]:
        """Copies. Raises EngineError when the blocks do not hold so many tokens."""
        return self._ready().read(kv, num_tokens)

    def write_kv(self, kv: KVRows, num_tokens: int, layers: list[LayerState]) -> None:
        """Raises EngineError, before anything is written, for arrays or blocks that do not fit."""
        self._ready().write(kv, num_tokens, layers)

    def memory_addresses(self) -> list[int]:
        return []  # numpy writes in place, always

    def close(self) -> None:
        """Drop weights and KV. Idempotent."""
        self._model = self._memory = None
        self._in_flight.clear()

    def _run(self, plan: StepPlan) -> StepResult:
        """One step: check, moves, forward, draws."""
        memory = self._ready()
        live, failed = self._resolve(plan, memory)
        memory.check_ops(plan.moves)
        swap_s = memory.execute(plan.moves)
        hidden = self._forward(live, memory) if live else np.zeros((0, 0), np.float32)
        drawn = {**self._draw(live, hidden), **{slot: [result] for slot, result in failed.items()}}
        self._drawn = {slot: results[0] for slot, results in drawn.items() if len(results) == 1}
        rows = tuple(result for row in plan.rows if row.sample is not None for result in drawn[row.slot])
        return StepResult(plan.step, rows, swap_s, self._score(live, hidden))

    def _resolve(self, plan: StepPlan, memory: KVMemory) -> tuple[list[LiveRow], dict[int, RowResult]]:
        """Put drawn tokens for PENDING. A row whose last draw failed fails too, and alone; the others are live."""
        slots = [row.slot for row in plan.rows]
        if len(set(slots)) != len(slots):
            raise EngineError(f"step {plan.step} has two rows for one slot: {sorted(slots)}")
        live: list[LiveRow] = []
        failed: dict[int, RowResult] = {}
        end = 0
        for row in plan.rows:
            last = self._pending(row)
            if last is not None and last.error is not None:
                failed[row.slot] = last
                continue
            tokens = row.tokens if last is None else _fill(row.tokens, last.token)
            outside = [token for token in tokens if not 0 <= token < self.model.vocab_size]
            if not tokens or outside:
                raise EngineError(
                    f"row {row.seq_id} feeds {outside or 'no'} tokens; ids are 0 to {self.model.vocab_size - 1}"
                )
            problem = misformed(row, self.model.vocab_size)
            if problem is not None:
                raise EngineError(f"row {row.seq_id} {problem}")
            memory.check_row(row.kv, row.start, len(tokens))
            if last is not None and row.sample is not None:
                spec = row.sample._replace(output_tokens=_fill(row.sample.output_tokens, last.token))
                if PENDING in spec.output_tokens:
                    raise EngineError(f"row {row.seq_id} has a pending output token before the last one")
                row = row._replace(sample=spec)
            live.append(LiveRow(row, tokens, slice(end, end + len(tokens))))
            end += len(tokens)
        return live, failed

    def _pending(self, row: PlanRow) -> RowResult | None:
        """What PENDING stands for in this row; None if it has none."""
        if PENDING not in row.tokens and (row.sample is None or PENDING not in row.sample.output_tokens):
            return None
        result = self._drawn.get(row.slot)
        if result is None or result.seq_id != row.seq_id:
            raise EngineError(
                f"row {row.seq_id} has a pending token, but its slot {row.slot} drew none in the step before"
            )
        return result

    def _forward(self, live: Sequence[LiveRow], memory: KVMemory) -> Floats:
        """All rows' tokens through the model at once; returns the normalised hidden states [N, hidden]."""
        tokens = np.concatenate([np.array(item.tokens) for item in live])
        positions = np.concatenate([item.row.start + np.arange(len(item.tokens)) for item in live])
        spans = [Span(item.row.kv, item.row.start, item.where) for item in live]
        return self._loaded().hidden(tokens, positions, StepAttention(memory, spans, self._settings.head_dim**-0.5))

    def _draw(self, live: Sequence[LiveRow], hidden: Floats) -> dict[int, list[RowResult]]:
        """Slot -> draws, each from one of the row's last tokens."""
        wanted: list[tuple[LiveRow, int, SampleSpec]] = []  # (row, index of the token in the row, how to draw after it)
        for item in live:
            first = len(item.tokens) - len(item.row.draws)
            wanted += [(item, first + i, spec) for i, spec in enumerate(item.row.draws)]
        if not wanted:
            return {}
        logits = self._loaded().logits(hidden[[item.where.start + index for item, index, _ in wanted]])
        positions = [item.row.start + index + 1 for item, index, _ in wanted]
        drawn = draw_rows(logits, [spec for _, _, spec in wanted], positions)
        results: dict[int, list[RowResult]] = {}
        for (item, _, _), draw in zip(wanted, drawn, strict=True):
            results.setdefault(item.row.slot, []).append(RowResult(item.row.seq_id, *draw))
        return results

    def _score(self, live: Sequence[LiveRow], hidden: Floats) -> tuple[RowScores, ...]:
        """Of the rows that ask how likely the prompt's own tokens are."""
        scores = []
        for item in live:
            if item.row.score is not None:
                first = item.where.start
                logits = self._loaded().logits(hidden[first : first + len(item.row.score.targets)])
                scores.append(RowScores(item.row.seq_id, score_tokens(logits, item.row.score)))
        return tuple(scores)

    def _loaded(self) -> Model:
        if self._model is None:
            raise EngineError("the backend is closed")
        return self._model

    def _ready(self) -> KVMemory:
        self._loaded()
        if self._memory is None:
            raise EngineError("allocate_kv must be called before the first plan")
        return self._memory


def _fill(tokens: tuple[int, ...], token: int) -> tuple[int, ...]:
    """`tokens` with a last PENDING replaced."""
    return (*tokens[:-1], token) if tokens and tokens[-1] == PENDING else tokens


def _model_info(settings: Settings, eos: frozenset[int], weight_bytes: int, kv_dtype: str) -> ModelInfo:
    dim = settings.head_dim
    layers = tuple(LayerKV(settings.num_kv_heads, dim, dim, window) for window in settings.windows)
    return ModelInfo(
        architecture=settings.family,
        vocab_size=settings.vocab_size,
        max_context_tokens=settings.max_context_tokens,
        eos_token_ids=eos,
        layers=layers,
        kv_item_bytes=4,
        weight_bytes=weight_bytes,
        kv_quantization=kv_quantization(kv_dtype, layers),
    )
