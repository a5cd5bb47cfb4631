"""Options that several commands share, and the model that they describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cortexstream.config import BACKENDS

if TYPE_CHECKING:
    from cortexstream.llm import LLM

ENGINE = "Model and engine"
SAMPLING = "Sampling"

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="FOLDER|ID", rich_help_panel=ENGINE, show_default="the embedded model",
        help="A model's folder, or a Hugging Face id such as owner/name.",
    ),
]  # fmt: skip
Backend = Annotated[
    str, typer.Option("--backend", metavar="NAME", rich_help_panel=ENGINE, help=f"One of {', '.join(BACKENDS)}.")
]
DType = Annotated[
    str, typer.Option("--dtype", metavar="NAME", rich_help_panel=ENGINE, help="auto, float32, bfloat16 or float16.")
]
KVCacheMemory = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-memory", metavar="SIZE", rich_help_panel=ENGINE, show_default="a share of what is free",
        help="Memory for keys and values, such as 512MiB or 4GiB.",
    ),
]  # fmt: skip
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len", metavar="TOKENS", rich_help_panel=ENGINE, show_default="the model's context",
        help="Longest sequence, prompt and output together.",
    ),
]  # fmt: skip
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs", metavar="N", rich_help_panel=ENGINE, show_default="64", help="Sequences that run at once."
    ),
]

Temperature = Annotated[
    float,
    typer.Option("--temperature", "-t", rich_help_panel=SAMPLING, help="0 takes the likeliest token: repeatable."),
]
TopP = Annotated[float, typer.Option("--top-p", rich_help_panel=SAMPLING, help="Nucleus, above 0 to 1; 1 is off.")]
TopK = Annotated[int, typer.Option("--top-k", rich_help_panel=SAMPLING, help="Keep the k likeliest; 0 is off.")]
MinP = Annotated[
    float, typer.Option("--min-p", rich_help_panel=SAMPLING, help="Least share of the likeliest token; 0 is off.")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", rich_help_panel=SAMPLING, show_default="fixed", help="Of every prompt's draws."),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", metavar="N", rich_help_panel=SAMPLING, help="Longest completion, in tokens.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", rich_help_panel=SAMPLING, help="End before this text; may be repeated."),
]


def load_llm(
    model: str | None,
    backend: str,
    dtype: str,
    kv_cache_memory: str | None,
    max_model_len: int | None,
    max_num_seqs: int | None,
) -> LLM:
    """Load the model; what was not given keeps the engine's default. Raises as `LLM` does."""
    from cortexstream.llm import LLM

    asked: dict[str, Any] = {
        "kv_cache_memory": kv_cache_memory,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return LLM(model, backend=backend, dtype=dtype, **given)
