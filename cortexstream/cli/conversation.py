"""What was said so far, kept within the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

Message = dict[str, str]
Encode = Callable[[Sequence[Message]], list[int]]


class Fit(NamedTuple):
    """A prompt, and what it takes to fit it in."""

    token_ids: list[int]
    num_dropped: int  # of the oldest turns
    full_tokens: int  # length of the prompt with all turns


class Conversation:
    """A system prompt and turns of (what the user said, what the model answered).

    `encode` gives the token ids of messages through the chat template, an answer to follow.
    """

    def __init__(self, encode: Encode, limit_tokens: int, system: str | None = None) -> None:
        self._encode = encode
        self.limit_tokens = limit_tokens  # prompt and answer together
        self.system = system
        self.turns: list[tuple[str, str]] = []

    def messages(self, text: str, num_dropped: int = 0) -> list[Message]:
        """What the model is to answer: `text` after all turns but the oldest `num_dropped`."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for said, answered in self.turns[num_dropped:]:
            found += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
        return [*found, {"role": "user", "content": text}]

    def fit(self, text: str, answer_tokens: int) -> Fit:
        """The prompt for `text` with as many turns as leave `answer_tokens` free; changes nothing.

        Without any turn it may still be too long: the engine then refuses it with the numbers.
        """
        token_ids = self._encode(self.messages(text))
        full_tokens, num_dropped = len(token_ids), 0
        while len(token_ids) + answer_tokens > self.limit_tokens and num_dropped < len(self.turns):
            num_dropped += 1
            token_ids = self._encode(self.messages(text, num_dropped))
        return Fit(token_ids, num_dropped, full_tokens)
