"""CortexStream: one Python API that serves language models on Apple Silicon (MLX) and elsewhere.

Importing this package imports no array library; public names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cortexstream.async_llm import AsyncLLM
    from cortexstream.config import EngineConfig
    from cortexstream.errors import (
        ArenaError,
        ArenaFullError,
        BackendUnavailableError,
        CortexStreamError,
        EngineError,
        InvalidRequestError,
        ModelLoadError,
        OutOfMemoryBudgetError,
    )
    from cortexstream.generation import Generation
    from cortexstream.kv import KVArena, KVHandle
    from cortexstream.llm import LLM
    from cortexstream.outputs import CompletionOutput, Logprob, RequestOutput, StreamChunk
    from cortexstream.request import FinishReason, SamplingParams

_HOME = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "EngineConfig": "config",
    "Generation": "generation",
    "KVArena": "kv",
    "KVHandle": "kv",
    "SamplingParams": "request",
    "FinishReason": "request",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "StreamChunk": "outputs",
    "ArenaError": "errors",
    "ArenaFullError": "errors",
    "BackendUnavailableError": "errors",
    "CortexStreamError": "errors",
    "EngineError": "errors",
    "InvalidRequestError": "errors",
    "ModelLoadError": "errors",
    "OutOfMemoryBudgetError": "errors",
}

__all__ = [
    "LLM",
    "ArenaError",
    "ArenaFullError",
    "AsyncLLM",
    "BackendUnavailableError",
    "CompletionOutput",
    "CortexStreamError",
    "EngineConfig",
    "EngineError",
    "FinishReason",
    "Generation",
    "InvalidRequestError",
    "KVArena",
    "KVHandle",
    "Logprob",
    "ModelLoadError",
    "OutOfMemoryBudgetError",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cortexstream' has no attribute {name!r}")
    return getattr(import_module(f"cortexstream.{_HOME[name]}"), name)
