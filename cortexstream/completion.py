"""One completion in the making: token events in, text out."""

from __future__ import annotations

from cortexstream.outputs import CompletionOutput, Logprob
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
        )  # fmt: skip

    def _new_text(self, event: TokenEvent) -> tuple[str, bool]:
        if self._detokenizer is None:
            return "", False
        text = ""
        # The token that says "stop" is part of the tokens but not of the text.
        ends = event.finish is FinishReason.STOP and not self._sampling.include_stop_str_in_output
        if event.token is not None and not ends:
            text = self._detokenizer.feed(event.token)
        if event.finish is not None:
            text += self._detokenizer.finish()
        if self._stops is None or len(self._tokens) <= self._sampling.min_tokens:
            return text, False
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
        top = {token: Logprob(value, rank) for rank, (token, value) in enumerate(event.top_logprobs, 1)}
        top.setdefault(event.token, Logprob(event.logprob, None))
        self._logprobs.append(top)
        self._cumulative += event.logprob
