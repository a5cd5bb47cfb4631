"""Model folders for tests: tiny random models of many architectures, made with transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import require

BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
WINDOW = 8
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "ministral": {"sliding_window": WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
                  "num_hidden_layers": 4},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**MOE, "head_dim": 16},
    "phi3": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "phi": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "sliding_window": WINDOW, "num_hidden_layers": 4},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "smollm3": {"num_hidden_layers": 4},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "cohere": {},
    "cohere2": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "deepseek_v2": {**MLA, "topk_method": "greedy"},
    "deepseek_v3": MLA,
    "starcoder2": {},
    "stablelm": {},
    "gpt_neox": {},
    "helium": {"head_dim": 16},
    "nemotron": {"hidden_act": "relu2"},
    "ernie4_5": {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "exaone4": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "arcee": {},
    "apertus": {},
    "dots1": {**MLA, "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip


def write_model(
    folder: Path, architecture: str, extra: dict[str, Any], dtype: str = "float32", scale: float = 0.15
) -> Path:
    """Save a random model as transformers saves it; no tokenizer. Returns the folder."""
    torch: Any = require("torch")
    transformers: Any = require("transformers")
    settings = transformers.AutoConfig.for_model(architecture, **{**BASE, **extra})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # larger than the usual start, so that layers and positions matter to the logits
                parameter.normal_(0.0, scale)
            elif "sink" in name:
                parameter.normal_(0.0, 1.0)
    model.to(getattr(torch, dtype)).save_pretrained(str(folder))
    return folder
