"""Random JSON schemas, completions of random tokens under a constraint, and what both need of a tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jsonschema import Draft202012Validator

from cortexstream.constraint import Constraint, Mask
from cortexstream.errors import ConstraintError
from cortexstream.structured import GrammarSource, grammar_source
from cortexstream.text.detokenizer import Detokenizer
from cortexstream.text.grammar import Grammars
from cortexstream.text.tokenizer import Tokenizer

PADDING = 37  # ids of the model's vocabulary beyond the tokenizer's
NAMES = ["a", "name", "größe", "two words", 'q"uote', "back\\slash", "items", "日本", "x/y", "tab\t"]
PATTERNS = [
    "^[a-z]{2,5}$",
    "^ab+c$",
    r"^\d{3}-\d{2}$",
    "^(red|green|blue)$",
    "^$|}",
    r"^\w{1,3}@[a-z]{2}\.org$",
    "[^a-z]",
    "é|]",
]
CLOSING = (b'"', b"}", b"]", b'"}', b'"]', b"}}", b"]}")


def judge(schema: Any, text: str) -> None:
    """Raises unless `text` is JSON that the schema accepts. Numbers are compared as written, not as floats."""
    plain = json.loads(json.dumps(schema), parse_float=Decimal)
    Draft202012Validator.check_schema(json.loads(json.dumps(schema)))
    Draft202012Validator(plain).validate(json.loads(text, parse_float=Decimal))


def random_schema(rng: random.Random) -> dict[str, Any]:
    """An object or array with references to two definitions, one of which may hold itself."""
    defs = {"leaf": scalar(rng), "tree": {
        "type": "object",
        "properties": {"value": scalar(rng), "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
        "required": ["value"], "additionalProperties": False,
    }}  # fmt: skip
    return {**(record(rng, 3) if rng.random() < 0.8 else array(rng, 3)), "$defs": defs}


def part(rng: random.Random, depth: int) -> dict[str, Any]:
    makers: list[Callable[[random.Random], dict[str, Any]]] = [scalar] * 4 + [reference] * 2
    if depth > 0:
        makers += [lambda r: record(r, depth - 1), lambda r: array(r, depth - 1), lambda r: either(r, depth - 1)]
    return rng.choice(makers)(rng)


def reference(rng: random.Random) -> dict[str, Any]:
    return {"$ref": rng.choice(["#/$defs/leaf", "#/$defs/tree"])}


def either(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [part(rng, depth) for _ in range(rng.randint(1, 3))]}


def record(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 5))
    schema: dict[str, Any] = {"type": "object", "properties": {name: part(rng, depth) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.6]
    if rng.random() < 0.8:
        schema["additionalProperties"] = False
    elif rng.random() < 0.7:
        schema["additionalProperties"] = scalar(rng)
    return schema


def array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array", "items": part(rng, depth)}
    if rng.random() < 0.2:
        schema |= {"prefixItems": [part(rng, 0)], "items": False}
    else:
        schema["minItems"] = rng.randint(0, 2)
        schema["maxItems"] = schema["minItems"] + rng.randint(0, 3)
    return schema


def scalar(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    real = rng.choice([-3.75, -0.5, 0.0, 0.1, 2.5, 1e3])
    short = rng.randint(0, 3)
    return rng.choice([
        {"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": ["integer", "null"]},
        {"const": rng.choice([1, None, "a b", ["x", {"y": 2}]])},
        {"enum": rng.sample(["red", "green", 3, None, True, "ü", 2.5, "line\n"], 3)},
        {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 7, 500])},
        {"type": "integer", "exclusiveMinimum": low, "multipleOf": rng.choice([2, 5, 7])},
        {"type": "number", "minimum": real, "exclusiveMaximum": real + rng.choice([0.25, 10.5])},
        {"type": "number", "exclusiveMinimum": real},
        {"type": "string", "pattern": rng.choice(PATTERNS)},
        {"type": "string", "minLength": short, "maxLength": short + rng.randint(0, 9)},
        {"type": "string"},
    ])  # fmt: skip


def allowed(mask: Mask) -> list[int]:
    ids: list[int] = np.flatnonzero(np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")).tolist()
    return ids


class Walker:
    """Completes prompts with tokens of random logits, under a constraint."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: frozenset[int], prompt: str = "Now, JSON:") -> None:
        known = tokenizer.token_bytes()
        assert known is not None
        self.tokenizer = tokenizer
        self.eos = eos
        self.bytes = [piece or b"" for piece in known] + [b""] * (vocab_size - len(known))
        self.prompt = tokenizer.encode(prompt)
        self.bonus: npt.NDArray[np.float64] = np.array([piece in CLOSING for piece in self.bytes]) * 2.5
        self.bonus[list(eos)] = 4.0
        self.rank = [-1 if token in eos else ending(piece) for token, piece in enumerate(self.bytes)]

    def complete(self, constraint: Constraint, rng: np.random.Generator, soft: int, hard: int) -> list[int] | None:
        """Tokens up to the end; None if there is none after `hard`. From `soft` on, what closes soonest is taken."""
        state = constraint.start()
        tokens: list[int] = []
        while not state.is_over:
            if len(tokens) == hard:
                return None
            ids = allowed(state.masks()[0])
            if len(tokens) < soft:
                token = ids[int(np.argmax(rng.gumbel(size=len(ids)) + self.bonus[ids]))]
            else:
                best = min(self.rank[token] for token in ids)
                token = int(rng.choice([token for token in ids if self.rank[token] == best]))
            state.advance(token)
            if token in self.eos:
                break
            tokens.append(token)
        return tokens

    def text(self, tokens: list[int]) -> str:
        """As a caller sees it."""
        detokenizer = Detokenizer(self.tokenizer, self.prompt)
        return "".join(detokenizer.feed(token) for token in tokens) + detokenizer.finish()

    def spelt(self, text: str) -> list[int]:
        """Tokens of a completion with exactly this text."""
        tokens: list[int] = []
        data = text.encode()
        while data:
            piece = max((piece for piece in self.bytes if piece and data.startswith(piece)), key=len)
            tokens.append(self.bytes.index(piece))
            data = data[len(piece) :]
        return tokens


def ending(piece: bytes) -> int:
    """How far a token is from the end: quotes before brackets, which a string may hold; then what must be between."""
    if not piece:
        return 1000
    if piece.strip(b'"}]') == b"":
        return 0 if piece.startswith(b'"') else 1
    return 2 if piece in (b",", b":") else len(piece) + (50 if piece[:1] in b"{[," else 2)


def source_of(**given: Any) -> GrammarSource:
    source = grammar_source(**given)
    assert source is not None
    return source


def schema_source(schema: Any) -> GrammarSource:
    return source_of(response_format={"type": "json_schema", "schema": schema})


class Kit:
    """One tokenizer with a padded vocabulary and two tokens that end a text."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        self.vocab_size = self.tokenizer.vocab_size + PADDING
        eos = self.tokenizer.eos_token_id
        assert eos is not None
        self.eos = frozenset({eos, 1})  # 1 is a special token of all of them, too
        self.grammars = Grammars(self.tokenizer, self.vocab_size, self.eos)
        self.walker = Walker(self.tokenizer, self.vocab_size, self.eos)

    def compile(self, **given: Any) -> Constraint:
        return self.grammars.compile(source_of(**given))

    def accepts(self, constraint: Constraint, text: str) -> bool:
        """May a completion be this text and end there?"""
        state = constraint.start()
        try:
            for token in self.walker.spelt(text):
                state.advance(token)
            state.advance(min(self.eos))
        except ConstraintError:
            return False
        return True
