"""P14: what cannot be compiled or kept to fails that request alone, with a reason, and never the process."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cortexstream.errors import ConstraintError, InvalidRequestError
from cortexstream.text.grammar import CACHED, Grammars
from cortexstream.text.tokenizer import Tokenizer
from tests.text.conftest import write_sentencepiece
from tests.text.schemas import Kit, schema_source, source_of


@pytest.fixture(scope="module")
def tiny(folders: dict[str, Path]) -> Kit:
    return Kit(folders["tiny_json"])


MANY_FORMS = {"anyOf": [{"type": "object", "properties": {f"p{i}": {"pattern": "a?"}}} for i in range(700)]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"regex": "("}, "unclosed group"),
    ({"regex": "a(?=b)"}, "look-around"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": r"[^\s\S]"}, "nothing that this model's tokens can spell"),
    ({"grammar": "start: nowhere"}, "nowhere"),
    ({"grammar": "beginning: A"}, "no start rule"),
    ({"grammar": 'start: A\nA: A "x"'}, "circular"),
    ({"grammar": "start: " + "x? " * 16_000 + '\nx: "b"'}, "too big"),
    ({"grammar": "start: " + "(" * 5000}, "too deeply nested"),
    ({"grammar": 'start: %json {"x-guidance": {"lenient": true}, "uniqueItems": true}'}, "cannot be enforced in full"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum (5) is greater than maximum (4)"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required property 'a' is unsatisfiable"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "x-guidance is not allowed"),
    ({"type": "string", "format": "shoe-size"}, "shoe-size"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"not": {"type": "integer"}}, "not"),
    ({"$ref": "#"}, "nothing that this model's tokens can spell"),
    ({"$ref": "#/$defs/gone"}, "gone"),
    ({"$ref": "https://example.org/schema.json"}, "example.org"),
    ({"type": "shoe"}, "shoe"),
    ({"maximum": 10**400}, "number out of range"),
    ({"allOf": [{"anyOf": [{"pattern": f"a{i}{j}"} for j in range(10)]} for i in range(12)]}, "too large"),
    (MANY_FORMS, "cannot be"),
]


@pytest.mark.parametrize(("given", "word"), REFUSED)
def test_p14_an_impossible_or_too_large_grammar_is_refused(tiny: Kit, given: dict[str, Any], word: str) -> None:
    source = source_of(**given) if given.keys() & {"regex", "grammar"} else schema_source(given)
    with pytest.raises(InvalidRequestError) as caught:
        tiny.grammars.compile(source)
    assert caught.value.field == source.field
    assert word in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 450


def test_p14_a_grammar_that_fails_on_the_way_says_so_and_stays_failed(tiny: Kit) -> None:
    state = tiny.compile(grammar="start: " + "x? " * 1500 + '\nx: "b"').start()
    (b,) = tiny.walker.spelt("b")
    now, later = state.masks((b,))  # behind a guess it is no failure yet
    assert now.any() and not later.any() and not state.is_over and state.masks()[0] is now
    for _ in range(2):
        with pytest.raises(ConstraintError, match=r"^the grammar cannot go on: .*items; max is") as caught:
            state.advance(tiny.walker.spelt("b")[0])
        assert "\n" not in str(caught.value)
        with pytest.raises(ConstraintError, match="items; max is"):
            state.masks()
        assert not state.is_over


def test_text_that_the_vocabulary_cannot_spell(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, byte_fallback=False, model_type="bpe", vocab_size=300)
    kit = Kit(tmp_path)
    with pytest.raises(InvalidRequestError, match="this model's tokens can spell"):
        kit.compile(choice=["\u2603"])
    state = kit.compile(choice=["do\u2603", "da\u2603"]).start()
    state.advance(kit.walker.spelt("d")[0])
    with pytest.raises(ConstraintError, match="this model's tokens can spell"):
        state.advance(kit.walker.spelt("o")[0])
        state.masks()


FRESH = """
import sys
import cortexstream
from cortexstream.errors import InvalidRequestError
from cortexstream.structured import grammar_source
from cortexstream.text.grammar import Grammars
from cortexstream.text.tokenizer import Tokenizer
assert "llguidance" not in sys.modules, "import is not light"
grammars = Grammars(Tokenizer.from_folder(sys.argv[1]), 400, frozenset({2}))
chain = {"$ref": "#/a0", **{f"a{i}": {"$ref": f"#/a{i + 1}"} for i in range(2400)}, "a2400": {}}
nested = {"$ref": "#/a0", **{f"a{i}": {"anyOf": [{"$ref": f"#/a{i + 1}"}]} for i in range(1600)}, "a1600": {}}
rules = "start: a0\\n" + "\\n".join(f"a{i}: a{i + 1}" for i in range(4000)) + '\\na4000: "x"'
for form in (chain, nested):
    try:
        grammars.compile(grammar_source(response_format={"type": "json_schema", "schema": form}))
    except InvalidRequestError as error:
        print(error)
grammars.compile(grammar_source(grammar=rules)).start().masks()
print("alive")
"""


def test_long_chains_of_references_do_not_end_the_process(folders: dict[str, Path]) -> None:
    """The compiler recurses along them; beyond the end of a stack there is no error, but a dead process."""
    command = [sys.executable, "-c", FRESH, str(folders["tiny_json"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stack level exceeded") == 2 and done.stdout.endswith("alive\n")


def test_compiling_from_many_threads(folders: dict[str, Path]) -> None:
    kit = Kit(folders["tiny_json"])
    texts = [f"({letter}{letter})+x" for letter in "abcdefgh"] * 4
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda text: kit.compile(regex=text), texts))
    for text, constraint in zip(texts, made, strict=True):
        assert kit.accepts(constraint, text[1:3] + "x") and not kit.accepts(constraint, text[1] + "x")


def test_compiled_grammars_are_kept_but_not_for_ever(tiny: Kit) -> None:
    first, second = tiny.compile(regex="keep"), tiny.compile(regex="drop")
    for number in range(CACHED - 1):
        tiny.compile(regex=f"x{number}")
        assert tiny.compile(regex="keep") is first
    assert tiny.compile(regex="drop") is not second


def test_llguidance_missing_is_one_clear_sentence(tiny: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(tiny.tokenizer, tiny.vocab_size, tiny.eos)
    with pytest.raises(InvalidRequestError, match=r"^choice: needs llguidance.*pip install 'llguidance") as caught:
        grammars.compile(source_of(choice=["a"]))
    assert caught.value.field == "choice"


def test_a_model_without_an_end_and_a_tokenizer_without_bytes_are_refused(tiny: Kit, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    with pytest.raises(InvalidRequestError, match="a token that ends the text"):
        Grammars(tiny.tokenizer, tiny.vocab_size, frozenset({tiny.vocab_size})).compile(source_of(regex="a"))
    words = Library(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(InvalidRequestError, match="which bytes each token stands for"):
        Grammars(tokenizer, 3, frozenset({0})).compile(source_of(regex="a"))
