"""What llguidance would get wrong of a schema is put right or refused (P14); jsonschema and re are the judges."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.errors import InvalidRequestError
from cortexstream.text.schema import enforceable, without_nul
from tests.text.schemas import Kit, judge


@pytest.fixture(scope="module")
def tiny(folders: dict[str, Path]) -> Kit:
    return Kit(folders["tiny_json"])


def texts(kit: Kit, schema: Any, count: int) -> list[str]:
    constraint, rng = kit.compile(response_format=form(schema)), np.random.default_rng(count)
    found = [kit.walker.complete(constraint, rng, 12, 200) for _ in range(count)]
    return [kit.walker.text(tokens) for tokens in found if tokens is not None]


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


LONG = [
    {"enum": [123456789.12345679]}, {"const": 9007199254740993}, {"const": {"a": [12345678901234567890]}},
    {"type": "integer", "minimum": 10**18 + 1, "maximum": 10**18 + 9}, {"minimum": 0.1234567890123456},
    {"properties": {"enum": {"anyOf": [{"type": "null"}, {"enum": [-(2**60)]}]}}},
    {"dependentSchemas": {"a": {"maximum": 2**63}}}, {"definitions": {"a": {"const": 2**53 + 2}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", LONG, ids=json.dumps)
def test_p14_numbers_that_would_lose_digits_are_refused(tiny: Kit, schema: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"response_format: .* has too many digits; at most 15 can be"):
        tiny.compile(response_format=form(schema))


def test_p14_numbers_that_are_kept_come_out_as_they_are(tiny: Kit) -> None:
    """Of 15 digits wherever the point is, and whole numbers up to 2**53."""
    rng = random.Random(3)
    for number in range(60):
        digits = rng.randint(1, 15)
        decimal = Decimal(rng.choice([-1, 1]) * rng.randrange(10 ** (digits - 1), 10**digits))
        literal = f"{decimal.scaleb(rng.randint(-15, 15 - digits)):f}"
        value = json.loads(literal) if number % 4 else rng.choice([-1, 1]) * (2**53 - number)
        for text in texts(tiny, {"enum": [value, "x"]}, 3):
            assert json.loads(text) in (value, "x"), literal


def test_p14_usual_bounds_and_remarks_are_taken(tiny: Kit) -> None:
    for schema in (
        {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1}, {"type": "array", "maxItems": 2**53 - 1},
        {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, {"type": "integer", "minimum": 10**16},
        {"type": "number", "default": 0.30000000000000004, "examples": [3.141592653589793, 10**40], "maximum": 3},
    ):  # fmt: skip
        for text in texts(tiny, schema, 5):
            judge(schema, text)


FLAT = [
    {"type": "number", lower: low, upper: high}
    for low, high in ((0, 0.5), (274, 274.00018), (-0.5, 0), (-3, -2.5), (2.5, 3), (0, 1), (123456, 123456.25))
    for lower in ("minimum", "exclusiveMinimum") for upper in ("maximum", "exclusiveMaximum")
]  # fmt: skip
APART: list[dict[str, Any]] = [
    {"$defs": {"a": {"maximum": 0.5}}, "type": "number", "exclusiveMinimum": 0, "allOf": [{"$ref": "#/$defs/a"}]},
    {"allOf": [{"type": "number", "exclusiveMinimum": 0}, {"maximum": 0.5}]},
    {"allOf": [{"exclusiveMinimum": 4}, {"maximum": 7}], "type": "integer"},
    {"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 5},
    {"type": "number", "exclusiveMinimum": -7},
    {"type": ["integer", "null"], "exclusiveMinimum": 0, "maximum": 3},
    {"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.5, "maximum": 2},
    {"type": "number", "exclusiveMinimum": 123456789012345, "maximum": 123456789012346},
]


@pytest.mark.parametrize("schema", [*FLAT, *APART], ids=json.dumps)
def test_p14_a_whole_number_that_is_excluded_is_not_written(tiny: Kit, schema: Any) -> None:
    found = texts(tiny, schema, 12)
    assert len(found) > 5
    for text in found:
        judge(schema, text)


PATTERNS = [
    r'^[^"\\]{1,4}$', r"^[^\x20-\x7e]$", r'^[^"]{2}$', r"^[a\x00-\x1f]{1,2}$", r"^[\x00-\x1f]$", r"^\[[^\]\\]+\]$",
    r"^[]x\x00-\x1f]{2}$", r"^[\s\S]{3}$", r"^([^\\]|\\n)[\^\]]$", r"^[^,;]+$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_p14_no_quote_is_written_for_a_control_character(tiny: Kit, pattern: str) -> None:
    schema = {
        "type": "object",
        "properties": {"pattern": {"type": "string", "pattern": pattern}},
        "required": ["pattern"],
    }
    found = [json.loads(text)["pattern"] for text in texts(tiny, schema, 60)]
    assert len(found) > 40
    for text in found:
        assert re.search(pattern, text), repr(text)


def test_p14_classes_lose_nul_and_nothing_else_is_changed() -> None:
    assert without_nul(r"a[^b]\]c") == r"a[[^b]&&[^\x00]]\]c"
    assert without_nul(r"[a[b]-]") == r"[[a[b]-]&&[^\x00]]"
    assert without_nul(r"\p{L}+\PN\\p") == r"[\p{L}&&[^\x00]]+[\PN&&[^\x00]]\\p"
    assert without_nul(r"\[x") == r"\[x" and without_nul("[x") == "[x" and without_nul("a\\") == "a\\"
    for nul in ("\x00", r"\x00", r"\0", r"\u0000", r"\x{00}"):
        with pytest.raises(ValueError, match="the pattern has NUL outside of a class"):
            without_nul(f"^({nul}|[b])$")
    assert without_nul(r"[^]a]\\0") == r"[[^]a]&&[^\x00]]\\0"
    schema = {
        "enum": ["[a]", 5], "const": {"pattern": "[a]"}, "default": {"pattern": "[a]"}, "title": "[a]",
        "examples": [{"pattern": "[a]"}],
        "properties": {"pattern": {"pattern": "[a]"}, "const": {"items": {"pattern": "[a]"}}},
        "patternProperties": {"[a]": True}, "dependentSchemas": {"[a]": {"pattern": "[a]"}},
        "definitions": {"[a]": {"pattern": "[a]"}}, "$defs": {"[a]": {"anyOf": [{"pattern": "[a]"}]}}, "pattern": 5,
    }  # fmt: skip
    wrapped = r"[[a]&&[^\x00]]"
    assert json.loads(enforceable(json.dumps(schema))) == {
        **schema,
        "properties": {"pattern": {"pattern": wrapped}, "const": {"items": {"pattern": wrapped}}},
        "patternProperties": {wrapped: True}, "dependentSchemas": {"[a]": {"pattern": wrapped}},
        "definitions": {"[a]": {"pattern": wrapped}}, "$defs": {"[a]": {"anyOf": [{"pattern": wrapped}]}},
    }  # fmt: skip
