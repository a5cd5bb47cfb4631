"""The arena as one SVG picture, for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple
from xml.sax.saxutils import escape

from cortexstream.kv.snapshot import ArenaSnapshot, OwnerSnapshot, PoolSnapshot

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Colours that most colour-blind people tell apart: Okabe and Ito, "Color Universal Design" (2008), without black and
without yellow, whose pale shade is lost on white. The seventh sequence has the first one's colour again."""

SHARED_COLOUR, EMPTY_COLOUR, HATCH_COLOUR, TEXT_COLOUR, PAPER = "#6b7280", "#eef0f3", "#9aa1ab", "#1f2328", "#ffffff"
CELL_SIZES = (16, 8, 4, 2)  # pixels; the first that fits is taken
MAX_RECTS = 16_000  # of about 50 bytes each, for all maps; where they do not suffice, lines are drawn as bars
GROUP_RECTS = 3  # a group's first line, with its title, is as long as so many
MAX_LISTED = 24  # sequences that the legend names; the others have their numbers as tooltips
MARGIN, INDENT, LINE = 16, 56, 20  # pixels; INDENT is for the numbers in front of the lines of blocks

EMPTY, KEPT, SHARED, OWNED = range(4)
FILLED, ROOM, MIXED = range(3)  # kind of owner i's block: OWNED + 3 * i + one of these; MIXED holds both


class Strip(NamedTuple):
    """Blocks of one kind, adjacent in one line; of a MIXED block its two parts. Unit: blocks."""

    kind: int  # not MIXED
    x: float
    y: int
    width: float


class Grid(NamedTuple):
    """How one pool is laid out: `lines` of `columns` blocks, each `cell_width` x `cell_height` pixels."""

    cell_width: float
    cell_height: int
    columns: int
    lines: int
    exact: bool  # else a line is a bar: what its blocks are, not in which order, and sequences by their colour alone
    strips: list[Strip]


def arena_svg(snapshot: ArenaSnapshot) -> str:
    """A map of every block, with a legend: one SVG document that needs nothing else. Equal snapshots give equal text.

    Blocks run from left to right and line by line, each line begins with the number of its first block. A sequence's
    blocks have its colour, dark where they hold tokens and pale where they wait for them; blocks that several sequences
    hold are grey, those kept for reuse hatched, and those that hold nothing blank. The pools of sliding windows follow,
    smaller. In a pool with too many pieces, or blocks, every line is a bar of what its blocks are, without their order:
    with up to three windows the text stays under 1 MB, whatever the arena holds.
    """
    body, top = _head(snapshot)
    for index, pool in enumerate(snapshot.pools):
        kinds = kinds_of(pool, snapshot.block_tokens)
        width, height = (1024, 800) if index == 0 else (512, 400)
        parts = [owner.filled_tokens % snapshot.block_tokens / snapshot.block_tokens for owner in pool.owners]
        grid = lay_out(kinds, parts, width, height, MAX_RECTS // len(snapshot.pools))
        caption = _caption(pool, kinds, grid)
        if caption:
            body.append(_text(MARGIN, top + 14, caption))
            top += LINE + 4
        body += _draw(index, pool, grid, top, snapshot.block_tokens)
        top += grid.lines * grid.cell_height + LINE
    listed, top = _sequences(snapshot, top)
    width, height = 2 * MARGIN + INDENT + 1024, top + MARGIN
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="13" fill="{TEXT_COLOUR}">',
        "<title>KV arena</title>",
        _rect(0, 0, width, height, f' rx="8" fill="{PAPER}"'),  # so that the text is readable on a dark page, too
        *body, *listed, "</svg>", "",
    ])  # fmt: skip


def kinds_of(pool: PoolSnapshot, block_tokens: int) -> list[int]:
    """What each block of a pool is: EMPTY, KEPT, SHARED, or an owner's FILLED, ROOM or MIXED."""
    kinds = [EMPTY] * pool.num_blocks
    for block in pool.cached:
        kinds[block] = KEPT
    for index, owner in enumerate(pool.owners):
        first = OWNED + 3 * index
        full, rest = divmod(owner.filled_tokens, block_tokens)
        for place, block in enumerate(owner.blocks):
            if kinds[block] not in (EMPTY, KEPT):
                kinds[block] = SHARED
            elif place < full:
                kinds[block] = first + FILLED
            else:
                kinds[block] = first + (MIXED if place == full and rest else ROOM)
    return kinds


def lay_out(kinds: list[int], parts: list[float], width: int, height: int, max_rects: int) -> Grid:
    """Cells as large as fit into `width` x `height` pixels; lines as bars if more than `max_rects` rectangles, or
    smaller cells, would be needed. `parts` says of each owner how much of its MIXED block is filled."""
    fits = [size for size in CELL_SIZES if -(-len(kinds) // (width // size)) * size <= height]
    size = fits[0] if fits else CELL_SIZES[-1]
    columns = max(width // size, -(-len(kinds) // (height // size)))
    lines = [kinds[start : start + columns] for start in range(0, len(kinds), columns)]
    if fits:
        strips = [strip for y, line in enumerate(lines) for strip in _strips(line, y, parts)]
        if len(strips) + GROUP_RECTS * len({strip.kind for strip in strips}) <= max_rects:
            return Grid(size, size, columns, len(lines), True, strips)
    bars = [strip for y, line in enumerate(lines) for strip in _bar(line, y, parts)]
    return Grid(width / columns, size, columns, len(lines), False, bars)


def _strips(kinds: list[int], y: int, parts: list[float]) -> Iterator[Strip]:
    """The pieces of one line, in order of place."""
    x = 0
    for kind, same in groupby(kinds):
        width = sum(1 for _ in same)
        owner, what = divmod(kind - OWNED, 3)
        if kind >= OWNED and what == MIXED:
            yield Strip(kind - MIXED + FILLED, x, y, parts[owner])
            yield Strip(kind - MIXED + ROOM, x + parts[owner], y, 1 - parts[owner])
        else:
            yield Strip(kind, x, y, width)
        x += width


def _bar(kinds: list[int], y: int, parts: list[float]) -> Iterator[Strip]:
    """One line's blocks, ordered by colour."""
    amounts: defaultdict[int, float] = defaultdict(float)
    for kind, blocks in Counter(kinds).items():
        owner, what = divmod(kind - OWNED, 3)
        first = OWNED + 3 * (owner % len(PALETTE))
        if kind < OWNED:
            amounts[kind] += blocks
        elif what == MIXED:
            amounts[first + FILLED] += parts[owner]
            amounts[first + ROOM] += 1 - parts[owner]
        else:
            amounts[first + what] += blocks
    x = 0.0
    for kind in [*sorted(kind for kind in amounts if kind >= OWNED), SHARED, KEPT, EMPTY]:
        if amounts[kind]:
            yield Strip(kind, x, y, amounts[kind])
            x += amounts[kind]


def _draw(index: int, pool: PoolSnapshot, grid: Grid, top: int, block_tokens: int) -> list[str]:
    """The map of one pool, whose upper left corner is INDENT pixels from the margin and `top` from above. Inside its
    group the unit is a block."""
    left, width, height = MARGIN + INDENT, grid.cell_width, grid.cell_height
    every = -(-CELL_SIZES[0] // height)  # lines between two that have room for a number
    lines = [
        _text(left - 6, top + y * height + height // 2 + 4, str(y * grid.columns), ' font-size="10" text-anchor="end"')
        for y in range(0, grid.lines, every)
    ]
    scale = f"{width:.6g} {height}"
    lines += [
        _hatch(f"kept-{index}", width, height),
        f'<g class="pool" transform="translate({left} {top}) scale({scale})">',
    ]
    groups: dict[int, list[str]] = {}
    for kind, x, y, blocks in grid.strips:
        groups.setdefault(kind, []).append(_rect(round(x, 4), y, round(blocks, 4), 1))
    for kind in sorted(groups):
        lines += [_group(kind, index, pool, grid, block_tokens), *groups[kind], "</g>"]
    lines.append("</g>")
    if grid.exact and height >= 8:  # smaller blocks would be all border
        lines.append(_borders(grid, top))
    return lines


def _group(kind: int, index: int, pool: PoolSnapshot, grid: Grid, block_tokens: int) -> str:
    """The start of the group that has all pieces of one kind; its title is what a browser shows under the pointer."""
    plain = {
        EMPTY: ("empty", EMPTY_COLOUR, "empty"),
        KEPT: ("kept", f"url(#kept-{index})", "kept for reuse"),
        SHARED: ("shared", SHARED_COLOUR, "shared by several sequences"),
    }
    if kind in plain:
        name, colour, title = plain[kind]
    else:
        number, what = divmod(kind - OWNED, 3)
        name, colour = ("filled", PALETTE[number % len(PALETTE)]) if what == FILLED else ("room", _pale(number))
        title = f"sequence {_words(pool.owners[number], block_tokens)}" if grid.exact else "sequences of this colour"
    return f'<g class="{name}" fill="{colour}"><title>{escape(title)}</title>'


def _head(snapshot: ArenaSnapshot) -> tuple[list[str], int]:
    """Title, numbers and the meaning of the colours; and where the maps begin, in pixels from above."""
    stats = snapshot.stats
    lines = [
        f"{_count(stats.used_blocks, 'block')} used, {stats.free_blocks} free ({stats.cached_blocks} of them kept for "
        f"reuse); largest empty run {stats.largest_free_run}, fragmentation {stats.fragmentation:.3f}",
        f"{_count(stats.num_sequences, 'sequence')} with {_count(stats.used_tokens, 'token')}; since the start "
        f"{stats.reused_tokens} tokens reused, {stats.copied_tokens} copied, {stats.moved_tokens} moved",
    ]
    title = f"KV arena: {stats.num_blocks} blocks of {snapshot.block_tokens} tokens, placement {snapshot.placement}"
    body = [_text(MARGIN, 32, title, ' font-size="17" font-weight="bold"')]
    body += [_text(MARGIN, 56 + LINE * i, line) for i, line in enumerate(lines)]
    shared = sum(kind == SHARED for kind in kinds_of(snapshot.pools[0], snapshot.block_tokens))
    empty = stats.free_blocks - stats.cached_blocks
    key = [
        (PALETTE[0], "holds tokens (a colour per sequence)"), (_pale(0), "room to grow"),
        (SHARED_COLOUR, f"shared: {shared}"), ("url(#kept)", f"kept for reuse: {stats.cached_blocks}"),
        (EMPTY_COLOUR, f"empty: {empty}"),
    ]  # fmt: skip
    body.append(_hatch("kept", 1, 1))
    x = MARGIN
    for colour, words in key:
        body += [_rect(x, 88, 14, 14, f' fill="{colour}"'), _text(x + 20, 100, words)]
        x += 48 + 7 * len(words)
    return body, 120


def _sequences(snapshot: ArenaSnapshot, top: int) -> tuple[list[str], int]:
    """The list of the first sequences in three columns, and where it ends."""
    owners = snapshot.pools[0].owners
    body = []
    for index, owner in enumerate(owners[:MAX_LISTED]):
        x, y = MARGIN + index % 3 * 368, top + index // 3 * LINE
        body.append(_rect(x, y, 14, 14, f' fill="{PALETTE[index % len(PALETTE)]}"'))
        body.append(_text(x + 20, y + 12, _words(owner, snapshot.block_tokens)))
    top += -(-min(len(owners), MAX_LISTED) // 3) * LINE
    if len(owners) > MAX_LISTED:
        body.append(_text(MARGIN, top + 12, f"and {len(owners) - MAX_LISTED} more"))
        top += LINE
    return body, top


def _caption(pool: PoolSnapshot, kinds: list[int], grid: Grid) -> str:
    """What must be said above one map; nothing for the first one if it shows every block in its place."""
    parts = []
    if pool.ring_tokens is not None:
        used = sum(kind >= SHARED for kind in kinds)
        parts.append(
            f"rings of {pool.ring_tokens} tokens: {used} of {_count(pool.num_blocks, 'block')} used, "
            f"{len(pool.cached)} kept for reuse"
        )
    if not grid.exact:
        parts.append(f"a line shows what its {grid.columns} blocks are, not in which order")
    return "; ".join(parts)


def _words(owner: OwnerSnapshot, block_tokens: int) -> str:
    blocks = len(owner.blocks)
    return f"{owner.label}: {owner.filled_tokens} of {blocks * block_tokens} tokens, {_count(blocks, 'block')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _pale(number: int) -> str:
    """A sequence's colour with two thirds of white."""
    colour = PALETTE[number % len(PALETTE)]
    return "#" + "".join(f"{(int(colour[i : i + 2], 16) + 2 * 255) // 3:02x}" for i in (1, 3, 5))


def _hatch(name: str, width: float, height: float) -> str:
    """Diagonal lines, 6 pixels apart where a unit is `width` x `height` pixels."""
    return (
        f'<pattern id="{name}" patternUnits="userSpaceOnUse" width="6" height="6" '
        f'patternTransform="scale({1 / width:.6g} {1 / height:.6g})"><rect width="6" height="6" fill="{PAPER}"/>'
        f'<path d="M-1 1L1 -1M0 6L6 0M5 7L7 5" stroke="{HATCH_COLOUR}" stroke-width="1.5"/></pattern>'
    )


def _borders(grid: Grid, top: int) -> str:
    """Thin lines between the blocks of an exact map."""
    left, size = MARGIN + INDENT, grid.cell_height
    width, height = grid.columns * size, grid.lines * size
    across = "".join(f"M{left} {top + y}h{width}" for y in range(0, height + 1, size))
    down = "".join(f"M{left + x} {top}v{height}" for x in range(0, width + 1, size))
    return f'<path d="{across}{down}" stroke="{PAPER}" stroke-width="1" fill="none"/>'


def _rect(x: float, y: float, width: float, height: float, more: str = "") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}"{more}/>'


def _text(x: int, y: int, words: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}"{more}>{escape(words)}</text>'
