"""A backend without arrays: the next token is a hash of the KV that it reads through the block table."""

from cortexstream.backends.null.backend import NullBackend, accelerator, available, create

__all__ = ["NullBackend", "accelerator", "available", "create"]
