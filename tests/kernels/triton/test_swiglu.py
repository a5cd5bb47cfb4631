"""`kernels.triton.swiglu` against its definition in float64 (P12), and the definition against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference import swiglu as reference
from cortexstream.kernels.triton.swiglu import ACTIVATIONS, gated
from tests.kernels.triton.support import DTYPES, exact, fenced, near, normal, same, torch


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 160), (1, 5000), (2, 4096), (6,)])
def test_p12_it_is_the_definition(shape: tuple[int, ...], dtype: Any, activation: str) -> None:
    x = normal(*shape, dtype=dtype)
    near(gated(x, activation), reference.gated(exact(x), activation), dtype)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_small_numbers(activation: str) -> None:
    """Where an exponential overflows or is lost."""
    gate = torch.tensor([[-1e30, -200.0, -30.0, -1e-6, 0.0, 1e-6, 30.0, 200.0, 1e4]])
    x = torch.cat((gate, torch.full_like(gate, 2.0)), 1).to(normal(1).device)
    want = reference.gated(exact(x), activation)
    np.testing.assert_allclose(exact(gated(x, activation)), want, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition_is_what_torch_has(activation: str) -> None:
    x = normal(4, 64).double() * 3
    gate, up = x.chunk(2, -1)
    act = torch.nn.functional.silu if activation == "silu" else torch.nn.functional.gelu
    options = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
    want = (act(gate, **options) * up).cpu().numpy()
    np.testing.assert_allclose(reference.gated(x.cpu().numpy(), activation), want, rtol=1e-12, atol=1e-14)


def test_in_a_given_tensor_and_nothing_to_do() -> None:
    x = normal(3, 48)
    out = torch.full_like(x[:, :24], float("nan")).contiguous()
    assert gated(x, "silu", out) is out and same(out, gated(x, "silu"))
    assert gated(normal(0, 48), "gelu").shape == (0, 24)


def test_nothing_beyond_the_tensors_is_touched() -> None:
    """In memory that ends where the tensors do; on a GPU the kernel cannot reach it, and this is a plain comparison."""
    x = normal(3, 2002)
    if x.device.type == "cpu":
        out = fenced(torch.zeros(3, 1001))
        assert same(gated(fenced(x), "silu", out), gated(x, "silu"))
    near(gated(x, "silu"), reference.gated(exact(x), "silu"), torch.float32)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": normal(2, 15)}, r"x has shape \[2, 15\]; its last axis must have two halves"),
        ({"x": normal(2, 0)}, "its last axis must have two halves"),
        ({"x": normal(2, 32)[:, ::2]}, "x has strides .* it must be contiguous"),
        ({"x": normal(2, 16).double()}, "x is torch.float64"),
        ({"activation": "relu"}, "activation is 'relu'; it must be silu, gelu or gelu_tanh"),
        ({"out": normal(2, 16)}, r"out has shape \[2, 16\]; it must be \[2, 8\]"),
        ({"out": normal(2, 8).half()}, "out is torch.float16; it must be torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"x": normal(2, 16), "activation": "silu", **changed}
    kept = changed["out"].clone() if "out" in changed else None
    with pytest.raises(ValueError, match=words):
        gated(**arguments)
    assert kept is None or same(kept, changed["out"])


def test_the_definition_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="its last axis must have two halves"):
        reference.gated(np.zeros((2, 3)), "silu")
    with pytest.raises(ValueError, match="activation is 'relu'"):
        reference.gated(np.zeros((2, 4)), "relu")
