"""What holds for every sampler: rows do not depend on each other (F73), edge cases (F74), masks."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest

from cortexstream import sampling
from cortexstream.constraint import Mask, mask_of
from cortexstream.plan import SampleSpec
from tests.kernels.samplers import SAMPLERS, Sampler
from tests.kernels.test_mlx_sample import random_spec

Floats = npt.NDArray[np.float32]


@pytest.fixture(params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return SAMPLERS[request.param]


def f32(*values: float) -> Floats:
    return np.array([values], np.float32)


KEPT: list[tuple[list[float], dict[str, float], set[int]]] = [  # chances, filters, what may be drawn
    ([0.4, 0.3, 0.15, 0.1, 0.05], {}, {0, 1, 2, 3, 4}),
    ([0.4, 0.3, 0.15, 0.1, 0.05], {"top_p": 0.9}, {0, 1, 2, 3}),  # with the token that crosses 0.9
    ([0.95, 0.02, 0.02, 0.01], {"top_p": 0.9}, {0}),
    ([0.05, 0.1, 0.15, 0.3, 0.4], {"top_p": 0.9}, {1, 2, 3, 4}),
    ([0.4, 0.3, 0.15, 0.1, 0.05], {"top_p": 1e-46}, {0}),
    ([0.1, 0.2, 0.2, 0.15, 0.2, 0.15], {"top_k": 1}, {1, 2, 4}),  # ties at a threshold stay
    ([0.1, 0.2, 0.2, 0.15, 0.2, 0.15], {"top_k": 4}, {1, 2, 3, 4, 5}),
    ([0.1, 0.2, 0.2, 0.15, 0.2, 0.15], {"top_p": 0.01}, {1, 2, 4}),
    ([0.5, 0.25, 0.25], {"min_p": 0.5}, {0, 1, 2}),
    ([0.5, 0.25, 0.25], {"min_p": 0.51}, {0}),
    ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.75}, {0, 1, 2}),
    ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.75, "top_k": 3}, {0, 1}),  # 0.7 of 0.9
    ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.57, "min_p": 0.6}, {0}),  # 0.4 of 0.7
    ([0.4, 0.2, 0.2, 0.2], {"top_k": 2, "top_p": 0.55}, {0, 1, 2, 3}),  # ties beyond the k count, 0.4 of 1
    ([0.4, 0.2, 0.2, 0.2], {"top_k": 2, "top_p": 0.35}, {0}),
]


@pytest.mark.parametrize(("chances", "filters", "able"), KEPT)
def test_f71_what_may_be_drawn(
    sampler: Sampler, chances: list[float], filters: dict[str, float], able: set[int]
) -> None:  # fmt: skip
    """In a large vocabulary too, whose other tokens cannot come."""
    for room in (0, 3000):
        z = np.full(room + len(chances), -np.inf, np.float32)
        z[room:] = np.log(np.array(chances, np.float32))
        spec = SampleSpec(temperature=1.0, seed=8, **filters)  # type: ignore[arg-type]
        found, _ = sampler(np.tile(z, (150, 1)), [spec] * 150, range(150))
        assert {token - room for token in found} == able


def random_rows(rows: int, vocab: int) -> tuple[Floats, list[SampleSpec], list[int]]:
    """Logits, specs of all kinds, and positions."""
    rng, numbers = random.Random(vocab), np.random.default_rng(vocab)
    logits = (3 * numbers.standard_normal((rows, vocab))).astype(np.float32)
    logits[::3] = np.round(logits[::3])
    return logits, [random_spec(rng, vocab) for _ in range(rows)], [rng.randrange(10**6) for _ in range(rows)]


@pytest.mark.parametrize("vocab", [97, 384, 5000])
def test_f73_a_row_draws_the_same_in_any_batch_and_order(sampler: Sampler, vocab: int) -> None:
    count = 32
    logits, specs, positions = random_rows(count, vocab)
    together, broken = sampler(logits, specs, positions)
    assert not any(broken) and len(set(together)) > 8
    orders = [[row] for row in range(count)]  # batches of 1
    orders += [list(range(first, first + 7)) for first in range(0, count - 6, 5)]  # of 7
    orders += [list(range(count))[::-1], random.Random(1).sample(range(count), count)]  # of 32, in other orders
    for order in orders:
        found, _ = sampler(logits[order], [specs[row] for row in order], [positions[row] for row in order])
        assert found == [together[row] for row in order]


def test_f73_a_seed_draws_the_same_again(sampler: Sampler) -> None:
    logits, specs, positions = random_rows(16, 384)
    assert sampler(logits, specs, positions) == sampler(logits, specs, positions)
    hot = [SampleSpec(temperature=1.0, seed=seed) for seed in range(16)]
    others = [spec._replace(seed=spec.seed + (1 << 32)) for spec in hot]
    assert sampler(logits, hot, positions)[0] != sampler(logits, others, positions)[0]


HOT = SampleSpec(temperature=0.7, seed=1)
SPECS = [SampleSpec(), HOT, HOT._replace(top_k=2), HOT._replace(top_p=0.9), HOT._replace(top_k=2, top_p=0.9, min_p=0.1)]
EDGES: dict[str, tuple[Floats, set[int]]] = {  # logits, and what may be drawn; nothing: the row is broken
    "1e6": (f32(0, 1e6, 0, -1e6), {1}),
    "-1e6": (f32(-1e6, -1e6, -2e6), {0, 1}),
    "all -1e6": (f32(-1e6, -1e6, -1e6), {0, 1, 2}),
    "all equal": (f32(3, 3, 3, 3), {0, 1, 2, 3}),
    "ties": (f32(1e4, -5, 1e4, -9), {0, 2}),
    "one token": (f32(-7), {0}),
    "one possible": (f32(-np.inf, -np.inf, -1e6, -np.inf), {2}),
    "largest floats": (f32(3e38, -3e38, 1e38), {0}),
    "NaN": (f32(1, np.nan, 2, 3), set()),
    "only NaN": (f32(np.nan, np.nan), set()),
    "+inf": (f32(1, 2, np.inf), set()),
    "both infinities": (f32(-np.inf, np.inf, 0), set()),
    "all -inf": (f32(-np.inf, -np.inf, -np.inf), set()),
}


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("spec", SPECS, ids=["greedy", "temperature", "top_k", "top_p", "all"])
@pytest.mark.parametrize("name", EDGES)
def test_f74_edge_cases(sampler: Sampler, name: str, spec: SampleSpec) -> None:
    logits, able = EDGES[name]
    positions = range(40)
    found, broken = sampler(np.repeat(logits, 40, axis=0), [spec] * 40, positions)
    if not able:
        assert broken == [True] * 40 and found == [0] * 40
        return
    assert not any(broken) and set(found) <= able
    assert found == [sampling.draw(logits[0], spec, position) for position in positions]
    if spec.temperature == 0.0:
        assert set(found) == {min(able)}  # the lowest id of equals


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_f73_f74_scores_that_overflow_beside_rows_of_every_kind(sampler: Sampler) -> None:
    """The first score that overflows is drawn, unless it is banned, whatever the neighbours' thresholds."""
    logits = np.repeat(f32(-4e35, 2e35, 4e35, -1e35, 3e35), 6, axis=0)
    cold = SampleSpec(temperature=1e-3, seed=3, banned=(0,))
    kinds = [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.9}, {"banned": (0, 2)}]
    specs = [cold._replace(**kind) for kind in kinds]  # type: ignore[arg-type]
    expected = [sampling.draw(logits[0], spec, 3) for spec in specs]
    assert expected == [2, 2, 2, 2, 2, 4]
    assert sampler(logits, specs, [3] * 6) == (expected, [False] * 6)
    assert [sampler(logits[:1], [spec], [3])[0][0] for spec in specs] == expected


@pytest.mark.parametrize(("seed", "position", "token"), [(1, 188, 1203), (1, 3943, 882)])
def test_f73_without_top_p_a_tail_too_small_to_be_summed_is_drawn_beside_rows_with_it(
    sampler: Sampler, seed: int, position: int, token: int
) -> None:
    """Each token but the first weighs too little to change a sum of 1, and `token` the least of those that top-k keeps.
    At this seed and position its noise makes more than good for that: it is drawn unless a threshold cuts it off."""
    logits = np.linspace(-18.3, -18.5, 2000, dtype=np.float32)[None].repeat(3, axis=0)
    logits[:, 0], logits[:, token], logits[:, 1998:] = 0.0, -18.6, -30.0
    hot = SampleSpec(temperature=1.0, seed=seed)
    specs = [hot._replace(top_k=1998), hot._replace(top_p=0.9), hot._replace(top_k=1999, min_p=1e-12)]
    assert [sampling.draw(logits[0], spec, position) for spec in specs] == [token, 0, token]
    assert sampler(logits, specs, [position] * 3) == ([token, 0, token], [False] * 3)


def test_f74_a_broken_row_harms_no_other(sampler: Sampler) -> None:
    logits, specs, positions = random_rows(9, 50)
    good, _ = sampler(logits, specs, positions)
    bad = {1: np.nan, 4: np.inf, 8: -np.inf}
    specs = [spec._replace(banned=(), logit_bias=()) if row in bad else spec for row, spec in enumerate(specs)]
    for row, value in bad.items():
        logits[row] = value
    found, broken = sampler(logits, specs, positions)
    assert broken == [row in bad for row in range(9)]
    assert found == [0 if row in bad else token for row, token in enumerate(good)]


def test_f74_a_ban_covers_a_broken_logit_and_all_banned_is_broken(sampler: Sampler) -> None:
    logits = np.repeat(f32(np.nan, 1, 2, np.inf), 3, axis=0)
    specs = [spec._replace(banned=(0, 3)) for spec in (SampleSpec(), HOT)] + [HOT._replace(banned=(0, 1, 2, 3))]
    found, broken = sampler(logits, specs, [0, 1, 2])
    assert broken == [False, False, True] and found[0] == 2 and found[1] in (1, 2)


def test_f74_an_empty_vocabulary_is_refused(sampler: Sampler) -> None:
    with pytest.raises((ValueError, IndexError)):
        sampler(np.zeros((1, 0), np.float32), [SampleSpec()], [0])


class Asked:
    """A mask that counts how often it is asked for."""

    def __init__(self, mask: Mask) -> None:
        self.mask, self.times = mask, 0

    def __call__(self) -> Mask:
        self.times += 1
        return self.mask


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 384, 5000])
def test_masks_leave_what_they_allow(sampler: Sampler, vocab: int) -> None:
    """In rows of every kind, beside rows without a mask; each is asked once."""
    logits, specs, positions = random_rows(24, vocab)
    rng = random.Random(vocab)
    allowed = [set(rng.sample(range(vocab), rng.randint(1, min(vocab, 40)))) for _ in specs]
    asked = [Asked(mask_of(ids, vocab)) for ids in allowed]
    masked = [
        spec if row % 4 == 0 else spec._replace(mask=asked[row], banned=()) for row, spec in enumerate(specs)
    ]  # fmt: skip
    found, broken = sampler(logits, masked, positions)
    assert [one.times for one in asked] == [int(row % 4 != 0) for row in range(24)]
    for row, spec in enumerate(masked):
        if not broken[row]:
            assert found[row] == sampling.draw(logits[row], spec, positions[row])
        assert row % 4 == 0 or (found[row] in allowed[row] and not broken[row])


def test_a_mask_that_leaves_nothing_breaks_its_row_alone(sampler: Sampler) -> None:
    logits = np.repeat(f32(0, 3, 2, np.nan), 5, axis=0)
    one, none = mask_of([2], 4), mask_of([], 4)
    specs = [
        SampleSpec(mask=lambda: one), SampleSpec(mask=lambda: none), HOT._replace(mask=lambda: one),
        HOT._replace(mask=lambda: none, top_p=0.5), SampleSpec(mask=lambda: one, banned=(2,)),
    ]  # fmt: skip
    assert sampler(logits, specs, range(5)) == ([2, 0, 2, 0, 0], [False, True, False, True, True])
