"""A model folder of 11 tokens, 2 layers and 4 numbers a head, random weights; made without torch or mlx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": 3,
}  # fmt: skip


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` to CONFIG that leave the shapes alone."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    for layer in ("model.layers.0", "model.layers.1"):
        for name, shape in {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
                            "self_attn.o_proj": (8, 8), "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8),
                            "mlp.down_proj": (8, 12), "input_layernorm": (8,),
                            "post_attention_layernorm": (8,)}.items():  # fmt: skip
            shapes[f"{layer}.{name}.weight"] = shape
    save_file(
        {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder
