"""Structural rewrites: parts of transformers' models, found by what they do, replaced by ones with fewer launches.

Nothing is believed. A norm or an MLP is replaced if its replacement gives the same numbers for random input. A rotary
function must turn the same pairs in float32, and what is changed in attention modules is kept if the whole model gives
the same logits. What does not pass stays as it was.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from cortexstream.backends.cuda.attention import SEAT, Norm, Rotary, Seat
from cortexstream.backends.cuda.fused import FirstPart, FusedMLP, FusedNorm, Ops, OtherPart, side_by_side
from cortexstream.backends.cuda.quantized import QuantizedLinear
from cortexstream.backends.cuda.torch_attention import attend_alone, finish
from cortexstream.kernels.torch.swiglu import ACTIVATIONS

log = logging.getLogger("cortexstream")

ROTARY = "apply_rotary_pos_emb"
LINEAR = (nn.Linear, QuantizedLinear)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest number
CHECK_TOKENS = 16
MEANS = (0.0, 2.0, -5.0)  # of a norm's input: with a mean near zero a layer norm would pass for one without


def rewrite(
    model: nn.Module, seat: Seat, ops: Ops, dtype: torch.dtype, logits: Callable[[torch.Tensor], torch.Tensor]
) -> Counter[str]:
    """Rewrite `model`, which computes in `dtype`, in place; returns how often each rewrite was made. `logits` runs the
    model on flat tokens [T]."""
    made: Counter[str] = Counter()
    for parent, name, child in list(_children(model)):
        for kind, replace in (("norm", _norm), ("mlp", _mlp)):
            new = replace(child, ops, dtype)
            if new is not None:
                setattr(parent, name, new)
                made[kind] += 1
                break
    made["qkv"] = _kept(model, seat, logits, [_fuse_projections])
    made["rotary"] = _kept(model, seat, logits, [_defer_norms_too, _defer])
    return made


Undo = Callable[[], None]
Change = Callable[[nn.Module, Seat], Undo | None]


def _kept(
    model: nn.Module, seat: Seat, logits: Callable[[torch.Tensor], torch.Tensor], changes: Sequence[Change]
) -> int:
    """Try changes of all attention modules, one after the other, until the model gives the logits that it gave before;
    returns how many modules were changed. What is not kept is undone."""
    tokens = torch.arange(CHECK_TOKENS, device=next(model.parameters()).device)
    with seat.taken(attend_alone):
        wanted = logits(tokens)
        for change in changes:
            undos = [undo for module in list(model.modules()) if (undo := change(module, seat)) is not None]
            if undos and _same(logits, tokens, wanted):
                return len(undos)
            for undo in undos:
                undo()
    log.info("%s of %s stays as it is", changes[0].__name__, type(model).__name__)
    return 0


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _norm(module: nn.Module, ops: Ops, dtype: torch.dtype) -> nn.Module | None:
    """The replacement of what may be a root-mean-square norm: one weight vector and an epsilon."""
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or not isinstance(eps, float):
        return None
    width = len(parameters["weight"])
    for unit_offset in (False, True):
        new = FusedNorm(module.weight, eps, unit_offset, ops)
        if _agree(module, new, width, dtype, MEANS):
            return new
    return None


def _mlp(module: nn.Module, ops: Ops, dtype: torch.dtype) -> nn.Module | None:
    """The replacement of what may be a gated MLP."""
    down = getattr(module, "down_proj", None)
    pair: Any = [getattr(module, "gate_proj", None), getattr(module, "up_proj", None)]
    joined = getattr(module, "gate_up_proj", None)
    if not isinstance(down, LINEAR):
        return None
    if isinstance(joined, LINEAR):
        whole, width = joined, joined.in_features
    elif _alike(pair):
        whole, width = side_by_side(pair), pair[0].in_features
    else:
        return None
    for activation in ACTIVATIONS:
        new = FusedMLP(whole, down, activation, ops)
        if _agree(module, new, width, dtype):
            return new
    return None


def _fuse_projections(module: nn.Module, seat: Seat) -> Undo | None:
    names = ("q_proj", "k_proj", "v_proj")
    linears: Any = [getattr(module, name, None) for name in names]
    if not _alike(linears):
        return None
    first = FirstPart(side_by_side(linears), [linear.out_features for linear in linears])
    parts: list[nn.Module] = [first, OtherPart(first, 1), OtherPart(first, 2)]
    for name, part in zip(names, parts, strict=True):
        setattr(module, name, part)

    def undo() -> None:
        for name, linear in zip(names, linears, strict=True):
            setattr(module, name, linear)

    return undo


def _alike(linears: Any) -> bool:
    """Are these linear layers of one kind and one input, all with a bias or none?"""
    if not all(type(linear) in LINEAR for linear in linears):
        return False
    return len({(type(m), m.in_features, m.bias is None, *_format(m)) for m in linears}) == 1


def _format(linear: nn.Linear | QuantizedLinear) -> tuple[Any, ...]:
    if isinstance(linear, QuantizedLinear):
        return linear.bits, linear.group, linear.scales.dtype
    return (linear.weight.dtype,)


def _agree(old: nn.Module, new: nn.Module, width: int, dtype: torch.dtype, means: Sequence[float] = (0.0,)) -> bool:
    """Do both give the same for random input [.., width] of each of these means?"""
    device = next(tensor.device for tensor in (*old.parameters(), *old.buffers()))
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    try:
        return all(close(old(given), new(given)) for given in ((x + mean).to(device, dtype) for mean in means))
    except (RuntimeError, TypeError, ValueError):  # it takes something else: not what it looked like
        return False


def close(old: Any, new: Any) -> bool:
    """Are two tensors equal within the rounding of their dtype?"""
    if not isinstance(old, torch.Tensor) or old.shape != new.shape:
        return False
    difference = (old.float() - new.float()).abs().max()
    return bool(difference <= TOLERANCE[old.dtype] * old.float().abs().max().clamp_min(1e-6))


def _same(logits: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, wanted: torch.Tensor) -> bool:
    try:
        return close(wanted, logits(tokens))
    except (RuntimeError, TypeError, ValueError):
        return False


def _forward_of(module: nn.Module) -> FunctionType:
    """A module's own forward function, without decorators."""
    function: FunctionType = inspect.unwrap(type(module).forward)
    return function


def _defer_norms_too(module: nn.Module, seat: Seat) -> Undo | None:
    return _defer(module, seat, _head_norm(module))


def _defer(module: nn.Module, seat: Seat, norm: Norm | None = None) -> Undo | None:
    """Give this one module a forward whose rotary function only notes what is to be done; attention then does it,
    while it stores the keys. With `norm`, the norms of its heads go the same way."""
    forward = _forward_of(module)
    if not hasattr(module, SEAT) or ROTARY not in forward.__code__.co_names:
        return None
    if not _turns_halves(forward.__globals__.get(ROTARY)):
        return None

    def note(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any, **__: Any) -> Any:
        seat.rotary = Rotary(cos[0], sin[0], norm)
        return q, k

    deferred = FunctionType(
        forward.__code__, {**forward.__globals__, ROTARY: note}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    deferred.__kwdefaults__ = forward.__kwdefaults__
    object.__setattr__(module, "forward", MethodType(deferred, module))
    norms = () if norm is None else ("q_norm", "k_norm")
    children = {name: getattr(module, name) for name in norms}
    for name in norms:
        setattr(module, name, nn.Identity())

    def undo() -> None:
        object.__delattr__(module, "forward")
        for name in norms:
            setattr(module, name, children[name])

    return undo


def _turns_halves(function: Any) -> bool:
    """Does a model's rotary function turn the pairs that attention does? In float32, whatever the weights are."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 16, generator=generator) for heads in (4, 2))
    angles = torch.randn(1, 3, 8, generator=generator).repeat(1, 1, 2)
    rotary = Rotary(angles.cos()[0], angles.sin()[0], None)
    try:
        turned = function(q, k, angles.cos(), angles.sin())
        ours = finish(q[0].transpose(0, 1), k[0].transpose(0, 1), rotary)
        return all(close(a[0].transpose(0, 1), b) for a, b in zip(turned, ours, strict=True))
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes something else
        return False


def _head_norm(module: nn.Module) -> Norm | None:
    q, k = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
    if not isinstance(q, FusedNorm) or not isinstance(k, FusedNorm):
        return None
    if q.weight.shape != k.weight.shape or (q.eps, q.unit_offset) != (k.eps, k.unit_offset):
        return None
    return Norm(q.weight, k.weight, q.eps, q.unit_offset)
