"""Part a, the sampler: its tokens are those of the definition, row by row."""

from __future__ import annotations

import random

import numpy as np
import torch
from gpu_check_case import same
from gpu_check_record import Figure, Report

from cortexstream.backends.cuda.triton_sample import draw
from cortexstream.plan import SampleSpec
from cortexstream.sampling import draw as definition

ROWS = {32000: 192, 128256: 64}  # by vocabulary
FEW_ROWS = {300: 24}


def specs_of(count: int, vocab_size: int, seed: int) -> list[SampleSpec]:
    """Rows of all kinds: greedy, plain, filtered, penalised, biased."""
    rng = random.Random(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, most)))

    specs = []
    for number in range(count):
        spec = SampleSpec(
            temperature=rng.choice([0.0, 0.7, 1.0, 1.5]), seed=rng.randrange(2**64), sample_index=number % 3,
            top_k=rng.choice([0, 1, 20, 1000]), top_p=rng.choice([1.0, 0.5, 0.95]), min_p=rng.choice([0.0, 0.0, 0.05]),
        )  # fmt: skip
        if number % 4 == 1:
            spec = spec._replace(
                repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.4, prompt_tokens=tokens(50),
                output_tokens=tokens(50),
            )  # fmt: skip
        if number % 4 == 2:
            spec = spec._replace(logit_bias=tuple((t, 3.0) for t in sorted(set(tokens(5)))), banned=tokens(4))
        if number % 4 == 3:
            spec = SampleSpec(temperature=1.0, seed=rng.randrange(2**64))  # every token may come
        specs.append(spec)
    return specs


def check_sampler(report: Report, smoke: bool, device: torch.device, repeats: int) -> None:
    for vocab_size, count in (FEW_ROWS if smoke else ROWS).items():
        specs = specs_of(count, vocab_size, seed=vocab_size)
        numbers = np.random.default_rng(vocab_size).standard_normal((count, vocab_size)) * 3.0
        logits = torch.from_numpy(numbers.astype(np.float32)).to(device)
        positions = [7 * number + 1 for number in range(count)]
        nothing = [None] * count

        def launch(
            logits: torch.Tensor = logits, specs: list[SampleSpec] = specs, positions: list[int] = positions,
            nothing: list[None] = nothing,
        ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
            return draw(logits, specs, positions, nothing)

        tokens, broken = launch()
        host = logits.cpu().numpy()
        wanted = [definition(host[row], specs[row], positions[row]) for row in range(count)]
        got = tokens.tolist()
        differing = [row for row in range(count) if got[row] != wanted[row]]
        wrong = [f"row {row}: {got[row]}, not {wanted[row]}, for {specs[row]}"[:300] for row in differing[:2]]
        if bool(broken.any()):
            wrong.append("sound rows are called broken")
        if not all(same(launch(), (tokens, broken)) for _ in range(repeats - 1)):
            wrong.append("repeats gave other tokens")
        report.add(
            "kernel", f"sampler, {vocab_size} tokens", ok=not wrong, why="; ".join(wrong),
            equal=Figure(count - len(differing), f"of {count} rows"), repeats=Figure(repeats, "runs"),
        )  # fmt: skip
