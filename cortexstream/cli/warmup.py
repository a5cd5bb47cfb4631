"""`cortexstream warmup`: pay for what the first request would pay, and tell what it was."""

from __future__ import annotations

from time import perf_counter
from typing import Annotated

import typer

from cortexstream.cli import options


def warmup(
    model: options.Model = None,
    backend: options.Backend = "auto",
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", help="Length of the prompt that is run.")
    ] = 64,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="N", help="Largest decode step.", show_default="as many sequences as can run"),
    ] = None,
    dtype: options.DType = "auto",
    kv_cache_memory: options.KVCacheMemory = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
) -> None:
    """Load the model, run a prompt and decode steps once, and print the seconds of each.

    What a system keeps between processes (compiled kernels, files in memory) then waits for nobody.
    """
    started = perf_counter()
    with options.load_llm(model, backend, dtype, kv_cache_memory, max_model_len, max_num_seqs) as llm:
        rows = [(f"load on {llm.info.name}, {llm.info.device}", perf_counter() - started)]
        rows += llm.warmup(prompt_tokens, batch).steps
        rows.append(("in all", perf_counter() - started))
    width = max(len(name) for name, _ in rows)
    for name, seconds in rows:
        print(f"{name:{width}}  {seconds:8.3f} s")
