"""A completion of given tokens: what is text, what stops it, and what is told."""

from __future__ import annotations

from typing import Any

import pytest

from cortexstream.completion import Completion
from cortexstream.models import tiny_folder
from cortexstream.plan import TokenScore
from cortexstream.request import FinishReason, SamplingParams
from cortexstream.scheduler import TokenEvent
from cortexstream.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(tiny_folder())
EOS = TOKENIZER.eos_token_id


def letters(text: str) -> list[int]:
    """A token per letter, as the embedded model's tokenizer has them."""
    found = [TOKENIZER.encode(f"a{letter}", add_special_tokens=False)[-1] for letter in text]
    assert TOKENIZER.decode(found) == text
    return found


def run(text: str, finish: FinishReason = FinishReason.LENGTH, stops: bool = False, **sampling: Any) -> tuple[str, Any]:
    """The text that is shown, in pieces put together, and the completion; the last token ends it with `finish`."""
    made = Completion(0, SamplingParams(**sampling), TOKENIZER, (1, 5))
    shown, tokens = "", letters(text)
    for number, token in enumerate(tokens, 1):
        last = number == len(tokens)
        event = TokenEvent(0, token, None, (), finish if last else None, stops=stops and last)
        piece, stopped = made.take(event)
        shown += piece
        if stopped:
            break
    assert made.output().text == shown
    return shown, made.output()


@pytest.mark.parametrize("include, shown", [(False, "abc"), (True, "abcd")])
def test_f07_a_token_that_stops_is_text_only_if_asked(include: bool, shown: str) -> None:
    text, output = run("abcd", FinishReason.STOP, stops=True, include_stop_str_in_output=include)
    assert text == shown and len(output.token_ids) == 4 and output.finish_reason == "stop"


def test_p14_the_last_token_of_a_form_is_text() -> None:
    """It ends the text, but unlike a stop token it does not say so itself."""
    assert run("abcd", FinishReason.STOP)[0] == "abcd"


@pytest.mark.parametrize(
    "min_tokens, shown, reason",
    [(0, "ab", "cd"), (3, "ab", "cd"), (4, "abcdab", "cd"), (7, "abcdab", "cd"), (8, "abcdabcd", None)],
)
def test_f07_min_tokens_come_before_the_end_of_a_stop_string(min_tokens: int, shown: str, reason: str | None) -> None:
    text, output = run("abcdabcd", stop=["cd"], min_tokens=min_tokens, max_tokens=8)
    assert (text, output.stop_reason) == (shown, reason)
    assert output.finish_reason == ("stop" if reason else "length")


@pytest.mark.parametrize("min_tokens", [0, 4])
def test_f08_text_held_back_for_a_stop_string_is_shown_at_the_end(min_tokens: int) -> None:
    text, output = run("abcd", stop=["cdx", "dy"], min_tokens=min_tokens, max_tokens=4)
    assert text == "abcd" and output.stop_reason is None


@pytest.mark.parametrize("finish", [FinishReason.ABORT, FinishReason.ERROR, FinishReason.STOP])
@pytest.mark.parametrize("sampling, held", [({}, ""), ({"stop": ["cdx", "dy"]}, "cd"), ({"stop": ["dx"]}, "d")])
@pytest.mark.parametrize("min_tokens", [0, 4, 9])
@pytest.mark.parametrize("half", ["", "\ufffd"])
def test_f08_an_end_without_a_token_loses_no_text(
    finish: FinishReason, sampling: dict[str, Any], held: str, min_tokens: int, half: str
) -> None:
    """As an abort or an error is: what may have begun a stop string is shown, and the bytes of half a character."""
    tokens = letters("abcd") + TOKENIZER.encode("\U0001d11e", add_special_tokens=False)[: len(half)]
    made = Completion(0, SamplingParams(**sampling, min_tokens=min_tokens), TOKENIZER, (1, 5))
    pieces = [made.take(TokenEvent(0, token, None, (), None))[0] for token in tokens]
    assert "".join(pieces) + held == "abcd" and made.output().finish_reason is None
    error = "it broke" if finish is FinishReason.ERROR else None
    assert made.take(TokenEvent(0, None, None, (), finish, error)) == (held + half, False)
    output = made.output()
    assert output.text == "abcd" + half and output.token_ids == tuple(tokens)
    assert (output.finish_reason, output.error, output.stop_reason) == (finish.value, error, None)


@pytest.mark.parametrize(
    "finish, stop_token, reason",
    [
        (FinishReason.STOP, "d", "d"),
        (FinishReason.STOP, "c", None),  # the model's own end
        (FinishReason.LENGTH, "d", None),
    ],
)
def test_f07_a_stop_token_is_told_only_if_it_stopped(finish: FinishReason, stop_token: str, reason: str | None) -> None:
    _, output = run("abcd", finish, stops=True, stop_token_ids=letters(stop_token))
    assert output.stop_reason == (None if reason is None else letters(reason)[0])
    assert output.finish_reason == finish.value


def test_f10_prompt_logprobs_have_none_for_the_first_token() -> None:
    made = Completion(0, SamplingParams(prompt_logprobs=2), TOKENIZER, (1, 5, 9))
    scores = (TokenScore(-0.5, ((5, -0.5), (6, -1.0))), TokenScore(-3.0, ((5, -0.5), (6, -1.0))))
    made.take(TokenEvent(0, 7, None, (), None, prompt_scores=scores))
    first, second, third = made.prompt_logprobs or ()
    assert first is None and second is not None and third is not None
    assert [(t, s.logprob, s.rank) for t, s in second.items()] == [(5, -0.5, 1), (6, -1.0, 2)]
    assert third[9].logprob == -3.0 and third[9].rank is None and len(third) == 3
