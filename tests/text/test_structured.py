"""What a request may ask of its output's form (P14): which source it becomes, and what is refused before compiling."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cortexstream.errors import InvalidRequestError
from cortexstream.structured import (
    MAX_BYTES,
    MAX_CHOICES,
    MAX_DEPTH,
    MAX_REGEX_BYTES,
    GrammarSource,
    grammar_source,
)

SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"enum": ["ü", None, 1.5, True]}}}
TEXT = '{"type":"object","properties":{"z":{"type":"integer"},"a":{"enum":["ü",null,1.5,true]}}}'


class Model:
    """As pydantic's classes are."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def wrapped(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "description": "y", "strict": True, "schema": SCHEMA}},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_schema", "name": "x", "strict": False, "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"strict": None, "schema": SCHEMA}},
        json.dumps(SCHEMA, indent=2),
        Model,
    ],
)
def test_p14_every_spelling_of_a_schema_is_one_source(given: Any) -> None:
    source = grammar_source(response_format=given)
    assert source == GrammarSource("json_schema", TEXT)
    assert source.field == "response_format"
    assert len({source, grammar_source(response_format=wrapped(SCHEMA))}) == 1


def test_p14_the_other_forms() -> None:
    assert grammar_source() is None
    assert grammar_source(response_format={"type": "text"}) is None
    assert grammar_source(response_format={"type": "json_object"}) == GrammarSource("json_object", "")
    assert grammar_source(regex="a+") == GrammarSource("regex", "a+")
    assert grammar_source(grammar="start: A") == GrammarSource("grammar", "start: A")
    source = grammar_source(choice=("ja", "né"))
    assert source is not None and (source.kind, json.loads(source.text), source.field) == (
        "choice",
        ["ja", "né"],
        "choice",
    )


def test_free_text_goes_with_one_other() -> None:
    assert grammar_source(response_format={"type": "text"}, regex="a") == GrammarSource("regex", "a")


def test_the_order_of_properties_is_kept_and_tuples_are_lists() -> None:
    first = grammar_source(response_format=wrapped({"properties": {"b": {}, "a": {}}, "required": ("b",)}))
    assert first is not None and first.text == '{"properties":{"b":{},"a":{}},"required":["b"]}'


@pytest.mark.parametrize("depth", [1, MAX_DEPTH])
def test_limits_are_allowed_themselves(depth: int) -> None:
    assert grammar_source(response_format=wrapped(nested(depth))) is not None
    assert grammar_source(choice=[str(i) for i in range(MAX_CHOICES)]) is not None
    assert grammar_source(choice=["x" * MAX_BYTES]) is not None
    assert grammar_source(regex="x" * MAX_REGEX_BYTES) is not None
    assert grammar_source(grammar="x" * MAX_BYTES) is not None
    assert grammar_source(response_format=wrapped({"const": "x" * (MAX_BYTES - 12)})) is not None


def itself() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


def doubled() -> dict[str, Any]:
    """2^30 values, in 30 objects."""
    schema: dict[str, Any] = {}
    for _ in range(30):
        schema = {"a": schema, "b": schema}
    return schema


FORMAT = "response_format"
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"regex": "a", "grammar": "b"}, "grammar", "at most one of"),
    ({"response_format": {"type": "json_object"}, "choice": ["a"]}, "choice", "response_format"),
    ({"regex": ""}, "regex", "at least one character"),
    ({"regex": 3}, "regex", "3; must be text"),
    ({"regex": b"a"}, "regex", "must be text"),
    ({"regex": "x" * (MAX_REGEX_BYTES + 1)}, "regex", f"{MAX_REGEX_BYTES + 1}"),
    ({"regex": "ü" * MAX_REGEX_BYTES}, "regex", f"{2 * MAX_REGEX_BYTES} bytes"),
    ({"regex": "a\ud800"}, "regex", "U+D800 at character 1"),
    ({"grammar": "x" * (MAX_BYTES + 1)}, "grammar", f"at most {MAX_BYTES}"),
    ({"grammar": ["start: A"]}, "grammar", "must be text"),
    ({"choice": "yes"}, "choice", "list of strings"),
    ({"choice": {"yes"}}, "choice", "list of strings"),
    ({"choice": 7}, "choice", "list of strings"),
    ({"choice": []}, "choice", "has 0 strings"),
    ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, "choice", f"1 to {MAX_CHOICES}"),
    ({"choice": ["a", ""]}, "choice", "empty"),
    ({"choice": ["a", None]}, "choice", "None"),
    ({"choice": ["a", "b", "a"]}, "choice", "'a' twice"),
    ({"choice": ["\udfff"]}, "choice", "U+DFFF"),
    ({"choice": ["x" * MAX_BYTES, "y"]}, "choice", f"{MAX_BYTES + 1} bytes"),
    ({FORMAT: 3}, FORMAT, "must be an object"),
    ({FORMAT: int}, FORMAT, "must be an object"),
    ({FORMAT: {}}, FORMAT, "type None"),
    ({FORMAT: SCHEMA}, FORMAT, "a schema itself goes into"),
    ({FORMAT: {"type": ["text"]}}, FORMAT, "must be one of"),
    ({FORMAT: {"type": "json_object", "schema": {}}}, FORMAT, "'schema' in json_object"),
    ({FORMAT: {"type": "json_schema"}}, FORMAT, "no schema"),
    ({FORMAT: {"type": "json_schema", "json_schema": {"name": "x"}}}, FORMAT, "no schema"),
    ({FORMAT: {"type": "json_schema", "json_schema": SCHEMA}}, FORMAT, "'type' in json_schema"),
    ({FORMAT: {"type": "json_schema", "json_schema": []}}, FORMAT, "json_schema []"),
    ({FORMAT: {"type": "json_schema", "json_schema": {"schema": {}}, "schema": {}}}, FORMAT, "'schema'"),
    ({FORMAT: {"type": "json_schema", "schema": {}, "strict": "yes"}}, FORMAT, "strict 'yes'"),
    ({FORMAT: {"type": "json_schema", "schema": {}, "name": 4}}, FORMAT, "name 4"),
    ({FORMAT: wrapped("{}")}, FORMAT, "of type Mapping"),
    ({FORMAT: wrapped(True)}, FORMAT, "schema True"),
    ({FORMAT: "{"}, FORMAT, "not a JSON schema"),
    ({FORMAT: "[" * 50_000}, FORMAT, "not a JSON schema"),
    ({FORMAT: "[]"}, FORMAT, "must be an object"),
    ({FORMAT: ""}, FORMAT, "at least one character"),
    ({FORMAT: wrapped(nested(MAX_DEPTH + 1))}, FORMAT, f"deeper than {MAX_DEPTH}"),
    ({FORMAT: wrapped(itself())}, FORMAT, f"deeper than {MAX_DEPTH}"),
    ({FORMAT: wrapped(doubled())}, FORMAT, f"limit of {MAX_BYTES}"),
    ({FORMAT: wrapped({"enum": [0] * 40_000})}, FORMAT, f"at most {MAX_BYTES}"),
    ({FORMAT: wrapped({"enum": [0] * 10**6})}, FORMAT, f"limit of {MAX_BYTES}"),
    ({FORMAT: wrapped({"const": "ü" * 40_000})}, FORMAT, f"at most {MAX_BYTES}"),
    ({FORMAT: wrapped({"const": float("nan")})}, FORMAT, "JSON cannot hold"),
    ({FORMAT: wrapped({"maximum": 10**5000})}, FORMAT, "JSON cannot hold"),
    ({FORMAT: wrapped({"const": "\ud800"})}, FORMAT, "U+D800"),
    ({FORMAT: wrapped({"enum": {1, 2}})}, FORMAT, "plain JSON"),
    ({FORMAT: wrapped({1: {}})}, FORMAT, "key 1"),
    ({FORMAT: wrapped({"pattern": "a?" * 5000})}, FORMAT, "pattern of 10000"),
    ({FORMAT: wrapped({"patternProperties": {"a?" * 5000: {}}})}, FORMAT, "key of 10000"),
]


@pytest.mark.parametrize(("given", "field", "word"), REFUSED)
def test_p14_what_cannot_be_is_refused_with_field_and_limit(given: dict[str, Any], field: str, word: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        grammar_source(**given)
    assert caught.value.field == field
    assert word in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "given, words",
    [
        ({"response_format": '{"type": "integer", "multipleOf": 99999999}'}, "response_format: has multiple"),
        ({"response_format": {"type": "json_schema", "schema": {"multipleOf": 10**400}}}, "response"),
        (
            {"response_format": '{"allOf": [{"multipleOf": 97}, {"multipleOf": 89}, {"multipleOf": 83}]}'},
            "response_format: has multipleOf with a product of 716539",
        ),
        ({"grammar": 'start: %json {"type": "integer", "multipleOf" : 300007}'}, "grammar: has multipleOf"),
        ({"grammar": "start: X\nX: " + " & ".join(["/a.*/"] * 10)}, "grammar: has 9 intersections"),
    ],
)  # fmt: skip
def test_p14_what_would_take_gigabytes_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        grammar_source(**given)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": '{"properties": {"a": {"multipleOf": 0.01}, "b": {"multipleOf": 5}}}'},
        {"grammar": 'start: "&" "&&" /[&]+&/ A\nA: /a/ & /a|b/'},
    ],
)  # fmt: skip
def test_p14_what_only_looks_costly_is_allowed(given: dict[str, Any]) -> None:
    assert grammar_source(**given) is not None
