"""Gated activations in torch; `kernels.reference.swiglu` is the definition."""

from __future__ import annotations

import torch
from torch.nn import functional

from cortexstream.kernels.torch.fixed_rows import row_by_row

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """x [..., 2F] -> act(x[..., :F]) * x[..., F:] of x's dtype; in float32, rounded once. `activation` is one of
    ACTIVATIONS ("gelu" by the error function, "gelu_tanh" by tanh); ValueError for another."""
    gate, up = x.float().chunk(2, dim=-1)
    return (_activate(gate, activation) * up).to(x.dtype)


def gated_row_by_row(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The same; a row's bits do not depend on how many rows there are."""
    gate, up = x.float().chunk(2, dim=-1)
    return (row_by_row(lambda rows: _activate(rows, activation), gate) * up).to(x.dtype)


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if activation == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
