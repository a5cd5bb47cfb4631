"""A request being served."""

from __future__ import annotations

import enum

from cortexstream.errors import EngineError
from cortexstream.kv import KVHandle
from cortexstream.plan import PENDING, PlanRow, SampleSpec
from cortexstream.request import FinishReason, Request


class SequenceState(enum.Enum):
    """waiting -> running -> finished; running -> waiting is a preemption; waiting -> finished is an abort."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Tokens so far, and where their KV lives. Written by the scheduler alone.

    There is no prefill flag: a sequence with more than one token not yet in the arena is being prefilled.
    `draws_pending` counts the tokens that plans in flight will draw; they are not in `tokens` yet.
    """

    __slots__ = (
        "_spec",
        "_varies",
        "draws_pending",
        "finish",
        "handle",
        "id",
        "limit_tokens",
        "num_prompt",
        "request",
        "reused_tokens",
        "slot",
        "stop_ids",
        "swapped_tokens",
        "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, limit_tokens: int, eos_token_ids: frozenset[int]) -> None:
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
        self._spec = SampleSpec(
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, request.seed, request.index,
            sampling.logprobs, sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty,
            logit_bias=tuple(sampling.logit_bias.items()),
        )  # fmt: skip
        self._varies = self._spec.penalised or sampling.min_tokens > 0

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
            spec = self.sample_spec() if self._varies else self._spec
            self.draws_pending += 1
        return PlanRow(self.id, self.slot, tokens, start, handle.rows, spec)

    def sample_spec(self) -> SampleSpec:
        """How to draw the next token, given what was drawn so far."""
        sampling, spec = self.request.sampling, self._spec
        if self.num_tokens - self.num_prompt < sampling.min_tokens:
            spec = spec._replace(banned=tuple(sorted(self.stop_ids)))
        if spec.penalised:
            output = (*self.tokens[self.num_prompt :], *[PENDING] * self.draws_pending)
            spec = spec._replace(prompt_tokens=self.request.prompt_token_ids, output_tokens=output)
        return spec

    def _expect(self, state: SequenceState) -> None:
        if self.state is not state:
            raise EngineError(f"request {self.id} is {self.state.value}; this needs it to be {state.value}")
