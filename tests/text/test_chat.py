"""Chat templates render as transformers renders them, and what is wrong with a conversation is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cortexstream.errors import InvalidRequestError, ModelLoadError
from cortexstream.text.chat import render_chat
from cortexstream.text.tokenizer import Tokenizer
from tests.conftest import require

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
  {% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
  {% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""

TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}# Tools
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n" + (tools | tojson(indent=2, sort_keys=true)) + "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.multi_step and message.role == "user" %}
        {%- set ns.multi_step = false %}{%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- ns.last }}
{%- for message in messages %}
    {{- message.role + ':' }}
    {%- if message.content is string %}{{- message.content }}{%- endif %}
    {%- if message.reasoning_content is defined %}<think>{{- message.reasoning_content }}</think>{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function.arguments | tojson) + '</tool_call>' }}
    {%- endfor %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{%- endif %}"""

LOOPS = """{%- for message in messages %}
{%- if message.role == 'system' %}{% continue %}{% endif %}
{%- if message.content == 'stop' %}{% break %}{% endif %}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% else %}
{%- set pair = dict(role=message.role, text=message.content) %}
{{ pair.items() | list }}
{%- endif %}
{%- endfor %}{{ documents is defined }}{{ bos_token }}{{ pad_token is defined }}"""

CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": " What is <b>1 & 2</b>? \n"},
    {"role": "assistant", "content": "Drei, natürlich 🎉."},
    {"role": "user", "content": "stop"},
]
SYSTEM: list[dict[str, Any]] = [{"role": "system", "content": "Be 'brief'.\n"}, *CONVERSATION]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?", "name": None},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"city": "Zürich", "n": (1, 2.5)}}}],
    },
    {"role": "tool", "content": "<sunny>"},
]
TOOL_LIST: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "w", "description": "Wetter für <city>", "parameters": {"z": 1, "a": None}},
    }
]


@pytest.fixture(scope="session")
def tokenizer(folders: dict[str, Path]) -> Tokenizer:
    """Has bos, eos and pad tokens, and no chat template."""
    return Tokenizer.from_folder(folders["byte_level"])


def refused(tokenizer: Tokenizer, messages: Any, **options: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        render_chat(tokenizer, messages, **options)
    return caught.value


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    ("template", "messages", "options"),
    [
        (CHATML, CONVERSATION, {}),
        (CHATML, SYSTEM, {}),
        (LLAMA3, SYSTEM, {}),
        (LLAMA3, CONVERSATION, {"date_string": "1 Jan 2030", "bos_token": "<other>"}),
        (MISTRAL, CONVERSATION, {}),
        (TOOLS, CALLS, {"tools": TOOL_LIST}),
        (TOOLS, CALLS, {"tools": [], "enable_thinking": False}),
        (LOOPS, SYSTEM, {}),
        (LOOPS, CALLS[:1], {}),
    ],
)
def test_renders_as_transformers(
    folders: dict[str, Path],
    tokenizer: Tokenizer,
    template: str,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    prompt: bool,
) -> None:
    judge = require("transformers").PreTrainedTokenizerFast.from_pretrained(folders["byte_level"])
    expected = judge.apply_chat_template(
        messages, tokenize=False, chat_template=template, add_generation_prompt=prompt, **options
    )
    rendered = render_chat(tokenizer, messages, chat_template=template, add_generation_prompt=prompt, **options)
    assert rendered == expected
    assert len(rendered) > 20


def test_the_embedded_template(folders: dict[str, Path]) -> None:
    for kind in ("tiny_json", "tiny_model"):
        tokenizer = Tokenizer.from_folder(folders[kind])
        assert render_chat(tokenizer, [{"role": "user", "content": "hi"}]) == "<s><|user|>hi<|end|><|assistant|>"
        text = render_chat(tokenizer, CONVERSATION[:2], add_generation_prompt=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert ids.count(1) == 1


def test_tojson_does_not_escape_html_or_unicode(tokenizer: Tokenizer) -> None:
    text = render_chat(tokenizer, CONVERSATION, chat_template="{{ messages[0] | tojson }}{{ 'é' | tojson }}")
    assert "<b>1 & 2</b>" in text and text.endswith('"é"')


def with_templates(folders: dict[str, Path], folder: Path, config: Any = None, **files: str) -> Tokenizer:
    shutil.copy(folders["byte_level"] / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({} if config is None else {"chat_template": config}))
    for name, text in files.items():
        path = folder / (f"chat_templates/{name}.jinja" if name != "chat_template" else "chat_template.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Tokenizer.from_folder(folder)


def test_named_templates(folders: dict[str, Path], tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T"},
        {"name": "rag", "template": "R"},
    ]
    tokenizer = with_templates(folders, tmp_path, named)
    assert tokenizer.chat_template == "D"
    assert render_chat(tokenizer, CONVERSATION) == "D"
    assert render_chat(tokenizer, CONVERSATION, tools=TOOL_LIST) == "T"
    assert render_chat(tokenizer, CONVERSATION, chat_template="rag") == "R"
    judge = require("transformers").PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert judge.apply_chat_template(CONVERSATION, tokenize=False, tools=TOOL_LIST) == "T"


def test_template_files_come_before_the_config(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = with_templates(folders, tmp_path, "config", chat_template="file", rag="R")
    assert tokenizer.chat_template == "file"
    assert render_chat(tokenizer, CONVERSATION, chat_template="rag") == "R"


def test_named_templates_without_a_default_must_be_chosen(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = with_templates(folders, tmp_path, [{"name": "rag", "template": "R"}])
    assert tokenizer.chat_template is None
    assert str(refused(tokenizer, CONVERSATION)) == "chat_template: must be named: the model has rag"


def test_a_model_without_a_template(tokenizer: Tokenizer) -> None:
    error = refused(tokenizer, CONVERSATION)
    assert error.field == "messages" and "the model has no chat template; " in str(error)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "is empty"),
        ("hello", "is of type str"),
        ({"role": "user", "content": "x"}, "is of type dict"),
        (["hello"], "has a str as message 0"),
        ([{"content": "x"}], "has no role in message 0"),
        ([{"role": 3, "content": "x"}], "has no role in message 0"),
        ([CONVERSATION[0], {"role": "user"}], r"has no content in message 1 \(role user\)"),
        ([{"role": "user", "content": None}], "has no content in message 0"),
        ([{"role": "user", "content": b"x"}], "has a value of type bytes"),
    ],
)
def test_messages_that_are_none(tokenizer: Tokenizer, messages: Any, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^messages: {said}"):
        render_chat(tokenizer, messages, chat_template=CHATML)


@pytest.mark.parametrize("tools", ["w", {"name": "w"}, [print], ["w"]])
def test_tools_that_are_none(tokenizer: Tokenizer, tools: Any) -> None:
    assert refused(tokenizer, CONVERSATION, chat_template=TOOLS, tools=tools).field == "tools"


def test_what_the_template_refuses_is_the_callers_fault(tokenizer: Tokenizer) -> None:
    error = refused(tokenizer, [CONVERSATION[1]], chat_template=MISTRAL)
    assert error.field == "messages" and "Conversation roles must alternate user/assistant" in str(error)


def test_what_the_template_trips_over_is_said(tokenizer: Tokenizer) -> None:
    error = refused(tokenizer, [{"role": "user", "content": ["a", "list"]}], chat_template=CHATML)
    assert error.field == "messages" and "TypeError" in str(error)
    error = refused(tokenizer, CONVERSATION, chat_template="{{ messages[0].no.such }}")
    assert error.field == "messages" and "no" in str(error)


def test_a_template_that_is_not_jinja(folders: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    error = refused(tokenizer, CONVERSATION, chat_template="a\n{% if %}")
    assert str(error).startswith("chat_template: is not valid Jinja, line 2")
    with pytest.raises(ModelLoadError, match="the model's chat template is not valid Jinja, line 1"):
        render_chat(with_templates(folders, tmp_path, "{% nonsense %}"), CONVERSATION)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ dict.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__.keys() }}",
        "{{ dict.update(messages[0], role='system') }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(tokenizer: Tokenizer, attack: str) -> None:
    assert refused(tokenizer, CONVERSATION, chat_template=attack).field == "messages"


def test_the_callers_messages_are_not_changed(tokenizer: Tokenizer) -> None:
    class Role(str):
        def __str__(self) -> str:
            return "shown by the subclass"

    message: Mapping[str, Any] = {"role": Role("user"), "content": "x", "name": None, "thinking": "t"}
    before = dict(message)
    template = "{{ messages[0] | tojson }}{{ messages[0].role }}"
    text = render_chat(tokenizer, [message], chat_template=template)
    assert message == before
    assert text == '{"thinking": "t", "role": "user", "content": "x", "reasoning_content": "t"}user'
