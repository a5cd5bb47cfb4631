"""What a request asks of its output's form, checked before anything is compiled: four fields, one `GrammarSource`.

No grammar library is imported here; `cortexstream.text.grammar` turns a source into a constraint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple

from cortexstream.errors import InvalidRequestError, shown

MAX_BYTES = 64 * 1024  # of a schema, a grammar, or all choices, as UTF-8
MAX_REGEX_BYTES = 8 * 1024  # 64 KiB of "a?a?a?..." would take 7 s and 1.8 GB to compile; both grow with the square
MAX_DEPTH = 32  # of objects and arrays in a schema
MAX_CHOICES = 1024
MAX_MULTIPLE = 100_000  # the product of all `multipleOf`: an automaton has so many states; 99999999 took gigabytes
MAX_INTERSECTIONS = 8  # "&" in a Lark grammar: 23 of them took minutes and gigabytes
LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')  # of Lark: a string, a regular expression
MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([0-9.eE+-]+)')  # in a schema within a Lark grammar

Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
FIELDS = ("response_format", "regex", "choice", "grammar")
TYPES = ("text", "json_object", "json_schema")
_REGEX_LIMIT = f"at most {MAX_REGEX_BYTES} are allowed"
SCHEMA_KEYS = {"name": str, "description": str, "schema": Mapping, "strict": bool}


class GrammarSource(NamedTuple):
    """What to compile. Equal sources mean the same language; usable as a key."""

    kind: Kind
    text: str
    """json_schema: the schema as JSON, its properties in the caller's order; choice: a JSON list of strings;
    json_object: empty; else as given."""

    @property
    def field(self) -> str:
        """The sampling parameter that it came from."""
        return "response_format" if self.kind in ("json_schema", "json_object") else self.kind


def grammar_source(
    response_format: Mapping[str, Any] | str | type | None = None,
    regex: str | None = None,
    choice: Sequence[str] | None = None,
    grammar: str | None = None,
) -> GrammarSource | None:
    """The form that the output must have; None if it is free. At most one of the four may be given.

    `response_format`: OpenAI's {"type": "text"} (free), {"type": "json_object"} and {"type": "json_schema",
    "json_schema": {"schema": {...}}}, with `schema` in place of `json_schema` too; a schema as JSON text; or a class
    with a `model_json_schema()`, as pydantic's models have. `strict` changes nothing: every schema is enforced.
    `regex`: what the whole output must match. `choice`: strings, one of which is the output. `grammar`: Lark's syntax.

    Raises InvalidRequestError with the field, what was found and the limit. Whether a grammar compiles is seen later.
    """
    values = dict(zip(FIELDS, (response_format, regex, choice, grammar), strict=True))
    sources = {
        "response_format": _response_format(response_format),
        "regex": None if regex is None else GrammarSource("regex", _text("regex", regex, MAX_REGEX_BYTES)),
        "choice": None if choice is None else _choice(choice),
        "grammar": None if grammar is None else _lark(grammar),
    }
    given = [name for name, source in sources.items() if source is not None and values[name] is not None]
    if len(given) > 1:
        raise InvalidRequestError(given[1], f"was given with {given[0]}; give at most one of {', '.join(FIELDS)}")
    return sources[given[0]] if given else None


def _response_format(value: Any) -> GrammarSource | None:
    name = "response_format"
    if value is None:
        return None
    if isinstance(value, str):
        return _schema(_parsed(_text(name, value, MAX_BYTES)))
    if isinstance(value, type) and callable(getattr(value, "model_json_schema", None)):
        return _schema(value.model_json_schema())  # type: ignore[attr-defined]
    if not isinstance(value, Mapping):
        raise InvalidRequestError(name, f"is {shown(value)}; must be an object with a type, one of {', '.join(TYPES)}")
    kind = value.get("type")
    if kind not in TYPES:
        raise InvalidRequestError(
            name,
            f"has type {shown(kind)}; must be one of {', '.join(TYPES)} (a schema itself goes into "
            '{"type": "json_schema", "json_schema": {"schema": ...}})',
        )
    if kind == "json_schema":
        return _schema(_schema_of(value))
    _known(value, {"type"}, str(kind))
    return GrammarSource("json_object", "") if kind == "json_object" else None


def _schema_of(value: Mapping[str, Any]) -> Any:
    """The schema in {"type": "json_schema", ...}: under "json_schema", or beside the type."""
    holder, place = value, "json_schema"
    if "json_schema" in value:
        _known(value, {"type", "json_schema"}, place)
        holder = value["json_schema"]
        if not isinstance(holder, Mapping):
            raise InvalidRequestError("response_format", f"has json_schema {shown(holder)}; must be an object")
    _known(holder, {*SCHEMA_KEYS, "type"} if holder is value else set(SCHEMA_KEYS), place)
    for key, kind in SCHEMA_KEYS.items():
        found = holder.get(key)
        if found is not None and not isinstance(found, kind):
            raise InvalidRequestError("response_format", f"has {key} {shown(found)}; must be of type {kind.__name__}")
    if holder.get("schema") is None:
        raise InvalidRequestError("response_format", "has type json_schema and no schema; add it under json_schema")
    return holder["schema"]


def _schema(schema: Any) -> GrammarSource:
    if not isinstance(schema, Mapping):
        raise InvalidRequestError("response_format", f"has schema {shown(schema)}; must be an object")
    plain = _plain_json(schema)
    try:
        text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:  # NaN, infinity, a number of thousands of digits
        raise InvalidRequestError("response_format", f"has a schema that JSON cannot hold: {error}") from error
    return GrammarSource("json_schema", _text("response_format", text, MAX_BYTES))


def _plain_json(schema: Any) -> Any:
    """A copy in dicts and lists. Limits are checked on the way: a value may hold itself, or a part a million times."""
    top: list[Any] = [None]
    open_: list[tuple[Any, Any, Any, int]] = [(schema, top, 0, 1)]  # value, where its copy goes, under which key, depth
    num_values = 0
    multiples: set[Any] = set()
    while open_:
        value, holder, key, depth = open_.pop()
        num_values += 1
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            copy: Any = dict.fromkeys(value)
            items = value.items()
            _check_names(value)
            multiple = value.get("multipleOf")
            multiples |= {multiple} if isinstance(multiple, (int, float)) else set()
        elif isinstance(value, (list, tuple)):
            copy = [None] * len(value)
            items = enumerate(value)
        elif value is None or isinstance(value, (str, bool, int, float)):
            copy = value
        else:
            raise InvalidRequestError("response_format", f"has {shown(value)} in its schema; must be plain JSON")
        if isinstance(copy, (dict, list)) and depth > MAX_DEPTH:
            raise InvalidRequestError("response_format", f"is nested deeper than {MAX_DEPTH} objects and arrays")
        if num_values > MAX_BYTES or len(open_) > MAX_BYTES:  # every value is a byte at least
            raise InvalidRequestError("response_format", f"has a schema above the limit of {MAX_BYTES} bytes")
        holder[key] = copy
        open_ += [(inner, copy, name, depth + 1) for name, inner in items]
    _check_multiples("response_format", map(_written, multiples))
    return top[0]


def _written(number: int | float) -> str:
    """A number as text; of thousands of digits, which Python does not write, one that is above any limit."""
    return repr(number) if abs(number) < 2**63 else str(2**63)


def _lark(grammar: Any) -> GrammarSource:
    text = _text("grammar", grammar, MAX_BYTES)
    intersections = LITERAL.sub("", text).count("&")
    if intersections > MAX_INTERSECTIONS:
        raise InvalidRequestError(
            "grammar", f"has {intersections} intersections (&); at most {MAX_INTERSECTIONS} are allowed"
        )
    _check_multiples("grammar", set(MULTIPLE.findall(text)))
    return GrammarSource("grammar", text)


def _check_multiples(field: str, multiples: Iterable[str]) -> None:
    """Their digits count: 0.01 and 1000 are as cheap as 1."""
    product = 1
    for written in multiples:
        try:
            digits = Decimal(written).normalize().as_tuple().digits
        except InvalidOperation:  # no number: the compiler says so
            continue
        product *= max(1, int("".join(map(str, digits[:20]))))
    if product > MAX_MULTIPLE:
        raise InvalidRequestError(
            field,
            f"has multipleOf with a product of {product} (zeros at the end aside); at most {MAX_MULTIPLE} is allowed",
        )


def _check_names(value: Mapping[Any, Any]) -> None:
    """The keys of an object in a schema, and its regular expressions, which may be keys."""
    for key in value:
        if not isinstance(key, str):
            raise InvalidRequestError("response_format", f"has the key {shown(key)} in its schema; must be text")
        if len(key) > MAX_REGEX_BYTES:
            raise InvalidRequestError("response_format", f"has a key of {len(key)} characters; {_REGEX_LIMIT}")
    pattern = value.get("pattern")
    if isinstance(pattern, str) and len(pattern) > MAX_REGEX_BYTES:
        raise InvalidRequestError("response_format", f"has a pattern of {len(pattern)} characters; {_REGEX_LIMIT}")


def _choice(choice: Any) -> GrammarSource:
    if isinstance(choice, str) or not isinstance(choice, Sequence):
        raise InvalidRequestError("choice", f"is {shown(choice)}; must be a list of strings")
    if not 1 <= len(choice) <= MAX_CHOICES:
        raise InvalidRequestError("choice", f"has {len(choice)} strings; must have 1 to {MAX_CHOICES}")
    size = sum(len(_text("choice", text, MAX_BYTES).encode()) for text in choice)
    if size > MAX_BYTES:
        raise InvalidRequestError("choice", f"has {size} bytes in all; at most {MAX_BYTES} are allowed")
    twice = next((text for place, text in enumerate(choice) if text in set(choice[:place])), None)
    if twice is not None:
        raise InvalidRequestError("choice", f"has {shown(twice)} twice; all strings must differ")
    return GrammarSource("choice", json.dumps(list(choice)))


def _text(name: str, value: Any, limit: int) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(name, f"has {shown(value)}; must be text")
    if not value:
        raise InvalidRequestError(name, "has an empty text; must have at least one character")
    if len(value) > limit:  # before anything looks at all of it
        raise InvalidRequestError(name, f"has {len(value)} characters; at most {limit} bytes are allowed")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        found = f"U+{ord(value[error.start]):04X} at character {error.start}"
        raise InvalidRequestError(name, f"has half a surrogate pair ({found}); give valid Unicode") from error
    if size > limit:
        raise InvalidRequestError(name, f"has {size} bytes; at most {limit} are allowed")
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("response_format", f"is text that is not a JSON schema: {error}") from error


def _known(value: Mapping[str, Any], known: set[str], kind: str) -> None:
    unknown = [key for key in value if key not in known]
    if unknown:
        names = ", ".join(sorted(known))
        raise InvalidRequestError("response_format", f"has {shown(unknown[0])} in {kind}; known are {names}")
