"""Two changes to Triton's interpreter (3.5 to 3.7), for tests only.

It computes on the bit patterns of bfloat16 and fp8 as if on integers: a product of two bfloat16 tiles is wrong by
orders of magnitude, a cast truncates. Upstream does not plan to support them (triton issues 11584 and 11585). Here
arithmetic on these types goes by way of float32 and torch's casts, which round to nearest even, as the hardware does.

And it prepares the whole language anew at every call of a function inside of a kernel, which takes half of the time.
Here it does so once a launch for each module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    _get_np_dtype,
    _patch_lang,
)

TYPES = {
    tl.bfloat16: (torch.bfloat16, np.int16),
    tl.float8e5: (torch.float8_e5m2, np.uint8),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
}
PATCHED = ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_dot", "create_fma")
ORIGINAL = {name: getattr(InterpreterBuilder, name) for name in PATCHED}


def narrow(handle: Any) -> bool:
    return handle.dtype.scalar in TYPES


def wide(handle: Any) -> Any:
    """A handle of a type in TYPES as float32, others as they are."""
    if not narrow(handle):
        return handle
    dtype, bits = TYPES[handle.dtype.scalar]
    stored = torch.from_numpy(np.array(handle.data).view(bits)).view(dtype)
    return TensorHandle(stored.float().numpy(), tl.float32)


def narrowed(handle: Any, scalar: Any) -> Any:
    """A float32 handle rounded to a type in TYPES."""
    dtype, bits = TYPES[scalar]
    rounded = torch.from_numpy(np.array(handle.data, np.float32)).to(dtype)
    storage = torch.int16 if bits is np.int16 else torch.uint8
    return TensorHandle(rounded.view(storage).numpy().view(_get_np_dtype(scalar)), scalar)


def cast_impl(self: Any, source: Any, target: Any) -> Any:
    scalar = target.scalar
    if source.dtype.scalar == scalar or not (narrow(source) or scalar in TYPES):
        return ORIGINAL["cast_impl"](self, source, target)
    widened = wide(source)
    if scalar in TYPES:
        return narrowed(widened, scalar)
    return widened if scalar == tl.float32 else ORIGINAL["cast_impl"](self, widened, target)


def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    return cast_impl(self, source, target)


def binary_op(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
    result = ORIGINAL["binary_op"](self, wide(left), wide(right), op)
    if not narrow(left) or result.data.dtype == bool:
        return result
    return narrowed(result, left.dtype.scalar)


def unary_op(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
    result = ORIGINAL["unary_op"](self, wide(arg), op)
    return narrowed(result, arg.dtype.scalar) if narrow(arg) else result


def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    return ORIGINAL["create_dot"](self, wide(a), wide(b), d, *options)


def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    result = ORIGINAL["create_fma"](self, wide(x), wide(y), wide(z))
    return narrowed(result, z.dtype.scalar) if narrow(z) else result


LAUNCH = GridExecutor.__call__
PREPARED: set[int] = set()  # modules in this launch, by the id of their globals


def launch(self: Any, *args: Any, **kwargs: Any) -> None:
    PREPARED.clear()
    LAUNCH(self, *args, **kwargs)


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = id(self.fn.__globals__)
    if module not in PREPARED:
        _patch_lang(self.fn)
        PREPARED.add(module)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    GridExecutor.__call__, InterpretedFunction.__call__ = launch, call
    for name in PATCHED:
        setattr(InterpreterBuilder, name, globals()[name])


@contextmanager
def uninstalled() -> Iterator[None]:
    """Triton's own arithmetic, inside of a with statement."""
    for name in PATCHED:
        setattr(InterpreterBuilder, name, ORIGINAL[name])
    try:
        yield
    finally:
        install()
