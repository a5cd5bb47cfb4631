"""P14 on the null backend, with guesses: forms whose masks change at every token, each mask made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cortexstream.constraint import Mask, mask_of
from cortexstream.errors import ConstraintError
from cortexstream.request import FinishReason, Request
from tests.core.support import PLACEMENTS, Placement, Receiver, engine, request
from tests.core.test_speculation import VOCAB, Knowing, serve

EOS = 96
Ids = Sequence[int]


class Places:
    """A form: the token at place i is one of `places[i]`, and behind them the text is over. With `fails` no mask is
    made any more from that place on."""

    def __init__(self, places: Sequence[Ids], fails: int | None = None) -> None:
        self.places, self.fails = places, fails
        self.asked: list[tuple[int, tuple[int, ...]]] = []  # (tokens so far, draft) of every call for masks

    def start(self) -> PlacesState:
        return PlacesState(self)


class PlacesState:
    def __init__(self, form: Places) -> None:
        self.form = form
        self.place = 0
        self.ended = False

    def masks(self, draft: tuple[int, ...] = ()) -> list[Mask]:
        self.form.asked.append((self.place, draft))
        if self.form.fails is not None and self.place >= self.form.fails:
            raise ConstraintError(f"the form fails at place {self.place}")
        masks = [mask_of(self._ids(self.place), VOCAB)]
        for place, token in enumerate(draft, self.place):
            right = masks[-1].any() and token in self._ids(place) and token != EOS
            masks.append(mask_of(self._ids(place + 1) if right else (), VOCAB))
        return masks

    def advance(self, token: int) -> None:
        if self.ended or token not in self._ids(self.place):
            raise ConstraintError(f"the form does not allow token {token} at place {self.place}")
        self.ended = token == EOS
        self.place += 1

    @property
    def is_over(self) -> bool:
        return self.ended or self.place == len(self.form.places)

    def _ids(self, place: int) -> Ids:
        return self.form.places[place] if place < len(self.form.places) else (EOS,)


def asked_for(number: int, form: Places, **sampling: Any) -> Request:
    """Temperature 1, with room for the whole form and more."""
    asked = request(number, 5 + number, seed=number, **{"temperature": 1.0, "max_tokens": 60, **sampling})
    return Request(asked.id, asked.prompt_token_ids, asked.sampling, asked.seed, constraint=form)


def turning(count: int, width: int = 9) -> Places:
    """No token is allowed at two places that follow each other."""
    return Places([range(width * (i % 10), width * (i % 10) + width) for i in range(count)])


def guessed(
    asked: Sequence[Request], received: Sequence[Receiver], wrong: float = 0.0, layout: Placement = "run", **extra: Any
) -> list[Receiver]:
    """The same requests again, with up to four guesses a row at what was `received` without any."""
    drafter = Knowing(asked, 4, wrong)
    for one, got in zip(asked, received, strict=True):
        drafter._full[one.id] = [*one.prompt_token_ids, *got.tokens]
    core, _ = engine(layout, vocab_size=VOCAB, drafter=drafter, **extra)
    again = serve(core, asked)
    assert core.stats().accepted_tokens > 0 and core.arena.used_blocks == 0
    return again


def alone(asked: Request, **extra: Any) -> Receiver:
    core, _ = engine(vocab_size=VOCAB, **extra)
    (got,) = serve(core, [asked])
    return got


def same(expected: Sequence[Receiver], got: Sequence[Receiver]) -> None:
    for one, other in zip(expected, got, strict=True):
        assert (other.tokens, other.finish, other.error) == (one.tokens, one.finish, one.error)


@pytest.mark.parametrize("layout", PLACEMENTS)
@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_p14_every_guess_has_a_mask_of_its_own(layout: Placement, wrong: float) -> None:
    """In a batch that outgrows the arena; a form ends with its last token, which nothing has to follow."""
    asked = [asked_for(i, turning(12 + 3 * i)) for i in range(8)]
    expected = [alone(one) for one in asked]
    for i, got in enumerate(expected):
        assert len(got.tokens) == 12 + 3 * i and got.finish is FinishReason.STOP and not got.events[-1].stops
        assert all(token // 9 == place % 10 for place, token in enumerate(got.tokens))
    received = guessed(asked, expected, wrong, layout, num_blocks=24)
    same(expected, received)


def test_p14_each_mask_is_made_once() -> None:
    """A row with guesses asks once, for the masks of all its draws."""
    forms = [turning(30), turning(30)]
    expected = alone(asked_for(0, forms[0]))
    guessed([asked_for(0, forms[1])], [expected])
    for form, rows in zip(forms, (30, 1 + 6), strict=True):
        places = [place for place, _ in form.asked]
        assert len(places) == len(set(places)) == rows
    assert max(len(draft) for _, draft in forms[1].asked) == 4


def test_p14_allowed_tokens_behind_guesses() -> None:
    """Every other token of a form that allows nearly all."""
    asked = [asked_for(i, Places([range(1, 90)] * 30), allowed_token_ids=range(0, VOCAB, 2)) for i in range(4)]
    expected = [alone(one) for one in asked]
    assert all(token % 2 == 0 for got in expected for token in got.tokens)
    same(expected, guessed(asked, expected))
    same(expected, guessed(asked, expected, wrong=0.3))


@pytest.mark.parametrize("min_tokens", [1, 3, 4, 7])
def test_p14_min_tokens_end_in_the_middle_of_guesses(min_tokens: int) -> None:
    """Behind them a stop may come at once: half of what the form allows ends the text."""
    stops = range(48, 96)
    asked = [
        asked_for(i, Places([range(96)] * 40), min_tokens=min_tokens, stop_token_ids=list(stops)) for i in range(12)
    ]
    expected = [alone(one) for one in asked]
    for got in expected:
        *text, last = got.tokens
        assert last in stops and not set(text) & set(stops) and len(text) >= min_tokens
    assert min(len(got.tokens) for got in expected) == min_tokens + 1
    same(expected, guessed(asked, expected))


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_p14_an_end_among_guesses_is_no_text(ignore_eos: bool) -> None:
    """Whoever ignores it in free text: behind it the form has nothing more."""
    form = Places([*[range(0, 20)] * 6, (EOS,), range(0, 20)])
    asked = [asked_for(0, form, ignore_eos=ignore_eos)]
    expected = [alone(asked[0], eos_token_id=EOS)]
    received = guessed(asked, expected, eos_token_id=EOS)
    same(expected, received)
    for got in (*expected, *received):
        assert len(got.tokens) == 7 and got.tokens[-1] == EOS and got.finish is FinishReason.STOP
        assert [event.stops for event in got.events] == [False] * 6 + [True]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_p14_min_tokens_hold_off_the_end_of_a_form(ignore_eos: bool) -> None:
    """Also where free text would ignore it: a form ends with it."""
    asked = [asked_for(i, Places([(1, 2, EOS)] * 40), min_tokens=9, ignore_eos=ignore_eos) for i in range(8)]
    expected = [alone(one, eos_token_id=EOS) for one in asked]
    for got in expected:
        assert got.tokens[-1] == EOS and EOS not in got.tokens[:-1] and len(got.tokens) > 9
    same(expected, guessed(asked, expected, eos_token_id=EOS))


@pytest.mark.parametrize("guesses", [False, True])
def test_p14_the_reason_is_the_forms_own(guesses: bool) -> None:
    """A form that fails leaves nothing to draw; the sampler's words for that would tell nobody why."""
    asked = asked_for(0, Places([range(0, 20)] * 9, fails=6))
    got = alone(asked)
    if guesses:
        (got,) = guessed([asked], [got])
    assert len(got.tokens) == 6 and got.finish is FinishReason.ERROR
    assert got.error is not None and got.error.endswith(": the form fails at place 6")


def test_p14_logits_that_are_no_numbers_are_told_of_a_form_too() -> None:
    core, backend = engine(vocab_size=VOCAB)
    backend.spoil = lambda row: row._replace(error="its logits are NaN")
    (got,) = serve(core, [asked_for(0, turning(9))])
    assert got.tokens == [] and got.error is not None and got.error.endswith(": its logits are NaN")
