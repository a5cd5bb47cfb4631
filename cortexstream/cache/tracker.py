"""Who holds how many bytes of memory, and what for."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from queue import Empty, SimpleQueue

from cortexstream.cache.checks import integer
from cortexstream.errors import ArenaError, CacheValueError


class Purpose(StrEnum):
    """What memory is for."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"
    INTERMEDIATE = "intermediate"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Allocation:
    """One recorded piece of memory; hand it back to `MemoryTracker.release`."""

    number: int
    nbytes: int
    purpose: Purpose
    description: str


class MemoryTracker:
    """A ledger: it counts what it is told, and neither allocates nor frees. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, Allocation] = {}
        self._numbers = itertools.count(1)
        # A finalizer may run in any thread at any instruction, also inside the lock: it only puts the number here.
        self._gone: SimpleQueue[int] = SimpleQueue()

    def record(self, nbytes: int, purpose: str = Purpose.UNKNOWN, description: str = "") -> Allocation:
        """Count `nbytes` as held. Raises CacheValueError for a negative count or a purpose not in `Purpose`."""
        nbytes = integer("nbytes", nbytes)
        if nbytes < 0:
            raise CacheValueError(f"nbytes is {nbytes}; must be at least 0")
        with self._lock:
            allocation = Allocation(next(self._numbers), nbytes, _known(purpose), description)
            self._live[allocation.number] = allocation
        return allocation

    def release(self, allocation: Allocation) -> None:
        """Count it no more. Raises ArenaError, changing nothing, if it was released before or is another tracker's."""
        with self._lock:
            self._sweep()
            if not isinstance(allocation, Allocation) or self._live.get(allocation.number) is not allocation:
                raise ArenaError(f"double or foreign release: {allocation} is not held in this tracker")
            del self._live[allocation.number]

    def attach(
        self, owner: object, nbytes: int, purpose: str = Purpose.UNKNOWN, description: str = ""
    ) -> Callable[[], object]:
        """Record bytes for as long as `owner` lives. Returns what releases them earlier; calling it again does nothing.

        Raises as `record` does, and TypeError when `owner` cannot be weakly referenced.
        """
        weakref.ref(owner)
        finalizer = weakref.finalize(owner, self._gone.put, self.record(nbytes, purpose, description).number)
        finalizer.atexit = False
        return finalizer

    @property
    def total_bytes(self) -> int:
        return sum(allocation.nbytes for allocation in self.allocations())

    @property
    def allocation_count(self) -> int:
        return len(self.allocations())

    def usage(self, purpose: str) -> int:
        """Bytes held for one purpose. Raises CacheValueError for a purpose not in `Purpose`."""
        return self.usage_by_purpose()[_known(purpose)]

    def usage_by_purpose(self) -> dict[Purpose, int]:
        """Bytes held for every purpose, those with 0 bytes too."""
        usage = dict.fromkeys(Purpose, 0)
        for allocation in self.allocations():
            usage[allocation.purpose] += allocation.nbytes
        return usage

    def allocations(self) -> list[Allocation]:
        """What is held, oldest first."""
        with self._lock:
            self._sweep()
            return list(self._live.values())

    def report(self) -> str:
        """A text: the total, a line a purpose, and a line for each piece, largest first."""
        held = self.allocations()
        lines = [f"memory: {sum(a.nbytes for a in held):,} bytes in {len(held)} allocations"]
        for purpose in Purpose:
            lines.append(f"  {purpose:<12} {sum(a.nbytes for a in held if a.purpose == purpose):>18,} bytes")
        for a in sorted(held, key=lambda a: -a.nbytes):
            lines.append(f"  #{a.number} {a.purpose}: {a.nbytes:,} bytes, {a.description or 'no description'}")
        return "\n".join(lines)

    def _sweep(self) -> None:
        """Drop what finalizers have let go; the lock is held."""
        while True:
            try:
                self._live.pop(self._gone.get_nowait(), None)  # None: its allocation was released by hand
            except Empty:
                return


def _known(purpose: str) -> Purpose:
    try:
        return Purpose(purpose)
    except ValueError:
        raise CacheValueError(f"purpose is {purpose!r}; must be one of {', '.join(Purpose)}") from None
