"""The fast draw of the host against the definition: the same token, whatever the logits (F71, F73, F74)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexstream import sampling
from cortexstream.backends.common.draw import draw_rows
from cortexstream.backends.common.fast_draw import NOTHING, SMALL, STRIPES, draw, penalise
from cortexstream.constraint import Mask, mask_of
from cortexstream.plan import SampleSpec

Floats = npt.NDArray[np.float32]


@st.composite
def histories(draw: Any, vocab: int) -> tuple[int, ...]:
    """None, some or many tokens, of which some occur again; from a seed, which is quicker than one by one."""
    count, seed = draw(st.sampled_from([0, 1, 3, 9, 30, 200])), draw(st.integers(0, 100))
    return tuple(np.random.default_rng(seed).integers(min(vocab, 150), size=count).tolist())


@st.composite
def specs(draw: Any, vocab: int) -> SampleSpec:
    token = st.integers(0, vocab - 1)
    spec = SampleSpec(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.3, 0.8, 1.0, 2.0, 40.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 5, 50, STRIPES // 2, STRIPES, vocab, vocab + 3])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.99999999, 0.999, 0.95, 0.5, 1e-6, 1e-46])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-30, 0.02, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**64 - 1)), sample_index=draw(st.integers(0, 5)),
        repetition_penalty=draw(st.sampled_from([1.0, 0.7, 1.3])), presence_penalty=draw(st.sampled_from([0.0, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7])), prompt_tokens=draw(histories(vocab)),
        output_tokens=draw(histories(vocab)),
        logit_bias=draw(st.lists(st.tuples(token, st.floats(-50, 50, width=32)), max_size=3).map(tuple)),
        banned=draw(st.lists(token, max_size=4).map(tuple)),
    )  # fmt: skip
    return spec._replace(top_k=0, top_p=1.0, min_p=0.0) if draw(st.booleans()) else spec


@st.composite
def rows_of_logits(draw: Any, vocab: int) -> Floats:
    """Smooth, coarse (ties), flat, huge, nearly all impossible, or falling: what bounds could get wrong."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    z = rng.standard_normal(vocab) * draw(st.sampled_from([0.0, 0.1, 1.0, 4.0, 15.0]))
    kind = draw(st.sampled_from(["smooth", "coarse", "huge", "shifted", "sparse", "sorted", "giant"]))
    if kind == "coarse":
        z = np.round(z)
    elif kind in ("huge", "giant"):
        z = z * 10.0 ** draw(st.sampled_from([4, 6, 8] if kind == "huge" else [30, 37]))
    elif kind == "shifted":
        z = z + draw(st.sampled_from([1e6, -1e6, 3e8, -3e8]))
    elif kind == "sparse":
        z = np.where(rng.random(vocab) < 0.9, -np.inf, z)
    elif kind == "sorted":
        z = np.sort(z)[:: draw(st.sampled_from([1, -1]))]
    z = np.clip(z, -3e38, 3e38) if kind != "sparse" else z
    if draw(st.booleans()):
        z[rng.integers(vocab, size=2)] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.0]))
    logits: Floats = z.astype(np.float32)
    return logits


def defined(z: Floats, spec: SampleSpec, position: int) -> int:
    """The definition's token, or NOTHING where it has none."""
    with np.errstate(all="ignore"):
        largest = sampling.bias(z, spec).max()
        return sampling.draw(z, spec, position) if np.isfinite(largest) else NOTHING


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(
    data=st.data(),
    vocab=st.sampled_from([1, 2, 3, 5, 64, 127, 128, 129, 384, 1023, 2 * STRIPES + 5, SMALL, SMALL + 1, 9001]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_f71_every_token_is_the_definitions(data: Any, vocab: int) -> None:
    count = data.draw(st.integers(1, 5))
    logits = np.stack([data.draw(rows_of_logits(vocab)) for _ in range(count)])
    wanted = [data.draw(specs(vocab)) for _ in range(count)]
    positions = [data.draw(st.integers(0, 2**31)) for _ in range(count)]
    expected = [defined(*row) for row in zip(logits, wanted, positions, strict=True)]
    before = logits.copy()
    assert draw(logits, wanted, positions).tolist() == expected
    np.testing.assert_array_equal(logits, before)


@given(data=st.data(), vocab=st.sampled_from([1, 31, 33, 384, 4099]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_f71_under_a_mask_too(data: Any, vocab: int) -> None:
    """Asked for once; what it leaves may be nothing."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    z = rng.standard_normal(vocab).astype(np.float32)
    allowed = np.flatnonzero(rng.random(vocab) < data.draw(st.sampled_from([0.0, 0.01, 0.5])))
    asked: list[Mask] = []

    def mask() -> Mask:
        asked.append(mask_of(allowed.tolist(), vocab))
        return asked[-1]

    spec = data.draw(specs(vocab))._replace(mask=mask)
    found = draw(z[None], [spec], [3]).tolist()
    assert len(asked) == 1
    assert found == [defined(z, spec, 3)]


def test_f71_a_block_of_equals_beside_a_block_with_a_peak() -> None:
    """128 equal tokens weigh as much as one that is 4.85 above them: neither block may be left out by its peak."""
    for lead in (0.0, 3.5, 4.8, 4.9, 6.0):
        z = np.full(SMALL + 1, -np.inf, np.float32)
        z[256:384], z[640] = 0.0, lead
        spec = SampleSpec(temperature=1.0, seed=2)
        expected = [defined(z, spec, position) for position in range(300)]
        assert draw(np.tile(z, (300, 1)), [spec] * 300, range(300)).tolist() == expected
        flat = sum(token < 640 for token in expected) / 300
        assert abs(flat - 128 / (128 + np.exp(lead))) < 0.12


def test_f71_the_penalties_of_tokens_that_occurred_are_all_there_is() -> None:
    """However many occurred, and however often."""
    rng = np.random.default_rng(0)
    for number in range(100):
        z = rng.standard_normal(400).astype(np.float32)
        spec = SampleSpec(
            repetition_penalty=1.3, presence_penalty=-0.4, frequency_penalty=0.3,
            prompt_tokens=tuple(rng.integers(400, size=3 * number).tolist()),
            output_tokens=tuple(rng.integers(1 + 3 * number, size=2 * number).tolist()),
        )  # fmt: skip
        np.testing.assert_array_equal(penalise(z, spec), sampling.penalise(z, spec))


def test_f71_a_distribution_whose_nucleus_is_nearly_everything() -> None:
    """Bounds that are too high at first are lowered until the nucleus is inside."""
    flat = np.random.default_rng(1).uniform(0, 0.01, 20_000).astype(np.float32)
    peaked = np.where(np.arange(20_000) == 7, np.float32(9.0), flat)
    for z in (flat, peaked):
        for top_p in (0.05, 0.5, 0.9, 0.999, 0.999999, 0.9999999999):
            wanted = [SampleSpec(temperature=1.0, top_p=top_p, seed=seed) for seed in range(8)]
            rows = np.tile(z, (8, 1))
            assert draw(rows, wanted, range(8)).tolist() == [defined(z, spec, n) for n, spec in enumerate(wanted)]


@pytest.mark.parametrize("k", [1, 2, 5, 40])
def test_f71_all_of_the_k_likeliest_are_drawn(k: int) -> None:
    """Nearly equal, with others just below, so that each of them must come and no other may."""
    rng = np.random.default_rng(k)
    z = np.full(3 * STRIPES + 7, -1.0, np.float32)
    able = rng.choice(len(z), k, replace=False)
    z[able] = rng.uniform(0.0, 0.01, k)
    spec = SampleSpec(temperature=1.0, top_k=k, seed=2)
    count = 30 * k
    found = draw(np.tile(z, (count, 1)), [spec] * count, range(count)).tolist()
    assert set(found) == set(able.tolist())
    assert found[:50] == [defined(z, spec, position) for position in range(count)][:50]


def test_f71_rows_with_the_same_few_candidates_have_noise_of_their_own() -> None:
    z = np.full(4097, -100.0, np.float32)
    z[8:12] = (0.0, 0.1, 0.2, 0.3)
    for spec in (SampleSpec(temperature=1.0), SampleSpec(temperature=1.0, top_k=3)):
        wanted = [spec._replace(seed=seed) for seed in range(40)]
        found = draw(np.tile(z, (40, 1)), wanted, [9] * 40).tolist()
        assert found == [defined(z, one, 9) for one in wanted] and len(set(found)) > 2


@pytest.mark.parametrize("vocab", [50, 1000, 9001])
def test_f71_rows_of_one_batch_are_drawn_each_by_its_own_spec(vocab: int) -> None:
    """With and without thresholds, of all temperatures and histories, and none so cold that all draw the largest."""
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((48, vocab)).astype(np.float32)
    wanted = [
        SampleSpec(
            temperature=float(rng.uniform(0.3, 3.0)), seed=int(rng.integers(1 << 40)), sample_index=row % 3,
            top_k=[vocab // 2, 0, 0, 5][row % 4], top_p=[1.0, 1.0, 1.0, 0.7, 0.95][row % 5] if row % 2 else 1.0,
            min_p=0.02 if row % 7 == 1 else 0.0, frequency_penalty=[0.0, 0.5, -0.5][row % 3],
            output_tokens=tuple(rng.integers(vocab, size=9 * row).tolist()),
        )
        for row in range(48)
    ]  # fmt: skip
    assert sum(spec.filtered(vocab) for spec in wanted) in range(16, 33)
    expected = [defined(z, spec, 100 + row) for row, (z, spec) in enumerate(zip(logits, wanted, strict=True))]
    assert draw(logits, wanted, range(100, 148)).tolist() == expected
    assert sum(token != z.argmax() for token, z in zip(expected, logits, strict=True)) > 24


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_f74_scores_that_overflow(filters: dict[str, float]) -> None:
    """Upwards the first of them is drawn; downwards what does not overflow, and the first token if all do."""
    spec = SampleSpec(temperature=0.01, seed=4, **filters)  # type: ignore[arg-type]
    for vocab in (64, 4097):
        up, down, all_down = (np.full(vocab, fill, np.float32) for fill in (1.0, -2e38, -3e38))
        up[[20, 30]], down[40] = (2e38, 3e38), -1.0
        for z, token in ((up, 20), (down, 40), (all_down, 0)):
            assert draw(z[None], [spec], [1]).tolist() == [defined(z, spec, 1)] == [token]


def test_f72_penalties_that_change_which_token_is_the_largest() -> None:
    rng = np.random.default_rng(6)
    for vocab in (20, 4105):
        for number in range(60):
            z = (3 * rng.standard_normal(vocab)).astype(np.float32)
            best = np.argsort(-z)[:4].tolist()
            spec = SampleSpec(
                temperature=float(rng.choice([0.0, 0.3, 1.0])), seed=number, top_k=int(rng.choice([0, 3])),
                top_p=float(rng.choice([1.0, 0.8])), min_p=float(rng.choice([0.0, 0.1])), repetition_penalty=1.5,
                presence_penalty=0.5, frequency_penalty=0.5, prompt_tokens=(best[1],), output_tokens=(best[0],) * 3,
            )  # fmt: skip
            assert draw(z[None], [spec], [number]).tolist() == [defined(z, spec, number)]


def test_f74_no_rows() -> None:
    assert draw(np.zeros((0, 5), np.float32), [], []).tolist() == []


def test_f11_f74_rows_of_the_host_ask_for_a_mask_once_and_say_why_they_cannot_draw() -> None:
    logits = np.array([[0.0, 1.0, 2.0, 3.0]] * 4, np.float32)
    logits[1, 0], logits[3, 3] = np.nan, np.inf
    asked: list[int] = []

    def mask() -> Mask:
        asked.append(1)
        return mask_of([0, 2], 4)

    spec = SampleSpec(temperature=1.0, top_k=1, mask=mask, logprobs=1, processed=True, metadata=True)
    found = draw_rows(logits, [spec, SampleSpec(), SampleSpec(banned=(0, 1, 2, 3)), SampleSpec(banned=(3,))], [5] * 4)
    assert len(asked) == 1
    assert found[0].token == 2 and found[0].top_logprobs == ((2, 0.0),)
    assert found[0].metadata is not None and found[0].metadata.num_filtered == 3
    assert found[1].error is not None and "the logits hold NaN or +inf" in found[1].error and not found[1].finite
    assert found[2].error is not None and "each is banned" in found[2].error and found[2].finite
    assert found[3].error is None and found[3].token == 2  # a banned token's logit may be anything
