"""Drawing on the host: logits in, tokens out, by the definition in `cortexstream.sampling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cortexstream import sampling
from cortexstream.plan import SampleSpec


class Drawn(NamedTuple):
    """One row's draw; with an `error` the token means nothing. Fields as in `cortexstream.plan.RowResult`."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None


def draw_rows(logits: npt.NDArray[np.float32], specs: Sequence[SampleSpec], positions: Sequence[int]) -> list[Drawn]:
    """Draw row i of `logits` float32 [R, V] by `specs[i]` for `positions[i]`, the position of the token to be drawn.

    A row that cannot be drawn from gets an `error` and the others are not touched by it. No PENDING may be left in a
    spec. Raises ValueError when the three lengths differ.
    """
    return [_draw_row(row, spec, position) for row, spec, position in zip(logits, specs, positions, strict=True)]


def _draw_row(logits: npt.NDArray[np.float32], spec: SampleSpec, position: int) -> Drawn:
    broken = int(np.count_nonzero(np.isnan(logits) | (logits == np.inf)))
    if broken:
        return Drawn(0, error=f"{broken} of {len(logits)} logits are NaN or +inf; the model or its weights are broken")
    if not np.isfinite(sampling.bias(logits, spec)).any():
        return Drawn(0, error=f"all {len(logits)} tokens are banned or have a logit of -inf; nothing can be drawn")
    token = sampling.draw(logits, spec, position)
    if spec.logprobs is None:
        return Drawn(token)
    logprobs = sampling.log_softmax(logits)
    return Drawn(token, float(logprobs[token]), sampling.top_logprobs(logprobs, spec.logprobs))
