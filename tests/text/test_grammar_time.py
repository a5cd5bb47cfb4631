"""P14: what a grammar may cost those who are served beside it; what is compiled is shared."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.errors import ConstraintError, InvalidRequestError
from cortexstream.text import grammar, grammar_state
from tests.text.schemas import Kit, allowed, source_of

AMBIGUOUS = 'start: e\ne: e e e e | e e e | e e | "a" | '


@pytest.fixture(scope="module")
def tiny(folders: dict[str, Path]) -> Kit:
    return Kit(folders["tiny_json"])


def test_p14_masks_that_take_too_long_end_their_completions_and_no_others(
    tiny: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """An ambiguous grammar's masks take longer with every token. Less time than usual is given, to be quick."""
    constraint = tiny.compile(grammar=AMBIGUOUS)
    states = [constraint.start() for _ in range(3)]  # of one request, say: they share the time
    (a,) = tiny.walker.spelt("a")
    monkeypatch.setattr(grammar_state, "FREE_S", 0.1)
    monkeypatch.setattr(grammar_state, "MASK_S", 0.0)
    rest = tiny.compile(regex="[ab]{9}").start()
    words = r"its \d+ masks took 0\.\d s; they have 0\.1 s, and 0 ms each\. Write"
    with pytest.raises(ConstraintError, match=words):
        for _ in range(2000):
            for state in states:
                assert a in allowed(state.masks()[0])
                state.advance(a)
    for state in states:
        for _ in range(3):  # and it stays so
            state.advance(a)
            with pytest.raises(ConstraintError, match=words):
                state.masks()
            assert not state.is_over
    assert rest.masks()[0].any()
    again = tiny.compile(grammar=AMBIGUOUS)  # it is not kept, and compiled anew
    assert again is not constraint and again.start().masks()[0].any()


def test_p14_each_mask_brings_time_of_its_own(
    tiny: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(grammar_state, "FREE_S", 1e-9)
    monkeypatch.setattr(grammar_state, "MASK_S", 10.0)
    state = tiny.compile(regex="[ab]{5}").start()
    (a,) = tiny.walker.spelt("a")
    for _ in range(5):
        assert a in allowed(state.masks()[0])
        state.advance(a)


def test_p14_ordinary_grammars_are_far_from_the_limit(tiny: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text in a schema, with a hundredth of the time."""
    monkeypatch.setattr(grammar_state, "FREE_S", 0.05)
    monkeypatch.setattr(grammar_state, "MASK_S", 0.001)
    item = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}
    schema = {"type": "array", "items": item, "minItems": 20}
    constraint = tiny.compile(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    tokens = tiny.walker.complete(constraint, np.random.default_rng(0), 400, 2000)
    assert tokens is not None and len(tokens) > 200


def test_p14_a_regex_of_a_million_states_fails_soon_and_is_not_kept(tiny: Kit) -> None:
    regex = "(a{1000}){1000}"
    for _ in range(2):
        try:
            state = tiny.compile(regex=regex).start()
            with pytest.raises(ConstraintError, match="the grammar cannot go on: "):
                for _ in range(3):
                    state.advance(allowed(state.masks()[0])[0])
        except InvalidRequestError as error:
            assert error.field == "regex"
    tiny.compile(regex="[ab]")
    assert not [source for source in tiny.grammars._compiled if source.text == regex]


def test_p14_who_asks_while_it_is_compiled_gets_the_same_grammar(tiny: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads, of which the first waits in the compiler until all have asked; an error is told to all."""
    arrived, calls = threading.Barrier(9), []
    compiled = grammar._compiled

    def slow(*given: Any) -> Any:
        calls.append(given)
        arrived.wait(20)
        return compiled(*given)

    monkeypatch.setattr(grammar, "_compiled", slow)
    for form, broken in (({"regex": "[xyz]{7}"}, False), ({"regex": "("}, True)):
        calls.clear()
        found: list[object] = []

        def ask(form: Any = form, found: list[object] = found) -> None:
            try:
                found.append(tiny.grammars.compile(source_of(**form)))
            except InvalidRequestError as error:
                found.append(error.field)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(calls) < 1 or sum(thread.is_alive() for thread in threads) < 8:
            pass
        for _ in range(8):  # the others in the compiler, if there were any, would be let go
            threading.Thread(target=arrived.wait, daemon=True).start()
        for thread in threads:
            thread.join(30)
        assert len(found) == 8 and len(calls) == 1 and len(set(found)) == 1
        assert (found[0] == "regex") is broken
        arrived.reset()
