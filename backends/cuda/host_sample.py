"""The draw where the device is the CPU: the tensors are numpy's already, and numpy draws several times as fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cortexstream.backends.common import fast_draw
from cortexstream.plan import PENDING, SampleSpec


def draw(
    logits: torch.Tensor, specs: Sequence[SampleSpec], positions: Sequence[int], pending: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `backends.cuda.sample.draw`."""
    known = [_known(spec, last) for spec, last in zip(specs, pending, strict=True)]
    tokens = torch.from_numpy(fast_draw.draw(logits.numpy(), known, positions))
    broken = tokens == fast_draw.NOTHING
    return tokens.masked_fill_(broken, 0), broken


def _known(spec: SampleSpec, last: torch.Tensor | None) -> SampleSpec:
    """`spec` with the token that PENDING stands for."""
    if not spec.penalised or PENDING not in spec.output_tokens:
        return spec
    if last is None:
        raise ValueError("a penalised row has a pending token, but its slot drew none")
    token = int(last.item())
    return spec._replace(output_tokens=tuple(token if t == PENDING else t for t in spec.output_tokens))
