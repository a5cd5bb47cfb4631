"""The reference backend's KV memory: pools per window, moves, swaps, states; what it refuses, and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cortexstream.backend import Backend, BackendOptions, KVQuantization, LayerKV, LayerState, ModelInfo
from cortexstream.backends import reference
from cortexstream.backends.reference.memory import KVMemory
from cortexstream.errors import EngineError, OutOfMemoryBudgetError
from cortexstream.plan import KVRows, MemoryOp, Move, PlanRow, SampleSpec, StepPlan, SwapDrop, SwapIn, SwapOut

BLOCK = 4
LAYERS = (LayerKV(2, 32, 64, 10), LayerKV(1, 32, 32), LayerKV(2, 64, 32, 5), LayerKV(2, 32, 64, 10))
INFO = ModelInfo("test", 11, 64, frozenset(), LAYERS, 4, 0)
FORMATS = [None, KVQuantization(8, 32), KVQuantization(4, 32)]


def memory(quantization: KVQuantization | None = None, memory_bytes: int = 10**7) -> KVMemory:
    """Pools of 8 blocks for full attention, 6 for the window of 5 and 9 for that of 10."""
    made = KVMemory(INFO._replace_quantization(quantization), (8, 6, 9), BLOCK, memory_bytes)  # type: ignore[attr-defined]
    return made
