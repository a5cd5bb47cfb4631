"""Loading: transformers' model classes with our attention, and what the core must know about them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from cortexstream.backend import LayerKV
from cortexstream.backends.common.checkpoint import check_weights, read_config, read_weights
from cortexstream.backends.cuda.attention import NAME, Options, Rotary, Seat, register, take_seats
from cortexstream.backends.cuda.fused import Ops
from cortexstream.backends.cuda.quantized import load_weights
from cortexstream.backends.cuda.rewrites import rewrite
from cortexstream.errors import ModelLoadError

log = logging.getLogger("cortexstream")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REFUSED_LAYERS = {"chunked_attention": "attends within chunks", "linear_attention": "keeps a recurrent state"}


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and its layers' geometry as a probe with one token found it."""

    model: torch.nn.Module
    seat: Seat
    layers: tuple[LayerKV, ...]
    dtype: torch.dtype
    max_context_tokens: int
    vocab_size: int
    rewrites: dict[str, int]  # how often each structural rewrite was made


def load(folder: Path, dtype: str, device: torch.device, ops: Ops) -> LoadedModel:
    """Load a Hugging Face folder, or one that mlx-lm quantised, in `dtype` ("auto": the checkpoint's on a GPU, float32
    on a CPU), with the structural rewrites that it allows, made of `ops`.

    Raises ModelLoadError for a broken folder, an unknown architecture, or one whose layers keep a state other than
    keys and values, or attend in a way that is not known here.
    """
    config = read_config(folder)
    name = folder.name
    check_weights(folder)
    _refuse_layers(config, name)
    register()
    transformers.logging.disable_progress_bar()  # we show our own
    try:
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        settings.use_cache = False
        kind = _dtype(dtype, settings, device)
        model = _build(folder, config, settings, kind)
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{name}: transformers cannot load it: {short(error)}") from error
    model = model.to(device).eval().requires_grad_(False)
    model.set_attn_implementation(NAME)
    seat = Seat()
    take_seats(model, seat)
    layers, vocab_size = _probe(model, seat, settings, device, name)
    context = _context(settings, name)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        """At positions that are far apart, so that a wrong rotation shows."""
        apart = min(37, context // len(tokens))
        return forward(model, tokens, apart * torch.arange(len(tokens), device=device))

    with torch.inference_mode():
        made = rewrite(model, seat, ops, kind, logits)
    log.info("%s: rewritten are %s", name, dict(made))
    return LoadedModel(model, seat, layers, kind, context, vocab_size, dict(made))


def _dtype(asked: str, settings: Any, device: torch.device) -> torch.dtype:
    if asked != "auto":
        return DTYPES[asked]
    stored = getattr(settings, "dtype", None)
    return torch.float32 if device.type == "cpu" or stored not in DTYPES.values() else stored


def _build(folder: Path, config: dict[str, Any], settings: Any, kind: torch.dtype) -> Any:
    """The model with its weights. What mlx-lm quantised stays packed: its tensors have transformers' names."""
    if "quantization" not in config:
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown")
            raise ModelLoadError(
                f"{folder.name}: is quantised by {method!r}; use the original weights, or what mlx-lm quantised"
            )
        return transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=kind, local_files_only=True, attn_implementation="eager"
        )
    for key in ("quantization", "quantization_config"):
        if hasattr(settings, key):
            delattr(settings, key)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(settings, dtype=kind, attn_implementation="eager")
    load_weights(model, read_weights(folder), config, kind)
    return model


def _refuse_layers(config: dict[str, Any], name: str) -> None:
    for kind in config.get("layer_types") or ():
        if kind in REFUSED_LAYERS:
            raise ModelLoadError(f"{name}: a layer of this model {REFUSED_LAYERS[kind]}, which is not supported")


def _probe(model: Any, seat: Seat, settings: Any, device: torch.device, name: str) -> tuple[tuple[LayerKV, ...], int]:
    """Learn the KV geometry by running one token with an attention that only looks."""
    seen: dict[int, LayerKV] = {}

    def look(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        window: int | None, options: Options,
    ) -> torch.Tensor:  # fmt: skip
        if layer in seen:
            raise ModelLoadError(f"{name}: layer {layer} attends twice, which is not supported")
        seen[layer] = LayerKV(k.shape[1], k.shape[2], v.shape[2], window)
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    try:
        with torch.inference_mode(), seat.taken(look):
            logits = forward(model, torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, device=device))
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"{name}: this {settings.model_type} model cannot run one token: {short(error)}"
        ) from error
    layers = getattr(settings.get_text_config(), "num_hidden_layers", len(seen))
    if sorted(seen) != list(range(layers)):
        raise ModelLoadError(
            f"{name}: of the {layers} layers of this {settings.model_type} model {len(seen)} attend through "
            "transformers' attention interface; the others keep a state that is not supported"
        )
    return tuple(seen[layer] for layer in range(layers)), logits.shape[-1]


def forward(
    model: Any, tokens: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [rows, vocabulary] after the tokens with the indices `wanted` (the last, if None), of a flat step: tokens
    [T] and positions [T] of any number of rows, which only attention tells apart."""
    keep: Any = 1 if wanted is None else wanted
    out = model(input_ids=tokens[None], position_ids=positions.long()[None], use_cache=False, logits_to_keep=keep)
    logits: torch.Tensor = out.logits[0]
    return logits


def _context(settings: Any, name: str) -> int:
    text = settings.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(text, key, None), int):
            return int(getattr(text, key))
    raise ModelLoadError(f"{name}/config.json: names no context length; add max_position_embeddings")


def short(error: Exception) -> str:
    """An error as one line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else line[:300] + " ..."
