"""The Llama family in numpy: embedding, layers of attention and gated MLP, final norm, output layer.

The model knows neither a cache nor who shares a step with whom: tokens come flat, each with its position, and `attend`
does what needs the past. With `apart`, every token is multiplied by a weight by itself (`Linear`), so its numbers are
the same bits whoever its neighbours are and however its prompt was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cortexstream.backends.reference.settings import Settings
from cortexstream.errors import ModelLoadError
from cortexstream.kernels.reference.rms_norm import rms_norm
from cortexstream.kernels.reference.rope import rope

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

Attend = Callable[[int, Floats, Floats, Floats], Floats]
"""(layer, q [N, Hq, D], k [N, Hkv, D], v [N, Hkv, D]) -> [N, Hq, D]: store k and v, then attend over all stored."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = W x + b for weight [out, in] and bias [out] or None."""

    weight: Floats
    bias: Floats | None
    apart: bool  # multiply one token at a time?

    def __call__(self, x: Floats) -> Floats:
        """x [N, in] -> [N, out], with `apart` one matrix-vector product per token: a matrix-matrix product rounds a
        token's numbers differently depending on how many tokens there are."""
        y: Floats = np.matmul(self.weight, x[:, :, None])[:, :, 0] if self.apart else x @ self.weight.T
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One decoder layer's weights, named as in the checkpoint."""

    input_layernorm: Floats
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: Floats | None  # [head_dim], only with qk_norm
    k_norm: Floats | None
    post_attention_layernorm: Floats
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


class Model:
    """The weights and what is computed with them. Raises ModelLoadError for a missing, misshapen or unknown tensor."""

    def __init__(self, settings: Settings, weights: dict[str, Floats], apart: bool = True) -> None:
        self.settings = settings
        take = _Taker(weights, apart)
        s = settings
        self._embedding = take("model.embed_tokens.weight", s.vocab_size, s.hidden_size)
        self._layers = [_take_layer(take, s, f"model.layers.{number}") for number in range(len(s.windows))]
        self._norm = take("model.norm.weight", s.hidden_size)
        tied = "lm_head.weight" not in weights if s.tied is None else s.tied
        output = self._embedding if tied else take("lm_head.weight", s.vocab_size, s.hidden_size)
        self._output = Linear(output, None, apart)
        self.weight_bytes = take.taken_bytes
        # Both are redundant copies that some tools write.
        known = {"lm_head.weight"} if tied else set()
        unknown = sorted(n for n in weights if n not in known and not n.endswith("rotary_emb.inv_freq"))
        if unknown:
            raise ModelLoadError(f"tensor {unknown[0]} has no place in a {s.family} model as config.json describes it")

    def hidden(self, tokens: Ints, positions: Ints, attend: Attend) -> Floats:
        """The last layer's normalised output for every token: tokens [N], positions [N] -> [N, hidden]."""
        x = self._embedding[tokens]
        for number, layer in enumerate(self._layers):
            x = x + self._attention(number, layer, rms_norm(x, layer.input_layernorm, self._eps), positions, attend)
            x = x + _mlp(layer, rms_norm(x, layer.post_attention_layernorm, self._eps))
        return rms_norm(x, self._norm, self._eps)

    def logits(self, hidden: Floats) -> Floats:
        """hidden [R, hidden] -> [R, vocab]."""
        return self._output(hidden)

    def _attention(self, number: int, layer: Layer, x: Floats, positions: Ints, attend: Attend) -> Floats:
        s, tokens = self.settings, len(x)
        q = layer.q_proj(x).reshape(tokens, s.num_heads, s.head_dim)
        k = layer.k_proj(x).reshape(tokens, s.num_kv_heads, s.head_dim)
        v = layer.v_proj(x).reshape(tokens, s.num_kv_heads, s.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, self._eps), rms_norm(k, layer.k_norm, self._eps)
        q, k = rope(q, positions, s.inv_freq), rope(k, positions, s.inv_freq)
        return layer.o_proj(attend(number, q, k, v).reshape(tokens, -1))

    @property
    def _eps(self) -> float:
        return self.settings.rms_norm_eps


def _mlp(layer: Layer, x: Floats) -> Floats:
    """SwiGLU (Shazeer, "GLU variants improve transformer", 2020): down(silu(gate(x)) * up(x))."""
    return layer.down_proj(silu(layer.gate_proj(x)) * layer.up_proj(x))


def silu(x: Floats) -> Floats:
    """x * sigmoid(x), by the exponential that cannot overflow: of -|x|."""
    small = np.exp(-np.abs(x))
    result: Floats = x * np.where(x >= 0, np.float32(1), small) / (1 + small)
    return result


class _Taker:
    """Takes tensors out of a dict one by one, so that what is left over is known; checks their shapes."""

    def __init__(self, weights: dict[str, Floats], apart: bool) -> None:
        self._weights, self._apart = weights, apart
        self.taken_bytes = 0

    def __call__(self, name: str, *shape: int) -> Floats:
        tensor = self._weights.pop(name, None)
        if tensor is None:
            raise ModelLoadError(f"tensor {name} of shape {shape} is missing from the weight files")
        if tensor.shape != shape:
            raise ModelLoadError(f"tensor {name} has shape {tensor.shape}; config.json asks for {shape}")
        self.taken_bytes += tensor.nbytes
        return tensor

    def linear(self, name: str, outputs: int, inputs: int, bias: bool) -> Linear:
        weight = self(f"{name}.weight", outputs, inputs)
        return Linear(weight, self(f"{name}.bias", outputs) if bias else None, self._apart)


def _take_layer(take: _Taker, s: Settings, name: str) -> Layer:
    queries, keys = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    return Layer(
        input_layernorm=take(f"{name}.input_layernorm.weight", s.hidden_size),
        q_proj=take.linear(f"{attention}.q_proj", queries, s.hidden_size, s.qkv_bias),
        k_proj=take.linear(f"{attention}.k_proj", keys, s.hidden_size, s.qkv_bias),
        v_proj=take.linear(f"{attention}.v_proj", keys, s.hidden_size, s.qkv_bias),
        o_proj=take.linear(f"{attention}.o_proj", s.hidden_size, queries, s.output_bias),
        q_norm=take(f"{attention}.q_norm.weight", s.head_dim) if s.qk_norm else None,
        k_norm=take(f"{attention}.k_norm.weight", s.head_dim) if s.qk_norm else None,
        post_attention_layernorm=take(f"{name}.post_attention_layernorm.weight", s.hidden_size),
        gate_proj=take.linear(f"{mlp}.gate_proj", s.intermediate_size, s.hidden_size, s.mlp_bias),
        up_proj=take.linear(f"{mlp}.up_proj", s.intermediate_size, s.hidden_size, s.mlp_bias),
        down_proj=take.linear(f"{mlp}.down_proj", s.hidden_size, s.intermediate_size, s.mlp_bias),
    )
