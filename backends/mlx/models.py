"""Loading: mlx-lm's model classes, and what the core must know about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_model

from cortexstream.backend import LayerKV, ModelInfo
from cortexstream.backends.common.checkpoint import check_weights, eos_token_ids, read_config
from cortexstream.backends.common.kv_format import kv_quantization
from cortexstream.backends.common.layers import windows_of
from cortexstream.errors import ModelLoadError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


WINDOWS_IGNORED = ("mistral", "qwen2", "qwen3")
"""Families whose sliding window mlx-lm does not read from config.json. Our cache can apply it: attention sees only
what the cache shows."""


class LoadedModel(NamedTuple):
    model: nn.Module
    info: ModelInfo
    kv_dtype: mx.Dtype  # of keys and values, or of their scales where they are quantised


def load(folder: Path, dtype: str, kv_dtype: str = "auto") -> LoadedModel:
    """Load a Hugging Face or mlx-lm folder, quantised or not, in `dtype` ("auto": the checkpoint's, float32 on a CPU),
    for keys and values in `kv_dtype` ("auto": the type that the model computes them in; int8, int4).

    Raises ModelLoadError for a broken folder, an unknown architecture, or one whose layers keep a state other than
    plain or sliding-window keys and values, or keys and values that cannot be quantised.
    """
    config = read_config(folder)
    check_weights(folder)
    eos = eos_token_ids(folder, config)
    architecture = str(config["model_type"])
    try:
        model, config = load_model(folder, lazy=True, model_config=_rope_as_mlx_lm_reads_it(config))
        if dtype == "auto" and not mx.metal.is_available():
            dtype = "float32"  # MLX's half-precision matmuls on a CPU are slower and no other backend rounds like them
        if dtype != "auto":
            model.set_dtype(DTYPES[dtype])
        mx.eval(model.parameters())
    except Exception as error:
        raise ModelLoadError(f"{folder}: mlx-lm cannot load this {architecture} model: {_short(error)}") from error
    return describe(model, config, architecture, eos, str(folder), kv_dtype)


def describe(
    model: nn.Module, config: dict[str, Any], architecture: str, eos: frozenset[int], name: str, kv_dtype: str
) -> LoadedModel:
    """Learn the KV geometry by running one token through mlx-lm's own caches."""
    caches = make_prompt_cache(model)
    for layer, cache in enumerate(caches):
        if type(cache) not in (KVCache, RotatingKVCache) or getattr(cache, "keep", False):
            raise ModelLoadError(
                f"{name}: {architecture} keeps the state of layer {layer} in a {type(cache).__name__}; "
                "the mlx backend serves models whose layers use a KVCache or a RotatingKVCache"
            )
    try:
        logits = model(mx.array([[0]]), cache=caches)
        mx.eval(logits, [c.keys for c in caches])
    except Exception as error:
        raise ModelLoadError(f"{name}: this {architecture} model cannot run one token: {_short(error)}") from error
    windows = _windows([c.max_size if type(c) is RotatingKVCache else None for c in caches], config, architecture, name)
    layers = tuple(
        LayerKV(c.keys.shape[1], c.keys.shape[3], c.values.shape[3], window)
        for c, window in zip(caches, windows, strict=True)
    )
    stored = caches[0].keys.dtype
    try:
        quantization = kv_quantization(kv_dtype, layers)
    except ModelLoadError as error:
        raise ModelLoadError(f"{name}: {architecture}: {error}") from error
    info = ModelInfo(
        architecture=architecture, vocab_size=logits.shape[-1], max_context_tokens=_context(model, config, name),
        eos_token_ids=eos, layers=layers, kv_item_bytes=stored.size,
        weight_bytes=sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        kv_quantization=quantization,
    )  # fmt: skip
    return LoadedModel(model, info, stored)


def _windows(windows: list[int | None], config: dict[str, Any], architecture: str, name: str) -> list[int | None]:
    """Each layer's window: what the model's own caches have, or what config.json says where mlx-lm ignores that.

    Raises ModelLoadError where the single mask that mlx-lm makes for several layers would be wrong for some of them.
    """
    if architecture in WINDOWS_IGNORED and not any(windows):
        windows = list(windows_of(config))
        if len(set(windows)) > 1:
            raise ModelLoadError(
                f"{name}/config.json: this {architecture} model has a sliding window in some layers only, which mlx-lm "
                "does not compute; the reference backend does"
            )
    sizes = sorted({window for window in windows if window is not None})
    if len(sizes) > 1:
        raise ModelLoadError(
            f"{name}: {architecture} has sliding windows of {' and '.join(map(str, sizes))} tokens; the mlx backend "
            "serves models with one size of window"
        )
    return windows


def _rope_as_mlx_lm_reads_it(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, which mlx-lm's older model files do not read: they would silently use
    their default theta and no scaling. Returns the same settings under the old names, where those are missing."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        return {}
    old: dict[str, Any] = {}
    if "rope_theta" in parameters and config.get("rope_theta") is None:
        old["rope_theta"] = parameters["rope_theta"]
    if parameters.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
        old["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    return old


def _short(error: Exception) -> str:
    """An error as one line; mlx-lm lists every missing tensor on a line of its own."""
    line = " ".join(str(error).split())
    return line if len(line) <= 300 else line[:300] + " ..."


def _context(model: nn.Module, config: dict[str, Any], name: str) -> int:
    for source in (config, config.get("text_config", {}), vars(model.args) if hasattr(model, "args") else {}):
        for key in CONTEXT_KEYS:
            if isinstance(source.get(key), int):
                return int(source[key])
    raise ModelLoadError(f"{name}/config.json: names no context length; add one of {', '.join(CONTEXT_KEYS)}")
