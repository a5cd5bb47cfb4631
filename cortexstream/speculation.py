"""Guesses at what a sequence will draw next, so that one forward pass can draw several tokens.

A guess costs work, never correctness: a row feeds the last token and the guesses behind it, draws after each, and a
guess is kept exactly if the draw before it gave that token. What is drawn is thus what would be drawn without guesses,
greedy or seeded (unlike in rejection sampling, Leviathan et al. 2022, where only the distribution is the same).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import NamedTuple, Protocol

from cortexstream.backend import WarmupReport
from cortexstream.errors import ArenaFullError
from cortexstream.kv import KVArena
from cortexstream.sequence import Sequence as Served


class Ask(NamedTuple):
    """At most `most` tokens, at least 1, are wanted behind all that `sequence` has."""

    sequence: Served
    most: int


class Drafter(Protocol):
    """Where guesses come from. Used on the engine's thread."""

    num_tokens: int  # guesses per row, at most
    kv_bytes: int  # of KV memory that it holds itself

    def propose(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """For each ask at most `most` token ids of the vocabulary; none where nothing is worth a guess."""
        ...

    def forget(self, seq_id: int) -> None:
        """The sequence ended. Unknown ones are left alone."""
        ...

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        """As `Backend.warmup`, of what it runs itself."""
        ...

    def close(self) -> None:
        """Give memory back. Idempotent."""
        ...


INDEXED_AT_ONCE = 4096  # tokens: some 30 ms of a step, which all rows share


class NgramIndex:
    """Where in a growing list of tokens each n-gram occurred last. A long prompt is read over several steps."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the position behind it
        self._indexed = 0  # n-grams that end before this position are known

    def find(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """What followed, up to `count` tokens, where the end of `tokens` occurred before: the longest n-gram, and of
        its occurrences the last one."""
        end = len(tokens)
        last = min(end - 1, self._indexed + INDEXED_AT_ONCE)  # the end itself must not find itself
        for stop in range(self._indexed + 1, last + 1):
            for n in self._lengths:
                if n <= stop:
                    self._after[tuple(tokens[stop - n : stop])] = stop
        self._indexed = max(self._indexed, last)
        for n in self._lengths:
            if n <= end and (place := self._after.get(tuple(tokens[end - n :]))) is not None:
                return tuple(tokens[place : place + count])
        return ()


class NgramDrafter:
    """Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023): what followed the last few tokens when they occurred
    before, in the prompt or in the output. Free of a second model; good where text repeats what it was given."""

    kv_bytes = 0

    def __init__(self, num_tokens: int, shortest: int, longest: int) -> None:
        self.num_tokens = num_tokens
        self._shortest, self._longest = shortest, longest
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        return [self._index(ask.sequence.id).find(ask.sequence.tokens, ask.most) for ask in asks]

    def forget(self, seq_id: int) -> None:
        self._indices.pop(seq_id, None)

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        return WarmupReport(())

    def close(self) -> None:
        self._indices.clear()

    def _index(self, seq_id: int) -> NgramIndex:
        if seq_id not in self._indices:
            self._indices[seq_id] = NgramIndex(self._shortest, self._longest)
        return self._indices[seq_id]


def accepted(draft: Sequence[int], drawn: Iterable[int | None]) -> int:
    """How many tokens of a draft are what was drawn in their places; None stands for a draw that failed."""
    count = 0
    for guess, token in zip(draft, drawn, strict=False):
        if guess != token:
            break
        count += 1
    return count


class Speculation:
    """A drafter, blocks for what it guesses, and counters of the rows that had guesses."""

    def __init__(self, drafter: Drafter, arena: KVArena) -> None:
        self.drafter = drafter
        self.rows = self.drafted_tokens = self.accepted_tokens = 0
        self.seconds = 0.0  # that the drafter took
        self._arena = arena

    def guess(self, decoding: Sequence[Served], spare_tokens: int) -> dict[int, tuple[int, ...]]:
        """Guesses at what decoding sequences draw, by their ids, at most `spare_tokens` in all. Their blocks grow as
        far as there are free ones."""
        share = min(self.drafter.num_tokens, spare_tokens // max(1, len(decoding)))
        counts = [min(share, s.limit_tokens - len(s.tokens) - 1) for s in decoding]
        asks = [Ask(s, count) for s, count in zip(decoding, counts, strict=True) if count > 0]
        if not asks:
            return {}
        drafts = {}
        began_s = perf_counter()
        proposed = self.drafter.propose(asks)
        self.seconds += perf_counter() - began_s
        for ask, draft in zip(asks, proposed, strict=True):
            room = self._room_for(ask.sequence, len(draft)) if draft else 0
            if room:
                drafts[ask.sequence.id] = draft[:room]
        return drafts

    def count(self, drafted: int, accepted: int) -> None:
        """A row with guesses was committed."""
        self.rows += 1
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted

    def _room_for(self, sequence: Served, count: int) -> int:
        """How many of `count` guesses behind the next token have a place in the sequence's blocks, or in free ones."""
        handle = sequence.handle
        assert handle is not None
        try:
            self._arena.grow(handle, handle.position + 1 + count)
        except ArenaFullError:
            pass  # then as many as have room already: guesses are worth nobody's preemption
        return max(0, min(count, handle.capacity_tokens - handle.position - 1))
