"""Products with packed weights, in numpy and in torch, against MLX (P2, P12)."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.conftest import require

torch: Any = require("torch")
reference: Any = import_module("cortexstream.kernels.reference.affine_matmul")
affine: Any = import_module("cortexstream.backends.common.affine")
module: Any = import_module("cortexstream.kernels.torch.affine_matmul")
FORMATS = [(bits, group) for bits in reference.BITS for group in reference.GROUPS]


class Packed(NamedTuple):
    """Weights [N, K] as MLX packs them."""

    packed: Any
    scales: Any
    biases: Any


def packed(rows: int, columns: int, bits: int, group: int) -> Any:
    """A random `Packed`: any words and scales are valid; some scales are negative."""
    rng = np.random.default_rng(bits * group)
    words = rng.integers(0, 1 << 32, (rows, columns * bits // 32), np.uint32)
    scales, biases = (rng.standard_normal((rows, columns // group)).astype(np.float32) / 2**bits for _ in range(2))
    return Packed(words, scales, biases * (1 << bits))


def in_torch(weights: Any) -> Any:
    return tuple(torch.from_numpy(array) for array in (weights.packed.view(np.int32), weights.scales, weights.biases))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_p2_weights_are_those_of_mlx(bits: int, group: int) -> None:
    """To the bit, of random words and of what mx.quantize makes; the checkpoint reader's numbers are the same."""
    mx: Any = require("mlx")
    dense = np.random.default_rng(1).standard_normal((7, 384)).astype(np.float32)
    made: Any = Packed(*(np.array(part) for part in mx.quantize(mx.array(dense), group_size=group, bits=bits)))
    for weights in (packed(9, 256, bits, group), made):
        arrays = [mx.array(part) for part in weights]
        want = np.array(mx.dequantize(*arrays, group_size=group, bits=bits))
        assert np.array_equal(reference.dequantize(*weights, bits, group), want)
        assert np.array_equal(affine.dequantize(*weights, group, bits), want)
        assert np.array_equal(module.dequantize(*in_torch(weights), bits, group, torch.float32).numpy(), want)
    assert np.abs(want - dense).max() < 8 / (1 << bits)  # about a step of the range


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_p2_products_are_those_of_mlx(bits: int, group: int) -> None:
    mx: Any = require("mlx")
    weights = packed(40, 256, bits, group)
    rng = np.random.default_rng(0)
    x, bias = rng.standard_normal((3, 256)).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    exact = reference.affine_matmul(x.astype(np.float64), *weights, bits, group)
    product = mx.quantized_matmul(mx.array(x), *map(mx.array, weights), transpose=True, group_size=group, bits=bits)
    near: Any = {"rtol": 0, "atol": 2e-6 * np.abs(exact).max()}
    np.testing.assert_allclose(np.array(product), exact, **near)
    np.testing.assert_allclose(reference.affine_matmul(x, *weights, bits, group, bias), exact + bias, **near)
    got = module.affine_matmul(torch.from_numpy(x), *in_torch(weights), bits, group, bias=torch.from_numpy(bias))
    np.testing.assert_allclose(got.numpy(), exact + bias, **near)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_rounds_weights_once(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in several portions, scales of half precision: float32 in between."""
    weights = packed(50, 128, 5, 64)
    tensors = [part.to(dtype) if part.is_floating_point() else part for part in in_torch(weights)]
    exact = [part.float().numpy() for part in tensors[1:]]
    want = torch.from_numpy(reference.dequantize(weights.packed, *exact, 5, 64)).to(dtype)
    assert torch.equal(module.dequantize(*tensors, 5, 64, dtype), want)
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 300)
    assert torch.equal(module.dequantize(*tensors, 5, 64, dtype), want)


GOOD = packed(4, 128, 4, 64)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bits": 7}, "7 bits in groups of 64 are not supported"),
    ({"group": 16}, "4 bits in groups of 16 are not supported"),
    ({"packed": torch.zeros(4, 16)}, "packed is torch.float32"),
    ({"packed": torch.zeros(4, 15, dtype=torch.int32)}, "no whole groups of 64 x 4 bits"),
    ({"packed": torch.zeros(4, 0, dtype=torch.int32)}, "no whole groups of 64 x 4 bits"),
    ({"scales": torch.zeros(4, 3)}, r"scales has shape \[4, 3\]; for this packed it must be \[4, 2\]"),
    ({"biases": torch.zeros(4, 2).int()}, "biases is torch.int32; it must be of a float type"),
    ({"x": torch.zeros(2, 127)}, r"x has shape \[2, 127\]; it must be \[any, 128\]"),
    ({"bias": torch.zeros(5)}, r"bias has shape \[5\]; it must be \[4\]"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_torch_refuses_what_does_not_fit(changed: dict[str, Any], words: str) -> None:
    names = ("packed", "scales", "biases")
    arguments = {"x": torch.zeros(2, 128), "bits": 4, "group": 64, **dict(zip(names, in_torch(GOOD), strict=True))}
    with pytest.raises(ValueError, match=words):
        module.affine_matmul(**{**arguments, **changed})


def test_the_definition_refuses_what_does_not_fit() -> None:
    x = np.zeros((2, 128), np.float32)
    with pytest.raises(ValueError, match="3 bits in groups of 48 are not supported"):
        reference.dequantize(*GOOD, 3, 48)
    with pytest.raises(ValueError, match="do not fit 8 bits in groups of 64"):
        reference.dequantize(*GOOD, 8, 64)
    with pytest.raises(ValueError, match=r"it must be \[M, 128\]"):
        reference.affine_matmul(x[:, :64], *GOOD, 4, 64)
