"""A tokenizer as the grammar library wants it: the bytes of each token, and the best tokens for text that is forced."""

from __future__ import annotations

from cortexstream.text.tokenizer import Tokenizer

SPECIAL_MARK = b"\xff"  # the library's own first byte of special tokens; never part of UTF-8 text
ANCHOR = "\x02"  # a character that no tokenizer merges with what follows


class GrammarTokens:
    """The vocabulary of a model for `llguidance.LLTokenizer`, whose protocol the attributes and `__call__` are.

    A token of no bytes is never allowed: padding of the model's vocabulary, and tokens that hold the byte 0xFF. Special
    tokens keep their names, so that a Lark grammar can ask for one as `<|name|>`; as text they are never allowed. The
    ids that end a sequence are special in this sense, whatever the tokenizer says of them.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, token_bytes: list[bytes | None], vocab_size: int, eos: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        known = token_bytes[:vocab_size] + [None] * (vocab_size - len(token_bytes))
        text = [None if token in eos or SPECIAL_MARK in (piece or b"") else piece for token, piece in enumerate(known)]
        self.tokens = [piece or self._name(token) for token, piece in enumerate(text)]
        self.special_token_ids = [token for token, piece in enumerate(text) if not piece and self.tokens[token]]
        self.eos_token_id = min(eos)
        self._text = text
        self._id_of = {piece: token for token, piece in enumerate(text) if piece}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: str) -> list[int]:
        """The model's own tokens for text in the middle of a text, without the space that some tokenizers put before.

        Text that it cannot spell that way (it normalises, or reads a special token) is taken longest token first. Text
        that no tokens spell gives those of its beginning.
        """
        data = text.encode()
        return self._tail(self._tokenizer.encode(ANCHOR + text, add_special_tokens=False), data) or self._greedy(data)

    def _tail(self, ids: list[int], data: bytes) -> list[int]:
        """The last of `ids` if their bytes are exactly `data`, else []."""
        start = len(ids)
        missing = len(data)
        while missing > 0 and start > 0:
            start -= 1
            piece = self._text[ids[start]] if ids[start] < len(self._text) else None
            missing = missing - len(piece) if piece else -1
        found = ids[start:]
        return found if missing == 0 and b"".join(self._text[token] or b"" for token in found) == data else []

    def _greedy(self, data: bytes) -> list[int]:
        found: list[int] = []
        place = 0
        while place < len(data):
            sizes = range(min(self._longest, len(data) - place), 0, -1)
            size = next((size for size in sizes if data[place : place + size] in self._id_of), 0)
            if size == 0:
                break
            found.append(self._id_of[data[place : place + size]])
            place += size
        return found

    def _name(self, token: int) -> bytes:
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()
