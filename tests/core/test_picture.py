"""The arena for people: snapshots, the text map and the picture (F15, F24)."""

from __future__ import annotations

import random
import re
import sys
import threading
from collections import defaultdict
from math import ceil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cortexstream import LLM
from cortexstream.errors import ArenaFullError, EngineError, InvalidRequestError
from cortexstream.kv import KVArena, KVHandle, Ring
from cortexstream.kv.picture import PALETTE, arena_svg
from cortexstream.kv.snapshot import ArenaSnapshot, OwnerSnapshot, PoolSnapshot
from tests.core.drawing import SVG, Piece, amounts, by_block, is_gapless, pieces, texts
from tests.core.support import PLACEMENTS, Placement, side_by_side

MEGABYTE = 1_000_000


def expected(arena: KVArena, pool: int) -> dict[int, dict[tuple[str, str], float]]:
    """What `by_block` should find, from handles and allocators."""
    tokens = arena.block_tokens
    held: defaultdict[int, list[tuple[str, float]]] = defaultdict(list)
    ring = arena._pools[pool].ring_tokens
    for number, (handle, _) in enumerate(arena.owners(), 1):
        blocks = handle.blocks if pool == 0 else handle.rows.rings[pool - 1].blocks
        position = handle.position if ring is None else min(handle.position, ring)
        for place, block in enumerate(blocks):
            held[block].append((str(number), min(1.0, max(0.0, (position - place * tokens) / tokens))))
    found: dict[int, dict[tuple[str, str], float]] = {}
    taken = arena._pools[pool].allocator.block_map(width=arena._pools[pool].num_blocks)
    for block, mark in enumerate(taken):
        holders = held[block]
        if len(holders) > 1:
            found[block] = {("shared", ""): 1.0}
        elif holders:
            ((owner, share),) = holders
            shares = {("filled", owner): round(share, 3), ("room", owner): round(1 - share, 3)}
            found[block] = {key: value for key, value in shares.items() if value}
        else:
            found[block] = {("kept" if mark == "X" else "empty", ""): 1.0}
    return found


def busy(placement: Placement, seed: int, rings: tuple[Ring, ...], blocks: int = 150) -> KVArena:
    """An arena in the middle of sequences that begin alike, end, are kept and fork."""
    rng = random.Random(f"{placement} {seed} {rings}")
    arena = KVArena(blocks, 4, placement, rings=rings)
    live: dict[KVHandle, list[int]] = {}
    for _ in range(120):
        if live and rng.random() < 0.35:
            handle = rng.choice([*live])
            tokens = live.pop(handle)[: handle.position]
            arena.release(handle, tokens if rng.random() < 0.8 else ())
            continue
        tokens = [1] * rng.choice((0, 9, 30)) + [rng.randrange(5) for _ in range(rng.randint(1, 40))]
        if arena.can_admit(len(tokens) + 6, None, tokens[:-1]):
            handle = arena.admit(len(tokens) + 6, None, tokens[:-1])
            handle.advance(len(tokens) - handle.position)
            arena.publish(handle, tokens)
            live[handle] = tokens
    if placement == "paged":
        handle, other = [handle for handle in live if handle.position % 4][:2]
        arena.release(other)  # so that there is room
        forked = arena.fork(handle)
        arena.grow(forked, forked.position + 1)
        forked.advance(1)
    arena.check()
    return arena


def hand_made() -> KVArena:
    """1000 blocks, 3 times 100 of them taken, the middle ones free again."""
    arena = KVArena(1000, 4, "run", growth=1.0)
    first, middle, last = side_by_side(arena, [100, 100, 100])
    first.advance(201)
    last.advance(400)
    arena.release(middle)
    return arena


def test_f15_text_of_a_hand_made_arena() -> None:
    arena = hand_made()
    assert arena.fragmentation() == arena.stats().fragmentation == 0.125
    line = "X" * 100 + "." * 100 + "X" * 100 + "." * 700
    assert arena.block_map(1000) == line
    assert arena.describe().splitlines() == [
        "configuration: 1000 blocks of 4 tokens, placement run",
        "state: 200 used, 800 free, fragmentation 0.12",
        "sequences: 2",
        "  201/400 tokens, blocks [0, +100]",
        "  400/400 tokens, blocks [200, +100]",
        "blocks ('X' used, 'o' kept for reuse, '.' free):",
        *(line[i : i + 64] for i in range(0, 1000, 64)),
    ]


def test_f15_snapshot_of_a_hand_made_arena() -> None:
    arena = hand_made()
    taken = arena.snapshot()
    blocks = tuple(range(100)), tuple(range(200, 300))
    owners = OwnerSnapshot("1", blocks[0], 201), OwnerSnapshot("2", blocks[1], 400)
    assert taken == ArenaSnapshot(4, "run", (PoolSnapshot(1000, None, owners, ()),), arena.stats())
    for handle, _ in arena.owners():
        arena.release(handle)
    assert taken.pools[0].owners == owners and taken.stats.used_blocks == 200, "a later change reaches a snapshot"


def test_f15_picture_of_a_hand_made_arena() -> None:
    svg = arena_svg(hand_made().snapshot())
    (drawn,) = pieces(svg)
    assert amounts(drawn) == {"filled": 150.25, "room": 49.75, "empty": 800}
    assert {piece.fill for piece in drawn if piece.name == "filled"} == {PALETTE[0], PALETTE[1]}
    assert len(drawn) <= 16 + 2 * 4, "a run is one rectangle in each of 16 lines, a half-filled block two"
    assert by_block(drawn, 64)[50] == {("filled", "1"): 0.25, ("room", "1"): 0.75}
    assert sorted(piece for piece in drawn if piece.y == 4) == [
        Piece("empty", "#eef0f3", "empty", 44, 4, 20),
        Piece("filled", PALETTE[1], "sequence 2: 400 of 400 tokens, 100 blocks", 0, 4, 44),
    ]
    words = texts(svg)
    assert words[:3] == [
        "KV arena: 1000 blocks of 4 tokens, placement run",
        "200 blocks used, 800 free (0 of them kept for reuse); largest empty run 700, fragmentation 0.125",
        "2 sequences with 601 tokens; since the start 0 tokens reused, 0 copied, 0 moved",
    ]
    assert {"shared: 0", "kept for reuse: 0", "empty: 800"} <= set(words)
    assert words[-2:] == ["1: 201 of 400 tokens, 100 blocks", "2: 400 of 400 tokens, 100 blocks"]
    assert [word for word in words if word.isdigit()] == [str(64 * line) for line in range(16)]


@pytest.mark.parametrize("rings", [(), (Ring(10, 90), Ring(30, 130))], ids=["full", "rings"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("seed", range(3))
def test_f15_picture_shows_every_block_in_its_place(placement: Placement, rings: tuple[Ring, ...], seed: int) -> None:
    arena = busy(placement, seed, rings)
    drawn = pieces(arena_svg(arena.snapshot()))
    assert len(drawn) == 1 + len(rings)
    for pool, columns in enumerate((64, 32, 32)[: len(drawn)]):
        assert by_block(drawn[pool], columns) == expected(arena, pool)
        assert sum(amounts(drawn[pool]).values()) == pytest.approx(arena._pools[pool].num_blocks)
    assert all(list(pool.cached) == sorted(pool.cached) for pool in arena.snapshot().pools)
    kept = amounts(drawn[0]).get("kept", 0)
    assert kept == arena.stats().cached_blocks and (kept > 0 or rings), "nothing was kept: the workload is too small"


def test_f15_shared_and_kept_blocks_have_a_look_of_their_own() -> None:
    arena = KVArena(40, 4, "paged")
    done = arena.admit(8)
    done.advance(8)
    arena.release(done, [*range(100, 108)])
    first = arena.admit(16)
    first.advance(14)
    second = arena.fork(first)
    arena.grow(second, 15)
    svg = arena_svg(arena.snapshot())
    (drawn,) = pieces(svg)
    assert amounts(drawn) == {"kept": 2, "shared": 3, "filled": 1.0, "room": 1.0, "empty": 33}
    assert {piece.fill for piece in drawn if piece.name == "shared"} == {"#6b7280"}
    assert {piece.fill for piece in drawn if piece.name == "kept"} == {"url(#kept-0)"}
    assert {"shared: 3", "kept for reuse: 2", "empty: 33"} <= set(texts(svg))
    assert "5 blocks used, 35 free (2 of them kept for reuse)" in texts(svg)[1]


def test_f15_rings_have_maps_of_their_own() -> None:
    arena = KVArena(64, 4, "run", growth=1.0, rings=(Ring(8, 20), Ring(6, 10)))
    handle = arena.admit(40, 40)
    handle.advance(7)
    svg = arena_svg(arena.snapshot())
    full, wide, narrow = pieces(svg)
    assert amounts(full) == {"filled": 1.75, "room": 8.25, "empty": 54}
    assert amounts(wide) == {"filled": 1.75, "room": 0.25, "empty": 18}
    assert amounts(narrow) == {"filled": 1.75, "room": 0.25, "empty": 8}
    handle.advance(30)
    assert [pool.owners[0].filled_tokens for pool in arena.snapshot().pools] == [37, 8, 8]
    assert amounts(pieces(arena_svg(arena.snapshot()))[1]) == {"filled": 2, "empty": 18}, "a ring that turned is full"
    assert [words for words in texts(svg) if words.startswith("rings")] == [
        "rings of 8 tokens: 2 of 20 blocks used, 0 kept for reuse",
        "rings of 8 tokens: 2 of 10 blocks used, 0 kept for reuse",
    ]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f15_picture_is_one_self_contained_document(placement: Placement) -> None:
    snapshot = busy(placement, 0, (Ring(10, 90),)).snapshot()
    svg = arena_svg(snapshot)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and svg.count("http") == 1, "only the namespace has an address"
    assert not re.search(r"href|@import|<script|<image|<style|<foreignObject", svg)
    made = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(made) == len(set(made)) and set(re.findall(r"url\(#([\w-]+)\)", svg)) <= set(made)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    paper = root.find(f"{SVG}rect")
    assert paper is not None and paper.attrib["fill"] == "#ffffff", "dark text needs its own light ground"
    assert (float(paper.attrib["width"]), float(paper.attrib["height"])) == (width, height)
    assert root.attrib["fill"] == "#1f2328" and height < 700
    assert all(0 <= float(text.attrib[axis]) <= (width, height)[axis == "y"] for text in root.iter(f"{SVG}text")
               for axis in ("x", "y"))  # fmt: skip


def test_f15_equal_arenas_give_equal_pictures() -> None:
    def twins(order: tuple[int, int]) -> KVArena:
        arena = KVArena(30, 4, "paged")
        handle = arena.admit(12)
        handle.advance(11)
        both = handle, arena.fork(handle)
        both[order[0]].position = 9  # the same blocks, and a position that tells them apart
        return arena

    assert arena_svg(busy("paged", 1, ()).snapshot()) == arena_svg(busy("paged", 1, ()).snapshot())
    pictures = {arena_svg(twins(order).snapshot()) for order in ((0, 1), (1, 0)) for _ in range(8)}
    assert len(pictures) == 1, "the order of a set shows"


def test_f15_colours_repeat_and_the_legend_ends() -> None:
    arena = KVArena(100, 4, "run", growth=1.0)
    for handle in side_by_side(arena, [2] * 30):
        handle.advance(8)
    svg = arena_svg(arena.snapshot())
    fills = {piece.title.split(":")[0]: piece.fill for piece in pieces(svg)[0] if piece.name == "filled"}
    assert [fills[f"sequence {number}"] for number in range(1, 31)] == [*PALETTE] * 5
    assert texts(svg)[-2:] == ["24: 8 of 8 tokens, 2 blocks", "and 6 more"]


@pytest.mark.parametrize("blocks", [0, 1, 64, 3200, 3201, 12_801, 51_201])
def test_f15_every_size_adds_up(blocks: int) -> None:
    arena = KVArena(blocks, 4)
    if blocks:
        arena.admit(4 * blocks // 2 or 1)
    (drawn,) = pieces(arena_svg(arena.snapshot()))
    assert sum(amounts(drawn).values()) == blocks
    if blocks:
        assert len(drawn) <= ceil(blocks / 64) + 1


@pytest.mark.parametrize(("blocks", "sequences"), [(200_000, 40), (200_000, 100_000), (500_000, 40), (3000, 3000)])
def test_f15_large_pictures_stay_small(blocks: int, sequences: int) -> None:
    """Sequences whose blocks alternate are the worst case: no two neighbours are alike."""
    arena = KVArena(blocks, 16, "paged", prefix_caching=False)
    each = blocks // sequences // 2 or 1
    owners = tuple(
        OwnerSnapshot(str(number + 1), tuple(range(number, number + each * sequences, sequences)), each * 16 - 12)
        for number in range(sequences)
    )
    snapshot = ArenaSnapshot(16, "paged", (PoolSnapshot(blocks, None, owners, ()),), arena.stats())
    svg = arena_svg(snapshot)
    (drawn,) = pieces(svg)
    assert len(svg) < MEGABYTE and len(drawn) <= 16_000 and is_gapless(drawn)
    assert float(ElementTree.fromstring(svg).attrib["height"]) < 1200
    held = each * sequences
    total = amounts(drawn)
    assert sum(total.values()) == pytest.approx(blocks)
    assert total.get("empty", 0) == blocks - held
    assert total["filled"] == pytest.approx(held - 0.75 * sequences, abs=0.1)
    assert total["room"] == pytest.approx(0.75 * sequences, abs=0.1)
    assert any(re.fullmatch(r"a line shows what its \d+ blocks are, not in which order", text) for text in texts(svg))


def test_f15_a_large_arena_with_long_runs_is_exact() -> None:
    arena = KVArena(200_000, 16, "run", growth=1.0)
    side_by_side(arena, [50_000, 1, 70_000])
    svg = arena_svg(arena.snapshot())
    (drawn,) = pieces(svg)
    assert len(drawn) < 400 and len(svg) < 50_000
    assert {block: [*shares] for block, shares in by_block(drawn, 512).items() if 49_998 < block < 50_003} == {
        49_999: [("room", "1")], 50_000: [("room", "2")], 50_001: [("room", "3")], 50_002: [("room", "3")],
    }  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_f15_eight_threads_look_while_others_admit(placement: Placement) -> None:
    arena = KVArena(64, 4, placement, rings=(Ring(9, 40),) if placement == "run" else ())
    errors: list[BaseException] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        live: list[KVHandle] = []
        for _ in range(400):
            try:
                if live and rng.random() < 0.5:
                    handle = live.pop()
                    arena.release(handle, [*range(handle.position)])
                else:
                    live.append(arena.admit(rng.randint(2, 20)))
                    live[-1].advance(1)
            except ArenaFullError:
                continue
        for handle in live:
            arena.release(handle)

    def look(_: int) -> None:
        for _ in range(30):
            taken = arena.snapshot()
            pool, stats = taken.pools[0], taken.stats
            held = [block for owner in pool.owners for block in owner.blocks]
            assert len(set(held)) == stats.used_blocks and len(pool.owners) == stats.num_sequences
            assert len(pool.cached) == stats.cached_blocks and not set(held) & set(pool.cached)
            for drawn, shown in zip(pieces(arena_svg(taken)), taken.pools, strict=True):
                assert sum(amounts(drawn).values()) == pytest.approx(shown.num_blocks, abs=0.02)
            assert arena.describe().count("\n") >= 4 and len(arena.block_map(64)) == 64
            assert 0.0 <= arena.fragmentation() <= 1.0 and len(arena.owners()) <= 64

    def guarded(task: int) -> None:
        try:
            (look if task % 2 else work)(task)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in range(16)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert not errors, errors[0]
    arena.check()


def test_f24_llm_writes_the_picture(tmp_path: Path) -> None:
    with LLM(backend="null", num_kv_blocks=96, block_tokens=4) as llm:
        path = tmp_path / "arena.svg"
        path.write_text("old and longer than nothing")
        svg = llm.arena_svg(path)
        assert path.read_text("utf-8") == svg == llm.arena_svg()
        assert texts(svg)[0] == "KV arena: 96 blocks of 4 tokens, placement run"
        missing = tmp_path / "no" / "arena.svg"
        with pytest.raises(
            InvalidRequestError, match=rf"^path: {missing} cannot be written: the folder .*/no does not"
        ):
            llm.arena_svg(str(missing))
        with pytest.raises(InvalidRequestError, match=rf"^path: {tmp_path} is a folder; name a file in it"):
            llm.arena_svg(tmp_path)
        with pytest.raises(
            InvalidRequestError, match=r"^path: .* cannot be written: .*name too long.*name another file"
        ):
            llm.arena_svg(tmp_path / ("x" * 300))
    assert sorted(tmp_path.iterdir()) == [path]
    with pytest.raises(EngineError, match="the engine is closed"):
        llm.arena_svg(path)
    assert path.read_text("utf-8") == svg
