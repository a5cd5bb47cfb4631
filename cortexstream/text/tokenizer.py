"""A model's tokenizer, found in its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from cortexstream.errors import InvalidRequestError, ModelLoadError
from cortexstream.text.codec import Codec, SentencePieceCodec, TokenizersCodec, TransformersCodec
from cortexstream.text.tokenizer_config import TokenizerConfig


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads.

    Special token ids come from the model's files; None where the model has no such token.
    """

    def __init__(self, codec: Codec, config: TokenizerConfig) -> None:
        self._codec = codec
        self._chat_templates = config.chat_templates

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a model folder: tokenizer.json, else tokenizer.model, else whatever transformers can make
        of tokenizer_config.json if it is installed.

        Raises ModelLoadError when there is none, or when a file is broken (naming it and the reason).
        """
        folder = Path(folder)
        config = TokenizerConfig.from_folder(folder)
        if (folder / "tokenizer.json").is_file():
            codec: Codec = _read_tokenizer_json(folder / "tokenizer.json", config)
        elif (folder / "tokenizer.model").is_file():
            codec = _read_sentencepiece(folder / "tokenizer.model", config)
        elif (folder / "tokenizer_config.json").is_file():
            codec = _ask_transformers(folder, config)
        else:
            raise ModelLoadError(
                f"{folder} has no tokenizer: tokenizer.json, tokenizer.model and tokenizer_config.json were looked "
                "for; add one of them, or set skip_tokenizer_init=True and give token ids"
            )
        return cls(codec, config)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; the model's own vocabulary may be padded beyond it."""
        return self._codec.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """Begin of sequence."""
        return self._id_of_role("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """End of sequence. What ends a completion is the model's set of ids, which may hold more than this one."""
        return self._id_of_role("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Padding."""
        return self._id_of_role("pad_token")

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Role ("bos_token", "eos_token", ...) to token text; chat templates see these as variables."""
        return self._codec.special_tokens

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the default chat template."""
        return self._chat_templates.get("default")

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Jinja sources by name; most models have "default" alone, some add "tool_use"."""
        return self._chat_templates

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens spelt out in the text become their ids, as templates need it.

        `add_special_tokens` puts BOS before (and EOS after) as the model's files say. Raises InvalidRequestError for
        text that is not valid Unicode.
        """
        if not isinstance(text, str):
            raise InvalidRequestError("prompt", f"is of type {type(text).__name__}; must be text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise InvalidRequestError("prompt", f"has half a surrogate pair ({found}); give valid Unicode") from error
        return self._codec.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids past the vocabulary (padding of the model's embedding) have no text.

        Bytes that are not UTF-8 become U+FFFD. Raises InvalidRequestError for a negative id.
        """
        ids = list(ids)
        if ids and min(ids) < 0:
            raise InvalidRequestError("token_ids", f"has {min(ids)}; token ids are at least 0")
        return self._codec.decode([token for token in ids if self.writes(token, skip_special_tokens)])

    def token_bytes(self) -> list[bytes | None] | None:
        """What each id adds to a text that has begun; None for a special token or an id without one.

        At the very start of a text the space before a word may be dropped (see `Detokenizer`). None in place of the
        list: this kind of tokenizer has tokens whose text depends on their neighbours, or does not tell their bytes.
        """
        return self._codec.token_bytes()

    def writes(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether a token has a part in decoded text: it is in the vocabulary and is not skipped as special."""
        skipped = skip_special_tokens and token_id in self._codec.special_ids
        return 0 <= token_id < self._codec.vocab_size and not skipped

    def _id_of_role(self, role: str) -> int | None:
        text = self._codec.special_tokens.get(role)
        return None if text is None else self._codec.token_id(text)


def _read_tokenizer_json(path: Path, config: TokenizerConfig) -> TokenizersCodec:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelLoadError(f"{path} cannot be read: {error}; download or copy it again") from error
    return TokenizersCodec(tokenizer, config)


def _read_sentencepiece(path: Path, config: TokenizerConfig) -> SentencePieceCodec:
    try:
        return SentencePieceCodec(path.read_bytes(), config)
    except (OSError, RuntimeError) as error:
        raise ModelLoadError(f"{path} is not a sentencepiece model: {error}; download or copy it again") from error


def _ask_transformers(folder: Path, config: TokenizerConfig) -> Codec:
    """For vocab.txt, vocab.json + merges.txt, or no vocabulary at all. Code from the folder is never run."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModelLoadError(
            f"{folder} has a tokenizer_config.json, but neither tokenizer.json nor tokenizer.model; install "
            "transformers to read it, or set skip_tokenizer_init=True and give token ids"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any file in the folder may be at fault, each in its own way
        reason = " ".join(str(error).split())
        raise ModelLoadError(
            f"{folder} has neither tokenizer.json nor tokenizer.model, and transformers cannot make a tokenizer from "
            f"its tokenizer_config.json: {reason}; or set skip_tokenizer_init=True and give token ids"
        ) from error
    codec: Codec = TransformersCodec(tokenizer)
    if tokenizer.is_fast:
        codec = TokenizersCodec(tokenizer.backend_tokenizer, config)
        codec.special_tokens = dict(tokenizer.special_tokens_map)
    if codec.vocab_size <= len(codec.special_ids):  # without its vocabulary files transformers makes an empty tokenizer
        raise ModelLoadError(
            f"{folder} has no vocabulary: tokenizer.json, tokenizer.model and the files of its tokenizer class "
            f"({type(tokenizer).__name__}) were looked for; add them, or set skip_tokenizer_init=True"
        )
    return codec
