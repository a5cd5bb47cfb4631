"""The MLX backend: mlx-lm's own model classes over one row pool per layer. Metal on a Mac, the CPU elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortexstream.backend import BackendOptions

if TYPE_CHECKING:
    from cortexstream.backends.mlx.backend import MlxBackend

INSTALL = "on an Apple-Silicon Mac `pip install cortexstream`, elsewhere `pip install 'cortexstream[mlx]'`"


def available() -> str | None:
    try:
        import mlx.core  # noqa: F401
        import mlx_lm  # noqa: F401
    except ImportError as error:
        return f"{error}; {INSTALL}"
    return None


def accelerator() -> str | None:
    import mlx.core as mx

    return f"Metal, {mx.device_info()['device_name']}" if mx.metal.is_available() else None


def create(options: BackendOptions) -> MlxBackend:
    from cortexstream.backends.mlx.backend import MlxBackend, release_thread

    try:
        return MlxBackend(options)
    except BaseException:
        release_thread()
        raise


__all__ = ["accelerator", "available", "create"]
