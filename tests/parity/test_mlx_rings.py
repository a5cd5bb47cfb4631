"""Sliding windows on rings, on the mlx backend: plans by hand, every logit against plain mlx-lm's own caches."""

from __future__ import annotations

import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.plan import KVRows, Move
from tests.conftest import require
from tests.parity.by_hand import ByHand, Served, advance
from tests.parity.tiny_models import WINDOW, WINDOWED, write_model

mx = require("mlx")
require("mlx_lm")

ARCHITECTURES = [*WINDOWED, "mistral"]
PROMPTS = (50, 7, 20, 33)  # tokens; the last joins at the second's place when that has left
OUTPUTS = (40, 25, 40, 40)
ROOM = 96  # tokens of each place


def windowed(folder: Path, architecture: str, **extra: Any) -> Path:
    """A tiny model's folder; mistral is mlx-lm's llama, with a window in all layers."""
    if architecture != "mistral":
        return write_model(folder, architecture, WINDOWED[architecture] | extra)
    write_model(folder, "llama", extra)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": WINDOW}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Plain:
    """mlx-lm alone, with its own caches, which for mistral are given windows by hand."""

    def __init__(self, folder: Path, architecture: str) -> None:
        from mlx_lm.utils import load_model

        self.folder, self.architecture = folder, architecture
        self.model, _ = load_model(folder)
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def caches(self) -> list[Any]:
        from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

        if self.architecture == "mistral":
            return [RotatingKVCache(WINDOW) for _ in self.model.layers]
        return list(make_prompt_cache(self.model))

    def logits(self, tokens: tuple[int, ...], prompt: int) -> np.ndarray:
        """[len(tokens) - prompt + 1, vocabulary]: of the prompt's last token, and of each one after it."""
        if tokens not in self._known:
            caches = self.caches()
            if prompt > 1:
                self.model(mx.array([tokens[: prompt - 1]]), cache=caches)
            steps = [self.model(mx.array([[token]]), cache=caches)[0, -1] for token in tokens[prompt - 1 :]]
            self._known[tokens] = np.array(mx.stack(steps))
        return self._known[tokens]

    def check(self, served: Served, prompt: int, count: int, recorded: dict[tuple[int, int], np.ndarray]) -> None:
        """The first `count` recorded logits of a sequence are those of one prompt and single tokens, within 1e-4."""
        assert served.done >= prompt + count - 1, "there are not so many"
        for step, expected in enumerate(self.logits(tuple(served.tokens[: prompt + count - 1]), prompt)):
            worst = np.abs(recorded[served.number, prompt - 1 + step] - expected).max()
            assert worst < 1e-4, f"sequence {served.number}, position {prompt - 1 + step}: {worst}"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(windowed(tmp_path_factory.mktemp(request.param), request.param), request.param)


def prompt_of(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(200) for _ in range(length)]


def serve(hand: ByHand, chunk: int, rings: tuple[int, int, int] = (0, 1, 2)) -> list[Served]:
    """Chunked prompts of several sequences side by side, a leave, a join in its place, and many single tokens."""
    blocks = ROOM // hand.block_tokens
    places = [hand.place(number * blocks, blocks, ring) for number, ring in enumerate(rings)]
    served = [Served(number, prompt_of(PROMPTS[number]), places[number]) for number in range(3)]
    before = hand.backend.memory_addresses()
    everyone, running = list(served), served
    while any(len(one.tokens) < PROMPTS[one.number] + OUTPUTS[one.number] for one in running):
        advance(hand, running, chunk)
        if len(everyone) == 3 and len(served[1].tokens) == PROMPTS[1] + OUTPUTS[1]:
            joins = Served(3, prompt_of(PROMPTS[3]), places[1])
            everyone.append(joins)
            running = [served[0], joins, served[2]]
        running = [one for one in running if one.done < ROOM]
    assert len(everyone) == 4 and hand.backend.memory_addresses() == before
    return everyone


@pytest.mark.parametrize("block_tokens", [4, 16], ids=["ring is the window", "ring exceeds the window"])
@pytest.mark.parametrize("chunk", [1, 3, WINDOW - 1, WINDOW, WINDOW + 5])
def test_f39_rings_give_mlx_lms_logits(plain: Plain, chunk: int, block_tokens: int) -> None:
    """Up to four windows long, whatever the chunks: 24 tokens of window in rings of 24 and of 32 slots."""
    hand = ByHand(plain.folder, num_blocks=4 * ROOM // block_tokens, ring_blocks=40, block_tokens=block_tokens)
    assert hand.backend.info.notes == ()
    for one in serve(hand, chunk):
        plain.check(one, PROMPTS[one.number], OUTPUTS[one.number], hand.logits)


@pytest.mark.parametrize("mode", ["groups", "other groups", "gathered", "single"])
def test_f39_every_way_to_decode(plain: Plain, mode: str) -> None:
    """Rings of neighbours as one masked view, padded copies, and one row at a time. With "other groups" the rings do
    not lie as the blocks do: the first is far off, the other two are neighbours."""
    grouped = "groups" in mode
    hand = ByHand(
        plain.folder, num_blocks=24, ring_blocks=8, mode=None if grouped else mode, extra={"group_attention": grouped}
    )
    segments = watch_segments(hand) if grouped else []
    for one in serve(hand, 17, (3, 1, 2) if mode == "other groups" else (0, 1, 2)):
        plain.check(one, PROMPTS[one.number], OUTPUTS[one.number], hand.logits)
    if grouped and plain.architecture != "mistral":  # whose rows are sorted by their rings
        assert {"groups": {(0, 3), (1, 3)}, "other groups": {(0, 3), (1, 1), (1, 2)}}[mode] <= set(segments)


def watch_segments(hand: ByHand) -> list[tuple[int, int]]:
    """(pool, rows) of every segment that is made from now on."""
    from cortexstream.backends.mlx.cache import Batch

    seen: list[tuple[int, int]] = []
    decode = hand._decode

    def watched(pool: Any, rows: Any, positions: list[int], tokens: Any) -> Any:
        if len(rows) > 1:
            batch = Batch(pool, [row.kv for row in rows], positions, True, True)
            seen.extend((n, s.rows) for n in range(len(pool.shapes)) for s in batch.segments(n))
        return decode(pool, rows, positions, tokens)

    hand._decode = watched
    return seen


def test_f39_rings_that_grow_and_move(plain: Plain) -> None:
    """A ring of one block grows in place, then moves elsewhere to its full size, wraps, and moves again, wrapped."""
    hand = ByHand(plain.folder, num_blocks=12, ring_blocks=12, block_tokens=8)  # a full ring has 3 blocks
    one = Served(0, prompt_of(6), ring_at(range(12), range(4, 5)))
    plan: dict[int, tuple[range, tuple[Move, ...]]] = {
        8: (range(4, 6), (Move(4, 1, 4, 2, 8, pool=1),)),
        16: (range(1, 4), (Move(4, 2, 1, 3, 16, pool=1),)),
        40: (range(2, 5), (Move(1, 3, 2, 3, 24, pool=1),)),
    }
    while len(one.tokens) < 70:
        blocks, moves = plan.get(one.done, (None, ()))
        if blocks is not None:
            one.kv = ring_at(range(12), blocks)
        advance(hand, [one], moves=moves)
    plain.check(one, 6, 60, hand.logits)


def ring_at(blocks: range, ring: range) -> KVRows:
    return KVRows(tuple(blocks), True, (KVRows(tuple(ring), True),))


def test_f39_no_slot_is_written_twice_in_a_launch(plain: Plain) -> None:
    """Which of two writes to one row wins is up to the device."""
    from cortexstream.backends.mlx.cache import Chunk

    hand = ByHand(plain.folder, num_blocks=12, ring_blocks=3)
    for start, length in ((0, 32), (0, 33), (0, 100), (20, 5), (31, 2), (40, 32), (40, 33), (70, 90)):
        chunk = Chunk(hand.backend.pool, hand.place(0, 12), start, length)
        rows = np.array(chunk.rows(1, 2))
        positions = range(max(start, start + length - 32), start + length)
        assert rows.tolist() == [[p % 32 for p in positions], [32 + p % 32 for p in positions]]


def test_f39_a_window_of_one_token(tmp_path: Path) -> None:
    """Nothing is read back: every query sees itself alone. Blocks of one token make rings of one slot."""
    folder = write_model(tmp_path, "gemma3_text", WINDOWED["gemma3_text"] | {"sliding_window": 1})
    for block_tokens in (1, 4):
        hand = ByHand(folder, num_blocks=64, ring_blocks=4, block_tokens=block_tokens)
        one = Served(0, prompt_of(11), hand.place(0, 40 // block_tokens))
        while len(one.tokens) < 20:
            advance(hand, [one], 3)
        Plain(folder, "gemma3_text").check(one, 11, 9, hand.logits)


def test_f39_two_windows_in_one_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm's model files make one mask for all sliding layers, so it would be wrong for some of them."""
    from cortexstream.errors import ModelLoadError

    models: Any = import_module("cortexstream.backends.mlx.models")

    folder = write_model(tmp_path, "gemma3_text", WINDOWED["gemma3_text"])
    right = models.make_prompt_cache

    def unlike(model: Any) -> list[Any]:
        caches = list(right(model))
        caches[1].max_size = 12
        return caches

    monkeypatch.setattr(models, "make_prompt_cache", unlike)
    with pytest.raises(ModelLoadError, match="gemma3_text has sliding windows of 12 and 24 tokens"):
        ByHand(folder)


def test_f22_a_ring_pool_takes_what_the_model_says(plain: Plain) -> None:
    hand = ByHand(plain.folder, num_blocks=7, ring_blocks=5)
    model, pool = hand.backend.model, hand.backend.pool
    full, ring = model.pool_bytes_per_token
    assert model.windows == (WINDOW,) and pool.nbytes == 16 * (7 * full + 5 * ring)
    layers = [layer for layer in range(len(model.layers)) if model.pool_of(layer) == 1]
    assert sum(side[n].arrays[0].nbytes for n in layers for side in (pool.keys, pool.values)) == 16 * 5 * ring > 0
    assert (full == 0) == (plain.architecture == "mistral"), "without full attention pool 0 takes nothing"


def test_the_probe_sees_a_wrapped_ring(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a mask that is wrong only where a ring has wrapped is not accepted as a way to decode."""
    from cortexstream.backends.mlx.cache import Batch

    right = Batch._segment

    def wrong(self: Any, number: int, first: int, count: int) -> Any:
        segment = right(self, number, first, count)
        if any(position >= self.pool.shapes[number].slots for position in self.positions[first : first + count]):
            segment._valid = None
        return segment

    monkeypatch.setattr(Batch, "_segment", wrong)
    hand = ByHand(plain.folder)
    assert "padded copies" in hand.backend.info.notes[0]
