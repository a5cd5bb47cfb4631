"""Stop strings, found in text that arrives in pieces."""

from __future__ import annotations


class StopStrings:
    """Cuts a text at the first stop string, wherever the borders of its pieces are.

    First means completed first: the match whose last character comes earliest, of two that end together the longer one.
    That is the moment at which generation stops, so no stop string is ever shown, and no more text is needed to
    decide. (Of "ab" and "abc" always "ab" matches, as it is complete one character earlier.)

    `include`: the stop string itself is shown. Stop strings are not empty (`SamplingParams` refuses those).
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=1)
        self._held = ""
        self._matched: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown now, the stop string that matched or None). After a match nothing more is shown."""
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start, self._matched = min(found)
            self._held = ""
            return text[: end if self._include else start], self._matched
        border = self._undecided_from(text)
        self._held = text[border:]
        return text[:border], None

    def skip(self, text: str) -> str:
        """Text in which no stop string counts that is complete in it; its end may begin one that counts. Returns what
        may be shown now."""
        text = self._held + text
        border = self._undecided_from(text)
        self._held = text[border:]
        return text[:border]

    def finish(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _undecided_from(self, text: str) -> int:
        """Where the longest suffix begins that could be the beginning of a stop string; len(text) if there is none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_characters:
                suffix = text[start:]
                if any(stop.startswith(suffix) for stop in self._stops):
                    return start
        return len(text)
