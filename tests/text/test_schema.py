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
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1e-300}, {"multipleOf": 1e-16}, {"maximum": 1e16},
    {"properties": {"enum": {"anyOf": [{"type": "null"}, {"enum": [-(2**60)]}]}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", LONG, ids=json.dumps)
def test_p14_numbers_that_would_lose_digits_are_refused(tiny: Kit, schema: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"response_format: .* too long a number; at most 15 digits"):
        tiny.compile(response_format=form(schema))


def test_p14_numbers_of_15_digits_come_out_as_they_are(tiny: Kit) -> None:
    rng = random.Random(3)
    for _ in range(60):
        digits = rng.randint(1, 15)
        number = Decimal(rng.choice([-1, 1]) * rng.randrange(10 ** (digits - 1), 10**digits))
        literal = f"{number.scaleb(rng.randint(-15, 15 - digits)):f}"
        value = json.loads(literal)
        for text in texts(tiny, {"enum": [value, "x"]}, 3):
            assert json.loads(text) in (value, "x"), literal


def test_p14_a_whole_number_that_is_excluded(tiny: Kit) -> None:
    """Refused where the library would write it; enforced elsewhere."""
    for low, high in ((0, 0.5), (274, 274.00018), (-0.5, 0), (-3, -2.5), (2.5, 3)):
        for lower in ("minimum", "exclusiveMinimum"):
            for upper in ("maximum", "exclusiveMaximum"):
                schema: dict[str, Any] = {"type": "number", lower: low, upper: high}
                excluded = [schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")]
                if any(isinstance(bound, int) for bound in excluded):
                    with pytest.raises(InvalidRequestError, match="cannot be enforced where the other bound is less"):
                        tiny.compile(response_format=form({"items": schema}))
                else:
                    for text in texts(tiny, schema, 5):
                        judge(schema, text)
    others: list[dict[str, Any]] = [
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, {"type": "number", "exclusiveMinimum": 7},
        {"type": "number", "exclusiveMinimum": 0.25, "maximum": 0.5}, {"type": "integer", "exclusiveMinimum": 2},
    ]  # fmt: skip
    for schema in others:
        for text in texts(tiny, schema, 20):
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
    schema = {
        "enum": ["[a]", 5], "const": {"pattern": "[a]"}, "default": {"pattern": "[a]"}, "title": "[a]",
        "properties": {"pattern": {"pattern": "[a]"}, "const": {"items": {"pattern": "[a]"}}},
        "patternProperties": {"[a]": True}, "$defs": {"[a]": {"anyOf": [{"pattern": "[a]"}]}}, "pattern": 5,
    }  # fmt: skip
    wrapped = r"[[a]&&[^\x00]]"
    assert json.loads(enforceable(json.dumps(schema))) == {
        **schema,
        "properties": {"pattern": {"pattern": wrapped}, "const": {"items": {"pattern": wrapped}}},
        "patternProperties": {wrapped: True}, "$defs": {"[a]": {"anyOf": [{"pattern": wrapped}]}},
    }  # fmt: skip
