"""A step of decoding rows through the Triton kernels: a function of one small tensor, which a CUDA graph can replay.

A graph is captured for a number of rows, once; fewer rows are padded. It reads its numbers, the block tables and the
last draws from tensors that stay where they are, so it serves any lengths. What a model cannot do in a graph, such as
asking the device for a number, ends the use of graphs with a note, not the program.

Without a graph a step launches two kernels per layer, the second only where a row may have several splits. Both are
launched once before the first step, on padding, so that no row's length leads to a compilation in a later step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.cuda.block_tables import BlockTables
from cortexstream.backends.cuda.models import LoadedModel, short
from cortexstream.backends.cuda.probe import forward
from cortexstream.backends.cuda.step import LastDraws
from cortexstream.backends.cuda.triton_attention import DecodeAttention, DecodeRows
from cortexstream.plan import PlanRow

log = logging.getLogger("cortexstream")

LARGEST_GRAPH = 256  # rows; steps of more are launched kernel by kernel


class Captured(NamedTuple):
    """A graph, and where its numbers come from and its logits go to."""

    graph: Any
    numbers: torch.Tensor
    logits: torch.Tensor


class DecodeStep:
    """See the module's docstring."""

    def __init__(
        self, loaded: LoadedModel, memory: KVMemory, tables: BlockTables, last: LastDraws, graphs: bool,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._loaded, self._memory, self._tables, self._last, self._device = loaded, memory, tables, last, device
        self._graphs: dict[int, Captured] | None = {} if graphs else None
        self._pool: Any = None  # memory that the graphs share, as they are captured on one stream
        self._side: Any = None
        self._compiled = False
        self.notes: tuple[str, ...] = ()

    def logits(self, rows: Sequence[PlanRow]) -> torch.Tensor:
        """float32 [rows, vocabulary], good until the next call. The block tables have been updated."""
        size = bucket(len(rows))
        captured = self._captured(size) if size <= LARGEST_GRAPH else None
        numbers = torch.tensor(
            self._numbers(rows, size if captured else len(rows)), dtype=torch.int64,
            pin_memory=self._device.type == "cuda",
        )  # fmt: skip
        if captured is None:
            longest = max(row.start for row in rows) + 1
            return self._run(numbers.to(self._device, non_blocking=True), longest, one_launch=False)
        captured.numbers.copy_(numbers, non_blocking=True)
        captured.graph.replay()
        return captured.logits[: len(rows)]

    def capture(self, batch: int) -> None:
        """Capture the graphs for up to `batch` rows, the largest first, as its memory serves the others. Compile what
        runs without them."""
        if not self._compiled:  # by a row of padding in tables of full width: nothing is written
            numbers = torch.tensor(self._numbers((), 1), dtype=torch.int64, device=self._device)
            self._run(numbers, self._tables.max_tokens, one_launch=False)
            self._compiled = True
        sizes = {bucket(n) for n in range(1, min(batch, LARGEST_GRAPH) + 1)}
        for size in sorted(sizes, reverse=True):
            if size <= LARGEST_GRAPH:
                self._captured(size)

    def _captured(self, size: int) -> Captured | None:
        if self._graphs is None:
            return None
        if size not in self._graphs:
            try:
                self._graphs[size] = self._capture(size)
            except Exception as error:  # torch's, Triton's and the model's own are of many kinds
                note = f"decoding runs without CUDA graphs, and slower: this model cannot be captured ({short(error)})"
                log.warning("%s", note)
                self._graphs, self.notes = None, (note,)
                return None
        return self._graphs[size]

    def _capture(self, size: int) -> Captured:
        """Nothing but padding runs here: no memory of a sequence is written."""
        numbers = torch.tensor(self._numbers((), size), dtype=torch.int64, device=self._device)
        before = torch.cuda.current_stream(self._device)
        try:
            return self._capture_beside(numbers)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream in place

    def _capture_beside(self, numbers: torch.Tensor) -> Captured:
        side = self._side = self._side or torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):  # compiles the kernels, and lets libraries make their workspaces
            for _ in range(2):
                self._run(numbers, self._tables.max_tokens, one_launch=True)
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            logits = self._run(numbers, self._tables.max_tokens, one_launch=True)
        self._pool = self._pool or graph.pool()
        return Captured(graph, numbers, logits)

    def _numbers(self, rows: Sequence[PlanRow], size: int) -> list[list[int]]:
        """Per row, padded to `size`: its token, its slot, its length, and where it is written in each pool."""
        padding = size - len(rows)
        pools = list(enumerate(self._memory.pools))
        written = [
            [pool.slot(row.kv if number == 0 else row.kv.rings[number - 1], row.start) for row in rows] + [-1] * padding
            for number, pool in pools
        ]
        return [
            [row.tokens[0] for row in rows] + [0] * padding,
            [row.slot for row in rows] + [0] * padding,
            [row.start + 1 for row in rows] + [0] * padding,
            *written,
        ]

    def _run(self, numbers: torch.Tensor, max_tokens: int, one_launch: bool) -> torch.Tensor:
        """Logits from the device's numbers [3 + pools, rows] alone."""
        tokens, slots, lengths, *written = numbers.unbind()
        tables = tuple(table[slots] for table in self._tables.tables)
        rows = DecodeRows(tuple(written), tables, lengths.int())
        attend = DecodeAttention(self._memory, rows, max_tokens, one_launch)
        wanted = torch.arange(len(tokens), device=numbers.device)
        with self._loaded.seat.taken(attend):
            positions = (lengths - 1).clamp_min(0)
            return forward(self._loaded.model, self._last.fill(tokens, slots), positions, wanted).float()


def bucket(rows: int) -> int:
    """How many rows a graph for `rows` has: 1, 2, 4, then multiples of 8, then of 16 from 64 on."""
    for size in (1, 2, 4):
        if rows <= size:
            return size
    step = 8 if rows <= 64 else 16
    return -(-rows // step) * step
