"""What all kernels share: which device this is, checks of launchers' arguments, conversion to a pool's type."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_TYPES = (torch.float8_e5m2, torch.float8_e4m3fn)


@triton.jit
def narrow(x, like, scale):
    """x in the type that `like` points to. fp8 gets x / scale, as the nearest number that it has, never an infinity."""
    kind: tl.constexpr = like.dtype.element_ty
    if kind == tl.float8e5:
        x = tl.clamp(x.to(tl.float32) / scale, -57344.0, 57344.0)
    elif kind == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32) / scale, -448.0, 448.0)
    return x.to(kind)


def capability() -> int:
    """80 or 90: the column of the configuration tables for the current device; 80 in Triton's interpreter.

    9.0, 10.0 and 10.3 have 227 KiB of shared memory for a program and take the column 90. Everything else from 8.0 on
    takes 80, whose tiles fit the 99 KiB of 8.6, 8.9 and 12.0. Raises RuntimeError below 8.0.
    """
    if triton.knobs.runtime.interpret:
        return 80
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 80:
        raise RuntimeError(f"the kernels need an NVIDIA GPU of compute capability 8.0 or newer; this is {target}")
    return 90 if target.arch in (90, 100, 103) else 80


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:  # fmt: skip
    """Raises ValueError unless `tensor` is contiguous, on `device`, of one of `dtypes`, and of `shape` (None: any)."""
    if tensor.ndim != len(shape) or any(want not in (None, n) for n, want in zip(tensor.shape, shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [{wanted}]")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dict.fromkeys(dtypes)))}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device} as the others are")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}; it must be contiguous")


def check_tokens(name: str, tensor: torch.Tensor, first: tuple[int, ...] = ()) -> tuple[int, int, int]:
    """The shape of [T, heads, dim] floats whose heads are adjacent; tokens may lie at any distance.

    Raises ValueError if `tensor` is not that, or its shape does not begin with `first`.
    """
    shape = tuple(tensor.shape)
    if len(shape) != 3 or shape[: len(first)] != first or 0 in shape[1:]:
        wanted = ", ".join([*map(str, first), *("T", "heads", "dim")[len(first) :]])
        raise ValueError(f"{name} has shape {list(shape)}; it must be [{wanted}]")
    if tensor.dtype not in FLOAT_TYPES:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, FLOAT_TYPES))}")
    adjacent = (shape[2] == 1 or tensor.stride(2) == 1) and (shape[1] == 1 or tensor.stride(1) == shape[2])
    if tensor.numel() and not adjacent:
        raise ValueError(f"{name} has strides {list(tensor.stride())}; the heads of a token must be adjacent")
    return shape


def padded(dim: int) -> int:
    """The width of a tile that holds `dim` numbers: a power of two, and no less than tensor cores take."""
    return max(16, int(triton.next_power_of_2(dim)))
