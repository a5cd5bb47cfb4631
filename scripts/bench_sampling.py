"""What a draw costs, by sampler, vocabulary and batch; and its share of a decode step of the embedded model.

    python scripts/bench_sampling.py --json sampling.json
    python scripts/bench_sampling.py --vocabularies 384 --seconds 0.1      # a glance

Table 1, milliseconds for the whole batch, medians of as many calls as fit into --seconds, or of 3 if they fit into
thrice that:

  numpy          `cortexstream.sampling.draw`, the definition, a row at a time
  numpy, fast    `backends.common.fast_draw`, which gives the same tokens; the reference backend draws with it
  mlx            the draw of the mlx backend
  torch, host    the draw of the cuda backend where its device is the CPU: numpy, fast
  torch          its draw on a GPU without Triton, here on the CPU
  Triton         its draw on a GPU; not measured where there is none
  mlx-lm         mlx_lm.sample_utils.make_sampler, on logits; it has no seeds by row, and no penalties
  torch, usual   temperature: softmax, divided by exponential noise, argmax (vLLM's way); filters: softmax, sort,
                 cumulative sum, multinomial; without seeds by row

Three kinds of rows: greedy; temperature 0.8; and all filters: temperature 0.8, top-k 50, top-p 0.95, min-p 0.02. The
last with penalties on 200 tokens where the sampler has them ("all filters, penalties"). Logits are normal with a
standard deviation of 3. numpy uses one core, the others what they take.

Table 2: a decode step of the embedded model after 64 tokens each, and what the same rows' draw takes by itself; with
its own vocabulary, and with one widened to the largest of --vocabularies by random embeddings of the same lengths.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
from bench_record import write_record

from cortexstream import platform, sampling
from cortexstream.backend import BackendOptions
from cortexstream.backends.common import checkpoint, fast_draw
from cortexstream.models import tiny_folder
from cortexstream.plan import KVRows, PlanRow, SampleSpec, StepPlan

GREEDY, TEMPERATURE, FILTERS, PENALTIES = "greedy", "temperature", "all filters", "all filters, penalties"
FILTERED: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02}
HISTORY = 200  # tokens that penalties look at
EMBEDDED = 384
CONTEXT, STEPS, COLD = 64, 25, 3  # of the decode steps; those that are not counted
EMBEDDING = "model.embed_tokens.weight"  # the head too
GOALS = {"chain_ms": 10.0, "share": 0.1}

Call = Callable[[], Any]
Maker = Callable[[Any, list[SampleSpec], str], Call | None]
"""(logits float32 [rows, vocabulary], specs, kind) -> what is timed; None where the sampler does not have the kind."""


def specs_of(kind: str, rows: int, vocab: int) -> list[SampleSpec]:
    fields: dict[str, Any] = {GREEDY: {}, TEMPERATURE: {"temperature": 0.8}}.get(kind, FILTERED)
    spec = SampleSpec(**fields)
    if kind == PENALTIES:
        seen = tuple(np.random.default_rng(1).integers(vocab, size=HISTORY).tolist())
        spec = spec._replace(
            repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, output_tokens=seen
        )  # fmt: skip
    return [spec._replace(seed=row) for row in range(rows)]


def by_definition(logits: Any, specs: list[SampleSpec], kind: str) -> Call:
    return lambda: [sampling.draw(z, spec, CONTEXT) for z, spec in zip(logits, specs, strict=True)]


def by_numpy(logits: Any, specs: list[SampleSpec], kind: str) -> Call:
    return partial(fast_draw.draw, logits, specs, [CONTEXT] * len(specs))


def by_mlx(logits: Any, specs: list[SampleSpec], kind: str) -> Call:
    import mlx.core as mx

    from cortexstream.backends.mlx.sample import draw

    z, nothing = mx.array(logits), [None] * len(specs)
    return lambda: mx.eval(*draw(z, specs, [CONTEXT] * len(specs), nothing))


def by_host(logits: Any, specs: list[SampleSpec], kind: str) -> Call:
    import torch

    from cortexstream.backends.cuda.host_sample import draw

    return partial(draw, torch.from_numpy(logits), specs, [CONTEXT] * len(specs), [None] * len(specs))


def by_torch(logits: Any, specs: list[SampleSpec], kind: str) -> Call:
    import torch

    from cortexstream.backends.cuda.sample import draw

    return partial(draw, torch.from_numpy(logits), specs, [CONTEXT] * len(specs), [None] * len(specs))


def by_triton(logits: Any, specs: list[SampleSpec], kind: str) -> Call | None:
    import torch

    if not torch.cuda.is_available():
        return None
    from cortexstream.backends.cuda.triton_sample import draw

    z, nothing = torch.from_numpy(logits).cuda(), [None] * len(specs)

    def call() -> None:
        draw(z, specs, [CONTEXT] * len(specs), nothing)
        torch.cuda.synchronize()

    return call


def by_mlx_lm(logits: Any, specs: list[SampleSpec], kind: str) -> Call | None:
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    if kind == PENALTIES:
        return None
    spec = specs[0]
    top_p = 0.0 if spec.top_p == 1.0 else spec.top_p
    z, sampler = mx.array(logits), make_sampler(spec.temperature, top_p, spec.min_p, top_k=spec.top_k)
    return lambda: mx.eval(sampler(z - mx.logsumexp(z, axis=-1, keepdims=True)))


def by_habit(logits: Any, specs: list[SampleSpec], kind: str) -> Call | None:
    import torch

    if kind not in (TEMPERATURE, FILTERS):
        return None
    z = torch.from_numpy(logits)

    def call() -> torch.Tensor:
        if kind == TEMPERATURE:
            chances = torch.softmax(z / 0.8, dim=-1)
            return chances.div_(torch.empty_like(chances).exponential_()).argmax(dim=-1)
        chances, order = torch.softmax(z / 0.8, dim=-1).sort(dim=-1, descending=True)
        chances[chances.cumsum(-1) - chances >= 0.95] = 0.0
        return order.gather(1, torch.multinomial(chances, 1))

    return call


SAMPLERS: dict[str, Maker] = {
    "numpy": by_definition, "numpy, fast": by_numpy, "mlx": by_mlx, "torch, host": by_host, "torch": by_torch,
    "Triton": by_triton, "mlx-lm": by_mlx_lm, "torch, usual": by_habit,
}  # fmt: skip


def timed(call: Call, seconds: float) -> list[float]:
    """Milliseconds of each call, after one that is not counted."""
    call()
    found: list[float] = []
    while sum(found) < (3e3 if len(found) < 3 else 1e3) * seconds:
        began = perf_counter()
        call()
        found.append((perf_counter() - began) * 1e3)
    return found


def draws(vocabularies: list[int], batches: list[int], seconds: float) -> Iterator[dict[str, Any]]:
    for vocab in vocabularies:
        for rows in batches:
            logits = (3 * np.random.default_rng(vocab).standard_normal((rows, vocab))).astype(np.float32)
            for kind in (GREEDY, TEMPERATURE, FILTERS, PENALTIES):
                specs = specs_of(kind, rows, vocab)
                for name, maker in SAMPLERS.items():
                    line = {"sampler": name, "vocabulary": vocab, "rows": rows, "kind": kind}
                    try:
                        call = maker(logits, specs, kind)
                    except ImportError as error:
                        yield {**line, "median_ms": None, "why": f"not measured: no {error.name}"}
                        continue
                    if call is not None:
                        found = timed(call, seconds)
                        yield {**line, "median_ms": statistics.median(found), "calls": len(found)}
                    elif name == "Triton":
                        yield {**line, "median_ms": None, "why": "not measured: no GPU"}


BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "reference": ("numpy, fast", {}), "mlx": ("mlx", {}),
    "cuda": ("torch, host", {"device": "cpu", "kernels": "torch"}),
}  # fmt: skip


def widened(folder: Path, vocab: int) -> Path:
    """The embedded model with `vocab` token ids, in float32: what is added has embeddings in random directions."""
    config = checkpoint.read_config(tiny_folder())
    weights = checkpoint.read_weights(tiny_folder())
    known, rng = weights[EMBEDDING].astype(np.float32), np.random.default_rng(0)
    added = rng.standard_normal((vocab - len(known), known.shape[1]), dtype=np.float32)
    lengths = np.linalg.norm(known, axis=1)[rng.integers(len(known), size=len(added))]
    added *= (lengths / np.linalg.norm(added, axis=1))[:, None]
    weights[EMBEDDING] = np.concatenate((known, added))
    shutil.copytree(tiny_folder(), folder)
    save_file(weights, folder / checkpoint.SINGLE, {"format": "pt"})
    (folder / checkpoint.CONFIG).write_text(json.dumps({**config, "vocab_size": vocab, "dtype": "float32"}))
    return folder


def shares(model: Path, vocab: int, rows: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Of each backend on a CPU: a decode step of `rows` rows, and the draw in it."""
    logits = (3 * np.random.default_rng(0).standard_normal((rows, vocab))).astype(np.float32)
    for name, (sampler, extra) in BACKENDS.items():
        missing = platform.probe(name).missing
        for kind in (GREEDY, TEMPERATURE, FILTERS):
            line = {"backend": name, "vocabulary": vocab, "rows": rows, "kind": kind}
            if missing is not None:
                yield {**line, "why": f"not measured: {missing}"}
                continue
            specs = specs_of(kind, rows, vocab)
            step_ms = statistics.median(steps_ms(model, name, extra, specs))
            call = SAMPLERS[sampler](logits, specs, kind)
            assert call is not None
            draw_ms = statistics.median(timed(call, seconds))
            yield {**line, "step_ms": step_ms, "draw_ms": draw_ms, "share": draw_ms / step_ms}


def steps_ms(model: Path, name: str, extra: dict[str, Any], specs: list[SampleSpec]) -> list[float]:
    """Milliseconds of decode steps through a backend's own interface, after prompts of CONTEXT tokens."""
    options = BackendOptions(model=str(model), extra=extra, max_num_seqs=len(specs))
    backend = platform.load(name, options)
    try:
        blocks = -(-(CONTEXT + STEPS + 1) // backend.info.block_tokens)
        backend.allocate_kv(blocks * len(specs))
        kv = [KVRows(tuple(range(row * blocks, (row + 1) * blocks)), True) for row in range(len(specs))]
        prompts = tuple(PlanRow(i, i, tuple(range(10, 10 + CONTEXT)), 0, kv[i], None) for i in range(len(specs)))
        backend.collect(backend.submit(StepPlan(1, prompts)))
        found = []
        for step in range(STEPS):
            rows = tuple(PlanRow(i, i, (10 + i,), CONTEXT + step, kv[i], spec) for i, spec in enumerate(specs))
            began = perf_counter()
            backend.collect(backend.submit(StepPlan(2 + step, rows)))
            found.append((perf_counter() - began) * 1e3)
        return found[COLD:]
    finally:
        backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[EMBEDDED, 32768, 131072])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=0.15, help="for each line")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and numbers")
    args = parser.parse_args()
    if min(*args.vocabularies, *args.rows) < 1 or args.seconds <= 0:
        parser.error("--vocabularies and --rows must be at least 1, --seconds more than 0")
    print(f"{'vocabulary':>10}{'rows':>6}  {'kind':24}{'sampler':14}{'ms':>10}")
    table, steps = [], []
    for line in draws(args.vocabularies, args.rows, args.seconds):
        table.append(line)
        shown = f"{line['median_ms']:10.3f}" if line["median_ms"] is not None else f"  {line['why']}"
        print(f"{line['vocabulary']:10}{line['rows']:6}  {line['kind']:24}{line['sampler']:14}{shown}", flush=True)
    print(f"\n{'backend':12}{'vocabulary':>10}{'rows':>6}  {'kind':24}{'step ms':>9}{'draw ms':>9}{'share':>8}")
    with tempfile.TemporaryDirectory() as folder:
        models = {EMBEDDED: tiny_folder()}
        if max(args.vocabularies) > EMBEDDED:
            models[max(args.vocabularies)] = widened(Path(folder) / "wide", max(args.vocabularies))
        for vocab, model in models.items():
            for line in shares(model, vocab, max(args.rows), args.seconds):
                steps.append(line)
                shown = line.get("why") or f"{line['step_ms']:9.3f}{line['draw_ms']:9.3f}{line['share']:8.1%}"
                print(f"{line['backend']:12}{vocab:10}{line['rows']:6}  {line['kind']:24}{shown}", flush=True)
    print("\n" + "\n".join(verdicts(table, steps)))
    if args.json:
        write_record(args.json, {"draws": table, "steps": steps})


def verdicts(table: list[dict[str, Any]], steps: list[dict[str, Any]]) -> Iterator[str]:
    """The goals, kept or missed."""

    def verdict(kept: bool) -> str:
        return "kept" if kept else "MISSED"

    for line in table:
        if (line["sampler"], line["rows"], line["vocabulary"]) == ("numpy, fast", 32, 131072):
            ms = line["median_ms"]
            yield f"32 rows of 131072, {line['kind']}: {ms:.1f} ms; at most {GOALS['chain_ms']}: " + verdict(
                ms <= GOALS["chain_ms"]
            )
    for line in steps:
        if "share" in line and line["kind"] != FILTERS:
            share, what = line["share"], f"{line['backend']}, vocabulary of {line['vocabulary']}, {line['kind']}"
            yield f"{what}: {share:.1%} of a step; at most {GOALS['share']:.0%}: " + verdict(share <= GOALS["share"])


if __name__ == "__main__":
    main()
