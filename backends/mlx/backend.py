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
from typing import NamedTuple

import mlx.core as mx

from cortexstream.backend import BackendInfo, BackendOptions, LayerState, WarmupReport
from cortexstream.backends.common.memory import host_memory_bytes
from cortexstream.backends.common.rows import misformed
from cortexstream.backends.mlx import models
from cortexstream.backends.mlx.attention import teach
from cortexstream.backends.mlx.cache import Chunk
from cortexstream.backends.mlx.forward import Forward
from cortexstream.backends.mlx.pool import RowPool
from cortexstream.backends.mlx.probe import find_mode, most_rows, pools_stay, promise, ring_step, trial_row
from cortexstream.backends.mlx.results import Draw, Draws, Scores, draws_of, results_of, scores_of
from cortexstream.backends.mlx.sample import draw
from cortexstream.backends.mlx.transfer import SwapSpace, read_kv, write_kv
from cortexstream.errors import EngineError, InvalidRequestError, ModelLoadError, OutOfMemoryBudgetError
from cortexstream.plan import PENDING, KVRows, PlanRow, StepPlan, StepResult

log = logging.getLogger("cortexstream.backends.mlx")

BLOCK_TOKENS = 16


class MlxTicket(NamedTuple):
    """A step in flight; `found` is None when no row draws."""

    step: int
    draws: tuple[Draw, ...]
    found: Draws | None
    scores: tuple[Scores, ...]
    swap_s: float


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
        model, self.model, self._kv_dtype = models.load(Path(options.model), options.dtype, options.kv_dtype)
        grouped = bool(options.extra.get("group_attention", metal))
        self._forward = Forward(
            model, "ragged" if teach(model) else "gathered", grouped, ring_step(options.batch_invariant, metal, grouped)
        )
        self._ordering_pool = min(self.model.pool_of(layer) for layer in range(len(self.model.layers)))
        self._swapped = SwapSpace()
        self._synchronous = False
        self._pool: RowPool | None = None
        self._running = False  # a launch is in flight
        self._drawn: mx.array | None = None  # tokens of the last plan, and where each slot's is
        self._drawn_rows: dict[int, int] = {}
        self._seen: dict[int, int] = {}  # slot -> what it drew in the plan collected last
        self._last_collected = 0
        device = mx.device_info()
        self.info = BackendInfo(
            name="mlx", kv_layout="run", block_tokens=options.block_tokens or BLOCK_TOKENS,
            device=f"{'Metal' if metal else 'CPU'}, {device['device_name']}", memory_bytes=_free_bytes(metal),
            dtype=str(self._kv_dtype).removeprefix("mlx.core."), memory_share=0.8 if metal else 0.25,
        )  # fmt: skip
        probed = self._forward, self.model, self.info.block_tokens, self._kv_dtype
        self._note(find_mode(*probed))
        holds, sentence = promise(*probed, options.batch_invariant, metal)
        self.info = replace(self.info, batch_invariant=holds, invariance=sentence)

    @property
    def pool(self) -> RowPool:
        if self._pool is None:
            raise EngineError("allocate_kv() must come before the first plan")
        return self._pool

    def allocate_kv(self, num_blocks: int, ring_blocks: tuple[int, ...] = ()) -> int:
        blocks = (num_blocks, *ring_blocks)
        self._check_size(blocks)
        self._pool = self._new_pool(blocks)
        self._synchronous = not pools_stay(self._pool, self.model, self.submit)
        self._finish_trial()
        if self._synchronous:
            self._note("the KV pools moved in the self-test, so steps do not overlap: each waits for the one before")
        return self._pool.nbytes

    def submit(self, plan: StepPlan) -> MlxTicket:
        for row in plan.rows:
            self._check(row)
        swap_s = 0.0
        if plan.moves:
            self._swapped.check(self.pool, plan.moves)
            self._wait()
            swap_s = self._swapped.run(self.pool, plan.moves)
        verified: list[mx.array] = []  # logits of the rows that guess, every token's
        scores: list[Scores] = []
        for row in plan.rows:
            tokens = row.tokens[:-1] if row.sample is not None and not row.drafts else row.tokens
            if row.drafts:
                verified.append(self._verify(row))
            elif tokens:
                scores += self._prefill(row, tokens)
        sampling = [row for row in plan.rows if row.sample is not None and not row.drafts]
        # Sorted by where they lie: neighbours of equal capacity can share one attention call.
        sampling.sort(key=lambda row: self._address(row.kv))
        guessing = [row for row in plan.rows if row.drafts]
        if not sampling and not guessing:
            self._drawn, self._drawn_rows = None, {}
            return MlxTicket(plan.step, (), None, tuple(scores), swap_s)
        found = self._draw(sampling, guessing, verified)
        return MlxTicket(plan.step, _in_order(plan, sampling, guessing), found, tuple(scores), swap_s)

    def collect(self, ticket: MlxTicket) -> StepResult:
        if ticket.step <= self._last_collected:
            raise EngineError(f"step {ticket.step} was collected already")
        self._last_collected = ticket.step
        if ticket.found is None or ticket.found.tokens is self._drawn:  # nothing submitted since has waited for it
            self._wait()
        results = () if ticket.found is None else results_of(ticket.draws, ticket.found, self._seen)
        self._seen = {draw.slot: result.token for draw, result in zip(ticket.draws, results, strict=True)}
        return StepResult(ticket.step, results, ticket.swap_s, tuple(scores.result() for scores in ticket.scores))

    def reset(self) -> None:
        """Forget the plans in flight and the swapped copies. Pools that wait for a computation that cannot be done are
        made anew, empty."""
        self._drawn, self._drawn_rows = None, {}
        self._swapped.clear()
        try:
            self._wait()
            mx.eval(self.pool.arrays)
            mx.synchronize()
        except Exception as error:
            log.warning("the KV pools cannot be computed any more (%s); they are made anew", error)
            blocks = self.pool.num_blocks
            self._running, self._pool = False, None
            self._pool = self._new_pool(blocks)

    def read_kv(self, kv: KVRows, num_tokens: int) -> list[LayerState]:
        self._wait()
        return read_kv(self.pool, kv, num_tokens)

    def write_kv(self, kv: KVRows, num_tokens: int, layers: list[LayerState]) -> None:
        self._wait()
        write_kv(self.pool, kv, num_tokens, layers)

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        """Compile and touch: a prompt chunk of `prompt_tokens`, then decode steps of 1, 2, 4 .. `batch` rows."""
        pool, model = self.pool, self.model
        trials = [
            (
                f"prefill of {prompt_tokens} tokens",
                [trial_row(pool, model, 0, -(-prompt_tokens // pool.block_tokens), (0,) * prompt_tokens)],
            )
        ]
        rows = 1
        while rows <= min(batch, most_rows(pool, model, 1)):
            trials.append((f"decode step of {rows} rows", [trial_row(pool, model, i, 1, (0,)) for i in range(rows)]))
            rows *= 2
        steps = []
        for name, trial in trials:
            started = perf_counter()
            self.submit(StepPlan(0, tuple(trial)))
            self._finish_trial()
            steps.append((name, perf_counter() - started))
        return WarmupReport(tuple(steps))

    def memory_addresses(self) -> list[int]:
        return self.pool.addresses()

    def close(self) -> None:
        if self._pool is not None:
            self._wait()
        self._pool = self._drawn = self._forward.model = None
        self._swapped.clear()
        release_thread()

    def _new_pool(self, num_blocks: tuple[int, ...]) -> RowPool:
        return RowPool(self.model, num_blocks, self.info.block_tokens, self._kv_dtype, self._forward.ring_step)

    def _check_size(self, num_blocks: tuple[int, ...]) -> None:
        """MLX's CPU allocator crashes where it should refuse, so ask first."""
        sizes, block_tokens = self.model.pool_bytes_per_token, self.info.block_tokens
        if len(num_blocks) != len(sizes) or min(num_blocks) < 1:
            raise EngineError(
                f"{num_blocks} KV blocks were asked for; {self.model.architecture} needs {len(sizes)} numbers of at "
                f"least 1: the full-attention layers', then one for each window of {self.model.windows}"
            )
        needed = sum(n * block_tokens * size for n, size in zip(num_blocks, sizes, strict=True))
        asked = " + ".join(map(str, num_blocks))
        if needed > self.info.memory_bytes:
            raise OutOfMemoryBudgetError(
                f"{asked} KV blocks of {block_tokens} tokens take {needed:,} bytes; {self.info.memory_bytes:,} are "
                f"free on {self.info.device}: lower kv_cache_memory or num_kv_blocks"
            )
        if any(num_blocks[self.model.pool_of(number)] * block_tokens * layer.num_kv_heads >= 2**31
               for number, layer in enumerate(self.model.layers)):  # fmt: skip
            raise OutOfMemoryBudgetError(f"{asked} KV blocks have more rows than 32-bit indices reach; ask for fewer")

    def _check(self, row: PlanRow) -> None:
        """Refuse a row that does not fit its own runs, or feeds what was not drawn, before anything is written."""
        problem = self.pool.misfit(row.kv, row.start + len(row.tokens))
        if row.start < 0 or not row.tokens:
            problem = "a row feeds at least one token from position 0 or later"
        elif problem is None and (wrong := misformed(row, self.model.vocab_size)) is not None:
            problem = f"it {wrong}"
        if problem is not None:
            last = row.start + len(row.tokens) - 1
            raise EngineError(f"row of slot {row.slot}, positions {row.start} to {last}: {problem}")
        if row.tokens[-1] == PENDING and row.slot not in self._drawn_rows:
            raise EngineError(f"slot {row.slot} has a pending token but drew none in the plan before")

    def _address(self, kv: KVRows) -> int:
        """Where a sequence lies in the first pool that any layer uses."""
        return (kv, *kv.rings)[self._ordering_pool].blocks[0]

    def _prefill(self, row: PlanRow, tokens: tuple[int, ...]) -> list[Scores]:
        """Write the KV of a prompt chunk. Its logits are computed only if the row scores them: MLX evaluates only what
        is asked for."""
        logits = self._chunk(row, tokens)
        scores = [] if row.score is None else [scores_of(row.seq_id, row.score, logits)]
        self._launch([array for one in scores for array in one.arrays])
        return scores

    def _verify(self, row: PlanRow) -> mx.array:
        """Logits [tokens, vocabulary] of a row that guesses, in a launch of its own: it writes and reads the pools."""
        logits = self._chunk(row, row.tokens).astype(mx.float32)
        self._launch([logits])
        return logits

    def _chunk(self, row: PlanRow, tokens: tuple[int, ...]) -> mx.array:
        chunk = Chunk(self.pool, row.kv, row.start, len(tokens))
        if chunk.needs_read_back:
            self._wait()
            chunk.read_back()
        return self._forward.prefill(chunk, tokens)

    def _draw(self, rows: list[PlanRow], guessing: list[PlanRow], verified: list[mx.array]) -> Draws:
        """The draws of `rows`, from the token that each feeds last, then those of the rows that guess."""
        specs = [row.sample for row in rows if row.sample is not None]
        positions = [row.start + len(row.tokens) for row in rows]
        pending = [self._pending(row) if PENDING in row.tokens[-1:] or spec.penalised else None
                   for row, spec in zip(rows, specs, strict=True)]  # fmt: skip
        parts = verified
        if rows:
            fed = [position - 1 for position in positions]
            parts = [self._forward.decode(self.pool, rows, fed, self._input_tokens(rows)).astype(mx.float32), *verified]
        for row in guessing:
            specs += row.draws
            positions += range(row.start + 1, row.start + len(row.tokens) + 1)
            pending += [None] * len(row.draws)
        logits = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        if any(spec.mask is not None for spec in specs):
            self._launch([logits])  # grammars work while the device does
        found = draws_of(logits, specs, *draw(logits, specs, positions, pending))
        self._launch(found.arrays)
        self._drawn, self._drawn_rows = found.tokens, {row.slot: i for i, row in enumerate(rows)}
        return found

    def _input_tokens(self, rows: list[PlanRow]) -> mx.array:
        """int32 [rows]: what each row feeds; a pending token is read from the draws of the last plan, on the device."""
        last = [row.tokens[-1] for row in rows]
        host = mx.array([max(token, 0) for token in last], dtype=mx.int32)
        if PENDING not in last:
            return host
        places = [self._drawn_rows[row.slot] if token == PENDING else 0 for row, token in zip(rows, last, strict=True)]
        assert self._drawn is not None
        return mx.where(mx.array([t == PENDING for t in last]), self._drawn[mx.array(places)], host)

    def _pending(self, row: PlanRow) -> mx.array | None:
        if self._drawn is None or row.slot not in self._drawn_rows:
            return None
        return self._drawn[self._drawn_rows[row.slot]]

    def _launch(self, outputs: list[mx.array]) -> None:
        """Submit what was built, once what runs is done. The pools are outputs too, or nothing would write them."""
        self._wait()
        mx.async_eval([*outputs, *self.pool.arrays])
        self._running = True
        if self._synchronous:
            self._wait()

    def _wait(self) -> None:
        """Until the launch in flight is done and has let go of the pools."""
        if self._running:
            mx.synchronize()  # not mx.eval: waiting for an array in flight leaves a reference that costs a copy later
            self._running = False

    def _finish_trial(self) -> None:
        """After plans that no scheduler made: wait, and forget what they drew."""
        self._wait()
        self._drawn, self._drawn_rows = None, {}

    def _note(self, note: str | None) -> None:
        """Tell of a fallback."""
        if note is not None:
            log.warning("%s", note)
            self.info = replace(self.info, notes=(*self.info.notes, note))


def release_thread() -> None:
    """Give memory back and, on a thread of ours, its streams: MLX asks for that at the end of every thread that
    computed, and without it a process sometimes aborts at exit (mlx issue 4327). The thread cannot compute afterwards,
    so the main thread, which belongs to the program, keeps its streams."""
    mx.synchronize()
    mx.clear_cache()
    if threading.current_thread() is not threading.main_thread():
        mx.clear_streams()


def _in_order(plan: StepPlan, rows: list[PlanRow], guessing: list[PlanRow]) -> tuple[Draw, ...]:
    """The draws in the order of the plan; their places are `rows`, one each, then those of `guessing`."""
    first: dict[int, int] = {}  # slot -> place of its first draw
    place = 0
    for row in (*rows, *guessing):
        first[row.slot] = place
        place += len(row.draws)
    return tuple(
        Draw(row.seq_id, row.slot, spec, first[row.slot] + i) for row in plan.rows for i, spec in enumerate(row.draws)
    )


def _free_bytes(metal: bool) -> int:
    """Memory left after the weights: of Metal's recommended working set, or of the host."""
    if metal:
        return int(mx.device_info()["max_recommended_working_set_size"]) - int(mx.get_active_memory())
    return host_memory_bytes()
