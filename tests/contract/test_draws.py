"""What a row may ask of its draws, held by every backend: several draws of a row, scores, masks, metadata."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cortexstream.backend import Backend
from cortexstream.backends.common.rows import BANNED
from cortexstream.constraint import Mask, mask_of
from cortexstream.errors import EngineError
from cortexstream.plan import PENDING, PlanRow, RowResult, RowScores, SampleSpec, Score, StepPlan
from tests.contract.plans import CASES, GREEDY, prompt, rows_at

REAL = [case for case in CASES if case[0] != "null"]  # the null model has no penalties
HOT = SampleSpec(temperature=0.9, seed=77, top_k=40, logprobs=2)


def run(device: Backend, step: int, *rows: PlanRow) -> tuple[tuple[RowResult, ...], tuple[RowScores, ...]]:
    result = device.collect(device.submit(StepPlan(step, rows)))
    return result.rows, result.scores


def decode(device: Backend, first_block: int, spec: SampleSpec, count: int) -> list[RowResult]:
    """A prompt of 20 tokens, then one token a step."""
    kv, tokens = rows_at(device, first_block, 4), prompt(20)
    results = [run(device, 1, PlanRow(5, 0, tokens, 0, kv, spec))[0][0]]
    for step in range(2, count + 1):
        results.append(run(device, step, PlanRow(5, 0, (results[-1].token,), 18 + step, kv, spec))[0][0])
    return results


@pytest.mark.parametrize("spec", [GREEDY._replace(logprobs=2), HOT], ids=["greedy", "seeded"])
def test_p13_a_row_with_guesses_draws_what_single_steps_draw(backend: Backend, spec: SampleSpec) -> None:
    """Right guesses and wrong ones, beside a decoding row and a prompt; what a wrong guess left is written over."""
    expected = decode(backend, 0, spec, 7)
    tokens = [result.token for result in expected]
    wrong = (tokens[4] + 1) % 300
    kv, other = rows_at(backend, 4, 4), rows_at(backend, 8, 4)
    run(backend, 10, PlanRow(5, 0, prompt(20), 0, kv, spec), PlanRow(6, 1, prompt(9, 1), 0, other, spec))
    guesses = PlanRow(5, 0, (tokens[0], tokens[1], tokens[2], wrong), 20, kv, spec, (spec,) * 3)
    beside = PlanRow(6, 1, (PENDING,), 9, other, spec)
    third = PlanRow(7, 2, prompt(30, 2), 0, rows_at(backend, 12, 4), spec)
    rows, _ = run(backend, 11, guesses, beside, third)
    assert [row.seq_id for row in rows] == [5, 5, 5, 5, 6, 7]
    assert [row.token for row in rows[:3]] == tokens[1:4]
    for found, single in zip(rows[:3], expected[1:4], strict=True):
        assert found.logprob == pytest.approx(single.logprob, abs=1e-4)
        assert [token for token, _ in found.top_logprobs] == [token for token, _ in single.top_logprobs]
    again = PlanRow(5, 0, (tokens[3], tokens[4], tokens[5]), 23, kv, spec, (spec,) * 2)
    assert [row.token for row in run(backend, 12, again)[0]] == tokens[4:7]


@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_p13_penalties_see_the_guesses(backend: Backend) -> None:
    """The spec of each draw holds the history that it would have: so the draws are those of single steps."""

    def spec(made: list[int]) -> SampleSpec:
        return SampleSpec(
            frequency_penalty=1.5, repetition_penalty=1.4, prompt_tokens=prompt(20), output_tokens=tuple(made)
        )

    kv, made = rows_at(backend, 0, 4), [0][:0]
    made.append(run(backend, 1, PlanRow(5, 0, prompt(20), 0, kv, spec([])))[0][0].token)
    for step in range(2, 7):
        made.append(run(backend, step, PlanRow(5, 0, (made[-1],), 18 + step, kv, spec(made)))[0][0].token)
    kv = rows_at(backend, 4, 4)
    run(backend, 7, PlanRow(5, 0, prompt(20), 0, kv, spec([])))
    specs = tuple(spec(made[: n + 1]) for n in range(4))
    rows, _ = run(backend, 8, PlanRow(5, 0, tuple(made[:4]), 20, kv, specs[-1], specs[:-1]))
    assert [row.token for row in rows] == made[1:5]


def test_f10_scores_do_not_depend_on_chunks_or_company(backend: Backend) -> None:
    tokens = prompt(40)
    whole = PlanRow(5, 0, tokens, 0, rows_at(backend, 0, 4), GREEDY, score=Score(tokens[1:], 3))
    drawn, (scored,) = run(backend, 1, whole, PlanRow(6, 1, prompt(5, 1), 0, rows_at(backend, 4, 2), GREEDY))
    assert len(drawn) == 2 and scored.seq_id == 5 and len(scored.scores) == 39
    pieces, kv = [], rows_at(backend, 8, 4)
    for step, (start, end) in enumerate([(0, 1), (1, 17), (17, 39), (39, 40)], 2):
        last = end == 40
        score = Score(tokens[start + 1 : end + 1], 3) if not last else None
        row = PlanRow(7, 2, tokens[start:end], start, kv, GREEDY if last else None, score=score)
        draws, scores = run(backend, step, row)
        pieces += [one for scored in scores for one in scored.scores]
    assert draws[0].token == drawn[0].token and len(pieces) == 39
    for one, other in zip(scored.scores, pieces, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top_logprobs] == [token for token, _ in other.top_logprobs]
        assert backend.info.name == "null" or (len(one.top_logprobs) == 3 and one.logprob < 0)


def test_p14_masks_rows_and_bans_together(backend: Backend) -> None:
    """Each row draws from its own mask; a mask is asked for once, and one that leaves nothing ends its row alone."""
    rng = random.Random(4)
    calls = [0] * 6
    allowed = [sorted(rng.sample(range(384), 9)) for _ in calls]

    def mask(row: int) -> SampleSpec:
        def words() -> Mask:
            calls[row] += 1
            return mask_of(() if row == 3 else allowed[row], 384)

        spec = SampleSpec(temperature=1.0 if row % 2 else 0.0, seed=row, logprobs=1, mask=words)
        return spec._replace(banned=tuple(allowed[row][1:])) if row == 5 else spec

    for first in (0, 3):
        rows = [
            PlanRow(row, row - first, prompt(6, row), 0, rows_at(backend, 4 * (row - first), 2), mask(row))
            for row in range(first, first + 3)
        ]
        free = PlanRow(9, 3, prompt(6), 0, rows_at(backend, 16, 2), GREEDY)
        results, _ = run(backend, 1 + first, *rows, free)
        for row, result in zip(range(first, first + 3), results, strict=False):
            if row == 3:
                assert result.error is not None
            else:
                assert result.error is None and result.token in allowed[row]
        assert results[3].error is None and results[3].token == decode_first(backend, first)
        if first:
            assert results[2].token == allowed[5][0]
    assert calls == [1] * 6


def decode_first(device: Backend, first: int) -> int:
    return run(device, 2 + first, PlanRow(9, 3, prompt(6), 0, rows_at(device, 16, 2), GREEDY))[0][0].token


def test_p14_a_mask_is_asked_for_after_the_forward_pass(
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a device works by itself, a grammar then works beside it."""
    inner = {
        "null": ("_write", backend), "reference": ("_forward", backend),
        "mlx": ("decode", getattr(backend, "_forward", None)), "cuda": ("logits", getattr(backend, "_run_rows", None)),
    }  # fmt: skip
    name, owner = inner[backend.info.name]
    done: list[str] = []
    real = getattr(owner, name)

    def watched(*arguments: object) -> object:
        result = real(*arguments)
        done.append("forward")
        return result

    def words() -> Mask:
        done.append("mask")
        return mask_of(range(384), 384)

    monkeypatch.setattr(owner, name, watched)
    run(backend, 1, PlanRow(5, 0, prompt(6), 0, rows_at(backend, 0, 2), SampleSpec(mask=words)))
    assert done == ["forward", "mask"]


@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_p14_a_row_without_a_token_to_draw_has_computed_nothing_wrong(backend: Backend) -> None:
    """Whatever took the last one: its logits are numbers, so nobody has to forget what it computed."""
    half = tuple(range(200))
    kinds = {
        "banned": SampleSpec(banned=tuple(range(384))), "mask": SampleSpec(mask=lambda: mask_of((), 384)),
        "bias": SampleSpec(logit_bias=tuple((token, -np.inf) for token in range(384))),
        "both": SampleSpec(temperature=1.0, banned=half, mask=lambda: mask_of(half, 384)),
    }  # fmt: skip
    for step, (kind, spec) in enumerate(kinds.items(), 1):
        (found,), _ = run(backend, step, PlanRow(step, 0, prompt(6), 0, rows_at(backend, 0, 2), spec))
        assert found == RowResult(step, 0, error=BANNED), kind


@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_f11_metadata_of_a_draw_whose_history_is_not_known_yet(backend: Backend) -> None:
    """The row before draws in the step before: its token counts for the penalty, on the host, too."""
    kv, tokens = rows_at(backend, 0, 4), prompt(20)
    spec = SampleSpec(
        temperature=0.7, seed=3, top_p=0.9, frequency_penalty=2.0, prompt_tokens=tokens, logprobs=4, processed=True,
        metadata=True,
    )  # fmt: skip
    first = backend.submit(StepPlan(1, (PlanRow(5, 0, tokens, 0, kv, spec),)))
    waiting = PlanRow(5, 0, (PENDING,), 20, kv, spec._replace(output_tokens=(PENDING,)))
    second = backend.submit(StepPlan(2, (waiting,)))
    drawn = backend.collect(first).rows[0]
    (found,) = backend.collect(second).rows
    kv = rows_at(backend, 4, 4)
    run(backend, 3, PlanRow(5, 0, tokens, 0, kv, spec))
    (known,), _ = run(backend, 4, PlanRow(5, 0, (drawn.token,), 20, kv, spec._replace(output_tokens=(drawn.token,))))
    assert found.token == known.token and found.metadata is not None and known.metadata is not None
    assert found.logprob == pytest.approx(known.logprob, abs=1e-4)
    assert found.metadata.num_filtered == known.metadata.num_filtered > 300
    assert found.metadata.chosen_prob == pytest.approx(known.metadata.chosen_prob, abs=1e-4)
    assert found.logprob is not None and np.exp(found.logprob) == pytest.approx(found.metadata.chosen_prob, abs=1e-5)


@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_guesses_and_scores_that_break_the_contract_are_refused_before_anything_is_written(backend: Backend) -> None:
    kv = rows_at(backend, 4, 2)
    hist = GREEDY._replace(presence_penalty=0.5, output_tokens=(PENDING,))
    good = PlanRow(6, 1, prompt(5), 0, rows_at(backend, 0, 2), GREEDY)
    before = decode_first(backend, 0)
    for number, (row, message) in enumerate([
        (PlanRow(5, 0, (5,), 0, kv, GREEDY, (GREEDY,) * 2), "has 1 tokens and 3 draws"),
        (PlanRow(5, 0, (5, 6, 7), 0, kv, GREEDY, (GREEDY,)), "has 3 tokens and 2 draws"),
        (PlanRow(5, 0, (5, 6), 0, kv, None, (GREEDY,)), "has 2 tokens and 0 draws"),
        (PlanRow(5, 0, (5, 6), 0, kv, GREEDY, (hist,)), "guesses behind a pending token"),
        (PlanRow(5, 0, (5, 6), 0, kv, GREEDY, (), Score((1, 2, 3), 2)), "scores 3 targets; it feeds 2 tokens"),
        (PlanRow(5, 0, (5, 6), 0, kv, GREEDY, (), Score((1, 999), 2)), "scores tokens 1 to 999; ids are 0 to 383"),
        (PlanRow(5, 0, (5, 6), 0, kv, GREEDY, (), Score((PENDING,), 2)), "scores tokens -1 to -1"),
    ], 10):  # fmt: skip
        with pytest.raises(EngineError, match=message):
            backend.submit(StepPlan(number, (good, row)))
    assert decode_first(backend, 30) == before


@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_a_row_goes_on_from_its_draw_whatever_was_drawn_beside_it(backend: Backend) -> None:
    """A row with guesses before it in the plan, with more draws than rows: PENDING is its own draw."""
    a, b = rows_at(backend, 0, 3), rows_at(backend, 4, 3)
    first = backend.submit(StepPlan(1, (
        PlanRow(5, 0, prompt(6, 1), 0, a, GREEDY), PlanRow(6, 1, prompt(9, 2), 0, b, GREEDY),
    )))  # fmt: skip
    known = [row.token for row in backend.collect(first).rows]
    guesses = PlanRow(5, 0, (known[0], 300, 301), 6, a, GREEDY, (GREEDY,) * 2)
    second = backend.submit(StepPlan(2, (guesses, PlanRow(6, 1, (known[1],), 9, b, GREEDY))))
    third = backend.submit(StepPlan(3, (PlanRow(6, 1, (PENDING,), 10, b, GREEDY),)))
    drawn = backend.collect(second).rows[3].token
    found = backend.collect(third).rows[0].token
    again = rows_at(backend, 8, 3)
    assert run(backend, 4, PlanRow(7, 2, (*prompt(9, 2), known[1]), 0, again, GREEDY))[0][0].token == drawn
    assert run(backend, 5, PlanRow(7, 2, (drawn,), 10, again, GREEDY))[0][0].token == found


@pytest.mark.parametrize("backend", REAL, indirect=True)
def test_a_described_draw_beside_a_broken_one_is_told_of_its_own_logits(backend: Backend) -> None:
    spec = SampleSpec(temperature=0.8, seed=1, logprobs=2, processed=True, metadata=True)
    broken = spec._replace(mask=lambda: mask_of((), 384))
    rows = [
        PlanRow(5, 0, prompt(6, 1), 0, rows_at(backend, 0, 2), broken),
        PlanRow(6, 1, prompt(9, 2), 0, rows_at(backend, 4, 2), spec),
    ]
    bad, good = run(backend, 1, *rows)[0]
    (alone,) = run(backend, 2, rows[1])[0]
    assert bad.error is not None and good.token == alone.token and good.metadata is not None
    assert good.logprob == pytest.approx(alone.logprob, abs=1e-4) and alone.metadata is not None
    assert good.metadata.entropy == pytest.approx(alone.metadata.entropy, abs=1e-4)
