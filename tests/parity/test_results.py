"""What torch and MLX tell of draws and prompts, against the definition: whose it is, how much, in which order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from cortexstream import sampling
from cortexstream.backends.common.rows import BANNED, BROKEN
from cortexstream.backends.common.score import score_tokens
from cortexstream.constraint import mask_of
from cortexstream.plan import PENDING, KVRows, PlanRow, RowResult, RowScores, SampleSpec, Score
from tests.conftest import require

Floats = npt.NDArray[np.float32]
VOCAB = 45
BEFORE = 7  # what PENDING stands for


class Row(NamedTuple):
    """One draw, and what it drew."""

    spec: SampleSpec
    logits: Floats
    token: int
    broken: bool


KINDS = [
    SampleSpec(), SampleSpec(logprobs=0), SampleSpec(logprobs=1), SampleSpec(logprobs=3), SampleSpec(logprobs=20),
    SampleSpec(temperature=0.8, logprobs=5, processed=True), SampleSpec(metadata=True),
    SampleSpec(temperature=0.8, top_k=6, logprobs=2, metadata=True),
    SampleSpec(temperature=1.0, frequency_penalty=0.5, output_tokens=(3, PENDING), logprobs=4, processed=True),
    SampleSpec(logprobs=2, banned=(0, 4)), SampleSpec(metadata=True, mask=lambda: mask_of((), VOCAB)),
    SampleSpec(logprobs=2, banned=tuple(range(VOCAB))), SampleSpec(mask=lambda: mask_of((), VOCAB)),
]  # fmt: skip


def torch_results(rows: Sequence[Row]) -> tuple[RowResult, ...]:
    torch: Any = require("torch")
    from cortexstream.backends.cuda.results import draws_of, on_the_way, results_of

    specs, logits, tokens, broken = zip(*rows, strict=True)
    planned = [PlanRow(n, n, (1,), 0, KVRows((n,), False), spec) for n, spec in enumerate(specs)]
    sent = on_the_way(torch.from_numpy(np.stack(logits)), specs, torch.tensor(tokens), torch.tensor(broken))
    return results_of(draws_of(planned), sent, dict.fromkeys(range(len(rows)), BEFORE))


def mlx_results(rows: Sequence[Row]) -> tuple[RowResult, ...]:
    """The arrays hold the draws backwards: a draw says where it is."""
    mx: Any = require("mlx")
    require("mlx_lm")
    from cortexstream.backends.mlx.results import Draw, draws_of, results_of

    specs, logits, tokens, broken = zip(*rows[::-1], strict=True)
    sent = draws_of(mx.array(np.stack(logits)), specs, mx.array(tokens, mx.int32), mx.array(broken))
    draws = [Draw(n, n, row.spec, len(rows) - 1 - n) for n, row in enumerate(rows)]
    return results_of(draws, sent, dict.fromkeys(range(len(rows)), BEFORE))


def torch_scores(score: Score, logits: Floats) -> tuple[RowScores, ...]:
    """Beside a row that is not scored, and another that is."""
    torch: Any = require("torch")
    from cortexstream.backends.cuda.results import scores_of

    count = len(score.targets)
    scores = (None, Score((1, 2), 1), score)
    rows = [PlanRow(n, n, (1,) * 9, 0, KVRows((n,), False), None, (), one) for n, one in enumerate(scores)]
    both = torch.from_numpy(np.concatenate((logits[::-1][:2], logits[:count])))
    return tuple(found.result() for found in scores_of(rows, both))[1:]


def mlx_scores(score: Score, logits: Floats) -> tuple[RowScores, ...]:
    mx: Any = require("mlx")
    require("mlx_lm")
    from cortexstream.backends.mlx.results import scores_of

    return (scores_of(2, score, mx.array(logits)).result(),)


RESULTS: dict[str, Callable[[Sequence[Row]], tuple[RowResult, ...]]] = {"torch": torch_results, "mlx": mlx_results}
SCORES: dict[str, Callable[[Score, Floats], tuple[RowScores, ...]]] = {"torch": torch_scores, "mlx": mlx_scores}


def coarse(rng: np.random.Generator) -> Floats:
    """Few levels, so that many tokens are equally likely: at the border of the likeliest, and among them."""
    return rng.integers(0, int(rng.integers(2, 9)), VOCAB).astype(np.float32)


Top = tuple[tuple[int, float], ...]


def same(logprob: float | None, top: Top, wanted: float | None, wanted_top: Top) -> None:
    """The same tokens in the same order, and their logprobs but for rounding."""
    assert logprob == (None if wanted is None else pytest.approx(wanted, abs=1e-5))
    assert [token for token, _ in top] == [token for token, _ in wanted_top]
    assert [value for _, value in top] == pytest.approx([value for _, value in wanted_top], abs=1e-5)


def row_of(spec: SampleSpec, numbers: np.random.Generator, spoilt: bool) -> Row:
    logits = coarse(numbers)
    if spoilt:
        logits[numbers.integers(VOCAB)] = np.nan
    z = sampling.bias(logits, spec)
    return Row(spec, logits, int(numbers.integers(VOCAB)), not np.isfinite(z.max()))


@pytest.mark.parametrize("name", RESULTS)
def test_f10_f11_what_is_told_of_a_draw_is_its_own_whatever_is_beside_it(name: str) -> None:
    """Of draws that ask for nothing, little, much, and what only the host can tell, some of them broken."""
    rng, numbers = random.Random(1), np.random.default_rng(1)
    for _ in range(30):
        kinds = [rng.choice(KINDS) for _ in range(rng.randint(1, 8))]
        rows = [row_of(spec, numbers, rng.random() < 0.2) for spec in kinds]
        for number, (row, found) in enumerate(zip(rows, RESULTS[name](rows), strict=True)):
            assert found.seq_id == number
            if row.broken:
                banned = bool(np.isfinite(row.logits).all())
                assert found == RowResult(number, 0, error=BANNED if banned else BROKEN, finite=banned)
                continue
            history = tuple(BEFORE if token == PENDING else token for token in row.spec.output_tokens)
            told = sampling.describe(row.logits, row.spec._replace(output_tokens=history), row.token)
            assert (found.token, found.error, found.finite) == (row.token, None, True)
            assert found.metadata == told.metadata
            same(found.logprob, found.top_logprobs, told.logprob, told.top_logprobs)


@pytest.mark.parametrize("count", [0, 1, 4, 20])
@pytest.mark.parametrize("name", SCORES)
def test_f10_the_likeliest_at_a_prompts_tokens_are_in_the_definitions_order(name: str, count: int) -> None:
    """Likeliest first, of equals the lowest id first."""
    numbers = np.random.default_rng(count)
    logits = np.stack([coarse(numbers) for _ in range(9)])
    score = Score(tuple(numbers.integers(0, VOCAB, 9).tolist()), count)
    (found,) = SCORES[name](score, logits)
    assert found.seq_id == 2
    for one, expected in zip(found.scores, score_tokens(logits, score), strict=True):
        same(*one, *expected)
