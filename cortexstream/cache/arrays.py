"""One small face over numpy, torch and MLX arrays: memory, writes in place, copies, addresses.

torch and mlx.core are never imported here: they come as a `namespace` argument, or are loaded because an array of
theirs was passed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cortexstream.errors import CacheMemoryError, CacheValueError

Array = Any  # numpy.ndarray, torch.Tensor or mlx.core.array
Slots = npt.NDArray[np.int64]

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class Library(Protocol):
    """What a cache needs of an array library."""

    name: str

    def dtype(self, name: str) -> Any:
        """The library's dtype of a name in ITEM_BYTES. Raises CacheValueError for others, and for what it lacks."""

    def allocate(self, count: int, shape: tuple[int, ...], dtype: str) -> list[Array]:
        """`count` zeroed arrays whose memory is there now, not only promised. Raises CacheMemoryError; `dtype` does."""

    def write(self, array: Array, axis: int, start: int, new: Array) -> None:
        """array[start : start + new.shape[axis]] = new along `axis`, in place; the caller has checked that it fits."""

    def clear(self, array: Array) -> None:
        """Fill with zeros, in place."""

    def take(self, array: Array, axis: int, order: Slots) -> Array:
        """A copy, in memory of its own, of the entries `order` along `axis`; nothing refers to `array` afterwards."""

    def address(self, array: Array) -> int:
        """Where the array's first element lies. On MLX this waits for what is being computed."""

    def obstacle(self, array: Array, new: Array) -> str | None:
        """Why `new`, an array of the same library, cannot be written into `array`, or None."""


def library(namespace: ModuleType, device: Any = None) -> Library:
    """The face over numpy, torch or mlx.core; `device` is where torch allocates (None: torch's default device)."""
    name = getattr(namespace, "__name__", None)
    if name == "torch":
        return _Torch(namespace, device)
    if name not in ("numpy", "mlx.core"):
        raise CacheValueError(f"namespace is {namespace!r}; pass the module numpy, torch or mlx.core")
    if device is not None:
        raise CacheValueError(f"device is {device!r}; only torch takes one, {name} allocates on its default device")
    return _Numpy() if name == "numpy" else _Mlx(namespace)


def library_of(name: str, array: Array) -> Library:
    """The face over the library that an array comes from; `name` is what an error calls the array."""
    for cls in type(array).__mro__:
        module = {"numpy": "numpy", "torch": "torch", "mlx": "mlx.core"}.get(cls.__module__.partition(".")[0])
        if module is not None:
            return library(sys.modules[module])
    raise CacheValueError(f"{name} is of type {type(array).__name__}; pass an array of numpy, torch or mlx")


def address_of(array: Array) -> int:
    """Where an array's first element lies in memory, to prove that a view or a write made no copy.

    On MLX this waits for what is being computed. Raises CacheValueError for what is no array of numpy, torch or mlx.
    """
    return library_of("array", array).address(array)


def dtype_name(array: Array) -> str:
    """float32 for numpy.float32, torch.float32 and mlx.core.float32."""
    return str(array.dtype).rpartition(".")[2]


def _dtype(namespace: Any, name: str) -> Any:
    if name not in tuple(ITEM_BYTES) or not hasattr(namespace, name):
        known = ", ".join(known for known in ITEM_BYTES if hasattr(namespace, known))
        raise CacheValueError(f"dtype is {name!r}; with {namespace.__name__} it must be one of {known}")
    return getattr(namespace, name)


def _refused(library: str, nbytes: int, error: Exception) -> CacheMemoryError:
    return CacheMemoryError(f"{library} could not get {nbytes:,} bytes ({error}); ask for fewer tokens or layers")


def _nbytes(count: int, shape: tuple[int, ...], dtype: str) -> int:
    return count * math.prod(shape) * ITEM_BYTES[dtype]


def _along(axis: int, start: int, length: int) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, slice(start, start + length))


def _overlaps(shape: Sequence[int], strides: Sequence[int]) -> str | None:
    """The obstacle that an expanded array is: several of its entries are one number in memory."""
    for size, stride in zip(shape, strides, strict=True):
        if size > 1 and not stride:
            return f"the array to write into is expanded: its {size} entries of stride 0 are one in memory; copy it"
    return None


class _Numpy:
    name = "numpy"

    def dtype(self, name: str) -> Any:
        return _dtype(np, name)

    def allocate(self, count: int, shape: tuple[int, ...], dtype: str) -> list[Array]:
        native = self.dtype(dtype)
        try:
            pool = np.empty((count, *shape), native)
        except (MemoryError, ValueError) as error:  # ValueError: more elements than numpy can count
            raise _refused(self.name, _nbytes(count, shape, dtype), error) from error
        pool.fill(0)  # numpy.zeros would only promise the pages
        return list(pool)

    def write(self, array: Array, axis: int, start: int, new: Array) -> None:
        array[_along(axis, start, new.shape[axis])] = new

    def clear(self, array: Array) -> None:
        array.fill(0)

    def take(self, array: Array, axis: int, order: Slots) -> Array:
        return np.take(array, order, axis)

    def address(self, array: Array) -> int:
        return int(array.__array_interface__["data"][0])

    def obstacle(self, array: Array, new: Array) -> str | None:
        if not array.flags.writeable:
            return "the array to write into is read-only"
        return _overlaps(array.shape, array.strides)


class _Torch:
    name = "torch"

    def __init__(self, torch: Any, device: Any) -> None:
        self._torch, self._device = torch, device

    def dtype(self, name: str) -> Any:
        return _dtype(self._torch, name)

    def allocate(self, count: int, shape: tuple[int, ...], dtype: str) -> list[Array]:
        native = self.dtype(dtype)
        try:
            # A tensor born in inference mode could not be written outside of it.
            with self._torch.inference_mode(False):
                pool = self._torch.zeros((count, *shape), dtype=native, device=self._device)
                return [pool[i] for i in range(count)]
        except (RuntimeError, TypeError) as error:  # TypeError: a size beyond 64 bits
            raise _refused(self.name, _nbytes(count, shape, dtype), error) from error

    def write(self, array: Array, axis: int, start: int, new: Array) -> None:
        array.narrow(axis, start, new.shape[axis]).copy_(new.detach())  # else the pool would join new's autograd graph

    def clear(self, array: Array) -> None:
        array.zero_()

    def take(self, array: Array, axis: int, order: Slots) -> Array:
        return array.index_select(axis, self._torch.from_numpy(order).to(array.device))

    def address(self, array: Array) -> int:
        return int(array.data_ptr())

    def obstacle(self, array: Array, new: Array) -> str | None:
        if array.device != new.device:
            return f"it is on {new.device}, the cache on {array.device}"
        if array.is_inference() and not self._torch.is_inference_mode_enabled():
            return "the tensor to write into was made in inference mode; write it there, or make it outside"
        if array.requires_grad and self._torch.is_grad_enabled():
            return "the tensor to write into requires grad; detach it, or write under torch.no_grad()"
        return _overlaps(array.shape, array.stride())


class _Mlx:
    """MLX writes an array in place if nothing else refers to its memory when the write is evaluated: no slice of it, no
    unfinished reader. Else it copies all of it first. Hence an allocation per array, so that layers do not meet.
    """

    name = "mlx"

    def __init__(self, mx: Any) -> None:
        self._mx = mx

    def dtype(self, name: str) -> Any:
        return _dtype(self._mx, name)

    def allocate(self, count: int, shape: tuple[int, ...], dtype: str) -> list[Array]:
        mx, native = self._mx, self.dtype(dtype)
        try:
            np.empty(_nbytes(count, shape, dtype), np.uint8)  # MLX's CPU allocator crashes where this one refuses
            arrays = [mx.zeros(shape, native) for _ in range(count)]
            mx.eval(arrays)
            return arrays
        except (MemoryError, RuntimeError, ValueError, TypeError, OverflowError) as error:
            raise _refused(self.name, _nbytes(count, shape, dtype), error) from error

    def write(self, array: Array, axis: int, start: int, new: Array) -> None:
        length = new.shape[axis]
        if length == array.shape[axis]:
            # A slice that covers everything is not written but replaced, by the caller's own memory; a scatter writes.
            array[(*[slice(None)] * axis, self._mx.arange(length))] = new
        else:
            array[_along(axis, start, length)] = new

    def clear(self, array: Array) -> None:
        array[self._mx.arange(array.shape[0])] = 0  # a scatter, for the same reason

    def take(self, array: Array, axis: int, order: Slots) -> Array:
        copy = self._mx.take(array, self._mx.array(order.astype(np.int32)), axis=axis)
        self._mx.eval(copy)
        self._mx.synchronize()  # or the next write could meet a reader that is just ending
        return copy

    def address(self, array: Array) -> int:
        mx = self._mx
        mx.eval(array)
        mx.synchronize()
        words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
        found = np.array(array.view(words), copy=False).__array_interface__["data"][0]  # numpy has no bfloat16
        mx.synchronize()
        return int(found)

    def obstacle(self, array: Array, new: Array) -> str | None:
        return None
