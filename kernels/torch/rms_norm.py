"""Root-mean-square normalisation in torch; `kernels.reference.rms_norm` is the definition."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; with `unit_offset` times 1 + weight. x [..., D], weight
    [D]; in float32, rounded once to x's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    scale = weight.float() + 1.0 if unit_offset else weight.float()
    return (y * scale).to(x.dtype)
