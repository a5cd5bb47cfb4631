"""The three libraries that turn text into token ids, behind one small interface."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from cortexstream.errors import ModelLoadError
from cortexstream.text.token_bytes import SPACE, byte_reader
from cortexstream.text.tokenizer_config import AddedToken, TokenizerConfig

# Appended to a sentencepiece model: protobuf merges it into the normaliser's settings as add_dummy_prefix = false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Codec(Protocol):
    """What `Tokenizer` needs of a library. Ids given to `decode` are in the vocabulary."""

    vocab_size: int  # one more than the largest id
    special_tokens: Mapping[str, str]  # role ("bos_token", ...) -> text
    special_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are written out."""
        ...

    def token_id(self, text: str) -> int | None: ...

    def token_bytes(self) -> list[bytes | None] | None:
        """What each id, up to `vocab_size`, adds to a text that has begun: the joined bytes of ids are the text that
        `decode` makes of them. None in the list: a special token, or no token. None: the library does not tell."""
        ...


class TokenizersCodec:
    """A tokenizer.json, through the `tokenizers` library. Which special tokens are added is the file's own rule.

    One difference to the library: bytes that are not UTF-8 become one U+FFFD each, as in sentencepiece, and leave their
    neighbours alone. The library spoils the whole run of byte tokens, so that text already streamed would change.
    """

    def __init__(self, tokenizer: Any, config: TokenizerConfig) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        named = {text for text in config.special_tokens.values() if tokenizer.token_to_id(text) is not None}
        tokenizer.add_special_tokens(sorted(named - known))
        self._tokenizer = tokenizer
        self.special_tokens = config.special_tokens
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special_ids = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        self._byte_ids = self._find_bytes()
        self._byte_of = {token: value for value, token in enumerate(self._byte_ids)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(self._as_utf8(ids)), skip_special_tokens=False)
        return text

    def token_id(self, text: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    def token_bytes(self) -> list[bytes | None] | None:
        to_bytes = byte_reader(self._tokenizer.decoder)
        if to_bytes is None:
            return None
        found: list[bytes | None] = [None] * self.vocab_size
        for text, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token not in self.special_ids:
                found[token] = to_bytes(text)
        return found

    def _find_bytes(self) -> list[int]:
        """Ids of <0x00> ... <0xFF> if the decoder reads them as bytes, else []."""
        decoder = self._tokenizer.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():
            return []
        ids = [self._tokenizer.token_to_id(f"<0x{value:02X}>") for value in range(256)]
        return ids if None not in ids else []

    def _as_utf8(self, ids: Sequence[int]) -> Iterator[int]:
        """The same ids with each byte that is not part of a UTF-8 character replaced by the three bytes of U+FFFD."""
        run = bytearray()
        for token in ids:
            value = self._byte_of.get(token)
            if value is not None:
                run.append(value)
                continue
            yield from self._repaired(run)
            run.clear()
            yield token
        yield from self._repaired(run)

    def _repaired(self, run: bytearray) -> Iterator[int]:
        text = re.sub("[\udc80-\udcff]", "\ufffd", run.decode("utf-8", "surrogateescape"))
        return (self._byte_ids[value] for value in text.encode())


class SentencePieceCodec:
    """A tokenizer.model, through `sentencepiece`, which itself never reads special tokens from text.

    Text is split at control pieces and added tokens first. In between, sentencepiece's dummy prefix (a space before
    the text) is set at every stretch, or with `"legacy": false` in tokenizer_config.json only at the start of the text.
    BOS is added unless `add_bos_token` is false, EOS if `add_eos_token` is true.
    """

    def __init__(self, model: bytes, config: TokenizerConfig) -> None:
        from sentencepiece import SentencePieceProcessor

        self._first = SentencePieceProcessor(model_proto=model)
        plain = config.values.get("legacy", True) is False
        self._later = SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX) if plain else self._first
        self._num_pieces: int = self._first.get_piece_size()
        self.special_tokens: Mapping[str, str] = {**self._roles(), **config.special_tokens}
        added = self._added_tokens(config)
        self.vocab_size = max(self._num_pieces, *(token.id + 1 for token in added), 0)
        self.special_ids = frozenset(token.id for token in added if token.special)
        self._text_of = {token.id: token.content for token in added}
        self._id_of = {token.content: token.id for token in added}
        # Longest first: where two tokens start at the same character, the longer one is meant.
        self._added = sorted(added, key=lambda token: -len(token.content))
        self._split = re.compile("|".join(_pattern(token) for token in self._added)) if added else None
        self._before = self._ids_to_add(config, "add_bos_token", "bos_token", default=True)
        self._after = self._ids_to_add(config, "add_eos_token", "eos_token", default=False)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._split.finditer(text) if self._split else ():
            ids += self._encode_plain(text, start, match.start())
            assert match.lastindex is not None  # every alternative is one group
            ids.append(self._added[match.lastindex - 1].id)
            start = match.end()
        ids += self._encode_plain(text, start, len(text))
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        pieces: list[str] = []
        run: list[int] = []
        for place, token in enumerate(ids):
            if token in self._text_of:
                pieces += [self._decode_plain(run, first=len(run) == place), self._text_of[token]]
                run = []
            elif token < self._num_pieces:
                run.append(token)
        pieces.append(self._decode_plain(run, first=len(run) == len(ids)))
        return "".join(pieces)

    def token_id(self, text: str) -> int | None:
        if text in self._id_of:
            return self._id_of[text]
        found: int = self._first.piece_to_id(text)
        return found if self._first.id_to_piece(found) == text else None

    def token_bytes(self) -> list[bytes | None]:
        """Added tokens are left out where the space before a word is dropped after them (see `_decode_plain`)."""
        found: list[bytes | None] = [None] * self.vocab_size
        for token in range(self._num_pieces):
            piece = self._first.id_to_piece(token)
            if self._first.is_byte(token):
                found[token] = bytes([int(piece[3:5], 16)])
            elif not (self._first.is_control(token) or self._first.is_unknown(token) or self._first.is_unused(token)):
                found[token] = piece.replace(SPACE, " ").encode()
        for token, text in self._text_of.items():
            plain = token not in self.special_ids and self._later is not self._first
            found[token] = text.encode() if plain else None
        return found

    def _encode_plain(self, text: str, start: int, stop: int) -> list[int]:
        if start == stop:
            return []
        ids: list[int] = (self._later if start else self._first).encode(text[start:stop])
        return ids

    def _decode_plain(self, run: list[int], first: bool) -> str:
        text: str = (self._first if first else self._later).decode(run) if run else ""
        return text

    def _roles(self) -> dict[str, str]:
        """The model's own special pieces; an id of -1 means that it has none."""
        ids = {"bos_token": self._first.bos_id(), "eos_token": self._first.eos_id(),
               "unk_token": self._first.unk_id(), "pad_token": self._first.pad_id()}  # fmt: skip
        return {name: self._first.id_to_piece(i) for name, i in ids.items() if i >= 0}

    def _added_tokens(self, config: TokenizerConfig) -> list[AddedToken]:
        """Control pieces, the named special tokens that are pieces, and the config's added tokens, one per id."""
        pieces = {i: self._first.id_to_piece(i) for i in range(self._num_pieces) if self._first.is_control(i)}
        for text in config.special_tokens.values():
            found = self._first.piece_to_id(text)
            if self._first.id_to_piece(found) == text:
                pieces[found] = text
        added = {i: AddedToken(i, text, special=True) for i, text in pieces.items()}
        return list((added | {token.id: token for token in config.added_tokens}).values())

    def _ids_to_add(self, config: TokenizerConfig, switch: str, role: str, default: bool) -> tuple[int, ...]:
        text = self.special_tokens.get(role)
        token = None if text is None else self.token_id(text)
        if not config.values.get(switch, default):
            return ()
        if token is None and config.values.get(switch):
            raise ModelLoadError(f"tokenizer_config.json sets {switch}, but the vocabulary has no {role} ({text!r})")
        return () if token is None else (token,)


class TransformersCodec:
    """A tokenizer that only transformers can read and that has no `tokenizers` twin (ByT5's bytes, for one)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_tokens: Mapping[str, str] = dict(tokenizer.special_tokens_map)
        self._id_of: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(self._id_of.values(), default=-1) + 1
        self.special_ids = frozenset(tokenizer.all_special_ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def token_id(self, text: str) -> int | None:
        return self._id_of.get(text)

    def token_bytes(self) -> None:
        return None


def _pattern(token: AddedToken) -> str:
    """One group that matches the token, with the white space that it swallows outside the group."""
    before, after = (r"\s*" if swallows else "" for swallows in (token.lstrip, token.rstrip))
    return f"{before}({re.escape(token.content)}){after}"
