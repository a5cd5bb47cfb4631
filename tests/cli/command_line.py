"""Runs the real command line in a process of its own, and makes a model for it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from cortexstream.models import tiny_folder
from tests.repo.tree import ROOT

CONTEXT_TOKENS = 4096
EOS = 383  # a token that the tokenizer does not have
SHAPE: dict[str, object] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "max_position_embeddings": CONTEXT_TOKENS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "vocab_size": 384, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
EMBEDDED = (tiny_folder() / "model.safetensors").is_file()


def environment() -> dict[str, str]:
    """This process's, without what would change the answers or draw on them."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CORTEXSTREAM_", "FORCE_COLOR"))}
    return env | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "cortexstream", *arguments]


def cortexstream(
    *arguments: str, given: str | bytes = "", backend: str | None = "reference", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end with `given` as its standard input."""
    chosen = [] if backend is None else ["--backend", backend]
    done = subprocess.run(
        command(*arguments, *chosen), input=given if isinstance(given, bytes) else given.encode(), capture_output=True,
        cwd=ROOT, timeout=120, check=False, env=environment() | (env or {}),
    )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def lines_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    """The JSON lines of a command that must have gone well."""
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def is_one_sentence(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """A refusal: this exit code, nothing on standard output, and one line with these words on standard error."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def write_random_llama(folder: Path) -> Path:
    """A Llama of random weights with the embedded model's tokenizer, which never ends a greedy text of its own accord:
    the embedding of its end of sequence is zero."""
    importlib.import_module("scripts.train_tiny").write_tokenizer(folder)
    rng = np.random.default_rng(7)
    hidden, inner, query, key = 32, 48, 64, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (384, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (query, hidden), f"{name}.self_attn.k_proj.weight": (key, hidden),
            f"{name}.self_attn.v_proj.weight": (key, hidden), f"{name}.self_attn.o_proj.weight": (hidden, query),
            f"{name}.mlp.gate_proj.weight": (inner, hidden), f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner), f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }  # fmt: skip
    weights = {
        name: (rng.normal(0, 0.4, shape) if len(shape) > 1 else np.ones(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    weights["model.embed_tokens.weight"][EOS] = 0.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", **SHAPE}
    config |= {"eos_token_id": EOS, "bos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
