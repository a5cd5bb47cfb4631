"""Part d, transformers: the same shape and prompts through `generate` and `generate_batch`; launches of a layer."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import transformers
from gpu_check_drive import Drive, random_prompts
from gpu_check_folders import large_shape, random_model, random_weights, write_config
from gpu_check_model import BLOCK, Sizes, backend_options, per_second
from gpu_check_record import SMOKE, Figure, Report, missing

from cortexstream.backends.cuda import create
from cortexstream.plan import SampleSpec

LAYERS = (2, 4)  # of the models whose launches are compared: what a layer adds


class Served(NamedTuple):
    """Tokens that a run made, and seconds if it measured them itself."""

    made: int
    taken_s: float | None = None


Generate = Callable[[list[list[int]], int], Served]


def run_generate(report: Report, smoke: bool) -> None:
    """`generate` with its defaults: SDPA, a cache that grows, no compilation."""
    model = peer(smoke, "sdpa")

    def generate(prompts: list[list[int]], count: int) -> Served:
        ids = torch.tensor(prompts, device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return Served(int(out.numel() - ids.numel()))

    measure(report, "transformers generate", smoke, generate)


def run_generate_batch(report: Report, smoke: bool) -> None:
    """Continuous batching with its defaults. Its preparations, which captured graphs belong to, are not timed."""
    with report.attempt("served", "transformers generate_batch"):
        model = peer(smoke, "sdpa")
        if not hasattr(model, "generate_batch"):
            raise RuntimeError(f"transformers {transformers.__version__} has no generate_batch")
        options: dict[str, Any] = {}
        if "progress_bar" in inspect.signature(model.generate_batch).parameters:
            options["progress_bar"] = False
        if smoke:  # by default it takes the whole memory
            options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(num_blocks=8)

        def generate(prompts: list[list[int]], count: int) -> Served:
            settings = transformers.GenerationConfig(
                max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
            )
            out = list(model.generate_batch(inputs=prompts, generation_config=settings, **options).values())
            wrong = [str(result.error) for result in out if result.error is not None]
            if wrong or len(out) != len(prompts):
                raise RuntimeError(f"{len(out)} of {len(prompts)} prompts were answered; {'; '.join(wrong[:1])}")
            return Served(sum(len(result.generated_tokens) for result in out), lifespan_s(out))

        measure(report, "transformers generate_batch", smoke, generate)


def lifespan_s(results: Sequence[Any]) -> float | None:
    """Seconds from the first request's coming to the last one's end, if this transformers tells."""
    try:
        return float(max(result.lifespan[1] for result in results) - min(result.created_time for result in results))
    except (AttributeError, IndexError, TypeError):
        return None


def measure(report: Report, name: str, smoke: bool, generate: Generate) -> None:
    sizes, vocabulary = Sizes(smoke), large_shape(smoke)["vocab_size"]
    warm = False
    for batch in sizes.batches:
        with report.attempt("served", f"{name}, batch {batch}"):
            prompts = random_prompts(batch, sizes.prompt, vocabulary)
            if not warm:
                generate(prompts, 2)
                warm = True
            wait(smoke)
            began_s = perf_counter()
            served = generate(prompts, sizes.output)
            wait(smoke)
            whole_s = perf_counter() - began_s
            if served.made != batch * sizes.output:
                raise RuntimeError(f"it made {served.made} tokens, not {batch * sizes.output}")
            told = served.taken_s is not None and 0 < served.taken_s <= whole_s
            taken_s = served.taken_s if told and served.taken_s is not None else whole_s
            whole = missing("s", SMOKE) if smoke else Figure(whole_s, "s", "with its preparations")
            report.add("served", f"{name}, batch {batch}", per_second(served.made, taken_s, smoke), whole=whole)


def peer(smoke: bool, attention: str) -> Any:
    device = torch.device("cpu" if smoke else "cuda")
    return random_model(large_shape(smoke), Sizes(smoke).dtype, device, attention)


def wait(smoke: bool) -> None:
    if not smoke:
        torch.cuda.synchronize()


def run_launches(report: Report, smoke: bool) -> None:
    """What a layer adds to a decode step: operations on the device as torch.profiler sees them."""
    for name, count in (("transformers, SDPA", stock_launches), ("the cuda backend", our_launches)):
        with report.attempt("launches", name):
            few, many = (count(layers, smoke) for layers in LAYERS)
            each = (many - few) / (LAYERS[1] - LAYERS[0])
            found = missing("a layer", SMOKE) if smoke else Figure(each, "a layer")
            rest = missing("a step", SMOKE) if smoke else Figure(few - LAYERS[0] * each, "a step")
            report.add("launches", name, launches=found, others=rest)


def operations(step: Callable[[], object], smoke: bool) -> int:
    """Kernels, copies and fills of one call, which was called before."""
    kinds = torch.profiler.ProfilerActivity
    step()
    wait(smoke)
    with torch.profiler.profile(activities=[kinds.CPU] if smoke else [kinds.CPU, kinds.CUDA]) as profile:
        step()
        wait(smoke)
    device = torch.autograd.DeviceType.CPU if smoke else torch.autograd.DeviceType.CUDA
    found = sum(event.device_type == device for event in profile.events())
    if not found:
        raise RuntimeError("torch.profiler saw nothing on the device")
    return int(found)


def stock_launches(layers: int, smoke: bool) -> int:
    device, sizes = torch.device("cpu" if smoke else "cuda"), Sizes(smoke)
    model = random_model(large_shape(smoke, layers), sizes.dtype, device, "sdpa")
    ids = torch.tensor(random_prompts(2, 8, 100), device=device)
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        return operations(lambda: model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True), smoke)


def our_launches(layers: int, smoke: bool) -> int:
    sizes, shape = Sizes(smoke), large_shape(smoke, layers)
    device = torch.device("cpu" if smoke else "cuda")
    with tempfile.TemporaryDirectory() as root:
        folder = write_config(Path(root), shape, sizes.dtype)
        options = backend_options(folder, sizes)
        if not smoke:
            options.extra["cuda_graphs"] = False
        with random_weights(shape, sizes.dtype, device):
            backend = create(options)
    backend.allocate_kv(8)
    driven = Drive(backend, [SampleSpec()] * 2, 2 * BLOCK)
    driven.prefill(random_prompts(2, 8, 100), 64)
    driven.decode(driven.rows, 2)
    found = operations(lambda: driven.decode(driven.rows, 1), smoke)
    backend.close()
    return found
