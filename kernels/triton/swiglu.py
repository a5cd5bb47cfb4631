"""Gated activations: one pass over the output of a fused gate-and-up projection."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.triton._common import FLOAT_TYPES, capability, check_tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class Config(NamedTuple):
    """A program takes `block` numbers of a vector's result."""

    block: int
    num_warps: int


_ANY = Config(1024, 4)
CONFIGS = {80: _ANY, 90: _ANY}  # compute capability -> Config


@triton.jit
def gated_kernel(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """Grid (vectors, blocks of WIDTH)."""
    vector = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(x + vector * (2 * WIDTH) + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(x + vector * (2 * WIDTH) + WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        g *= 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y))
        g = g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    else:
        g = g / (1.0 + tl.exp(-g))
    tl.store(out + vector * WIDTH + i, (g * up).to(out.dtype.element_ty), mask=i < WIDTH)


def gated(x: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """act(x[..., :F]) * x[..., F:], in float32, rounded once.

    x [..., 2F] float16, bfloat16 or float32, contiguous; act is "silu", "gelu" (with the error function) or
    "gelu_tanh". Returns [..., F] of x's dtype, in `out` if given, which must not share memory with x. Raises ValueError
    for another activation and when shapes, dtypes or devices do not go together; nothing was written then.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be {', '.join(ACTIVATIONS[:-1])} or {ACTIVATIONS[-1]}")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}; its last axis must have two halves")
    check_tensor("x", x, tuple(x.shape), FLOAT_TYPES, x.device)
    width = x.shape[-1] // 2
    shape = (*x.shape[:-1], width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    check_tensor("out", out, shape, (x.dtype,), x.device)
    if x.numel():
        config = CONFIGS[capability()]
        grid = (out.numel() // width, triton.cdiv(width, config.block))
        gated_kernel[grid](x, out, WIDTH=width, BLOCK=config.block, ACTIVATION=activation, num_warps=config.num_warps)
    return out
