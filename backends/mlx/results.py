"""What the host wants of a step's draws: small arrays while the device works, plain values once it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from cortexstream import sampling
from cortexstream.backends.common.rows import failed, may_ban_all
from cortexstream.backends.mlx.sample import log_softmax
from cortexstream.plan import PENDING, RowResult, RowScores, SampleSpec, Score, TokenScore


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
    finite: mx.array | None  # bool [D]: the logits are numbers; if bans may leave nothing to draw

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in self if array is not None]


def draws_of(logits: mx.array, specs: Sequence[SampleSpec], tokens: mx.array, broken: mx.array) -> Draws:
    """Of what was drawn from logits float32 [D, vocabulary]."""
    wants = any(spec.logprobs is not None and not spec.needs_logits for spec in specs)
    described = any(spec.needs_logits for spec in specs)
    finite = mx.isfinite(mx.max(logits, axis=-1)) if any(may_ban_all(spec) for spec in specs) else None
    return Draws(tokens, broken, log_softmax(logits) if wants else None, logits if described else None, finite)


def results_of(draws: Sequence[Draw], found: Draws, before: Mapping[int, int]) -> tuple[RowResult, ...]:
    """In the order of `draws`. `before`: slot -> what PENDING stands for in its history."""
    tokens: Any = found.tokens.tolist()
    broken: Any = found.broken.tolist()
    results = []
    for draw in draws:
        token = tokens[draw.place]
        if broken[draw.place]:
            results.append(failed(draw.seq_id, found.finite is not None and bool(found.finite[draw.place].item())))
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
    """Of a prompt chunk's targets, in flight."""

    seq_id: int
    chosen: mx.array  # float32 [targets]: their logprobs
    ids: mx.array | None  # uint32 [targets, k]: the likeliest in their places, if any are asked for
    values: mx.array | None  # float32 [targets, k]

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in (self.chosen, self.ids, self.values) if array is not None]

    def result(self) -> RowScores:
        """Waits for the device."""
        chosen: Any = self.chosen.tolist()
        if self.ids is None or self.values is None:
            return RowScores(self.seq_id, tuple(TokenScore(value, ()) for value in chosen))
        rows = zip(chosen, self.ids.tolist(), self.values.tolist(), strict=True)
        return RowScores(self.seq_id, tuple(TokenScore(value, _sorted(ids, values)) for value, ids, values in rows))


def scores_of(seq_id: int, score: Score, logits: mx.array) -> Scores:
    """Of a chunk's logits [tokens, vocabulary], of which the first draw the score's targets."""
    logprobs = log_softmax(logits[: len(score.targets)].astype(mx.float32))
    chosen = mx.take_along_axis(logprobs, mx.array(score.targets)[:, None], axis=-1)[:, 0]
    if not score.logprobs:
        return Scores(seq_id, chosen, None, None)
    ids = likeliest(logprobs, score.logprobs)
    return Scores(seq_id, chosen, ids, mx.take_along_axis(logprobs, ids, axis=-1))


def _told(logprobs: mx.array, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A token's logprob and the `count` likeliest, of one row."""
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = likeliest(logprobs[None], count)[0]
        values: Any = logprobs[ids].tolist()
        top = _sorted(ids.tolist(), values)
    return float(logprobs[token].item()), top


def _sorted(ids: list[int], values: list[float]) -> tuple[tuple[int, float], ...]:
    """Likeliest first, lower id first among equals."""
    return tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0])))


def likeliest(logprobs: mx.array, count: int) -> mx.array:
    """[rows, count]: the ids of the largest values of [rows, vocabulary], in no order; of equals at the border the
    lowest ids, as the definition says."""
    count = min(count, logprobs.shape[-1])
    border = mx.min(mx.topk(logprobs, count, axis=-1), axis=-1, keepdims=True)
    above, equal = logprobs > border, logprobs == border
    left = count - mx.sum(above, axis=-1, keepdims=True)
    kept = above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= left))
    return mx.argpartition(-kept.astype(mx.int32), count - 1, axis=-1)[:, :count]
