"""Loading: transformers' model classes with our attention, and what the core must know about them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from cortexstream.backend import LayerKV
from cortexstream.backends.common.affine import packing_of
from cortexstream.backends.common.checkpoint import check_weights, read_config, read_header, read_weights
from cortexstream.backends.cuda.attention import NAME, Seat, register, take_seats
from cortexstream.backends.cuda.fused import Ops
from cortexstream.backends.cuda.probe import check_rows, forward, geometry
from cortexstream.backends.cuda.quantized import load_weights, use_kernels
from cortexstream.backends.cuda.rewrites import rewrite
from cortexstream.backends.cuda.torch_attention import StepAttention, TorchAttention
from cortexstream.errors import ModelLoadError

log = logging.getLogger("cortexstream")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = ("F16", "BF16", "F32", "F64")
COUNTS = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
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
    notes: tuple[str, ...] = ()  # what is served otherwise than the checkpoint says
    attention: StepAttention = TorchAttention  # where torch computes it


def load(folder: Path, dtype: str, device: torch.device, ops: Ops) -> LoadedModel:
    """Load a Hugging Face folder, or one that mlx-lm quantised, in `dtype` ("auto": the checkpoint's on a GPU, float32
    on a CPU), with the structural rewrites that it allows, made of `ops`.

    Raises ModelLoadError for a broken folder, an unknown architecture, or one whose layers keep a state other than
    keys and values, or attend in a way that is not known here.
    """
    config = read_config(folder)
    name = folder.name
    check_weights(folder)
    _check_config(config, name)
    register()
    transformers.logging.disable_progress_bar()  # we show our own
    try:
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        if type(settings) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelLoadError(f"{name}: {settings.model_type!r} is no language model; use another folder")
        settings.use_cache = False
        kind = _dtype(dtype, settings, device)
        model = _build(folder, config, settings, kind)
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(_why(error, config, name)) from error
    too_large = f"{name}: it does not fit into the memory of {device}; use what mlx-lm quantised, or a smaller model"
    try:
        model = model.to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(too_large) from error
    use_kernels(model, ops.affine)
    model.set_attn_implementation(NAME)
    seat = Seat()
    take_seats(model, seat)
    context, notes = _context(settings, name)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        """At positions that are far apart, so that a wrong rotation shows."""
        apart = min(37, context // len(tokens))
        return forward(model, tokens, apart * torch.arange(len(tokens), device=device))

    try:
        layers, vocab_size = geometry(model, seat, settings, device, name)
        check_rows(model, seat, settings, device, name)
        with torch.inference_mode():
            made = rewrite(model, seat, ops, kind, logits)
    except ModelLoadError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(too_large) from error
    except Exception as error:
        raise ModelLoadError(
            f"{name}: this {settings.model_type} model cannot run a few tokens: {short(error)}"
        ) from error
    log.info("%s: rewritten are %s", name, dict(made))
    return LoadedModel(model, seat, layers, kind, context, vocab_size, dict(made), notes)


def _dtype(asked: str, settings: Any, device: torch.device) -> torch.dtype:
    if asked != "auto":
        return DTYPES[asked]
    stored = getattr(settings, "dtype", None)
    return torch.float32 if device.type == "cpu" or stored not in DTYPES.values() else stored


def _build(folder: Path, config: dict[str, Any], settings: Any, kind: torch.dtype) -> Any:
    """The model with its weights. What mlx-lm quantised stays packed: its tensors have transformers' names."""
    if config.get("quantization") is None:
        return _dense(folder, kind)
    for key in ("quantization", "quantization_config"):
        if hasattr(settings, key):
            delattr(settings, key)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(settings, dtype=kind, attn_implementation="eager")
    load_weights(model, read_weights(folder), config, kind)
    return model


def _dense(folder: Path, kind: torch.dtype) -> Any:
    """A model of which every tensor came from the folder, and none was left over: transformers makes up what is
    missing."""
    told = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would print a report; what is wrong is said below
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=kind,
            local_files_only=True,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        transformers.logging.set_verbosity(told)
    for what in ("missing", "unexpected", "mismatched"):
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in found[f"{what}_keys"])
        if names:
            raise ModelLoadError(
                f"{folder.name}: for transformers' {model.config.model_type} {len(names)} tensors are {what}, such as "
                f"{names[0]}; config.json and the weights do not fit"
            )
    _check_stored(folder, {key for key, _ in model.named_parameters()})
    return model


def _check_stored(folder: Path, parameters: set[str]) -> None:
    """transformers makes numbers of whatever is stored; codes are no weights."""
    for path in check_weights(folder):
        for key, entry in read_header(path).items():
            if entry.dtype not in STORED_DTYPES and (key in parameters or key.endswith(".weight")):
                raise ModelLoadError(
                    f"{path}: tensor {key} has dtype {entry.dtype}; readable are {', '.join(STORED_DTYPES)}: use the "
                    f"original weights, or what mlx-lm quantised"
                )


def _check_config(config: dict[str, Any], name: str) -> None:
    """What transformers would not notice, or would not say in words that help. Raises ModelLoadError."""
    for kind in config.get("layer_types") or ():
        if kind in REFUSED_LAYERS:
            raise ModelLoadError(
                f"{name}: a layer of this model {REFUSED_LAYERS[kind]}, which is not supported; use another model"
            )
    if config["model_type"] not in transformers.CONFIG_MAPPING:
        if "auto_map" in config:
            raise ModelLoadError(
                f"{name}: {config['model_type']!r} is an architecture whose code is in the folder, and it is not run "
                f"here; use a model of an architecture that transformers has"
            )
        raise ModelLoadError(
            f"{name}: transformers {transformers.__version__} has no architecture {config['model_type']!r}; update "
            f"transformers, or use a model of another architecture"
        )
    for key in COUNTS:
        if type(config.get(key)) is int and config[key] < 1:
            raise ModelLoadError(f"{name}/config.json: {key} is {config[key]}; it must be at least 1")
    if config.get("quantization") is not None:
        packing_of(config, "the model")
        return
    other = config.get("quantization_config")
    if other is not None and not isinstance(other, dict):
        raise ModelLoadError(
            f"{name}/config.json: quantization_config is {other!r}; it must be an object, and is not there if the "
            f"weights are not quantised"
        )
    if other:
        raise ModelLoadError(
            f"{name}: is quantised by {other.get('quant_method', 'unknown')!r}; use the original weights, or what "
            f"mlx-lm quantised"
        )


def _why(error: Exception, config: dict[str, Any], name: str) -> str:
    """An error of transformers as a sentence. It looks up names, of activations say: a KeyError has one of config's."""
    version = f"transformers {transformers.__version__}"
    if isinstance(error, KeyError) and error.args and (key := _key_of(error.args[0], config)):
        return (
            f"{name}/config.json: {key} is {error.args[0]!r}, which {version} does not know; correct it, or update "
            f"transformers"
        )
    return f"{name}: {version} cannot load it, so check config.json: {short(error)}"


def _key_of(value: Any, settings: dict[str, Any]) -> str | None:
    """The name of the first setting that has this value, also among settings of settings."""
    for key, found in settings.items():
        if isinstance(found, dict):
            inner = _key_of(value, found)
            if inner:
                return f"{key}.{inner}"
        elif type(found) is type(value) and found == value:
            return key
    return None


def _context(settings: Any, name: str) -> tuple[int, tuple[str, ...]]:
    """The longest sequence in tokens, and a note if it is not the checkpoint's."""
    text = settings.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        context = getattr(text, key, None)
        if isinstance(context, int):
            rope = getattr(text, "rope_parameters", None) or {}
            kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
            original = min(
                (k.get("original_max_position_embeddings", context) for k in kinds if k.get("rope_type") == "longrope"),
                default=context,
            )
            if original >= context:
                return context, ()
            # transformers turns every token of a step by the factors of the longest position in it.
            note = (
                f"the context is {original} tokens and not {context}: beyond that LongRoPE turns all tokens of a step "
                "otherwise, and a request's tokens would depend on its neighbours'"
            )
            log.warning("%s: %s", name, note)
            return original, (note,)
    raise ModelLoadError(f"{name}/config.json: names no context length; add max_position_embeddings")


def short(error: Exception) -> str:
    """An error's first sentence, on one line."""
    line = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
    return line if len(line) <= 300 else line[:300] + " ..."
