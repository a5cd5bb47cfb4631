"""What a caller may ask for, and the states of a sequence (F01 to F04)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cortexstream.errors import EngineError, InvalidRequestError
from cortexstream.kv import KVArena
from cortexstream.plan import PENDING, SampleSpec
from cortexstream.request import FinishReason, Request, SamplingParams
from cortexstream.sequence import Sequence, SequenceState
from tests.core.support import request


def test_f01_a_request_is_immutable_and_copies_its_prompt() -> None:
    prompt = [5, 6, 7]
    asked = Request(3, prompt, SamplingParams(max_tokens=9), seed=1)  # type: ignore[arg-type]
    prompt.append(8)
    assert asked.prompt_token_ids == (5, 6, 7)
    for name, value in (("id", 4), ("prompt_token_ids", (1,)), ("seed", 2), ("sampling", None), ("arrival_s", 0.0)):
        with pytest.raises(FrozenInstanceError):
            setattr(asked, name, value)
    with pytest.raises(FrozenInstanceError):
        asked.sampling.max_tokens = 10  # type: ignore[misc]
    assert (asked.id, asked.sampling.max_tokens, asked.index) == (3, 9, 0)


def test_f01_params_copy_their_collections() -> None:
    stop, ids, bias = ["a"], [1], {2: 0.5}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("b")
    ids.append(3)
    bias[4] = 1.0
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (1,), {2: 0.5})
    assert SamplingParams(stop="end").stop == ("end",)


@pytest.mark.parametrize("bad", [[1.5], ["1"], [True], [None], 7, [np.float32(1)]])
def test_f01_prompts_are_whole_numbers(bad: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompt_token_ids: "):
        Request(0, bad, SamplingParams(), 0)


def test_f01_numpy_prompts_become_plain_numbers() -> None:
    asked = Request(0, np.arange(3, dtype=np.int32), SamplingParams(), 0)  # type: ignore[arg-type]
    assert asked.prompt_token_ids == (0, 1, 2) and all(type(t) is int for t in asked.prompt_token_ids)


def test_f03_arrival_is_now() -> None:
    before = time.time()
    asked = request(0, 1)
    assert before <= asked.arrival_s <= time.time()


VALID: list[dict[str, Any]] = [
    {}, {"temperature": 0}, {"temperature": 0.0}, {"temperature": 5}, {"temperature": np.float32(0.5)}, {"top_p": 1},
    {"top_p": 1e-9}, {"top_k": -1}, {"top_k": 0}, {"top_k": 1}, {"top_k": 10**9}, {"top_k": np.int32(5)},
    {"min_p": 0}, {"min_p": 1}, {"n": 1}, {"n": 128}, {"max_tokens": 1}, {"max_tokens": np.int64(7)},
    {"min_tokens": 256}, {"min_tokens": 3, "max_tokens": 3}, {"seed": None}, {"seed": 0}, {"seed": 2**64 - 1},
    {"seed": np.uint64(2**64 - 1)}, {"stop": []}, {"stop": "x"}, {"stop": ["x"] * 16}, {"stop_token_ids": {4, 5}},
    {"stop_token_ids": np.array([1, 2])}, {"repetition_penalty": 10}, {"repetition_penalty": 0.01},
    {"presence_penalty": -2}, {"presence_penalty": 2}, {"frequency_penalty": -2.0}, {"frequency_penalty": 2.0},
    {"logit_bias": {5: -100, 6: 100}}, {"logprobs": None}, {"logprobs": 0}, {"logprobs": 20}, {"ignore_eos": True},
    # The presets that the first documents gave: code, creative, chat, translation, questions, diversity, deterministic.
    {"temperature": 0.2, "top_k": 5, "top_p": 0.95, "repetition_penalty": 1.15},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.95}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9,
     "repetition_penalty": 1.1}, {"temperature": 0.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.1, "top_k": 3, "top_p": 0.8, "repetition_penalty": 1.3},
    {"temperature": 1.3, "top_k": 100, "top_p": 1.0}, {"temperature": 0.0, "top_k": 1, "top_p": 1.0, "seed": 42},
]  # fmt: skip


@pytest.mark.parametrize("values", VALID, ids=str)
def test_f04_valid_values(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    for name, value in values.items():
        kept = getattr(params, name)
        if name == "top_k":
            assert kept == max(value, 0)
        elif name not in ("stop", "stop_token_ids"):
            assert kept == value
        if kept is not None and not isinstance(kept, (dict, tuple)):
            assert type(kept) in (int, float, bool)  # never numpy's: plans are recorded as JSON
    assert SamplingParams.from_dict(values) == params
    json.dumps([params.n, params.top_k, params.seed, params.stop_token_ids, params.temperature])


INVALID: list[tuple[str, Any, str]] = [
    ("temperature", -0.001, "-0.001; must be 0 (greedy), or 0.001 to 1000"),
    ("temperature", 1e-4, "0.0001; must be 0"),
    ("temperature", math.nan, "nan; must be a finite number"),
    ("temperature", math.inf, "inf; must be a finite number"),
    ("temperature", "0.5", "'0.5'; must be a finite number"),
    ("temperature", "warm", "'warm'; must be a finite number"),
    ("temperature", None, "None; must be a finite number"),
    ("temperature", True, "True; must be a finite number"),
    ("temperature", 10**400, "must be a finite number"),
    ("temperature", [1.0], "must be a finite number"),
    ("top_p", 0.0, "0.0; must be above 0 and at most 1"),
    ("top_p", 1.01, "1.01; must be above 0 and at most 1"),
    ("top_p", -math.inf, "-inf; must be a finite number"),
    ("top_p", math.nan, "nan; must be a finite number"),
    ("top_k", -2, "-2; must be at least 0"),
    ("top_k", 1.0, "1.0; must be a whole number"),
    ("top_k", True, "True; must be a whole number"),
    ("top_k", np.array([1, 2]), "must be a whole number"),
    ("min_p", -0.1, "-0.1; must be 0.0 to 1.0"),
    ("min_p", 1.1, "1.1; must be 0.0 to 1.0"),
    ("n", 0, "0; must be 1 to 128"),
    ("n", 129, "129; must be 1 to 128"),
    ("n", "1", "'1'; must be a whole number"),
    ("n", None, "None; must be a whole number"),
    ("max_tokens", 0, "0; must be at least 1"),
    ("max_tokens", -5, "-5; must be at least 1"),
    ("max_tokens", 2.5, "2.5; must be a whole number"),
    ("max_tokens", "9", "'9'; must be a whole number"),
    ("min_tokens", -1, "-1; must be 0 to 256 (max_tokens)"),
    ("min_tokens", 257, "257; must be 0 to 256 (max_tokens)"),
    ("seed", -1, "-1; must be 0 to 18446744073709551615"),
    ("seed", 2**64, "18446744073709551616; must be 0 to 18446744073709551615"),
    ("seed", 1.0, "1.0; must be a whole number"),
    ("stop", ["a"] * 17, "has 17 strings; at most 16 are allowed"),
    ("stop", ["a", ""], "has an empty string"),
    ("stop", [5], "has 5; every item must be of type str"),
    ("stop", 5, "5; must be a list of items of type str"),
    ("stop_token_ids", [1, "2"], "'2'; must be a whole number"),
    ("stop_token_ids", 3, "3; must be a list of items of type int"),
    ("repetition_penalty", 0.0, "0.0; must be 0.01 to 10.0"),
    ("repetition_penalty", 10.5, "10.5; must be 0.01 to 10.0"),
    ("presence_penalty", 2.1, "2.1; must be -2.0 to 2.0"),
    ("presence_penalty", -2.1, "-2.1; must be -2.0 to 2.0"),
    ("frequency_penalty", -2.1, "-2.1; must be -2.0 to 2.0"),
    ("frequency_penalty", 2.1, "2.1; must be -2.0 to 2.0"),
    ("logit_bias", {7: 100.5}, "100.5 for token 7; must be -100.0 to 100.0"),
    ("logit_bias", {7: -101}, "-101.0 for token 7; must be -100.0 to 100.0"),
    ("logit_bias", {7: math.nan}, "nan; must be a finite number"),
    ("logit_bias", {"7": 1.0}, "'7'; must be a whole number"),
    ("logit_bias", [7], "must map token ids to numbers"),
    ("logprobs", 21, "21; must be 0 to 20"),
    ("logprobs", -1, "-1; must be 0 to 20"),
    ("logprobs", True, "True; must be a whole number"),
    ("ignore_eos", 1, "1; must be True or False"),
    ("skip_special_tokens", "yes", "'yes'; must be True or False"),
    ("include_stop_str_in_output", None, "None; must be True or False"),
]


@pytest.mark.parametrize(("field", "value", "words"), INVALID, ids=lambda v: str(v)[:30])
def test_f04_invalid_values_name_field_value_and_limit(field: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ") and words in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_f04_unknown_names() -> None:
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=1)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequestError, match=r"^top_q: unknown sampling parameter; known are .*top_p"):
        SamplingParams.from_dict({"top_q": 1})


def sequence(**sampling: Any) -> Sequence:
    eos = frozenset({2, 3})
    return Sequence(request(7, (10, 11, 12), **sampling), limit_tokens=20, eos_token_ids=eos, vocab_size=1000)


def waiting() -> Sequence:
    return sequence()


def running() -> Sequence:
    made = sequence()
    made.start(KVArena(8, 4).admit(4), 5)
    return made


def finished() -> Sequence:
    made = running()
    made.end(FinishReason.LENGTH)
    return made


def state(it: Sequence) -> SequenceState:
    return it.state  # a call, so that a type checker does not remember the answer


def start(it: Sequence) -> None:
    it.start(KVArena(8, 4).admit(4), 1)


def preempt(it: Sequence) -> None:
    it.preempt()


def end(it: Sequence) -> None:
    it.end(FinishReason.ABORT)


def test_f02_the_legal_chain() -> None:
    made, arena = sequence(), KVArena(8, 4)
    handle = arena.admit(4)
    assert state(made) is SequenceState.WAITING and (made.slot, made.num_computed) == (-1, 0)
    made.start(handle, 5)
    assert state(made) is SequenceState.RUNNING and (made.slot, made.handle) == (5, handle)
    handle.advance(3)
    assert made.num_computed == 3
    assert made.preempt() is handle
    assert state(made) is SequenceState.WAITING and (made.slot, made.handle, made.num_computed) == (-1, None, 0)
    made.start(arena.admit(4), 0)
    again = made.handle
    assert made.end(FinishReason.STOP) is again
    assert state(made) is SequenceState.FINISHED
    assert (made.slot, made.handle, made.finish) == (-1, None, FinishReason.STOP)
    early = waiting()
    assert early.end(FinishReason.ABORT) is None and state(early) is SequenceState.FINISHED


@pytest.mark.parametrize(
    ("make", "act", "words"),
    [
        (waiting, preempt, "request 7 is waiting; this needs it to be running"),
        (running, start, "request 7 is running; this needs it to be waiting"),
        (finished, start, "request 7 is finished; this needs it to be waiting"),
        (finished, preempt, "request 7 is finished; this needs it to be running"),
        (finished, end, r"request 7 is finished already \(length\)"),
    ],
)
def test_f02_illegal_transitions(make: Callable[[], Sequence], act: Callable[[Sequence], None], words: str) -> None:
    made = make()
    before = (made.state, made.slot, made.handle, made.finish)
    with pytest.raises(EngineError, match=words):
        act(made)
    assert (made.state, made.slot, made.handle, made.finish) == before


def test_rows_follow_each_other() -> None:
    made = running()
    handle = made.handle
    assert handle is not None
    first = made.next_row(2)
    assert (first.seq_id, first.slot, first.tokens, first.start, first.sample) == (7, 5, (10, 11), 0, None)
    assert first.kv == handle.rows and handle.position == 2 and made.draws_pending == 0
    last = made.next_row(1)
    assert (last.tokens, last.start, last.sample) == ((12,), 2, made.sample_spec()._replace())
    assert (made.draws_pending, made.num_tokens, made.num_output) == (1, 4, 0)
    decode = made.next_row(1)  # before the drawn token is known
    assert (decode.tokens, decode.start, made.draws_pending, made.num_tokens) == ((PENDING,), 3, 2, 5)
    made.tokens += [13, 14]
    made.draws_pending = 0
    assert made.num_output == 2
    made.preempt()
    made.start(KVArena(8, 4).admit(6), 0)
    assert made.next_row(5).tokens == (10, 11, 12, 13, 14)  # computed again in one row


def test_a_recomputed_row_may_end_in_a_pending_token() -> None:
    made = running()
    made.draws_pending = 1
    assert made.handle is not None and made.next_row(3).sample is None  # the fourth is on its way
    made.handle.reset()
    row = made.next_row(4)
    assert row.tokens == (10, 11, 12, PENDING) and row.sample is not None


def test_stop_ids() -> None:
    assert sequence(stop_token_ids=(8,)).stop_ids == {2, 3, 8}
    assert sequence(stop_token_ids=(8,), ignore_eos=True).stop_ids == {8}
    assert sequence().stop_ids == {2, 3}


def test_the_spec_carries_every_parameter() -> None:
    asked = request(
        1, (4, 5), index=3, seed=99, temperature=0.5, top_k=4, top_p=0.6, min_p=0.1, logprobs=2, logit_bias={9: 1.5},
    )  # fmt: skip
    made = Sequence(asked, 20, frozenset({2}), 1000)
    assert made.sample_spec() == SampleSpec(0.5, 4, 0.6, 0.1, 99, 3, 2, logit_bias=((9, 1.5),))
    made.start(KVArena(8, 4).admit(8), 0)
    assert made.next_row(2).sample is made.next_row(1).sample  # nothing varies: one object for all steps


def test_the_spec_bans_stops_until_min_tokens() -> None:
    made = sequence(min_tokens=2, stop_token_ids=(8,))
    bans = []
    for token in (20, 21, 22):
        bans.append(made.sample_spec().banned)
        made.tokens.append(token)
    assert bans == [(2, 3, 8), (2, 3, 8), ()]
    ahead = sequence(min_tokens=2)
    ahead.draws_pending = 2  # two tokens are on their way: the next is the third
    assert ahead.sample_spec().banned == ()
    ahead.draws_pending = 1
    assert ahead.sample_spec().banned == (2, 3)


@pytest.mark.parametrize("pending", [0, 1])
def test_what_is_banned_always_stays_banned_until_min_tokens_and_after(pending: int) -> None:
    """Beside the stops, whether they are among what is banned or not; a guess counts as a token."""
    made = sequence(min_tokens=2, stop_token_ids=(8,), bad_token_ids=(5, 3, 900))
    made.tokens += [20] * (1 - pending)
    made.draws_pending = pending
    assert made.sample_spec().banned == (2, 3, 5, 8, 900)
    assert made.sample_spec((30,)).banned == (3, 5, 900)
    made.tokens.append(21)
    assert made.sample_spec().banned == (3, 5, 900)


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_the_spec_carries_what_penalties_need(name: str) -> None:
    made = sequence(**{name: 1.5})
    assert made.sample_spec().prompt_tokens == (10, 11, 12) and made.sample_spec().output_tokens == ()
    made.tokens += [40, 41]
    made.draws_pending = 1
    spec = made.sample_spec()
    assert spec.penalised and getattr(spec, name) == 1.5
    assert spec.output_tokens == (40, 41, PENDING) and spec.prompt_tokens == (10, 11, 12)


HUGE = 1 << 100_000
WRONG: list[Any] = [
    HUGE,
    [HUGE],
    "x" * 10**6,
    b"1",
    np.bool_(True),
    np.array([1, 2]),
    float("nan"),
    {"a": 1},
    object(),
    [[1]],
]


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams) if f.init])
@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_whatever_is_given_is_taken_or_refused_in_one_sentence(name: str, value: Any) -> None:
    """Nothing but an InvalidRequestError, of a length that people read; bytes and NumPy's bools are nothing."""
    ids = ("stop_token_ids", "bad_token_ids", "allowed_token_ids")  # of which limits are the model's
    taken = {"huge": ("max_tokens", "top_k", *ids), "array": ids, "text": ("stop", "grammar")}
    kind = (
        "huge"
        if value is HUGE or (isinstance(value, list) and value == [HUGE])
        else "text"
        if isinstance(value, str)
        else "array"
    )
    try:
        SamplingParams(**{name: value})
    except InvalidRequestError as error:
        assert str(error).startswith(name) and "\n" not in str(error) and len(str(error)) < 400
    else:
        assert name in taken[kind]


@pytest.mark.parametrize("values", [3, None, [("n", 2)]])
def test_from_dict_needs_a_mapping(values: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"sampling_params: is .*; must map names to values"):
        SamplingParams.from_dict(values)


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(1), 1, Fraction(1, 2)])
def test_numbers_of_any_kind_are_numbers(value: Any) -> None:
    assert SamplingParams(temperature=value).temperature == float(value)
