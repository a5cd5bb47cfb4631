"""Plans in, tokens out, through mlx-lm's models.

A step is a row of launches: one per prompt chunk (whose logits nobody needs), then one for all rows of one token,
which are the decoding sequences and the last tokens of prompts. Launches are *guarded*: the graph of the next is
built while the last one runs, but it is submitted only when that is done, so that MLX can write every pool in place.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import mlx.core as mx

from cortexstream.backend import BackendInfo, BackendOptions, WarmupReport
from cortexstream.backends.common.memory import host_memory_bytes
from cortexstream.backends.mlx import models
from cortexstream.backends.mlx.attention import RaggedNotPossible, teach
from cortexstream.backends.mlx.cache import Batch, Chunk
from cortexstream.backends.mlx.pool import RowPool, Span
from cortexstream.backends.mlx.sample import log_softmax, sample
from cortexstream.errors import EngineError, InvalidRequestError, ModelLoadError, OutOfMemoryBudgetError
from cortexstream.plan import PENDING, KVRows, PlanRow, RowResult, SampleSpec, StepPlan, StepResult

log = logging.getLogger("cortexstream.backends.mlx")

BLOCK_TOKENS = 16
PROBE_TOLERANCE = 1e-3  # of the largest logit: separates a wrong mask or position from rounding in half precision
PROBE_TOKENS = (3, 18)  # unlike lengths, neither a multiple of anything
SELF_TEST_STEPS = 3


class MlxTicket(NamedTuple):
    """A step in flight. Arrays are None when no row draws; `order` maps sampling rows to rows of the arrays."""

    step: int
    rows: tuple[PlanRow, ...]
    order: list[int]
    tokens: mx.array | None
    broken: mx.array | None  # bool: nothing can be drawn from the row's logits
    logprobs: mx.array | None  # float32 [rows, vocabulary], if any row asked for them


class MlxBackend:
    """See the module's docstring. Option in `extra`: group_attention (bool, by default on a GPU only)."""

    def __init__(self, options: BackendOptions) -> None:
        if options.kv_layout == "paged":
            raise InvalidRequestError("kv_layout", "is 'paged'; the mlx backend's attention needs 'run'")
        if options.dtype not in ("auto", *models.DTYPES):
            raise InvalidRequestError("dtype", f"is {options.dtype!r}; must be auto, {', '.join(models.DTYPES)}")
        if options.model is None:
            raise ModelLoadError("model: the mlx backend needs a folder")
        unknown = sorted(set(options.extra) - {"group_attention"})
        if unknown:
            raise InvalidRequestError("backend_options", f"has {unknown[0]!r}; the mlx backend knows group_attention")
        metal = mx.metal.is_available()
        self._model, self.model, self._kv_dtype = models.load(Path(options.model), options.dtype)
        self._grouped = bool(options.extra.get("group_attention", metal))
        self._mode = "ragged" if teach(self._model) else "gathered"
        self._synchronous = False
        self._pool: RowPool | None = None
        self._running = False  # a launch is in flight
        self._drawn: mx.array | None = None  # tokens of the last plan, and where each slot's is
        self._drawn_rows: dict[int, int] = {}
        self._last_collected = 0
        device = mx.device_info()
        self.info = BackendInfo(
            name="mlx", kv_layout="run", block_tokens=options.block_tokens or BLOCK_TOKENS,
            device=f"{'Metal' if metal else 'CPU'}, {device['device_name']}", memory_bytes=_free_bytes(metal),
            dtype=str(self._kv_dtype).removeprefix("mlx.core."), memory_share=0.8 if metal else 0.25,
        )  # fmt: skip
        self._probe()

    @property
    def pool(self) -> RowPool:
        if self._pool is None:
            raise EngineError("allocate_kv() must come before the first plan")
        return self._pool

    def allocate_kv(self, num_blocks: int) -> int:
        self._check_size(num_blocks)
        self._pool = RowPool(self.model.layers, num_blocks, self.info.block_tokens, self._kv_dtype)
        self._self_test(num_blocks)
        return self._pool.nbytes

    def submit(self, plan: StepPlan) -> MlxTicket:
        for row in plan.rows:
            self._check(row)
        if plan.moves:
            self._wait()
            for move in plan.moves:
                self.pool.move(move)
        for row in plan.rows:
            tokens = row.tokens[:-1] if row.sample is not None else row.tokens
            if tokens:
                self._prefill(row, tokens)
        sampling = [row for row in plan.rows if row.sample is not None]
        if not sampling:
            self._drawn, self._drawn_rows = None, {}
            return MlxTicket(plan.step, plan.rows, [], None, None, None)
        # Sorted by where they lie: neighbours of equal capacity can share one attention call.
        by_place = sorted(range(len(sampling)), key=lambda i: sampling[i].kv.blocks[0])
        order = sorted(range(len(sampling)), key=by_place.__getitem__)
        return self._decode(plan, [sampling[i] for i in by_place], order)

    def collect(self, ticket: MlxTicket) -> StepResult:
        if ticket.step <= self._last_collected:
            raise EngineError(f"step {ticket.step} was collected already")
        self._last_collected = ticket.step
        if ticket.tokens is self._drawn:  # nothing was submitted since, so nothing has waited for it yet
            self._wait()
        if ticket.tokens is None or ticket.broken is None:
            return StepResult(ticket.step, ())
        tokens: Any = ticket.tokens.tolist()
        broken: Any = ticket.broken.tolist()
        sampling = [row for row in ticket.rows if row.sample is not None]
        results = []
        for row, place in zip(sampling, ticket.order, strict=True):
            if broken[place]:
                results.append(RowResult(row.seq_id, 0, error=BROKEN))
            else:
                results.append(_result(row, tokens[place], ticket.logprobs, place))
        return StepResult(ticket.step, tuple(results))

    def reset(self) -> None:
        """Forget the plans in flight. Pools that wait for a computation that cannot be done are made anew, empty."""
        self._drawn, self._drawn_rows = None, {}
        try:
            self._wait()
            mx.eval(self.pool.keys, self.pool.values)
            mx.synchronize()
        except Exception as error:
            log.warning("the KV pools cannot be computed any more (%s); they are made anew", error)
            blocks = self.pool.num_tokens // self.info.block_tokens
            self._running, self._pool = False, None
            self._pool = RowPool(self.model.layers, blocks, self.info.block_tokens, self._kv_dtype)

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        """Compile and touch: a prompt chunk of `prompt_tokens`, then decode steps of 1, 2, 4 .. `batch` rows."""
        pool_blocks = self.pool.num_tokens // self.info.block_tokens
        blocks = -(-prompt_tokens // self.info.block_tokens)
        steps: list[tuple[str, float]] = []
        started = perf_counter()
        self._run_alone([self._warm_row(0, blocks, (0,) * prompt_tokens)])
        steps.append((f"prefill of {prompt_tokens} tokens", perf_counter() - started))
        rows = 1
        while rows <= min(batch, pool_blocks):
            started = perf_counter()
            self._run_alone([self._warm_row(i, 1, (0,)) for i in range(rows)])
            steps.append((f"decode step of {rows} rows", perf_counter() - started))
            rows *= 2
        return WarmupReport(tuple(steps))

    def memory_addresses(self) -> list[int]:
        return self.pool.addresses()

    def close(self) -> None:
        if self._pool is not None:
            self._wait()
        self._pool = self._drawn = self._model = None
        release_thread()

    def _check_size(self, num_blocks: int) -> None:
        """MLX's CPU allocator crashes where it should refuse, so ask first."""
        tokens = num_blocks * self.info.block_tokens
        needed, free = tokens * self.model.kv_bytes_per_token, self.info.memory_bytes
        if needed > free:
            raise OutOfMemoryBudgetError(
                f"{num_blocks} KV blocks of {self.info.block_tokens} tokens take {needed:,} bytes; {free:,} are free "
                f"on {self.info.device}: lower kv_cache_memory or num_kv_blocks"
            )
        if tokens * max(layer.num_kv_heads for layer in self.model.layers) >= 2**31:
            raise OutOfMemoryBudgetError(
                f"{num_blocks} KV blocks have more rows than 32-bit indices reach; ask for fewer"
            )

    def _check(self, row: PlanRow) -> None:
        """MLX writes wherever an index points, outside the pool too: refuse a row that does not fit its own run."""
        capacity = len(row.kv.blocks) * self.info.block_tokens
        last = (row.kv.blocks[0] * self.info.block_tokens + capacity) if row.kv.blocks else 0
        if (
            not row.kv.contiguous
            or not 0 < last <= self.pool.num_tokens
            or not 0 <= row.start <= capacity - len(row.tokens)
        ):
            raise EngineError(
                f"row of slot {row.slot}: positions {row.start} to {row.start + len(row.tokens) - 1} do not fit a run "
                f"of {capacity} tokens inside the pool's {self.pool.num_tokens}"
            )

    def _prefill(self, row: PlanRow, tokens: tuple[int, ...]) -> None:
        """Write the KV of a prompt chunk. Its logits are never computed: MLX evaluates only what is asked for."""
        chunk = Chunk(self.pool, Span.of(row.kv, self.info.block_tokens), row.start, len(tokens))
        self._model(mx.array([tokens], dtype=mx.int32), cache=chunk.caches())
        self._launch([])

    def _decode(self, plan: StepPlan, rows: list[PlanRow], order: list[int]) -> MlxTicket:
        positions = [row.start + len(row.tokens) - 1 for row in rows]
        specs = [row.sample for row in rows if row.sample is not None]
        pending = [self._pending(row) if PENDING in row.tokens[-1:] or spec.penalised else None
                   for row, spec in zip(rows, specs, strict=True)]  # fmt: skip
        tokens = self._input_tokens(rows)
        logits = self._forward(self.pool, rows, positions, tokens).astype(mx.float32)
        drawn = sample(logits, specs, [p + 1 for p in positions], pending)
        usable = mx.isfinite(mx.max(_bannable(logits, specs), axis=-1))  # a NaN is the maximum of its row
        wants = any(spec.logprobs is not None for spec in specs)
        logprobs = log_softmax(logits) if wants else None
        broken = ~usable
        self._launch([drawn, broken, *([] if logprobs is None else [logprobs])])
        self._drawn, self._drawn_rows = drawn, {row.slot: i for i, row in enumerate(rows)}
        return MlxTicket(plan.step, plan.rows, order, drawn, broken, logprobs)

    def _forward(self, pool: RowPool, rows: list[PlanRow], positions: list[int], tokens: mx.array) -> mx.array:
        """Logits [rows, vocabulary] of one token per row, by the fastest way that this model has proved to allow."""
        spans = [Span.of(row.kv, self.info.block_tokens) for row in rows]
        if len(rows) == 1:
            only: mx.array = self._model(tokens[:, None], cache=Chunk(pool, spans[0], positions[0], 1).caches())[:, -1]
            return only
        if self._mode == "single":
            return self._one_by_one(pool, spans, positions, tokens)
        batch = Batch(pool, spans, positions, self._mode == "ragged", self._grouped)
        result: mx.array = self._model(tokens[:, None], cache=batch.caches())[:, -1]
        return result

    def _one_by_one(self, pool: RowPool, spans: list[Span], positions: list[int], tokens: mx.array) -> mx.array:
        """A forward pass per row, each finished before the next writes: two writes with a read between, in one
        evaluation, would copy the pools."""
        logits = []
        for row, (span, position) in enumerate(zip(spans, positions, strict=True)):
            self._wait()
            logits.append(
                self._model(tokens[row : row + 1, None], cache=Chunk(pool, span, position, 1).caches())[:, -1]
            )
            mx.async_eval(logits[-1], *pool.keys, *pool.values)
            mx.synchronize()
        return mx.concatenate(logits)

    def _input_tokens(self, rows: list[PlanRow]) -> mx.array:
        """int32 [rows]: what each row feeds; a pending token is read from the draws of the last plan, on the device."""
        last = [row.tokens[-1] for row in rows]
        host = mx.array([max(token, 0) for token in last], dtype=mx.int32)
        if PENDING not in last:
            return host
        places = [self._place(row) if token == PENDING else 0 for row, token in zip(rows, last, strict=True)]
        assert self._drawn is not None
        return mx.where(mx.array([t == PENDING for t in last]), self._drawn[mx.array(places)], host)

    def _pending(self, row: PlanRow) -> mx.array | None:
        if self._drawn is None or row.slot not in self._drawn_rows:
            return None
        return self._drawn[self._drawn_rows[row.slot]]

    def _place(self, row: PlanRow) -> int:
        if row.slot not in self._drawn_rows:
            raise EngineError(f"slot {row.slot} has a pending token but drew none in the plan before")
        return self._drawn_rows[row.slot]

    def _launch(self, outputs: list[mx.array]) -> None:
        """Submit what was built, once what runs is done. The pools are outputs too, or nothing would write them."""
        self._wait()
        mx.async_eval([*outputs, *self.pool.keys, *self.pool.values])
        self._running = True
        if self._synchronous:
            self._wait()

    def _wait(self) -> None:
        """Until the launch in flight is done and has let go of the pools."""
        if self._running:
            mx.synchronize()  # not mx.eval: waiting for an array in flight leaves a reference that costs a copy later
            self._running = False

    def _probe(self) -> None:
        """Find how a batch can be decoded by running two rows together and apart, on a scratch pool.

        The first way that gives the single rows' logits is kept: separate views, padded copies, or one row at a time.
        """
        blocks = -(-(max(PROBE_TOKENS) + 1) // self.info.block_tokens)
        rows = [
            PlanRow(i, i, (1,), length, KVRows(tuple(range(i * blocks, (i + 1) * blocks)), True), None)
            for i, length in enumerate(PROBE_TOKENS)
        ]
        vocab = self.model.vocab_size
        wanted = self._mode
        for mode in ("single", *(["ragged"] if wanted == "ragged" else []), "gathered"):
            self._mode = mode
            try:
                logits = self._probe_logits(rows, vocab)
            except Exception as error:
                if mode == "single":
                    raise ModelLoadError(f"{self.model.architecture}: one row cannot be decoded: {error}") from error
                reason = str(error) if isinstance(error, RaggedNotPossible) else f"{type(error).__name__}: {error}"
                log.info("%s: %s decoding is not possible: %s", self.model.architecture, mode, reason)
                continue
            if mode == "single":
                expected = logits
            elif mx.all(mx.abs(logits - expected) <= PROBE_TOLERANCE * mx.max(mx.abs(expected))).item():
                break
        else:
            self._mode = "single"
        if self._mode != "ragged":
            how = "from padded copies of the KV" if self._mode == "gathered" else "one row at a time"
            note = f"{self.model.architecture} is decoded {how}: its attention cannot follow separate views"
            log.warning("%s", note)
            self.info = replace(self.info, notes=(*self.info.notes, note))

    def _probe_logits(self, rows: list[PlanRow], vocab: int) -> mx.array:
        blocks = sum(len(row.kv.blocks) for row in rows)
        pool = RowPool(self.model.layers, blocks, self.info.block_tokens, self._kv_dtype)
        for row in rows:
            chunk = Chunk(pool, Span.of(row.kv, self.info.block_tokens), 0, row.start)
            self._model(mx.array([[(7 * i + 3) % vocab for i in range(row.start)]]), cache=chunk.caches())
            mx.eval(pool.keys, pool.values)
        logits = self._forward(pool, rows, [row.start for row in rows], mx.array([5 % vocab, 6 % vocab]))
        mx.eval(logits)
        return logits.astype(mx.float32)

    def _self_test(self, num_blocks: int) -> None:
        """Do the pools stay where they are over a few overlapping steps? If not, overlap costs a copy of every pool."""
        before = self.pool.addresses()
        each = -(-SELF_TEST_STEPS // self.info.block_tokens)
        for step in range(min(SELF_TEST_STEPS, self.pool.num_tokens)):
            rows = [
                self._warm_row(i, min(each, num_blocks), (PENDING if step else 0,), step)
                for i in range(min(2, max(1, num_blocks // each)))
            ]
            self.submit(StepPlan(step, tuple(rows)))
        self._wait()
        self._drawn, self._drawn_rows = None, {}
        if self.pool.addresses() != before:
            self._synchronous = True
            note = "the KV pools moved in the self-test, so steps do not overlap: every step waits for the one before"
            log.warning("%s", note)
            self.info = replace(self.info, notes=(*self.info.notes, note))

    def _run_alone(self, rows: list[PlanRow]) -> None:
        self.submit(StepPlan(0, tuple(rows)))
        self._wait()
        self._drawn, self._drawn_rows = None, {}

    def _warm_row(self, slot: int, blocks: int, tokens: tuple[int, ...], start: int = 0) -> PlanRow:
        first = slot * blocks
        return PlanRow(slot, slot, tokens, start, KVRows(tuple(range(first, first + blocks)), True), SampleSpec())


def release_thread() -> None:
    """Give memory back and, on a thread of ours, its streams: MLX asks for that at the end of every thread that
    computed, and without it a process sometimes aborts at exit (mlx issue 4327). The thread cannot compute afterwards,
    so the main thread, which belongs to the program, keeps its streams."""
    mx.synchronize()
    mx.clear_cache()
    if threading.current_thread() is not threading.main_thread():
        mx.clear_streams()


BROKEN = "no token can be drawn: the logits hold NaN or +inf, or every token is banned; the model may be broken"


def _bannable(logits: mx.array, specs: list[SampleSpec]) -> mx.array:
    """Logits with banned tokens at -inf: a row of nothing but bans has no finite maximum."""
    if not any(spec.banned for spec in specs):
        return logits
    hit = mx.zeros(logits.shape, mx.bool_)
    pairs = [(row, token) for row, spec in enumerate(specs) for token in spec.banned]
    hit[mx.array([p[0] for p in pairs]), mx.array([p[1] for p in pairs])] = True
    return mx.where(hit, -mx.inf, logits)


def _result(row: PlanRow, token: int, logprobs: mx.array | None, place: int) -> RowResult:
    assert row.sample is not None
    count = row.sample.logprobs
    if count is None or logprobs is None:
        return RowResult(row.seq_id, token)
    values = logprobs[place]
    top: tuple[tuple[int, float], ...] = ()
    if count:
        # A few more than asked for, so that ties at the border go to the lowest ids as the definition says.
        ids = mx.argpartition(-values, min(2 * count, values.size - 1))[: 2 * count + 1]
        pairs = list(zip(ids.tolist(), values[ids].tolist(), strict=True))
        top = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count])
    return RowResult(row.seq_id, token, float(values[token].item()), top)


def _free_bytes(metal: bool) -> int:
    """Memory left after the weights: of Metal's recommended working set, or of the host."""
    if metal:
        return int(mx.device_info()["max_recommended_working_set_size"]) - int(mx.get_active_memory())
    return host_memory_bytes()
