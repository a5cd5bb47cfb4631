"""A JSON schema as llguidance can enforce it: what it would get wrong is put right, or refused.

Checked against llguidance 1.9.1, from the outside:

* Numbers are float64 to it, written with at most 17 digits. Those that are not the same then are refused.
* A whole number that a bound excludes is written where the other bound lies less than 1 behind it. Such a bound is
  moved by one in the 15th digit, so that no number of so many digits lies between.
* Where a pattern's class holds every control character, a quote or a backslash is written for one. NUL is taken out of
  all classes: JSON could not have it without \\u, which the outputs do not use.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

DIGITS = 15  # of a decimal number that float64 keeps
EXACT = 2**53  # whole numbers that float64 keeps
LARGEST = 2**63 - 1  # a usual bound, which the library holds to
DATA = ("default", "examples")  # keywords that ask for nothing
VALUES = ("const", "enum")
EXCLUDED = {"exclusiveMinimum": 1, "exclusiveMaximum": -1}  # and where numbers may lie
BOUNDS = ("minimum", "maximum", "multipleOf", *EXCLUDED)
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name -> schema
WITHOUT_NUL = r"&&[^\x00]]"
CATEGORY = re.compile(r"\\[pP](?:\{[^}]*\}|[A-Za-z])")
NUL = ("\x00", r"\0", r"\x00", r"\u0000", r"\x{0")


def enforceable(text: str) -> str:
    """The schema's JSON, changed so that what llguidance accepts satisfies `text`. Raises ValueError with a reason."""
    return json.dumps(_schema(json.loads(text)))


def _schema(node: Any) -> Any:
    if isinstance(node, list):
        return [_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    whole = node.get("type") == "integer"
    return {keyword: _value(keyword, value, whole) for keyword, value in node.items()}


def _value(keyword: str, value: Any, whole: bool) -> Any:
    """What a keyword is to have, in a schema of whole numbers or of any."""
    if keyword in DATA:
        return value
    if keyword in VALUES:
        _check_numbers(value)
        return value
    if keyword in BOUNDS and isinstance(value, (int, float)):
        if value != LARGEST:
            _check_numbers(value)
        return value if whole or keyword not in EXCLUDED else _moved(value, EXCLUDED[keyword])
    if keyword == "pattern" and isinstance(value, str):
        return without_nul(value)
    if keyword in NAMED and isinstance(value, dict):
        rename = without_nul if keyword == "patternProperties" else str
        return {rename(name): _schema(schema) for name, schema in value.items()}
    return _schema(value)


def _check_numbers(value: Any) -> None:
    """Raise ValueError for a number, somewhere in the value, that would not be written as it is."""
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item)
    elif isinstance(value, (int, float)) and abs(value) > EXACT * isinstance(value, int):
        if len(Decimal(repr(value)).normalize().as_tuple().digits) > DIGITS:
            raise ValueError(f"{str(value)[:40]} has too many digits; at most {DIGITS} can be enforced")


def _moved(bound: float, step: int) -> float:
    """A bound that is excluded, if it is a whole number, moved by one in the 15th digit."""
    if bound != int(bound):
        return bound
    digits = len(str(abs(int(bound)))) if bound else 0
    return float(bound) if digits >= DIGITS else float(Decimal(int(bound)) + Decimal(step).scaleb(digits - DIGITS))


def without_nul(pattern: str) -> str:
    """A regular expression whose classes have lost the character NUL. Raises ValueError for one outside of classes."""
    parts, place = [], 0
    while place < len(pattern):
        category = CATEGORY.match(pattern, place)
        end = category.end() if category else _end_of_item(pattern, place)
        item = pattern[place:end]
        if pattern.startswith(NUL, place):
            raise ValueError("the pattern has NUL outside of a class, which JSON is not written with here")
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
