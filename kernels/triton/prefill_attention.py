"""Attention of any number of queries per row: prompts, chunks of prompts and decoding rows in one launch.

A tile of queries walks its keys from the first to the last ("FlashAttention-2", Dao, 2023). What a query gets does not
depend on the others of its tile: the same bits in any batch, and however its row is cut into chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.torch.quantized_pool import Pool
from cortexstream.kernels.triton._attention import (
    accumulate,
    check_attention,
    divisor,
    find,
    load_queries,
    make_shape,
    no_values,
    scores,
    store_values,
)
from cortexstream.kernels.triton._common import capability, check_tensor, padded
from cortexstream.kernels.triton._pools import as_bytes


class Config(NamedTuple):
    """Tile sizes: `block_m` pairs of a query and one of the heads that share a key head, `block_n` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


Table = dict[int, dict[tuple[int, int], Config]]
# compute capability -> (bytes of a number of q, wider of padded D and Dv) -> Config
CONFIGS: Table = {
    80: {
        (2, 64): Config(128, 64, 8, 3),
        (2, 128): Config(64, 64, 8, 2),
        (2, 256): Config(64, 32, 8, 2),
        (4, 64): Config(64, 32, 8, 2),
        (4, 128): Config(32, 16, 8, 2),
        (4, 256): Config(16, 16, 4, 2),
    },
    90: {
        (2, 64): Config(128, 64, 8, 3),
        (2, 128): Config(128, 64, 8, 3),
        (2, 256): Config(64, 64, 8, 2),
        (4, 64): Config(64, 32, 8, 2),
        (4, 128): Config(32, 16, 8, 2),
        (4, 256): Config(16, 16, 4, 2),
    },
}
QUANTIZED_CONFIGS: Table = {  # `block_m` as above: the same QueryTiles serve both
    80: {
        (2, 64): Config(128, 32, 8, 3),
        (2, 128): Config(64, 32, 8, 2),
        (2, 256): Config(64, 16, 8, 2),
        (4, 64): Config(64, 16, 8, 2),
        (4, 128): Config(32, 16, 8, 2),
        (4, 256): Config(16, 16, 4, 2),
    },
    90: {
        (2, 64): Config(128, 64, 8, 3),
        (2, 128): Config(128, 64, 8, 3),
        (2, 256): Config(64, 64, 8, 2),
        (4, 64): Config(64, 16, 8, 2),
        (4, 128): Config(32, 16, 8, 2),
        (4, 256): Config(16, 16, 4, 2),
    },
}


class QueryTiles(NamedTuple):
    """Which queries a launch has, as `query_tiles` lays them out; once a step for all layers of a shape."""

    num_queries: int
    num_rows: int
    sharing: int  # query heads per key head
    block_m: int
    causal: bool
    first: torch.Tensor  # int32 [rows + 1]: row r's queries are first[r] .. first[r + 1] - 1
    kv_tokens: torch.Tensor  # int32 [rows]
    row: torch.Tensor  # int32 [tiles]: each tile's row
    number: torch.Tensor  # int32 [tiles]: and its place there: pairs number * block_m and following


@triton.jit
def walk(
    tile, past, query, k_pool, v_pool, table, kv_head, low, start, end, scale, summed, largest, total,
    S: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries attend to positions start .. end - 1, of which those below `low` do not count."""
    for at in range(start, end, S.block_n):
        position = at + tl.arange(0, S.block_n)
        inside = (position >= low) & (position < end)
        vector = find(table, kv_head, at, inside, S, MASKED)
        s = scores(tile, k_pool, vector, inside, scale, S, MASKED)
        if MASKED:
            seen = inside[None, :]
            if CAUSAL:
                seen = seen & (position[None, :] <= past + query[:, None])
            if S.window > 0:
                seen = seen & (position[None, :] > past + query[:, None] - S.window)
            s = tl.where(seen, s, float("-inf"))
        summed, largest, total = accumulate(
            s, v_pool, vector, inside, summed, largest, total, tile[0].dtype, S, MASKED
        )  # fmt: skip
    return summed, largest, total


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["tables", "first", "kv_tokens", "tile_row", "tile_number"],
)
def prefill_kernel(
    q, k_pool, v_pool, tables, first, kv_tokens, tile_row, tile_number, sinks, out, scale, v_scale, table_stride,
    S: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, key heads). Pair i of a row: its query i // SHARING with head i % SHARING of those of a key head."""
    SHARING: tl.constexpr = S.heads // S.kv_heads
    row, pair = tl.load(tile_row + tl.program_id(0)), tl.load(tile_number + tl.program_id(0)) * BLOCK_M
    kv_head = tl.program_id(1)
    begin = tl.load(first + row)
    queries, keys = tl.load(first + row + 1) - begin, tl.load(kv_tokens + row)
    past = keys - queries
    pairs = pair + tl.arange(0, BLOCK_M)
    query, head = pairs // SHARING, kv_head * SHARING + pairs % SHARING
    live = query < queries
    vector = (begin + query).to(tl.int64) * S.heads + head
    tile = load_queries(q, vector, live, S)

    # Some query of the tile sees the positions low .. high - 1; all of its queries see those below `common`.
    low, high, common = pair * 0, keys, keys
    if CAUSAL:
        high = past + tl.minimum((pair + BLOCK_M - 1) // SHARING + 1, queries)
        common = past + pair // SHARING + 1
    if S.window > 0:
        low = tl.maximum(past + pair // SHARING - S.window + 1, 0)
    start = low // S.block_n * S.block_n
    edge = tl.maximum(common // S.block_n * S.block_n, start)
    table = tables + row.to(tl.int64) * table_stride
    summed, largest, total = no_values(BLOCK_M, S)
    if S.window > 0:  # every tile may hold positions before the window, whose blocks may be gone
        edge = start
    else:
        summed, largest, total = walk(
            tile, past, query, k_pool, v_pool, table, kv_head, low, start, edge, scale, summed, largest, total,
            S, CAUSAL, MASKED=False,
        )  # fmt: skip
    summed, largest, total = walk(
        tile, past, query, k_pool, v_pool, table, kv_head, low, edge, high, scale, summed, largest, total,
        S, CAUSAL, MASKED=True,
    )  # fmt: skip
    store_values(out, vector, summed, divisor(largest, total, sinks, head, live, v_scale, S), live, S)


def choose_config(q: torch.Tensor, value_dim: int, *, quantized: bool = False) -> Config:
    """The tables' line for q [.., D] and values of `value_dim` numbers on the current device."""
    table = QUANTIZED_CONFIGS if quantized else CONFIGS
    return table[capability()][q.element_size(), max(64, padded(max(q.shape[-1], value_dim)))]


def query_tiles(
    query_tokens: list[int], kv_tokens: list[int], *, sharing: int, block_m: int, device: torch.device,
    causal: bool = True,
) -> QueryTiles:  # fmt: skip
    """Cut rows of query_tokens[r] queries and kv_tokens[r] keys, their own included, into tiles.

    `sharing` is Hq / Hkv; `block_m` is that of the launch's Config. Host numbers; one copy to `device`, which does not
    wait. Tiles with many keys come first: they take longest. Raises ValueError when a count is negative, or with
    `causal` a row has fewer keys than queries.
    """
    if len(query_tokens) != len(kv_tokens):
        raise ValueError(f"{len(query_tokens)} rows of queries do not fit {len(kv_tokens)} rows of keys")
    for row, (queries, keys) in enumerate(zip(query_tokens, kv_tokens, strict=True)):
        if queries < 0 or keys < (queries if causal else 0):
            raise ValueError(f"row {row} has {queries} queries and {keys} keys; keys must include those of its queries")
    first = [0]
    for queries in query_tokens:
        first.append(first[-1] + queries)
    tiles = []
    for row, (queries, keys) in enumerate(zip(query_tokens, kv_tokens, strict=True)):
        for number in range(triton.cdiv(queries * sharing, block_m)):
            last = min(queries, triton.cdiv((number + 1) * block_m, sharing))
            tiles.append((-(keys - queries + last) if causal else -keys, row, number))
    tiles.sort()
    rows = len(query_tokens)
    host = torch.tensor(
        [*first, *kv_tokens, *(row for _, row, _ in tiles), *(number for _, _, number in tiles)],
        dtype=torch.int32, pin_memory=device.type == "cuda",
    )  # fmt: skip
    parts = host.to(device, non_blocking=True).split([rows + 1, rows, len(tiles), len(tiles)])
    return QueryTiles(first[-1], rows, sharing, block_m, causal, *parts)


def prefill_attention(
    q: torch.Tensor, k_pool: Pool, v_pool: Pool, tables: torch.Tensor, tiles: QueryTiles, *,
    block_tokens: int | None, scale: float | None = None, window: int | None = None, softcap: float | None = None,
    sinks: torch.Tensor | None = None, k_scale: float = 1.0, v_scale: float = 1.0, out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """Each row's queries are the last of its positions, whose keys and values lie in the pools already.

    q [T, Hq, D] holds the rows' queries one row after the other, as `tiles` says (from `query_tiles`); a query sees
    its own position and those before (aligned at the bottom right), or all of its row if `tiles` are not causal. Then a
    row may have more queries than keys; with no key they give zeros. Pools, tables, `scale`, `window` (causal only),
    `softcap`, `sinks`, `k_scale` and `v_scale` are as in `decode_attention`; `config` replaces the table's line.

    Returns [T, Hq, Dv] in q's dtype, in `out` if given. Raises ValueError when shapes, dtypes, devices or numbers do
    not go together; nothing was launched then.
    """
    pools = check_attention(q, k_pool, v_pool, tables, block_tokens, window, softcap, sinks, k_scale, v_scale)
    (tokens, heads, dim), kv_heads, value_dim = q.shape, pools.heads, pools.value_dim
    config = config or choose_config(q, value_dim, quantized=pools.bits > 0)
    if (tokens, len(tables)) != (tiles.num_queries, tiles.num_rows):
        raise ValueError(
            f"q holds {tokens} queries and tables {len(tables)} rows; tiles are for {tiles.num_queries} and "
            f"{tiles.num_rows}"
        )
    if (heads // kv_heads, config.block_m) != (tiles.sharing, tiles.block_m):
        raise ValueError(
            f"tiles are for {tiles.sharing} query heads per key head in tiles of {tiles.block_m}; q and config have "
            f"{heads // kv_heads} and {config.block_m}"
        )
    if window is not None and not tiles.causal:
        raise ValueError(f"window is {window}, but tiles are not causal; a window looks back from a query's position")
    out = torch.empty(tokens, heads, value_dim, dtype=q.dtype, device=q.device) if out is None else out
    check_tensor("out", out, (tokens, heads, value_dim), (q.dtype,), q.device)
    if tiles.row.device != q.device:
        raise ValueError(f"tiles are on {tiles.row.device}; they must be on {q.device}")
    if len(tiles.row):
        prefill_kernel[(len(tiles.row), kv_heads)](
            q, as_bytes(k_pool), as_bytes(v_pool), tables, tiles.first, tiles.kv_tokens, tiles.row, tiles.number,
            sinks, out, (dim**-0.5 if scale is None else scale) * k_scale, v_scale, tables.stride(0),
            S=make_shape(heads, pools, config.block_n, block_tokens, window, softcap, sinks), BLOCK_M=config.block_m,
            CAUSAL=tiles.causal, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
