"""What the engine can serve, and whether a request is within it."""

from __future__ import annotations

from dataclasses import dataclass

from cortexstream.errors import InvalidRequestError
from cortexstream.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler must know about the model and the step."""

    vocab_size: int
    max_tokens: int  # longest sequence, prompt and output together
    reason: str  # what set max_tokens, for error messages: "the model's context is 2048 tokens"
    eos_token_ids: frozenset[int]
    max_num_seqs: int
    max_batched_tokens: int  # tokens of one step


def check_request(request: Request, limits: Limits) -> None:
    """Raise InvalidRequestError, with field, value and limit, if a request can never be served."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise InvalidRequestError("prompt", "is empty; it needs at least one token")
    if len(prompt) >= limits.max_tokens:
        raise InvalidRequestError(
            "prompt",
            f"has {len(prompt)} tokens; with one token of output at most {limits.max_tokens - 1} fit ({limits.reason})",
        )
    if len(prompt) + sampling.min_tokens > limits.max_tokens:
        raise InvalidRequestError(
            "min_tokens",
            f"is {sampling.min_tokens}; after a prompt of {len(prompt)} tokens at most "
            f"{limits.max_tokens - len(prompt)} fit ({limits.reason})",
        )
    for name, ids in (
        ("prompt", prompt), ("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias),
        ("bad_token_ids", sampling.bad_token_ids), ("allowed_token_ids", sampling.allowed_token_ids or ()),
    ):  # fmt: skip
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < limits.vocab_size:
                raise InvalidRequestError(
                    name, f"has token id {token}; the vocabulary has ids 0 to {limits.vocab_size - 1}"
                )
    _check_choice(request, limits)


def limit_tokens(request: Request, limits: Limits) -> int:
    """How many tokens a checked request may have at most, prompt and output together."""
    most = request.sampling.max_tokens
    return limits.max_tokens if most is None else min(limits.max_tokens, len(request.prompt_token_ids) + most)


def _check_choice(request: Request, limits: Limits) -> None:
    """Raise InvalidRequestError if the request's own bans leave no token to draw."""
    sampling = request.sampling
    bans = set(sampling.bad_token_ids)
    if len(bans) >= limits.vocab_size:
        raise InvalidRequestError(
            "bad_token_ids", f"has all {limits.vocab_size} tokens of the vocabulary; leave at least one"
        )
    if not sampling.min_tokens:
        return
    bans.update(sampling.stop_token_ids, () if sampling.ignore_eos else limits.eos_token_ids)
    allowed = sampling.allowed_token_ids
    if len(bans) >= limits.vocab_size if allowed is None else bans.issuperset(allowed):
        raise InvalidRequestError(
            "min_tokens",
            f"is {sampling.min_tokens}, but every token that may be drawn ends the text (end of sequence, "
            "stop_token_ids): allow another one, or set min_tokens to 0",
        )
