"""Drawing on the host: logits in, tokens out, by the definition in `cortexstream.sampling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cortexstream import sampling
from cortexstream.backends.common import fast_draw
from cortexstream.backends.common.rows import BANNED, BROKEN
from cortexstream.outputs import TokenMetadata
from cortexstream.plan import SampleSpec


class Drawn(NamedTuple):
    """One row's draw; with an `error` the token means nothing. Fields as in `cortexstream.plan.RowResult`."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None
    metadata: TokenMetadata | None = None
    finite: bool = True


def draw_rows(logits: npt.NDArray[np.float32], specs: Sequence[SampleSpec], positions: Sequence[int]) -> list[Drawn]:
    """Draw row i of `logits` float32 [R, V] by `specs[i]` for `positions[i]`, the position of the token to be drawn.

    A row that cannot be drawn from gets an `error` and the others are not touched by it. No PENDING may be left in a
    spec. Raises ValueError when the three lengths differ.
    """
    if not len(logits) == len(specs) == len(positions):
        raise ValueError(f"{len(logits)} rows of logits, {len(specs)} specs and {len(positions)} positions")
    specs = [_masked_once(spec) for spec in specs]
    tokens = fast_draw.draw(logits, specs, positions).tolist()
    return [_drawn(*row) for row in zip(logits, specs, tokens, strict=True)]


def _masked_once(spec: SampleSpec) -> SampleSpec:
    """A grammar gives its mask once, however often it is looked at here."""
    if spec.mask is None:
        return spec
    words = spec.mask()
    return spec._replace(mask=lambda: words)


def _drawn(logits: npt.NDArray[np.float32], spec: SampleSpec, token: int) -> Drawn:
    if token == fast_draw.NOTHING:
        finite = bool(np.isfinite(logits.max()))  # a NaN is the maximum of its row
        return Drawn(0, error=BANNED if finite else BROKEN, finite=finite)
    if spec.logprobs is None and not spec.metadata:
        return Drawn(token)
    told = sampling.describe(logits, spec, token)
    return Drawn(token, told.logprob, told.top_logprobs, None, told.metadata)
