"""The block tables of all slots, on the device; what changed is sent, once for all layers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.cuda.step import upload
from cortexstream.errors import EngineError
from cortexstream.plan import KVRows


class BlockTables:
    """`tables[p]` int32 [slots, blocks] for pool p: position n of a slot's row lies in block tables[p][slot, n //
    block_tokens]. A ring's blocks are repeated, so that kernels need not know of rings."""

    def __init__(self, memory: KVMemory, num_slots: int, max_tokens: int, device: torch.device) -> None:
        longest = min(max_tokens, memory.pools[0].num_blocks * memory.block_tokens)
        self._width = -(-longest // memory.block_tokens)
        self.max_tokens = self._width * memory.block_tokens
        self.tables = [torch.zeros(num_slots, self._width, dtype=torch.int32, device=device) for _ in memory.pools]
        self._known: list[tuple[KVRows | None, ...]] = [(None,) * len(memory.pools)] * num_slots

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    def update(self, rows: Iterable[tuple[int, KVRows]]) -> None:
        """Send what is new in the rows (slot, kv). Raises EngineError, with nothing sent or remembered, for one longer
        than a table."""
        changes: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in self.tables]  # (place in the table, blocks)
        all_now: dict[int, tuple[KVRows, ...]] = {}
        for slot, kv in rows:
            now = all_now[slot] = (kv, *kv.rings)
            for number, (old, new) in enumerate(zip(self._known[slot], now, strict=True)):
                if old is not None and (old is new or old.blocks == new.blocks):
                    continue
                changes[number].append(self._change(slot, old, new, ring=number > 0))
        for slot, now in all_now.items():
            self._known[slot] = now
        for table, change in zip(self.tables, changes, strict=True):
            if change:
                places = [place + i for place, blocks in change for i in range(len(blocks))]
                values = [block for _, blocks in change for block in blocks]
                at, blocks = upload(table.device, places, values)
                table.view(-1)[at] = blocks.int()

    def _change(self, slot: int, old: KVRows | None, new: KVRows, ring: bool) -> tuple[int, tuple[int, ...]]:
        """Where in the flat table the blocks begin that must be sent, and which."""
        first = slot * self._width
        if ring:
            return first, tuple(np.resize(new.blocks, self._width).tolist()) if new.blocks else ()
        if len(new.blocks) > self._width:
            raise EngineError(
                f"a row of slot {slot} has {len(new.blocks)} blocks; the model's context and the KV memory "
                f"take at most {self._width}"
            )
        same = 0 if old is None else len(old.blocks)
        if old is None or new.blocks[:same] != old.blocks:
            same = 0
        return first + same, new.blocks[same:]
