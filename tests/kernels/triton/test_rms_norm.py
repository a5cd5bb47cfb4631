"""`kernels.triton.rms_norm` against its definition in float64 (P12)."""

from __future__ import annotations

from typing import Any

import pytest

from cortexstream.kernels.reference import rms_norm as reference
from cortexstream.kernels.triton.rms_norm import rms_norm
from tests.kernels.triton.support import DTYPES, exact, near, normal, same, torch


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 80), (1, 1000), (4, 4096), (5,)])
def test_it_is_the_definition(shape: tuple[int, ...], dtype: Any, unit_offset: bool) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1) * 0.3
    want = reference.rms_norm(exact(x), exact(weight), 1e-5, unit_offset=unit_offset)
    near(rms_norm(x, weight, 1e-5, unit_offset=unit_offset), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 100])
def test_with_a_residual_it_is_the_addition_and_the_norm(dtype: Any, dim: int) -> None:
    x, residual, weight = (normal(3, dim, dtype=dtype, seed=seed) for seed in range(3))
    total = x + residual
    got = rms_norm(x, weight[0], 1e-6, residual=residual)
    assert same(residual, total)
    assert same(got, rms_norm(total, weight[0], 1e-6))
    near(got, reference.rms_norm(exact(total), exact(weight[0]), 1e-6), dtype)


def test_small_numbers_are_not_lost_and_eps_counts() -> None:
    x, weight = normal(2, 32) * 1e-6, torch.ones(32)
    for eps in (1e-12, 1e-6, 1.0):
        near(rms_norm(x, weight.to(x.device), eps), reference.rms_norm(exact(x), exact(weight), eps), torch.float32)


def test_in_place_and_nothing_to_do() -> None:
    x, weight = normal(3, 48), normal(48, seed=1)
    want = rms_norm(x, weight, 1e-6)
    assert rms_norm(x, weight, 1e-6, out=x) is x and same(x, want)
    assert rms_norm(normal(0, 48), weight, 1e-6).shape == (0, 48)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": normal(15)}, r"weight has shape \[15\]; it must be \[16\]"),
        ({"residual": normal(2, 16).half()}, "residual is torch.float16; it must be torch.float32"),
        ({"residual": normal(1, 16)}, r"residual has shape \[1, 16\]; it must be \[2, 16\]"),
        ({"out": normal(2, 17)}, r"out has shape \[2, 17\]"),
        ({"x": normal(2, 32)[:, ::2]}, "x has strides .* it must be contiguous"),
        ({"x": normal(2, 0)}, "its last axis must have 1 to 65536 numbers"),
        ({"x": normal(1, 65537)}, "its last axis must have 1 to 65536 numbers"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"x": normal(2, 16), "weight": normal(16), "eps": 1e-6, **changed}
    kept = changed.get("residual", normal(1)).clone()
    with pytest.raises(ValueError, match=words):
        rms_norm(**arguments)
    assert same(kept, changed.get("residual", normal(1)))
