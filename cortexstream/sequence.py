"""A request being served."""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import cache

from cortexstream.constraint import ConstraintState, Mask, mask_of
from cortexstream.errors import ConstraintError, EngineError
from cortexstream.kv import KVHandle
from cortexstream.plan import PENDING, PlanRow, RowScores, SampleSpec, Score, TokenScore
from cortexstream.request import FinishReason, Request


class SequenceState(enum.Enum):
    """waiting -> running -> finished; running -> waiting is a preemption; waiting -> finished is an abort."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Tokens so far, and where their KV lives. Written by the scheduler alone.

    There is no prefill flag: a sequence with more than one token not yet in the arena is being prefilled.
    `draws_pending` counts the rows in flight that will draw; what they draw is not in `tokens` yet.
    """

    __slots__ = (
        "_allowed",
        "_constraint",
        "_ends",
        "_spec",
        "_varies",
        "_vocab_size",
        "constrained",
        "constraint_error",
        "draws_pending",
        "finish",
        "handle",
        "id",
        "limit_tokens",
        "num_prompt",
        "prompt_scores",
        "request",
        "reused_tokens",
        "slot",
        "stop_ids",
        "swapped_tokens",
        "tokens",
        "waits_for_draws",
    )  # fmt: skip

    def __init__(
        self, request: Request, limit_tokens: int, eos_token_ids: frozenset[int], vocab_size: int,
        waits_for_draws: bool = False,
    ) -> None:  # fmt: skip
        sampling = request.sampling
        self.request = request
        self.id = request.id
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.limit_tokens = limit_tokens  # prompt and output together
        self.stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_token_ids)
        self.handle: KVHandle | None = None
        self.slot = -1
        self.draws_pending = 0
        self.reused_tokens: int | None = None  # of the prompt, found in the arena when this sequence first ran
        self.swapped_tokens = 0  # of a preempted sequence: so many tokens' KV are in host memory
        self.finish: FinishReason | None = None
        self.prompt_scores: list[TokenScore] | None = None if sampling.prompt_logprobs is None else []
        self._constraint: ConstraintState | None = None if request.constraint is None else request.constraint.start()
        self.constraint_error: str | None = None  # why its grammar cannot go on
        self.constrained = self._constraint is not None
        # Its next row is planned only when all that it drew is known: grammars and guesses at what follows need that.
        self.waits_for_draws = waits_for_draws or self.constrained
        ids = sampling.allowed_token_ids
        allowed = None if ids is None else mask_of(ids, vocab_size)
        self._spec = SampleSpec(
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, request.seed, request.index,
            sampling.logprobs, sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty,
            logit_bias=tuple(sampling.logit_bias.items()), processed=sampling.logprobs_mode == "processed_logprobs",
            metadata=sampling.sampling_metadata, banned=tuple(sorted(sampling.bad_token_ids)),
            mask=None if allowed is None else lambda: allowed,
        )  # fmt: skip
        self._allowed = allowed
        self._ends = self.stop_ids | eos_token_ids  # of a form: it ends with such a token, also where that is ignored
        self._vocab_size = vocab_size
        self._varies = self._spec.penalised or sampling.min_tokens > 0 or self._constraint is not None

    @property
    def state(self) -> SequenceState:
        if self.finish is not None:
            return SequenceState.FINISHED
        return SequenceState.WAITING if self.handle is None else SequenceState.RUNNING

    @property
    def num_tokens(self) -> int:
        """Tokens in all, a drawn one that is still on its way included."""
        return len(self.tokens) + self.draws_pending

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is in the arena, or will be by the plans made so far."""
        return 0 if self.handle is None else self.handle.position

    @property
    def computed(self) -> list[int]:
        """The known tokens whose KV is in the arena."""
        return self.tokens[: self.num_computed]

    @property
    def last_is_drawn(self) -> bool:
        """The token that reaches the limit is drawn, or on its way: nothing is left to compute."""
        return len(self.tokens) + self.draws_pending >= self.limit_tokens

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def wants_scores(self) -> bool:
        """Prompt logprobs were asked for, and not all are known."""
        return self.prompt_scores is not None and len(self.prompt_scores) < self.num_prompt - 1

    def start(self, handle: KVHandle, slot: int) -> None:
        self._expect(SequenceState.WAITING)
        self.handle, self.slot = handle, slot

    def preempt(self) -> KVHandle:
        """Back to waiting; the KV is given up, to be computed again or brought back."""
        self._expect(SequenceState.RUNNING)
        assert self.handle is not None
        handle, self.handle, self.slot = self.handle, None, -1
        return handle

    def end(self, reason: FinishReason) -> KVHandle | None:
        """Finished; returns the handle to release, if there was one."""
        if self.finish is not None:
            raise EngineError(f"request {self.id} is finished already ({self.finish})")
        handle, self.handle, self.slot = self.handle, None, -1
        self.finish = reason
        return handle

    def obeys(self, token: int) -> bool:
        """Tell the grammar of a drawn token. False, with `constraint_error` set, if it is refused."""
        if self._constraint is not None:
            try:
                self._constraint.advance(token)
            except ConstraintError as error:
                self.constraint_error = str(error)
                return False
        return True

    @property
    def text_is_whole(self) -> bool:
        """Its grammar lets nothing follow."""
        return self._constraint is not None and self._constraint.is_over

    def next_row(self, num_tokens: int) -> PlanRow:
        """Plan the next `num_tokens` tokens; the last may be PENDING. A row that reaches the end draws the next one."""
        handle = self.handle
        assert handle is not None
        start, known = handle.position, len(self.tokens)
        end = start + num_tokens
        tokens = tuple(self.tokens[start:end]) if start < known else ()
        if end > known:
            tokens += (PENDING,)
        handle.advance(num_tokens)
        spec = None
        if end == known + self.draws_pending:
            spec = self._specs(())[0] if self._varies else self._spec
            self.draws_pending += 1
        score = None if self.prompt_scores is None else self._score(start, end)
        return PlanRow(self.id, self.slot, tokens, start, handle.rows, spec, (), score)

    def guessing_row(self, draft: tuple[int, ...]) -> PlanRow:
        """Plan the last token and a `draft`, guesses at what follows it, with a draw after each."""
        handle = self.handle
        assert handle is not None
        start = handle.position
        handle.advance(1 + len(draft))
        *specs, last = self._specs(draft) if self._varies else [self._spec] * (1 + len(draft))
        self.draws_pending += 1
        return PlanRow(self.id, self.slot, (self.tokens[start], *draft), start, handle.rows, last, tuple(specs))

    def add_scores(self, start: int, scored: RowScores) -> None:
        """Keep the scores of the tokens from `start` on; those that are known already were computed again."""
        assert self.prompt_scores is not None
        self.prompt_scores += scored.scores[len(self.prompt_scores) - start :]

    def _specs(self, draft: tuple[int, ...]) -> list[SampleSpec]:
        """How to draw the next token, and those after each token of the draft if it is right."""
        masks = None if self._constraint is None else cache(lambda: self._masks(draft))
        return [self.sample_spec(draft[:i], masks) for i in range(1 + len(draft))]

    def sample_spec(self, guessed: tuple[int, ...] = (), masks: Callable[[], list[Mask]] | None = None) -> SampleSpec:
        """How to draw behind what was drawn so far and what is `guessed` to follow it."""
        sampling, spec = self.request.sampling, self._spec
        early = self.num_tokens - self.num_prompt + len(guessed) < sampling.min_tokens
        if early and not self.constrained:  # a grammar's masks see to that themselves
            spec = spec._replace(banned=tuple(sorted(self.stop_ids.union(spec.banned))))
        if spec.penalised:
            output = (*self.tokens[self.num_prompt :], *[PENDING] * self.draws_pending, *guessed)
            spec = spec._replace(prompt_tokens=self.request.prompt_token_ids, output_tokens=output)
        if masks is not None:
            spec = spec._replace(mask=lambda: masks()[len(guessed)])
        return spec

    def _masks(self, draft: tuple[int, ...]) -> list[Mask]:
        """What the grammar and `allowed_token_ids` leave. A grammar that fails leaves nothing: only this row ends."""
        assert self._constraint is not None
        try:
            masks = self._constraint.masks(draft)
        except ConstraintError as error:
            self.constraint_error = str(error)
            return [mask_of((), self._vocab_size)] * (1 + len(draft))
        if self._allowed is not None:
            masks = [mask & self._allowed for mask in masks]
        missing = self.request.sampling.min_tokens - self.num_output
        if missing > 0:  # no stop comes so early, unless nothing else is left: then the text is over
            text = ~mask_of(self._ends, self._vocab_size)
            masks[:missing] = [mask & text if (mask & text).any() else mask for mask in masks[:missing]]
        return masks

    def _score(self, start: int, end: int) -> Score | None:
        """Of the prompt's tokens behind those that a row feeds."""
        if not self.wants_scores:
            return None
        targets = tuple(self.tokens[start + 1 : end + 1])  # nothing is drawn before all of the prompt is scored
        count = self.request.sampling.prompt_logprobs
        return None if not targets or count is None else Score(targets, count)

    def _expect(self, state: SequenceState) -> None:
        if self.state is not state:
            raise EngineError(f"request {self.id} is {self.state.value}; this needs it to be {state.value}")
