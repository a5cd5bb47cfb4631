"""Where completions stand in a compiled grammar, and how long that may take."""

from __future__ import annotations

import re
from time import thread_time
from typing import TYPE_CHECKING

import numpy as np

from cortexstream.constraint import Mask, mask_of
from cortexstream.errors import ConstraintError

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_REASON = 300  # characters of the library's words in an error
# CPU time that the masks of a grammar may take, of all its completions together. Most take far less than a millisecond,
# those of an ambiguous grammar longer with every token, and all who are served wait for them.
FREE_S, MASK_S = 2.0, 0.002  # in all; and more for each mask
GOING_ON = ("NotStopped", "NoExtension", "NoExtensionBias")


class CompiledGrammar:
    """A compiled grammar. Its matcher is only ever copied; the first mask is the same for all.

    `failed`: a completion could not go on, most often because the grammar is too complex. `overdue`: its masks took too
    long, and this is why no completion goes on with it.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos: frozenset[int]) -> None:
        """Raises ConstraintError: some grammars turn out too complex, or empty, only when a mask is made."""
        self._matcher = matcher
        self.eos = eos
        self.eos_mask = mask_of(eos, vocab_size)
        self.failed = False
        self.overdue: str | None = None
        self._spent_s, self._made = 0.0, 0  # CPU time of masks, and how many were made
        self._first: Mask | None = None
        self._first = self.start().masks()[0]

    def start(self) -> GrammarState:
        return GrammarState(self, self._matcher.deep_copy(), self._first)

    def count(self, spent_s: float, masks: int = 0) -> None:
        """CPU time was spent, on so many masks. From when it is too much the grammar is `overdue`."""
        self._spent_s += spent_s
        self._made += masks
        if self.overdue is None and self._spent_s > FREE_S + MASK_S * self._made:
            self.failed = True
            self.overdue = (
                f"the grammar cannot go on: its {self._made} masks took {self._spent_s:.1f} s; they have {FREE_S:g} s, "
                f"and {1e3 * MASK_S:g} ms each. Write it so that a text can be read in one way only, and without large "
                "repetitions in each other"
            )


class GrammarState:
    """Where a completion stands. Drafts are followed on a copy, so that nothing they meet is left behind."""

    __slots__ = ("_ended", "_eos", "_eos_mask", "_grammar", "_mask", "_matcher")

    def __init__(self, grammar: CompiledGrammar, matcher: LLMatcher, mask: Mask | None) -> None:
        self._grammar = grammar
        self._eos, self._eos_mask = grammar.eos, grammar.eos_mask
        self._matcher = matcher
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
        if self._grammar.overdue is not None:
            raise ConstraintError(self._grammar.overdue)
        began_s = thread_time()
        # The library's masks may have a word more: a bit behind the vocabulary's last is its own.
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: self._eos_mask.size]
        self._grammar.count(thread_time() - began_s, masks=1)
        self._check(matcher)
        if mask.shape != self._eos_mask.shape:
            raise ConstraintError(f"the grammar's mask has {mask.size} words; {self._eos_mask.size} are needed")
        if not mask.any():
            raise ConstraintError("the grammar cannot go on: no token of this model's vocabulary continues the text")
        return mask

    def _feed(self, matcher: LLMatcher, token: int) -> None:
        began_s = thread_time()
        taken = matcher.consume_token(token)
        self._grammar.count(thread_time() - began_s)
        if not taken:
            self._check(matcher)
            raise ConstraintError(f"the grammar does not allow token {token} here")

    def _check(self, matcher: LLMatcher) -> None:
        """Raise ConstraintError if the matcher failed, or stopped before its text may end."""
        error, reason = matcher.get_error(), matcher.stop_reason()
        if not error and reason in GOING_ON:
            return
        self._grammar.failed = True
        if error.startswith("NoExtension"):
            raise ConstraintError("the grammar cannot go on: nothing that this model's tokens can spell satisfies it")
        raise ConstraintError(f"the grammar cannot go on: {one_line(error or reason)}")


def _allows(mask: Mask, token: int) -> bool:
    return 0 <= token < 32 * mask.size and bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def one_line(reason: str) -> str:
    """The library's words without its pictures of the place, its back traces and its state."""
    lines = [line.strip() for line in reason.splitlines()]
    kept = [line for line in lines if line and not re.match(r"\d+ \||<|\^|\d+: ", line)]
    text = "; ".join(kept) or "no reason was given"
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
