"""What is asked of arguments before anything is written."""

from __future__ import annotations

import operator

from cortexstream.cache.arrays import Array, Library, dtype_name, library_of
from cortexstream.errors import CacheValueError


def integer(name: str, value: object) -> int:
    """`value` as an int. Raises CacheValueError for a float, a string and anything else that is no integer."""
    try:
        return operator.index(value)  # type: ignore[arg-type]  # the TypeError is the check
    except TypeError:
        raise CacheValueError(f"{name} is {value!r}; must be an integer") from None


def writable(library: Library, name: str, array: Array, new: Array) -> None:
    """Raises CacheValueError unless `new`, called `name`, can be written into `array` without converting it."""
    origin = library_of(name, new).name
    if origin != library.name:
        raise CacheValueError(f"{name} is an array of {origin}, the cache holds arrays of {library.name}; convert it")
    if new.dtype != array.dtype:
        raise CacheValueError(
            f"{name} is {dtype_name(new)}, the cache holds {dtype_name(array)}; convert it first, "
            "nothing is rounded in silence"
        )
    if problem := library.obstacle(array, new):
        raise CacheValueError(f"{name} cannot be written: {problem}")
