"""Causal attention with grouped heads, one query position after the other."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Float = TypeVar("Float", np.float32, np.float64)


def attention(
    q: npt.NDArray[Float], k: npt.NDArray[Float], v: npt.NDArray[Float], start: int, scale: float,
    window: int | None = None, sinks: npt.NDArray[Float] | None = None, first: int = 0, softcap: float | None = None,
) -> npt.NDArray[Float]:  # fmt: skip
    """softmax(q k^T * scale) v, in which the query at position p sees the keys at positions 0 .. p.

    q [T, Hq, D] are the queries at positions start .. start + T - 1; k [L, Hkv, D] and v [L, Hkv, Dv] hold positions
    first .. first + L - 1 with first + L = start + T, the queries' own included (the causal mask is aligned at the
    bottom right). Query head h reads key head h // (Hq / Hkv). With a `window` of W the query sees only the W latest
    positions, its own included: p - W + 1 .. p; `first` may then be as high as the first query sees. `sinks` [Hq] are
    logits that take part in each head's softmax but carry no value (Xiao et al., "Efficient streaming language models
    with attention sinks", 2023, as gpt-oss has them). With a `softcap` of c a score s becomes c * tanh(s / c), as
    Gemma 2 has it; sinks are not capped. Returns [T, Hq, Dv]. All float32, or all float64. Raises ValueError when
    shapes and numbers do not go together.

    Each position is computed by itself from exactly the keys it sees, so its result is the same bits whether it comes
    alone, in a chunk or in a whole prompt.
    """
    _check(q, k, v, start, window, sinks, first, softcap)
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    result = np.empty((tokens, heads, v.shape[2]), q.dtype)
    for t in range(tokens):
        end = start + t + 1 - first
        low = 0 if window is None else max(0, end - window)
        grouped = (q[t] * q.dtype.type(scale)).reshape(kv_heads, heads // kv_heads, dim)
        keys, values = k[low:end].transpose(1, 2, 0), v[low:end].transpose(1, 0, 2)  # [Hkv, D, S], [Hkv, S, Dv]
        scores = (grouped @ keys).reshape(heads, -1)
        if softcap is not None:
            scores = np.tanh(scores / q.dtype.type(softcap)) * q.dtype.type(softcap)
        weights = _softmax(scores, sinks).reshape(kv_heads, heads // kv_heads, -1)
        result[t] = (weights @ values).reshape(heads, -1)
    return result


def _softmax(scores: npt.NDArray[Float], sinks: npt.NDArray[Float] | None) -> npt.NDArray[Float]:
    """Softmax over the last axis of [H, S]; a sink adds to the denominator alone."""
    largest = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        largest = np.maximum(largest, sinks[:, None])
    weights = np.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None] - largest)
    result: npt.NDArray[Float] = weights / total
    return result


def _check(
    q: npt.NDArray[Float], k: npt.NDArray[Float], v: npt.NDArray[Float], start: int, window: int | None,
    sinks: npt.NDArray[Float] | None, first: int, softcap: float | None,
) -> None:  # fmt: skip
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3 or k.shape[2] != q.shape[2] or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be [T, Hq, D], [L, Hkv, D] and [L, Hkv, Dv]")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if start < 0 or len(k) != start - first + len(q):
        raise ValueError(
            f"{len(q)} queries from position {start} need {start - first + len(q)} keys from {first} on; there are "
            f"{len(k)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    highest = 0 if window is None else max(0, start - window + 1)
    if not 0 <= first <= highest:
        raise ValueError(f"first is {first}; for queries from {start} and window {window} it must be 0 to {highest}")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks have shape {sinks.shape}; {q.shape[1]} query heads need ({q.shape[1]},)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None")
