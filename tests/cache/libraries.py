"""The three array libraries as the cache tests use them, and how much memory a call takes in each."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from tests.conftest import require

SLACK = {"numpy": 20_000, "mlx": 300_000, "torch": 0}
"""Bytes that `new_bytes` may see beside arrays: Python's own objects, MLX's scalars and index arrays."""


class Library:
    """One of numpy, mlx, torch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.namespace: ModuleType = np if name == "numpy" else require(name)

    def array(self, values: Any, dtype: str = "float32") -> Any:
        """A new array of this library with these values."""
        plain = np.array(values, np.float32)
        if self.name == "torch":
            return self.namespace.from_numpy(plain).to(getattr(self.namespace, dtype))
        made = plain.astype(dtype) if self.name == "numpy" else self.namespace.array(plain)
        return made if self.name == "numpy" else made.astype(getattr(self.namespace, dtype))

    def full(self, shape: tuple[int, ...], value: float, dtype: str = "float16") -> Any:
        return self.array(np.full(shape, value), dtype)

    def numpy(self, array: Any) -> np.ndarray:
        """The values, float32, in memory of their own."""
        if self.name == "torch":
            return np.array(array.detach().float().cpu().numpy())
        return np.array(array if self.name == "numpy" else array.astype(self.namespace.float32), np.float32)

    def settle(self, *arrays: Any) -> None:
        """Compute what is still lazy."""
        if self.name == "mlx":
            self.namespace.eval(*arrays)
            self.namespace.synchronize()

    def new_bytes(self, call: Callable[[], Any]) -> int:
        """The most memory that `call`, and computing the arrays it returns, held at once beyond what was held before.

        On torch the sum of the storages that its operators returned and did not get.
        """
        gc.collect()
        if self.name == "numpy":
            traced = tracemalloc.is_tracing()  # then what was made since counts, when it is given back
            tracemalloc.start()
            try:
                before, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                call()
                return tracemalloc.get_traced_memory()[1] - before
            finally:
                if not traced:
                    tracemalloc.stop()
        if self.name == "mlx":
            self.namespace.synchronize()
            before = self.namespace.get_active_memory()
            self.namespace.reset_peak_memory()
            made = call()
            self.settle(*(made or ()))
            return max(0, int(self.namespace.get_peak_memory()) - int(before))
        return torch_bytes(call)


def torch_bytes(call: Callable[[], Any]) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    torch = require("torch")

    def storages(tree: Any) -> dict[int, int]:
        found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return {storage.data_ptr(): storage.nbytes() for storage in found}

    class Counting(TorchDispatchMode):
        total: int = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            known = storages((args, kwargs))
            self.total += sum(size for place, size in storages(result).items() if place not in known)
            return result

    with Counting() as counting:
        call()
    return int(counting.total)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
