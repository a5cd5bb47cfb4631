"""Part e: steps that never wait, no kernel compiled for a new length, memory that does not grow (F47, F52)."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_check_drive import Drive, forbid_waiting, numbered, random_prompts
from gpu_check_folders import write_small
from gpu_check_record import SMOKE, Figure, Report, missing
from triton.runtime.jit import JITFunction

from cortexstream.backend import BackendOptions
from cortexstream.backends.cuda import create
from cortexstream.plan import SampleSpec

KERNELS = "cortexstream.kernels.triton"
ROWS = 4
CONTEXT = 2048
KINDS = {
    "greedy": SampleSpec(),
    "seeded, filters": SampleSpec(temperature=0.9, top_p=0.9, top_k=50, min_p=0.01),
    "seeded, penalties, bias": SampleSpec(
        temperature=1.0, frequency_penalty=0.3, repetition_penalty=1.1, presence_penalty=0.1, prompt_tokens=(5, 6, 7),
        logit_bias=((9, 2.0), (10, -2.0)), banned=(4,),
    ),
}  # fmt: skip


def run(report: Report, smoke: bool) -> None:
    extras: list[dict[str, Any]] = [{"cuda_graphs": True}, {"cuda_graphs": False}]
    if smoke:
        extras = [{"device": "cpu", "kernels": "torch"}]
    dtype = "float32" if smoke else "bfloat16"
    with tempfile.TemporaryDirectory() as root:
        folder = write_small(Path(root) / "llama", "llama", smoke)
        for extra in extras:
            way = "CPU" if smoke else "graphs" if extra["cuda_graphs"] else "no graphs"
            with report.attempt("steps", way, check=True):
                backend = create(BackendOptions(str(folder), dtype, max_num_seqs=ROWS, extra=extra))
                backend.allocate_kv(ROWS * CONTEXT // backend.info.block_tokens)
                waits(report, way, backend, smoke)
                compiles(report, way, backend, smoke)
                grows(report, way, backend, smoke)
                backend.close()


def drive(backend: Any, spec: SampleSpec, prompt_tokens: int) -> Drive:
    """Rows that have their prompts and are warm."""
    made = Drive(backend, list(numbered([spec] * ROWS)), CONTEXT)
    made.prefill(random_prompts(ROWS, prompt_tokens, backend.model.vocab_size), 512)
    return made


def waits(report: Report, way: str, backend: Any, smoke: bool) -> None:
    """200 steps of each kind of draw, rows leaving and coming back, without a wait in `submit`."""
    steps = 4 if smoke else 200
    backend.warmup(16, ROWS)
    for kind, spec in KINDS.items():
        name = f"{way}: no wait, {kind}"
        with report.attempt("steps", name, check=True):
            driven = drive(backend, spec, 8 if smoke else 100)
            for count in (ROWS, ROWS - 1, 1):
                driven.decode(driven.rows[:count], 2)
            for part, count in ((0, ROWS), (1, ROWS - 1), (2, 1), (3, ROWS)):
                number = steps * (part + 1) // 4 - steps * part // 4
                driven.decode(driven.rows[:count], number, nullcontext if smoke else forbid_waiting)
            done = missing("steps", SMOKE) if smoke else Figure(steps, "steps")
            report.add("steps", name, ok=True, without_waiting=done)


def compiled() -> Counter[str]:
    """How many variants of each Triton kernel this process holds."""
    held: Counter[str] = Counter()
    for module in [module for name, module in sys.modules.items() if name.startswith(KERNELS)]:
        for name, function in vars(module).items():
            if isinstance(function, JITFunction) and function.fn.__module__ == module.__name__:
                held[name] += sum(len(cache[0]) for cache in function.device_caches.values())
    return held


def compiles(report: Report, way: str, backend: Any, smoke: bool) -> None:
    """50 lengths of prompts and of rows that decode, after three that warm up."""
    lengths = (3, 4) if smoke else tuple(1 + 37 * number % 1901 for number in range(50))
    for warm in (1, 16, 33):
        driven = drive(backend, KINDS["greedy"], warm)
        driven.decode(driven.rows, 2)
    before = compiled()
    for length in lengths:
        driven = drive(backend, KINDS["greedy"], length)
        driven.decode(driven.rows, 2)
    new = compiled() - before
    why = f"compiled anew: {', '.join(sorted(new))}" if new else ""
    found = missing("kernels", SMOKE) if smoke else Figure(new.total(), "kernels")
    held = missing("kernels", SMOKE) if smoke else Figure(before.total(), "kernels")
    if not smoke and not before:
        why = "no compiled kernel was found: this version of triton keeps them elsewhere"
    lengths_seen = Figure(len(set(lengths)), "lengths")
    report.add("steps", f"{way}: no new kernels", ok=not why, why=why, new=found, held=held, lengths=lengths_seen)


def grows(report: Report, way: str, backend: Any, smoke: bool) -> None:
    """Allocated bytes after step 10 and after 1,000 more."""
    driven = drive(backend, KINDS["seeded, filters"], 8 if smoke else 50)
    driven.decode(driven.rows, 10)
    before = allocated(smoke)
    driven.decode(driven.rows, 5 if smoke else 1000)
    after = allocated(smoke)
    name, why = f"{way}: memory stays", ""
    if before is None or after is None:
        report.add("steps", name, ok=True, grown=missing("bytes", SMOKE))
        return
    if after > before:
        why = f"{after - before} bytes more than at step 10"
    report.add(
        "steps", name, ok=not why, why=why,
        grown=Figure(after - before, "bytes"), allocated=Figure(after, "bytes"), steps=Figure(1000, "steps"),
    )  # fmt: skip


def allocated(smoke: bool) -> int | None:
    if smoke:
        return None
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())
