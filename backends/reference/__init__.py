"""The backend that defines "correct": numpy, float32, slow and readable, always installed."""

from cortexstream.backends.reference.backend import ReferenceBackend, accelerator, available, create

__all__ = ["ReferenceBackend", "accelerator", "available", "create"]
