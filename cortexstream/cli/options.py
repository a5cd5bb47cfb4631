"""Options that several commands share, and the model that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cortexstream.config import BACKENDS
from cortexstream.errors import InvalidRequestError

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


FORM = "Form of the output (at most one)"
JsonSchema = Annotated[
    str | None,
    typer.Option(
        "--json-schema", metavar="FILE", rich_help_panel=FORM,
        help="JSON that this schema allows; - is any JSON object.",
    ),
]  # fmt: skip
Regex = Annotated[
    str | None, typer.Option("--regex", metavar="PATTERN", rich_help_panel=FORM, help="Text that matches, as a whole.")
]
Choice = Annotated[
    list[str] | None,
    typer.Option("--choice", metavar="TEXT", rich_help_panel=FORM, help="One of these texts; give several."),
]
Grammar = Annotated[
    str | None,
    typer.Option("--grammar", metavar="FILE", rich_help_panel=FORM, help="Text of this grammar, in Lark's notation."),
]
SpeculativeTokens = Annotated[
    int | None,
    typer.Option(
        "--speculative-tokens", metavar="N", rich_help_panel=ENGINE, show_default="off",
        help="Guess N tokens ahead, from what the text repeats or by --draft-model; the output stays the same.",
    ),
]  # fmt: skip
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model", metavar="FOLDER|ID", rich_help_panel=ENGINE, show_default="none",
        help="A smaller model with the same vocabulary, which guesses for --speculative-tokens.",
    ),
]  # fmt: skip


def form_of(
    json_schema: str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> dict[str, Any]:
    """The sampling parameters that say what the output must be. Raises InvalidRequestError for a file that cannot be
    read."""
    response_format: dict[str, Any] | str | None = None
    if json_schema is not None:
        response_format = {"type": "json_object"} if json_schema == "-" else _read("--json-schema", json_schema)
    return {
        "response_format": response_format, "regex": regex, "choice": choice or None,
        "grammar": None if grammar is None else _read("--grammar", grammar),
    }  # fmt: skip


def _read(option: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(option, f"{file} cannot be read: {error}") from error


def load_llm(
    model: str | None,
    backend: str,
    dtype: str,
    kv_cache_memory: str | None,
    max_model_len: int | None,
    max_num_seqs: int | None,
    speculative_tokens: int | None = None,
    draft_model: str | None = None,
) -> LLM:
    """Load the model; what was not given keeps the engine's default. Raises as `LLM` does."""
    from cortexstream.llm import LLM

    speculative = {"num_speculative_tokens": speculative_tokens, "model": draft_model}
    given_speculative = {name: value for name, value in speculative.items() if value is not None}
    asked: dict[str, Any] = {
        "speculative_config": given_speculative or None,
        "kv_cache_memory": kv_cache_memory,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return LLM(model, backend=backend, dtype=dtype, **given)
