"""Reads the picture of an arena: which rectangles there are, and what they say of each block."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import ceil, floor
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

SVG = "{http://www.w3.org/2000/svg}"


class Piece(NamedTuple):
    """One rectangle of a map, in blocks."""

    name: str  # filled, room, shared, kept, empty
    fill: str
    title: str
    x: float
    y: int
    width: float


def pieces(svg: str) -> list[list[Piece]]:
    """The rectangles of every pool's map."""
    found = []
    for pool in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        if pool.get("class") == "pool":
            found.append([
                Piece(
                    group.attrib["class"], group.attrib["fill"], group.findtext(f"{SVG}title", ""),
                    float(rect.attrib["x"]), int(rect.attrib["y"]), float(rect.attrib["width"]),
                )
                for group in pool.findall(f"{SVG}g") for rect in group.findall(f"{SVG}rect")
                if rect.attrib["height"] == "1"
            ])  # fmt: skip
    return found


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def amounts(drawn: list[Piece]) -> dict[str, float]:
    """Blocks of each kind."""
    total: defaultdict[str, float] = defaultdict(float)
    for piece in drawn:
        total[piece.name] += piece.width
    return {name: round(blocks, 2) for name, blocks in total.items()}


def is_gapless(drawn: list[Piece]) -> bool:
    """Whether the pieces of every line follow one another from its beginning."""
    ends: defaultdict[int, float] = defaultdict(float)
    for piece in sorted(drawn, key=lambda piece: (piece.y, piece.x)):
        if piece.x != pytest.approx(ends[piece.y], abs=0.001):
            return False
        ends[piece.y] = piece.x + piece.width
    return True


def by_block(drawn: list[Piece], columns: int) -> dict[int, dict[tuple[str, str], float]]:
    """Block -> what is drawn in its place: (name, sequence) -> how much of it."""
    assert is_gapless(drawn)
    found: defaultdict[int, Counter[tuple[str, str]]] = defaultdict(Counter)
    for name, _, title, x, y, width in drawn:
        assert 0 <= x < x + width <= columns + 1e-6, "a piece leaves its line"
        sequence = title.removeprefix("sequence ").split(":")[0] if name in ("filled", "room") else ""
        for place in range(floor(x + 1e-6), ceil(x + width - 1e-6)):
            found[y * columns + place][name, sequence] += min(place + 1, x + width) - max(place, x)  # type: ignore[assignment]
    return {block: {key: round(share, 3) for key, share in shares.items()} for block, shares in found.items()}
