"""Products that give a row the same bits anywhere have only shapes that were tried, and found to agree.

How a BLAS rounds differs from machine to machine: here one is made to do it as it may elsewhere, and every shape that
occurs is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import require

torch: Any = require("torch")

from torch.overrides import TorchFunctionMode  # noqa: E402

from cortexstream.kernels.torch.fixed_attention import SPLIT, FixedAttention, attention_heights  # noqa: E402
from cortexstream.kernels.torch.fixed_decode import agreeing_batches, decode, pieces_of  # noqa: E402
from cortexstream.kernels.torch.fixed_rows import HEIGHTS, agreeing_heights, filled, in_tiles, tiles  # noqa: E402

CPU = torch.device("cpu")
KEY, VALUE = 11, 13  # dimensions
Rounds = Callable[[Any, Any], bool]
"""Whether the product of these two rounds otherwise."""


class Bmm(TorchFunctionMode):
    """Sees every torch.bmm, and changes the second row of those that are said to round otherwise."""

    def __init__(self, rounds: Rounds = lambda a, b: False) -> None:
        super().__init__()
        self._rounds = rounds
        self.shapes: set[tuple[int, ...]] = set()  # (products, rows, inner, columns)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.bmm:
            self.shapes.add((*args[0].shape, args[1].shape[2]))
            if self._rounds(args[0], args[1]):
                found[:, 1].mul_(1 + 1e-6)
        return found


def randn(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_p4_a_row_is_tried_in_other_memory() -> None:
    """The second of the two products of a trial begins behind the beginning of what was allocated."""
    like = torch.zeros(1, 5)
    assert agreeing_heights(lambda x: x * 2, like, 5) == HEIGHTS
    assert agreeing_heights(lambda x: x + float(x.storage_offset() > 0), like, 5) == (1,)


def test_p4_heights_that_would_take_too_long_are_not_tried() -> None:
    tried: list[int] = []

    def product(x: Any) -> Any:
        tried.append(len(x))
        return x * 2

    assert agreeing_heights(product, torch.zeros(1, 5), 1 << 31) == (4, 8, 16) and set(tried) == {4, 8, 16}
    assert agreeing_heights(product, torch.zeros(1, 5), 1 << 40) == (1,)


@pytest.mark.parametrize("heights", [(4,), (4, 8, 16), (8, 64), (16, 32), (1,), HEIGHTS])
def test_p4_rows_are_cut_into_these_heights_alone(heights: tuple[int, ...]) -> None:
    """Each row once and in order, however many there are, and not filled up by more than the lowest height asks for."""
    for rows in (1, 2, 3, 4, 5, 7, 13, 31, 32, 33, 100, 257):
        seen: list[int] = []

        def product(x: Any, seen: list[int] = seen) -> Any:
            seen.append(x.shape[-2])
            return x * 2

        x = randn(2, rows, 3)
        assert torch.equal(in_tiles(product, x, heights), x * 2)
        assert set(seen) <= set(heights) and seen == [height for _, _, height in tiles(rows, heights)]
        assert sum(seen) < rows + max(heights[0], -(-rows // 3))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_p4_what_fills_a_tile_changes_no_row(rows: int) -> None:
    x = randn(2, rows, 5)
    tall = filled(x, 8)
    assert tall.shape == (2, 8, 5) and tall.is_contiguous() and torch.equal(tall[:, :rows], x)
    assert torch.isfinite(tall).all()


@pytest.mark.parametrize("columns", [SPLIT, VALUE], ids=["keys", "values"])
def test_p4_heights_of_attention_agree_in_both_products(columns: int) -> None:
    """Where one of them gives a row other bits in one place, that height is not used."""
    usual = attention_heights(2, KEY, VALUE, CPU)
    assert len(usual) > 1, "no two heights agree on this machine"
    for height in usual:

        def rounds(a: Any, b: Any, height: int = height) -> bool:
            return bool(b.shape[2] == columns and a.shape[1] == height)

        with Bmm(rounds):
            assert attention_heights(2, KEY, VALUE, CPU) == tuple(other for other in usual if other != height)


@pytest.mark.parametrize("columns", [SPLIT, VALUE], ids=["keys", "values"])
def test_p4_products_are_done_at_once_only_where_both_agree(columns: int) -> None:
    search = agreeing_batches.__wrapped__  # what is found here must not be kept
    usual = search(2, KEY, VALUE, 4, CPU)
    assert usual, "no number of products agrees on this machine"
    with Bmm(lambda a, b: b.shape[2] == columns and a.shape[0] == usual[-1]):
        assert search(2, KEY, VALUE, 4, CPU) == usual[:-1]
    with Bmm(lambda a, b: b.shape[2] == columns and a.shape[0] == 1):
        assert search(2, KEY, VALUE, 4, CPU) == ()


def test_p4_attention_multiplies_in_shapes_that_were_tried_alone() -> None:
    fixed = FixedAttention((4, 16))
    q, k, v = randn(300, 6, KEY), randn(300, 2, KEY), randn(300, 2, VALUE)
    for start, end in ((0, 300), (0, 1), (129, 140), (255, 256), (299, 300)):
        with Bmm() as mode:
            fixed(q[start:end], k[:end], v[:end], start)
        allowed = {(2, height, *sides) for height in (4, 16) for sides in ((KEY, SPLIT), (SPLIT, VALUE))}
        assert mode.shapes and mode.shapes <= allowed


@pytest.mark.parametrize("batches", [(1,), (1, 4), (1, 2, 8)])
def test_p4_tokens_that_decode_together_multiply_in_shapes_that_were_tried_alone(batches: tuple[int, ...]) -> None:
    """In all of them: there are 15 pieces."""
    ends = [1, 300, 128, 129, 60, 257, 71, 300]
    q, k, v = randn(len(ends), 6, KEY), randn(300, 2, KEY), randn(300, 2, VALUE)
    pieces = pieces_of([torch.arange(end).numpy() for end in ends], [0] * len(ends), CPU)
    with Bmm() as mode:
        decode(q, k[pieces.slots], v[pieces.slots], pieces, 4, batches)
    assert mode.shapes == {(size, 4, *sides) for size in batches for sides in ((KEY, SPLIT), (SPLIT, VALUE))}
