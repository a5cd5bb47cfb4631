"""What a model folder says about its tokenizer: tokenizer_config.json and the small files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from cortexstream.errors import ModelLoadError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class AddedToken(NamedTuple):
    """A token that was added after training; text is split at it before anything else is encoded.

    `lstrip`, `rstrip`: it swallows the white space before, after it.
    """

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Special tokens by their role, added tokens, and chat templates by name ("default" is the usual one)."""

    values: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # tokenizer_config.json
    special_tokens: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # role -> token
    added_tokens: tuple[AddedToken, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def from_folder(cls, folder: Path) -> TokenizerConfig:
        """Every file is optional; one that is there and broken is a ModelLoadError."""
        path = folder / "tokenizer_config.json"
        values = read_json_object(path)
        special = {**_special_tokens(read_json_object(folder / "special_tokens_map.json")), **_special_tokens(values)}
        try:
            added = _added_tokens(values, read_json_object(folder / "added_tokens.json"), frozenset(special.values()))
            templates = _template_files(folder) or _named_templates(values.get("chat_template"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelLoadError(f"{path} cannot be used: {type(error).__name__}: {error}") from error
        return cls(values, special, added, templates)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} if there is no such file. Raises ModelLoadError naming the file and the reason."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}; download or copy it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a {type(value).__name__}; it must be a JSON object")
    return value


def _special_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """Role -> token text. A token is a string or an object with `content`; empty ones mean "none"."""
    found = {}
    for name in SPECIAL_NAMES:
        value = values.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content:
            found[name] = content
    return found


def _added_tokens(
    values: Mapping[str, Any], legacy: Mapping[str, Any], named: frozenset[str]
) -> tuple[AddedToken, ...]:
    """From `added_tokens_decoder` (id -> description), else from the older added_tokens.json (text -> id)."""
    described = values.get("added_tokens_decoder")
    if described:
        return tuple(
            AddedToken(int(i), t["content"], t.get("special", False), t.get("lstrip", False), t.get("rstrip", False))
            for i, t in described.items()
        )
    extra = values.get("additional_special_tokens") or []
    special = named | {t["content"] if isinstance(t, dict) else t for t in extra}
    return tuple(AddedToken(int(i), content, content in special) for content, i in legacy.items())


def _template_files(folder: Path) -> dict[str, str]:
    """chat_template.jinja and chat_templates/NAME.jinja; as in transformers, they replace tokenizer_config.json's."""
    files = {path.stem: path for path in sorted((folder / "chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"a chat template in {folder} cannot be read: {error}") from error


def _named_templates(value: Any) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json: a string, or a list of {"name", "template"}."""
    if value is None:
        return {}
    templates = {"default": value} if isinstance(value, str) else {t["name"]: t["template"] for t in value}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise TypeError("chat_template must be a string or a list of named strings")
    return templates
