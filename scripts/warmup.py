"""Warm a model up from a program of your own: what `cortexstream warmup` does, in a few lines of the public API.

python scripts/warmup.py --prompt-tokens 256 --batch 16
"""

from __future__ import annotations

import argparse
from time import perf_counter

from cortexstream import LLM, CortexStreamError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hugging Face id; the embedded model when absent")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, help="largest decode step; as many sequences as can run when absent")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-memory", help="such as 512MiB")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    args = parser.parse_args()
    try:
        run(args)
    except CortexStreamError as error:
        raise SystemExit(f"error: {error}") from None


def run(args: argparse.Namespace) -> None:
    started = perf_counter()
    with LLM(
        args.model, backend=args.backend, dtype=args.dtype, kv_cache_memory=args.kv_cache_memory,
        max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs,
    ) as llm:  # fmt: skip
        print(f"{perf_counter() - started:8.3f} s  load on {llm.info.name}, {llm.info.device}")
        for name, seconds in llm.warmup(args.prompt_tokens, args.batch).steps:
            print(f"{seconds:8.3f} s  {name}")


if __name__ == "__main__":
    main()
