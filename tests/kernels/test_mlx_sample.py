"""MLX's draw against the numpy definition in cortexstream.sampling: the same noise, the same tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cortexstream import sampling
from cortexstream.plan import PENDING, SampleSpec
from tests.conftest import require

mx = require("mlx")
require("mlx_lm")

ROWS = 16


def random_spec(rng: random.Random, vocab: int) -> SampleSpec:
    penalised = rng.random() < 0.4
    return SampleSpec(
        temperature=rng.choice([0.0, 0.3, 0.8, 1.0, 1.7]), top_k=rng.choice([0, 0, 1, 5, vocab // 2, vocab + 3]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5, 0.01]), min_p=rng.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        seed=rng.randrange(2**64), sample_index=rng.randrange(4),
        repetition_penalty=rng.choice([1.0, 1.3, 0.7]) if penalised else 1.0,
        presence_penalty=rng.choice([0.0, 0.6]) if penalised else 0.0,
        frequency_penalty=rng.choice([0.0, -0.4]) if penalised else 0.0,
        prompt_tokens=tuple(rng.randrange(vocab) for _ in range(9)) if penalised else (),
        output_tokens=tuple(rng.randrange(min(vocab, 4)) for _ in range(7)) if penalised else (),  # with repeats
        logit_bias=tuple((rng.randrange(vocab), rng.uniform(-5, 5)) for _ in range(rng.choice([0, 0, 2]))),
        banned=tuple({rng.randrange(vocab) for _ in range(rng.choice([0, 0, 3]))}),
    )  # fmt: skip


@pytest.mark.parametrize("vocab", [1, 2, 97, 384, 4099])
def test_noise_is_the_same(vocab: int) -> None:
    """Equal bits, and logarithms that differ by rounding only."""
    from cortexstream.backends.mlx.sample import noise

    specs = [SampleSpec(seed=s, sample_index=i) for s, i in ((0, 0), (1, 2), (2**64 - 1, 0), (2**40 + 7, 3))]
    positions = [0, 1, 2**31 + 5, 77]
    got = np.array(noise(specs, positions, vocab))
    for row, (spec, position) in enumerate(zip(specs, positions, strict=True)):
        expected = sampling.noise(spec.seed, position, spec.sample_index, vocab)
        np.testing.assert_allclose(got[row], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vocab", [97, 384, 5000])
def test_p5_draws_are_the_same(vocab: int) -> None:
    """Every parameter, mixed in one batch; PENDING stands for the last output token in some rows."""
    from cortexstream.backends.mlx.sample import draw

    rng = random.Random(vocab)
    numbers = np.random.default_rng(vocab)
    differ = total = 0
    for _ in range(40 if vocab < 1000 else 8):
        logits = (numbers.standard_normal((ROWS, vocab)) * 3).astype(np.float32)
        specs = [random_spec(rng, vocab) for _ in range(ROWS)]
        positions = [rng.randrange(10**6) for _ in range(ROWS)]
        told, pending = [], []
        for spec in specs:
            late = bool(spec.output_tokens) and rng.random() < 0.5
            told.append(spec._replace(output_tokens=(*spec.output_tokens[:-1], PENDING)) if late else spec)
            pending.append(mx.array(spec.output_tokens[-1]) if late else None)
        got = draw(mx.array(logits), told, positions, pending)[0].tolist()
        for row, spec in enumerate(specs):
            total += 1
            differ += got[row] != sampling.draw(logits[row], spec, positions[row])
    assert differ <= total // 500, "a threshold may fall between two roundings once in a while, not more"


def test_a_row_does_not_depend_on_its_mates() -> None:
    from cortexstream.backends.mlx.sample import draw

    rng, numbers = random.Random(0), np.random.default_rng(0)
    logits = mx.array(numbers.standard_normal((ROWS, 384)).astype(np.float32))
    specs = [random_spec(rng, 384) for _ in range(ROWS)]
    together = draw(logits, specs, list(range(ROWS)), [None] * ROWS)[0].tolist()
    for row, spec in enumerate(specs):
        assert draw(logits[row : row + 1], [spec], [row], [None])[0].tolist() == [together[row]]


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    from cortexstream.backends.mlx.sample import draw

    logits = mx.array([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
    assert draw(logits, [SampleSpec()] * 2, [0, 0], [None] * 2)[0].tolist() == [1, 0]
