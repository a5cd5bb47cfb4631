"""Plans made by hand: no scheduler, no arena."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from cortexstream.backend import BackendOptions
from cortexstream.plan import KVRows, MemoryOp, PlanRow, SampleSpec, StepPlan, StepResult, ring_tokens

GREEDY = SampleSpec()


class ByHand:
    """A backend with runs, the steps made on it and, on mlx, the logits of every decode row by (sequence, position)."""

    def __init__(
        self,
        folder: Path | str,
        num_blocks: int = 64,
        ring_blocks: int = 64,
        mode: str | None = None,
        name: str = "mlx",
        **options: Any,
    ) -> None:
        module: Any = import_module(f"cortexstream.backends.{name}")
        self.backend = module.create(BackendOptions(str(folder), kv_layout="run", **options))
        self.block_tokens = self.backend.info.block_tokens
        windows = self.backend.model.windows
        self.rings = [ring_tokens(window, self.block_tokens) // self.block_tokens for window in windows]
        self.nbytes = self.backend.allocate_kv(num_blocks, (ring_blocks,) * len(windows))
        self.step = 10
        self.swap_s = 0.0
        self.logits: dict[tuple[int, int], np.ndarray] = {}
        self._waiting: Any = None
        if name == "mlx":
            forward = self.backend._forward
            forward.mode = mode or forward.mode
            self._decode, forward.decode = forward.decode, self._recorded

    def _recorded(self, pool: Any, rows: Any, positions: list[int], tokens: Any) -> Any:
        logits = self._decode(pool, rows, positions, tokens)
        self._waiting = (rows, positions, logits)
        return logits

    def place(self, first: int, blocks: int, ring: int | None = None) -> KVRows:
        """A sequence of `blocks` blocks from `first` on; it is the `ring`-th of those with full rings (by default the
        blocks' first)."""
        number = first if ring is None else ring
        rings = (KVRows(tuple(range(number * size, (number + 1) * size)), True) for size in self.rings)
        return KVRows(tuple(range(first, first + blocks)), True, tuple(rings))

    def run(self, *rows: PlanRow, moves: tuple[MemoryOp, ...] = ()) -> list[int]:
        """One step; keeps its logits and returns the tokens drawn."""
        self.step += 1
        self._waiting = None
        result: StepResult = self.backend.collect(self.backend.submit(StepPlan(self.step, rows, moves)))
        self.swap_s += result.swap_s
        if self._waiting is not None:
            decoded, positions, logits = self._waiting
            self._waiting = None
            for row, position, values in zip(decoded, positions, logits.tolist(), strict=True):
                self.logits[row.seq_id, position] = np.array(values, np.float32)
        assert not any(row.error for row in result.rows)
        return [row.token for row in result.rows]


class Served:
    """One sequence: its tokens so far, and how many of them have keys and values."""

    def __init__(self, number: int, prompt: list[int], kv: KVRows) -> None:
        self.number, self.tokens, self.kv, self.done = number, list(prompt), kv, 0

    def row(self, limit: int = 10**9) -> PlanRow:
        """The next row: at most `limit` tokens, drawing if they are the last known ones."""
        part = tuple(self.tokens[self.done : self.done + limit])
        last = self.done + len(part) == len(self.tokens)
        return PlanRow(self.number, self.number, part, self.done, self.kv, GREEDY if last else None)

    def took(self, row: PlanRow, token: int | None) -> None:
        self.done += len(row.tokens)
        if token is not None:
            self.tokens.append(token)


def advance(hand: ByHand, served: list[Served], limit: int = 10**9, moves: tuple[MemoryOp, ...] = ()) -> None:
    """A step in which each sequence feeds at most `limit` tokens."""
    rows = [one.row(limit) for one in served]
    drawn = iter(hand.run(*rows, moves=moves))
    for one, row in zip(served, rows, strict=True):
        one.took(row, None if row.sample is None else next(drawn))
