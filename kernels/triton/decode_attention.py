"""Attention of one query per row; several programs share a long row's keys ("Flash-Decoding", Dao et al., 2023).

The query heads that share a key head are the rows of one matrix, so keys and values are read once for all of them.
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
from cortexstream.kernels.triton._pools import as_bytes, store_rows
from cortexstream.kernels.triton.decode_splits import most_splits, splits_of

MOST_GROUP = 32  # query heads of one program; where more share a key head, several programs read it


class Config(NamedTuple):
    """Tile sizes. `split` positions are one program's work, a multiple of `block_n`, the positions of one tile."""

    split: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int  # of the one-launch form


Table = dict[int, dict[tuple[int, int], Config]]
# compute capability -> (bytes of a number of q, wider of padded D and Dv) -> Config
CONFIGS: Table = {
    80: {
        (2, 64): Config(512, 64, 4, 5, 4),
        (2, 128): Config(512, 64, 4, 4, 3),
        (2, 256): Config(512, 32, 4, 3, 2),
        (4, 64): Config(512, 64, 4, 4, 2),
        (4, 128): Config(512, 32, 4, 3, 2),
        (4, 256): Config(512, 16, 4, 3, 2),
    },
    90: {
        (2, 64): Config(512, 128, 4, 5, 3),
        (2, 128): Config(512, 64, 4, 5, 3),
        (2, 256): Config(512, 64, 4, 3, 2),
        (4, 64): Config(512, 64, 4, 5, 3),
        (4, 128): Config(512, 64, 4, 3, 2),
        (4, 256): Config(512, 32, 4, 3, 2),
    },
}
QUANTIZED_CONFIGS: Table = {  # `split` as above: a work list serves both
    80: {
        (2, 64): Config(512, 64, 4, 5, 3),
        (2, 128): Config(512, 32, 4, 5, 3),
        (2, 256): Config(512, 32, 4, 4, 2),
        (4, 64): Config(512, 32, 4, 4, 2),
        (4, 128): Config(512, 16, 4, 4, 2),
        (4, 256): Config(512, 16, 4, 3, 2),
    },
    90: {
        (2, 64): Config(512, 64, 4, 5, 3),
        (2, 128): Config(512, 64, 4, 5, 3),
        (2, 256): Config(512, 16, 4, 4, 2),
        (4, 64): Config(512, 32, 4, 4, 2),
        (4, 128): Config(512, 16, 4, 4, 2),
        (4, 256): Config(512, 16, 4, 3, 2),
    },
}


class Workspace(NamedTuple):
    """Scratch memory, which launches that follow each other on one stream may share.

    The one-launch form takes as few items as its rows have splits; a row for which there is no item left gets NaN.
    """

    partial: torch.Tensor  # float32 [items, Hq, Dv]: results of splits
    sums: torch.Tensor  # float32 [items, Hq]: log2 of their softmax denominators
    finished: torch.Tensor  # int32 [rows * Hq], zeros: how many splits are done. The one-launch form leaves zeros


@triton.jit
def heads_of(unit, S: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr):
    """(query heads [GROUP], which of them exist, their key head) of a unit: a tile of heads that share a key head."""
    SHARING: tl.constexpr = S.heads // S.kv_heads
    TILES: tl.constexpr = UNITS // S.kv_heads
    g = unit % TILES * GROUP + tl.arange(0, GROUP)
    return unit // TILES * SHARING + g, g < SHARING, unit // TILES


@triton.jit
def attend_split(
    q, k_pool, v_pool, tables, lengths, sinks, partial, sums, out, row, unit, number, item, scale, v_scale,
    table_stride, limit, S: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One unit of a row attends to the row's split `number`: into `out` if it is the only one, else into `item`.

    A row that is longer than the launch was told gets NaN.
    """
    length = tl.load(lengths + row)
    low, first, count = splits_of(tl.minimum(length, limit), S.window, SPLIT)
    low = tl.maximum(low, (first + number) * SPLIT)
    high = tl.minimum(tl.minimum(length, limit), (first + number + 1) * SPLIT)
    head, live, kv_head = heads_of(unit, S, GROUP, UNITS)
    queries = load_queries(q, row * S.heads + head, live, S)
    table = tables + row.to(tl.int64) * table_stride
    summed, largest, total = no_values(GROUP, S)
    for start in range(low // S.block_n * S.block_n, high, S.block_n):
        position = start + tl.arange(0, S.block_n)
        inside = (position >= low) & (position < high)
        vector = find(table, kv_head, start, inside, S, MASKED=True)
        s = scores(queries, k_pool, vector, inside, scale, S, MASKED=True)
        s = tl.where(inside[None, :], s, float("-inf"))
        summed, largest, total = accumulate(
            s, v_pool, vector, inside, summed, largest, total, queries[0].dtype, S, MASKED=True
        )  # fmt: skip
    if count == 1:
        factor = divisor(largest, total, sinks, head, live, v_scale, S)
        factor = tl.where(length > limit, float("nan"), factor)
        store_values(out, row * S.heads + head, summed, factor, live, S)
    else:
        at = item.to(tl.int64) * S.heads + head
        store_values(partial, at, summed, 1.0 / total, live, S)
        tl.store(sums + at, largest + tl.log2(total), mask=live)


@triton.jit
def merge_splits(
    partial, sums, sinks, out, lengths, row, unit, item, count, v_scale, limit,
    S: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Add up a unit's `count` splits, which are `item` and those after it, in order, weighted by their denominators."""
    head, live, _ = heads_of(unit, S, GROUP, UNITS)
    dv = tl.arange(0, PAD)
    mask = live[:, None] & (dv < S.value_dim)[None, :]
    summed = tl.zeros((GROUP, PAD), tl.float32)
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    for number in range(0, count):  # other programs wrote these: read them past this one's first-level cache
        at = (item + number).to(tl.int64) * S.heads + head
        x = tl.load(sums + at, mask=live, other=0.0, cache_modifier=".cg")
        part_at = partial + at[:, None] * S.value_dim + dv[None, :]
        part = tl.load(part_at, mask=mask, other=0.0, cache_modifier=".cg")
        top = tl.maximum(largest, x)
        shrink, weight = tl.exp2(largest - top), tl.exp2(x - top)
        summed = summed * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        largest = top
    factor = divisor(largest, total, sinks, head, live, v_scale, S)
    factor = tl.where(tl.load(lengths + row) > limit, float("nan"), factor)
    store_rows(out, row * S.heads + head, summed * factor[:, None], live, S.value_dim, PAD)


VARYING = ["table_stride", "limit", "num_splits", "rows", "room"]  # a new value is no new compilation
UNALIGNED = ["tables", "lengths", "offsets"]  # wherever a slice of them begins


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def decode_split_kernel(
    q, k_pool, v_pool, tables, lengths, sinks, partial, sums, out, scale, v_scale, table_stride, limit, num_splits,
    S: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (UNITS, num_splits, rows): a program does one split of one row, if the row has that many."""
    unit, number, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, _, count = splits_of(tl.minimum(tl.load(lengths + row), limit), S.window, SPLIT)
    if number < count:
        attend_split(
            q, k_pool, v_pool, tables, lengths, sinks, partial, sums, out, row, unit, number, row * num_splits + number,
            scale, v_scale, table_stride, limit, S, GROUP, UNITS, SPLIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def decode_merge_kernel(
    partial, sums, sinks, out, lengths, v_scale, limit, num_splits,
    S: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Grid (UNITS, rows): merges the rows that have several splits."""
    unit, row = tl.program_id(0), tl.program_id(1)
    _, _, count = splits_of(tl.minimum(tl.load(lengths + row), limit), S.window, SPLIT)
    if count > 1:
        merge_splits(
            partial, sums, sinks, out, lengths, row, unit, row * num_splits, count, v_scale, limit, S, GROUP, UNITS, PAD
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def decode_persistent_kernel(
    q, k_pool, v_pool, tables, lengths, offsets, sinks, partial, sums, finished, out, scale, v_scale, table_stride,
    limit, rows, room, S: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """A grid of any size walks the list of (item, unit); whoever finishes the last split of a row's unit merges it.

    Items offsets[row] .. offsets[row + 1] - 1 are a row's splits; there is memory for `room` of them.
    """
    work, num_work = tl.program_id(0), tl.load(offsets + rows) * UNITS
    while work < num_work:
        item, unit = work // UNITS, work % UNITS
        row, end = item * 0, item * 0 + rows
        while end - row > 1:  # bisect for the item's row
            middle = (row + end) // 2
            at_or_before = tl.load(offsets + middle) <= item
            row = tl.where(at_or_before, middle, row)
            end = tl.where(at_or_before, end, middle)
        begin = tl.load(offsets + row)
        count = tl.load(offsets + row + 1) - begin
        fits = (count == 1) | (begin + count <= room)
        if fits:
            attend_split(
                q, k_pool, v_pool, tables, lengths, sinks, partial, sums, out, row, unit, item - begin, item, scale,
                v_scale, table_stride, limit, S, GROUP, UNITS, SPLIT,
            )  # fmt: skip
        elif item == begin:
            head, live, _ = heads_of(unit, S, GROUP, UNITS)
            nothing = tl.full((GROUP, PAD), float("nan"), tl.float32)
            store_rows(out, row * S.heads + head, nothing, live, S.value_dim, PAD)
        if fits & (count > 1):
            tl.debug_barrier()  # all threads' stores are made before one of them counts the split as done
            counter = finished + row * UNITS + unit
            if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
                tl.debug_barrier()
                merge_splits(
                    partial, sums, sinks, out, lengths, row, unit, begin, count, v_scale, limit, S, GROUP, UNITS, PAD
                )  # fmt: skip
                tl.store(counter, 0)
        work += tl.num_programs(0)


def choose_config(q: torch.Tensor, value_dim: int, *, quantized: bool = False) -> Config:
    """The tables' line for q [.., D] and values of `value_dim` numbers on the current device."""
    table = QUANTIZED_CONFIGS if quantized else CONFIGS
    return table[capability()][q.element_size(), max(64, padded(max(q.shape[-1], value_dim)))]


def make_workspace(
    q: torch.Tensor, value_dim: int, *, max_tokens: int, window: int | None = None, total_tokens: int | None = None,
    config: Config | None = None,
) -> Workspace:  # fmt: skip
    """Scratch memory for `decode_attention` with these arguments, or with fewer rows or a smaller max_tokens.

    On q's device, q [R, Hq, D]: about R * splits * Hq * Dv * 4 bytes, splits of 512 tokens as the tables are. With
    `total_tokens`, which bounds the sum of the lengths, it is for the one-launch form only and at most
    (total_tokens / 512 + R) * Hq * Dv * 4 bytes: what rows of any length share, where each could be long alone.
    """
    rows, heads, _ = q.shape
    split = (config or choose_config(q, value_dim)).split
    items = rows * most_splits(max_tokens, window, split)
    if total_tokens is not None:
        items = min(items, total_tokens // split + rows)
    return Workspace(
        torch.empty(items, heads, value_dim, dtype=torch.float32, device=q.device),
        torch.empty(items, heads, dtype=torch.float32, device=q.device),
        torch.zeros(rows * heads, dtype=torch.int32, device=q.device),
    )


def decode_attention(
    q: torch.Tensor, k_pool: Pool, v_pool: Pool, tables: torch.Tensor, lengths: torch.Tensor, *,
    block_tokens: int | None, max_tokens: int, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, sinks: torch.Tensor | None = None, k_scale: float = 1.0, v_scale: float = 1.0,
    offsets: torch.Tensor | None = None, workspace: Workspace | None = None, out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """Row r's query is its last position and sees positions 0 .. lengths[r] - 1, itself included.

    q [R, Hq, D] float16, bfloat16 or float32; k_pool [S, Hkv, D] and v_pool [S, Hkv, Dv] of q's dtype, or fp8 whose
    numbers stand for `k_scale` and `v_scale` times themselves, or both `QuantizedPool`s of equal bits and groups with
    scales of q's dtype; D and Dv up to 256; query head h reads key head h // (Hq / Hkv). tables int32 [R, blocks] (see
    the package); lengths int32 [R]: 0 is a padding row and gives zeros.
    `scale` multiplies the scores (default D ** -0.5), a `softcap` c makes a score s to c * tanh(s / c), a `window` of W
    shows the W latest positions only, `sinks` [Hq] are logits that join each head's softmax without a value.

    `max_tokens` bounds the lengths; a longer row gives NaN. Without `offsets` two kernels are launched, or one if no
    row can have two splits. With `offsets`, from `split_offsets` for the same lengths, it is one, of a grid that does
    not depend on the lengths; the bits are the same. `config` replaces the tables' line.

    In a CUDA graph: use `offsets`. What a launch keeps are the number of rows, the width of `tables`, `max_tokens` (for
    which take all that a row of tables holds, or the most that a row will ever have) and the tensors' addresses; what
    it reads when it is replayed are lengths, tables and offsets, so capture `split_offsets` with its `out` before it.
    Unused rows have length 0. Nothing is allocated if `out` and `workspace` are given, and nothing waits. Run it once
    before it is captured: the first launch of a kernel loads it.

    Returns [R, Hq, Dv] in q's dtype, in `out` if given. Raises ValueError when shapes, dtypes, devices or numbers do
    not go together; nothing was launched then.
    """
    pools = check_attention(q, k_pool, v_pool, tables, block_tokens, window, softcap, sinks, k_scale, v_scale)
    (rows, heads, dim), (slots, kv_heads, _, value_dim, _, _) = q.shape, pools
    check_tensor("lengths", lengths, (rows,), (torch.int32,), q.device)
    capacity = slots if block_tokens is None else tables.shape[1] * block_tokens
    if len(tables) != rows or not 1 <= max_tokens <= capacity:
        raise ValueError(
            f"{rows} rows of at most {max_tokens} tokens do not fit {len(tables)} rows of tables, which hold {capacity}"
        )
    out = torch.empty(rows, heads, value_dim, dtype=q.dtype, device=q.device) if out is None else out
    check_tensor("out", out, (rows, heads, value_dim), (q.dtype,), q.device)
    config = config or choose_config(q, value_dim, quantized=pools.bits > 0)
    workspace = workspace or make_workspace(q, value_dim, max_tokens=max_tokens, window=window, config=config)
    num_splits = most_splits(max_tokens, window, config.split)
    _check_workspace(workspace, rows if offsets is not None else rows * num_splits, rows, heads, value_dim)
    if rows == 0:
        return out
    group = min(MOST_GROUP, padded(heads // kv_heads))
    units = kv_heads * triton.cdiv(heads // kv_heads, group)
    compiled = {
        "S": make_shape(heads, pools, config.block_n, block_tokens, window, softcap, sinks),
        "GROUP": group, "UNITS": units, "SPLIT": config.split,
    }  # fmt: skip
    # A table is read a stage ahead of the keys, at the price of a stage or two of keys: runs need fewer for as many.
    stages = config.num_stages if block_tokens else min(3, config.num_stages)
    tuned = {"num_warps": config.num_warps, "num_stages": stages}
    partial, sums, finished = workspace
    scale = (dim**-0.5 if scale is None else scale) * k_scale
    inputs = (q, as_bytes(k_pool), as_bytes(v_pool), tables, lengths)
    pad = padded(value_dim)
    if offsets is not None:
        check_tensor("offsets", offsets, (rows + 1,), (torch.int32,), q.device)
        decode_persistent_kernel[(_programs(q.device, config),)](
            *inputs, offsets, sinks, partial, sums, finished, out, scale, v_scale, tables.stride(0), max_tokens, rows,
            min(len(partial), len(sums)), **compiled, **tuned, PAD=pad,
        )  # fmt: skip
        return out
    decode_split_kernel[(units, num_splits, rows)](
        *inputs, sinks, partial, sums, out, scale, v_scale, tables.stride(0), max_tokens, num_splits,
        **compiled, **tuned,
    )  # fmt: skip
    if num_splits > 1:
        decode_merge_kernel[(units, rows)](
            partial, sums, sinks, out, lengths, v_scale, max_tokens, num_splits, **compiled, PAD=pad, num_warps=4
        )  # fmt: skip
    return out


def _programs(device: torch.device, config: Config) -> int:
    """How many programs of the one-launch form the device holds at a time; a few in the interpreter."""
    if device.type != "cuda":
        return 5
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * config.programs_per_sm


def _check_workspace(workspace: Workspace, items: int, rows: int, heads: int, value_dim: int) -> None:
    partial, sums, finished = workspace
    if partial.shape[1:] != (heads, value_dim) or sums.shape[1:] != (heads,):
        raise ValueError(f"workspace is for results {list(partial.shape[1:])}; these are [{heads}, {value_dim}]")
    if min(len(partial), len(sums)) < items or len(finished) < rows * heads:
        raise ValueError(
            f"workspace holds {len(sums)} splits and {len(finished)} counters; {rows} rows of this many tokens need "
            f"{items} and {rows * heads}"
        )
