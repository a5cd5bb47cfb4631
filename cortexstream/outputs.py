"""What a caller gets back. Names and meanings are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log of a token's probability: under the model's raw distribution, if `logprobs_mode` says no other."""

    logprob: float
    rank: int | None  # 1 is the likeliest; None for a drawn token that is not among the reported top


class TokenMetadata(NamedTuple):
    """What the draw of a token was like."""

    entropy: float  # of the model's own distribution, in nats
    chosen_prob: float  # of the token in the distribution that it was drawn from; 1 for a greedy draw
    num_filtered: int  # tokens of the vocabulary that could not be drawn: banned, masked, or filtered out


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion so far. `stop_reason` is the stop string or stop token id that ended it, None for others."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None  # None unless logprobs were asked for
    logprobs: tuple[dict[int, Logprob], ...] | None  # one per token: the drawn token and the k likeliest
    finish_reason: str | None  # "stop", "length", "abort", "error"; None while it runs
    stop_reason: str | int | None = None
    error: str | None = None  # why, when finish_reason is "error"
    sampling_metadata: tuple[TokenMetadata, ...] | None = None  # one per token, if it was asked for

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All completions of one prompt. `prompt` is None when the prompt was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int = 0  # of the prompt: not computed, because they were for an earlier request
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    """If asked for, one per token of the prompt: the token itself and the k likeliest in its place. The first is None,
    as nothing comes before it. None until the first token is drawn."""

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What is new in one completion: tokens, and text that is certain (half a character is held back)."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
