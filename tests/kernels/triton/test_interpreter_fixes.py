"""What the other tests rely on: the interpreter computes on narrow floats as torch and the hardware do (P12)."""

from __future__ import annotations

from typing import Any

import pytest
import triton
import triton.language as tl

from tests.kernels.triton.support import DEVICE, INTERPRETED, normal, same, torch

CASTS = [
    (narrow, wide)
    for narrow in (torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)
    for wide in (torch.float32, torch.float16, torch.bfloat16)
    if narrow != wide
]


@triton.jit
def arithmetic_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x + y)
    tl.store(out + N + i, x - y)
    tl.store(out + 2 * N + i, x * y)
    tl.store(out + 3 * N + i, tl.maximum(x, y))
    tl.store(out + 4 * N + i, tl.where(x > y, -x, y))


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.trans(tl.load(b + at))))


@triton.jit
def cast_kernel(source, target, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target + i, tl.load(source + i).to(target.dtype.element_ty))


def dot(a: Any, b: Any) -> Any:
    out = torch.zeros(32, 32, device=DEVICE)
    dot_kernel[(1,)](a, b, out, N=32)
    return out


def test_bfloat16_arithmetic_is_torchs() -> None:
    a, b = normal(256, dtype=torch.bfloat16), normal(256, dtype=torch.bfloat16, seed=1)
    out = torch.empty(5, 256, dtype=torch.bfloat16, device=DEVICE)
    arithmetic_kernel[(1,)](a, b, out, N=256)
    wanted = (a + b, a - b, a * b, torch.maximum(a, b), torch.where(a > b, -a, b))
    assert [same(got, want) for got, want in zip(out, wanted, strict=True)] == [True] * 5


def test_products_of_bfloat16_tiles_are_torchs() -> None:
    a, b = normal(32, 32, dtype=torch.bfloat16), normal(32, 32, dtype=torch.bfloat16, seed=1)
    assert torch.allclose(dot(a, b), a.float() @ b.float().T, atol=1e-4)


@pytest.mark.parametrize(("narrow", "wide"), CASTS, ids=str)
def test_casts_are_torchs(narrow: Any, wide: Any) -> None:
    source = normal(1024, dtype=wide) * 10
    target, back = torch.empty(1024, dtype=narrow, device=DEVICE), torch.empty(1024, dtype=wide, device=DEVICE)
    cast_kernel[(1,)](source, target, N=1024)
    cast_kernel[(1,)](target, back, N=1024)
    assert same(target, source.to(narrow)) and same(back, target.to(wide))


def test_triton_still_needs_them() -> None:
    """When this fails, upstream computes on bfloat16: delete that part of interpreter_fixes.py."""
    if not INTERPRETED:
        pytest.skip("about the interpreter, and kernels run on a GPU here")
    from tests.kernels.triton import interpreter_fixes

    a, b = normal(32, 32, dtype=torch.bfloat16), normal(32, 32, dtype=torch.bfloat16, seed=1)
    with interpreter_fixes.uninstalled():
        theirs = dot(a, b)
    assert not torch.allclose(theirs, a.float() @ b.float().T, atol=1e-4), "Triton's interpreter is right by itself now"
    assert torch.allclose(dot(a, b), a.float() @ b.float().T, atol=1e-4)
