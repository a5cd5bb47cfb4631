"""Part e: steps that never wait, no kernel compiled for a new length, memory that does not grow (F47, F52)."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_check_drive import Drive, Guard, forbid_waiting, numbered, random_prompts
from gpu_check_folders import SMALL, write_small
from gpu_check_record import SMOKE, Figure, Report, missing
from triton.runtime.jit import JITFunction

from cortexstream.backend import BackendOptions
from cortexstream.backends.cuda import create
from cortexstream.constraint import Mask, mask_of
from cortexstream.plan import SampleSpec

KERNELS = "cortexstream.kernels.triton"
ROWS = 4
CONTEXT = 2048
GUESSES = 3  # of a row that draws several times in a step
SCORED = 5  # likeliest tokens at every position of a prompt that is scored


class Asked:
    """A mask that allows some tokens, and how often a backend asked for it."""

    def __init__(self, allowed: range, vocab_size: int) -> None:
        self.allowed, self.times = allowed, 0
        self._mask = mask_of(allowed, vocab_size)

    def __call__(self) -> Mask:
        self.times += 1
        return self._mask


MASK = Asked(range(20, 90), SMALL["vocab_size"])
KINDS = {
    "greedy": SampleSpec(),
    "seeded, filters": SampleSpec(temperature=0.9, top_p=0.9, top_k=50, min_p=0.01),
    "seeded, penalties, bias": SampleSpec(
        temperature=1.0, frequency_penalty=0.3, repetition_penalty=1.1, presence_penalty=0.1, prompt_tokens=(5, 6, 7),
        logit_bias=((9, 2.0), (10, -2.0)), banned=(4,),
    ),
    "seeded, mask, top logprobs": SampleSpec(temperature=1.0, logprobs=5, mask=MASK),
    "seeded, penalties, metadata, processed logprobs": SampleSpec(  # told on the host, from all of a row's logits
        temperature=0.9, top_p=0.9, frequency_penalty=0.3, prompt_tokens=(5, 6, 7), logprobs=3, processed=True,
        metadata=True,
    ),
}  # fmt: skip


Work = Callable[[Drive, int, Guard], None]


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
    """200 steps of each kind of draw, with guesses and without, and of prompts that are scored: none waits in `submit`.

    What a draw needs of the host may be asked for there: its mask, once.
    """
    steps, guard = (4, nullcontext) if smoke else (200, forbid_waiting)
    works: dict[str, tuple[SampleSpec, Work]] = {"scored prompts": (SampleSpec(logprobs=1), score)}
    for kind, spec in KINDS.items():
        works |= {kind: (spec, decode), f"{kind}, guesses": (spec, guess)}
    backend.warmup(16, ROWS)
    for kind, (spec, work) in works.items():
        name = f"{way}: no wait, {kind}"
        with report.attempt("steps", name, check=True):
            asked = MASK.times
            driven = drive(backend, spec, 8 if smoke else 100)
            work(driven, steps, guard)
            why = disobeyed(driven, MASK.times - asked) if spec.mask is MASK else ""
            done = missing("steps", SMOKE) if smoke else Figure(steps, "steps")
            report.add("steps", name, ok=not why, why=why, without_waiting=done)


def decode(driven: Drive, steps: int, guard: Guard) -> None:
    """Rows leave and come back."""
    for count in (ROWS, ROWS - 1, 1):
        driven.decode(driven.rows[:count], 2)
    for part, count in enumerate((ROWS, ROWS - 1, 1, ROWS)):
        driven.decode(driven.rows[:count], share(steps, 4, part), guard)


def guess(driven: Drive, steps: int, guard: Guard) -> None:
    """Rows that draw several times; then one of them leaves."""
    for count in (ROWS, ROWS - 1):
        driven.guess(driven.rows[:count], 2, GUESSES)
    for part, count in enumerate((ROWS, ROWS - 1)):
        driven.guess(driven.rows[:count], share(steps, 2, part), GUESSES, guard)


def score(driven: Drive, steps: int, guard: Guard) -> None:
    """Prompts in chunks that end within a row, and again until the steps are done."""
    prompts = [[1, *range(3, 3 + row.length - 1)] for row in driven.rows]
    driven.prefill(prompts, 16, SCORED)  # compiles
    done = 0
    while done < steps:
        done += driven.prefill(prompts, 16, SCORED, guard)


def share(steps: int, parts: int, part: int) -> int:
    return steps * (part + 1) // parts - steps * part // parts


def disobeyed(driven: Drive, asked: int) -> str:
    """How the mask was not kept, if it was not."""
    outside = {token for row in driven.rows for token in row.output if token not in MASK.allowed}
    if outside:
        return f"tokens {sorted(outside)} were drawn, which the mask does not allow"
    return "" if asked == driven.drawn else f"the mask was asked for {asked} times for {driven.drawn} draws"


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
