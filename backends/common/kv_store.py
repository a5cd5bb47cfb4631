"""Where one layer's keys or values lie: a vector per slot and head, in the arrays of some library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cortexstream.backend import KVArray, KVQuantization

Slots = npt.NDArray[np.int64]


class Store(Protocol):
    """`Any` is an array of the backend's library, as attention takes it; `Slots` are always numpy's."""

    @property
    def nbytes(self) -> int: ...

    def append(self, slots: Slots, new: Any) -> None:
        """Write `new` [T, heads, dim] into `slots` [T]."""

    def read(self, where: slice | Slots) -> Any:
        """What the slots hold, [T, heads, dim]; a view of a slice if nothing has to be computed."""

    def rounded(self, new: Any) -> Any:
        """What `read` would give for `new` [T, heads, dim] once it was appended."""

    def move(self, source: int, target: int, count: int) -> None:
        """Copy `count` slots from `source` on to `target` on, as if through a temporary."""

    def take(self, slots: Slots) -> list[Any]:
        """Raw copies in host memory of what the slots hold."""

    def put(self, slots: Slots, copies: list[Any]) -> None:
        """Write what `take` gave, bit for bit."""

    def to_host(self, slots: Slots) -> KVArray:
        """A copy of what the slots hold, in numpy."""

    def from_host(self, slots: Slots, new: KVArray) -> None:
        """Write what `to_host` of a store of this format gave, bit for bit."""


MakeStore = Callable[[int, int, int, KVQuantization | None], Store]
"""(slots, heads, dim, format) -> a store full of zeros whose memory is there now."""
