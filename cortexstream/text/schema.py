"""A JSON schema as llguidance can enforce it: what it would get wrong is put right, or refused.

Checked against llguidance 1.9.1, from the outside:

* Numbers of more than 15 digits lose some; a whole number that a bound excludes is written where the other bound lies
  less than 1 behind it. Such schemas are refused.
* Where a pattern's class holds every control character, a quote or a backslash is written for one. NUL is taken out of
  all classes: JSON could not have it without \\u, which the outputs do not use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

DIGITS = 15  # of a decimal number that float64 keeps
DATA = ("const", "enum", "default", "examples")  # keywords whose values are no schemas
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name -> schema
WITHOUT_NUL = r"&&[^\x00]]"
CATEGORY = re.compile(r"\\[pP](?:\{[^}]*\}|[A-Za-z])")


def enforceable(text: str) -> str:
    """The schema's JSON, changed so that what llguidance accepts satisfies `text`. Raises ValueError with a reason."""
    schema = json.loads(text, parse_int=_number(int), parse_float=_number(float))
    return json.dumps(_schema(schema))


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(literal: str) -> Any:
        number = Decimal(literal)
        if number and (len(number.normalize().as_tuple().digits) > DIGITS or abs(number.adjusted()) > DIGITS):
            raise ValueError(f"{literal[:40]} is too long a number; at most {DIGITS} digits can be enforced")
        return kind(literal)

    return read


def _schema(node: Any) -> Any:
    if isinstance(node, list):
        return [_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    _check_bounds(node)
    return {keyword: _value(keyword, value) for keyword, value in node.items()}


def _value(keyword: str, value: Any) -> Any:
    if keyword in DATA:
        return value
    if keyword == "pattern" and isinstance(value, str):
        return without_nul(value)
    if keyword in NAMED and isinstance(value, dict):
        rename = without_nul if keyword == "patternProperties" else str
        return {rename(name): _schema(schema) for name, schema in value.items()}
    return _schema(value)


def _check_bounds(node: dict[str, Any]) -> None:
    """Raise ValueError for a whole number that is excluded and lies less than 1 from the other bound."""

    def bounds(*keywords: str) -> list[Any]:
        found = [node.get(keyword) for keyword in keywords]
        return [value for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)]

    low, high = bounds("minimum", "exclusiveMinimum"), bounds("maximum", "exclusiveMaximum")
    for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
        for excluded in bounds(keyword):
            if low and high and excluded == int(excluded) and min(high) - max(low) < 1:
                raise ValueError(
                    f"{keyword} {excluded} cannot be enforced where the other bound is less than 1 away; "
                    "use a bound that is included"
                )


def without_nul(pattern: str) -> str:
    """A regular expression whose classes have lost the character NUL."""
    parts, place = [], 0
    while place < len(pattern):
        category = CATEGORY.match(pattern, place)
        end = category.end() if category else _end_of_item(pattern, place)
        item = pattern[place:end]
        is_class = category or (item.startswith("[") and item.endswith("]"))
        parts.append(f"[{item}{WITHOUT_NUL}" if is_class else item)
        place = end
    return "".join(parts)


def _end_of_item(pattern: str, place: int) -> int:
    """Where the character, the escape or the class at `place` ends. A class that does not end is a character here:
    the compiler will say what is wrong."""
    if pattern[place] == "\\":
        return place + 2
    if pattern[place] != "[":
        return place + 1
    depth, at = 0, place
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
            at += pattern.startswith("^", at + 1)
            at += pattern.startswith("]", at + 1)  # the first one stands for itself
        elif pattern[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return place + 1
