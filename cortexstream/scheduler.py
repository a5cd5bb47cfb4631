"""Who runs in the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from cortexstream.errors import ArenaFullError, EngineError, InvalidRequestError
from cortexstream.kv import KVArena, KVHandle
from cortexstream.kv.prefix import common_prefix
from cortexstream.limits import Limits, check_request, limit_tokens
from cortexstream.outputs import TokenMetadata
from cortexstream.plan import PlanRow, RowResult, StepPlan, StepResult, TokenScore
from cortexstream.request import FinishReason, Request
from cortexstream.sequence import Sequence
from cortexstream.speculation import Drafter, Speculation, accepted
from cortexstream.swap import SwapPolicy

SPARE = 0.02
"""Share of the blocks that an admission leaves to those that run. Measured on one trace (docs/log.md, "What fits"): it
costs 2 % of the sequences that run at once and saves every preemption and six of seven copied tokens."""


class TokenEvent(NamedTuple):
    """One token of one request, or its end, or both. `token` is None when a request ends without drawing one."""

    request_id: int
    token: int | None
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish: FinishReason | None
    error: str | None = None
    num_cached_tokens: int = 0  # of the prompt: not computed for this request, because they were for another
    stops: bool = False  # `token` ends the text and is no part of it
    metadata: TokenMetadata | None = None
    prompt_scores: tuple[TokenScore, ...] | None = None  # of the prompt from its second token on, if asked for


class InFlight(NamedTuple):
    """A planned step whose result is not known."""

    step: int
    drawing: list[Sequence]  # in the order of its rows
    drafts: dict[int, tuple[int, ...]]  # what the rows of some of them guess, by their ids
    scored: list[tuple[Sequence, int]]  # of which prompt logprobs come, and where their rows start


class Scheduler:
    """Continuous batching, first come first served, with chunked prefill under a token budget.

    Every step holds one token of each sequence that is decoding, then chunks of prompts, oldest first, as the budget
    allows. When the arena is full the youngest sequence gives its blocks up and goes back to the head of the queue; it
    is computed again, or brought back from host memory if `swap` says so, once another has finished, and draws the same
    tokens. What was computed for one sequence serves all that begin alike; one whose beginning is being computed for
    another waits for that. `plan` may be called while one earlier plan is not committed yet, but not while
    `waits_for_draws`.

    With a `drafter`, decoding sequences guess ahead as far as tokens of the step and blocks are to spare: guesses delay
    no prompt and preempt nobody.
    """

    def __init__(
        self, arena: KVArena, limits: Limits, swap: SwapPolicy | None = None, spare: float = SPARE,
        drafter: Drafter | None = None,
    ) -> None:  # fmt: skip
        self.arena = arena
        self.limits = limits
        self.swap = swap
        self._spare_blocks = int(arena.num_blocks * spare)
        self.preemptions = 0
        self.swaps = 0  # of those, by copying to host memory
        self.speculation = None if drafter is None else Speculation(drafter, arena)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self._by_id: dict[int, Sequence] = {}
        self._slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._in_flight: deque[InFlight] = deque()
        self._dependent = 0  # sequences, waiting ones too, whose next row depends on what they drew
        self._step = 0
        self._refused = (-1, -1)  # who did not fit, and the state of the arena then
        self._hold = False  # no admissions: a sequence was preempted and none has finished since

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._in_flight)

    @property
    def waits_for_draws(self) -> bool:
        """A sequence is in flight whose next row depends on what it draws: commit before the next plan."""
        return self._dependent > 0 and any(s.waits_for_draws for step in self._in_flight for s in step.drawing)

    def get(self, request_id: int) -> Sequence | None:
        """The sequence of a request that is waiting or running; None when it is unknown or finished."""
        return self._by_id.get(request_id)

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError, and keeps nothing, if it can never be served."""
        if request.id in self._by_id:
            raise InvalidRequestError("request_id", f"{request.id} is in use by a request that is not finished")
        check_request(request, self.limits)
        limits, guesses = self.limits, self.speculation is not None
        most = limit_tokens(request, limits)
        sequence = Sequence(request, most, limits.eos_token_ids, limits.vocab_size, guesses)
        self._by_id[request.id] = sequence
        self._dependent += sequence.waits_for_draws
        self._waiting.append(sequence)

    def abort(self, request_id: int, reason: FinishReason = FinishReason.ABORT) -> TokenEvent | None:
        """End a request now; its blocks are free at once. None if it is unknown or finished already."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return None
        self._finish(sequence, reason)
        return TokenEvent(request_id, None, None, (), reason)

    def abort_running(self, error: str, private: bool = False) -> list[TokenEvent]:
        """After a failed step: end what has KV or a token on its way, forget the plans in flight, keep the queue.

        When nothing of the kind is there, the fault is not the device's, and every request ends; but not if the step
        was a `private` one, which is nobody's.
        """
        touched = [s for s in self._by_id.values() if s.handle is not None or s.draws_pending]
        return self._abort(touched, error) if touched or private else self.abort_all(error)

    def abort_all(self, error: str) -> list[TokenEvent]:
        """End every request with an error and forget the plans in flight."""
        return self._abort(list(self._by_id.values()), error)

    def _abort(self, sequences: list[Sequence], error: str) -> list[TokenEvent]:
        self._in_flight.clear()
        events = []
        for sequence in sequences:
            self._finish(sequence, FinishReason.ERROR)
            events.append(TokenEvent(sequence.request.id, None, None, (), FinishReason.ERROR, error))
        for sequence in self._waiting:
            self._forget_swapped(sequence)
        self.arena.lose()
        return events

    def plan(self) -> StepPlan | None:
        """Decide one step; None when there is nothing to do. Moves memory, but adds no token to a sequence.

        All memory is settled first, because a compaction may move any sequence; rows are written down after that.
        """
        if len(self._in_flight) > 1:
            raise EngineError("two plans are in flight already; commit the older one first")
        if self.waits_for_draws:
            raise EngineError(f"step {self._in_flight[0].step} must be committed first: what follows depends on it")
        self._grow_running()
        self._admit_waiting()
        decoding, prefilling = self._due()
        budget = self.limits.max_batched_tokens
        drafts: dict[int, tuple[int, ...]] = {}
        if self.speculation is not None:
            spare = budget - len(decoding) - sum(s.num_tokens - s.num_computed for s in prefilling)
            drafts = self.speculation.guess(decoding, spare)
        rows = [s.guessing_row(drafts[s.id]) if s.id in drafts else s.next_row(1) for s in decoding]
        budget -= len(rows) + sum(map(len, drafts.values()))
        planned = InFlight(self._step + 1, decoding, drafts, [])
        for sequence in prefilling:
            if not budget:
                break
            row = sequence.next_row(min(budget, sequence.num_tokens - sequence.num_computed))
            rows.append(row)
            budget -= len(row.tokens)
            if row.sample is not None:
                planned.drawing.append(sequence)
            if row.score is not None:
                planned.scored.append((sequence, row.start))
            if self.arena.prefix_caching and sequence.handle is not None:
                self.arena.publish(sequence.handle, sequence.computed)
        moves = self.arena.take_moves()
        if not rows and not moves:
            return None
        self._step += 1
        self._in_flight.append(planned)
        return StepPlan(self._step, tuple(rows), moves)

    def _due(self) -> tuple[list[Sequence], list[Sequence]]:
        """Who decodes in this step, within its budget, and whose prompts are to be computed."""
        budget = self.limits.max_batched_tokens
        prefilling: list[Sequence] = []
        decoding: list[Sequence] = []
        for sequence in self._running:
            pending = len(sequence.tokens) + sequence.draws_pending - sequence.num_computed
            if pending > 1:
                prefilling.append(sequence)
            elif pending and not sequence.last_is_drawn:
                decoding.append(sequence)
        # However many decode, a prompt gets a token: with a budget of one, in every second step.
        reserved = 1 if prefilling and (budget > 1 or self._step % 2) else 0
        if len(decoding) > budget - reserved:  # nobody waits for ever: who comes first goes round
            first = self._step % len(decoding)
            decoding = decoding[first:] + decoding[:first]
        return decoding[: budget - reserved], prefilling

    def private_plan(self, rows: Iterable[PlanRow]) -> StepPlan:
        """A step outside of the schedule, with the memory operations that wait; nothing may be in flight."""
        if self._in_flight:
            raise EngineError(f"step {self._in_flight[0].step} is in flight; commit it first")
        self._step += 1
        return StepPlan(self._step, tuple(rows), self.arena.take_moves())

    def borrow_slot(self) -> int:
        """A slot for a private plan. Raises EngineError if none is left."""
        if not self._slots:
            raise EngineError(
                f"all {self.limits.max_num_seqs} sequences are in use: wait until one ends, or raise max_num_seqs"
            )
        return self._slots.pop()

    def return_slot(self, slot: int) -> None:
        """Give a borrowed slot back."""
        self._slots.append(slot)

    def commit(self, result: StepResult) -> list[TokenEvent]:
        """Apply the outcome of the oldest plan in flight: append tokens, stop, release. Returns what happened."""
        if not self._in_flight or self._in_flight[0].step != result.step:
            raise EngineError(f"step {result.step} is not the oldest in flight")
        planned = self._in_flight.popleft()
        drafts = planned.drafts
        draws = [s.id for s in planned.drawing]
        if drafts:
            draws = [number for number in draws for _ in range(1 + len(drafts.get(number, ())))]
        if draws != [row.seq_id for row in result.rows] or [s.id for s, _ in planned.scored] != [
            scored.seq_id for scored in result.scores
        ]:
            raise EngineError(f"step {result.step}: the backend's results are not the plan's draws and scores in order")
        for (sequence, start), scored in zip(planned.scored, result.scores, strict=True):
            if sequence.finish is None:
                sequence.add_scores(start, scored)
        events: list[TokenEvent] = []
        rows = iter(result.rows)
        for sequence, row in zip(planned.drawing, rows, strict=False):
            drawn = [row, *islice(rows, len(drafts[sequence.id]))] if sequence.id in drafts else None
            sequence.draws_pending -= 1
            if sequence.finish is not None:  # it was aborted, or had stopped: a dead row
                continue
            if drawn is not None:
                events += self._take_guessed(sequence, drafts[sequence.id], drawn, result.step)
            else:
                events.append(self._take(sequence, row, result.step))
        return events

    def _take_guessed(
        self, sequence: Sequence, draft: tuple[int, ...], drawn: list[RowResult], step: int
    ) -> list[TokenEvent]:  # fmt: skip
        """The draws of a row with guesses: those up to the first that is not what it guessed, that one included.

        A draw that failed behind a guess is not taken: a row of its own draws it again, and fails as it would without
        guesses, if it still does.
        """
        right = accepted(draft, (row.token if row.error is None else None for row in drawn))
        taken = right if right and drawn[right].error is not None else right + 1
        if sequence.handle is not None:  # without a handle it was preempted, and is computed again
            sequence.handle.rewind(sequence.handle.position - len(draft) - 1 + taken)
        events = []
        for row in drawn[:taken]:
            events.append(self._take(sequence, row, step))
            if sequence.finish is not None:
                break
        if self.speculation is not None:
            self.speculation.count(len(draft), len(events) - 1)
        return events

    def _take(self, sequence: Sequence, row: RowResult, step: int) -> TokenEvent:
        """One draw."""
        constrained = sequence.constrained
        if row.error is not None or (constrained and not sequence.obeys(row.token)):
            reason = sequence.constraint_error or row.error
            self._finish(sequence, FinishReason.ERROR)
            if not row.finite:
                self.arena.clear()  # numbers that are not finite may be in what others would reuse
            error = f"sequence {sequence.id}, step {step}: {reason}"
            return TokenEvent(row.seq_id, None, None, (), FinishReason.ERROR, error)
        sequence.tokens.append(row.token)
        finish: FinishReason | None = None
        # A form's end of sequence is no text, whoever ignores it otherwise.
        stops = row.token in sequence.stop_ids or (constrained and row.token in self.limits.eos_token_ids)
        if stops or (constrained and sequence.text_is_whole):
            finish = FinishReason.STOP
        elif len(sequence.tokens) >= sequence.limit_tokens:
            finish = FinishReason.LENGTH
        scores = None
        if sequence.prompt_scores is not None and sequence.num_output == 1:
            scores = tuple(sequence.prompt_scores)
        if finish is not None:
            self._finish(sequence, finish)
        return TokenEvent(
            row.seq_id, row.token, row.logprob, row.top_logprobs, finish, None, sequence.reused_tokens or 0, stops,
            row.metadata, scores,
        )  # fmt: skip

    def _grow_running(self) -> None:
        """Give every decoding sequence room for its next token, oldest first; the youngest pay."""
        for sequence in list(self._running):
            handle = sequence.handle
            if handle is None or (handle.position < handle.capacity_tokens and not handle.shares):
                continue
            if handle.position >= sequence.num_tokens or sequence.last_is_drawn:
                continue  # nothing to compute until the token in flight is known, or ever
            while sequence.handle is not None:
                try:
                    self.arena.grow(handle, handle.position + 1)
                    break
                except ArenaFullError:
                    self._preempt(self._running[-1])

    def _admit_waiting(self) -> None:
        """Claim room for whole prompts, in order of arrival, while slots and blocks last."""
        while self._waiting and self._slots and not (self._hold and self._running):
            sequence = self._waiting[0]
            if sequence.draws_pending or self._refused == (sequence.id, self.arena.changes) or self._waits(sequence):
                break
            try:
                handle = self._admit(sequence)
            except ArenaFullError:
                self._refused = (sequence.id, self.arena.changes)
                break
            self._waiting.popleft()
            if sequence.reused_tokens is None:  # later it finds what it has computed itself
                sequence.reused_tokens = handle.position
            sequence.start(handle, self._slots.pop())
            self._running.append(sequence)

    def _admit(self, sequence: Sequence) -> KVHandle:
        limit = sequence.limit_tokens - 1  # the last token's KV is never needed
        tokens, swapped = sequence.tokens, sequence.swapped_tokens
        spare = self._spare_blocks if self._running else 0
        if not swapped:  # the last token is always fed: its logits draw the next
            reuses = self.arena.prefix_caching and not sequence.wants_scores
            return self.arena.admit(len(tokens), limit, tokens[:-1] if reuses else (), spare)
        handle = self.arena.admit(len(tokens), limit, (), spare)
        self.arena.swap_in(handle, sequence.id, swapped)
        self._forget_swapped(sequence)
        return handle

    def _waits(self, sequence: Sequence) -> bool:
        """Is a running sequence about to compute what this one begins with? Then it is cheaper to wait for that."""
        if not self.arena.prefix_caching or sequence.swapped_tokens or sequence.wants_scores:
            return False
        for other in self._running:
            computed = other.num_computed
            if len(other.tokens) - computed > 1:
                common = common_prefix(sequence.tokens[:-1], other.tokens)
                if common - computed >= self.arena.block_tokens:
                    return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._slots.append(sequence.slot)
        computed = sequence.computed
        handle = sequence.preempt()
        if self.swap is not None and self.swap.wants(handle.position):
            self.swap.take(handle.position)
            sequence.swapped_tokens = handle.position
            self.arena.swap_out(handle, sequence.id)
            self.swaps += 1
        else:
            self.arena.release(handle, computed)
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)
        self.preemptions += 1
        self._hold = True

    def _forget_swapped(self, sequence: Sequence) -> None:
        if sequence.swapped_tokens and self.swap is not None:
            self.swap.give_back(sequence.swapped_tokens)
            sequence.swapped_tokens = 0

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.slot >= 0:
            self._slots.append(sequence.slot)
            self._running.remove(sequence)
            self._hold = False
        else:
            self._waiting.remove(sequence)
        if sequence.swapped_tokens:
            self.arena.swap_drop(sequence.id)
            self._forget_swapped(sequence)
        computed = sequence.computed
        handle = sequence.end(reason)
        if handle is not None:
            self.arena.release(handle, () if reason is FinishReason.ERROR else computed)
        del self._by_id[sequence.id]
        self._dependent -= sequence.waits_for_draws
        if self.speculation is not None:
            self.speculation.drafter.forget(sequence.id)
