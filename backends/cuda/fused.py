"""Modules that do the work of several of transformers' in fewer launches, with the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from cortexstream.backends.cuda.quantized import QuantizedLinear, fuse
from cortexstream.kernels.torch import affine_matmul as torch_affine
from cortexstream.kernels.torch import rms_norm as torch_rms_norm
from cortexstream.kernels.torch import swiglu as torch_swiglu


class Ops(NamedTuple):
    """The kernels behind the modules."""

    rms_norm: Callable[..., torch.Tensor]  # (x [..., D], weight [D], eps, *, unit_offset)
    gated: Callable[[torch.Tensor, str], torch.Tensor]  # (x [..., 2F], activation) -> [..., F]
    affine: ModuleType  # affine_matmul and dequantize


def torch_ops() -> Ops:
    return Ops(torch_rms_norm.rms_norm, torch_swiglu.gated, torch_affine)


def triton_ops() -> Ops:
    """Needs triton."""
    from cortexstream.kernels.triton import affine_matmul, rms_norm, swiglu

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool) -> torch.Tensor:
        return rms_norm.rms_norm(x.contiguous(), weight, eps, unit_offset=unit_offset)

    return Ops(norm, swiglu.gated, affine_matmul)


class FusedNorm(nn.Module):
    """A root-mean-square norm over the last axis in one launch."""

    def __init__(self, weight: nn.Parameter, eps: float, unit_offset: bool, ops: Ops) -> None:
        super().__init__()
        self.weight, self.eps, self.unit_offset = weight, eps, unit_offset
        self._ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)


class FusedLinear(nn.Module):
    """Several projections of one input as one product; the output is theirs side by side."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


def side_by_side(linears: Sequence[nn.Linear] | Sequence[QuantizedLinear]) -> FusedLinear | QuantizedLinear:
    """One layer in place of several alike; they become views of its weights, so that nothing is held twice."""
    whole = fuse(linears) if isinstance(linears[0], QuantizedLinear) else FusedLinear(linears)
    sizes = [linear.out_features for linear in linears]
    for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
        for linear, part in zip(linears, tensor.split(sizes), strict=True):
            if getattr(linear, name) is not None:
                getattr(linear, name).data = part
    return whole


class FirstPart(nn.Module):
    """In place of the first of several projections: computes all and keeps the others' parts for them."""

    def __init__(self, whole: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.whole, self._sizes = whole, list(sizes)
        self.kept: list[torch.Tensor | None] = [None] * len(sizes)
        self.source: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = self.whole(x).split(self._sizes, dim=-1)
        self.source, self.kept = x, [None, *others]
        return first


class OtherPart(nn.Module):
    """In place of another projection: hands out what the first one kept. The model calls it with the same input, which
    is checked, and once."""

    def __init__(self, first: FirstPart, number: int) -> None:
        super().__init__()
        object.__setattr__(self, "_first", first)  # not a submodule: it is one already
        self._number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: FirstPart = object.__getattribute__(self, "_first")
        part, first.kept[self._number] = first.kept[self._number], None
        if part is None or first.source is not x:
            raise RuntimeError("a fused projection was asked for an input that the first one has not seen")
        if all(kept is None for kept in first.kept):
            first.source = None
        return part


class FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up as one product."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, activation: str, ops: Ops) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down
        self.activation, self.ops = activation, ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.ops.gated(self.gate_up_proj(x), self.activation))
        return out
