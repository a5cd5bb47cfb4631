"""What batch invariance costs: decode and prefill with the mode on and off, in turns, on every backend that is here.

    python scripts/bench_invariance.py [--json docs/benchmarks/invariance.json] [--rounds 5]

The embedded model, a random one of four layers, 512 wide, and where there is torch one with experts (two layers, 256
wide, 8 experts of which 2 are used); medians over the rounds. MLX has no other arithmetic to
switch to, so there the two must be alike. A third of a minute for each backend and model on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from bench_record import write_record

from cortexstream import LLM, SamplingParams

BATCHES = (1, 8, 32)
EXPERTS = "experts, 2 x 256"
DECODED = 12  # tokens a round and row
PREFILLED = 256  # tokens of one prompt
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1408,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {"embedded": None, "random, 4 x 512": write_random(Path(folder))}
        cases = []
        for backend in backends():
            its_own = {EXPERTS: write_experts(Path(folder) / "experts")} if backend["backend"] == "cuda" else {}
            cases += [measure(backend, name, model, options.rounds) for name, model in {**models, **its_own}.items()]
    if options.json is not None:
        values = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "rounds": options.rounds, "cases": cases}
        write_record(options.json, values)


def backends() -> list[dict[str, Any]]:
    """Options of those whose libraries are installed; the cuda backend on its torch kernels."""
    found: list[dict[str, Any]] = [{"backend": "reference"}]
    if find_spec("mlx") and find_spec("mlx_lm"):
        found.append({"backend": "mlx"})
    if find_spec("torch") and find_spec("transformers"):
        found.append({"backend": "cuda", "backend_options": {"kernels": "torch"}})
    return found


def measure(backend: dict[str, Any], name: str, model: Path | None, rounds: int) -> dict[str, Any]:
    """Milliseconds of a decode step for each of BATCHES and of a prompt, on and off, and what the backend says."""
    common = {
        **backend, "skip_tokenizer_init": True, "num_kv_blocks": 2048, "block_tokens": 16,
        "enable_prefix_caching": False, "max_num_batched_tokens": 2048,
    }  # fmt: skip
    with (
        LLM(model, **common, batch_invariant=True) as on, LLM(model, **common, batch_invariant=False) as off,
        LLM(model, **common) as auto,
    ):  # fmt: skip
        told = {"backend": on.info.name, "device": on.info.device, "dtype": on.info.dtype, "model": name,
                "on_holds": on.info.batch_invariant, "auto": auto.info.batch_invariant,
                "invariance": on.info.invariance}  # fmt: skip
        times: dict[str, dict[str, float]] = {}
        for batch in BATCHES:
            times[f"decode step of {batch}"] = alternate(on, off, rounds, batch, 1, DECODED)
        times[f"prompt of {PREFILLED}"] = alternate(on, off, rounds, 1, PREFILLED, 1)
    for what, found in times.items():
        print(f"{told['backend']:10} {name:16} {what:18} on {found['on_ms']:8.2f} ms  off {found['off_ms']:8.2f} ms  "
              f"{found['cost']:+.0%}", flush=True)  # fmt: skip
    return {**told, "times": times}


def alternate(on: LLM, off: LLM, rounds: int, batch: int, prompt: int, tokens: int) -> dict[str, float]:
    """Medians, in ms a step; the first round is not counted."""
    prompts = [[3 + (7 * i + 11 * row) % 300 for i in range(prompt)] for row in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    taken: dict[str, list[float]] = {"on": [], "off": []}
    for number in range(rounds + 1):
        for key, llm in (("on", on), ("off", off)) if number % 2 else (("off", off), ("on", on)):
            began_s = perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            if number:
                taken[key].append((perf_counter() - began_s) / tokens * 1e3)
    on_ms, off_ms = median(taken["on"]), median(taken["off"])
    return {"on_ms": round(on_ms, 3), "off_ms": round(off_ms, 3), "cost": round(on_ms / off_ms - 1, 3)}


def write_random(folder: Path) -> Path:
    """A model folder with random weights, in float32, written by hand: no library is needed."""
    rng = np.random.default_rng(0)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], hidden), "model.norm.weight": (hidden,),
    }  # fmt: skip
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (hidden,), f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (hidden, hidden), f"{name}.self_attn.k_proj.weight": (keys, hidden),
            f"{name}.self_attn.v_proj.weight": (keys, hidden), f"{name}.self_attn.o_proj.weight": (hidden, hidden),
            f"{name}.mlp.gate_proj.weight": (inner, hidden), f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner),
        }  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.05, shape)
        part = values.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_experts(folder: Path) -> Path:
    """A mixtral with random weights, made by transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = transformers.MixtralConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(settings).save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    main()
