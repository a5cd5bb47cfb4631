"""The definition of a draw: Philox, the noise, the order of operations, thresholds and their ties (F71)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cortexstream.plan import SampleSpec
from cortexstream.sampling import (
    BLOCKS,
    bias,
    draw,
    in_blocks,
    keep,
    log_softmax,
    log_sums,
    noise,
    penalise,
    philox,
    top_logprobs,
)

Floats = npt.NDArray[np.float32]


def f32(*values: float) -> Floats:
    return np.array(values, np.float32)


def kept(z: Floats, **spec: Any) -> list[int]:
    return [int(i) for i in np.flatnonzero(keep(z, SampleSpec(temperature=1.0, **spec)) > -np.inf)]


# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: list[int], key: list[int], result: list[int]) -> None:
    c0, c1, c2, c3 = (np.full(3, word, np.uint32) for word in counter)
    out = philox(key[1] << 32 | key[0], (c0, c1, c2, c3))
    for words, want in zip(out, result, strict=True):
        assert words.dtype == np.uint32 and words.tolist() == [want] * 3


def test_philox_counters_are_independent_lanes() -> None:
    zero = np.zeros(4, np.uint32)
    counter = (np.array([0, 1, 0, 0], np.uint32), np.array([0, 0, 1, 0], np.uint32), zero, zero)
    together = philox(5, counter)
    for lane in range(4):
        alone = philox(5, tuple(c[lane : lane + 1] for c in counter))  # type: ignore[arg-type]
        assert [int(w[lane]) for w in together] == [int(w[0]) for w in alone]
    assert len({int(w) for w in together[0][:3]}) == 3


@pytest.mark.parametrize("kind", [0, 1])
def test_noise_is_gumbel_of_the_documented_bits(kind: int) -> None:
    """Lane i % 4 of counter (i // 4, position, index, kind), in Python's own floats."""
    seed, position, index = 0x0123456789ABCDEF, 77, 3
    got = noise(seed, position, index, 11, kind)
    assert got.dtype == np.float32 and got.shape == (11,)
    for token in range(11):
        words = philox(seed, tuple(np.array([w], np.uint32) for w in (token // 4, position, index, kind)))  # type: ignore[arg-type]
        u = (int(words[token % 4][0]) + 0.5) / 2**32
        assert got[token] == pytest.approx(-math.log(-math.log1p(-u)), rel=2e-5, abs=2e-6)


def test_noise_depends_on_every_part_of_its_key_and_on_nothing_else() -> None:
    base = noise(1, 2, 3, 16)
    np.testing.assert_array_equal(base, noise(1, 2, 3, 16))
    for other in ((2, 2, 3), (1 << 32 | 1, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (noise(*other, 16) != base).all()
    assert (noise(1, 2, 3, 16, BLOCKS) != base).all()
    for vocab_size in (1, 3, 5, 13, 15):  # a prefix: the vocabulary's size does not matter, nor that 4 divides it
        np.testing.assert_array_equal(noise(1, 2, 3, vocab_size), base[:vocab_size])


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_noise_is_distributed_as_gumbel(seed: int) -> None:
    """Kolmogorov-Smirnov, level 1 %: 1.628 / sqrt(n)."""
    n = 100_000
    values = np.sort(noise(seed, 9, 0, n).astype(np.float64))
    cdf = np.exp(-np.exp(-values))
    steps = np.arange(n + 1) / n
    distance = max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())
    assert distance < 1.628 / math.sqrt(n)
    assert np.isfinite(values).all() and values.max() < 24


def test_noise_over_positions_is_distributed_as_gumbel() -> None:
    n = 20_000
    values = np.sort(np.array([noise(4, position, 0, 1)[0] for position in range(n)], np.float64))
    distance = np.abs(np.exp(-np.exp(-values)) - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.628 / math.sqrt(n)


def by_blocks(z: Floats, seed: int, position: int, index: int) -> int:
    """The draw without thresholds in Python's own floats: of 128 neighbours each, the block first, then the token."""
    blocks = [[float(x) for x in z[first : first + 128]] for first in range(0, len(z), 128)]
    bonus = noise(seed, position, index, 128 + len(blocks), kind=1).astype(np.float64)
    masses = [sum(math.exp(x) for x in block) for block in blocks]
    scores = [math.log(m) + bonus[128 + n] if m else -math.inf for n, m in enumerate(masses)]
    best = scores.index(max(scores))
    places = [x + bonus[place] for place, x in enumerate(blocks[best])]
    return 128 * best + places.index(max(places))


@pytest.mark.parametrize("vocab_size", [1, 100, 128, 129, 256, 1000, 5000])
def test_f71_without_thresholds_a_block_is_drawn_and_then_a_token_of_it(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    drawn = set()
    for position in range(200):
        z = (3 * rng.standard_normal(vocab_size)).astype(np.float32)
        z[rng.random(vocab_size) < rng.choice([0.0, 0.5])] = -np.inf
        z[rng.integers(vocab_size)] = 0.0
        spec = SampleSpec(temperature=0.5, seed=7 << 60, sample_index=position % 3)
        token = draw(z, spec, position)
        assert token == by_blocks(z / np.float32(0.5), 7 << 60, position, position % 3)
        assert token == draw(z, spec._replace(top_k=vocab_size), position)  # of all tokens it leaves out none
        drawn.add(token)
    assert len(drawn) > min(vocab_size - 1, 80)


def test_f71_the_sums_of_blocks() -> None:
    """log(sum(exp)) in float64, of blocks that are full, cut off, far apart, impossible, or beyond float32."""
    z = np.random.default_rng(0).uniform(-50, 50, 128 * 6 + 5).astype(np.float32)
    z[128:256] += np.float32(3e4)
    z[256:384], z[300] = -np.inf, -1e30
    z[384:512], z[512 + 9], z[512 + 70] = -np.inf, np.inf, np.inf
    blocks = in_blocks(z)
    sums = log_sums(blocks)
    assert blocks.shape == (7, 128) and sums.dtype == np.float32
    np.testing.assert_array_equal(blocks.reshape(-1)[: len(z)], z)
    assert np.isneginf(blocks.reshape(-1)[len(z) :]).all()
    wide = np.where(np.isneginf(blocks), -1e300, blocks.astype(np.float64))
    with np.errstate(over="ignore"):
        for n in (0, 1, 2, 5, 6):
            peak = wide[n].max()
            assert sums[n] == pytest.approx(peak + np.log(np.exp(wide[n] - peak).sum()), rel=1e-6, abs=1e-6)
    assert np.isneginf(sums[3]) and sums[4] == np.inf


DOC = np.log(f32(0.4, 0.3, 0.15, 0.1, 0.05))


def test_f71_the_nucleus_keeps_the_crossing_token() -> None:
    assert kept(DOC, top_p=0.9) == [0, 1, 2, 3]
    assert kept(np.log(f32(0.95, 0.02, 0.02, 0.01)), top_p=0.9) == [0]
    assert kept(DOC, top_p=0.39) == [0] and kept(DOC, top_p=0.41) == [0, 1]
    assert kept(DOC, top_p=1.0) == [0, 1, 2, 3, 4]
    assert kept(np.log(f32(0.05, 0.1, 0.15, 0.3, 0.4)), top_p=0.9) == [1, 2, 3, 4]  # any order


@pytest.mark.parametrize("top_p", [1e-9, 1e-30, 1e-46, 5e-324])
def test_f71_at_least_one_token_is_kept(top_p: float) -> None:
    assert kept(DOC, top_p=top_p) == [0]
    assert kept(f32(1, 3, 2), top_p=top_p) == [1]


def test_f71_thresholds_keep_their_ties() -> None:
    z = f32(1, 3, 3, 2, 3, 0)
    assert kept(z, top_k=1) == [1, 2, 4] and kept(z, top_k=3) == [1, 2, 4]
    assert kept(z, top_k=4) == [1, 2, 3, 4]
    assert kept(z, top_p=0.01) == [1, 2, 4]
    assert kept(f32(0, 0, 0, 0), top_p=0.5) == [0, 1, 2, 3]
    assert kept(z, min_p=1.0) == [1, 2, 4]
    assert kept(np.log(f32(0.5, 0.25, 0.25)), min_p=0.5) == [0, 1, 2]
    assert kept(np.log(f32(0.5, 0.25, 0.25)), min_p=0.51) == [0]


def test_f71_top_k() -> None:
    z = f32(5, 1, 4, 2, 3)
    assert [kept(z, top_k=k) for k in (1, 2, 3, 4)] == [[0], [0, 2], [0, 2, 4], [0, 2, 3, 4]]
    for off in (0, 5, 6, 10**9):
        assert kept(z, top_k=off) == [0, 1, 2, 3, 4]


def test_f71_order_min_p_then_top_k_then_top_p() -> None:
    z = np.log(f32(0.4, 0.3, 0.2, 0.1))
    # Each threshold is taken on what the one before it left, so the shares of the survivors grow.
    assert kept(z, top_p=0.75) == [0, 1, 2] and kept(z, top_k=3, top_p=0.75) == [0, 1]  # 0.7 / 0.9 = 0.78
    assert kept(z, top_p=0.57) == [0, 1] and kept(z, min_p=0.6, top_p=0.57) == [0]  # 0.4 / 0.7 = 0.571
    # min-p counts from the largest logit and never from what top-k leaves: the order of these two cannot show.
    assert kept(z, top_k=2, min_p=0.3) == [0, 1] and kept(z, top_k=3, min_p=0.6) == [0, 1]


def test_f71_temperature_comes_before_the_thresholds() -> None:
    z = np.log(f32(0.5, 0.3, 0.2))
    # At temperature 2 these are 0.415, 0.322, 0.263; at 0.5 they are 0.66, 0.24, 0.11.
    hot = {draw(z, SampleSpec(temperature=2.0, top_p=0.75, seed=s), 0) for s in range(200)}
    cold = {draw(z, SampleSpec(temperature=0.5, top_p=0.65, seed=s), 0) for s in range(200)}
    assert hot == {0, 1, 2} and cold == {0}
    hot = {draw(z, SampleSpec(temperature=4.0, min_p=0.75, seed=s), 0) for s in range(200)}
    assert hot == {0, 1, 2}  # (0.2 / 0.5) ** 0.25 = 0.80


def test_bias_and_bans() -> None:
    z = f32(1, 2, 3)
    np.testing.assert_array_equal(bias(z, SampleSpec(logit_bias=((0, 5.0), (2, -1.0)), banned=(1,))), [6, -np.inf, 2])
    assert z.tolist() == [1, 2, 3]  # the input is not changed
    assert draw(z, SampleSpec(banned=(2,)), 0) == 1
    assert draw(z, SampleSpec(banned=(2,), logit_bias=((2, 100.0),)), 0) == 1  # a ban is stronger
    drawn = {draw(z, SampleSpec(temperature=9.0, seed=s, banned=(1,)), 0) for s in range(100)}
    assert drawn == {0, 2}


@pytest.mark.parametrize(
    ("logit", "spec", "want"),
    [
        (5.0, {"repetition_penalty": 1.2, "prompt_tokens": (0,)}, 5 / 1.2),  # 4.17
        (5.0, {"repetition_penalty": 1.2, "output_tokens": (0, 0)}, 5 / 1.2),  # once, however often it occurs
        (-5.0, {"repetition_penalty": 1.2, "output_tokens": (0,)}, -6.0),
        (5.0, {"repetition_penalty": 0.5, "output_tokens": (0,)}, 10.0),
        (5.0, {"repetition_penalty": 1.2, "prompt_tokens": (1,)}, 5.0),
        (0.0, {"repetition_penalty": 1.2, "prompt_tokens": (0,)}, 0.0),
        (5.0, {"frequency_penalty": 0.5, "output_tokens": (0, 0, 1, 0)}, 3.5),
        (5.0, {"presence_penalty": 0.5, "output_tokens": (0, 0, 1, 0)}, 4.5),
        (5.0, {"presence_penalty": -0.5, "output_tokens": (0,)}, 5.5),
        (5.0, {"presence_penalty": 2.0, "frequency_penalty": 2.0, "prompt_tokens": (0,)}, 5.0),  # output only
        (5.0, {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 2.0,
               "prompt_tokens": (0,), "output_tokens": (0, 0)}, 2.5 - 0.5 - 0.5),
        (-math.inf, {"repetition_penalty": 1.2, "prompt_tokens": (0,)}, -math.inf),
        (5.0, {"prompt_tokens": (0,), "output_tokens": (0,)}, 5.0),
    ],
)  # fmt: skip
def test_penalties(logit: float, spec: dict[str, Any], want: float) -> None:
    got = penalise(f32(logit, 1.0), SampleSpec(**spec))
    assert got.dtype == np.float32
    assert got[0] == pytest.approx(want, rel=1e-6)


def test_penalties_come_after_the_bias_and_before_the_temperature() -> None:
    # -1 + 2 = 1 is divided by 4: 0.25 < 0.5. Penalised first it would be -4 + 2 = -2; unpenalised, 1.
    spec = SampleSpec(logit_bias=((0, 2.0),), repetition_penalty=4.0, prompt_tokens=(0,))
    assert penalise(bias(f32(-1.0, 0.5), spec), spec).tolist() == [0.25, 0.5]
    assert draw(f32(-1.0, 0.5), spec, 0) == 1
    # 1 / 2 = 0.5 > 0.25; penalised first it would be -2 + 2 = 0.
    assert draw(f32(-1.0, 0.25), spec._replace(repetition_penalty=2.0), 0) == 0
    # A presence penalty of 2 at temperature 0.1 weighs 20 in the exponent; after the division it would weigh 2.
    spec = SampleSpec(temperature=0.1, presence_penalty=2.0, output_tokens=(0,))
    assert {draw(f32(1.0, 0.0), spec._replace(seed=s), 0) for s in range(300)} == {1}


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert draw(f32(1, 3, 2, 3), SampleSpec(), 0) == 1
    assert draw(f32(0, 0, 0), SampleSpec(seed=9), 5) == 0
    assert draw(f32(1, 3, 2), SampleSpec(top_k=1, top_p=0.1, min_p=0.5, seed=3), 7) == 1


@pytest.mark.parametrize("extreme", [f32(1e6, 0, -1e6), f32(1e6, -np.inf, -np.inf), f32(-1e6, -2e6, -np.inf)])
@pytest.mark.parametrize(
    "spec",
    [
        SampleSpec(),
        SampleSpec(temperature=1.0),
        SampleSpec(temperature=0.01, top_p=0.9),
        SampleSpec(temperature=1.0, top_k=2, min_p=0.1),
        SampleSpec(temperature=1.0, repetition_penalty=1.3, prompt_tokens=(1, 2)),
    ],
)
def test_extreme_logits(extreme: Floats, spec: SampleSpec) -> None:
    """No overflow (warnings are errors), and the one possible token is drawn."""
    assert {draw(extreme, spec._replace(seed=s), s) for s in range(20)} == {0}


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 4, 5, 6, 7, 31])
def test_any_vocabulary_size(vocab_size: int) -> None:
    z = np.zeros(vocab_size, np.float32)
    drawn = {draw(z, SampleSpec(temperature=1.0, seed=1), position) for position in range(40 * vocab_size)}
    assert drawn == set(range(vocab_size))
    assert draw(z, SampleSpec(temperature=1.0, top_k=1, top_p=0.5, min_p=0.5), 3) in range(vocab_size)


def test_half_precision_logits_are_widened_first() -> None:
    z = np.array([0.1, 0.2, 0.3], np.float16)
    for seed in range(20):
        spec = SampleSpec(temperature=0.7, seed=seed)
        assert draw(z, spec, 4) == draw(z.astype(np.float32), spec, 4)  # type: ignore[arg-type]


def test_random_specs_keep_what_plain_python_keeps() -> None:
    rng = np.random.default_rng(8)
    compared = 0
    for _ in range(600):
        z = (rng.integers(-6, 7, rng.integers(1, 12)) / 2).astype(np.float32)  # a coarse grid: ties are common
        spec = {
            "min_p": float(rng.choice([0, 0.05, 0.3])), "top_k": int(rng.choice([0, 1, 3, 8])),
            "top_p": float(rng.choice([1.0, 0.3, 0.8, 0.95])),
        }  # fmt: skip
        want = {i for i, v in enumerate(z) if spec["min_p"] == 0 or v >= z.max() + math.log(spec["min_p"])}
        if spec["top_k"]:
            threshold = sorted((z[i] for i in want), reverse=True)[: int(spec["top_k"])][-1]
            want = {i for i in want if z[i] >= threshold}
        total = sum(math.exp(z[i]) for i in want)
        likelier = {i: sum(math.exp(z[j]) for j in want if z[j] > z[i]) / total for i in want}
        if any(
            abs(b + k * math.exp(z[i]) / total - spec["top_p"]) < 1e-5 for i, b in likelier.items() for k in range(12)
        ):
            continue  # on the border, where float32 decides
        want = {i for i in want if likelier[i] < spec["top_p"]}
        assert kept(z, **spec) == sorted(want)
        compared += 1
    assert compared > 400


def test_f10_log_softmax_and_top() -> None:
    z = f32(2.0, -1.0, 2.0, 0.5)
    reference = z.astype(np.float64) - np.log(np.exp(z.astype(np.float64)).sum())
    np.testing.assert_allclose(log_softmax(z), reference, atol=1e-6)
    top = top_logprobs(log_softmax(z), 3)
    assert [token for token, _ in top] == [0, 2, 3]  # lower id first among equals
    assert [value for _, value in top] == pytest.approx(reference[[0, 2, 3]], abs=1e-6)
    assert top_logprobs(z, 0) == () and len(top_logprobs(z, 20)) == 4
    shifted = log_softmax(f32(1e6, 1e6 - 1, -np.inf))
    np.testing.assert_allclose(np.exp(shifted), [0.731059, 0.268941, 0], atol=1e-5)
