"""What crosses between the core and a backend in one step: plain immutable values, no behaviour.

A plan is complete: a backend needs nothing else to run it, so a recorded plan can be replayed through any backend.
These are named tuples and not dataclasses because a step makes one `PlanRow` per sequence, and a frozen dataclass
takes 2.7 times as long to build (docs/log.md, "Named tuples").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cortexstream.constraint import Mask
from cortexstream.outputs import TokenMetadata

PENDING = -1
"""Stands for a token that is not known yet: what this sequence drew in the step submitted just before."""


class SampleSpec(NamedTuple):
    """How a row draws its token. Everything but the logits is here, so the draw is a pure function.

    The position that keys the noise is that of the drawn token: the row's `start + len(tokens)`.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # 64 bits
    sample_index: int = 0  # which of a request's n completions
    logprobs: int | None = None  # None: no logprob at all; k: the drawn token's and the k likeliest
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_tokens: tuple[int, ...] = ()  # filled only for a row with penalties
    output_tokens: tuple[int, ...] = ()  # same; the last may be PENDING
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()  # token ids that must not be drawn now
    mask: Callable[[], Mask] | None = None
    """Gives the words of `cortexstream.constraint.Mask`, the same ones whenever it is called; None: everything may be
    drawn. A backend calls it after it has queued the forward pass, so that a grammar works while the device does."""
    processed: bool = False  # logprobs are of the distribution that was drawn from, not of the model's own
    metadata: bool = False  # report `TokenMetadata`, too

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def filtered(self, vocab_size: int) -> bool:
        """May min-p, top-k or top-p leave out some of so many tokens?"""
        return self.min_p > 0.0 or 0 < self.top_k < vocab_size or self.top_p < 1.0

    @property
    def needs_logits(self) -> bool:
        """Is what is reported computed on the host, from all of the row's logits?"""
        return self.metadata or (self.processed and self.logprobs is not None)


class Score(NamedTuple):
    """Which of a prompt's logprobs a row tells: `targets[i]` is the token that follows the row's token i."""

    targets: tuple[int, ...]
    logprobs: int  # so many of the likeliest at every position, beside the target's own


class KVRows(NamedTuple):
    """Where a sequence's keys and values live: block ids in order of position.

    With `contiguous` the blocks are adjacent, `blocks[0]` is the first and `len(blocks)` the capacity; a backend may
    lay such a run out as it likes inside its blocks.

    `blocks` serve the layers with full attention. `rings[r]` serves the layers whose window is `ModelInfo.windows[r]`,
    in blocks of a pool of their own: the token at position p lies in slot p % `ring_tokens(window, block_tokens)`.
    Slots count through a row's blocks as positions do; those beyond its capacity are not reached yet.
    """

    blocks: tuple[int, ...]
    contiguous: bool
    rings: tuple[KVRows, ...] = ()


class PlanRow(NamedTuple):
    """One sequence's part of a step: feed `tokens` from position `start`, then draw if `sample` is given.

    With `drafts` the row's tokens are the last known one and guesses at what follows it, and it draws after each: the
    draw after a guess counts only if the one before it drew that guess. Such a row has no PENDING.
    """

    seq_id: int
    slot: int  # stable small number while the sequence runs; indexes per-sequence state on the device
    tokens: tuple[int, ...]  # PENDING may stand only last
    start: int  # position of tokens[0]
    kv: KVRows  # covers positions 0 .. start + len(tokens)
    sample: SampleSpec | None  # of the draw after the last token; None: a chunk of the prompt that is not the last
    drafts: tuple[SampleSpec, ...] = ()  # of the draws after the tokens before the last; `sample` is given then
    score: Score | None = None

    @property
    def draws(self) -> tuple[SampleSpec, ...]:
        """Of the last tokens, in order of position: one, or of a row that guesses all."""
        return (*self.drafts, self.sample) if self.sample is not None else ()


class Move(NamedTuple):
    """Copy the first `num_tokens` slots from one run of blocks to another; the source keeps them.

    Source and destination may overlap: it is done as if through a temporary. Equal starts with different sizes mean
    that a run grew or shrank in place; a backend whose layout depends on a run's capacity re-lays it out. `pool` 0 is
    that of the full-attention layers, where slots are positions; pool r + 1 is ring r's. In paged placement source
    and target are one block each.
    """

    source: int  # first block
    source_blocks: int
    target: int
    target_blocks: int
    num_tokens: int
    pool: int = 0


class SwapOut(NamedTuple):
    """Keep a copy of a sequence's first `num_tokens` positions (of a ring: what it holds of them) in host memory."""

    key: int
    kv: KVRows
    num_tokens: int


class SwapIn(NamedTuple):
    """Write the copy kept under `key` to other blocks, bit for bit, and forget it."""

    key: int
    kv: KVRows
    num_tokens: int


class SwapDrop(NamedTuple):
    """Forget the copy kept under `key`: its sequence ended."""

    key: int


MemoryOp = Move | SwapOut | SwapIn | SwapDrop


class StepPlan(NamedTuple):
    """All rows of a step. `moves` are done in order, before any row is written."""

    step: int
    rows: tuple[PlanRow, ...]
    moves: tuple[MemoryOp, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


class RowResult(NamedTuple):
    """One draw. Logprobs are natural logs, of the model's raw distribution unless `SampleSpec.processed`."""

    seq_id: int
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first
    error: str | None = None  # this row alone failed (NaN logits, say); `token` means nothing then
    metadata: TokenMetadata | None = None
    finite: bool = True  # False: the logits were no numbers, so what the row computed cannot be trusted


class TokenScore(NamedTuple):
    """How likely the model found one token of a prompt: natural logs of its raw distribution."""

    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class RowScores(NamedTuple):
    """One entry per target of a row's `Score`."""

    seq_id: int
    scores: tuple[TokenScore, ...]


class StepResult(NamedTuple):
    """`rows` has one entry per draw, in the order of the plan; `scores` one per row with a `Score`."""

    step: int
    rows: tuple[RowResult, ...]
    swap_s: float = 0.0  # what the plan's SwapOut and SwapIn took, in seconds
    scores: tuple[RowScores, ...] = ()


def ring_tokens(window: int, block_tokens: int) -> int:
    """Slots of a full ring: the window, rounded up to whole blocks."""
    return -(-window // block_tokens) * block_tokens
