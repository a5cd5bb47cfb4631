"""Root-mean-square normalisation, alone or behind the addition that comes before it in a transformer block."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.triton._common import FLOAT_TYPES, capability, check_tensor

WIDEST = 65536


class Config(NamedTuple):
    """A program holds one vector."""

    num_warps: int


_BY_WIDTH = {512: Config(1), 2048: Config(4), 8192: Config(8), WIDEST: Config(16)}
CONFIGS = {80: _BY_WIDTH, 90: _BY_WIDTH}  # compute capability -> widest vector -> Config


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, eps, DIM: tl.constexpr, PAD: tl.constexpr, RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Grid (vectors,)."""
    i = tl.arange(0, PAD)
    at = tl.program_id(0).to(tl.int64) * DIM + i
    y = tl.load(x + at, mask=i < DIM, other=0.0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + at, mask=i < DIM, other=0.0).to(tl.float32)
        stored = y.to(residual.dtype.element_ty)
        tl.store(residual + at, stored, mask=i < DIM)
        y = stored.to(tl.float32)
    w = tl.load(weight + i, mask=i < DIM, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        w += 1.0
    y *= tl.rsqrt(tl.sum(y * y, 0) / DIM + eps)
    tl.store(out + at, (y * w).to(out.dtype.element_ty), mask=i < DIM)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None,
    unit_offset: bool = False, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; with `unit_offset` times 1 + weight, as Gemma has it.

    x [..., D] float16, bfloat16 or float32, contiguous; weight [D] of any of these. With `residual`, of x's shape and
    dtype, x is added to it in place first, and what is normalised is that sum as it was stored. In float32, rounded
    once. Returns x's shape and dtype, in `out` if given, which may be x. D up to 65536. Raises ValueError when shapes,
    dtypes or devices do not go together; nothing was written then.
    """
    dim = x.shape[-1] if x.ndim else 0
    if not 1 <= dim <= WIDEST:
        raise ValueError(f"x has shape {list(x.shape)}; its last axis must have 1 to {WIDEST} numbers")
    shape = tuple(x.shape)
    check_tensor("x", x, shape, FLOAT_TYPES, x.device)
    check_tensor("weight", weight, (dim,), FLOAT_TYPES, x.device)
    if residual is not None:
        check_tensor("residual", residual, shape, (x.dtype,), x.device)
    out = torch.empty_like(x) if out is None else out
    check_tensor("out", out, shape, (x.dtype,), x.device)
    if x.numel():
        config = next(line for width, line in CONFIGS[capability()].items() if dim <= width)
        rms_norm_kernel[(x.numel() // dim,)](
            x, residual, weight, out, eps, DIM=dim, PAD=triton.next_power_of_2(dim), RESIDUAL=residual is not None,
            UNIT_OFFSET=unit_offset, num_warps=config.num_warps,
        )  # fmt: skip
    return out
