"""What the checks of part a have in common: a case, how it is judged, how often it is repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_check_memory import Exact, bits_of, exact
from gpu_check_record import Figure, Report

# The largest error of a line over the line's norm. A unit in the last place is 1e-3, 8e-3 and 1e-7.
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}

Tensors = Sequence[torch.Tensor]


class Case(NamedTuple):
    """A kernel on one input."""

    name: str
    dtype: torch.dtype
    run: Callable[[], Tensors]  # everything that it writes, in fresh memory full of poison
    judge: Callable[[Tensors], float]  # the error against float64
    other_ways: Callable[[], Iterator[tuple[str, Tensors, Tensors]]] | None = None  # name, and what must have its bits
    limit: float | None = None  # of the error; None: LIMITS


class Touched(Exception):
    """Memory that is none of a kernel's business has changed."""


def relative(found: Any, wanted: Exact) -> float:
    """The largest error of a line along the first axis over its norm; a wanted line of zeros must be zeros exactly."""
    got = exact(found) if isinstance(found, torch.Tensor) else found
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    lines = len(wanted)
    error = np.linalg.norm((got - wanted).reshape(lines, -1), axis=1)
    norm = np.linalg.norm(wanted.reshape(lines, -1), axis=1)
    worst = np.divide(error, norm, out=np.where(error > 0, np.inf, 0.0), where=norm > 0)
    return float(worst.max(initial=0.0))


def same(left: Tensors, right: Tensors) -> bool:
    """The same bits? NaN equals NaN."""
    pairs = zip(left, right, strict=True)
    return all(a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b)) for a, b in pairs)


def check(report: Report, case: Case, repeats: int) -> None:
    """Judge a case, run it `repeats` times and compare bits; one row of the report."""
    first = [tensor.clone() for tensor in case.run()]
    error = case.judge(first)
    limit = LIMITS[case.dtype] if case.limit is None else case.limit
    wrong = [] if error <= limit else [f"the error is above the limit of {limit:g}"]
    differing = sum(not same(case.run(), first) for _ in range(repeats - 1))
    if differing:
        wrong.append(f"{differing} of {repeats - 1} repeats gave other bits")
    for name, found, wanted in case.other_ways() if case.other_ways else ():
        if not same(found, wanted):
            wrong.append(f"{name}: other bits")
    report.add(
        "kernel", case.name, ok=not wrong, why="; ".join(wrong), error=Figure(error, "of the norm"),
        limit=Figure(limit, "of the norm"), repeats=Figure(repeats, "runs"),
    )  # fmt: skip


def broken(error: BaseException) -> bool:
    """Has the device failed for good, so that what follows would fail as well?"""
    text = str(error)
    return "CUDA error" in text or "device-side assert" in text
