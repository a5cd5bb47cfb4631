"""What the host wants of a step's draws, on its way from the device: small tensors, copied without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cortexstream.plan import PlanRow, RowResult, SampleSpec

BROKEN = "no token can be drawn: the logits hold NaN or +inf, or every token is banned; the model may be broken"


class Draws(NamedTuple):
    """Of N rows; in pinned host memory on a GPU, good once the step's event has happened."""

    drawn: torch.Tensor  # int64 [2, N]: tokens, and whether a row is broken
    chosen: torch.Tensor | None = None  # float32 [N]: the tokens' log-probabilities, if some row asks for them
    top_ids: torch.Tensor | None = None  # int64 [N, k], if some row asks for the likeliest
    top_values: torch.Tensor | None = None  # float32 [N, k]


def on_the_way(logits: torch.Tensor, specs: Sequence[SampleSpec], tokens: torch.Tensor, broken: torch.Tensor) -> Draws:
    """Start the copies. logits float32 [N, vocabulary], of which nothing is kept."""
    draws = Draws(torch.stack((tokens, broken.long())))
    counts = [spec.logprobs for spec in specs if spec.logprobs is not None]
    if counts:
        logprobs = torch.log_softmax(logits, dim=-1)
        draws = draws._replace(chosen=logprobs.gather(1, tokens[:, None])[:, 0])
        if max(counts):
            # A few more than asked for, so that ties at the border go to the lowest ids as the definition says.
            found = logprobs.topk(min(2 * max(counts) + 1, logprobs.shape[1]))
            draws = draws._replace(top_ids=found.indices, top_values=found.values)
    return Draws(*(None if tensor is None else _to_host(tensor) for tensor in draws))


def row_results(rows: Sequence[PlanRow], draws: Draws) -> tuple[RowResult, ...]:
    """In the order of the rows, which all draw."""
    tokens, broken = draws.drawn.tolist()
    results = []
    for place, row in enumerate(rows):
        assert row.sample is not None
        if broken[place]:
            results.append(RowResult(row.seq_id, 0, error=BROKEN))
        elif row.sample.logprobs is None or draws.chosen is None:
            results.append(RowResult(row.seq_id, tokens[place]))
        else:
            top = _top(draws, place, row.sample.logprobs)
            results.append(RowResult(row.seq_id, tokens[place], float(draws.chosen[place]), top))
    return tuple(results)


def _top(draws: Draws, place: int, count: int) -> tuple[tuple[int, float], ...]:
    if not count or draws.top_ids is None or draws.top_values is None:
        return ()
    pairs = zip(draws.top_ids[place].tolist(), draws.top_values[place].tolist(), strict=True)
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count])


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
