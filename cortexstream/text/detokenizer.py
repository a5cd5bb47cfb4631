"""Token ids in, text out, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

from cortexstream.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # how every library writes bytes that are not (yet) a character
# An unfinished character has at most 3 of its 4 bytes, so at most 3 trailing marks can still turn into something else.
MAX_OPEN = 3
# Tokens of context. 3 marks stand for 9 bytes at most, 3 more belong to a character that the cut may split.
CONTEXT_TOKENS = 12


class Detokenizer:
    """The text of a completion as its tokens come; the pieces joined are the text of all tokens together.

    A token's text depends on its neighbours: a space before a word is dropped at the start of a text, and a character
    can be spread over four tokens. So every token is decoded with those before it, at first the prompt's. The last few
    are enough: a character has four bytes and a token at least one, and the rule about the start of a text only asks
    whether something visible came before (which `_tail` keeps). That makes a token's cost independent of the length.

    Text is held back while it ends in U+FFFD that a next token may complete. A prompt that ends inside a character
    leaves that character to the output. `Tokenizer.writes` says which tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = self._tail(prompt_token_ids)
        self._text = self._decode(self._window)
        self._shown = len(self._text)  # characters of `_text` that were given out or are the prompt's

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token; "" while a character is incomplete."""
        if not self._tokenizer.writes(token_id, self._skip):
            return ""
        self._window.append(token_id)
        before, self._text = self._text, self._decode(self._window)
        if not self._text.startswith(before[: self._shown]):
            # The prompt's unfinished character was completed.
            self._shown = min(self._shown, _num_equal(before, self._text))
        end = _certain(self._text)
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        if len(self._window) >= 2 * CONTEXT_TOKENS:
            self._slide()
        return piece

    def finish(self) -> str:
        """What was held back: the bytes of a character that was never completed, as U+FFFD."""
        piece = self._text[self._shown :]
        self._shown = len(self._text)
        return piece

    def _slide(self) -> None:
        """Forget old tokens, unless that would change the text held back."""
        held = self._text[self._shown :]
        window = self._tail(self._window)
        text = self._decode(window)
        if text.endswith(held):
            self._window, self._text, self._shown = window, text, len(text) - len(held)

    def _tail(self, tokens: Sequence[int]) -> list[int]:
        """The last CONTEXT_TOKENS tokens that have text; if all are blank, after the last one that is not."""
        tail: list[int] = []
        for token in reversed(tokens):
            if not self._tokenizer.writes(token, self._skip):
                continue
            if len(tail) < CONTEXT_TOKENS:
                tail.insert(0, token)
                if len(tail) == CONTEXT_TOKENS and self._is_visible(tail):
                    break
            elif self._is_visible([token]):
                tail.insert(0, token)
                break
        return tail

    def _is_visible(self, tokens: list[int]) -> bool:
        return bool(self._decode(tokens).strip())

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, self._skip)


def _certain(text: str) -> int:
    """How many characters of a text no further token can change."""
    return max(len(text.rstrip(REPLACEMENT)), len(text) - MAX_OPEN)


def _num_equal(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
