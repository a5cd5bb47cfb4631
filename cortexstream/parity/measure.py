"""Trials from a loaded model: free, as anybody's request would run, or along the tokens of a record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from cortexstream.errors import EngineError, InvalidRequestError
from cortexstream.outputs import CompletionOutput
from cortexstream.parity.prompts import STEPS, NamedPrompt
from cortexstream.parity.trial import TOP_TOKENS, Step, Trial

if TYPE_CHECKING:
    from cortexstream.llm import LLM

TEMPERATURES = (0.0, 0.8)  # greedy, and one at which unlikely tokens come


class Job(NamedTuple):
    """`num_steps` steps of a trial after its prompt and `forced`, tokens that are given and not drawn."""

    trial: Trial
    forced: tuple[int, ...]
    num_steps: int


def measure(llm: LLM, prompts: Sequence[NamedPrompt], steps: int = STEPS) -> tuple[Trial, ...]:
    """Continue every prompt greedily and by seeded draws, all as one batch.

    Raises EngineError if a request fails or the model's logprobs are not finite.
    """
    blank = [
        Trial(prompt.name, prompt.token_ids, temperature, seed, ())
        for seed, prompt in enumerate(prompts)
        for temperature in TEMPERATURES
    ]
    answers = _run(llm, [Job(trial, (), steps) for trial in blank])
    return tuple(replace(trial, steps=answer) for trial, answer in zip(blank, answers, strict=True))


def follow(llm: LLM, trials: Sequence[Trial]) -> list[tuple[Step, ...]]:
    """What the loaded model draws at every step of `trials`, each step after the recorded tokens before it.

    A trial first runs free. As long as it draws what was recorded, its steps are what is wanted, and come from an
    ordinary request. At the first other token the ways part; every later step is a request of one token whose prompt
    is the recorded one and the recorded tokens. The draw is the same, since it depends on seed and position alone,
    and so is the arithmetic: the last token of a prompt is computed as a decoding row. Prompt logprobs, which would
    give all of this in one pass, are not there, and would compare prefill alone.

    Raises InvalidRequestError if a trial does not fit the loaded model, EngineError as `measure` does.
    """
    _check(llm, trials)
    free = _run(llm, [Job(trial, (), len(trial.steps)) for trial in trials])
    parted = [_num_usable(trial, steps) for trial, steps in zip(trials, free, strict=True)]
    forced = _run(
        llm,
        [
            Job(trial, trial.tokens[:step], 1)
            for trial, first in zip(trials, parted, strict=True)
            for step in range(first, len(trial.steps))
        ],
    )
    rest = iter(forced)
    return [
        (*steps[:first], *(next(rest)[0] for _ in range(first, len(steps))))
        for steps, first in zip(free, parted, strict=True)
    ]


def _num_usable(trial: Trial, steps: tuple[Step, ...]) -> int:
    """Steps of a free run that followed the recorded tokens: up to and including the first other token."""
    for number, (recorded, drawn) in enumerate(zip(trial.tokens, steps, strict=True), 1):
        if recorded != drawn.token:
            return number
    return len(steps)


def _check(llm: LLM, trials: Sequence[Trial]) -> None:
    limits = llm.limits
    needed = max(len(trial.token_ids) + len(trial.steps) for trial in trials)
    if needed > limits.max_tokens:
        raise InvalidRequestError(
            "check", f"has a trial of {needed} tokens; here at most {limits.max_tokens} fit ({limits.reason})"
        )


def _run(llm: LLM, jobs: Sequence[Job]) -> list[tuple[Step, ...]]:
    if not jobs:
        return []
    prompts = [{"prompt_token_ids": [*job.trial.token_ids, *job.forced]} for job in jobs]
    outputs = llm.generate(prompts, [job.trial.sampling(job.num_steps) for job in jobs])
    return [_steps(job, output.outputs[0]) for job, output in zip(jobs, outputs, strict=True)]


def _steps(job: Job, completion: CompletionOutput) -> tuple[Step, ...]:
    where = f"prompt {job.trial.prompt!r}"
    if completion.error is not None:
        raise EngineError(f"{where}: {completion.error}")
    logprobs = completion.logprobs or ()
    if len(completion.token_ids) != job.num_steps or len(logprobs) != job.num_steps:
        raise EngineError(
            f"{where}: {len(completion.token_ids)} tokens and {len(logprobs)} logprobs came, not {job.num_steps}"
        )
    steps = []
    for token, values in zip(completion.token_ids, logprobs, strict=True):
        top = tuple((other, value.logprob) for other, value in values.items() if value.rank is not None)
        if not all(math.isfinite(value.logprob) for value in values.values()):
            raise EngineError(
                f"{where}: one of the {TOP_TOKENS} likeliest tokens, or the drawn one, has no probability"
            )
        steps.append(Step(token, values[token].logprob, top))
    return tuple(steps)
