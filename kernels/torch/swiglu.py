"""Gated activations in torch; `kernels.reference.swiglu` is the definition."""

from __future__ import annotations

import torch
from torch.nn import functional

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """x [..., 2F] -> act(x[..., :F]) * x[..., F:] of x's dtype; in float32, rounded once. `activation` is one of
    ACTIVATIONS ("gelu" by the error function, "gelu_tanh" by tanh); ValueError for another."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    gate, up = x.float().chunk(2, dim=-1)
    if activation == "silu":
        gate = functional.silu(gate)
    else:
        gate = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (gate * up).to(x.dtype)
