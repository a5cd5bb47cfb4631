"""Which layers of a Llama-family model attend through a sliding window."""

from __future__ import annotations

from typing import Any

from cortexstream.errors import ModelLoadError

LAYER_TYPES = {"full_attention", "sliding_attention"}

Json = dict[str, Any]


def windows_of(config: Json) -> tuple[int | None, ...]:
    """mistral has one window for all layers; qwen2 and qwen3 for those that layer_types or max_window_layers name."""
    layers, family, types = count(config, "num_hidden_layers"), config["model_type"], config.get("layer_types")
    if types is not None and (type(types) is not list or len(types) != layers or not set(types) <= LAYER_TYPES):
        raise ModelLoadError(f"config.json: layer_types must be {layers} times one of {', '.join(sorted(LAYER_TYPES))}")
    full: tuple[int | None, ...] = (None,) * layers
    if family in ("llama", "mistral"):
        if types is not None and len(set(types)) > 1:
            raise ModelLoadError(f"config.json: mixed layer_types are not supported for model_type {family!r}")
        uniform = (types or [None])[0]
        if family == "llama" and uniform in (None, "full_attention"):
            return full
        if family == "mistral" and uniform in (None, "sliding_attention"):
            return full if config.get("sliding_window") is None else (count(config, "sliding_window"),) * layers
        raise ModelLoadError(f"config.json: layer_types of {uniform!r} are not supported for model_type {family!r}")
    if not flag(config, "use_sliding_window") or config.get("sliding_window") is None:
        if types is not None and set(types) != {"full_attention"}:
            raise ModelLoadError("config.json: layer_types name sliding layers, but use_sliding_window is not true")
        return full
    window = count(config, "sliding_window")
    if types is None:
        first = count(config, "max_window_layers", at_least=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def count(config: Json, key: str, at_least: int = 1) -> int:
    """A whole number of config.json; raises ModelLoadError that names the key."""
    value = config.get(key)
    if type(value) is not int or value < at_least:
        raise ModelLoadError(f"config.json: {key} is {value!r}; it must be a whole number of at least {at_least}")
    return value


def flag(config: Json, key: str) -> bool:
    """A truth value of config.json, missing counts as false; raises ModelLoadError that names the key."""
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise ModelLoadError(f"config.json: {key} is {value!r}; it must be true or false")
    return bool(value)
