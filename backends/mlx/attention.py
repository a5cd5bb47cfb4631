"""Decode attention over sequences that lie apart: stock `mx.fast.scaled_dot_product_attention`, one call per segment.

mlx-lm's models call a module-level `scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)`
that each model file imports by name. `teach` wraps that name in the files of one model, so that keys and values may
be `Ragged`; with ordinary arrays the original runs.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

NAME = "scaled_dot_product_attention"


class RaggedNotPossible(Exception):
    """This model does something with its keys, values or mask that separate views cannot follow."""


class Segment:
    """Rows first .. first + rows of the batch, which attend to slots start .. start + length of their own runs.

    `valid` is bool [rows, length], None where every key may be seen.
    """

    def __init__(self, first: int, rows: int, start: int, length: int, valid: npt.NDArray[np.bool_] | None) -> None:
        self.first, self.rows, self.start, self.length, self._valid = first, rows, start, length, valid
        self._masks: dict[int, mx.array] = {}

    def mask(self, heads: int) -> mx.array | None:
        """bool [rows, heads, 1, length], contiguous (Metal copies a broadcast mask in every layer) and made once."""
        if self._valid is None:
            return None
        if heads not in self._masks:
            shape = (self.rows, heads, 1, self.length)
            self._masks[heads] = mx.contiguous(mx.broadcast_to(mx.array(self._valid)[:, None, None, :], shape))
        return self._masks[heads]


class Ragged:
    """Keys (or values) of a batch as separate views [rows, heads, length, dim], one per segment."""

    def __init__(self, views: list[mx.array], segments: list[Segment]) -> None:
        self.views, self.segments = views, segments


def teach(model: nn.Module) -> bool:
    """Make a model's files accept Ragged keys and values; False if none of them uses the name."""
    found = False
    for name in {type(module).__module__ for module in model.modules()}:
        file = sys.modules[name]
        original = getattr(file, NAME, None)
        if original is not None:
            found = True
            if not hasattr(original, "accepts_ragged"):
                setattr(file, NAME, _accepting(original))
    return found


def _accepting(original: Any) -> Any:
    def attention(
        queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None
    ) -> Any:
        if isinstance(keys, Ragged):
            return ragged_attention(queries, keys, values, scale, mask, sinks)
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    attention.accepts_ragged = True  # type: ignore[attr-defined]
    return attention


def ragged_attention(
    queries: mx.array, keys: Ragged, values: Ragged, scale: float, mask: Any, sinks: mx.array | None
) -> mx.array:
    """Queries [rows, heads, 1, dim] against each row's own keys; returns [rows, heads, 1, value dim]."""
    if mask is not None or queries.shape[2] != 1:
        raise RaggedNotPossible("the model made a mask of its own")
    outputs = []
    for k, v, segment in zip(keys.views, values.views, keys.segments, strict=True):
        q = queries[segment.first : segment.first + segment.rows]
        outputs.append(
            mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=segment.mask(q.shape[1]), sinks=sinks)
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
