"""Batch invariance: a model whose tokens have the same bits whoever shares their step and however prompts are cut.

Linear layers multiply in tiles of proved heights (`kernels.torch.fixed_rows`), attention goes through
`kernels.torch.fixed_attention`, activations row by row, as modules or as functions that a model calls itself, blocks of
experts token by token. What else a model does is not known here, so the whole is put to the test, and undone if it
fails.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cortexstream.backend import LayerKV
from cortexstream.backends.cuda.attention import Options, Rotary, Seat
from cortexstream.backends.cuda.fixed_attention import FixedStepAttention
from cortexstream.backends.cuda.fused import FusedLinear, FusedMLP
from cortexstream.backends.cuda.probe import forward
from cortexstream.backends.cuda.quantized import QuantizedLinear
from cortexstream.backends.cuda.torch_attention import StepAttention, TorchAttention, finish
from cortexstream.kernels.torch.fixed_attention import FixedAttention, attention_heights
from cortexstream.kernels.torch.fixed_rows import agreeing_heights, in_tiles, row_by_row
from cortexstream.kernels.torch.swiglu import gated_row_by_row

TRIAL_TOKENS = 11
CUT = 1 << 15  # numbers from which on torch cuts most functions' work between threads
LONGEST_STEP = 2048  # tokens
LARGEST_STEP = 1 << 36  # multiplications for each thread: some seconds
MOST_LOGITS = 1 << 26
MOST_IN_PART = 32
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
NAMES = ("sigmoid", "expit", "silu", "gelu", "softplus", "tanh", "mish", "elu", "selu", "celu", "exp2")
ELEMENTWISE = frozenset(
    getattr(place, name + end)
    for place in (torch, torch.Tensor, torch.special, functional)
    for name in NAMES
    for end in ("", "_")
    if hasattr(place, name + end)
)


class Promise(NamedTuple):
    """What holds, in one sentence, and the attention that goes with it."""

    holds: bool
    sentence: str
    attention: StepAttention


class RowByRow(TorchFunctionMode):
    """While it is entered, in this thread, ELEMENTWISE functions of CPU tensors go through `row_by_row`; `met` says
    whether one was called. Those with out= are left as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        x = args[0] if args else named.get("input")
        if func not in ELEMENTWISE or "out" in named or not isinstance(x, torch.Tensor):
            return func(*args, **named)
        if x.ndim == 0 or x.device.type != "cpu":
            return func(*args, **named)
        self.met = True
        others = {name: value for name, value in named.items() if name != "input"}
        got = row_by_row(lambda rows: func(rows, *args[1:], **others), x)
        in_place = func.__name__.endswith("_") or others.get("inplace") or any(other is True for other in args[1:])
        return x.copy_(got) if in_place else got


class Changes:
    """A model's modules as they are made invariant, and the way back."""

    def __init__(self, model: nn.Module) -> None:
        self._undos: list[Callable[[], None]] = []
        self._heights: dict[tuple[Any, ...], tuple[int, ...]] = {}
        for block in blocks_of_experts(model):
            self._replace(block, _token_by_token(partial(type(block).forward, block)))
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                self._replace(module, self._tiled(module, partial(_dense, module)))
            elif isinstance(module, FusedLinear) or type(module).forward is nn.Linear.forward:
                self._replace(module, self._tiled(module, partial(_weight, module)))
            elif isinstance(module, FusedMLP):
                self._gate(module)
            elif type(module).__module__ in ACTIVATIONS and not list(module.parameters()):
                self._replace(module, _outside(partial(row_by_row, partial(type(module).forward, module))))
        self._rows = RowByRow()
        self._replace(model, _within(self._rows, partial(type(model).forward, model)))

    def leave_out(self) -> None:
        """Call after a trial: a model that calls no ELEMENTWISE function itself does not pay for having them seen."""
        if not self._rows.met:
            self._undos.pop()()

    def undo(self) -> None:
        for undo in self._undos:
            undo()

    def _replace(self, module: nn.Module, function: Callable[..., Any]) -> None:
        object.__setattr__(module, "forward", function)
        self._undos.append(lambda: object.__delattr__(module, "forward"))

    def _gate(self, module: FusedMLP) -> None:
        old = module.ops
        module.ops = old._replace(gated=_outside(gated_row_by_row))
        self._undos.append(lambda: setattr(module, "ops", old))

    def _tiled(
        self, module: Any, weight_of: Callable[[torch.dtype], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A linear layer's forward; layers of one shape have their heights in common."""

        def run(x: torch.Tensor) -> torch.Tensor:
            weight, bias = weight_of(x.dtype), module.bias

            def product(rows: torch.Tensor) -> torch.Tensor:
                return functional.linear(rows, weight, bias)

            kind = (*weight.shape, x.dtype, x.device, bias is None)
            if kind not in self._heights:
                self._heights[kind] = agreeing_heights(product, x.reshape(-1, x.shape[-1])[:1], weight.numel())
            rows = in_tiles(product, x.reshape(-1, x.shape[-1]), self._heights[kind])
            return rows.view(*x.shape[:-1], -1)

        return run


def make_invariant(
    model: nn.Module, seat: Seat, layers: tuple[LayerKV, ...], asked: bool | None, triton: bool, device: torch.device
) -> Promise:
    """Make a loaded model invariant if `asked` and it can be. None is no: see docs/benchmarks/invariance.json."""
    if asked is False:
        return Promise(False, "off: products are as tall as a step has tokens, and their height decides how they round",
                       TorchAttention)  # fmt: skip
    if triton:
        return Promise(False, "not here: how a product rounds depends on its number of rows, and Triton's attention "
                       "sums a prompt's keys in another order than a decoded token's; kernels 'torch' can",
                       TorchAttention)  # fmt: skip
    if asked is None:
        return Promise(False, "off: it costs more than a tenth where one sequence decodes; batch_invariant=True turns "
                       "it on", TorchAttention)  # fmt: skip
    kinds = {(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers}
    found = [set(attention_heights(*kind, device)) for kind in sorted(kinds)]
    fixed = FixedAttention(tuple(sorted(set.intersection(*found))) or (1,))
    changes = Changes(model)
    with torch.inference_mode():
        same = _same_bits(model, seat, fixed, device)
    if not same:
        changes.undo()
        return Promise(False, f"not here: in the trial at load, tokens of {type(model).__name__} had other bits "
                       "together than alone, by something other than its linear layers, activations, experts and "
                       "attention", TorchAttention)  # fmt: skip
    changes.leave_out()
    sentence = (
        "tokens and logprobs are the same bits in any batch, chunked, preempted or with a prefix hit, in this process: "
        "linear layers multiply in tiles of heights that were tried at load, attention adds fixed splits in order"
    )
    if device.type != "cpu":
        sentence += "; on a GPU nothing but the trial at load has confirmed it"
    return Promise(True, sentence, partial(FixedStepAttention, fixed=fixed))


def blocks_of_experts(model: nn.Module) -> list[nn.Module]:
    """The modules that own a module with weights of three axes: router and experts, whose products are as tall as an
    expert has tokens."""
    return [
        parent
        for parent in model.modules()
        if any(weight.ndim == 3 for child in parent.children() for weight in child.parameters(recurse=False))
    ]


def _dense(module: QuantizedLinear, dtype: torch.dtype) -> torch.Tensor:
    dense: torch.Tensor = module.kernels.dequantize(
        module.packed, module.scales, module.biases, module.bits, module.group, dtype
    )
    return dense


def _weight(module: Any, _: torch.dtype) -> torch.Tensor:
    weight: torch.Tensor = module.weight
    return weight


def _within(mode: RowByRow, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **named: Any) -> Any:
        with mode:
            return function(*args, **named)

    return run


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what goes row by row already: `RowByRow` does not see it."""

    def run(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args)

    return run


def _token_by_token(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a block that takes [1, T, hidden] and gives the same, or that and what the router said, which is left out."""

    def run(x: torch.Tensor, *others: Any, **named: Any) -> Any:
        results = [function(token, *others, **named) for token in x.split(1, dim=1)]
        if isinstance(results[0], tuple):
            return torch.cat([result[0] for result in results], dim=1), None
        return torch.cat(results, dim=1)

    return run


class _Part(NamedTuple):
    """Some tokens of a sequence of the trial: those at `start` .. `end`."""

    name: str
    start: int
    end: int


STEPS = (
    (_Part("b", 0, 6), _Part("a", 0, 5)),
    (_Part("a", 5, 6), _Part("c", 0, 2), _Part("b", 6, 7)),
    (_Part("a", 6, TRIAL_TOKENS), _Part("b", 7, 8), _Part("c", 2, 9)),
)


class _Trial:
    """The `Attend` of steps whose keys and values are kept here; `begin` says who is in the next one."""

    def __init__(self, fixed: FixedAttention) -> None:
        self._fixed = fixed
        self._kept: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.parts: tuple[_Part, ...] = ()

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        window: int | None, options: Options,
    ) -> torch.Tensor:  # fmt: skip
        if rotary is not None:
            q, k = finish(q, k, rotary)
        out, at = [], 0
        for name, start, end in self.parts:
            here = slice(at, at + end - start)
            at = here.stop
            keys, values = k[here], v[here]
            if start:
                past = self._kept[name, layer]
                keys, values = torch.cat((past[0][:start], keys)), torch.cat((past[1][:start], values))
            self._kept[name, layer] = keys, values
            out.append(self._fixed(q[here], keys, values, start, 0, window, *options))
        return torch.cat(out)


def long_step(width: int, weights: int, threads: int) -> int:
    """Tokens of a step so long that torch cuts numbers [tokens, width] between all its threads, and not at vectors;
    0 for a single thread, which cuts nothing.

    For every thread there are then more than CUT numbers, and no number of threads divides the tokens. Never more
    than LONGEST_STEP tokens, nor than LARGEST_STEP multiplications with `weights` numbers for each thread, so that
    loading takes seconds: of a model too narrow or too large for that, only what is wider than `width` is cut.
    """
    if threads == 1:
        return 0
    most = min(LONGEST_STEP, LARGEST_STEP * threads // weights)
    tokens = min(CUT * threads // width + 1, most)
    while any(tokens % number == 0 for number in range(2, threads + 1)):
        tokens += 1
    return tokens


def _same_bits(model: Any, seat: Seat, fixed: FixedAttention, device: torch.device) -> bool:
    """Has sequence "a" the same logits whole, token by token, and cut in three beside others? And have sequences the
    same in one step that is long enough for torch to use all its threads (`long_step`), and one by one?"""
    embedding = model.get_input_embeddings()
    vocab: int = embedding.num_embeddings
    width: int = embedding.embedding_dim
    trial = _Trial(fixed)

    def logits(*parts: _Part, every: int = 1) -> torch.Tensor:
        """[tokens, vocabulary] of the tokens whose position is a multiple of `every`."""
        trial.parts = parts
        numbers = [(ord(p.name) * 31 + 7 * i + i * i) % vocab for p in parts for i in range(p.start, p.end)]
        positions = [i for p in parts for i in range(p.start, p.end)]
        wanted = [place for place, position in enumerate(positions) if position % every == 0]
        tensors = (torch.tensor(values, device=device) for values in (numbers, positions, wanted))
        return forward(model, *tensors).nan_to_num()

    def of_a(*parts: _Part) -> torch.Tensor:
        found = logits(*parts).split([p.end - p.start for p in parts])
        return found[[p.name for p in parts].index("a")]

    with seat.taken(trial):
        whole = of_a(_Part("a", 0, TRIAL_TOKENS))
        one_by_one = torch.cat([of_a(_Part("a", i, i + 1)) for i in range(TRIAL_TOKENS)])
        beside = torch.cat([of_a(*parts) for parts in STEPS])
        if not (torch.equal(whole, one_by_one) and torch.equal(whole, beside)):
            return False
        weights = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        tokens = long_step(width, weights, torch.get_num_threads()) if device.type == "cpu" else 0
        length = min(MOST_IN_PART, max(1, CUT // 2 // width))  # numbers of this width stay with one thread
        firsts = range(0, tokens, length)
        parts = [_Part(chr(ord("a") + i), 0, min(length, tokens - first)) for i, first in enumerate(firsts)]
        every = 1 + tokens * vocab // MOST_LOGITS
        together = logits(*parts, every=every) if parts else whole
        apart = torch.cat([logits(part, every=every) for part in parts]) if parts else whole
    return bool(torch.equal(together, apart))
