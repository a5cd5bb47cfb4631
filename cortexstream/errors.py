"""Every error that CortexStream raises on purpose.

CortexStreamError
├── InvalidRequestError      (ValueError)    the caller asked for something impossible; nothing was changed
├── ModelLoadError           (ValueError)    a model folder is missing, broken, or of a kind that is not supported
├── BackendUnavailableError  (RuntimeError)  the chosen backend cannot run here
├── OutOfMemoryBudgetError   (MemoryError)   the memory budget cannot hold what must be held
├── ArenaError               (RuntimeError)  wrong use of KV memory; nothing was changed
│   ├── ArenaFullError                       not enough free blocks
│   ├── CacheOverflowError                   more tokens than a KV cache holds
│   ├── CacheIndexError      (IndexError)    no such layer or batch entry in a KV cache
│   ├── CacheValueError      (ValueError)    a number, shape, dtype or library that a KV cache cannot take
│   └── CacheMemoryError     (MemoryError)   the memory for a KV cache could not be had
├── ConstraintError          (RuntimeError)  a grammar cannot go on; ends the request that it belongs to
└── EngineError              (RuntimeError)  the engine is closed, or a step failed on the device
"""

from __future__ import annotations

MAX_SHOWN = 60  # characters


def shown(value: object) -> str:
    """A refused value as a message shows it: its repr, cut to MAX_SHOWN characters. Python refuses to write out whole
    numbers of thousands of digits; of those it is the size, and of what holds one the type."""
    if isinstance(value, int) and value.bit_length() > 4 * MAX_SHOWN:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:
        text = f"a {type(value).__name__} with a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


class CortexStreamError(Exception):
    """Base of all errors of this package."""


class InvalidRequestError(CortexStreamError, ValueError):
    """A request was refused at the border. `field` names what was wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self._message = field, message

    def __reduce__(self) -> tuple[type[InvalidRequestError], tuple[str, str]]:
        return type(self), (self.field, self._message)  # so that it reaches another process


class ModelLoadError(CortexStreamError, ValueError):
    """A model folder cannot be served; the message names the file and what to do."""


class BackendUnavailableError(CortexStreamError, RuntimeError):
    """The chosen backend cannot run here; the message says what was probed and what to install."""


class OutOfMemoryBudgetError(CortexStreamError, MemoryError):
    """Weights and KV do not fit in the memory budget; the message has the numbers."""


class ArenaError(CortexStreamError, RuntimeError):
    """Wrong use of KV memory: a stale or foreign handle, a double free, a negative count. Nothing was changed."""


class ArenaFullError(ArenaError):
    """Not enough free blocks, counted over the whole arena. Nothing was changed."""


class CacheOverflowError(ArenaError):
    """More tokens than a KV cache holds; the message has position and limit. Nothing was changed."""


class CacheIndexError(ArenaError, IndexError):
    """A layer or batch entry that a KV cache does not have. Nothing was changed."""


class CacheValueError(ArenaError, ValueError):
    """A number, shape, dtype, device or array library that a KV cache cannot take. Nothing was changed."""


class CacheMemoryError(ArenaError, MemoryError):
    """The memory for a KV cache could not be had; the message has the bytes."""


class ConstraintError(CortexStreamError, RuntimeError):
    """A grammar cannot go on: it grew too complex, or it does not allow what was drawn."""


class EngineError(CortexStreamError, RuntimeError):
    """The engine is closed, or the device failed while it ran this request."""
