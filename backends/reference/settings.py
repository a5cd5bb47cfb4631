"""config.json of a llama, mistral, qwen2 or qwen3 folder -> the numbers that the model needs.

What the reference cannot compute exactly is refused by name, never approximated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cortexstream.backends.common.layers import count, flag, windows_of
from cortexstream.errors import ModelLoadError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")
ROPE_THETA = 10000.0  # what all four families mean when the file does not say
ORIGINAL_CONTEXT = "original_max_position_embeddings"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """The shape of a decoder-only transformer of the Llama family."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    rms_norm_eps: float
    tied: bool | None  # whether the output layer is the embedding; None: when the weights have no lm_head
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head's query and key (qwen3)
    windows: tuple[int | None, ...]  # one per layer: the sliding window in tokens, None for full attention
    inv_freq: npt.NDArray[np.float32]  # [head_dim / 2], radians per position


def settings_from(config: Json) -> Settings:
    """Read and check what config.json says. Raises ModelLoadError that names the key."""
    family = config["model_type"]
    if family not in FAMILIES:
        raise ModelLoadError(
            f"config.json: model_type {family!r} is not supported by the reference backend, which knows "
            f"{', '.join(FAMILIES)}; use the mlx or the cuda backend"
        )
    _refuse_variants(config)
    heads = count(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else count(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ModelLoadError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    head_dim = _head_dim(config, heads)
    max_context_tokens = count(config, "max_position_embeddings")
    attention_bias = flag(config, "attention_bias") and family in ("llama", "qwen3")
    return Settings(
        family=family,
        vocab_size=count(config, "vocab_size"),
        hidden_size=count(config, "hidden_size"),
        intermediate_size=count(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context_tokens=max_context_tokens,
        rms_norm_eps=_number(config, "rms_norm_eps"),
        tied=None if config.get("tie_word_embeddings") is None else flag(config, "tie_word_embeddings"),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias") and family == "llama",
        qk_norm=family == "qwen3",
        windows=windows_of(config),
        inv_freq=inverse_frequencies(rope_settings(config), head_dim, max_context_tokens),
    )


def rope_settings(config: Json) -> Json:
    """The rotary settings as one object with `rope_theta`, `rope_type` and the type's own numbers.

    Older files say `rope_theta` and `rope_scaling` ({"type" or "rope_type": ...} or null), transformers 5 says
    `rope_parameters`; a file may have both if they agree. Raises ModelLoadError.
    """
    scaling, parameters = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    merged: Json = {} if config.get("rope_theta") is None else {"rope_theta": config["rope_theta"]}
    for name, part in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            raise ModelLoadError(f"config.json: {name} is {part!r}; it must be one object for all layers")
        part = {("rope_type" if key == "type" else key): value for key, value in part.items() if value is not None}
        for key, value in part.items():
            if merged.setdefault(key, value) != value:
                raise ModelLoadError(f"config.json: {key} is {merged[key]!r} and, in {name}, {value!r}; keep one")
    merged.setdefault("rope_theta", ROPE_THETA)
    merged.setdefault("rope_type", "default")
    return merged


def inverse_frequencies(rope: Json, head_dim: int, max_context_tokens: int) -> npt.NDArray[np.float32]:
    """theta^(-2d/D) for d < D/2, scaled as `rope_type` says; computed in float64 and rounded once, [D/2].

    "linear" divides all of them by `factor` (Chen et al., "Extending context window ... via positional interpolation",
    2023). "llama3" divides those whose wavelength exceeds the original context / low_freq_factor, keeps those below the
    original context / high_freq_factor and blends in between (Llama 3.1's release).
    """
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise ModelLoadError(f"config.json: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    inv_freq = _number(rope, "rope_theta") ** (-np.arange(0, head_dim, 2) / head_dim)
    if kind == "linear":
        inv_freq = inv_freq / _number(rope, "factor")
    elif kind == "llama3":
        factor, low, high = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise ModelLoadError(f"config.json: high_freq_factor {high} must be above low_freq_factor {low}")
        original = _number({"original_max_position_embeddings": max_context_tokens, **rope}, ORIGINAL_CONTEXT)
        turns = original * inv_freq / (2 * np.pi)  # how often a pair turns within the original context
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / factor
    return inv_freq.astype(np.float32)


def _refuse_variants(config: Json) -> None:
    """Keys that change what the layers compute, with the only value of each that is known here."""
    expected = {"hidden_act": "silu", "rope_traditional": False, "partial_rotary_factor": 1.0}
    nested = config.get("rope_parameters")
    seen = {**(nested if isinstance(nested, dict) else {}), **config}
    for key, value in expected.items():
        if seen.get(key, value) not in (value, None):
            raise ModelLoadError(f"config.json: {key} {seen[key]!r} is not supported; the reference knows {value!r}")


def _head_dim(config: Json, heads: int) -> int:
    if config.get("head_dim") is not None:
        head_dim = count(config, "head_dim")
    elif config["model_type"] == "qwen3":
        raise ModelLoadError("config.json has no head_dim; a qwen3 model needs one")
    else:
        hidden = count(config, "hidden_size")
        if hidden % heads:
            raise ModelLoadError(f"config.json: hidden_size {hidden} is no multiple of {heads} attention heads")
        head_dim = hidden // heads
    if head_dim % 2:
        raise ModelLoadError(f"config.json: head_dim is {head_dim}; rotary embedding needs an even one")
    return head_dim


def _number(config: Json, key: str) -> float:
    value: Any = config.get(key)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ModelLoadError(f"config.json: {key} is {value!r}; it must be a number above 0")
    return float(value)
