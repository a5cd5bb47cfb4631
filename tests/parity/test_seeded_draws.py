"""P5: seeded draws in float32 are the same tokens on every sampler, and nearly so where logits differ by rounding."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cortexstream import sampling
from cortexstream.backends.common import fast_draw
from cortexstream.plan import SampleSpec
from tests.kernels.samplers import SAMPLERS

Floats = npt.NDArray[np.float32]

DRAWS, BATCH, VOCAB = 10_000, 250, 1000
KINDS: list[dict[str, Any]] = [
    {}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.8, "top_k": 50, "min_p": 0.01},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1, "prompt_tokens": (1, 2, 3, 500),
     "output_tokens": (7, 7, 9)},
    {"logit_bias": ((5, 3.0), (999, 2.5)), "banned": (0, 4), "top_p": 0.95},
    {"temperature": 1.5, "sample_index": 3},
]  # fmt: skip
SPECS = [
    SampleSpec(**{"temperature": 0.8, **KINDS[n % len(KINDS)], "seed": 2**64 - 1 - n // 3 * 2**33})
    for n in range(DRAWS)
]


def logits_of(batch: int) -> Floats:
    return (2.5 * np.random.default_rng(batch).standard_normal((BATCH, VOCAB))).astype(np.float32)


@functools.cache
def defined() -> list[int]:
    """What `sampling.draw` draws."""
    return [
        sampling.draw(z, SPECS[n], n)
        for batch in range(DRAWS // BATCH)
        for n, z in enumerate(logits_of(batch), start=batch * BATCH)
    ]


@pytest.mark.parametrize("name", SAMPLERS)
def test_p5_ten_thousand_seeded_draws_are_the_definitions(name: str) -> None:
    found: list[int] = []
    for batch in range(DRAWS // BATCH):
        chosen = slice(batch * BATCH, (batch + 1) * BATCH)
        found += SAMPLERS[name](logits_of(batch), SPECS[chosen], range(DRAWS)[chosen])[0]
    assert len(set(defined())) > VOCAB // 2
    assert [n for n in range(DRAWS) if found[n] != defined()[n]] == []


WIDE, SHAPES = 3000, 100  # a vocabulary, and how many distributions over it are drawn from
PLAIN = [SampleSpec(temperature=1.0, seed=5)] * BATCH


@functools.cache
def shapes() -> tuple[Floats, Floats]:
    """Logits [SHAPES, WIDE], and the same with an error of 1e-3, as between devices."""
    rng = np.random.default_rng(9)
    logits = 1.5 * rng.standard_normal((SHAPES, WIDE))
    return logits.astype(np.float32), (logits + 1e-3 * rng.standard_normal(logits.shape)).astype(np.float32)


@pytest.mark.parametrize("name", SAMPLERS)
def test_p5_an_error_of_a_thousandth_changes_few_draws(name: str) -> None:
    """Of the draws from the erroneous logits on one sampler, against those of the definition from the true ones."""
    changed = 0
    for first in range(0, DRAWS, BATCH):
        rows, positions = np.arange(first, first + BATCH) % SHAPES, range(first, first + BATCH)
        true = fast_draw.draw(shapes()[0][rows], PLAIN, positions).tolist()
        found = SAMPLERS[name](shapes()[1][rows], PLAIN, positions)[0]
        changed += sum(a != b for a, b in zip(found, true, strict=True))
    assert 0 < changed < 0.003 * DRAWS


def test_p5_the_inverse_of_the_distribution_function_would_change_many() -> None:
    """The control: what the same error does to the same draws, made in the usual way."""
    uniform = np.random.default_rng(4).random((SHAPES, DRAWS // SHAPES))
    changed = 0
    for row, u in enumerate(uniform):
        true, found = (np.searchsorted(np.cumsum(np.exp(sampling.log_softmax(z[row]))), u) for z in shapes())
        changed += int(np.count_nonzero(true != found))
    assert changed > 0.03 * DRAWS
