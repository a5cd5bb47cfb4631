"""Chat messages to a prompt, by the model's own Jinja template, as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cortexstream.errors import InvalidRequestError, ModelLoadError
from cortexstream.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names a message's reasoning goes by, preferred first


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **template_kwargs: Any,
) -> str:
    """The prompt text for a conversation; encode it with add_special_tokens=False, the template writes them itself.

    `chat_template` is Jinja source or the name of one of the model's templates; None takes the model's "default", or
    "tool_use" if there are tools and the model has one. `template_kwargs` become variables of the template.

    Raises InvalidRequestError for messages that are not {"role", "content"} objects, for what the template refuses,
    and if the model has no template; ModelLoadError if the model's template is not valid Jinja.
    """
    import jinja2

    conversation = _conversation(messages)
    template = _template(tokenizer, chat_template, tools)
    variables: dict[str, Any] = {
        "documents": None,
        **tokenizer.special_tokens,
        **_plain("template_kwargs", template_kwargs),
    }
    tool_list = None if tools is None else _tools(tools)
    try:
        return template.render(
            messages=conversation, tools=tool_list, add_generation_prompt=add_generation_prompt, **variables
        )
    except jinja2.TemplateError as error:
        raise InvalidRequestError("messages", f"were refused by the chat template: {error}") from error
    except Exception as error:  # a template is foreign code: what it does not check, it trips over
        reason = f"{type(error).__name__}: {error}"
        raise InvalidRequestError("messages", f"do not suit the chat template, which failed with {reason}") from error


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """Compile in a sandbox with the settings, filters and globals of transformers' `chat_template_utils`.

    Raises jinja2.TemplateSyntaxError.
    """
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from cortexstream.text.chat_extension import Generation, SafeDict, SafeNamespace

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=SafeDict(), namespace=SafeNamespace
    )
    return environment.from_string(source)


def _template(tokenizer: Tokenizer, wanted: str | None, tools: Sequence[Mapping[str, Any]] | None) -> Template:
    import jinja2

    named = tokenizer.chat_templates
    usual = "tool_use" if tools is not None and "tool_use" in named else "default"
    source = named.get(usual) if wanted is None else named.get(wanted, wanted)
    if source is None and named:
        raise InvalidRequestError("chat_template", f"must be named: the model has {', '.join(sorted(named))}")
    if source is None:
        raise InvalidRequestError(
            "messages", "the model has no chat template; give chat_template, or use a text prompt"
        )
    try:
        return compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        reason = f"is not valid Jinja, line {error.lineno}: {error.message}"
        if wanted is not None:
            raise InvalidRequestError("chat_template", reason) from error
        raise ModelLoadError(f"the model's chat template {reason}; give another with chat_template") from error


def _conversation(messages: Any) -> list[dict[str, Any]]:
    """Checked messages as plain data. Keys with None are left out, as templates expect it."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages", f"is of type {type(messages).__name__}; must be a list of messages")
    if not messages:
        raise InvalidRequestError("messages", "is empty; a conversation needs at least one message")
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError("messages", f"has a {type(message).__name__} as message {number}; must be an object")
    plain = {key: value for key, value in _plain("messages", message).items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise InvalidRequestError("messages", f"has no role in message {number}; give one, such as user")
    if "content" not in plain and "tool_calls" not in plain:
        raise InvalidRequestError("messages", f"has no content in message {number} (role {plain['role']})")
    reasoning = next((plain[name] for name in REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _tools(tools: Any) -> list[Any]:
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequestError("tools", f"is of type {type(tools).__name__}; must be a list of JSON schemas")
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidRequestError("tools", "has an item that is not an object; every tool is a JSON schema")
    return [_plain("tools", tool) for tool in tools]


def _plain(field: str, value: Any) -> Any:
    """A copy made of JSON types alone, so that a template never holds an object with methods of its own."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(field, key): _plain(field, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(field, item) for item in value]
    raise InvalidRequestError(field, f"has a value of type {type(value).__name__}; only JSON types can be rendered")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
