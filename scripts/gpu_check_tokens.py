"""Part b: whole generations give the tokens of the CPU device in float32, with graphs and without, alone or mixed, and
with guesses; what they tell of the tokens is the same, too."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from gpu_check_folders import KINDS, write_small
from gpu_check_record import SMOKE, Figure, Report, missing

from cortexstream import LLM, RequestOutput, SamplingParams

PROMPTS = [1, 5, 64, 65, 130, 300, 17, 200, 40, 90, 33, 150]  # tokens; chunks of a step have 96
FEW_PROMPTS = [3, 18]
WAVES = 3  # prompts that are there from the start; each that ends lets the next one in
GUESSES = {"num_speculative_tokens": 3, "prompt_lookup_min": 1}
NEAR = 0.01  # nats, of numbers that are told; tokens must be equal


class Form(NamedTuple):
    """How the prompts are run."""

    alone: bool
    guesses: bool = False


FORMS = {"alone": Form(True), "mixed": Form(False), "mixed, guesses": Form(False, guesses=True)}


class Answer(NamedTuple):
    """The tokens of a prompt, and what is told of them and of the prompt's own: logprobs, then entropies."""

    tokens: tuple[int, ...]
    numbers: tuple[float, ...]


def work(smoke: bool) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts, and how each is sampled: greedy, seeded, filtered, penalised; masked and scored; described."""
    rng = random.Random(3)
    lengths = FEW_PROMPTS if smoke else PROMPTS
    prompts = [[1] + [rng.randrange(3, 320) for _ in range(count - 1)] for count in lengths]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.8, "seed": 2**63 + 5, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.2, "seed": 3, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_p": 0.02},
        {"temperature": 0.0, "allowed_token_ids": range(20, 24), "logprobs": 3, "prompt_logprobs": 2},
        {
            "temperature": 0.9,
            "seed": 5,
            "top_p": 0.9,
            "presence_penalty": 0.5,
            "logprobs": 2,
            "logprobs_mode": "processed_logprobs",
            "sampling_metadata": True,
        },
    ]
    if smoke:
        kinds = kinds[-2:]
    params = [
        SamplingParams(max_tokens=5 if smoke else 24 + 5 * number, ignore_eos=True, **kinds[number % len(kinds)])
        for number in range(len(prompts))
    ]
    return prompts, params


def generate(folder: Path, smoke: bool, form: Form, extra: dict[str, Any]) -> list[Answer]:
    """All prompts: each by itself, or joining and leaving a batch whose steps hold chunks, too."""
    prompts, params = work(smoke)
    options: dict[str, Any] = {
        "backend": "cuda", "dtype": "float32", "skip_tokenizer_init": True, "num_kv_blocks": 64,
        "max_num_batched_tokens": 12 if smoke else 96, "enable_prefix_caching": False, "backend_options": extra,
    }  # fmt: skip
    if smoke:
        options["block_tokens"] = 16
    if form.guesses:
        options["speculative_config"] = GUESSES
    with LLM(str(folder), max_num_seqs=1 if form.alone else 8, **options) as llm:
        pairs = list(zip(prompts, params, strict=True))
        if form.alone:
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
        stats = llm.stats()
        if form.guesses and not (stats.drafted_tokens if smoke else 0 < stats.accepted_tokens < stats.drafted_tokens):
            raise RuntimeError(
                f"right and wrong guesses were wanted; {stats.accepted_tokens} of {stats.drafted_tokens} were right"
            )
        return [answer(output) for output in outputs]


def answer(output: RequestOutput) -> Answer:
    (made,) = output.outputs
    told = [
        *zip(made.token_ids, made.logprobs or (), strict=made.logprobs is not None),
        *zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=output.prompt_logprobs is not None),
    ]
    logprobs = [entry[token].logprob for token, entry in told if entry is not None]
    return Answer(tuple(made.token_ids), (*logprobs, *(one.entropy for one in made.sampling_metadata or ())))


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
                wanted = generate(folder, smoke, FORMS["alone"], {"device": "cpu", "kernels": "torch"})
                for way, extra in ways(smoke).items():
                    for words, form in FORMS.items():
                        if (smoke and form.alone) or (form.guesses and "sliding_window" in KINDS[kind]):
                            continue  # guesses need layers without windows
                        name = f"{kind}: {way}, {words}"
                        with report.attempt("tokens", name, check=True):
                            compare(report, name, generate(folder, smoke, form, extra), wanted)
    if smoke:
        report.add("tokens", "CUDA graphs", equal=missing("prompts", SMOKE))


def compare(report: Report, name: str, found: list[Answer], wanted: list[Answer]) -> None:
    pairs = list(zip(found, wanted, strict=True))
    differing = [number for number, (a, b) in enumerate(pairs) if a.tokens != b.tokens]
    why, unit = "", f"of {NEAR} nats"
    if differing:
        number = differing[0]
        tokens = list(zip(found[number].tokens, wanted[number].tokens, strict=True))
        place = next(i for i, (a, b) in enumerate(tokens) if a != b)
        why = f"prompt {number} differs from token {place} on: {tokens[place][0]}, not {tokens[place][1]}"
        furthest = missing(unit, "tokens differ")
    else:
        far = [abs(x - y) for a, b in pairs for x, y in zip(a.numbers, b.numbers, strict=True)]
        furthest = Figure(max(far) / NEAR, unit)
        if not all(one <= NEAR for one in far):
            why = f"a logprob or an entropy is {max(far):.3g} nats off, or none"
    total = sum(len(b.tokens) for b in wanted)
    report.add(
        "tokens", name, ok=not why, why=why, tokens=Figure(total, "tokens compared"),
        equal=Figure(len(wanted) - len(differing), f"of {len(wanted)} prompts"),
        furthest=furthest,
    )  # fmt: skip
