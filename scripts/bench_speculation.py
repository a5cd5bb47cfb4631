"""Guessing ahead against not guessing, in one run: steps, acceptance, tokens per row, tokens per second.

    python scripts/bench_speculation.py --backend mlx --json speculation.json

The embedded model answers two sets of greedy prompts: long copies, whose output repeats the prompt, and stories, whose
output does not. Each set runs one prompt at a time and eight together, without guesses, with prompt lookup, and with
the embedded model as its own draft model, which is the most that a draft model can guess right and also the slowest
one. Modes alternate; figures are medians over the repetitions. The tokens of all modes are compared: any difference
ends the run with an error.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from bench_record import write_record
from tiny_tasks import TASKS

from cortexstream import LLM, SamplingParams
from cortexstream.models import tiny_folder

GUESSES = 4
MODES: dict[str, dict[str, Any] | None] = {
    "no guesses": None,
    "prompt lookup": {"method": "ngram", "num_speculative_tokens": GUESSES},
    "draft model": {"model": str(tiny_folder()), "num_speculative_tokens": GUESSES},
}
PROMPTS = 8


class Found(NamedTuple):
    """Of one set of prompts, in one mode."""

    seconds: float
    steps: int
    drafted_rows: int
    drafted_tokens: int
    accepted_tokens: int
    tokens: list[tuple[int, ...]]


def prompts() -> dict[str, list[str]]:
    rng = random.Random(8)
    copies = [f"copy: {''.join(rng.choice('abcdefghijklmnopqrstuvwxyz') for _ in range(90))}\n" for _ in range(PROMPTS)]
    return {"copies": copies, "stories": [TASKS["story"](rng).prompt for _ in range(PROMPTS)]}


def serve(llm: LLM, texts: list[str], together: bool) -> Found:
    before, started = llm.stats(), perf_counter()
    greedy = SamplingParams(temperature=0, max_tokens=96)
    batches = [texts] if together else [[text] for text in texts]
    outputs = [output for batch in batches for output in llm.generate(batch, greedy, use_tqdm=False)]
    seconds, after = perf_counter() - started, llm.stats()
    return Found(
        seconds, after.steps - before.steps, after.drafted_rows - before.drafted_rows,
        after.drafted_tokens - before.drafted_tokens, after.accepted_tokens - before.accepted_tokens,
        [output.outputs[0].token_ids for output in outputs],
    )  # fmt: skip


def measure(backend: str, repetitions: int) -> list[dict[str, Any]]:
    runs: dict[tuple[str, str, str], list[Found]] = {}
    for repetition in range(repetitions):
        names = list(MODES)[:: 1 if repetition % 2 == 0 else -1]
        for mode in names:
            with LLM(backend=backend, speculative_config=MODES[mode], enable_prefix_caching=False) as llm:
                llm.generate("copy: warm\n", SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
                for kind, texts in prompts().items():
                    for batch in ("one at a time", "together"):
                        runs.setdefault((kind, batch, mode), []).append(serve(llm, texts, batch == "together"))
    table = []
    for (kind, batch, mode), found in runs.items():
        expected = runs[(kind, batch, "no guesses")][0].tokens
        if any(one.tokens != expected for one in found):
            raise SystemExit(f"{kind}, {batch}: {mode} changed the tokens")
        one, seconds = found[0], statistics.median(run.seconds for run in found)
        rows, guessed = one.drafted_rows, one.drafted_tokens
        table.append({
            "prompts": kind, "batch": batch, "mode": mode, "seconds": round(seconds, 3), "steps": one.steps,
            "tokens_per_second": round(sum(map(len, one.tokens)) / seconds, 1),
            "acceptance_rate": round(one.accepted_tokens / guessed, 3) if guessed else None,
            "tokens_per_drafted_row": round(1 + one.accepted_tokens / rows, 2) if rows else None,
        })  # fmt: skip
    return sorted(table, key=lambda line: (line["prompts"], line["batch"], list(MODES).index(line["mode"])))


def main() -> None:
    parser = argparse.ArgumentParser(description="Guessing ahead against not guessing")
    parser.add_argument("--backend", default="reference", choices=("reference", "mlx", "cuda"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    table = measure(arguments.backend, arguments.repetitions)
    print(f"{'prompts':<9}{'batch':<15}{'mode':<15}{'tokens/s':>9}{'steps':>7}{'right':>8}{'per row':>9}")
    for line in table:
        right = "-" if line["acceptance_rate"] is None else f"{line['acceptance_rate']:.0%}"
        per_row = "-" if line["tokens_per_drafted_row"] is None else f"{line['tokens_per_drafted_row']:.2f}"
        print(
            f"{line['prompts']:<9}{line['batch']:<15}{line['mode']:<15}{line['tokens_per_second']:>9.1f}"
            f"{line['steps']:>7}{right:>8}{per_row:>9}"
        )
    if arguments.json is not None:
        write_record(arguments.json, {"backend": arguments.backend, "guesses": GUESSES, "table": table})


if __name__ == "__main__":
    main()
