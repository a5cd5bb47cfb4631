"""The CUDA backend: transformers' model classes over block tables in torch. An NVIDIA GPU, or the CPU for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cortexstream.backend import BackendOptions

if TYPE_CHECKING:
    from cortexstream.backends.cuda.backend import CudaBackend

INSTALL = "`pip install 'cortexstream[cuda]'` on a Linux machine"


def available() -> str | None:
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        return f"{error}; {INSTALL}"
    if int(transformers.__version__.split(".")[0]) < 5:
        return f"transformers {transformers.__version__} is too old; {INSTALL} brings version 5"
    return None


def accelerator() -> str | None:
    import torch

    return f"CUDA, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else None


def create(options: BackendOptions) -> CudaBackend:
    from cortexstream.backends.cuda.backend import CudaBackend

    return CudaBackend(options)


__all__ = ["accelerator", "available", "create"]
