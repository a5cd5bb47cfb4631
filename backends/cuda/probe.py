"""What a loaded model is like, learnt by running it: its layers' geometry, and whether rows can share a step."""

from __future__ import annotations

from typing import Any

import torch

from cortexstream.backend import LayerKV
from cortexstream.backends.cuda.attention import Options, Rotary, Seat
from cortexstream.backends.cuda.rewrites import close
from cortexstream.backends.cuda.torch_attention import attend_alone
from cortexstream.errors import ModelLoadError

ROW_TOKENS = 4


def forward(
    model: Any, tokens: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [rows, vocabulary] after the tokens with the indices `wanted` (the last, if None), of a flat step: tokens
    [T] and positions [T] of any number of rows, which only attention tells apart."""
    keep: Any = 1 if wanted is None else wanted
    out = model(input_ids=tokens[None], position_ids=positions.long()[None], use_cache=False, logits_to_keep=keep)
    logits: torch.Tensor = out.logits[0]
    return logits


def geometry(model: Any, seat: Seat, settings: Any, device: torch.device, name: str) -> tuple[tuple[LayerKV, ...], int]:
    """The layers and the size of the vocabulary, by running one token with an attention that only looks. Raises
    ModelLoadError for a model that cannot run so, or keeps a state elsewhere."""
    seen: dict[int, LayerKV] = {}

    def look(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        window: int | None, options: Options,
    ) -> torch.Tensor:  # fmt: skip
        if layer in seen:
            raise ModelLoadError(f"{name}: layer {layer} attends twice, which is not supported")
        seen[layer] = LayerKV(k.shape[1], k.shape[2], v.shape[2], window)
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    with torch.inference_mode(), seat.taken(look):
        logits = forward(model, torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, device=device))
    layers = getattr(settings.get_text_config(), "num_hidden_layers", len(seen))
    if sorted(seen) != list(range(layers)):
        raise ModelLoadError(
            f"{name}: of the {layers} layers of this {settings.model_type} model {len(seen)} attend through "
            "transformers' attention interface; the others keep a state that is not supported"
        )
    return tuple(seen[layer] for layer in range(layers)), logits.shape[-1]


def check_rows(model: Any, seat: Seat, settings: Any, device: torch.device, name: str) -> None:
    """Raises ModelLoadError unless a row's logits stay the same when the row before it in a step is another."""

    def attend(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        window: int | None, options: Options,
    ) -> torch.Tensor:  # fmt: skip
        parts = [slice(0, ROW_TOKENS), slice(ROW_TOKENS, 2 * ROW_TOKENS)]
        return torch.cat([attend_alone(layer, q[p], k[p], v[p], rotary, window, options) for p in parts])

    positions = torch.arange(ROW_TOKENS, device=device).repeat(2)
    wanted = torch.arange(2 * ROW_TOKENS, device=device)
    with torch.inference_mode(), seat.taken(attend):
        one, other = (
            forward(model, torch.tensor([*first, 4, 5, 6, 7], device=device), positions, wanted)[ROW_TOKENS:]
            for first in ((0, 1, 2, 3), (11, 10, 9, 8))
        )
    # Logits that are not finite say nothing here; every request that draws from such is told so.
    if torch.isfinite(one).all() and torch.isfinite(other).all() and not close(one, other):
        raise ModelLoadError(
            f"{name}: this {settings.model_type} model mixes neighbouring tokens outside of attention: requests of one "
            "step would change each other, so it is not supported"
        )
