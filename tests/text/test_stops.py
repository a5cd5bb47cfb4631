"""F08: text is cut at the first stop string, across token borders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortexstream.text.stops import StopStrings

ALPHABET = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def run(stops: StopStrings, pieces: list[str]) -> tuple[list[str], str | None]:
    """What is shown after each piece and at the end, and the match."""
    shown = []
    for piece in pieces:
        text, matched = stops.feed(piece)
        shown.append(text)
        if matched is not None:
            return shown, matched
    return [*shown, stops.finish()], None


def search(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The definition, by growing the text one character at a time."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(pieces=st.lists(ALPHABET, max_size=12), stops=STOPS, include=st.booleans())
def test_f08_any_pieces_give_what_a_search_in_the_whole_text_gives(
    pieces: list[str], stops: tuple[str, ...], include: bool
) -> None:
    shown, matched = run(StopStrings(stops, include), pieces)
    assert ("".join(shown), matched) == search("".join(pieces), stops, include)


@given(text=ALPHABET, stops=STOPS)
def test_f08_shown_text_never_holds_a_stop_string_and_nothing_is_held_needlessly(
    text: str, stops: tuple[str, ...]
) -> None:
    cutter, shown = StopStrings(stops), ""
    for end, character in enumerate(text, 1):
        piece, matched = cutter.feed(character)
        shown += piece
        assert not any(stop in shown for stop in stops)
        if matched is not None:
            return
        held = text[len(shown) : end]
        assert shown + held == text[:end]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        longer = (text[start:end] for start in range(len(shown)))
        assert not any(stop.startswith(suffix) for suffix in longer for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "matched"),
    [
        (("</s>",), ["hello <", "/", "s", "> more"], "hello ", "</s>"),
        (("\n\n",), ["a\n", "b\n", "\nc"], "a\nb", "\n\n"),
        (("aab",), ["a", "a", "a", "b"], "a", "aab"),
        (("abc", "ab"), ["abc"], "", "ab"),
        (("abcd", "bc"), ["abcd"], "a", "bc"),
        (("bc", "abc"), ["xabc"], "x", "abc"),
        (("🎉!",), ["party 🎉", "?", "🎉", "!"], "party 🎉?", "🎉!"),
        (("stop",), ["sto", "sto"], "stosto", None),
        ((), ["as", " is"], "as is", None),
    ],
)
def test_f08_examples(stops: tuple[str, ...], pieces: list[str], shown: str, matched: str | None) -> None:
    pieces_shown, found = run(StopStrings(stops, include=False), pieces)
    assert ("".join(pieces_shown), found) == (shown, matched)


def test_f08_the_stop_string_is_shown_when_asked_for() -> None:
    cutter = StopStrings(("END",), include=True)
    assert [cutter.feed(piece) for piece in ("a E", "N", "D b")] == [("a ", None), ("", None), ("END", "END")]


def test_after_a_match_nothing_more_is_shown() -> None:
    cutter = StopStrings((".",), include=False)
    assert cutter.feed("a.b") == ("a", ".")
    assert cutter.feed("c") == ("", ".")
    assert cutter.finish() == ""


@pytest.mark.parametrize(
    ("stops", "skipped", "fed", "shown", "matched"),
    [
        (("end",), ["the end", " e"], ["nd of"], "the end ", "end"),
        (("end",), ["en"], ["d"], "", "end"),
        (("end",), ["en", "d"], ["."], "end.", None),
        (("aa",), ["aa"], ["a"], "a", "aa"),
        (("b",), ["abab"], ["a", "b"], "ababa", "b"),
        (("xyz",), ["ax", "q"], ["xy"], "axqxy", None),
    ],
)
def test_f07_stops_that_do_not_count_yet(
    stops: tuple[str, ...], skipped: list[str], fed: list[str], shown: str, matched: str | None
) -> None:
    """`min_tokens`: what is complete too early is text; what is completed later stops, wherever it began."""
    cutter = StopStrings(stops)
    text = "".join(cutter.skip(piece) for piece in skipped)
    found = None
    for piece in fed:
        more, found = cutter.feed(piece)
        text += more
    assert (text if found else text + cutter.finish(), found) == (shown, matched)
