"""The arithmetic of a comparison, on steps made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cortexstream.parity import BOUNDS, QUANTIZED, Bound, Step, Trial, bound_of, compare
from cortexstream.parity.compare import divergence, logprob_errors, margin
from cortexstream.parity.trial import MIN_P
from cortexstream.plan import SampleSpec
from cortexstream.sampling import draw, log_softmax, top_logprobs

VOCAB, TOP = 60, 20
FLOAT32 = BOUNDS["float32"]


def logits(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)


def step(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], spec: SampleSpec, position: int) -> Step:
    logprobs = log_softmax(values)
    token = draw(values, spec, position)
    return Step(token, float(logprobs[token]), top_logprobs(logprobs, TOP))


def trial_and_steps(noise: float, temperature: float, count: int = 200) -> tuple[Trial, list[Step]]:
    """A trial, and its steps as a machine draws them whose logits err by up to `noise`."""
    rng = np.random.default_rng(1)
    spec = SampleSpec(temperature=temperature, min_p=MIN_P, seed=5)
    recorded, drawn = [], []
    for number in range(count):
        exact = logits(number)
        off = exact + rng.uniform(-noise, noise, VOCAB).astype(np.float32)
        recorded.append(step(exact, spec, 3 + number))
        drawn.append(step(off, spec, 3 + number))
    return Trial("by hand", (1, 2, 3), temperature, 5, tuple(recorded)), drawn


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("noise", "ok"), [(0.0, True), (2e-5, True), (1e-3, False), (0.1, False)])
def test_p6_noise_on_the_logits_is_seen(noise: float, ok: bool, temperature: float) -> None:
    """The control: float32 rounding passes, anything above it does not."""
    trial, drawn = trial_and_steps(noise, temperature)
    result = compare([trial], [drawn], VOCAB, FLOAT32)
    assert result.ok is ok
    assert result.max_error <= 2 * noise + 1e-6 and result.mean_error <= noise + 1e-6
    assert ok or (result.max_error > noise / 2 and "largest error" in result.reasons[0])


def test_p6_a_difference_that_errors_explain_is_a_tie() -> None:
    """Whatever the noise, a right draw differs only where the two scores lie within twice the largest error."""
    num_differences = 0
    for temperature in (0.0, 0.8):
        trial, drawn = trial_and_steps(0.05, temperature, 600)
        wide = Bound(0.11, 0.11, 0.11, 0.22, "")
        result = compare([trial], [drawn], VOCAB, wide)
        differences = result.trials[0].differences
        assert result.ok and all(-1e-5 <= d.margin <= wide.tie and d.tie for d in differences)
        num_differences += len(differences)
        narrow = compare([trial], [drawn], VOCAB, wide._replace(tie=1e-5))
        assert [d.step for d in narrow.trials[0].faults] == [d.step for d in differences]
        assert narrow.reasons == [f"{len(differences)} of 600 tokens differ, and not by a tie"]
    assert num_differences > 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_p6_a_sampler_at_fault_is_seen_though_the_logits_agree(temperature: float) -> None:
    trial, drawn = trial_and_steps(0.0, temperature)
    place = max(range(len(drawn)), key=lambda n: drawn[n].top[0][1])
    other = next(pair for pair in drawn[place].top if pair[0] != drawn[place].token)
    drawn[place] = Step(other[0], other[1], drawn[place].top)
    result = compare([trial], [drawn], VOCAB, BOUNDS["bfloat16"]._replace(tie=0.1))
    (difference,) = result.trials[0].differences
    assert (difference.step, difference.recorded, difference.drawn) == (place, trial.tokens[place], other[0])
    assert not difference.tie and result.reasons == ["1 of 200 tokens differ, and not by a tie"]


def test_p6_the_margin_of_a_greedy_difference_is_that_of_the_logprobs() -> None:
    recorded = Step(4, -0.5, ((4, -0.5), (7, -0.9), (1, -4.0)))
    trial = Trial("x", (1,), 0.0, 0, (recorded,))
    listed = Step(7, -0.6, ((7, -0.6), (4, -0.7), (1, -4.1)))
    assert margin(trial, 0, listed, VOCAB) == pytest.approx(0.4)
    foreign = Step(9, -0.6, ((9, -0.6), (7, -0.7), (1, -2.0)))  # 9 had at most -4.0, and 4 has at most -2.0
    assert margin(trial, 0, foreign, VOCAB) == pytest.approx(3.5)


def test_p6_a_token_that_one_side_does_not_list_counts_with_the_least_error() -> None:
    recorded = Step(1, -0.2, ((1, -0.2), (2, -3.0)))
    drawn = Step(1, -0.3, ((1, -0.3), (3, -2.5)))
    assert sorted(logprob_errors(recorded, drawn)) == pytest.approx([0.0, 0.1, 0.5])
    unlisted = Step(5, -8.0, ((1, -0.3), (3, -2.5)))
    assert max(logprob_errors(replace_token(recorded, 5, -9.0), unlisted)) == pytest.approx(1.0)


def replace_token(step: Step, token: int, logprob: float) -> Step:
    return step._replace(token=token, logprob=logprob)


def test_p6_divergence_is_that_of_what_both_list_and_the_rest() -> None:
    p, q = [0.5, 0.3, 0.2], [0.4, 0.35, 0.25]
    recorded, drawn = (Step(0, math.log(v[0]), ((0, math.log(v[0])), (1, math.log(v[1])))) for v in (p, q))
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert divergence(recorded, drawn) == pytest.approx(expected)
    assert divergence(recorded, recorded) == 0.0
    moved = drawn._replace(top=((0, math.log(q[0])), (2, math.log(q[1]))))
    assert divergence(recorded, moved) == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6))


def test_p6_every_bound_is_enforced() -> None:
    trial, drawn = trial_and_steps(1e-3, 0.0)
    wide = Bound(1, 1, 1, 1, "")
    exact = compare([trial], [drawn], VOCAB, wide)
    assert exact.ok and exact.num_steps == 200
    for name, value in (("max_error", exact.max_error), ("mean_error", exact.mean_error), ("max_kl", exact.max_kl)):
        above = compare([trial], [drawn], VOCAB, Bound(**{**wide._asdict(), name: 0.99 * value}))
        assert len(above.reasons) == 1 and not above.ok
        assert compare([trial], [drawn], VOCAB, Bound(**{**wide._asdict(), name: value})).ok
    lost = [*drawn[:-1], drawn[-1]._replace(logprob=math.nan)]
    assert not compare([trial], [lost], VOCAB, wide).ok, "a number that is none is no parity"


def test_p6_the_coarser_machine_sets_the_bound() -> None:
    assert bound_of("float32", "float32", quantized=False) == FLOAT32
    assert bound_of("float32", "float16", quantized=False) == BOUNDS["float16"]
    assert bound_of("bfloat16", "float16", quantized=True) == BOUNDS["bfloat16"]
    assert bound_of("float32", "float32", quantized=True) == QUANTIZED


def test_p6_a_trial_survives_its_file_to_the_seventh_decimal() -> None:
    trial, _ = trial_and_steps(0.0, 0.8, 3)
    back = Trial.from_json(trial.as_json())
    assert back.tokens == trial.tokens and replace(back, steps=()) == replace(trial, steps=())
    for before, after in zip(trial.steps, back.steps, strict=True):
        assert max(logprob_errors(before, after)) < 1e-7


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.1, "-1", True, None])
def test_p6_what_is_no_logprob_makes_no_trial(value: object) -> None:
    values = trial_and_steps(0.0, 0.8, 3)[0].as_json()
    values["logprobs"][1] = value
    with pytest.raises(ValueError, match="is no logprob"):
        Trial.from_json(values)
