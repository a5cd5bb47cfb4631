"""Attention of one step by the Triton kernels: a launch or two per layer, for all rows at once.

Rings: decoding rows read them through tables that repeat their blocks. A step with chunks of prompts copies each row's
window and chunk next to each other first, since a chunk may overwrite what its first queries see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cortexstream.backends.common.kv_memory import KVMemory
from cortexstream.backends.common.kv_pool import KVPool
from cortexstream.backends.cuda.attention import Options, Rotary
from cortexstream.backends.cuda.block_tables import BlockTables
from cortexstream.backends.cuda.step import Span, upload
from cortexstream.backends.cuda.store import TorchStore
from cortexstream.kernels.triton.decode_attention import (
    Workspace,
    choose_config,
    decode_attention,
    make_workspace,
)
from cortexstream.kernels.triton.decode_splits import split_offsets
from cortexstream.kernels.triton.kv_append import kv_append
from cortexstream.kernels.triton.prefill_attention import QueryTiles, prefill_attention, query_tiles
from cortexstream.kernels.triton.prefill_attention import choose_config as choose_prefill_config
from cortexstream.kernels.triton.rope_append import rope_append


class Appender:
    """Writes of one step: q, k and v are finished and stored in a launch."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self._order = torch.arange(num_tokens, device=device)
        self._angles: dict[tuple[int, int], tuple[Rotary, torch.Tensor]] = {}

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None, pools: tuple[Any, Any],
        slots: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Returns q as attention takes it."""
        if rotary is None:
            kv_append(_adjacent(k), _adjacent(v), *pools, slots, check=False)
            return q.contiguous()
        norm: dict[str, Any] = {} if rotary.norm is None else rotary.norm._asdict()
        return rope_append(
            _adjacent(q), _adjacent(k), _adjacent(v), *pools, self._table(rotary), self._order, slots,
            check=False, **norm,
        )  # fmt: skip

    def _table(self, rotary: Rotary) -> torch.Tensor:
        """Cosines and sines [T, D] of the step's tokens, made once for the layers that share them."""
        key = rotary.cos.data_ptr(), rotary.sin.data_ptr()
        if key not in self._angles:  # the rotary is kept, so that its memory is not given to another
            half = rotary.cos.shape[-1] // 2
            table = torch.cat((rotary.cos[:, :half], rotary.sin[:, :half]), dim=-1).float()
            self._angles[key] = rotary, table
        return self._angles[key][1]


class DecodeRows(NamedTuple):
    """A step in which every row has one token, on the device."""

    slots: tuple[torch.Tensor, ...]  # int64 [R] per pool: where the token is written; negative for padding
    tables: tuple[torch.Tensor, ...]  # int32 [R, blocks] per pool
    lengths: torch.Tensor  # int32 [R], the token included; 0 for padding


class DecodeAttention:
    """The `Attend` of a step of decoding rows. Nothing depends on the lengths but `max_tokens`, which bounds them; with
    `one_launch` the step may be captured in a CUDA graph."""

    def __init__(self, memory: KVMemory, rows: DecodeRows, max_tokens: int, one_launch: bool) -> None:
        self._memory, self._rows, self._max_tokens, self._one_launch = memory, rows, max_tokens, one_launch
        self._append = Appender(len(rows.lengths), rows.lengths.device)
        self._shared: dict[tuple[int | None, int, int], tuple[torch.Tensor | None, Workspace]] = {}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        window: int | None, options: Options,
    ) -> torch.Tensor:  # fmt: skip
        number = self._memory.pool_of[layer]
        pools = _pools(self._memory.pools[number], layer)
        q = self._append(q, k, v, rotary, pools, self._rows.slots[number])
        offsets, workspace = self._share(q, v.shape[-1], window)
        return decode_attention(
            q, *pools, self._rows.tables[number], self._rows.lengths, block_tokens=self._memory.block_tokens,
            max_tokens=self._max_tokens, scale=options.scale, window=window, softcap=options.soft_cap,
            sinks=options.sinks, offsets=offsets, workspace=workspace,
        )  # fmt: skip

    def _share(self, q: torch.Tensor, value_dim: int, window: int | None) -> tuple[torch.Tensor | None, Workspace]:
        """The work list and the scratch memory, which layers of one shape share."""
        key = window, q.shape[1], value_dim
        if key not in self._shared:
            offsets, most = None, self._max_tokens
            if self._one_launch:
                split = choose_config(q, value_dim).split
                offsets = split_offsets(self._rows.lengths, max_tokens=most, window=window, split=split)
            self._shared[key] = offsets, make_workspace(q, value_dim, max_tokens=most, window=window)
        return self._shared[key]


class RingCopy:
    """The windows of a step's rows and their chunks, next to each other in scratch memory: per row first the positions
    of the window before its chunk, then the chunk."""

    def __init__(self, pool: KVPool, number: int, spans: Sequence[Span], device: torch.device) -> None:
        assert pool.window is not None
        self._pool = pool
        self.past = [min(span.start, pool.window - 1) for span in spans]
        past: list[int] = []  # places of the windows' tokens here, and of the chunks'
        own: list[int] = []
        kept: list[int] = []  # places of what a ring keeps afterwards
        source: list[int] = []  # slots of the windows' tokens in the rings, and of what is kept
        target: list[int] = []
        begins, end = [], 0
        for span, before in zip(spans, self.past, strict=True):
            rows, keep = span.kv.rings[number - 1], pool.held(span.num_tokens)
            begins.append(end)
            past += range(end, end + before)
            own += range(end + before, end + before + span.num_tokens)
            source += pool.slots(rows, span.start - before, before).tolist()
            end += before + span.num_tokens
            kept += range(end - keep, end)
            target += pool.slots(rows, span.start + span.num_tokens - keep, keep).tolist()
        self._size = end
        self._past, self.own, self._source, self._kept, self._target, table = upload(
            device, past, own, source, kept, target, begins
        )
        self.table = table.int()[:, None]  # a row is a run of the scratch memory

    def gather(self, layer: int) -> tuple[TorchStore, TorchStore]:
        """Scratch memory with the windows before the chunks; the rest holds anything."""
        keys, values = _stores(self._pool, layer)
        return self._gather(keys), self._gather(values)

    def store(self, layer: int, copies: tuple[TorchStore, TorchStore]) -> None:
        """Put the ends of the chunks, as much as a ring keeps, where they belong."""
        for copy, store in zip(copies, _stores(self._pool, layer), strict=True):
            for scratch, part in zip(copy.parts, store.parts, strict=True):
                part[self._target] = scratch[self._kept]

    def _gather(self, store: TorchStore) -> TorchStore:
        copy = store.empty(self._size)
        for scratch, part in zip(copy.parts, store.parts, strict=True):
            scratch[self._past] = part[self._source]
        return copy


class MixedAttention:
    """The `Attend` of a step with chunks of prompts, and decoding rows beside them."""

    def __init__(self, memory: KVMemory, spans: Sequence[Span], tables: BlockTables, device: torch.device) -> None:
        self._memory, self._device = memory, device
        self._counts = [span.num_tokens for span in spans]
        self._append = Appender(sum(self._counts), device)
        self._tiles: dict[tuple[int, int, int], QueryTiles] = {}
        full = memory.pools[0]
        slots = [slot for span in spans for slot in full.slots(span.kv, span.start, span.num_tokens).tolist()]
        self._slots, rows = upload(device, slots, [span.slot for span in spans])
        self._table = tables.tables[0][rows]
        self._rings = {
            number: RingCopy(pool, number, spans, device)
            for number, pool in enumerate(memory.pools) if pool.window is not None
        }  # fmt: skip
        self._past = {0: [span.start for span in spans], **{n: ring.past for n, ring in self._rings.items()}}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: Rotary | None,
        window: int | None, options: Options,
    ) -> torch.Tensor:  # fmt: skip
        number = self._memory.pool_of[layer]
        pool, tiles = self._memory.pools[number], self._cut(q, k.shape[1], v.shape[-1], number)

        def attend(
            pools: tuple[Any, Any], slots: torch.Tensor, table: torch.Tensor, block_tokens: int | None
        ) -> torch.Tensor:
            finished = self._append(q, k, v, rotary, pools, slots)
            return prefill_attention(
                finished, *pools, table, tiles, block_tokens=block_tokens, scale=options.scale, window=window,
                softcap=options.soft_cap, sinks=options.sinks,
            )  # fmt: skip

        if number == 0:
            return attend(_pools(pool, layer), self._slots, self._table, pool.block_tokens)
        ring = self._rings[number]
        copies = ring.gather(layer)
        out = attend((copies[0].pool, copies[1].pool), ring.own, ring.table, None)
        ring.store(layer, copies)
        return out

    def _cut(self, q: torch.Tensor, kv_heads: int, value_dim: int, number: int) -> QueryTiles:
        """The work list, made once for the layers of a pool that have one shape."""
        sharing, block_m = q.shape[1] // kv_heads, choose_prefill_config(q, value_dim).block_m
        key = number, sharing, block_m
        if key not in self._tiles:
            keys = [past + count for past, count in zip(self._past[number], self._counts, strict=True)]
            self._tiles[key] = query_tiles(
                self._counts, keys, sharing=sharing, block_m=block_m, device=self._device
            )  # fmt: skip
        return self._tiles[key]


def _stores(pool: KVPool, layer: int) -> tuple[TorchStore, TorchStore]:
    keys, values = pool.keys(layer), pool.values(layer)
    assert isinstance(keys, TorchStore) and isinstance(values, TorchStore)
    return keys, values


def _pools(pool: KVPool, layer: int) -> tuple[Any, Any]:
    keys, values = _stores(pool, layer)
    return keys.pool, values.pool


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    """x [T, heads, dim] with the heads of a token next to each other, as projections and their slices have them."""
    adjacent = (x.shape[2] == 1 or x.stride(2) == 1) and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if adjacent else x.contiguous()
