"""`kernels.reference.kv_quantize` against mx.quantize and mx.dequantize on a CPU: the same bits, no tolerance (F89)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference.kv_quantize import Quantized, dequantize, quantize
from tests.conftest import require

FORMATS = [(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
DIM = 256


def rows(kind: str) -> Any:
    """Float32 [1000, 256]; what is constant or equal is so over whole groups of up to 128."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((1000, DIM))
    scale = 10.0 ** rng.uniform(-36, 37, (1000, 1))
    return {
        "normal": normal,
        "positive": np.abs(normal) + 1,
        "negative": -np.abs(normal) - 1,
        "huge and tiny": np.clip(normal * scale, -1e38, 1e38),
        "constant": np.repeat((normal * scale)[:, :2], 128, axis=1),
        "zero": np.zeros_like(normal),
        "minus zero": -np.zeros_like(normal),
        "whole numbers": rng.integers(-8, 8, normal.shape),
        "symmetric": rng.choice([-1.0, 1.0], normal.shape),
        "below the smallest scale": rng.integers(-8, 8, normal.shape) * 1e-8,
        "far from zero": 5 + normal * 1e-6,
        "one outlier": normal + 100 * (np.arange(DIM) % 128 == 7),
    }[kind].astype(np.float32)


KINDS = [
    "normal", "positive", "negative", "huge and tiny", "constant", "zero", "minus zero", "whole numbers", "symmetric",
    "below the smallest scale", "far from zero", "one outlier",
]  # fmt: skip


def bits_of(array: Any) -> Any:
    """Equal only for equal bits: 0.0 and -0.0 differ."""
    return np.asarray(array).view(np.uint32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_f89_codes_scales_and_biases_are_mlxs(kind: str, bits: int, group: int) -> None:
    mx = require("mlx")
    x = rows(kind)
    stored = quantize(x, bits, group)
    with mx.stream(mx.cpu):
        theirs = mx.quantize(mx.array(x), group, bits)
        dense = mx.dequantize(*theirs, group, bits)
        mx.eval(theirs, dense)
    for ours, other in zip(stored, theirs, strict=True):
        assert np.array_equal(bits_of(ours), bits_of(np.array(other)))
    assert np.array_equal(bits_of(dequantize(stored, bits, group)), bits_of(np.array(dense)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_f89_errors_are_within_the_scale(kind: str, bits: int, group: int) -> None:
    """Nine of ten within half of it; the end that is further from zero comes back exactly."""
    x = rows(kind)
    stored = quantize(x, bits, group)
    back = dequantize(stored, bits, group)
    scale = np.repeat(np.abs(stored.scales), group, axis=1)
    rounding = 4e-7 * np.repeat(np.abs(x).reshape(1000, -1, group).max(-1), group, axis=1)
    assert (np.abs(back - x) <= scale + rounding).all()
    assert (np.abs(back - x) <= 0.5 * scale + rounding).mean() > 0.9
    groups = x.reshape(-1, group)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    edge = np.where(np.abs(low) > np.abs(high), low, high)
    at_edge = (groups == edge) & (np.abs(edge) > 1e-7)
    assert np.array_equal(back.reshape(-1, group)[at_edge], groups[at_edge])


@pytest.mark.parametrize("bits", [4, 8])
def test_f89_any_leading_axes_and_bytes(bits: int) -> None:
    x = rows("normal").reshape(10, 50, 2, DIM)
    stored = quantize(x, bits, 64)
    assert [part.shape for part in stored] == [(10, 50, 2, DIM * bits // 32), (10, 50, 2, 4), (10, 50, 2, 4)]
    assert [part.dtype for part in stored] == [np.uint32, np.float32, np.float32]
    assert sum(part.nbytes for part in stored) == 1000 * (DIM * bits // 8 + 2 * 4 * 4)
    flat = quantize(x.reshape(1000, DIM), bits, 64)
    assert all(np.array_equal(a.reshape(b.shape), b) for a, b in zip(stored, flat, strict=True))
    none = quantize(x[:0], bits, 64)
    assert dequantize(none, bits, 64).shape == (0, 50, 2, DIM)
    one = quantize(x[3, 4, 1], bits, 64)  # a vector alone has the codes that it has among others
    assert all(np.array_equal(a, b[3, 4, 1]) for a, b in zip(one, stored, strict=True))
    assert np.array_equal(dequantize(one, bits, 64), dequantize(stored, bits, 64)[3, 4, 1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_f89_what_is_not_finite_stays_so_and_in_its_group(bits: int, bad: float) -> None:
    x = rows("normal")[:2].copy()
    x[0, 70] = bad
    back = dequantize(quantize(x, bits, 64), bits, 64)
    assert np.isnan(back[0, 64:128]).all()
    back[0, 64:128] = 0
    assert np.isfinite(back).all()


def test_f89_a_range_beyond_float32_is_not_a_number() -> None:
    x = rows("normal")[:1].copy()
    x[0, :2] = 3e38, -3e38
    back = dequantize(quantize(x, 8, 64), 8, 64)
    assert not np.isfinite(back[0, :64]).any() and np.isfinite(back[0, 64:]).all()


def test_quantize_refuses() -> None:
    x = rows("zero")
    for bad, bits, group, words in (
        (x, 3, 64, "3 bits in groups of 64 are not supported"),
        (x, 8, 16, "8 bits in groups of 16"),
        (x, 8, 48, "8 bits in groups of 48"),
        (x, 8, 96, "does not divide into groups of 96"),
        (x[0, 0], 8, 64, "does not divide"),
        (x.astype(np.float64), 8, 64, "x is float64"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize(bad, bits, group)
    packed, scales, biases = quantize(x, 8, 64)
    for stored in (Quantized(packed, scales[:, :2], biases), Quantized(packed[:, :16], scales, biases)):
        with pytest.raises(ValueError, match="do not fit 8 bits in groups of 64"):
            dequantize(stored, 8, 64)
    with pytest.raises(ValueError, match="2 bits"):
        dequantize(Quantized(packed, scales, biases), 2, 64)
