"""One prompt under one way to draw: the tokens that came, and what the model thought at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from cortexstream.request import MAX_LOGPROBS, SamplingParams

TOP_TOKENS = MAX_LOGPROBS  # as many as a request may ask for
MIN_P = (
    1e-6  # leaves next to all, and with it every token has noise of its own: a draw is decided by two tokens' scores
)
DECIMALS = 7  # of a logprob in a file: a thousandth of the smallest bound


class Step(NamedTuple):
    """One drawn token. Logprobs are natural logs of the raw distribution; `top` has the TOP_TOKENS likeliest tokens
    (or the whole vocabulary, if that is smaller), likeliest first. What they leave over is the rest: one minus the
    sum of their probabilities, good to the 1e-7 or so that float32 logprobs allow."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """A prompt, how it was continued, and the steps. The token of step t has position `len(token_ids)` + t."""

    prompt: str  # a name for people
    token_ids: tuple[int, ...]
    temperature: float  # 0 is greedy
    seed: int
    steps: tuple[Step, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(step.token for step in self.steps)

    def sampling(self, max_tokens: int) -> SamplingParams:
        """What makes so many steps of this trial; nothing ends them early."""
        return SamplingParams(
            temperature=self.temperature, min_p=MIN_P, seed=self.seed, max_tokens=max_tokens, ignore_eos=True,
            logprobs=TOP_TOKENS,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Columns in place of one object per step: a third of the size."""
        return {
            "prompt": self.prompt,
            "token_ids": list(self.token_ids),
            "temperature": self.temperature,
            "seed": self.seed,
            "tokens": list(self.tokens),
            "logprobs": [round(step.logprob, DECIMALS) for step in self.steps],
            "top_tokens": [[token for token, _ in step.top] for step in self.steps],
            "top_logprobs": [[round(value, DECIMALS) for _, value in step.top] for step in self.steps],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Trial:
        """The inverse of `as_json`. Raises KeyError, TypeError or ValueError for anything else."""
        steps = tuple(
            Step(_id(token), _logprob(logprob), _top(ids, logprobs))
            for token, logprob, ids, logprobs in zip(
                values["tokens"], values["logprobs"], values["top_tokens"], values["top_logprobs"], strict=True
            )
        )
        token_ids = tuple(_id(token) for token in values["token_ids"])
        if not steps or not token_ids:
            raise ValueError("a trial needs a prompt and a step")
        return cls(str(values["prompt"]), token_ids, float(values["temperature"]), _id(values["seed"]), steps)


def _top(ids: list[Any], logprobs: list[Any]) -> tuple[tuple[int, float], ...]:
    top = tuple((_id(token), _logprob(value)) for token, value in zip(ids, logprobs, strict=True))
    if not top or len({token for token, _ in top}) < len(top):
        raise ValueError("the likeliest tokens are missing, or one is named twice")
    return top


def _id(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _logprob(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value > 1e-3:
        raise ValueError(f"{value!r} is no logprob")
    return float(value)
