"""Grammars, compiled: which tokens may come next so that the text is what a request asks for.

The work is llguidance's; here it meets our tokenizers, limits and errors.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from cortexstream.constraint import Constraint, Mask, mask_of
from cortexstream.errors import ConstraintError, InvalidRequestError
from cortexstream.structured import GrammarSource
from cortexstream.text.grammar_tokens import GrammarTokens
from cortexstream.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHED = 128  # compiled grammars
MAX_REASON = 300  # characters of the library's words in an error
# The compiler recurses along rules and references; 64 KiB of them need less than half of this.
STACK_BYTES = 128 * 2**20
LEXER_STATES = 100_000  # of one completion; 1 to 2 kB each
ITEMS = 10_000  # of the parser, for one mask: an ambiguous grammar has ever more, and others wait for its masks
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
GOING_ON = ("NotStopped", "NoExtension", "NoExtensionBias")
META = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")  # what a regular expression would not take literally


class Grammars:
    """Compiles what requests ask for, for one model. Safe to use from several threads.

    `vocab_size` is the model's, which may be larger or smaller than the tokenizer's; masks have its length. Every id in
    `eos_token_ids` may be drawn exactly where the text may end. The text is what the grammar accepts to the letter, but
    for one thing: tokenizers that drop a space at the start of a text do so here, too, after a prompt without text.

    JSON is written on one line, with at most one space after a comma or a colon, properties in the schema's order.
    Schemas follow draft 2020-12. Nothing of a schema is ignored: a keyword or format that cannot be enforced is an
    error. Two things remain: names that a schema does not list may come twice in an object, and numbers are compared as
    written. Regular expressions have the syntax and meaning of Rust's regex crate, with \\d and \\w in ASCII and no
    word boundaries; the whole output must match.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarSource, Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, source: GrammarSource) -> Constraint:
        """Ready for use; the last `CACHED` are kept. Takes milliseconds, for the largest grammars seconds, and the
        first call up to a second more.

        Raises InvalidRequestError, with the field it came from, if the grammar is wrong, too complex or accepts
        nothing, if the tokenizer's bytes are not known, or if llguidance is not installed.
        """
        with self._lock:
            found = self._compiled.get(source)
            if found is not None:
                self._compiled.move_to_end(source)
                return found
            if self._tokens is None:
                self._tokens = self._read_tokens(source.field)
            tokens = self._tokens
        try:
            made = _Grammar(_compiled(tokens, source), self._vocab_size, self._eos)
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
        raise InvalidRequestError(source.field, f"cannot be compiled: {_one_line(str(error))}") from error
    limits = LLParserLimits(
        max_lexer_states=LEXER_STATES, max_grammar_size=SYMBOLS, step_max_items=ITEMS, verbose_errors=False
    )
    with ThreadPoolExecutor(1, thread_name_prefix="cortexstream-grammar") as pool:
        with _STACK_LOCK:  # the size is the whole process's; new threads get it
            before = threading.stack_size(STACK_BYTES)
            try:
                future = pool.submit(LLMatcher, tokens, text, log_level=0, limits=limits)
            finally:
                threading.stack_size(before)
        matcher = future.result()
    if matcher.is_error():
        raise InvalidRequestError(source.field, f"cannot be compiled: {_one_line(matcher.get_error())}")
    warnings = matcher.get_grammar_warnings()
    if warnings:
        raise InvalidRequestError(source.field, f"cannot be enforced in full: {_one_line('; '.join(warnings))}")
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
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)
    if source.kind == "grammar":
        return LLMatcher.grammar_from_lark(source.text)
    if source.kind == "regex":
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(source.text, ASCII_CLASSES)}/")
    choices: list[str] = json.loads(source.text)
    return LLMatcher.grammar_from_regex("|".join(META.sub(r"\\\g<0>", text) for text in choices))


class _Grammar:
    """A compiled grammar. Its matcher is only ever copied; the first mask is the same for all."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos: frozenset[int]) -> None:
        """Raises ConstraintError: some grammars turn out too complex, or empty, only when a mask is made."""
        self._matcher = matcher
        self._eos = eos
        self._eos_mask = mask_of(eos, vocab_size)
        self._first: Mask | None = None
        self._first = self.start().masks()[0]

    def start(self) -> _State:
        return _State(self._matcher.deep_copy(), self._eos, self._eos_mask, self._first)


class _State:
    """Where a completion stands. Drafts are followed on a copy, so that nothing they meet is left behind."""

    __slots__ = ("_ended", "_eos", "_eos_mask", "_mask", "_matcher")

    def __init__(self, matcher: LLMatcher, eos: frozenset[int], eos_mask: Mask, mask: Mask | None) -> None:
        self._matcher = matcher
        self._eos = eos
        self._eos_mask = eos_mask
        self._mask = mask  # of the present position, once it was asked for
        self._ended = False

    def masks(self, draft: tuple[int, ...] = ()) -> list[Mask]:
        """As the protocol says; after a drafted end-of-sequence token nothing may be drawn either."""
        found = [self._now()]
        ahead = self._matcher.deep_copy() if draft else self._matcher
        dead = np.zeros_like(self._eos_mask)
        for token in draft:
            found.append(self._behind(ahead, token) if self._goes_on(found[-1], token) else dead)
        return found

    def _goes_on(self, mask: Mask, token: int) -> bool:
        """May more be drawn behind a token, if `mask` is what may stand in its place?"""
        return token not in self._eos and _allows(mask, token)

    def _behind(self, ahead: LLMatcher, token: int) -> Mask:
        """The mask after a drafted token; nothing if the grammar fails there: that counts once the token is drawn."""
        try:
            self._feed(ahead, token)
            return self._mask_of(ahead)
        except ConstraintError:
            return np.zeros_like(self._eos_mask)

    def advance(self, token: int) -> None:
        """Any token is taken that the text may go on with, also another spelling than a mask offers."""
        if self._ended or (token in self._eos and not self._matcher.is_accepting()):
            raise ConstraintError(
                f"the grammar does not allow token {token} {'after the end' if self._ended else 'yet'}"
            )
        if token in self._eos:
            self._ended = True
        else:
            self._mask = None
            self._feed(self._matcher, token)

    @property
    def is_over(self) -> bool:
        if self._ended or not self._matcher.is_accepting():
            return self._ended
        try:
            return np.array_equal(self._now(), self._eos_mask)
        except ConstraintError:  # a failed matcher stays so: whoever asks for a mask gets this error
            return False

    def _now(self) -> Mask:
        if self._ended:
            raise ConstraintError("the text has ended; the grammar allows nothing more")
        if self._mask is None:
            self._mask = self._mask_of(self._matcher)
        return self._mask

    def _mask_of(self, matcher: LLMatcher) -> Mask:
        """Raises ConstraintError. A matcher that failed still gives a mask, of the end-of-sequence tokens alone."""
        # The library's masks may have a word more: a bit behind the vocabulary's last is its own.
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: self._eos_mask.size]
        _check(matcher)
        if mask.shape != self._eos_mask.shape:
            raise ConstraintError(f"the grammar's mask has {mask.size} words; {self._eos_mask.size} are needed")
        if not mask.any():
            raise ConstraintError("the grammar cannot go on: no token of this model's vocabulary continues the text")
        return mask

    def _feed(self, matcher: LLMatcher, token: int) -> None:
        if not matcher.consume_token(token):
            _check(matcher)
            raise ConstraintError(f"the grammar does not allow token {token} here")


def _check(matcher: LLMatcher) -> None:
    """Raise ConstraintError if the matcher failed, or stopped before its text may end."""
    error, reason = matcher.get_error(), matcher.stop_reason()
    if error.startswith("NoExtension"):
        raise ConstraintError("the grammar cannot go on: nothing that this model's tokens can spell satisfies it")
    if error or reason not in GOING_ON:
        raise ConstraintError(f"the grammar cannot go on: {_one_line(error or reason)}")


def _allows(mask: Mask, token: int) -> bool:
    return 0 <= token < 32 * mask.size and bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def _one_line(reason: str) -> str:
    """The library's words without its pictures of the place, its back traces and its state."""
    lines = [line.strip() for line in reason.splitlines()]
    kept = [line for line in lines if line and not re.match(r"\d+ \||<|\^|\d+: ", line)]
    text = "; ".join(kept) or "no reason was given"
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
