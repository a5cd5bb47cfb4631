"""Two sets of steps after the same tokens: how far apart, and whether a difference of tokens is a fault.

Each side knows the logprobs of its TOP_TOKENS likeliest tokens and of the drawn one only. For a token that one side
knows and the other does not, the error counted is the least that explains its absence, and the Kullback-Leibler
divergence (Kullback and Leibler, "On Information and Sufficiency", 1951) is that of the tokens both know and one bucket
for all others. Both are thus lower bounds: what is reported as too large is too large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cortexstream.parity.bounds import Bound
from cortexstream.parity.trial import Step, Trial
from cortexstream.sampling import noise

FLOOR = 2.0**-24  # the probability of the rest that float32 logprobs can tell from none


class Difference(NamedTuple):
    """Another token was drawn at a step. `margin` is by how much, in logprobs, the losing token lost, on the side that
    saw it lose more clearly; a `tie` is a margin that the bound explains."""

    step: int
    recorded: int
    drawn: int
    margin: float
    tie: bool


class TrialComparison(NamedTuple):
    """One trial; lists have an entry per step."""

    trial: Trial
    max_errors: list[float]  # largest difference of a logprob
    mean_errors: list[float]  # mean over the tokens that either side lists
    kls: list[float]  # nats
    differences: list[Difference]

    @property
    def faults(self) -> list[Difference]:
        return [difference for difference in self.differences if not difference.tie]


class Comparison(NamedTuple):
    """All trials, and what is wrong, a sentence each; nothing wrong is parity."""

    bound: Bound
    trials: list[TrialComparison]
    reasons: list[str]

    @property
    def ok(self) -> bool:
        return not self.reasons

    @property
    def max_error(self) -> float:
        return max(error for trial in self.trials for error in trial.max_errors)

    @property
    def mean_error(self) -> float:
        errors = [error for trial in self.trials for error in trial.mean_errors]
        return math.fsum(errors) / len(errors)

    @property
    def max_kl(self) -> float:
        return max(kl for trial in self.trials for kl in trial.kls)

    @property
    def num_steps(self) -> int:
        return sum(len(trial.max_errors) for trial in self.trials)

    @property
    def differences(self) -> list[tuple[TrialComparison, Difference]]:
        return [(trial, difference) for trial in self.trials for difference in trial.differences]


def compare(trials: Sequence[Trial], followed: Sequence[Sequence[Step]], vocab_size: int, bound: Bound) -> Comparison:
    """Hold `followed`, what `measure.follow` gave for `trials`, to them."""
    compared = [_compare_trial(trial, steps, vocab_size, bound) for trial, steps in zip(trials, followed, strict=True)]
    result = Comparison(bound, compared, [])
    for value, limit, what in (
        (result.max_error, bound.max_error, "the largest error of a logprob"),
        (result.mean_error, bound.mean_error, "the mean error of the logprobs"),
        (result.max_kl, bound.max_kl, "the largest KL divergence"),
    ):
        if not value <= limit:
            result.reasons.append(f"{what} is {value:.2g}; the bound is {limit:.2g}")
    faults = sum(len(trial.faults) for trial in compared)
    if faults:
        result.reasons.append(f"{faults} of {result.num_steps} tokens differ, and not by a tie")
    return result


def _compare_trial(trial: Trial, steps: Sequence[Step], vocab_size: int, bound: Bound) -> TrialComparison:
    result = TrialComparison(trial, [], [], [], [])
    for number, (recorded, drawn) in enumerate(zip(trial.steps, steps, strict=True)):
        errors = logprob_errors(recorded, drawn)
        result.max_errors.append(max(errors))
        result.mean_errors.append(math.fsum(errors) / len(errors))
        result.kls.append(divergence(recorded, drawn))
        if recorded.token != drawn.token:
            lost_by = margin(trial, number, drawn, vocab_size)
            result.differences.append(Difference(number, recorded.token, drawn.token, lost_by, lost_by <= bound.tie))
    return result


def logprob_errors(recorded: Step, drawn: Step) -> list[float]:
    """For each token whose logprob either side knows, how far the two are apart, or at least must be."""
    theirs, ours = _known(recorded), _known(drawn)
    both = [abs(theirs[token] - ours[token]) for token in theirs.keys() & ours.keys()]
    gone = [max(0.0, theirs[token] - drawn.top[-1][1]) for token in theirs.keys() - ours.keys()]
    come = [max(0.0, ours[token] - recorded.top[-1][1]) for token in ours.keys() - theirs.keys()]
    return both + gone + come


def divergence(recorded: Step, drawn: Step) -> float:
    """KL(recorded || drawn) in nats over the tokens whose logprobs both know, and the rest."""
    theirs, ours = _known(recorded), _known(drawn)
    pairs = [(theirs[token], ours[token]) for token in theirs.keys() & ours.keys()]
    rest = [math.log(max(FLOOR, 1.0 - math.fsum(math.exp(pair[side]) for pair in pairs))) for side in (0, 1)]
    return max(0.0, math.fsum(math.exp(p) * (p - q) for p, q in [*pairs, (rest[0], rest[1])]))  # below 0 is rounding


def margin(trial: Trial, number: int, drawn: Step, vocab_size: int) -> float:
    """By how much the token that was drawn on one side lost on the other, in logprobs; of the two sides the larger.

    The score that decides a draw is logprob / temperature + noise (`cortexstream.sampling`; trials have a threshold),
    and the logprob alone at temperature 0. A token that a side does not list has at most the logprob of the last one
    listed, so this is a lower bound too.
    """
    recorded = trial.steps[number]
    position = len(trial.token_ids) + number
    bonus = [0.0, 0.0]
    if trial.temperature:
        drawn_noise = noise(trial.seed, position, 0, vocab_size)
        bonus = [trial.temperature * float(drawn_noise[token]) for token in (recorded.token, drawn.token)]
    won, lost = recorded.logprob + bonus[0], _at_most(recorded, drawn.token) + bonus[1]
    won_here, lost_here = drawn.logprob + bonus[1], _at_most(drawn, recorded.token) + bonus[0]
    return max(won - lost, won_here - lost_here)


def _known(step: Step) -> dict[int, float]:
    return {**dict(step.top), step.token: step.logprob}


def _at_most(step: Step, token: int) -> float:
    return _known(step).get(token, step.top[-1][1])
