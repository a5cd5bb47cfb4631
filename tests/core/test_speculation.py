"""Guessing ahead changes no token: rows with drafts, rewinds, and where the guesses come from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cortexstream.backend import WarmupReport
from cortexstream.config import EngineConfig, SpeculativeConfig, speculative_config
from cortexstream.engine.budget import split
from cortexstream.engine.core import EngineCore, Sink
from cortexstream.engine.drafting import ModelDrafter
from cortexstream.errors import ArenaError, EngineError, InvalidRequestError
from cortexstream.kv import KVArena
from cortexstream.plan import RowResult
from cortexstream.request import FinishReason, Request
from cortexstream.sequence import Sequence as Served
from cortexstream.speculation import Ask, NgramDrafter, NgramIndex, accepted
from tests.core.steps import answer, scheduler, step, tokens_of
from tests.core.support import PLACEMENTS, Placement, Receiver, dense, engine, null_backend, request

VOCAB = 97


class Knowing:
    """Guesses from what each request draws when served alone, and spoils every guess with probability `wrong`."""

    kv_bytes = 0

    def __init__(self, asked: Sequence[Request], num_tokens: int, wrong: float, seed: int = 0) -> None:
        self.num_tokens = num_tokens
        self.asks: list[list[int]] = []
        self.forgotten: list[int] = []
        self._full = {one.id: [*one.prompt_token_ids, *answers(one)] for one in asked}
        self._wrong = wrong
        self._rng = random.Random(seed)

    def propose(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        self.asks.append([ask.most for ask in asks])
        drafts = []
        for ask in asks:
            known = len(ask.sequence.tokens)
            assert known + ask.most < ask.sequence.limit_tokens  # the draw behind the last guess is the last that fits
            assert ask.sequence.tokens == self._full[ask.sequence.id][:known]
            right = self._full[ask.sequence.id][known : known + ask.most]
            drafts.append(tuple((t + (self._rng.random() < self._wrong)) % VOCAB for t in right))
        return drafts

    def forget(self, seq_id: int) -> None:
        self.forgotten.append(seq_id)

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        return WarmupReport(())

    def close(self) -> None:
        pass


def answers(asked: Request) -> list[int]:
    return dense(replace(asked, sampling=replace(asked.sampling, max_tokens=60)), VOCAB, 400)


def serve(core: EngineCore, asked: Sequence[Request], react: Callable[[int], bool] | None = None) -> list[Receiver]:
    """Requests that join two steps apart; the invariants are proved after every step."""
    waiting = list(asked)
    receivers = {one.id: Receiver(react) for one in asked}
    number = 0
    while waiting or core.has_work:
        if waiting and number % 2 == 0:
            one = waiting.pop(0)
            core.add(one, receivers[one.id])
        core.step()
        core.check()
        number += 1
        assert number < 5000
    return [receivers[one.id] for one in asked]


def workload(seed: int, count: int = 12) -> list[Request]:
    rng = random.Random(seed)
    return [
        request(
            i, [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))], seed=rng.randrange(2**64),
            temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randrange(20, 50), min_tokens=rng.choice([0, 0, 9]),
            stop_token_ids=rng.sample(range(VOCAB), rng.choice([0, 0, 1])),
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("layout", PLACEMENTS)
@pytest.mark.parametrize("wrong", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 4, 9])
def test_p13_guesses_change_no_token(layout: Placement, wrong: float, num_tokens: int) -> None:
    """Greedy and seeded, batched, with blocks for a third of the sequences: right guesses, wrong ones, some of each."""
    asked = workload(num_tokens)
    drafter = Knowing(asked, num_tokens, wrong)
    core, backend = engine(layout, num_blocks=24, budget=48, drafter=drafter)
    received = serve(core, asked)
    for one, got in zip(asked, received, strict=True):
        assert got.tokens == dense(one, VOCAB, core.limits.max_tokens) and got.error is None
    stats = core.stats()
    assert stats.preemptions > 0 and stats.drafted_rows > 20
    assert any(row.drafts for plan in backend.plans for row in plan.rows)
    if wrong == 0.0:
        # What a request's end cuts off of a right guess is not counted as accepted.
        assert stats.acceptance_rate > 0.7 and stats.tokens_per_drafted_row > 1 + 0.5 * min(num_tokens, 4)
    if wrong == 1.0:
        assert stats.accepted_tokens == 0 and stats.tokens_per_drafted_row == 1.0
    assert sorted(drafter.forgotten) == [one.id for one in asked]
    core.check()
    assert core.arena.used_blocks == 0


@pytest.mark.parametrize("layout", PLACEMENTS)
def test_p13_a_right_guess_saves_steps(layout: Placement) -> None:
    asked = [request(0, 5, max_tokens=31)]
    core, backend = engine(layout, drafter=Knowing(asked, 4, wrong=0.0))
    (got,) = serve(core, asked)
    assert len(got.tokens) == 31 and got.finish is FinishReason.LENGTH
    # One token from the prompt, then 30 in rows of five.
    assert sum(bool(plan.rows) for plan in backend.plans) == 1 + 6
    assert core.stats().tokens_per_drafted_row == 5.0 and core.stats().acceptance_rate == 1.0


@pytest.mark.parametrize("layout", PLACEMENTS)
def test_p13_what_wrong_guesses_wrote_is_never_kept(layout: Placement) -> None:
    """A finished sequence's tokens serve the next request; those of guesses behind them must not."""
    first = request(0, 9, max_tokens=20)
    both = [first, request(1, [*first.prompt_token_ids, *dense(first, VOCAB, 400), 7], max_tokens=20)]
    core, _ = engine(layout, drafter=Knowing(both, 5, wrong=0.5))
    for one in both:
        (got,) = serve(core, [one])
        assert got.tokens == dense(one, VOCAB, 400)
    assert got.events[0].num_cached_tokens == 9 + 20 - 1


def test_p13_a_stop_in_the_middle_of_right_guesses_ends_the_text_there() -> None:
    free = dense(request(0, 6, max_tokens=20), VOCAB, 400)
    stop = next(t for i, t in enumerate(free) if i >= 7 and t not in free[:i])
    asked = [request(0, 6, max_tokens=20, stop_token_ids=[stop])]
    core, _ = engine(drafter=Knowing([request(0, 6, max_tokens=20)], 5, wrong=0.0))
    (got,) = serve(core, asked)
    assert got.tokens == free[: free.index(stop) + 1] and got.finish is FinishReason.STOP
    stats = core.stats()  # the prompt's row draws one token; every other one is a row's own or an accepted guess
    assert stats.output_tokens == len(got.tokens) == 1 + stats.drafted_rows + stats.accepted_tokens
    # A receiver that stops at a token gets none of those that the same row drew behind it.
    core, _ = engine(drafter=Knowing([request(0, 6, max_tokens=20)], 5, wrong=0.0))
    (got,) = serve(core, [request(0, 6, max_tokens=20)], react=lambda count: count == 8)
    assert got.tokens == free[:8] and got.finish is FinishReason.STOP


def test_guesses_delay_no_prompt_and_share_what_is_left() -> None:
    """Of a budget of 16: two decoding rows and a chunk come first, guesses share the rest."""
    asked = [request(i, 4, max_tokens=30) for i in range(2)] + [request(2, [9] * 25, max_tokens=4)]
    drafter = Knowing(asked, 6, wrong=1.0)
    core, backend = engine(budget=16, drafter=drafter)
    receivers = [Receiver() for _ in asked]
    for one, receiver in zip(asked[:2], receivers, strict=False):
        core.add(one, receiver)
    for _ in range(3):
        core.step()
    assert drafter.asks[-1] == [6, 6]
    core.add(asked[2], receivers[2])
    core.step()
    assert [len(row.tokens) for row in backend.plans[-1].rows] == [1, 1, 14]
    core.step()
    assert [len(row.tokens) for row in backend.plans[-1].rows] == [2, 2, 11]  # 3 spare tokens: one guess each
    core.run()
    assert max(plan.num_tokens for plan in backend.plans) <= 16


def test_guesses_take_free_blocks_and_preempt_nobody() -> None:
    """Two sequences fill the arena; guesses get the rest of their blocks and no more."""
    asked = [request(i, 10, max_tokens=6) for i in range(2)]
    core, _ = engine("paged", num_blocks=8, drafter=Knowing(asked, 8, wrong=1.0))
    received = serve(core, asked)
    assert [got.tokens for got in received] == [dense(one, VOCAB, 400) for one in asked]
    assert core.stats().preemptions == 0 and core.stats().drafted_rows > 0


def test_a_plan_that_depends_on_draws_in_flight_is_refused() -> None:
    core, _ = engine(drafter=Knowing([request(0, 3)], 2, wrong=0.0))
    it = core.scheduler
    it.add(request(0, 3, max_tokens=9))
    first = it.plan()
    assert it.waits_for_draws
    with pytest.raises(EngineError, match="step 1 must be committed first"):
        it.plan()
    it.commit(answer(first, lambda row: answers(request(0, 3))[0]))
    assert not it.waits_for_draws and it.plan() is not None


def test_a_failed_draw_behind_right_guesses_ends_the_request_there() -> None:
    """Drawn again by a row of its own, it fails again: with the tokens and the error that there are without guesses."""
    asked = [request(0, 5, max_tokens=20)]
    expected = dense(asked[0], VOCAB, 400)
    for drafter, number in ((None, 4), (Knowing(asked, 4, wrong=0.0), 3)):
        core, backend = engine(drafter=drafter)
        backend.spoil = lambda row: row._replace(error="its logits are NaN") if row.token == expected[3] else row
        (got,) = serve(core, asked)
        assert got.tokens == expected[:3] and got.finish is FinishReason.ERROR
        assert got.error == f"sequence 0, step {number}: its logits are NaN"


def test_a_draw_that_failed_once_behind_a_guess_costs_a_step_and_nothing_else() -> None:
    asked = [request(0, 5, max_tokens=20)]
    core, backend = engine(drafter=Knowing(asked, 4, wrong=0.0))
    seen = 0

    def spoil(row: RowResult) -> RowResult:
        nonlocal seen
        seen += 1
        return row._replace(error="its logits are NaN") if seen == 4 else row

    backend.spoil = spoil
    (got,) = serve(core, asked)
    assert got.tokens == dense(asked[0], VOCAB, 400) and got.error is None


def test_a_drafter_that_fails_is_a_failed_step_and_the_next_request_is_served() -> None:
    asked = [request(0, 5, max_tokens=9), request(1, 5, max_tokens=9)]
    drafter = Knowing(asked, 2, wrong=0.0)
    core, _ = engine(drafter=drafter)
    propose = drafter.propose

    def fail(asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        raise EngineError("the draft model failed: no device")

    drafter.propose = fail  # type: ignore[method-assign]
    (got,) = serve(core, asked[:1])
    assert got.finish is FinishReason.ERROR and "the draft model failed: no device" in (got.error or "")
    drafter.propose = propose  # type: ignore[method-assign]
    (got,) = serve(core, asked[1:])
    assert got.tokens == dense(asked[1], VOCAB, 400)


def test_without_guesses_a_row_is_what_it_was() -> None:
    it = scheduler()
    it.add(request(0, 3, max_tokens=4))
    assert tokens_of(step(it), 0) == [103]
    plan = it.plan()
    assert plan is not None and plan.rows[0].drafts == () and not it.waits_for_draws


def test_rewind_has_limits() -> None:
    arena = KVArena(8, 4, "paged")
    handle = arena.admit(10, 20)
    handle.advance(10)
    handle.rewind(9)
    assert handle.position == 9
    arena.publish(handle, list(range(8)))
    for position in (7, 10):
        with pytest.raises(ArenaError, match=f"position {position} is no place to rewind to: 8 to 9 are"):
            handle.rewind(position)
    assert handle.position == 9
    handle.rewind(8)
    handle.advance(2)
    arena.check()


@pytest.mark.parametrize(
    "tokens, expected",
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2]),  # the longest n-gram that occurred
        ([7, 3, 8, 1, 2, 3, 4, 5, 2, 3], [4, 5, 2]),
        ([2, 3, 4, 5, 2, 3, 6, 7, 2, 3], [6, 7, 2]),  # of two places the later one
        ([5, 3, 8, 3], []),  # one token is no n-gram of two
        ([4, 4, 4], [4]),  # it may run into its own end
        ([1], []),
    ],
)
def test_prompt_lookup(tokens: list[int], expected: list[int]) -> None:
    assert list(NgramIndex(2, 3).find(tokens, 3)) == expected
    grown = NgramIndex(2, 3)
    for end in range(1, len(tokens)):
        grown.find(tokens[:end], 3)
    assert list(grown.find(tokens, 3)) == expected


class Counted(list[int]):
    """Counts the pieces that are taken out of it."""

    taken = 0

    def __getitem__(self, where):  # type: ignore[no-untyped-def]
        self.taken += 1
        return super().__getitem__(where)


def test_prompt_lookup_looks_at_new_tokens_only() -> None:
    index, tokens = NgramIndex(2, 4), Counted(range(1000))
    index.find(tokens, 3)
    assert tokens.taken > 2000
    tokens.taken = 0
    tokens.append(7)
    index.find(tokens, 3)
    assert tokens.taken < 10


def test_prompt_lookup_against_a_search_of_all_places() -> None:
    rng = random.Random(3)
    index, tokens = NgramIndex(2, 4), [rng.randrange(4) for _ in range(5)]
    for _ in range(300):
        found = index.find(tokens, 5)
        expected: list[int] = []
        for n in (4, 3, 2):
            places = [e for e in range(n, len(tokens)) if tokens[e - n : e] == tokens[-n:]]
            if places:
                expected = tokens[places[-1] : places[-1] + 5]
                break
        assert list(found) == expected
        tokens += [rng.randrange(4) for _ in range(rng.randrange(1, 4))]


@pytest.mark.parametrize("layout", PLACEMENTS)
def test_p13_prompt_lookup_on_text_that_repeats(layout: Placement) -> None:
    """The null model's text does not repeat, so the drafter's guesses are wrong; what it says stays the same."""
    rng = random.Random(5)
    asked = [request(i, [rng.randrange(3) for _ in range(30)], max_tokens=30) for i in range(6)]
    core, _ = engine(layout, num_blocks=70, drafter=NgramDrafter(4, 2, 4), vocab_size=3)
    received = serve(core, asked)
    for one, got in zip(asked, received, strict=True):
        assert got.tokens == dense(one, 3, core.limits.max_tokens)
    assert core.stats().drafted_rows > 20 and 0.1 < core.stats().acceptance_rate < 0.9


@pytest.mark.parametrize(
    "draft, drawn, count", [([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2], [1, 9, 2], 1), ([1], [None, 1], 0), ([], [5], 0)]
)
def test_accepted(draft: list[int], drawn: list[int | None], count: int) -> None:
    assert accepted(draft, drawn) == count


@pytest.mark.parametrize(
    "value, message",
    [
        (4, "is 4; it must be a dict"),
        ({}, "lacks num_speculative_tokens"),
        ({"num_speculative_tokens": 0}, "has num_speculative_tokens 0; it must be a whole number, 1 to 32"),
        ({"num_speculative_tokens": True}, "has num_speculative_tokens True"),
        ({"num_speculative_tokens": 2, "method": "eagle"}, "has method 'eagle'; it must be ngram or draft_model"),
        ({"num_speculative_tokens": 2, "prompt_lookup_min": 5}, "has prompt_lookup_min 5; it must be a whole number"),
        ({"num_speculative_tokens": 2, "ngram": 3}, "has 'ngram'; known are method, num_speculative_tokens"),
        ({"num_speculative_tokens": 2, "method": "draft_model"}, "has method draft_model, but no model"),
        ({"num_speculative_tokens": 2, "method": "ngram", "model": "x"}, "has a model, but method ngram uses none"),
        ({"num_speculative_tokens": 2, "model": 7}, "has model 7; it must be a folder or a Hugging Face id"),
    ],
)  # fmt: skip
def test_bad_speculative_config(value: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match="speculative_config: " + message.replace("(", r"\(")):
        EngineConfig(speculative_config=value)  # type: ignore[arg-type]


def test_speculative_config() -> None:
    assert speculative_config({"num_speculative_tokens": 3}) == SpeculativeConfig(
        method="ngram", num_speculative_tokens=3
    )
    found = EngineConfig(speculative_config={"model": "m", "num_speculative_tokens": 3}).speculative
    assert found is not None and found.method == "draft_model" and EngineConfig().speculative is None


def test_two_models_share_the_budget_by_what_a_token_takes() -> None:
    large, small = null_backend(window=8), null_backend()  # 32 and 16 bytes a token
    mine, its = split(large, small, EngineConfig(kv_cache_memory=3000))
    assert (mine.kv_cache_memory, its.kv_cache_memory) == (2000, 1000)
    mine, its = split(large, small, EngineConfig(num_kv_blocks=9))
    assert (mine.num_kv_blocks, its.num_kv_blocks) == (9, 9)


def test_p13_a_draft_model_is_asked_with_the_requests_own_parameters_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed, completion and filters decide what is drawn: with others it would guess right by chance only."""
    core, backend = engine(vocab_size=VOCAB)
    drafter, asked, add = ModelDrafter(core, 3), [], core.add

    def watch(one: Request, sink: Sink) -> None:
        asked.append(one)
        add(one, sink)

    monkeypatch.setattr(core, "add", watch)
    given = request(
        4, [5, 6, 7], index=2, seed=99, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.3,
        logit_bias={3: 1.0}, allowed_token_ids=range(90), bad_token_ids=[8], stop_token_ids=[9], logprobs=2,
    )  # fmt: skip
    (draft,) = drafter.propose([Ask(Served(given, 40, frozenset({1}), VOCAB), 3)])
    (one,) = asked
    assert (one.prompt_token_ids, one.seed, one.index) == ((5, 6, 7), 99, 2) and len(draft) == 3
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids")
    for name in (*names, "bad_token_ids"):
        assert getattr(one.sampling, name) == getattr(given.sampling, name), name
    assert one.sampling.max_tokens == 3 and one.sampling.ignore_eos and not one.sampling.stop_token_ids
    target, mine = engine(drafter=drafter)
    target.close()
    assert backend.closed and mine.closed
