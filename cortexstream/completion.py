"""One completion in the making: token events in, text out."""

from __future__ import annotations

from cortexstream.outputs import CompletionOutput, Logprob, TokenMetadata
from cortexstream.plan import TokenScore
from cortexstream.request import FinishReason, SamplingParams
from cortexstream.scheduler import TokenEvent
from cortexstream.text.detokenizer import Detokenizer
from cortexstream.text.stops import StopStrings
from cortexstream.text.tokenizer import Tokenizer


class Completion:
    """Collects the tokens of one request and turns them into text as far as it is certain.

    Without a tokenizer the text stays empty and stop strings cannot be used (the face refuses them).
    """

    def __init__(
        self, index: int, sampling: SamplingParams, tokenizer: Tokenizer | None, prompt_token_ids: tuple[int, ...]
    ) -> None:
        self.index = index
        self._sampling = sampling
        self._detokenizer = (
            Detokenizer(tokenizer, prompt_token_ids, sampling.skip_special_tokens) if tokenizer is not None else None
        )
        self._stops = StopStrings(tuple(sampling.stop), sampling.include_stop_str_in_output) if sampling.stop else None
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if sampling.logprobs is None else []
        self._metadata: list[TokenMetadata] | None = [] if sampling.sampling_metadata else None
        self._prompt_token_ids = prompt_token_ids
        self.prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
        self._cumulative = 0.0
        self._finish: FinishReason | None = None
        self._stop_reason: str | int | None = None
        self._error: str | None = None
        self.num_cached_tokens = 0

    def take(self, event: TokenEvent) -> tuple[str, bool]:
        """Add an event; returns (new text, whether a stop string ended it just now)."""
        if event.token is not None:
            self._tokens.append(event.token)
            self.num_cached_tokens = event.num_cached_tokens
            self._add_logprobs(event)
            if self._metadata is not None and event.metadata is not None:
                self._metadata.append(event.metadata)
            if event.prompt_scores is not None:
                self._set_prompt_logprobs(event.prompt_scores)
        self._finish, self._error = event.finish, event.error
        if event.finish is FinishReason.STOP and event.token in self._sampling.stop_token_ids:
            self._stop_reason = event.token
        text, stopped = self._new_text(event)
        if stopped:
            self._finish = FinishReason.STOP
        self._pieces.append(text)
        return text, stopped

    @property
    def finish_reason(self) -> str | None:
        return None if self._finish is None else self._finish.value

    def output(self) -> CompletionOutput:
        """A snapshot."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        logprobs = self._logprobs
        return CompletionOutput(
            self.index, "".join(self._pieces), tuple(self._tokens), None if logprobs is None else self._cumulative,
            None if logprobs is None else tuple(logprobs), self.finish_reason, self._stop_reason, self._error,
            None if self._metadata is None else tuple(self._metadata),
        )  # fmt: skip

    def _new_text(self, event: TokenEvent) -> tuple[str, bool]:
        if self._detokenizer is None:
            return "", False
        text = ""
        # The token that says "stop" is part of the tokens but not of the text.
        ends = event.stops and not self._sampling.include_stop_str_in_output
        if event.token is not None and not ends:
            text = self._detokenizer.feed(event.token)
        if event.finish is not None:
            text += self._detokenizer.finish()
        if self._stops is None:
            return text, False
        if len(self._tokens) <= self._sampling.min_tokens:
            text = self._stops.skip(text)
        else:
            text, matched = self._stops.feed(text)
            if matched is not None:
                self._stop_reason = matched
                return text, True
        if event.finish is not None:
            text += self._stops.finish()
        return text, False

    def _add_logprobs(self, event: TokenEvent) -> None:
        if self._logprobs is None or event.token is None or event.logprob is None:
            return
        self._logprobs.append(ranked(event.token, event.logprob, event.top_logprobs))
        self._cumulative += event.logprob

    def _set_prompt_logprobs(self, scores: tuple[TokenScore, ...]) -> None:
        pairs = zip(self._prompt_token_ids[1:], scores, strict=True)
        self.prompt_logprobs = (None, *(ranked(token, *score) for token, score in pairs))


def ranked(token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> dict[int, Logprob]:
    """The likeliest tokens with their ranks, and `token` itself."""
    found = {other: Logprob(value, rank) for rank, (other, value) in enumerate(top, 1)}
    found.setdefault(token, Logprob(logprob, None))
    return found
