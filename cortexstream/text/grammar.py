"""Grammars, compiled: which tokens may come next so that the text is what a request asks for.

The work is llguidance's; here it meets our tokenizers, limits and errors.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from cortexstream.constraint import Constraint
from cortexstream.errors import ConstraintError, InvalidRequestError
from cortexstream.structured import GrammarSource
from cortexstream.text.grammar_state import CompiledGrammar, one_line
from cortexstream.text.grammar_tokens import GrammarTokens
from cortexstream.text.schema import enforceable
from cortexstream.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHED = 64  # compiled grammars; the largest hold some 20 MB
# The compiler recurses along rules and references; 64 KiB of them need less than half of this.
STACK_BYTES = 128 * 2**20
LEXER_STATES = 100_000  # of one completion; 1 to 2 kB each
LEXER_FUEL = 200_000, 100_000  # expressions that the lexer makes at first, and for a mask; a fifth, and half, of usual
ITEMS = 10_000  # of the parser, for one mask
SYMBOLS = 10_000  # a schema of 64 KiB has about so many; a mask's time may grow with their square
# One line with at most one space after "," and ":", as people and json.dumps write it. Where white space is free, a
# model may write nothing else for ever.
JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # No \uXXXX: a name that is spelt so would pass for one that the schema does not list.
    "json_allowed_escapes": 'nrbtf\\"',
}
ANY_OBJECT = '{"type":"object"}'
ASCII_CLASSES = "dw"  # \d and \w, as in a schema's patterns: what reads the output may know an older Unicode, or none
META = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")  # what a regular expression would not take literally


class Grammars:
    """Compiles what requests ask for, for one model. Safe to use from several threads.

    `vocab_size` is the model's, which may be larger or smaller than the tokenizer's; masks have its length. Every id in
    `eos_token_ids` may be drawn exactly where the text may end. The text is what the grammar accepts to the letter, but
    for one thing: tokenizers that drop a space at the start of a text do so here, too, after a prompt without text.

    JSON is written on one line, with at most one space after a comma or a colon, properties in the schema's order.
    Schemas follow draft 2020-12. Nothing of a schema is ignored: a keyword, format or number that cannot be enforced is
    an error (`cortexstream.text.schema`; inside of Lark's %json that is the library's affair). Two things remain: names
    that a schema does not list may come twice in an object, and numbers are compared as written. That a form has no end
    is noticed when it is too late. Lark grammars should repeat to the left: 2000 items of the parser may be open.
    Regular expressions have the syntax and meaning of Rust's regex crate, with \\d and \\w in ASCII (but not in a Lark
    grammar) and no word boundaries; the whole output must match.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSource, CompiledGrammar] = OrderedDict()
        self._making: dict[GrammarSource, Future[CompiledGrammar]] = {}
        self._lock = threading.Lock()

    def compile(self, source: GrammarSource) -> Constraint:
        """Ready for use; the last `CACHED` are kept, and who asks for one that is being compiled gets that one. Takes
        milliseconds, for the largest grammars a second, and the first call up to a second more.

        Raises InvalidRequestError, with the field it came from, if the grammar is wrong, too complex or accepts
        nothing, if the tokenizer's bytes are not known, or if llguidance is not installed.
        """
        with self._lock:
            for failed in [key for key, grammar in self._compiled.items() if grammar.failed]:
                del self._compiled[failed]  # it holds all that made it fail
            found = self._compiled.get(source)
            if found is not None:
                self._compiled.move_to_end(source)
                return found
            making = self._making.get(source)
            if making is None:
                mine = self._making[source] = Future()
        if making is not None:
            return making.result()
        try:
            made = self._make(source)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(made)
            return made
        finally:
            with self._lock:
                del self._making[source]

    def _make(self, source: GrammarSource) -> CompiledGrammar:
        with self._lock:
            if self._tokens is None:
                self._tokens = self._read_tokens(source.field)
            tokens = self._tokens
        try:
            made = CompiledGrammar(_compiled(tokens, source), self._vocab_size, self._eos)
        except ConstraintError as error:
            raise InvalidRequestError(source.field, f"cannot be used: {error}") from error
        with self._lock:
            self._compiled[source] = made
            if len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        return made

    def _read_tokens(self, field: str) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise InvalidRequestError(
                field, f"needs llguidance, which cannot be imported ({error}); run: pip install 'llguidance>=1.7.6,<2'"
            ) from error
        if not self._eos:
            raise InvalidRequestError(field, "needs a token that ends the text, and this model names none")
        known = self._tokenizer.token_bytes()
        if known is None:
            raise InvalidRequestError(
                field, "cannot be used with this model: its tokenizer does not tell which bytes each token stands for"
            )
        tokens = GrammarTokens(self._tokenizer, known, self._vocab_size, self._eos)
        return LLTokenizer(tokens, n_vocab=self._vocab_size, eos_token=sorted(self._eos))  # type: ignore[arg-type]


def _compiled(tokens: LLTokenizer, source: GrammarSource) -> LLMatcher:
    """A matcher that has passed compilation and its first mask. Raises InvalidRequestError."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        text = _grammar_text(source)
    except ValueError as error:  # a number that the library cannot hold, say
        raise InvalidRequestError(source.field, f"cannot be compiled: {one_line(str(error))}") from error
    limits = LLParserLimits(
        max_lexer_states=LEXER_STATES, initial_lexer_fuel=LEXER_FUEL[0], step_lexer_fuel=LEXER_FUEL[1],
        max_grammar_size=SYMBOLS, step_max_items=ITEMS, verbose_errors=False,
    )  # fmt: skip
    with ThreadPoolExecutor(1, thread_name_prefix="cortexstream-grammar") as pool:
        with _STACK_LOCK:  # the size is the whole process's; new threads get it
            before = threading.stack_size(STACK_BYTES)
            try:
                future = pool.submit(LLMatcher, tokens, text, log_level=0, limits=limits)
            finally:
                threading.stack_size(before)
        matcher = future.result()
    if matcher.is_error():
        raise InvalidRequestError(source.field, f"cannot be compiled: {one_line(matcher.get_error())}")
    warnings = matcher.get_grammar_warnings()
    if warnings:
        raise InvalidRequestError(source.field, f"cannot be enforced in full: {one_line('; '.join(warnings))}")
    return matcher


_STACK_LOCK = threading.Lock()


def _grammar_text(source: GrammarSource) -> str:
    """The library's own form of a source. Raises ValueError."""
    from llguidance import LLMatcher, regex_to_lark

    if source.kind in ("json_schema", "json_object"):
        schema = source.text if source.kind == "json_schema" else ANY_OBJECT
        if "x-guidance" in json.loads(schema):  # would change or undo the options
            raise ValueError("x-guidance is not allowed in a schema; remove it")
        options: Any = JSON_OPTIONS
        return LLMatcher.grammar_from_json_schema(enforceable(schema), overrides=options)
    if source.kind == "grammar":
        return LLMatcher.grammar_from_lark(source.text)
    if source.kind == "regex":
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(source.text, ASCII_CLASSES)}/")
    choices: list[str] = json.loads(source.text)
    return LLMatcher.grammar_from_regex("|".join(META.sub(r"\\\g<0>", text) for text in choices))
