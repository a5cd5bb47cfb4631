"""Part b: whole generations give the tokens of the CPU device in float32, with graphs and without, alone or mixed."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from gpu_check_folders import KINDS, write_small
from gpu_check_record import SMOKE, Figure, Report, missing

from cortexstream import LLM, SamplingParams

PROMPTS = [1, 5, 64, 65, 130, 300, 17, 200]  # tokens; chunks of a step have 96
FEW_PROMPTS = [3, 18]
WAVES = 3  # prompts that are there from the start; each that ends lets the next one in


def work(smoke: bool) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts, and how each is sampled: greedy, seeded, filtered, penalised."""
    rng = random.Random(3)
    lengths = FEW_PROMPTS if smoke else PROMPTS
    prompts = [[1] + [rng.randrange(3, 320) for _ in range(count - 1)] for count in lengths]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.8, "seed": 2**63 + 5, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.2, "seed": 3, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_p": 0.02},
    ]
    params = [
        SamplingParams(max_tokens=2 if smoke else 24 + 5 * number, ignore_eos=True, **kinds[number % len(kinds)])
        for number in range(len(prompts))
    ]
    return prompts, params


def generate(folder: Path, smoke: bool, alone: bool, extra: dict[str, Any]) -> list[tuple[int, ...]]:
    """The tokens of all prompts: each by itself, or joining and leaving a batch whose steps hold chunks, too."""
    prompts, params = work(smoke)
    options: dict[str, Any] = {
        "backend": "cuda", "dtype": "float32", "skip_tokenizer_init": True, "num_kv_blocks": 64,
        "max_num_batched_tokens": 12 if smoke else 96, "enable_prefix_caching": False, "backend_options": extra,
    }  # fmt: skip
    if smoke:
        options["block_tokens"] = 16
    with LLM(str(folder), max_num_seqs=1 if alone else 8, **options) as llm:
        pairs = list(zip(prompts, params, strict=True))
        if alone:
            outputs = [llm.generate([prompt], chosen, use_tqdm=False)[0] for prompt, chosen in pairs]
        else:
            running = [llm.submit(*pair) for pair in pairs[:WAVES]]
            for number, pair in enumerate(pairs[WAVES:]):
                running[number].result(timeout_s=60)
                running.append(llm.submit(*pair))
            outputs = [generation.result(timeout_s=60) for generation in running]
        llm.check()
        if extra.get("cuda_graphs") and any("without CUDA graphs" in note for note in llm.notes):
            raise RuntimeError(" ".join(llm.notes))
        return [tuple(output.outputs[0].token_ids) for output in outputs]


def ways(smoke: bool) -> dict[str, dict[str, Any]]:
    """Backend options by name; all must give the tokens of the CPU device with torch's kernels."""
    if smoke:
        return {"Triton's interpreter": {"device": "cpu", "kernels": "triton"}}
    return {
        "GPU, graphs": {"device": "cuda", "cuda_graphs": True},
        "GPU, no graphs": {"device": "cuda", "cuda_graphs": False},
        "GPU, torch's kernels": {"device": "cuda", "kernels": "torch"},
    }


def run(report: Report, smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as root:
        for kind in KINDS:
            folder = write_small(Path(root) / kind, kind, smoke)
            with report.attempt("tokens", f"{kind}: the CPU device", check=True):
                wanted = generate(folder, smoke, True, {"device": "cpu", "kernels": "torch"})
                for way, extra in ways(smoke).items():
                    for alone in (False,) if smoke else (True, False):
                        name = f"{kind}: {way}, {'alone' if alone else 'mixed'}"
                        with report.attempt("tokens", name, check=True):
                            compare(report, name, generate(folder, smoke, alone, extra), wanted)
    if smoke:
        report.add("tokens", "CUDA graphs", equal=missing("prompts", SMOKE))


def compare(report: Report, name: str, found: list[tuple[int, ...]], wanted: list[tuple[int, ...]]) -> None:
    differing = [number for number, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    why = ""
    if differing:
        number = differing[0]
        place = next(i for i, (a, b) in enumerate(zip(found[number], wanted[number], strict=True)) if a != b)
        why = f"prompt {number} differs from token {place} on: {found[number][place]}, not {wanted[number][place]}"
    total = sum(map(len, wanted))
    report.add(
        "tokens", name, ok=not differing, why=why, tokens=Figure(total, "tokens compared"),
        equal=Figure(len(wanted) - len(differing), f"of {len(wanted)} prompts"),
    )  # fmt: skip
