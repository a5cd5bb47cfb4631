"""One engine without a thread of its own: budget, arena, scheduler and backend joined by `step`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from time import perf_counter

from cortexstream.backend import Backend, Ticket, WarmupReport
from cortexstream.config import EngineConfig
from cortexstream.engine.budget import kv_size, limits_of, swap_budget_bytes
from cortexstream.engine.stats import EngineStats
from cortexstream.errors import EngineError, ModelLoadError
from cortexstream.kv import KVArena
from cortexstream.plan import PENDING, PlanRow, StepPlan, StepResult, SwapIn, SwapOut
from cortexstream.request import FinishReason, Request
from cortexstream.scheduler import Scheduler, TokenEvent
from cortexstream.speculation import Drafter
from cortexstream.swap import SwapPolicy

log = logging.getLogger("cortexstream.engine")

HEADROOM_TOKENS = 128  # of a run, while memory is plentiful: most answers then never outgrow their blocks

Sink = Callable[[TokenEvent], bool]
"""Takes every event of one request, on the engine's thread, in order; the last has `finish`. Returning True ends the
request at once with FinishReason.STOP, and no further event follows. A sink that raises fails its own request only."""


class EngineCore:
    """Add requests, call `step` until `has_work` is False. Use from one thread: the backend's.

    One plan is in flight: `step` submits plan t+1 before it reads the tokens of plan t, so the device works while the
    host appends, detokenises and schedules. A sequence that turns out to have ended costs one row of the next step.
    While a sequence runs whose rows depend on what it drew (a grammar, guesses) the tokens of plan t are read first.
    """

    def __init__(self, backend: Backend, config: EngineConfig, drafter: Drafter | None = None) -> None:
        self.backend = backend
        foreign = [token for token in backend.model.eos_token_ids if not 0 <= token < backend.model.vocab_size]
        if foreign:
            raise ModelLoadError(
                f"eos_token_id {foreign[0]} is outside the vocabulary, 0 to {backend.model.vocab_size - 1}; "
                "mend generation_config.json or config.json"
            )
        size = kv_size(backend, config)
        self.kv_bytes = backend.allocate_kv(size.num_blocks, tuple(ring.num_blocks for ring in size.rings))
        self.arena = KVArena(
            size.num_blocks, backend.info.block_tokens, backend.info.kv_layout, policy=config.kv_policy,
            rings=size.rings, prefix_caching=config.enable_prefix_caching, headroom_tokens=HEADROOM_TOKENS,
        )  # fmt: skip
        self.notes: tuple[str, ...] = ()
        if config.enable_prefix_caching and not self.arena.prefix_caching:
            self._note("prefixes are not reused: this model's sliding windows are kept in rings of pages")
        if config.batch_invariant and not backend.info.batch_invariant:
            self._note(f"batch_invariant was asked for and cannot be had: {backend.info.invariance}")
        self.limits = limits_of(backend, config, self.arena)
        self.swap = SwapPolicy(
            backend.model, backend.info.block_tokens, swap_budget_bytes(config, self.kv_bytes), config.preemption_mode
        )
        self.scheduler = Scheduler(self.arena, self.limits, self.swap, drafter=drafter)
        self.kv_bytes += 0 if drafter is None else drafter.kv_bytes
        self._sinks: dict[int, Sink] = {}
        self._ticket: Ticket | None = None
        self.failed_steps = 0  # on the device; what ran then has ended with an error
        self._steps = self._prompt_tokens = self._output_tokens = self._finished = self._failed = 0
        self._host_s = self._backend_s = 0.0
        self._swap_bytes: dict[int, int] = {}  # step in flight -> bytes that it swaps

    def _note(self, note: str) -> None:
        """Tell of a fallback."""
        log.warning("%s", note)
        self.notes += (note,)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request, sink: Sink) -> None:
        """Queue a request. Raises InvalidRequestError, and keeps nothing, if it can never be served."""
        self.scheduler.add(request)
        self._sinks[request.id] = sink

    def abort(self, request_id: int) -> None:
        """End a request with FinishReason.ABORT; unknown and finished ones are left alone."""
        event = self.scheduler.abort(request_id)
        if event is not None:
            self._deliver([event])

    def step(self) -> None:
        """Plan and submit a step, then collect and commit the one before."""
        started = perf_counter()
        in_backend = 0.0
        prompt_tokens = self._prompt_tokens
        try:
            if self._ticket is not None and self.scheduler.waits_for_draws:
                last, self._ticket = self._ticket, None
                drawn = self.backend.collect(last)
                in_backend = perf_counter() - started
                self._commit(drawn)
            plan = self.scheduler.plan()
            entered = perf_counter()
            ticket = self.backend.submit(plan) if plan is not None else None
            result = self.backend.collect(self._ticket) if self._ticket is not None else None
            in_backend += perf_counter() - entered
            self._ticket = ticket
            if plan is not None:
                self._count(plan)
            self.swap.observe_step(self._prompt_tokens - prompt_tokens, in_backend)
            if result is not None:
                self._commit(result)
        except Exception as error:
            self._recover(error)
        self._host_s += perf_counter() - started - in_backend
        self._backend_s += in_backend

    def settle(self) -> None:
        """Collect and commit what is in flight."""
        ticket, self._ticket = self._ticket, None
        if ticket is None:
            return
        try:
            self._commit(self.backend.collect(ticket))
        except Exception as error:
            self._recover(error)

    def _commit(self, result: StepResult) -> None:
        self.swap.observe_swap(self._swap_bytes.pop(result.step, 0), result.swap_s)
        self._deliver(self.scheduler.commit(result))

    def run_alone(self, rows: Iterable[PlanRow]) -> None:
        """A step of these rows, none of which draws, with the copies that wait; nothing may be in flight. Raises
        EngineError if the device fails; every running request then ends with that error."""
        plan = self.scheduler.private_plan(rows)
        if not plan.rows and not plan.moves:
            return
        try:
            self.backend.collect(self.backend.submit(plan))
        except Exception as error:
            self._recover(error, private=True)
            raise EngineError(f"the step failed: {error}") from error

    def _recover(self, error: Exception, private: bool = False) -> None:
        """After a failed step the device's state is unknown: nothing in flight can be trusted, but the next request can
        be served."""
        log.error("a step failed; every running request ends with an error", exc_info=error)
        self.failed_steps += 1
        self._ticket = None
        self._swap_bytes.clear()
        self._deliver(self.scheduler.abort_running(f"the step failed: {error}", private))
        self.backend.reset()

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.has_work:
            self.step()

    def fail_all(self, error: str) -> None:
        """End every request with an error, whatever state the scheduler is in."""
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            self._last_words(sink, request_id, error)
        self._finished += len(sinks)
        self._failed += len(sinks)
        self.scheduler.abort_all(error)

    def stats(self) -> EngineStats:
        guesses = self.scheduler.speculation
        draft_s = 0.0 if guesses is None else guesses.seconds
        counted = () if guesses is None else (guesses.rows, guesses.drafted_tokens, guesses.accepted_tokens, draft_s)
        return EngineStats(
            self._steps, self._prompt_tokens, self._output_tokens, self._finished, self._failed,
            self.scheduler.preemptions, self.scheduler.swaps, self.scheduler.num_waiting, self.scheduler.num_running,
            self._host_s - draft_s, self._backend_s, self._moved_bytes(), self.arena.stats(), *counted,
        )  # fmt: skip

    def check(self) -> None:
        """Prove the arena's invariants, and that nothing is held when nothing runs."""
        self.arena.check()
        if not self.has_work and self.arena.used_blocks:
            raise EngineError(f"{self.arena.used_blocks} blocks are held by no request")

    def close(self) -> None:
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.drafter.close()
        self.backend.close()

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        """The backend's warm-up, which writes to blocks that may hold kept prefixes: those are forgotten."""
        if self.has_work:
            raise EngineError("warmup needs an idle engine; requests are running")
        self.arena.clear()
        report = self.backend.warmup(prompt_tokens, batch)
        if self.scheduler.speculation is None:
            return report
        return WarmupReport(report.steps + self.scheduler.speculation.drafter.warmup(prompt_tokens, batch).steps)

    def _moved_bytes(self) -> int:
        stats, sizes = self.arena.stats(), self.backend.model.pool_bytes_per_token
        tokens = zip(stats.moved_by_pool, stats.copied_by_pool, sizes, strict=True)
        return sum((moved + copied) * size for moved, copied, size in tokens)

    def _count(self, plan: StepPlan) -> None:
        self._steps += 1
        swaps = [op.num_tokens for op in plan.moves if isinstance(op, (SwapOut, SwapIn))]
        if swaps:
            self._swap_bytes[plan.step] = sum(map(self.swap.bytes_of, swaps))
        for row in plan.rows:
            if row.tokens[0] != PENDING and (sequence := self.scheduler.get(row.seq_id)) is not None:
                self._prompt_tokens += max(0, min(row.start + len(row.tokens), sequence.num_prompt) - row.start)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            sink = self._sinks.get(event.request_id)
            if sink is None:  # a receiver called `abort` for this request while it took an earlier event
                continue
            if event.token is not None:
                self._output_tokens += 1
            stop, finish = False, event.finish
            try:
                stop = sink(event)
            except BaseException as error:  # SystemExit too: it would end this thread, and everybody's requests with it
                log.exception("the receiver of request %d raised; the request ends", event.request_id)
                if finish is None and event.request_id in self._sinks:
                    self.scheduler.abort(event.request_id, FinishReason.ERROR)
                    finish = FinishReason.ERROR
                    self._last_words(sink, event.request_id, f"the receiver of its tokens raised {error!r}")
            if stop and finish is None and event.request_id in self._sinks:
                self.scheduler.abort(event.request_id, FinishReason.STOP)
                finish = FinishReason.STOP
            if finish is not None:
                self._finished += 1
                self._failed += finish is FinishReason.ERROR
                del self._sinks[event.request_id]

    def _last_words(self, sink: Sink, request_id: int, error: str) -> None:
        """Tell a receiver that raised that its request has ended, so that nobody waits for it for ever."""
        try:
            sink(TokenEvent(request_id, None, None, (), FinishReason.ERROR, error))
        except BaseException:
            log.exception("the receiver of request %d raised again at its end", request_id)
