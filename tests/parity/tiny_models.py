"""Model folders for tests: tiny random models of many architectures, made with mlx-lm's own classes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from tests.conftest import require

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 200,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
WINDOW = 24
FULL: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"head_dim": 16, "rope_scaling": None, "partial_rotary_factor": 1.0},
    "deepseek_v2": {
        "moe_intermediate_size": 32, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32,
        "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "attention_bias": False,
        "rope_scaling": {
            "type": "yarn", "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0,
            "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1,
        },
    },
}  # fmt: skip
WINDOWED: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_hidden_layers": 6, "sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 10000.0,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "rope_scaling": None,
        "num_hidden_layers": 4,
    },
    "cohere2": {
        "head_dim": 16, "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 4,
        "layer_norm_eps": 1e-5, "attention_bias": False, "layer_norm_bias": False, "logit_scale": 0.0625,
    },
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "mamba2": {
        "num_heads": 4, "head_dim": 32, "state_size": 16, "conv_kernel": 4, "n_groups": 1, "use_bias": False,
        "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "time_step_limit": [0.0, 100.0], "time_step_rank": "auto",
        "hidden_size": 64, "expand": 2, "residual_in_fp32": False, "time_step_min": 0.001, "time_step_max": 0.1,
        "chunk_size": 16, "ssm_state_size": 16, "rescale_prenorm_residual": False,
    },
}  # fmt: skip


def write_model(folder: Path, architecture: str, extra: dict[str, Any], seed: int = 1, scale: float = 0.1) -> Path:
    """Save a random float32 model as config.json and model.safetensors; no tokenizer. Returns the folder."""
    mx = require("mlx")
    require("mlx_lm")
    from mlx.utils import tree_flatten, tree_map

    config = {"model_type": architecture, **BASE, **extra}
    file = importlib.import_module(f"mlx_lm.models.{architecture}")
    model = file.Model(file.ModelArgs.from_dict(config))
    mx.random.seed(seed)
    weights = tree_map(
        lambda p: mx.random.normal(p.shape) * scale if p.ndim > 1 else p.astype(mx.float32), model.parameters()
    )
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
