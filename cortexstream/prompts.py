"""What counts as a prompt: text, token ids, or vLLM's prompt dictionaries."""

from __future__ import annotations

import operator
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
    if hasattr(prompts, "tolist"):  # an array of token ids, or a row of them per prompt
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(
            "prompt", f"is of type {type(prompts).__name__}; give text, token ids or a list of them"
        )
    if prompts and not isinstance(prompts[0], (str, Mapping, Sequence)) and not hasattr(prompts[0], "__iter__"):
        return [prompts]
    return list(prompts)


def tokenize(prompt: Any, tokenizer: Tokenizer | None) -> tuple[str | None, tuple[int, ...]]:
    """(text or None, token ids) of one prompt; raises InvalidRequestError for anything that is not one."""
    if isinstance(prompt, Mapping):
        unknown = sorted(str(key) for key in set(prompt) - {"prompt", "prompt_token_ids"})
        if unknown or not prompt:
            raise InvalidRequestError("prompt", f"has keys {unknown}; known are prompt, prompt_token_ids")
        text = prompt.get("prompt")
        if prompt.get("prompt_token_ids") is not None:
            if text is not None and not isinstance(text, str):
                raise InvalidRequestError("prompt", f"is {text!r} beside prompt_token_ids; must be text")
            return text, _ids(prompt["prompt_token_ids"])
        prompt = text
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequestError("prompt", "is text, but no tokenizer is loaded; give token ids")
        if not prompt:
            raise InvalidRequestError("prompt", "is empty; it needs at least one character")
        return prompt, tuple(tokenizer.encode(prompt))
    return None, _ids(prompt)


def _ids(values: Any) -> tuple[int, ...]:
    if isinstance(values, (str, bytes, bytearray)) or not hasattr(values, "__iter__"):
        raise InvalidRequestError("prompt_token_ids", f"is {type(values).__name__}; must be a list of whole numbers")
    ids = []
    for value in values:
        try:
            if isinstance(value, bool):
                raise TypeError
            ids.append(operator.index(value))
        except TypeError:
            shown = value if isinstance(value, (int, float, str, bool)) else type(value).__name__
            raise InvalidRequestError(
                "prompt_token_ids", f"has {shown!r}; every token id must be a whole number"
            ) from None
    return tuple(ids)
