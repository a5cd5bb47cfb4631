"""Model folders for the GPU check, made on the spot: small ones with weights, and one of Llama 3 8B's shape without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from cortexstream.backends.cuda import models

BITS, GROUP = 4, 64  # of packed weights
EMBEDDINGS = "model.embed_tokens"
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4},
    "gemma2": {"num_hidden_layers": 4, "sliding_window": 48, "query_pre_attn_scalar": 64},  # caps are its defaults
}
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 2, "query_pre_attn_scalar": 32, "sliding_window": 8,
}  # fmt: skip
LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 32, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip


def settings_of(architecture: str, values: dict[str, Any]) -> Any:
    """transformers' configuration; what an architecture does not have is left out."""
    known = dict(values)
    if architecture != "gemma2":
        known.pop("sliding_window", None)
        known.pop("query_pre_attn_scalar", None)
    return transformers.AutoConfig.for_model(architecture, **known)


def write_small(folder: Path, architecture: str, smoke: bool) -> Path:
    """A float32 folder of random weights, large enough that every layer matters to the logits."""
    settings = settings_of(architecture, {**SMALL, **KINDS[architecture], **(TINY if smoke else {})})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 2.0 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(str(folder))
    return folder


def large_shape(smoke: bool, layers: int | None = None) -> dict[str, Any]:
    """Llama 3 8B's configuration, in a smoke run that of something tiny."""
    shape = {**LLAMA_3_8B, **({**SMALL, **TINY, "max_position_embeddings": 8192} if smoke else {})}
    return shape if layers is None else {**shape, "num_hidden_layers": layers}


def write_config(folder: Path, shape: dict[str, Any], dtype: torch.dtype) -> Path:
    """A folder with config.json alone."""
    settings = settings_of("llama", shape)
    settings.architectures, settings.dtype = ["LlamaForCausalLM"], dtype
    settings.save_pretrained(str(folder))
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, "model_type": "llama"}))
    return folder


def random_model(shape: dict[str, Any], dtype: torch.dtype, device: torch.device, attention: str) -> Any:
    """transformers' Llama with the random weights that it starts training with, made on the device."""
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            settings_of("llama", shape), dtype=dtype, attn_implementation=attention
        )  # fmt: skip
    return model.eval().requires_grad_(False)


@contextmanager
def random_weights(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within, the backend takes random weights, made on the device, for those of any folder: nothing is read.

    Raises RuntimeError when the backend's loader is not what this replaces a part of.
    """
    names = ("check_weights", "_build")
    lost = [name for name in names if not callable(getattr(models, name, None))]
    if lost:
        raise RuntimeError(f"backends.cuda.models has no {lost[0]} in whose place random weights could be put")
    kept = {name: getattr(models, name) for name in names}
    new: dict[str, Any] = {
        "check_weights": lambda folder: [],
        "_build": lambda *_, **__: random_model(shape, dtype, device, "eager"),
    }
    for name, function in new.items():
        setattr(models, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(models, name, function)


def matrices(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The weights [rows, columns] of a Llama by name, without its norms."""
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    wide, narrow = (shape[name] * head for name in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "self_attn.q_proj": (wide, hidden), "self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, wide), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    found = {f"model.layers.{n}.{k}": size for n in range(shape["num_hidden_layers"]) for k, size in layer.items()}
    return found | {name: (shape["vocab_size"], hidden) for name in (EMBEDDINGS, "lm_head")}


def read_bytes(shape: dict[str, Any], dtype: torch.dtype, packed: bool) -> float:
    """Of the weights that a decode step must read: all but the table of embeddings."""
    numbers = sum(rows * columns for name, (rows, columns) in matrices(shape).items() if name != EMBEDDINGS)
    each: float = BITS / 8 + 2 * dtype.itemsize / GROUP if packed else dtype.itemsize
    return numbers * each


def write_packed(folder: Path, shape: dict[str, Any], dtype: torch.dtype, device: str) -> Path:
    """A folder as mlx-lm quantises it, 4 bits in groups of 64: random codes, made on the device."""
    write_config(folder, shape, dtype)
    path, hidden = folder / "config.json", shape["hidden_size"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": {"group_size": GROUP, "bits": BITS}}))
    layers = [f"model.layers.{number}" for number in range(shape["num_hidden_layers"])]
    norms = [f"{layer}.{name}" for layer in layers for name in ("input_layernorm", "post_attention_layernorm")]
    tensors = {f"{name}.weight": torch.ones(hidden, dtype=dtype) for name in (*norms, "model.norm")}
    for name, (rows, columns) in matrices(shape).items():
        words = (rows, columns * BITS // 32)
        packed = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=device)
        scales = (torch.rand(rows, columns // GROUP, device=device) + 0.5) * (0.25 * columns**-0.5)
        tensors[f"{name}.weight"] = packed.cpu().view(torch.uint32)
        tensors[f"{name}.scales"] = scales.to(dtype).cpu()
        tensors[f"{name}.biases"] = (-7.5 * scales).to(dtype).cpu()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "mlx"})
    return folder
