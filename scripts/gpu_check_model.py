"""Part d, ours: a random model of Llama 3 8B's shape, in bfloat16 and in 4 bits. Steps against their floor; tokens/s.

The floor of a decode step is the time that reading takes at the measured rate: all weights but the table of embeddings,
of which it takes a row per sequence, and the keys and values of the context.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from gpu_check_drive import Drive, random_prompts
from gpu_check_folders import large_shape, random_weights, read_bytes, write_config, write_packed
from gpu_check_record import SMOKE, Figure, Report, missing, ratio
from gpu_check_timing import Clock, bandwidth

from cortexstream import LLM, SamplingParams
from cortexstream.backend import BackendOptions
from cortexstream.backends.cuda import create
from cortexstream.plan import SampleSpec

BATCHES = (1, 16, 64)
CONTEXT = 2048  # tokens before the first timed step
WARM, TIMED = 8, 40  # steps
PROMPT, OUTPUT = 512, 128  # tokens of a request, for tokens/s
CHUNK = 4096  # prompt tokens of a step
BLOCK = 64
PLAIN, PACKED = "bf16", "4-bit"


class Sizes:
    """What a run has of everything; a smoke run has almost nothing."""

    def __init__(self, smoke: bool) -> None:
        self.batches = (1, 2) if smoke else BATCHES
        self.context, self.warm, self.timed = (16, 1, 2) if smoke else (CONTEXT, WARM, TIMED)
        self.prompt, self.output = (8, 3) if smoke else (PROMPT, OUTPUT)
        self.capacity = self.context + len(self.batches) * (self.warm + self.timed) + 2
        self.dtype = torch.float32 if smoke else torch.bfloat16
        self.extra: dict[str, Any] = {"device": "cpu", "kernels": "torch"} if smoke else {}


def run_bfloat16(report: Report, smoke: bool) -> None:
    sizes, shape = Sizes(smoke), large_shape(smoke)
    with tempfile.TemporaryDirectory() as root:
        folder = write_config(Path(root), shape, sizes.dtype)
        device = torch.device("cpu" if smoke else "cuda")
        measure(report, PLAIN, folder, smoke, lambda: random_weights(shape, sizes.dtype, device))


def run_packed(report: Report, smoke: bool) -> None:
    """From a folder as mlx-lm writes it, in memory if there is room: what is read is part of what is checked."""
    needed, memory = 6 << 30, Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * needed and not smoke
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as root:
        sizes = Sizes(smoke)
        folder = write_packed(Path(root), large_shape(smoke), sizes.dtype, "cpu" if smoke else "cuda")
        measure(report, PACKED, folder, smoke, nullcontext)


def measure(
    report: Report, name: str, folder: Path, smoke: bool, weights: Callable[[], AbstractContextManager[None]]
) -> None:
    with report.attempt("step", name):
        began_s = perf_counter()
        with weights():
            backend = create(backend_options(folder, Sizes(smoke)))
        loaded_s = perf_counter() - began_s
        loading = missing("s", SMOKE) if smoke else Figure(loaded_s, "s")
        report.add("model", name, weights=Figure(backend.model.weight_bytes / 1e9, "GB"), loading=loading)
        try:
            steps(report, name, backend, smoke)
        finally:
            backend.close()
    gc.collect()
    with report.attempt("served", name), weights():
        served(report, name, folder, smoke)


def backend_options(folder: Path, sizes: Sizes) -> BackendOptions:
    dtype = str(sizes.dtype).removeprefix("torch.")
    return BackendOptions(
        str(folder), dtype=dtype, max_num_seqs=max(sizes.batches), block_tokens=BLOCK, extra=sizes.extra
    )


def steps(report: Report, name: str, backend: Any, smoke: bool) -> None:
    """Decode steps at a context of 2048 tokens, one in flight as in the engine; and how fast prompts go in."""
    sizes, read = Sizes(smoke), bandwidth(Clock(smoke)).read
    if not smoke:
        torch.cuda.empty_cache()  # of the bandwidth's buffers
    rows = max(sizes.batches)
    backend.allocate_kv(rows * -(-sizes.capacity // BLOCK))
    backend.warmup(min(CHUNK, sizes.context), rows)
    driven = Drive(backend, [SampleSpec()] * rows, sizes.capacity)
    prompts = random_prompts(rows, sizes.context, backend.model.vocab_size)
    began_s = perf_counter()
    driven.prefill(prompts, CHUNK)
    taken = missing("s", SMOKE) if smoke else Figure(perf_counter() - began_s, "s")
    tokens = Figure(float(rows * sizes.context), "tokens")
    report.add("prompts", f"{name}, {rows} x {sizes.context} tokens", time=taken, rate=ratio(tokens, taken, "tokens/s"))
    for batch in sizes.batches:
        part = driven.rows[:batch]
        driven.decode(part, sizes.warm)
        context = statistics.mean(row.length for row in part) + sizes.timed / 2
        times = driven.decode(part, sizes.timed)
        weights = read_bytes(large_shape(smoke), sizes.dtype, packed=name == PACKED)
        num_bytes = weights + batch * context * backend.model.kv_bytes_per_token
        floor = ratio(Figure(num_bytes / 1e9, "GB"), read, "ms")
        step = missing("ms", SMOKE) if smoke else Figure(1e3 * statistics.median(times), "ms", "median")
        report.add(
            "step", f"{name}, batch {batch}", step=step, floor=floor, above=ratio(step, floor, "x the floor"),
            bytes=Figure(num_bytes / 1e9, "GB"), context=Figure(context, "tokens"),
            rate=ratio(Figure(1e3 * batch, "tokens"), step, "tokens/s"), read_bandwidth=read,
        )  # fmt: skip


def served(report: Report, name: str, folder: Path, smoke: bool) -> None:
    """Whole requests through `LLM.generate`: output tokens per second, prompts included."""
    sizes = Sizes(smoke)
    rows, blocks = max(sizes.batches), -(-(sizes.prompt + sizes.output + 2) // BLOCK)
    with LLM(
        str(folder), backend="cuda", dtype=str(sizes.dtype).removeprefix("torch."), skip_tokenizer_init=True,
        max_num_seqs=rows, max_num_batched_tokens=CHUNK, num_kv_blocks=rows * blocks + 8, block_tokens=BLOCK,
        enable_prefix_caching=False, backend_options=sizes.extra, use_tqdm=False,
    ) as llm:  # fmt: skip
        llm.warmup()
        params = SamplingParams(temperature=0.0, max_tokens=sizes.output, ignore_eos=True)
        for batch in sizes.batches:
            prompts = random_prompts(batch, sizes.prompt, llm.model.vocab_size)
            given = [{"prompt_token_ids": prompt} for prompt in prompts]
            llm.generate(given[:1], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True), use_tqdm=False)
            began_s = perf_counter()
            outputs = llm.generate(given, params, use_tqdm=False)
            taken_s = perf_counter() - began_s
            made = sum(len(output.outputs[0].token_ids) for output in outputs)
            report.add("served", f"{name}, batch {batch}", per_second(made, taken_s, smoke))


def per_second(made: int, taken_s: float, smoke: bool) -> dict[str, Figure]:
    taken = missing("s", SMOKE) if smoke else Figure(taken_s, "s")
    return {"rate": ratio(Figure(float(made), "tokens"), taken, "tokens/s"), "time": taken,
            "made": Figure(float(made), "tokens")}  # fmt: skip
