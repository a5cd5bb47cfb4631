"""How transformers' models come to call our attention.

transformers' attention modules look their function up by name in a registry. Ours is `NAME`. It finds the step that is
being computed in the `Seat` that was put on every attention module at load, so there is no global state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface

NAME = "cortexstream"
SEAT = "_cortexstream_seat"


class Norm(NamedTuple):
    """Root-mean-square norms of single heads of q and k: their weights [D], or 1 + weight with `unit_offset`."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float
    unit_offset: bool


class Rotary(NamedTuple):
    """What is left to do to q and k: norms, if any, then the pair (x[d], x[d + R / 2]), d < R / 2, of token t turns by
    the angle with cosine cos[t, d] and sine sin[t, d]. cos and sin [T, R], R <= D, hold both halves alike, as
    transformers makes them; dimensions from R on stay."""

    cos: torch.Tensor
    sin: torch.Tensor
    norm: Norm | None


class Options(NamedTuple):
    """What a model says about one layer's attention."""

    scale: float
    soft_cap: float | None
    sinks: torch.Tensor | None  # [query heads]: logits that take part in the softmax and carry no value


class Attend(Protocol):
    """Finish q and k as `rotary` says, store k and v of a layer, and attend over all that is stored: q [T, Hq, D],
    k [T, Hkv, D], v [T, Hkv, Dv] -> [T, Hq, Dv]. `window` is the model's sliding window in this layer."""

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        window: int | None, options: Options,
    ) -> torch.Tensor: ...  # fmt: skip


class Seat:
    """Where the modules of one model find the step that is being computed. `rotary` waits there between a rewritten
    module's call of its rotary function and its call of attention."""

    def __init__(self) -> None:
        self.attend: Attend | None = None
        self.rotary: Rotary | None = None

    @contextmanager
    def taken(self, attend: Attend) -> Iterator[None]:
        """Within the block, the model's attention is `attend`."""
        self.attend = attend
        try:
            yield
        finally:
            self.attend = self.rotary = None


def register() -> None:
    """Make the name known to transformers. Idempotent."""
    AttentionInterface.register(NAME, _from_transformers)


def take_seats(model: torch.nn.Module, seat: Seat) -> None:
    """Put `seat` on every module that may call attention."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            object.__setattr__(module, SEAT, seat)  # not a submodule, not a buffer


def _from_transformers(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""
    seat: Seat = getattr(module, SEAT)
    if seat.attend is None:
        raise RuntimeError("attention was called outside of a step")
    if getattr(module, "is_causal", True) is False:
        raise RuntimeError("its tokens attend to later ones, as an encoder's do")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: Any = module.layer_idx
    rotary, seat.rotary = seat.rotary, None
    out = seat.attend(layer, q, k, v, rotary, sliding_window or None, Options(scale, softcap, s_aux))
    return out[None], None
