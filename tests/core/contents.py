"""What a device holds while an arena plans, and what every sequence must read there: the oracle of contents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from cortexstream.kv import KVArena, KVHandle, Ring
from cortexstream.plan import KVRows, MemoryOp, Move, SwapDrop, SwapIn, SwapOut, ring_tokens

Ints = npt.NDArray[np.int64]
Policy = Literal["first_fit", "buddy"]
HEADS = 2
POISON = -7
MASK = (1 << 61) - 1


def chain(state: int, token: int) -> int:
    """The number that stands for a token behind all those that led to `state`."""
    return (state * 6364136223846793005 + token * 1442695040888963407 + 0x9E3779B9) & MASK


class Device:
    """HEADS numbers a slot in every pool: head-major inside a run, so that a slot's place depends on the run's
    capacity, token-major in paged placement. Executes operations in order, each as if through a temporary."""

    def __init__(self, pool_blocks: Sequence[int], block_tokens: int, windows: Sequence[int], contiguous: bool) -> None:
        self.block_tokens = block_tokens
        self.contiguous = contiguous
        self.ring_slots = [None, *(ring_tokens(window, block_tokens) for window in windows)]
        self.cells: list[Ints] = [
            np.full(blocks * block_tokens * HEADS, POISON, np.int64) for blocks in pool_blocks
        ]  # fmt: skip
        self.kept: dict[int, list[Ints]] = {}  # in host memory

    def execute(self, ops: Iterable[MemoryOp]) -> None:
        for op in ops:
            if isinstance(op, Move):
                self._move(op)
            elif isinstance(op, SwapOut):
                assert op.key not in self.kept and op.num_tokens > 0
                self.kept[op.key] = [
                    self.cells[pool][self._places(rows, np.arange(slots))].copy()
                    for pool, rows, slots in self._held(op.kv, op.num_tokens)
                ]
            elif isinstance(op, SwapIn):
                held = self._held(op.kv, op.num_tokens)
                for (pool, rows, slots), kept in zip(held, self.kept.pop(op.key), strict=True):
                    self.cells[pool][self._places(rows, np.arange(slots))] = kept
            else:
                assert isinstance(op, SwapDrop)
                del self.kept[op.key]

    def write(self, rows: KVRows, start: int, values: Ints) -> None:
        """Values [positions, HEADS] of the positions from `start` on, into every pool: one after the other, as a ring
        may turn within a chunk."""
        for pool, own in enumerate([rows, *rows.rings]):
            slots = self._slots(pool, start, start + len(values))
            last = {slot: index for index, slot in enumerate(slots.tolist())}
            index = np.array([*last.values()], np.int64)
            self.cells[pool][self._places(own, slots[index])] = values[index]

    def read(self, rows: KVRows, start: int, end: int, pool: int) -> Ints:
        """Values [positions, HEADS]."""
        own = [rows, *rows.rings][pool]
        values: Ints = self.cells[pool][self._places(own, self._slots(pool, start, end))]
        return values

    def poison(self, pool: int, block: int) -> None:
        size = self.block_tokens * HEADS
        self.cells[pool][block * size : (block + 1) * size] = POISON

    def _move(self, move: Move) -> None:
        assert 0 < move.num_tokens <= min(move.source_blocks, move.target_blocks) * self.block_tokens
        if not self.contiguous:
            assert move.source_blocks == move.target_blocks == 1
        source = KVRows(tuple(range(move.source, move.source + move.source_blocks)), self.contiguous)
        target = KVRows(tuple(range(move.target, move.target + move.target_blocks)), self.contiguous)
        cells, slots = self.cells[move.pool], np.arange(move.num_tokens)
        copied = cells[self._places(source, slots)].copy()
        cells[self._places(target, slots)] = copied

    def _held(self, kv: KVRows, num_tokens: int) -> list[tuple[int, KVRows, int]]:
        """(pool, rows, slots in use) of a sequence of so many tokens."""
        return [
            (pool, rows, num_tokens if slots is None else min(num_tokens, slots))
            for pool, (rows, slots) in enumerate(zip([kv, *kv.rings], self.ring_slots, strict=True))
        ]

    def _slots(self, pool: int, start: int, end: int) -> Ints:
        ring = self.ring_slots[pool]
        positions: Ints = np.arange(start, end)
        return positions if ring is None else positions % ring

    def _places(self, rows: KVRows, slots: Ints) -> Ints:
        """Indices [slots, HEADS] into a pool's cells."""
        assert rows.contiguous == self.contiguous and (
            not slots.size or slots.max() < len(rows.blocks) * self.block_tokens
        )
        head, slot = np.arange(HEADS)[None, :], slots[:, None]
        if self.contiguous:
            capacity = len(rows.blocks) * self.block_tokens
            places: Ints = (rows.blocks[0] if rows.blocks else 0) * self.block_tokens * HEADS + head * capacity + slot
            return places
        block = np.asarray(rows.blocks or (0,))[slot // self.block_tokens]
        places = (block * self.block_tokens + slot % self.block_tokens) * HEADS + head
        return places


class Text:
    """A live sequence's tokens that are written, and the values that stand for them."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.values: list[int] = []
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        state = self.values[-1] if self.values else 1
        for token in tokens:
            state = chain(state, token)
            self.tokens.append(token)
            self.values.append(state)

    def cells(self, start: int, end: int) -> Ints:
        """Values [positions, HEADS]."""
        values = np.array(self.values[start:end], np.int64)
        return values[:, None] * HEADS + np.arange(HEADS)[None, :]


class World:
    """An arena, the device that executes what it plans, and what every live sequence has written."""

    def __init__(
        self, num_blocks: int, block_tokens: int = 4, placement: Literal["run", "paged"] = "run", growth: float = 1.0,
        *, policy: Policy = "first_fit", rings: Sequence[Ring] = (), prefix_caching: bool = True,
        headroom_tokens: int = 0,
    ) -> None:  # fmt: skip
        self.arena = KVArena(
            num_blocks, block_tokens, placement, growth, policy=policy, rings=rings, prefix_caching=prefix_caching,
            headroom_tokens=headroom_tokens,
        )  # fmt: skip
        self.windows = [ring.window for ring in rings]
        blocks = [num_blocks, *(ring.num_blocks for ring in rings)]
        self.device = Device(blocks, block_tokens, self.windows, placement == "run")
        self.texts: dict[KVHandle, Text] = {}
        self.swapped: dict[int, tuple[Text, bool]] = {}
        self.keys = 0
        self.ops: list[MemoryOp] = []  # all that were executed
        self._fresh: set[KVHandle] = set()  # begun by others, and nothing written since

    def admit(
        self, tokens: Sequence[int], room: int = 0, limit: int | None = None, reuse: int | None = None, spare: int = 0
    ) -> KVHandle:
        """Begin a sequence that will write `tokens` and `room` more, and leave `spare` blocks. The first `reuse` may be
        found: all but the last, if nothing else is said."""
        reusable = tuple(tokens[: len(tokens) - 1 if reuse is None else reuse])
        handle = self.arena.admit(len(tokens) + room, limit, reusable, spare)
        assert handle.position <= len(reusable) and handle.capacity_tokens >= len(tokens) + room
        self.texts[handle] = Text(tokens[: handle.position])
        if handle.position:
            self._fresh.add(handle)
        return handle

    def write(self, handle: KVHandle, tokens: Sequence[int], publish: bool = False) -> None:
        """One step: what was planned is executed, and then this row is written. With `publish` its tokens are known to
        others already when the plan is made, as the scheduler does it."""
        self.flush()
        start, rows, text = handle.position, handle.rows, self.texts[handle]
        assert start == len(text.tokens)
        handle.advance(len(tokens))
        text.extend(tokens)
        if publish:
            self.arena.publish(handle, tuple(text.tokens))
        self.device.write(rows, start, text.cells(start, handle.position))
        self._fresh.discard(handle)

    def begin(self, tokens: Sequence[int], room: int = 0, publish: bool = False) -> KVHandle:
        """Admit a sequence and write all its tokens."""
        handle = self.admit(tokens, room)
        self.write(handle, tokens[handle.position :], publish)
        return handle

    def fork(self, handle: KVHandle) -> KVHandle:
        forked = self.arena.fork(handle)
        self.texts[forked] = Text(self.texts[handle].tokens)
        assert forked.position == handle.position
        if handle in self._fresh:
            self._fresh.add(forked)
        return forked

    def release(self, handle: KVHandle, keep: int | None = None) -> list[int]:
        """End a sequence; its first `keep` tokens (if not said otherwise all) may be found by others. Returns those."""
        tokens = self.texts[handle].tokens[:keep]
        self.arena.release(handle, tuple(tokens))
        self._forget(handle)
        return tokens

    def swap_out(self, handle: KVHandle) -> int:
        self.keys += 1
        self.arena.swap_out(handle, self.keys)
        self.swapped[self.keys] = self.texts[handle], handle in self._fresh
        self._forget(handle)
        return self.keys

    def swap_in(self, key: int, room: int = 1) -> KVHandle:
        text, fresh = self.swapped[key]
        handle = self.arena.admit(len(text.tokens) + room)
        self.arena.swap_in(handle, key, len(text.tokens))
        del self.swapped[key]
        self.texts[handle] = text
        if fresh:
            self._fresh.add(handle)
        return handle

    def swap_drop(self, key: int) -> None:
        self.arena.swap_drop(key)
        del self.swapped[key]

    def reset(self, handle: KVHandle) -> None:
        handle.reset()
        self.texts[handle] = Text()
        self._fresh.discard(handle)

    def flush(self) -> tuple[MemoryOp, ...]:
        """Execute what was planned; then what nobody holds or knows may hold anything, and all others read theirs."""
        ops = self.arena.take_moves()
        self.device.execute(ops)
        self.ops += ops
        self.poison()
        self.verify()
        return ops

    def poison(self) -> None:
        for pool in self.arena._pools:
            for block, mark in enumerate(pool.allocator.block_map(max(1, pool.num_blocks))):
                if mark == ".":
                    self.device.poison(pool.index, block)

    def verify(self) -> None:
        """Every live handle reads its tokens: all positions, and of a window what the next token will look at, which is
        the whole window unless a ring was taken over that had turned a token further."""
        for handle, text in self.texts.items():
            assert handle.live and handle.position == len(text.tokens) <= handle.capacity_tokens
            for pool, window in enumerate([None, *self.windows]):
                end = len(text.tokens)
                start = 0 if window is None else max(0, end - window + (handle in self._fresh))
                read = self.device.read(handle.rows, start, end, pool)
                np.testing.assert_array_equal(read, text.cells(start, end), f"{handle} in pool {pool}")

    def check(self) -> None:
        """All that can be said at any time."""
        self.flush()
        self.arena.check()
        assert {handle for handle, _ in self.arena.owners()} == set(self.texts)
        assert self.arena.stats().used_tokens == sum(len(text.tokens) for text in self.texts.values())

    def end(self) -> None:
        """Nothing is left behind when all is released, dropped and forgotten."""
        for handle in list(self.texts):
            self.release(handle)
        for key in list(self.swapped):
            self.swap_drop(key)
        self.check()
        assert self.arena.used_blocks == 0 and self.arena.free_blocks == self.arena.num_blocks
        self.arena.clear()
        self.check()
        assert not self.device.kept and self.arena.stats().cached_blocks == 0
        for pool in self.arena._pools:
            assert pool.num_free == pool.num_blocks and not pool.claims

    def _forget(self, handle: KVHandle) -> None:
        assert not handle.live
        del self.texts[handle]
        self._fresh.discard(handle)
