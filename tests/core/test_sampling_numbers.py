"""What draws are like in numbers: distributions (F71, F72), log-probabilities (F10), metadata (F11)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cortexstream.backends.common.fast_draw import draw as draw_many
from cortexstream.plan import SampleSpec
from cortexstream.sampling import (
    BLOCK,
    BLOCKS,
    TOKENS,
    describe,
    draw,
    gumbel,
    in_blocks,
    keep,
    log_softmax,
    log_sums,
    noise_count,
    philox,
    process,
)

Floats = npt.NDArray[np.float32]

DRAWS, VOCAB = 100_000, 10
LOGITS = np.array([0.3, -1.0, 1.2, 0.0, 0.9, -0.4, 2.0, 0.5, -2.0, 1.1], np.float32)
# Upper 0.01 % points of chi-square, by degrees of freedom.
CRITICAL = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 6: 27.86, 7: 29.88, 8: 31.83, 9: 33.72}
HISTORY: dict[str, Any] = {"prompt_tokens": (6, 3, 5), "output_tokens": (6, 2, 2, 8)}


def draws(spec: SampleSpec, logits: Floats = LOGITS) -> npt.NDArray[np.int64]:
    """`draw` for positions 0 .. DRAWS - 1 at once: the same formula with the position as one more axis."""
    z = process(logits, spec)
    if spec.filtered(len(z)):
        return np.asarray(np.argmax(z + noises(spec, len(z), TOKENS), axis=1))
    blocks, found = in_blocks(z), noises(spec, noise_count(len(z)), BLOCKS)
    best = np.argmax(log_sums(blocks) + found[:, BLOCK:], axis=1)
    return np.asarray(best * BLOCK + np.argmax(blocks[best] + found[:, :BLOCK], axis=1))


def noises(spec: SampleSpec, count: int, kind: int) -> Floats:
    lanes = philox(spec.seed, (np.arange(-(-count // 4)), np.arange(DRAWS)[:, None], spec.sample_index, kind))
    return gumbel(np.stack(lanes, axis=2).reshape(DRAWS, -1)[:, :count])


def chances(spec: SampleSpec) -> npt.NDArray[np.float64]:
    """What the draws must follow, in float64 and without the module under test."""
    z = LOGITS.astype(np.float64)
    for token in {*spec.prompt_tokens, *spec.output_tokens}:
        z[token] = z[token] / spec.repetition_penalty if z[token] > 0 else z[token] * spec.repetition_penalty
    for token in set(spec.output_tokens):
        z[token] -= spec.frequency_penalty * spec.output_tokens.count(token) + spec.presence_penalty
    p = np.exp(z / spec.temperature)
    alive = p >= spec.min_p * p.max()
    order = np.argsort(-p)
    if spec.top_k:
        alive[order[spec.top_k :]] = False
    p = np.where(alive, p, 0) / p[alive].sum()
    before = np.cumsum(p[order]) - p[order]
    alive[order[before >= spec.top_p]] = False
    kept: npt.NDArray[np.float64] = np.where(alive, p, 0) / p[alive].sum()
    return kept


def statistic(counts: npt.NDArray[np.int64], p: npt.NDArray[np.float64]) -> float:
    """Chi-square of the tokens that can come; no other may have."""
    assert counts[p == 0].sum() == 0
    expected = counts.sum() * p[p > 0]
    return float(((counts[p > 0] - expected) ** 2 / expected).sum())


STRATEGIES = [
    (SampleSpec(temperature=1.0, seed=11), 10),
    (SampleSpec(temperature=0.6, seed=12), 10),
    (SampleSpec(temperature=2.5, seed=13, sample_index=4), 10),
    (SampleSpec(temperature=1.0, seed=14, top_k=4), 4),
    (SampleSpec(temperature=1.3, seed=15, top_p=0.8), 6),
    (SampleSpec(temperature=1.0, seed=16, min_p=0.2), 5),
    (SampleSpec(temperature=0.9, seed=17, min_p=0.05, top_k=7, top_p=0.85), 5),
    (SampleSpec(temperature=1.0, seed=18, repetition_penalty=1.5, **HISTORY), 10),
    (SampleSpec(temperature=1.0, seed=19, presence_penalty=0.7, frequency_penalty=0.4, **HISTORY), 10),
    (SampleSpec(temperature=0.8, seed=20, min_p=0.02, top_k=8, top_p=0.95, repetition_penalty=1.2,
                presence_penalty=0.2, frequency_penalty=0.3, **HISTORY), 7),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "survivors"), STRATEGIES)
def test_f71_f72_draws_follow_the_distribution(spec: SampleSpec, survivors: int) -> None:
    """Chi-square on 1e5 draws, level 0.01 %."""
    drawn, p = draws(spec), chances(spec)
    assert [draw(LOGITS, spec, position) for position in range(100)] == drawn[:100].tolist()
    some = range(50_000, 51_000)  # and by the sampler that backends use
    assert draw_many(np.tile(LOGITS, (len(some), 1)), [spec] * len(some), some).tolist() == drawn[some].tolist()
    assert np.count_nonzero(p) == survivors
    assert statistic(np.bincount(drawn, minlength=VOCAB), p) < CRITICAL[survivors - 1]


@pytest.mark.parametrize(("temperature", "error"), [(1.0, 0.0), (0.6, 0.0), (2.5, 0.0), (1.0, 0.05)])
def test_f71_draws_from_several_blocks_follow_the_distribution(temperature: float, error: float) -> None:
    """Ten tokens of a larger vocabulary, in blocks of four, none, one, two and three; with one that is off, not."""
    ids = np.array([0, 1, 64, 127, 256, 384, 500, 512, 600, 639])
    wide = np.full(640, -np.inf, np.float32)
    wide[ids] = LOGITS + np.where(np.arange(VOCAB) == 6, np.float32(error), np.float32(0))
    spec = SampleSpec(temperature=temperature, seed=21)
    drawn = draws(spec, wide)
    some = range(50_000, 51_000)
    assert draw_many(np.tile(wide, (len(some), 1)), [spec] * len(some), some).tolist() == drawn[some].tolist()
    found = statistic(np.bincount(np.searchsorted(ids, drawn), minlength=VOCAB), chances(spec))
    assert set(drawn.tolist()) == set(ids.tolist()) and (found > CRITICAL[9]) == (error > 0)


def test_f71_greedy_draws_are_exact() -> None:
    rows = np.tile(LOGITS, (1000, 1))
    assert set(draw_many(rows, [SampleSpec(seed=3)] * 1000, range(1000)).tolist()) == {6}


@pytest.mark.parametrize("error", [0.05, -0.05])
def test_f71_a_logit_that_is_off_by_a_twentieth_would_be_noticed(error: float) -> None:
    """The control: draws from logits of which one is wrong do not follow the distribution."""
    spec = SampleSpec(temperature=1.0, seed=11)
    wrong = np.bincount(draws(spec._replace(logit_bias=((6, error),))), minlength=VOCAB)
    assert statistic(wrong, chances(spec)) > CRITICAL[VOCAB - 1]


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0, 1e4])
def test_f10_logprobs_are_those_of_a_log_softmax_in_float64(scale: float) -> None:
    for seed in range(20):
        z = (scale * np.random.default_rng(seed).standard_normal(5000)).astype(np.float32)
        z[7] = -np.inf
        wide = z.astype(np.float64) - z.max()
        reference = wide - np.log(np.exp(wide).sum())
        np.testing.assert_allclose(log_softmax(z), reference, rtol=1e-6, atol=1e-5)
        told = describe(z, SampleSpec(logprobs=5), 3)
        assert told.logprob == pytest.approx(reference[3], rel=1e-6, abs=1e-5)
        best = np.argsort(-reference, kind="stable")[:5]
        assert [token for token, _ in told.top_logprobs] == best.tolist()
        assert [value for _, value in told.top_logprobs] == pytest.approx(reference[best], rel=1e-6, abs=1e-5)


def test_f10_processed_logprobs_are_of_what_is_drawn_from() -> None:
    spec = STRATEGIES[-1][0]._replace(logprobs=3, processed=True)
    p = chances(spec)
    for token in np.flatnonzero(p).tolist():
        assert describe(LOGITS, spec, token).logprob == pytest.approx(math.log(p[token]), abs=1e-5)
    raw = describe(LOGITS, spec._replace(processed=False), 6).logprob
    assert raw == pytest.approx(math.log(chances(SampleSpec(temperature=1.0))[6]), abs=1e-5)
    assert describe(LOGITS, SampleSpec(temperature=1.0), 6) == (None, (), None)


def test_f11_metadata() -> None:
    flat = np.zeros(8, np.float32)
    told = describe(flat, SampleSpec(temperature=1.0, metadata=True), 2).metadata
    assert told is not None and told.num_filtered == 0
    assert told.entropy == pytest.approx(math.log(8), abs=1e-6) and told.chosen_prob == pytest.approx(1 / 8)
    for k in range(1, 8):
        z = np.log(np.arange(1, 9, dtype=np.float32))
        told = describe(z, SampleSpec(temperature=1.0, top_k=k, metadata=True), 7).metadata
        assert told is not None and told.num_filtered == 8 - k
        assert told.chosen_prob == pytest.approx(8 / sum(range(9 - k, 9)), rel=1e-6)
        entropy = -sum(n / 36 * math.log(n / 36) for n in range(1, 9))
        assert told.entropy == pytest.approx(entropy, abs=1e-6)  # the model's own, whatever is filtered out


def test_f11_metadata_of_what_cannot_come() -> None:
    z = np.array([-np.inf, 3.0, 1.0, -np.inf, 2.0], np.float32)
    told = describe(z, SampleSpec(metadata=True, banned=(4,)), 1).metadata
    p = np.exp([3.0, 1.0, 2.0]) / np.exp([3.0, 1.0, 2.0]).sum()
    assert told is not None and told.chosen_prob == 1.0 and told.num_filtered == 3
    assert told.entropy == pytest.approx(float(-(p * np.log(p)).sum()), abs=1e-6)
    certain = describe(np.array([0.0, 1e6], np.float32), SampleSpec(metadata=True), 1).metadata
    assert certain is not None and certain.entropy == 0.0


def test_f71_a_nucleus_that_is_reached_exactly_takes_no_more() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8, exact in float32: a share of 3/4 is that of two tokens."""
    z = np.log2(np.array([4, 2, 1, 1], np.float32)) * np.float32(np.log(2))
    p = np.exp(z - z.max())
    assert (p == [1, 0.5, 0.25, 0.25]).all()
    for top_p, kept in ((0.5, 1), (0.75, 2), (0.76, 4), (0.25, 1), (1.0, 4)):
        assert np.isfinite(keep(z, SampleSpec(temperature=1.0, top_p=top_p))).sum() == kept


def test_f11_tokens_that_cannot_be_have_no_part_in_the_entropy() -> None:
    z = np.array([0.0, 0.0, -np.inf, 0.0, 0.0, -np.inf], np.float32)
    told = describe(z, SampleSpec(temperature=1.0, metadata=True), 3)
    assert told.metadata is not None and told.metadata.entropy == pytest.approx(np.log(4), abs=1e-6)
    assert told.metadata.num_filtered == 2 and told.metadata.chosen_prob == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("processed", [False, True])
def test_f11_metadata_leaves_the_logprobs_of_which_distribution_they_are(processed: bool) -> None:
    z = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    spec = SampleSpec(temperature=0.5, top_k=2, logprobs=4, processed=processed, metadata=True)
    expected = log_softmax(process(z, spec) if processed else z)
    told = describe(z, spec, 1)
    likeliest = expected[:2] if processed else expected  # two are left to draw
    assert told.logprob == expected[1] and [value for _, value in told.top_logprobs] == likeliest.tolist()
