"""What the host wants of a step's draws, on its way from the device: small tensors, copied without waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from cortexstream import sampling
from cortexstream.backends.common.rows import failed, may_ban_all
from cortexstream.plan import PENDING, PlanRow, RowResult, RowScores, SampleSpec, Score, TokenScore


class Draw(NamedTuple):
    """One draw of a plan's row."""

    seq_id: int
    slot: int
    spec: SampleSpec
    position: int  # of the token that is drawn
    single: bool  # the row's only one: the next step may go on from it


class Draws(NamedTuple):
    """Of D draws; in pinned host memory on a GPU, good once the step's event has happened."""

    drawn: torch.Tensor  # int64 [2, D]: tokens, and whether a draw is broken
    chosen: torch.Tensor | None = None  # float32 [D]: the tokens' log-probabilities, if some draw asks for them
    top_ids: torch.Tensor | None = None  # int64 [D, k], if some draw asks for the likeliest
    top_values: torch.Tensor | None = None  # float32 [D, k]
    logits: torch.Tensor | None = None  # float32 [described, vocabulary]: of the draws that are described on the host
    finite: torch.Tensor | None = None  # bool [D]: the logits are numbers; if bans may leave nothing to draw


def draws_of(rows: Sequence[PlanRow]) -> tuple[Draw, ...]:
    """All draws of a plan, in its order."""
    return tuple(
        Draw(row.seq_id, row.slot, spec, row.start + len(row.tokens) - len(row.draws) + 1 + i, not row.drafts)
        for row in rows
        for i, spec in enumerate(row.draws)
    )


def on_the_way(logits: torch.Tensor, specs: Sequence[SampleSpec], tokens: torch.Tensor, broken: torch.Tensor) -> Draws:
    """Start the copies. logits float32 [D, vocabulary], of which nothing is kept but copies."""
    draws = Draws(torch.stack((tokens, broken.long())))
    counts = [spec.logprobs for spec in specs if spec.logprobs is not None and not spec.needs_logits]
    if counts:
        chosen, top_ids, top_values = _told(torch.log_softmax(logits, dim=-1), tokens, max(counts))
        draws = draws._replace(chosen=chosen, top_ids=top_ids, top_values=top_values)
    described = [place for place, spec in enumerate(specs) if spec.needs_logits]
    if described:
        draws = draws._replace(logits=torch.stack([logits[place] for place in described]))
    if any(may_ban_all(spec) for spec in specs):
        draws = draws._replace(finite=torch.isfinite(logits.amax(-1)))  # a NaN is the maximum of its row
    return Draws(*(None if tensor is None else _to_host(tensor) for tensor in draws))


def results_of(draws: Sequence[Draw], found: Draws, before: Mapping[int, int]) -> tuple[RowResult, ...]:
    """In the order of `draws`. `before`: slot -> what PENDING stands for in its history."""
    tokens, broken = found.drawn.tolist()
    results, described = [], 0
    for place, draw in enumerate(draws):
        spec, token = draw.spec, tokens[place]
        if broken[place]:
            result = failed(draw.seq_id, found.finite is not None and bool(found.finite[place]))
        elif spec.needs_logits and found.logits is not None:
            known = tuple(before[draw.slot] if t == PENDING else t for t in spec.output_tokens)
            told = sampling.describe(found.logits[described].numpy(), spec._replace(output_tokens=known), token)
            result = RowResult(draw.seq_id, token, told.logprob, told.top_logprobs, None, told.metadata)
        elif spec.logprobs is not None and found.chosen is not None:
            top = _top(found.top_ids, found.top_values, place, spec.logprobs)
            result = RowResult(draw.seq_id, token, float(found.chosen[place]), top)
        else:
            result = RowResult(draw.seq_id, token)
        described += spec.needs_logits
        results.append(result)
    return tuple(results)


class Scores(NamedTuple):
    """Of a prompt chunk's targets, on their way as `Draws` are."""

    seq_id: int
    score: Score
    chosen: torch.Tensor
    top_ids: torch.Tensor | None
    top_values: torch.Tensor | None

    def result(self) -> RowScores:
        values = self.chosen.tolist()
        count = self.score.logprobs
        return RowScores(
            self.seq_id,
            tuple(
                TokenScore(value, _top(self.top_ids, self.top_values, place, count))
                for place, value in enumerate(values)
            ),
        )


def scores_of(rows: Sequence[PlanRow], logits: torch.Tensor) -> tuple[Scores, ...]:
    """Start the copies of what the rows' scores tell; logits float32 [all targets, vocabulary], in their order."""
    scores, end = [], 0
    for row in rows:
        if row.score is not None:
            first, end = end, end + len(row.score.targets)
            logprobs = torch.log_softmax(logits[first:end], dim=-1)
            targets = torch.tensor(row.score.targets, dtype=torch.int64, pin_memory=logits.is_cuda)
            told = _told(logprobs, targets.to(logits.device, non_blocking=True), row.score.logprobs)
            scores.append(
                Scores(row.seq_id, row.score, *(None if tensor is None else _to_host(tensor) for tensor in told))
            )
    return tuple(scores)


def _told(
    logprobs: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Each row's logprob of its token, and ids and logprobs of the likeliest."""
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    if not count:
        return chosen, None, None
    ids = likeliest(logprobs, count)
    return chosen, ids, logprobs.gather(1, ids)


def likeliest(logprobs: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [rows, count]: the ids of each row's largest values, in no order; of equals at the border the lowest ids,
    as the definition says."""
    count = min(count, logprobs.shape[1])
    border = logprobs.topk(count).values[:, -1:]
    above, equal = logprobs > border, logprobs == border
    left = count - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1) <= left))
    return kept.float().topk(count).indices


def _top(
    ids: torch.Tensor | None, values: torch.Tensor | None, place: int, count: int
) -> tuple[tuple[int, float], ...]:  # fmt: skip
    if not count or ids is None or values is None:
        return ()
    pairs = zip(ids[place].tolist(), values[place].tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count])


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
