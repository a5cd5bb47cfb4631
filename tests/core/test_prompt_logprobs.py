"""Prompt logprobs, metadata and token masks through the engine: on the null backend, whose numbers are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cortexstream.constraint import Mask, mask_of
from cortexstream.errors import ConstraintError, InvalidRequestError
from cortexstream.plan import TokenScore
from cortexstream.request import FinishReason, Request, SamplingParams
from cortexstream.sampling import unpack
from tests.core.support import PLACEMENTS, Placement, Receiver, dense, engine, request
from tests.core.test_speculation import Knowing, serve

VOCAB = 97


def scores_of(layout: Placement, asked: Request, **options: object) -> tuple[TokenScore, ...]:
    core, _ = engine(layout, **options)  # type: ignore[arg-type]
    (got,) = serve(core, [asked])
    assert got.tokens == dense(asked, VOCAB, 400)
    assert all(event.prompt_scores is None for event in got.events[1:])
    scores = got.events[0].prompt_scores
    assert scores is not None
    return scores


@pytest.mark.parametrize("layout", PLACEMENTS)
def test_f10_prompt_logprobs_are_the_same_in_one_piece_and_in_chunks(layout: Placement) -> None:
    asked = request(0, [random.Random(1).randrange(VOCAB) for _ in range(33)], max_tokens=3, prompt_logprobs=2)
    whole = scores_of(layout, asked, budget=64)
    assert len(whole) == 32 and len({score.logprob for score in whole}) > 20
    for budget in (1, 2, 7, 16, 32, 33):
        assert scores_of(layout, asked, budget=budget) == whole


@pytest.mark.parametrize("layout", PLACEMENTS)
def test_prompt_logprobs_after_a_preemption_and_beside_a_known_prefix(layout: Placement) -> None:
    """What is known of a prompt has no logits any more: such a prompt is computed whole, and the same comes out."""
    rng = random.Random(2)
    shared = [rng.randrange(VOCAB) for _ in range(20)]
    asked = [
        request(i, [*shared, *[rng.randrange(VOCAB) for _ in range(9)]], max_tokens=40, prompt_logprobs=i % 2 or None)
        for i in range(8)
    ]
    core, _ = engine(layout, num_blocks=24, budget=19)
    received = serve(core, asked)
    assert core.stats().preemptions > 0 and core.arena.stats().reused_tokens > 0
    for one, got in zip(asked, received, strict=True):
        assert got.tokens == dense(one, VOCAB, 400)
        scores = got.events[0].prompt_scores
        if one.sampling.prompt_logprobs is None:
            assert scores is None
        else:
            assert scores == scores_of(layout, one, budget=64) and got.events[0].num_cached_tokens == 0


@pytest.mark.parametrize("layout", PLACEMENTS)
def test_prompt_logprobs_after_a_preemption_in_the_middle_of_the_prompt(layout: Placement) -> None:
    """The first request's growth takes the blocks of the second, of whose prompt a part is scored already."""
    asked = [request(0, 4, max_tokens=40), request(1, [11] * 3 + list(range(30)), max_tokens=2, prompt_logprobs=1)]
    core, backend = engine(layout, num_blocks=12, budget=3, prefix_caching=False)
    received = serve(core, asked)
    assert core.stats().preemptions == 1
    starts = [row.start for plan in backend.plans for row in plan.rows if row.seq_id == 1 and row.score is not None]
    assert starts.count(0) == 2 and max(starts[: starts.index(0, 1)]) > 0
    assert received[1].events[0].prompt_scores == scores_of(layout, asked[1], budget=64)


def test_a_prompt_that_is_scored_waits_for_nobodys_prefix() -> None:
    shared = [5] * 30
    core, _ = engine(budget=8)
    for one in (request(0, shared, max_tokens=2), request(1, [*shared, 6], max_tokens=2, prompt_logprobs=0)):
        core.add(one, Receiver())
    core.step()
    assert core.scheduler.num_running == 2 and core.scheduler.num_waiting == 0
    core.run()
    core.check()


def test_a_prompt_of_one_token_has_no_logprobs() -> None:
    assert scores_of("run", request(0, [5], max_tokens=2, prompt_logprobs=0)) == ()


def test_f11_metadata_comes_with_every_token() -> None:
    asked = request(0, 4, max_tokens=5, sampling_metadata=True, bad_token_ids=[1, 2, 3])
    core, _ = engine(vocab_size=VOCAB)
    (got,) = serve(core, [asked])
    assert [e.metadata.num_filtered for e in got.events if e.metadata is not None] == [3] * 5


@pytest.mark.parametrize("layout", PLACEMENTS)
def test_allowed_and_bad_tokens(layout: Placement) -> None:
    allowed = [3, 40, 41, 42, 95]
    core, _ = engine(layout, vocab_size=VOCAB)
    only, without = serve(
        core,
        [
            request(0, 5, max_tokens=40, allowed_token_ids=allowed, bad_token_ids=[41]),
            request(1, 5, max_tokens=40, bad_token_ids=range(0, 97, 2)),
        ],
    )
    assert set(only.tokens) == {3, 40, 42, 95} and len(only.tokens) == 40
    assert all(token % 2 for token in without.tokens) and len(set(without.tokens)) > 15


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 97, 1000])
def test_a_mask_is_bits(vocab_size: int) -> None:
    ids = sorted(random.Random(vocab_size).sample(range(vocab_size), vocab_size // 2))
    mask = mask_of(ids, vocab_size)
    assert mask.dtype == np.uint32 and len(mask) == -(-vocab_size // 32)
    assert np.flatnonzero(unpack(mask, vocab_size)).tolist() == ids
    assert all(mask[token // 32] >> (token % 32) & 1 for token in ids)


class Ascending:
    """A grammar: tokens rise, and the text is whole at the token `last`. It fails behind the token `breaks`."""

    def __init__(self, last: int, breaks: int | None = None) -> None:
        self.last, self.breaks = last, breaks
        self.states: list[AscendingState] = []

    def start(self) -> AscendingState:
        self.states.append(AscendingState(self))
        return self.states[-1]


class AscendingState:
    def __init__(self, grammar: Ascending) -> None:
        self.grammar = grammar
        self.token = -1
        self.asked: list[tuple[int, ...]] = []

    def masks(self, draft: tuple[int, ...] = ()) -> list[Mask]:
        self.asked.append(draft)
        masks: list[Mask] = []
        before, valid = self.token, True
        for token in (*draft, None):
            if before == self.grammar.breaks and not masks:
                raise ConstraintError(f"grammar: nothing may follow token {before}")
            valid = valid and before != self.grammar.breaks
            top = min(self.grammar.last, before + 20)
            masks.append(mask_of(range(before + 1, top + 1) if valid else (), VOCAB))
            if token is not None:
                valid = valid and before < token <= top
                before = token
        return masks

    def advance(self, token: int) -> None:
        if not self.token < token <= self.grammar.last:
            raise ConstraintError(f"grammar: token {token} may not follow {self.token}")
        self.token = token

    @property
    def is_over(self) -> bool:
        return self.token == self.grammar.last


def constrained(number: int, grammar: Ascending, **sampling: Any) -> Request:
    asked = request(number, 4 + number, seed=number, **{"max_tokens": 90, "temperature": 1.0, **sampling})
    return Request(asked.id, asked.prompt_token_ids, asked.sampling, asked.seed, constraint=grammar)


@pytest.mark.parametrize("layout", PLACEMENTS)
def test_p14_a_grammar_holds_in_a_batch_and_after_preemptions(layout: Placement) -> None:
    """Beside free requests, whose tokens stay what they are; alone it draws the same."""
    asked: list[Request] = []
    for i in range(0, 12, 2):
        asked += [constrained(i, Ascending(90 - i)), request(i + 1, 6, max_tokens=40)]
    core, _ = engine(layout, num_blocks=24, vocab_size=VOCAB)
    received = serve(core, asked)
    assert core.stats().preemptions > 0
    for one, got in zip(asked, received, strict=True):
        if one.constraint is None:
            assert got.tokens == dense(one, VOCAB, core.limits.max_tokens)
            continue
        assert got.tokens == sorted(set(got.tokens)) and got.finish is FinishReason.STOP
        assert got.tokens[-1] == 90 - one.id and not got.events[-1].stops
        alone, _ = engine(layout, vocab_size=VOCAB)
        assert serve(alone, [constrained(one.id, Ascending(90 - one.id))])[0].tokens == got.tokens


def test_p14_a_grammar_and_guesses_and_other_bans() -> None:
    """A guess that the grammar refuses is wrong, not an error; masks are asked once for each row."""
    free = request(0, 4, seed=0, max_tokens=90, temperature=1.0)
    plain, _ = engine(vocab_size=VOCAB)
    (expected,) = serve(plain, [constrained(0, Ascending(90))])
    grammar = Ascending(90)
    drafter = Knowing([free], 3, wrong=0.0)
    drafter._full[0] = [*free.prompt_token_ids, *expected.tokens[:4], 1, *expected.tokens[5:]]

    def propose(asks: Sequence[object]) -> list[tuple[int, ...]]:
        known = len(asks[0].sequence.tokens)  # type: ignore[attr-defined]
        return [tuple(drafter._full[0][known : known + asks[0].most])]  # type: ignore[attr-defined]

    drafter.propose = propose  # type: ignore[method-assign]
    core, _ = engine(vocab_size=VOCAB, drafter=drafter)
    (got,) = serve(core, [constrained(0, grammar)])
    assert got.tokens == expected.tokens and got.finish is FinishReason.STOP
    stats = core.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    (state,) = grammar.states
    assert len(state.asked) < len(got.tokens) and any(len(draft) == 3 for draft in state.asked)
    both, _ = engine(vocab_size=VOCAB)
    (banned,) = serve(both, [constrained(0, Ascending(90), bad_token_ids=[expected.tokens[0]], min_tokens=3)])
    assert expected.tokens[0] not in banned.tokens and banned.tokens[-1] == 90
    even, _ = engine(vocab_size=VOCAB)
    (allowed,) = serve(even, [constrained(0, Ascending(90), allowed_token_ids=range(0, 97, 2))])
    assert all(token % 2 == 0 for token in allowed.tokens) and allowed.tokens[-1] == 90


@pytest.mark.parametrize("guesses", [0, 3])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_p14_a_grammar_that_fails_ends_its_request_alone(prefix_caching: bool, guesses: int) -> None:
    others = [request(1, 6, max_tokens=30), request(2, 7, max_tokens=30)]
    plain, _ = engine(vocab_size=VOCAB)
    (expected,) = serve(plain, [constrained(0, Ascending(90))])
    drafter = Knowing([request(0, 4, seed=0, max_tokens=90, temperature=1.0), *others], guesses, wrong=0.0)
    drafter._full[0] = [*range(1, 5), *expected.tokens]
    core, _ = engine(vocab_size=VOCAB, prefix_caching=prefix_caching, drafter=drafter if guesses else None)
    got, *free = serve(core, [constrained(0, Ascending(90, breaks=expected.tokens[3])), *others])
    assert got.tokens == expected.tokens[:4] and got.finish is FinishReason.ERROR
    assert got.error is not None and got.error.startswith("sequence 0, step ")
    assert got.error.endswith(f"grammar: nothing may follow token {expected.tokens[3]}")
    assert [one.tokens for one in free] == [dense(one, VOCAB, 400) for one in others]
    assert core.stats().requests_failed == 1 and core.arena.used_blocks == 0


def test_a_grammar_ends_the_text_whatever_min_tokens_says() -> None:
    core, _ = engine(vocab_size=VOCAB)
    (got,) = serve(core, [constrained(0, Ascending(30), min_tokens=80)])
    assert got.tokens[-1] == 30 and got.finish is FinishReason.STOP


@pytest.mark.parametrize(
    "sampling, message",
    [
        ({"allowed_token_ids": []}, "allowed_token_ids: leaves no token to draw"),
        ({"allowed_token_ids": [3], "bad_token_ids": [3]}, "allowed_token_ids: leaves no token to draw"),
        ({"allowed_token_ids": ["a"]}, "allowed_token_ids: is 'a'; must be a whole number"),
        ({"bad_token_ids": 3}, "bad_token_ids: is 3; must be a list"),
        ({"prompt_logprobs": 21}, "prompt_logprobs: is 21; must be 0 to 20"),
        ({"prompt_logprobs": True}, "prompt_logprobs: is True; must be a whole number"),
        ({"logprobs_mode": "raw"}, "logprobs_mode: is 'raw'; must be 'raw_logprobs' or 'processed_logprobs'"),
        ({"sampling_metadata": 1}, "sampling_metadata: is 1; must be True or False"),
    ],
)
def test_bad_parameters(sampling: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**sampling)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sampling, message",
    [
        ({"allowed_token_ids": [97]}, "allowed_token_ids: has token id 97; the vocabulary has ids 0 to 96"),
        ({"bad_token_ids": [-1]}, "bad_token_ids: has token id -1"),
        ({"bad_token_ids": range(97)}, "bad_token_ids: has all 97 tokens of the vocabulary; leave at least one"),
        ({"allowed_token_ids": [2], "stop_token_ids": [2], "min_tokens": 1}, "min_tokens: is 1, but every token"),
        ({"bad_token_ids": range(96), "stop_token_ids": [96], "min_tokens": 1}, "min_tokens: is 1, but every token"),
    ],
)
def test_bad_parameters_for_a_model(sampling: dict[str, Any], message: str) -> None:
    core, _ = engine(vocab_size=VOCAB)
    with pytest.raises(InvalidRequestError, match=message):
        core.add(request(0, 3, **sampling), Receiver())
    assert not core.has_work


def test_what_bans_leave_without_a_token_takes_nothing_from_others() -> None:
    """A request that contradicts itself fails alone, and what is known of others' prompts stays known."""
    core, _ = engine(vocab_size=VOCAB)
    prompt = [7] * 30
    serve(core, [request(0, prompt, max_tokens=2)])
    (got,) = serve(core, [constrained(1, Ascending(90), allowed_token_ids=[95])])
    assert got.finish is FinishReason.ERROR and got.error is not None and "banned" in got.error
    (again,) = serve(core, [request(2, [*prompt, 8], max_tokens=2)])
    assert again.events[0].num_cached_tokens == 30


class Ending(Ascending):
    """Only the end of the sequence may be drawn, from the first token on."""

    def start(self) -> AscendingState:
        return EndingState(self)


class EndingState(AscendingState):
    def masks(self, draft: tuple[int, ...] = ()) -> list[Mask]:
        return [mask_of([EOS], VOCAB)] + [mask_of((), VOCAB)] * len(draft)

    def advance(self, token: int) -> None:
        assert token == EOS


EOS = 50


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_form_that_is_over_at_once_ends_whatever_min_tokens_says(ignore_eos: bool) -> None:
    """Its end of sequence is no text, also where others would have it in theirs."""
    core, _ = engine(vocab_size=VOCAB, eos_token_id=EOS)
    (got,) = serve(core, [constrained(0, Ending(90), min_tokens=5, ignore_eos=ignore_eos)])
    assert got.tokens == [EOS] and got.finish is FinishReason.STOP and got.events[-1].stops


@pytest.mark.parametrize("guesses", [0, 3])
def test_min_tokens_keep_a_stop_away_while_a_form_can_go_on(guesses: int) -> None:
    stops = list(range(0, 90, 2))
    drafter = Knowing([request(0, 4, seed=0)], guesses, wrong=0.0)
    drafter._full[0] = [1, 2, 3, 4, *range(1, 90, 2)]
    drafter.propose = lambda asks: [tuple(drafter._full[0][4:][: ask.most]) for ask in asks]  # type: ignore[method-assign]
    core, _ = engine(vocab_size=VOCAB, drafter=drafter if guesses else None)
    (got,) = serve(core, [constrained(0, Ascending(90), min_tokens=3, stop_token_ids=stops)])
    assert len(got.tokens) > 3 and all(token % 2 for token in got.tokens[:3])


def test_ignored_ends_do_not_count_as_stops() -> None:
    core, _ = engine(vocab_size=VOCAB, eos_token_id=2)
    (got,) = serve(core, [request(0, 3, max_tokens=4, min_tokens=2, ignore_eos=True, allowed_token_ids=[2])])
    assert got.tokens == [2, 2, 2, 2] and got.finish is FinishReason.LENGTH
