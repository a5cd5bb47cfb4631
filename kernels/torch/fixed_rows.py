"""Products whose rows have the same bits whoever their neighbours are.

A BLAS chooses how it sums by the shape of a product, so a row can come out otherwise in a batch than alone. Here only
shapes occur that were found to give every row the same bits (He et al., "Defeating nondeterminism in LLM inference",
2025, fix the shapes, too).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn import functional

HEIGHTS = (4, 8, 16, 32, 64, 128, 256)
LARGEST_TRIAL = 1 << 35  # multiplications: some seconds on a core
DISTINCT_ROWS = 3
VECTOR = 64  # a multiple of what any CPU computes at once; the rest of a row would be rounded by other code
ALONE = 1 << 14  # numbers that torch leaves to one thread (gelu's; most others: 1 << 15); a cut may fall in a vector

Product = Callable[[torch.Tensor], torch.Tensor]
"""x [..., M, K] -> [..., M, N], each row from itself; dtype and device of x may not change."""


def agreeing_heights(product: Product, like: torch.Tensor, numbers: int) -> tuple[int, ...]:
    """Heights M, ascending, at which `product` gives a row the same bits in every place and at every other of them.

    Tried on random rows of the shape [..., 1, K], dtype and device of `like`; `numbers` are the multiplications of one
    row, and heights that would take more than LARGEST_TRIAL are not tried. (1,) if a row's place always matters.
    """
    *outer, _, width = like.shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(*outer, DISTINCT_ROWS, width, generator=generator).to(like.device, like.dtype)
    found: list[int] = []
    wanted = None
    for height in HEIGHTS:
        if height * numbers > LARGEST_TRIAL:
            break
        wanted = _agreed(product, rows, height, wanted) if not found else wanted
        if wanted is not None and _agreed(product, rows, height, wanted) is not None:
            found.append(height)
    return tuple(found) or (1,)


def _agreed(product: Product, rows: torch.Tensor, height: int, wanted: torch.Tensor | None) -> torch.Tensor | None:
    """What `rows` give in every place of a product of `height`, None if that differs, or is not what is `wanted`."""
    for turn in range(DISTINCT_ROWS):
        order = [(turn + place) % DISTINCT_ROWS for place in range(height + 1)]
        many = rows[..., order, :]
        for first in (0, 1):  # the second lies elsewhere in memory
            got = product(many[..., first : first + height, :])
            if wanted is None:
                places = [order[first:].index(number) for number in range(DISTINCT_ROWS)]
                wanted = got[..., places, :]
            if not torch.equal(got, wanted[..., order[first : first + height], :]):
                return None
    return wanted


@lru_cache(maxsize=4096)
def tiles(rows: int, heights: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """(first row, end, height) of the products that `rows` rows are cut into; a tile may be taller than its rows."""
    found = []
    first = 0
    while first < rows:
        left = rows - first
        height = next((h for h in heights if 4 * left >= 3 * h and left <= h), None)
        if height is None:  # nothing fits closely: as much as is full, or the lowest
            height = max((h for h in heights if h <= left), default=heights[0])
        found.append((first, min(first + height, rows), height))
        first += height
    return tuple(found)


def in_tiles(product: Product, x: torch.Tensor, heights: tuple[int, ...]) -> torch.Tensor:
    """`product` of x [..., M, K] in tiles of these heights, the last filled up: [..., M, N]."""
    parts = [product(filled(x[..., a:b, :], h))[..., : b - a, :] for a, b, h in tiles(x.shape[-2], heights)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def filled(x: torch.Tensor, height: int) -> torch.Tensor:
    """x [..., M, K] with rows up to `height`, of any content."""
    *outer, rows, width = x.shape
    if rows == height:
        return x
    if rows == 1:
        return x.expand(*outer, height, width).contiguous()
    return functional.pad(x, (0, 0, 0, height - rows))


def row_by_row(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An elementwise function of x [..., F], each number's bits depending on itself and its place in its row alone.

    On a CPU torch computes what does not fill a vector by other code, which rounds exponentials otherwise; here rows
    are whole vectors, and cut by nothing.
    """
    width = x.shape[-1]
    if x.device.type != "cpu" or x.numel() == 0:
        return function(x)
    whole = -(-width // VECTOR) * VECTOR
    rows = functional.pad(x.reshape(-1, width), (0, whole - width))
    if rows.numel() <= ALONE:
        return function(rows.contiguous())[:, :width].view(x.shape)
    parts = [function(part.contiguous())[:, :width] for part in rows.split(max(1, ALONE // whole))]
    return torch.cat(parts).view(x.shape)
