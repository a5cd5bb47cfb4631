"""What the host wants of a step's draws: small arrays while the device works, plain values once it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from cortexstream import sampling
from cortexstream.backends.mlx.sample import log_softmax
from cortexstream.plan import PENDING, RowResult, RowScores, SampleSpec, Score, TokenScore

BROKEN = "no token can be drawn: the logits hold NaN or +inf, or every token is banned; the model may be broken"


class Draw(NamedTuple):
    """One draw of a plan's row."""

    seq_id: int
    slot: int
    spec: SampleSpec
    place: int  # of it in the arrays


class Draws(NamedTuple):
    """Arrays in flight, a row for each draw."""

    tokens: mx.array  # int32 [D]
    broken: mx.array  # bool [D]: nothing can be drawn from the row's logits
    logprobs: mx.array | None  # float32 [D, vocabulary], if any draw asks for them
    logits: mx.array | None  # float32 [D, vocabulary], if any draw is described on the host

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in self if array is not None]


def draws_of(logits: mx.array, specs: Sequence[SampleSpec], tokens: mx.array, broken: mx.array) -> Draws:
    """Of what was drawn from logits float32 [D, vocabulary]."""
    wants = any(spec.logprobs is not None and not spec.needs_logits for spec in specs)
    described = any(spec.needs_logits for spec in specs)
    return Draws(tokens, broken, log_softmax(logits) if wants else None, logits if described else None)


def results_of(draws: Sequence[Draw], found: Draws, before: Mapping[int, int]) -> tuple[RowResult, ...]:
    """In the order of `draws`. `before`: slot -> what PENDING stands for in its history."""
    tokens: Any = found.tokens.tolist()
    broken: Any = found.broken.tolist()
    results = []
    for draw in draws:
        token = tokens[draw.place]
        if broken[draw.place]:
            results.append(RowResult(draw.seq_id, 0, error=BROKEN))
        elif draw.spec.needs_logits and found.logits is not None:
            known = tuple(before[draw.slot] if t == PENDING else t for t in draw.spec.output_tokens)
            told = sampling.describe(np.array(found.logits[draw.place]), draw.spec._replace(output_tokens=known), token)
            results.append(RowResult(draw.seq_id, token, told.logprob, told.top_logprobs, None, told.metadata))
        elif draw.spec.logprobs is not None and found.logprobs is not None:
            values = found.logprobs[draw.place]
            results.append(RowResult(draw.seq_id, token, *_told(values, token, draw.spec.logprobs)))
        else:
            results.append(RowResult(draw.seq_id, token))
    return tuple(results)


class Scores(NamedTuple):
    """Of a prompt chunk, in flight: `logprobs` float32 [targets, vocabulary]."""

    seq_id: int
    score: Score
    logprobs: mx.array

    def result(self) -> RowScores:
        """Waits for the device."""
        scores = zip(self.logprobs, self.score.targets, strict=True)
        return RowScores(
            self.seq_id, tuple(TokenScore(*_told(row, target, self.score.logprobs)) for row, target in scores)
        )


def scores_of(seq_id: int, score: Score, logits: mx.array) -> Scores:
    """Of a chunk's logits [tokens, vocabulary], of which the first draw the score's targets."""
    return Scores(seq_id, score, log_softmax(logits[: len(score.targets)].astype(mx.float32)))


def _told(logprobs: mx.array, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A token's logprob and the `count` likeliest, of one row."""
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = likeliest(logprobs, count)
        pairs = list(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
        top = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
    return float(logprobs[token].item()), top


def likeliest(logprobs: mx.array, count: int) -> mx.array:
    """The ids of the largest values of [vocabulary], in no order; of equals at the border the lowest ids, as the
    definition says."""
    count = min(count, logprobs.size)
    border = mx.min(mx.topk(logprobs, count))
    above, equal = logprobs > border, logprobs == border
    kept = above | (equal & (mx.cumsum(equal.astype(mx.int32)) <= count - mx.sum(above)))
    return mx.argpartition(-kept.astype(mx.int32), count - 1)[:count]
