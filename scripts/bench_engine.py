"""CortexStream on MLX against mlx-lm's own continuous batching (mlx_lm.generate.BatchGenerator), in one run.

    python scripts/bench_engine.py --json engine.json
    python scripts/bench_engine.py --requests 4 --longest-prompt 64 --longest-output 24 --repetitions 1    # a glance

Both serve the same trace of the same model: 24 prompts of random tokens, 16 to 1000 long, 16 to 128 tokens of output
each, at most 16 at once, greedy, end-of-sequence ignored. A request arrives when a given number of tokens has been
generated, not at a time, so both see the same arrivals. Each repetition starts a new process for either side, the order
changing with every repetition; both run a trace of other prompts first, so that nothing is loaded or compiled while the
clock runs. Both sides are driven as libraries, on token ids, without text.

What is not the same, on purpose: each side runs with its own defaults. mlx-lm prefills up to 8 prompts together in
chunks of 2048 tokens (--mlx-lm-prefill sets the chunk; the longest prompt fits in one, which suits mlx-lm best) and
computes log probabilities of every step, as its interface promises. CortexStream plans at most 512 tokens per step and
has its whole KV arena allocated from the start, which its peak memory includes.

A step is one call of `EngineCore.step` or `BatchGenerator.next`; a decode step is one with no prompt in it nor in the
call before it, because both keep one step in flight.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

sys.path.insert(0, str(Path(__file__).parent))
from bench_record import write_record

SIDES = ("cortexstream", "mlx-lm")
SHORTEST = 16  # tokens, of prompts and of outputs
WARM_UP_OUTPUT = 8
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of getrusage's unit


class Job(NamedTuple):
    """A request of the trace; it arrives when `arrival` tokens have been generated, or when nothing else is left."""

    number: int
    arrival: int
    prompt: tuple[int, ...]
    num_output: int


class Step(NamedTuple):
    seconds: float
    prefills: bool  # it held prompt tokens
    tokens: list[tuple[int, int]]  # (job number, token) that came out


class Side(Protocol):
    """One engine, driven step by step."""

    settings: dict[str, Any]

    def add(self, job: Job) -> None: ...

    def step(self) -> tuple[bool, list[tuple[int, int]]]:
        """Run one; (whether it held prompt tokens, what came out)."""
        ...


class CortexStream:
    """EngineCore on the mlx backend, on this thread."""

    def __init__(self, model: Path, max_num_seqs: int, _: int | None) -> None:
        from cortexstream import EngineConfig
        from cortexstream.backend import BackendOptions
        from cortexstream.engine import EngineCore
        from cortexstream.platform import load

        config = EngineConfig(model=str(model), backend="mlx", max_num_seqs=max_num_seqs)
        backend = load("mlx", BackendOptions(model=str(model), max_num_seqs=max_num_seqs))
        self._core = EngineCore(backend, config)
        self._out: list[tuple[int, int]] = []
        self._prompt_tokens = 0  # computed so far
        self.settings: dict[str, Any] = {
            "max_num_seqs": max_num_seqs, "max_num_batched_tokens": config.max_num_batched_tokens,
            "dtype": backend.info.dtype, "device": backend.info.device, "kv_bytes": self._core.kv_bytes,
            "notes": list(backend.info.notes),
        }  # fmt: skip

    def add(self, job: Job) -> None:
        from cortexstream import SamplingParams
        from cortexstream.request import Request
        from cortexstream.scheduler import TokenEvent

        def take(event: TokenEvent) -> bool:
            if event.error is not None or event.token is None:
                raise SystemExit(f"request {job.number} failed: {event.error}")
            self._out.append((job.number, event.token))
            return False

        sampling = SamplingParams(temperature=0, max_tokens=job.num_output, ignore_eos=True)
        self._core.add(Request(job.number, job.prompt, sampling, seed=0), take)

    def step(self) -> tuple[bool, list[tuple[int, int]]]:
        self._core.step()
        out, self._out = self._out, []
        before, self._prompt_tokens = self._prompt_tokens, self._core.stats().prompt_tokens
        return self._prompt_tokens != before, out


class MlxLm:
    """BatchGenerator as mlx-lm ships it."""

    def __init__(self, model: Path, max_num_seqs: int, prefill: int | None) -> None:
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.generate import BatchGenerator
        from mlx_lm.utils import load_model

        loaded, _ = load_model(model)
        if not mx.metal.is_available():  # as CortexStream does on a CPU
            loaded.set_dtype(mx.float32)
            mx.eval(loaded.parameters())
        chosen = {} if prefill is None else {"prefill_step_size": prefill}
        self._generator = BatchGenerator(loaded, completion_batch_size=max_num_seqs, **chosen)
        self._jobs: dict[int, int] = {}  # mlx-lm's number of a request -> ours
        dtypes = [array.dtype for _, array in tree_flatten(loaded.parameters())]
        self.settings: dict[str, Any] = {
            "completion_batch_size": self._generator.completion_batch_size,
            "prefill_batch_size": self._generator.prefill_batch_size,
            "prefill_step_size": self._generator.prefill_step_size,
            "dtype": str(next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating))).removeprefix(
                "mlx.core."
            ),
        }

    def add(self, job: Job) -> None:
        (uid,) = self._generator.insert([list(job.prompt)], max_tokens=[job.num_output])
        self._jobs[uid] = job.number

    def step(self) -> tuple[bool, list[tuple[int, int]]]:
        prompts, responses = self._generator.next()  # finished sequences leave by themselves
        return bool(prompts), [(self._jobs[r.uid], int(r.token)) for r in responses]


def trace(seed: int, requests: int, longest_prompt: int, longest_output: int, vocab_size: int) -> list[Job]:
    """Lengths are log-uniform; arrivals spread over the first two thirds of all output, three at the start."""
    rng = random.Random(seed)

    def length(longest: int) -> int:
        return int(SHORTEST * (longest / SHORTEST) ** rng.random() + 0.5)

    outputs = [length(longest_output) for _ in range(requests)]
    arrivals = sorted(rng.randrange(1 + 2 * sum(outputs) // 3) for _ in range(requests))
    arrivals[:3] = [0] * min(3, requests)
    return [
        Job(number, arrival, tuple(rng.randrange(vocab_size) for _ in range(length(longest_prompt))), num_output)
        for number, (arrival, num_output) in enumerate(zip(arrivals, outputs, strict=True))
    ]


def play(side: Side, jobs: list[Job]) -> Iterator[Step]:
    """Serve a trace to its end."""
    waiting = list(jobs)
    unfinished: dict[int, int] = {}
    generated = 0
    while waiting or unfinished:
        started = perf_counter()
        while waiting and (waiting[0].arrival <= generated or not unfinished):
            job = waiting.pop(0)
            unfinished[job.number] = job.num_output
            side.add(job)
        prefills, tokens = side.step()
        for number, _ in tokens:
            unfinished[number] -= 1
            if not unfinished[number]:
                del unfinished[number]
        generated += len(tokens)
        yield Step(perf_counter() - started, prefills, tokens)


def work(options: dict[str, Any]) -> dict[str, Any]:
    """One measured run of one side, in this process."""
    import mlx.core as mx

    kind = CortexStream if options["side"] == "cortexstream" else MlxLm
    side: Side = kind(Path(options["model"]), options["max_num_seqs"], options["mlx_lm_prefill"])
    shape = [options[name] for name in ("requests", "longest_prompt", "longest_output", "vocab_size")]
    jobs = trace(options["seed"], *shape)
    others = trace(options["seed"] + 1, *shape)
    for _ in play(side, [job._replace(num_output=WARM_UP_OUTPUT, number=job.number + len(jobs)) for job in others]):
        pass
    mx.reset_peak_memory()
    started = perf_counter()
    steps = list(play(side, jobs))
    wall_s = perf_counter() - started
    tokens: list[list[int]] = [[] for _ in jobs]
    for step in steps:
        for number, token in step.tokens:
            tokens[number].append(token)
    decode = [b for a, b in pairwise(steps) if b.tokens and not (a.prefills or b.prefills)]
    if not decode:
        raise SystemExit("no step held decode rows only; raise --longest-output")
    return {
        "side": options["side"], "settings": side.settings, "tokens": tokens, "wall_s": wall_s,
        "tokens_per_s": sum(map(len, tokens)) / wall_s, "steps": len(steps), "decode_steps": len(decode),
        "decode_s": sum(step.seconds for step in decode),
        "median_decode_ms": 1000 * statistics.median(step.seconds for step in decode),
        "mean_decode_rows": statistics.mean(len(step.tokens) for step in decode),
        "peak_mlx_bytes": int(mx.get_peak_memory()),
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
    }  # fmt: skip


def run_side(options: dict[str, Any]) -> dict[str, Any]:
    """`work` in a new process."""
    command = [sys.executable, __file__, "--work", json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{options['side']} failed with exit code {done.returncode}; its error is above")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


NUMBERS = {
    "tokens_per_s": ("tokens/s", 1.0), "wall_s": ("wall, s", 1.0), "decode_s": ("of which decode steps, s", 1.0),
    "median_decode_ms": ("median decode step, ms", 1.0), "mean_decode_rows": ("rows of a decode step", 1.0),
    "peak_mlx_bytes": ("peak MLX memory, MiB", 2.0**20), "peak_process_bytes": ("peak process memory, MiB", 2.0**20),
}  # fmt: skip


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the repetitions of each side."""
    return {
        side: {name: statistics.median(run[name] for run in runs if run["side"] == side) for name in NUMBERS}
        for side in SIDES
    }


def agreement(runs: list[dict[str, Any]]) -> int:
    """How many requests got the same tokens in every run of both sides."""
    return sum(all(run["tokens"][i] == runs[0]["tokens"][i] for run in runs) for i in range(len(runs[0]["tokens"])))


def report(runs: list[dict[str, Any]], medians: dict[str, dict[str, float]]) -> None:
    for side in SIDES:
        settings = next(run["settings"] for run in runs if run["side"] == side)
        print(f"{side}: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    print(f"\n{'medians':28}{'CortexStream':>14}{'mlx-lm':>12}{'ratio':>8}")
    for name, (title, unit) in NUMBERS.items():
        ours, theirs = (medians[side][name] / unit for side in SIDES)
        print(f"{title:28}{ours:14.2f}{theirs:12.2f}{ours / theirs:8.2f}")
    same, total = agreement(runs), len(runs[0]["tokens"])
    print(f"\ngreedy tokens: {same} of {total} requests are the same in all {len(runs)} runs")
    ratio = medians["cortexstream"]["tokens_per_s"] / medians["mlx-lm"]["tokens_per_s"]
    print(f"CortexStream generates {ratio:.2f} times as many tokens per second as mlx-lm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hugging Face id; the embedded model when absent")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--longest-prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--longest-output", type=int, default=128, help="tokens")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="rows of a batch, on both sides")
    parser.add_argument("--mlx-lm-prefill", type=int, help="prefill_step_size of mlx-lm; its default when absent")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, settings and numbers")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(json.loads(args.work))))
        return
    if min(args.requests, args.repetitions) < 1 or min(args.longest_prompt, args.longest_output) < SHORTEST:
        parser.error(f"--requests and --repetitions must be at least 1, lengths at least {SHORTEST}")
    measure(args)


def measure(args: argparse.Namespace) -> None:
    from cortexstream import ModelLoadError
    from cortexstream.models import resolve_model

    try:
        model = resolve_model(args.model)
    except ModelLoadError as error:
        raise SystemExit(f"error: {error}") from None
    names = ("requests", "longest_prompt", "longest_output", "max_num_seqs", "mlx_lm_prefill", "seed")
    options = {name: getattr(args, name) for name in names} | {"model": str(model)}
    options["vocab_size"] = json.loads((model / "config.json").read_text())["vocab_size"]
    runs = []
    for repetition in range(args.repetitions):
        for side in SIDES if repetition % 2 == 0 else SIDES[::-1]:
            print(f"repetition {repetition + 1} of {args.repetitions}: {side}", file=sys.stderr, flush=True)
            runs.append(run_side(options | {"side": side}))
    medians = summarise(runs)
    report(runs, medians)
    if args.json:
        numbers = [{name: value for name, value in run.items() if name != "tokens"} for run in runs]
        same = {"requests": args.requests, "with_equal_tokens": agreement(runs)}
        trace_options = {**options, "model": args.model or "embedded"}
        write_record(args.json, {"trace": trace_options, "agreement": same, "medians": medians, "runs": numbers})


if __name__ == "__main__":
    main()
