"""`kernels.triton.sample` against `cortexstream.sampling`: the same tokens from the same logits (F71 to F75, P5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream import sampling
from cortexstream.kernels.triton.sample import CONFIGS, Config, Drawn, RowParameters, Tables, sample
from cortexstream.plan import SampleSpec
from tests.kernels.triton.sample_support import (
    TINY,
    definition,
    logits_of,
    parameters,
    random_spec,
    tables,
    telling_position,
    winning_position,
)
from tests.kernels.triton.support import DEVICE, DTYPES, exact, fenced, same, torch


@pytest.mark.parametrize(
    ("vocab", "rows", "dtype", "config"),
    [
        (1, 6, torch.float32, None), (2, 8, torch.float16, None), (97, 56, torch.float32, None),
        (421, 32, torch.float32, TINY), (257, 16, torch.bfloat16, TINY), (2500, 24, torch.float32, None),
        (4096, 12, torch.bfloat16, None), (3000, 20, torch.float32, CONFIGS[80]._replace(capacity=64)),
    ],
    ids=lambda value: "tiny" if value is TINY else "short" if isinstance(value, Config) else str(value),
)  # fmt: skip
def test_p5_f71_draws_are_the_definitions(vocab: int, rows: int, dtype: Any, config: Config | None) -> None:
    """Every parameter, mixed in one batch, and where it can be, at a token next to the threshold."""
    rng = np.random.default_rng([vocab, rows])
    logits = logits_of(rng, rows, vocab, dtype)
    specs = [random_spec(rng, vocab) for _ in range(rows)]
    numbers = exact(logits).astype(np.float32)
    positions = [telling_position(z, spec, rng) for z, spec in zip(numbers, specs, strict=True)]
    got = sample(logits, parameters(specs, positions), tables(specs, vocab), logprobs=True, config=config)
    assert not got.broken.any()
    assert got.tokens.tolist() == definition(logits, specs, positions)
    want = [float(sampling.log_softmax(numbers[r])[token]) for r, token in enumerate(got.tokens.tolist())]
    np.testing.assert_allclose(exact(got.logprobs), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", [sampling.TOKENS, sampling.BLOCKS])
def test_p5_large_noise_keeps_its_last_bits(kind: int) -> None:
    """Where the first of two tokens gets the most, the other's logit makes up for it, but for 2e-5 more or less."""
    noise = np.array([sampling.noise(5, position, 0, 2, kind) for position in range(10**4)])
    positions = np.argsort(noise[:, 0])[-3:].tolist() * 2
    lead = noise[positions, 0] - noise[positions, 1] + np.repeat(np.array([-2e-5, 2e-5], np.float32), 3)
    logits = torch.from_numpy(np.stack((np.zeros_like(lead), lead), 1)).to(DEVICE)
    rows = parameters([SampleSpec(temperature=1.0, seed=5)] * 6, positions)
    assert sample(logits, rows._replace(top_k=rows.top_k + 1)).tokens.tolist() == [1] * 6
    if kind == sampling.BLOCKS:
        assert sample(logits, rows, filters=False).tokens.tolist() == [0, 0, 0, 1, 1, 1]
    else:
        listed = rows._replace(top_p=rows.top_p - 1e-6)
        assert sample(logits, listed).tokens.tolist() == [0, 0, 0, 1, 1, 1]


MANY = [{"min_p": 0.4}, {"min_p": 0.4, "top_p": 0.7}, {"min_p": 0.4, "top_k": 40}, {"top_p": 0.8}, {"top_k": 50}]


def test_p5_f71_more_candidates_than_a_list_holds() -> None:
    rng = np.random.default_rng(4)
    specs = [SampleSpec(temperature=1.0, seed=seed, **filters) for filters in MANY for seed in range(2)]  # type: ignore[arg-type]
    numbers = rng.uniform(-2, 0, (len(specs), 290)).astype(np.float32)
    positions = [telling_position(z, spec, rng) for z, spec in zip(numbers, specs, strict=True)]
    logits = torch.from_numpy(numbers).to(DEVICE)
    got = sample(logits, parameters(specs, positions), config=TINY)
    assert got.tokens.tolist() == definition(logits, specs, positions)


LARGE = [
    SampleSpec(), SampleSpec(temperature=1.0, seed=1), SampleSpec(temperature=0.9, top_k=40, top_p=0.95, seed=2),
    SampleSpec(temperature=1.5, top_p=0.98, seed=3), SampleSpec(temperature=1.0, min_p=0.02, seed=4),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_p5_f75_a_large_vocabulary(dtype: Any) -> None:
    """In few, large splits, which the interpreter runs sooner."""
    large_vocabulary(dtype, Config(16384, 4, 2, 8192, 16384, 4))


@pytest.mark.full_grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_p5_f75_a_large_vocabulary_in_the_configured_splits(dtype: Any) -> None:
    large_vocabulary(dtype, None)


def large_vocabulary(dtype: Any, config: Config | None) -> None:
    rng = np.random.default_rng(7)
    logits = torch.from_numpy((rng.standard_normal((len(LARGE), 128256)) * 2).astype(np.float32)).to(dtype).to(DEVICE)
    positions = list(range(len(LARGE)))
    got = sample(logits, parameters(LARGE, positions), config=config)
    assert got.tokens.tolist() == definition(logits, LARGE, positions)


KEPT: list[tuple[list[float], dict[str, float], list[int]]] = [  # logits, filters, what is kept
    ([0.4, 0.3, 0.15, 0.1, 0.05], {"top_p": 0.9}, [0, 1, 2, 3]),
    ([0.95, 0.02, 0.02, 0.01], {"top_p": 0.9}, [0]),
    ([0.05, 0.1, 0.15, 0.3, 0.4], {"top_p": 0.9}, [1, 2, 3, 4]),
    ([0.4, 0.3, 0.15, 0.1, 0.05], {"top_p": 1e-46}, [0]),
    ([0.1, 0.2, 0.2, 0.15, 0.2, 0.05], {"top_k": 1}, [1, 2, 4]),
    ([0.1, 0.2, 0.2, 0.15, 0.2, 0.05], {"top_k": 4}, [1, 2, 3, 4]),
    ([0.1, 0.2, 0.2, 0.15, 0.2, 0.05], {"top_p": 0.01}, [1, 2, 4]),
    ([0.1, 0.2, 0.2, 0.15, 0.2, 0.05], {"min_p": 1.0}, [1, 2, 4]),
    ([0.5, 0.25, 0.25], {"min_p": 0.5}, [0, 1, 2]),
    ([0.5, 0.25, 0.25], {"min_p": 0.51}, [0]),
    ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.75}, [0, 1, 2]),
    ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.75, "top_k": 3}, [0, 1]),  # 0.7 of 0.9
    ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.57, "min_p": 0.6}, [0]),  # 0.4 of 0.7
    ([0.4, 0.3, 0.2, 0.1], {"top_k": 3, "min_p": 0.6}, [0, 1]),
    ([0.0, 0.0, 1.0, 0.0], {"top_k": 3, "top_p": 0.5}, [2]),  # all but one have no chance
]


def test_f71_what_is_kept() -> None:
    """One row for each token: drawn where it would win if it were kept, so that the draw tells."""
    width = 6
    cases = []
    for chances, filters, kept in KEPT:
        z = np.full(width, -np.inf, np.float32)
        with np.errstate(divide="ignore"):
            z[: len(chances)] = np.log(np.array(chances, np.float32))
        spec = SampleSpec(temperature=1.0, seed=5, **filters)  # type: ignore[arg-type]
        assert np.flatnonzero(np.isfinite(sampling.keep(z, spec))).tolist() == kept
        for token in np.flatnonzero(np.isfinite(z)).tolist():
            field = np.where(np.isin(np.arange(width), [*kept, token]), z, np.float32(-np.inf))
            cases.append((z, spec, winning_position(field, token), token, token in kept))
    logits, specs, positions, tokens, verdicts = map(list, zip(*cases, strict=True))
    got = sample(torch.from_numpy(np.stack(logits)).to(DEVICE), parameters(specs, positions), config=TINY)
    assert (got.tokens.cpu().numpy() == tokens).tolist() == verdicts


def test_f71_a_threshold_counts_both_zeros_as_one() -> None:
    for z in (np.array([-0.0, 0.0, -2.0], np.float32), np.array([0.0, -0.0, -2.0], np.float32)):
        positions = [winning_position(z, token) for token in range(3)]
        specs = [SampleSpec(temperature=1.0, seed=5, top_k=1)] * 3
        got = sample(torch.from_numpy(z).to(DEVICE).repeat(3, 1), parameters(specs, positions), config=TINY)
        assert (got.tokens.cpu().numpy() == np.arange(3)).tolist() == [True, True, False]


def test_f71_temperature_divides_to_the_nearest_float() -> None:
    """The threshold of min-p is put at the quotient, where a product with the reciprocal falls below it."""
    temperature = np.float32(0.3)
    x = -np.random.default_rng(0).random(100).astype(np.float32)
    x = x[x * (np.float32(1) / temperature) < x / temperature][0]
    floor = x / temperature
    above = np.nextafter(floor, np.float32(0))
    spec = SampleSpec(temperature=0.3, seed=5, min_p=0.5)
    rows = parameters([spec] * 2, [winning_position(np.array([0.0, floor], np.float32), 1)] * 2)
    rows = rows._replace(log_min_p=torch.tensor(np.array([floor, above]), device=DEVICE))
    got = sample(torch.tensor([[0.0, float(x)]] * 2, device=DEVICE), rows, config=TINY)
    assert got.tokens.tolist() == [1, 0]


def test_f71_pure_temperature_follows_the_distribution() -> None:
    """Chi-square with 3 degrees of freedom, level 0.1 %: 16.3."""
    draws = 240
    chances = np.array([0.4, 0.3, 0.2, 0.1])
    logits = torch.from_numpy((2 * np.log(chances)).astype(np.float32)).to(DEVICE).repeat(draws, 1)
    specs = [SampleSpec(temperature=2.0, seed=11)] * draws
    got = sample(logits, parameters(specs, list(range(draws))), filters=False)
    seen = np.bincount(got.tokens.cpu().numpy(), minlength=4)
    assert ((seen - draws * chances) ** 2 / (draws * chances)).sum() < 16.3


def test_f71_temperature_0_takes_the_lowest_id_of_equals() -> None:
    z = torch.full((2, 300), -1.0)
    z[0, [17, 140, 290]] = 3.0  # in three splits
    z[1, 0], z[1, 1:] = -0.0, 0.0
    got = sample(z.to(DEVICE), parameters([SampleSpec(top_k=1, top_p=0.1, min_p=0.5)] * 2, [0, 0]), config=TINY)
    assert got.tokens.tolist() == [17, 0]


def test_f72_penalties_move_a_logit_by_as_much_as_the_definition_says() -> None:
    """Greedy rows of two tokens: the penalised one against its value by hand, and against the next larger float."""
    table = [  # logit, penalties, occurrences in prompt and output, result
        (5.0, {"repetition_penalty": 1.2}, 1, 0, np.float32(5) / np.float32(1.2)),
        (5.0, {"repetition_penalty": 1.2}, 0, 3, np.float32(5) / np.float32(1.2)),
        (-5.0, {"repetition_penalty": 1.2}, 1, 1, np.float32(-5) * np.float32(1.2)),
        (2.0, {"frequency_penalty": 0.1}, 1, 3, np.float32(2) - np.float32(0.1) * np.float32(3)),
        (2.0, {"presence_penalty": 0.7}, 0, 3, np.float32(2) - np.float32(0.7)),
        (2.0, {"presence_penalty": 0.7, "frequency_penalty": 0.3}, 4, 0, np.float32(2)),
        (2.0, {"frequency_penalty": -0.3}, 0, 2, np.float32(2) - np.float32(-0.3) * np.float32(2)),
    ]
    for dtype in (torch.int32, torch.int16):
        logits, specs = [], []
        for logit, penalties, prompt, output, want in table:
            for rival in (want, np.nextafter(want, np.float32(np.inf))):
                logits.append([logit, rival])
                specs.append(SampleSpec(prompt_tokens=(0,) * prompt, output_tokens=(0,) * output, **penalties))  # type: ignore[arg-type]
        z = torch.tensor(np.array(logits, np.float32), device=DEVICE)
        got = sample(z, parameters(specs, [0] * len(specs)), tables(specs, 2, dtype), filters=False)
        assert got.tokens.tolist() == [0, 1] * len(table)


def test_f72_without_tables_there_is_nothing_to_penalise() -> None:
    specs = [SampleSpec(repetition_penalty=2.0, presence_penalty=3.0, prompt_tokens=(1,), output_tokens=(2, 2))] * 3
    z = torch.tensor([[0.0, 3.0, 2.0]] * 3, device=DEVICE)
    full, rows = tables(specs, 3), parameters(specs, [0] * 3)
    assert sample(z, rows).tokens.tolist() == [1] * 3
    assert sample(z, rows, full._replace(counts=None)).tokens.tolist() == [2] * 3
    assert sample(z, rows, full._replace(seen=None)).tokens.tolist() == [1] * 3
    one = rows._replace(slot=torch.zeros_like(rows.slot), bias_slot=torch.full_like(rows.slot, -1))
    full.bias[0, 1], full.bias[:, 0] = -torch.inf, 10.0
    assert sample(z, one, full).tokens.tolist() == [1] * 3  # 3 / 2 against 2 / 2 - 3, and no bias
    assert sample(z, one._replace(bias_slot=rows.slot), full).tokens.tolist() == [0] * 3


def test_f72_drawn_tokens_are_counted() -> None:
    specs = [SampleSpec(output_tokens=(1,)), SampleSpec(), SampleSpec()]
    z = torch.tensor([[0.0, 1.0], [0.0, torch.nan], [1.0, 0.0]], device=DEVICE)
    for dtype in (torch.int32, torch.int16):
        rows, full = parameters(specs, [0] * 3), tables(specs, 2, dtype)
        rows.slot[2] = -1
        sample(z, rows, full, count=True)
        assert full.counts.tolist() == [[0, 2], [0, 0], [0, 0]]
        sample(z, rows, full, count=False)
        assert full.counts.tolist() == [[0, 2], [0, 0], [0, 0]]


def test_f73_a_row_is_the_same_bits_in_any_batch() -> None:
    rng = np.random.default_rng(3)
    rows, vocab = 6, 290
    logits = logits_of(rng, rows, vocab)
    specs = [random_spec(rng, vocab) for _ in range(rows)]
    every, full = parameters(specs, list(range(rows))), tables(specs, vocab)
    together: Any = sample(logits, every, full, logprobs=True, config=TINY)
    for order in ([5], [2], list(range(rows))[::-1]):
        part = RowParameters(*(tensor[order].contiguous() for tensor in every))
        got: Any = sample(logits[order].contiguous(), part, full, logprobs=True, config=TINY)
        assert same(got.tokens, together.tokens[order]) and same(got.logprobs, together.logprobs[order])


def test_f73_rows_without_filters_need_none() -> None:
    specs = [SampleSpec(temperature=t, seed=s, top_k=999) for s, t in enumerate((0.0, 0.5, 1.0))]
    logits = logits_of(np.random.default_rng(0), 3, 270)
    rows = parameters(specs, [1, 2, 3])
    got = sample(logits, rows, filters=False, logprobs=True, config=TINY)
    for left, right in zip(got, sample(logits, rows, logprobs=True, config=TINY), strict=True):
        assert same(left, right)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}], ids=["plain", "filters"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_f74_a_broken_row_is_flagged_and_its_mates_are_unharmed(temperature: float, filters: dict[str, Any]) -> None:
    vocab = 140
    z = np.random.default_rng(1).standard_normal((9, vocab)).astype(np.float32)
    spec = SampleSpec(temperature=temperature, seed=1, **filters)
    banned = spec._replace(banned=(3, 4))
    specs = [spec, spec, spec, spec, spec, banned, banned._replace(banned=tuple(range(vocab))), spec, spec]
    z[1, 139], z[2, 0], z[3] = np.nan, np.inf, -np.inf
    z[5, 3], z[5, 4] = np.nan, np.inf
    z[7], z[7, 21] = -np.inf, -1e6
    z[8] *= 1e6
    positions = list(range(9))
    got = sample(torch.from_numpy(z).to(DEVICE), parameters(specs, positions), tables(specs, vocab), config=TINY)
    assert got.broken.tolist() == [r in (1, 2, 3, 6) for r in range(9)]
    want = [0 if r in (1, 2, 3, 6) else sampling.draw(z[r], specs[r], r) for r in range(9)]
    assert got.tokens.tolist() == want and want[7] == 21


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_f74_scores_that_overflow_are_the_largest(filters: dict[str, Any]) -> None:
    z = np.array([[1.0, 3e38, 5.0, 2e38, -3e38]], np.float32)
    spec = SampleSpec(temperature=0.01, seed=1, **filters)
    got = sample(torch.from_numpy(z).to(DEVICE), parameters([spec], [0]), config=TINY)
    assert got.tokens.tolist() == [sampling.draw(z[0], spec, 0)] == [1] and not got.broken.any()


def test_p12_padding_rows_are_left_alone_and_may_hold_anything() -> None:
    specs = [SampleSpec(temperature=1.0, top_k=3, repetition_penalty=1.5), SampleSpec(), SampleSpec(temperature=1.0)]
    z = logits_of(np.random.default_rng(2), 3, 50)
    z[1] = torch.nan
    rows, full = parameters(specs, [4, 5, 6]), tables(specs, 50)
    for name, tensor in rows._asdict().items():
        tensor[1] = torch.nan if tensor.is_floating_point() else -(2**31) if name != "seed" else -(2**63)
    tokens, broken = torch.tensor([9, 8, 7], device=DEVICE), torch.tensor([True, True, True], device=DEVICE)
    out: Any = Drawn(tokens, broken, torch.full((3,), 0.5, device=DEVICE))
    assert sample(z, rows, full, logprobs=True, count=True, out=out, config=TINY).tokens is tokens
    want = definition(z[[0, 2]], [specs[0], specs[2]], [4, 6])
    assert tokens.tolist() == [want[0], 8, want[1]] and broken.tolist() == [False, True, False]
    assert float(out.logprobs[1]) == 0.5 and full.counts.sum() == 2 and full.counts[1].sum() == 0


def test_p12_nothing_beyond_the_tensors_is_read() -> None:
    """In memory that ends where the tensors do; on a GPU the kernel cannot reach it, and this is a plain comparison."""
    specs = [SampleSpec(temperature=1.0, presence_penalty=1.0, top_p=0.9), SampleSpec(temperature=1.0)]
    logits, full = logits_of(np.random.default_rng(5), 2, 137), tables(specs, 137)
    rows = parameters(specs, [0, 1])
    fence = fenced if DEVICE.type == "cpu" else torch.clone
    got = sample(
        fence(logits), RowParameters(*map(fence, rows)), Tables(*map(fence, full)), logprobs=True, config=TINY
    )  # fmt: skip
    assert got.tokens.tolist() == definition(logits, specs, [0, 1])


def test_nothing_to_do() -> None:
    rows = parameters([], [])
    got = sample(torch.zeros(0, 5, device=DEVICE), rows)
    assert got.tokens.shape == (0,) and got.logprobs is None


LINE = torch.zeros(2, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"logits": torch.zeros(4, device=DEVICE)}, r"logits has shape \[4\]; it must be \[R, V\] with V of 1 to"),
        ({"logits": torch.zeros(2, 0, device=DEVICE)}, "with V of 1 to 1048576"),
        ({"logits": torch.zeros(2, 8, dtype=torch.float64, device=DEVICE)}, "logits is torch.float64"),
        ({"logits": torch.zeros(2, 16, device=DEVICE)[:, ::2]}, "logits has strides .* it must be contiguous"),
        ({"slot": LINE[:1]}, r"slot has shape \[1\]; it must be \[2\]"),
        ({"seed": LINE}, "seed is torch.int32; it must be torch.int64"),
        ({"top_p": LINE}, "top_p is torch.int32; it must be torch.float32"),
        ({"bias": torch.zeros(2, 7, device=DEVICE)}, r"bias has shape \[2, 7\]; it must be \[any, 8\]"),
        ({"seen": torch.zeros(2, 8, device=DEVICE)}, "seen is torch.float32; it must be torch.uint8"),
        ({"counts": torch.zeros(2, 8, device=DEVICE)}, "counts is torch.float32; it must be torch.int16 or"),
        ({"count": True}, "count is True, but there are no counts"),
        ({"out": Drawn(LINE.long(), LINE.bool(), LINE.float())}, "logprobs is False; out.logprobs must be None"),
        ({"logprobs": True, "out": Drawn(LINE.long(), LINE.bool())}, "logprobs is True; out.logprobs must be a tensor"),
        ({"out": Drawn(LINE, LINE.bool())}, "out.tokens is torch.int32; it must be torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    changed = dict(changed)
    rows = parameters([SampleSpec()] * 2, [0, 0])
    rows = rows._replace(**{name: changed.pop(name) for name in RowParameters._fields if name in changed})
    given = Tables(**{name: changed.pop(name) for name in Tables._fields if name in changed})
    logits = changed.pop("logits", torch.zeros(2, 8, device=DEVICE))
    out: Any = changed.get("out", Drawn(LINE.long(), LINE.bool()))
    kept = out.tokens.clone()
    with pytest.raises(ValueError, match=words):
        sample(logits, rows, given, **changed)
    assert same(kept, out.tokens)
