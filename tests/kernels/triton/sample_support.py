"""What the tests of `kernels.triton.sample` share: rows' parameters and tables; what the definition draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cortexstream import sampling
from cortexstream.kernels.triton.sample import Config, RowParameters, Tables
from cortexstream.plan import SampleSpec
from tests.kernels.triton.support import DEVICE, exact, torch

Floats = npt.NDArray[np.float32]

TINY = Config(split=128, split_warps=1, group=2, capacity=12, block=16, block_warps=1)
"""Many splits, lists of several blocks, and rows with more candidates than a list holds, in small vocabularies."""


def parameters(specs: list[SampleSpec], positions: list[int]) -> RowParameters:
    """Row r has line r of the tables."""

    def column(name: str, dtype: Any = torch.float32) -> Any:
        return torch.tensor([getattr(spec, name) for spec in specs], dtype=dtype, device=DEVICE)

    with np.errstate(divide="ignore"):
        log_min_p = np.log(np.array([spec.min_p for spec in specs])).astype(np.float32)
    seeds = np.array([spec.seed for spec in specs], np.uint64).view(np.int64)
    line = torch.arange(len(specs), dtype=torch.int32, device=DEVICE)
    return RowParameters(
        slot=line, bias_slot=line.clone(), temperature=column("temperature"), top_k=column("top_k", torch.int32),
        top_p=column("top_p"), log_min_p=torch.from_numpy(log_min_p).to(DEVICE),
        seed=torch.from_numpy(seeds).to(DEVICE), position=torch.tensor(positions, dtype=torch.int32, device=DEVICE),
        sample_index=column("sample_index", torch.int32), repetition_penalty=column("repetition_penalty"),
        frequency_penalty=column("frequency_penalty"), presence_penalty=column("presence_penalty"),
    )  # fmt: skip


def tables(specs: list[SampleSpec], vocab_size: int, counts_dtype: Any = torch.int32) -> Any:
    bias = torch.zeros(len(specs), vocab_size)
    counts = torch.zeros(len(specs), vocab_size, dtype=counts_dtype)
    seen = torch.zeros(len(specs), vocab_size, dtype=torch.uint8)
    for r, spec in enumerate(specs):
        for token, value in spec.logit_bias:
            bias[r, token] += value
        bias[r, list(spec.banned)] = -torch.inf
        for token in spec.output_tokens:
            counts[r, token] += 1
        seen[r, list(spec.prompt_tokens)] = 1
    return Tables(bias.to(DEVICE), counts.to(DEVICE), seen.to(DEVICE))


def random_spec(rng: np.random.Generator, vocab: int) -> SampleSpec:
    def tokens(count: int, below: int = vocab) -> tuple[int, ...]:
        return tuple(rng.integers(below, size=count).tolist())

    penalised, biased = rng.random() < 0.4, rng.random() < 0.3
    return SampleSpec(
        temperature=rng.choice([0.0, 0.3, 0.8, 1.0, 1.7]), top_k=int(rng.choice([0, 0, 1, 5, vocab // 2, vocab + 3])),
        top_p=rng.choice([1.0, 1.0, 0.99, 0.9, 0.5, 0.01]), min_p=rng.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        seed=int(rng.integers(2**64, dtype=np.uint64)), sample_index=int(rng.integers(4)),
        repetition_penalty=rng.choice([1.0, 1.3, 0.7]) if penalised else 1.0,
        presence_penalty=rng.choice([0.0, 0.6]) if penalised else 0.0,
        frequency_penalty=rng.choice([0.0, -0.4]) if penalised else 0.0,
        prompt_tokens=tokens(9) if penalised else (),
        output_tokens=tokens(7, min(vocab, 4)) if penalised else (),  # with repeats
        logit_bias=tuple(zip(tokens(2), rng.uniform(-5, 5, 2).tolist(), strict=True)) if biased else (),
        banned=tokens(3)[: vocab // 4] if biased else (),
    )  # fmt: skip


def telling_position(z: Floats, spec: SampleSpec, rng: np.random.Generator) -> int:
    """Where a token next to the row's threshold is drawn if it is kept; anywhere if that is not found soon."""
    start = int(rng.integers(10**6))
    if spec.temperature == 0.0:
        return start
    z = sampling.penalise(sampling.bias(z, spec), spec) / np.float32(spec.temperature)
    kept = np.isfinite(sampling.keep(z, spec))
    inside, outside = z[kept].min(), z[~kept].max(initial=-np.inf)
    edge = inside if rng.random() < 0.5 or np.isinf(outside) else outside
    token = int(rng.choice(np.flatnonzero(z == edge)))
    field = np.where(kept | (z == edge), z, -np.inf)
    for position in range(start, start + 100):
        if np.argmax(field + sampling.noise(spec.seed, position, spec.sample_index, len(z))) == token:
            return position
    return start


def winning_position(z: Floats, token: int) -> int:
    """Where seed 5 draws a token from tempered scores."""
    return next(p for p in range(10**4) if np.argmax(z + sampling.noise(5, p, 0, len(z))) == token)


def logits_of(rng: np.random.Generator, rows: int, vocab: int, dtype: Any = torch.float32) -> Any:
    """Some rows in steps of 1/4, with many ties; some nearly flat, some steep."""
    z = rng.standard_normal((rows, vocab)) * rng.choice([0.3, 1.0, 3.0], (rows, 1))
    z = np.where(rng.random((rows, 1)) < 0.3, np.round(4 * z) / 4, z)
    return torch.from_numpy(z.astype(np.float32)).to(dtype).to(DEVICE)


def definition(logits: Any, specs: list[SampleSpec], positions: list[int]) -> list[int]:
    rows = exact(logits).astype(np.float32)
    return [sampling.draw(*row) for row in zip(rows, specs, positions, strict=True)]
