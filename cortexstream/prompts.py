"""What counts as a prompt: text, token ids, or vLLM's prompt dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cortexstream.errors import InvalidRequestError
from cortexstream.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""

Prompts = Prompt | Sequence[Prompt]


def as_list(prompts: Any) -> list[Any]:
    """One prompt or several: a string, a mapping and a list of numbers are one; anything else is a list of prompts."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(
            "prompt", f"is of type {type(prompts).__name__}; give text, token ids or a list of them"
        )
    if prompts and not isinstance(prompts[0], (str, Mapping, Sequence)):
        return [prompts]
    return list(prompts)


def tokenize(prompt: Any, tokenizer: Tokenizer | None) -> tuple[str | None, tuple[int, ...]]:
    """(text or None, token ids) of one prompt; raises InvalidRequestError for anything that is not one."""
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if keys == {"prompt"} or keys == {"prompt", "prompt_token_ids"} or keys == {"prompt_token_ids"}:
            if "prompt_token_ids" in keys:
                return prompt.get("prompt"), _ids(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        else:
            raise InvalidRequestError(
                "prompt", f"has keys {sorted(map(str, keys))}; known are prompt, prompt_token_ids"
            )
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequestError("prompt", "is text, but no tokenizer is loaded; give token ids")
        return prompt, tuple(tokenizer.encode(prompt))
    return None, _ids(prompt)


def _ids(values: Any) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise InvalidRequestError("prompt_token_ids", f"is {type(values).__name__}; must be a list of whole numbers")
    ids = tuple(values)
    for value in ids:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise InvalidRequestError("prompt_token_ids", f"has {value!r}; every token id must be a whole number")
    return tuple(int(value.__index__()) for value in ids)
