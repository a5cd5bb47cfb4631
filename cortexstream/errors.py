"""Every error that CortexStream raises on purpose.

CortexStreamError
├── InvalidRequestError      (ValueError)    the caller asked for something impossible; nothing was changed
├── ModelLoadError           (ValueError)    a model folder is missing, broken, or of a kind that is not supported
├── BackendUnavailableError  (RuntimeError)  the chosen backend cannot run here
├── OutOfMemoryBudgetError   (MemoryError)   the memory budget cannot hold what must be held
├── ArenaError               (RuntimeError)  wrong use of the KV arena; nothing was changed
│   └── ArenaFullError                       not enough free blocks
└── EngineError              (RuntimeError)  the engine is closed, or a step failed on the device
"""

from __future__ import annotations


class CortexStreamError(Exception):
    """Base of all errors of this package."""


class InvalidRequestError(CortexStreamError, ValueError):
    """A request was refused at the border. `field` names what was wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ModelLoadError(CortexStreamError, ValueError):
    """A model folder cannot be served; the message names the file and what to do."""


class BackendUnavailableError(CortexStreamError, RuntimeError):
    """The chosen backend cannot run here; the message says what was probed and what to install."""


class OutOfMemoryBudgetError(CortexStreamError, MemoryError):
    """Weights and KV do not fit in the memory budget; the message has the numbers."""


class ArenaError(CortexStreamError, RuntimeError):
    """Wrong use of the KV arena: a stale or foreign handle, a double free, a negative count. Nothing was changed."""


class ArenaFullError(ArenaError):
    """Not enough free blocks, counted over the whole arena. Nothing was changed."""


class EngineError(CortexStreamError, RuntimeError):
    """The engine is closed, or the device failed while it ran this request."""
