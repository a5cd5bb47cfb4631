"""What the tests of the Triton kernels share: rows of keys and values in poisoned pools; how near is near enough."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.conftest import require

torch = require("torch")
require("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests.kernels.triton import interpreter_fixes

    interpreter_fixes.install()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # absolute, for numbers of unit variance
DTYPES = list(NEAR)


class Memory(NamedTuple):
    """Rows' keys and values. Slots of no row hold NaN and infinity, and a table's unused entries lead there."""

    k_pool: Any
    v_pool: Any
    tables: Any
    block_tokens: int | None


def normal(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(numbers).to(dtype).to(DEVICE)


def named(value: Any) -> str:
    """A test's id: short, and the same in every process."""
    return " ".join(f"{k}={v}" for k, v in value.items()) or "plain" if isinstance(value, dict) else str(value)


def int32(*numbers: int) -> Any:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def memory(
    tokens: list[int], kv_heads: int, dim: int, value_dim: int, dtype: Any, block_tokens: int | None, seed: int = 1
) -> Memory:
    """Rows of so many tokens, in blocks in random order, or as runs with gaps between them."""
    rng = np.random.default_rng(seed)
    if block_tokens is None:
        starts = np.cumsum([3, *(count + 5 for count in tokens)])
        tables, num_slots = starts[:-1, None], int(starts[-1])
    else:
        needs = [-(-count // block_tokens) for count in tokens]
        num_blocks = sum(needs) + 3
        order = list(rng.permutation(num_blocks))
        tables = np.full((len(tokens), max([1, *needs]) + 1), order.pop())
        for row, need in enumerate(needs):
            tables[row, :need] = [order.pop() for _ in range(need)]
        num_slots = num_blocks * block_tokens
    k_pool = torch.full((num_slots, kv_heads, dim), float("nan"), dtype=dtype)
    v_pool = torch.full((num_slots, kv_heads, value_dim), float("inf")).to(dtype)  # NaN in fp8 without infinities
    for row, count in enumerate(tokens):
        slots = slots_of(tables[row], count, block_tokens)
        k_pool[slots] = torch.from_numpy(rng.standard_normal((count, kv_heads, dim))).to(dtype)
        v_pool[slots] = torch.from_numpy(rng.standard_normal((count, kv_heads, value_dim))).to(dtype)
    tables = torch.from_numpy(tables.astype(np.int32))
    return Memory(k_pool.to(DEVICE), v_pool.to(DEVICE), tables.to(DEVICE), block_tokens)


def slots_of(table: npt.NDArray[Any], count: int, block_tokens: int | None) -> Any:
    positions = np.arange(count)
    if block_tokens is None:
        return torch.from_numpy(table[0] + positions)
    return torch.from_numpy(table[positions // block_tokens] * block_tokens + positions % block_tokens)


def fenced(tensor: Any) -> Any:
    """A copy that ends where memory ends: to read or write beyond it ends the interpreter's process with a fault."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + room), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size).view(tensor.shape)
    return copy.copy_(tensor)


def exact(tensor: Any) -> Any:
    """A tensor's numbers as float64 in numpy, for the definitions; None stays None."""
    return None if tensor is None else tensor.float().cpu().numpy().astype(np.float64)


def near(got: Any, want: npt.NDArray[np.float64], dtype: Any) -> None:
    """Assert that every number is finite and as near as its type allows."""
    numbers = exact(got)
    assert got.dtype == dtype and numbers.shape == want.shape
    assert np.isfinite(numbers).all(), f"{(~np.isfinite(numbers)).sum()} numbers are not finite"
    if want.size:
        assert np.abs(numbers - want).max() <= NEAR[dtype], f"off by {np.abs(numbers - want).max():.2e}"


def same(left: Any, right: Any) -> bool:
    """Are these the same bits? NaN equals NaN."""
    numbers = [x.contiguous().cpu().view(torch.uint8).numpy() for x in (left, right)]
    return left.dtype == right.dtype and np.array_equal(*numbers)
