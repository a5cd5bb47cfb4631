"""Backends of the embedded model, and parts of the plans that are made for them by hand."""

from __future__ import annotations

import random

from cortexstream.backend import Backend
from cortexstream.plan import KVRows, SampleSpec

BLOCK = 16
NUM_BLOCKS = 24
GREEDY = SampleSpec()
CASES = [
    ("null", "run"),
    ("null", "paged"),
    ("reference", "run"),
    ("reference", "paged"),
    ("mlx", "run"),
    ("cuda", "paged"),
]


def rows_at(backend: Backend, first: int, count: int) -> KVRows:
    """`count` blocks: adjacent, or for block tables in a scrambled order within their range."""
    blocks = list(range(first, first + count))
    if backend.info.kv_layout == "paged":
        random.Random(first).shuffle(blocks)
    return KVRows(tuple(blocks), backend.info.kv_layout == "run")


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return (1, *(rng.randrange(264, 359) for _ in range(length - 1)))
