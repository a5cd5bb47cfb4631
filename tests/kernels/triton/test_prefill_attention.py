"""`kernels.triton.prefill_attention` against its definition in float64 (F44, F45, F50, F51, P4, P12).

Everything outside of the rows' positions is NaN or infinity: what leaks shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference import prefill_attention as reference
from cortexstream.kernels.triton.decode_attention import decode_attention
from cortexstream.kernels.triton.prefill_attention import CONFIGS, Config, prefill_attention, query_tiles
from tests.kernels.triton.support import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    Memory,
    exact,
    fenced,
    int32,
    memory,
    named,
    near,
    normal,
    same,
    torch,
)

SMALL = Config(block_m=64, block_n=32, num_warps=4, num_stages=2)
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
Row = tuple[int, int]  # (queries, tokens in the cache before them)
RAGGED: list[Row] = [
    (1, 255), (2, 0), (3, 31), (0, 9), (15, 1), (16, 32), (17, 63), (31, 64), (33, 65), (64, 0), (1, 0), (2, 255)
]  # fmt: skip
FEW: list[Row] = [(17, 31), (1, 65), (33, 0)]


def totals(rows: list[Row]) -> tuple[list[int], list[int]]:
    """Each row's queries and keys."""
    return [queries for queries, _ in rows], [queries + cached for queries, cached in rows]


def queries_of(rows: list[Row], heads: int, dim: int, dtype: Any) -> Any:
    return normal(sum(totals(rows)[0]), heads, dim, dtype=dtype)


def definition(q: Any, held: Memory, rows: list[Row], **options: Any) -> Any:
    options = {"scale": q.shape[2] ** -0.5, **options, "sinks": exact(options.get("sinks"))}
    return reference.prefill_attention(
        exact(q), exact(held.k_pool), exact(held.v_pool), held.tables.cpu().numpy(), *totals(rows),
        block_tokens=held.block_tokens, **options,
    )  # fmt: skip


def prefill(q: Any, held: Memory, rows: list[Row], causal: bool = True, config: Config = SMALL, **options: Any) -> Any:
    sharing = q.shape[1] // held.k_pool.shape[1]
    tiles = query_tiles(*totals(rows), sharing=sharing, block_m=config.block_m, device=DEVICE, causal=causal)
    return prefill_attention(
        q, held.k_pool, held.v_pool, held.tables, tiles, block_tokens=held.block_tokens, config=config, **options
    )  # fmt: skip


CASES = [  # query heads, key heads, head, value head, dtype, block, causal
    (2, 2, 64, 64, HALF, 16, True),
    (4, 2, 64, 64, FLOAT, 64, True),
    (4, 1, 80, 80, BRAIN, 16, True),
    (2, 1, 96, 96, HALF, 64, False),
    (3, 1, 128, 128, BRAIN, 64, True),
    (2, 1, 192, 128, HALF, 32, True),
    (1, 1, 256, 256, HALF, 64, True),
    (7, 1, 16, 24, FLOAT, 16, False),
    (4, 2, 32, 32, HALF, None, True),
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "dtype", "block_tokens", "causal"), CASES, ids=str
)  # fmt: skip
def test_f44_f45_f50_ragged_rows_get_what_is_defined(
    heads: int, kv_heads: int, dim: int, value_dim: int, dtype: Any, block_tokens: int | None, causal: bool
) -> None:
    """Prompts, chunks behind a cache, and decoding rows in one launch."""
    held = memory(totals(RAGGED)[1], kv_heads, dim, value_dim, dtype, block_tokens)
    q = queries_of(RAGGED, heads, dim, dtype)
    near(prefill(q, held, RAGGED, causal), definition(q, held, RAGGED, causal=causal), dtype)


OPTIONS: list[dict[str, Any]] = [
    {"window": 1}, {"window": 20}, {"window": 32}, {"window": 1000}, {"softcap": 30.0}, {"sinks": 1.0}, {"scale": 0.3},
    {"window": 40, "softcap": 50.0, "sinks": 3.0, "scale": 0.2}, {"causal": False, "softcap": 30.0, "sinks": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_f39_windows_caps_and_sinks(options: dict[str, Any], block_tokens: int) -> None:
    held = memory(totals(FEW)[1], 2, 32, 32, FLOAT, block_tokens)
    q = queries_of(FEW, 4, 32, FLOAT)
    options = options | ({"sinks": normal(4, seed=9) * options["sinks"]} if "sinks" in options else {})
    near(prefill(q, held, FEW, **options), definition(q, held, FEW, **options), FLOAT)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_f51_p4_a_prompt_in_chunks_gets_the_same_bits(chunk: int, window: int | None) -> None:
    held = memory([100], 1, 32, 32, HALF, 16)
    q = normal(70, 2, 32, dtype=HALF)  # behind 30 tokens in the cache
    whole = prefill(q, held, [(70, 30)], window=window)
    for at in range(0, 70, chunk if chunk > 1 else 23):
        queries = min(chunk, 70 - at)
        part = prefill(q[at : at + queries], held, [(queries, 30 + at)], window=window)
        assert same(part, whole[at : at + queries])


def test_p4_a_row_gets_the_same_bits_alone_and_in_any_batch() -> None:
    held = memory(totals(FEW)[1], 2, 32, 32, BRAIN, 16)
    q = queries_of(FEW, 4, 32, BRAIN)
    together = prefill(q, held, FEW)
    first = [0, 17, 18, 51]
    for row in range(3):
        own = slice(first[row], first[row + 1])
        alone = prefill(q[own], held._replace(tables=held.tables[row : row + 1]), FEW[row : row + 1])
        assert same(alone, together[own])


def test_a_decoding_row_gets_what_decode_attention_gives() -> None:
    held = memory([65, 12], 1, 64, 64, FLOAT, 16)
    q = normal(2, 4, 64)
    by_decode = decode_attention(
        q, held.k_pool, held.v_pool, held.tables, int32(65, 12), block_tokens=16, max_tokens=80
    )  # fmt: skip
    near(prefill(q, held, [(1, 64), (1, 11)]), exact(by_decode), FLOAT)


def test_f51_equal_scores_give_running_means() -> None:
    """Keys of ones, values 0, 1, 2 ..: query i gives the mean of 0 .. i."""
    k_pool, v_pool = torch.ones(64, 1, 32, device=DEVICE), torch.arange(64.0, device=DEVICE).reshape(64, 1, 1)
    held = Memory(k_pool, v_pool.expand(64, 1, 16).contiguous(), int32(0)[:, None], None)
    got = prefill(torch.ones(64, 1, 32, device=DEVICE), held, [(64, 0)])
    np.testing.assert_allclose(exact(got)[:, 0, 0], np.arange(64) / 2, atol=1e-4)


def test_f39_blocks_before_the_window_may_be_gone() -> None:
    """Their table entries lead to NaN, as after their memory was given to somebody else."""
    held = memory([200], 1, 32, 32, FLOAT, 16)
    q = normal(20, 2, 32)
    want = definition(q, held, [(20, 180)], window=50)
    held.tables[0, : (181 - 50) // 16] = held.tables[0, -1]
    near(prefill(q, held, [(20, 180)], window=50), want, FLOAT)
    pools = held.k_pool, held.v_pool, held.tables
    last = decode_attention(q[-1:], *pools, int32(200), block_tokens=16, max_tokens=200, window=50)
    near(last, want[-1:], FLOAT)


def test_without_a_causal_order_queries_need_no_keys() -> None:
    rows = [(5, -5), (20, -17), (2, 30)]  # 0, 3 and 32 keys
    held = memory(totals(rows)[1], 2, 32, 32, HALF, 16)
    q = queries_of(rows, 4, 32, HALF)
    got = prefill(q, held, rows, causal=False)
    assert not got[:5].any()
    near(got, definition(q, held, rows, causal=False), HALF)


@pytest.mark.parametrize("block_tokens", [16, 64])
def test_nothing_beyond_an_array_is_touched(block_tokens: int) -> None:
    """A table as narrow as can be; the last block is the pool's last, and just begun."""
    if not INTERPRETED:
        pytest.skip("the fences are in the host's memory")
    rows = [(40, 57)]
    held = memory([97], 1, 24, 40, FLOAT, block_tokens)
    columns = -(-97 // block_tokens)
    last = len(held.k_pool) // block_tokens - 1
    held.tables[0, columns - 1] = last
    for pool in (held.k_pool, held.v_pool):
        pool[last * block_tokens :] = 0.5
    q = queries_of(rows, 3, 24, FLOAT)
    tables = fenced(held.tables[:, :columns].contiguous())
    apart = Memory(fenced(held.k_pool), fenced(held.v_pool), tables, block_tokens)
    near(prefill(fenced(q), apart, rows, out=fenced(normal(40, 3, 40))), definition(q, held, rows), FLOAT)


@pytest.mark.parametrize("pool_dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_f89_fp8_keys_and_values_with_a_scale(pool_dtype: Any) -> None:
    held = memory(totals(FEW)[1], 2, 64, 64, pool_dtype, 16)
    q = queries_of(FEW, 4, 64, HALF)
    scaled = held._replace(k_pool=held.k_pool.float() * 0.5, v_pool=held.v_pool.float() * 2.0)
    near(prefill(q, held, FEW, k_scale=0.5, v_scale=2.0) / 2, definition(q, scaled, FEW) / 2, HALF)


@pytest.mark.parametrize("arch", CONFIGS)
def test_the_tables_lines_run_as_they_are(arch: int) -> None:
    config = CONFIGS[arch][2, 64]
    held = memory([150], 1, 64, 64, HALF, 64)
    q = normal(90, 2, 64, dtype=HALF)
    near(prefill(q, held, [(90, 60)], config=config), definition(q, held, [(90, 60)]), HALF)


def test_the_tables_are_whole() -> None:
    for lines in CONFIGS.values():
        assert set(lines) == {(size, dim) for size in (2, 4) for dim in (64, 128, 256)}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("sharing", "block_m"), [(1, 16), (4, 16), (7, 16), (5, 64), (71, 32)])
def test_tiles_hold_every_query_once_and_long_ones_come_first(sharing: int, block_m: int, causal: bool) -> None:
    queries, keys = totals([(1, 255), (33, 0), (0, 4), (17, 63), (2, 300)])
    tiles = query_tiles(queries, keys, sharing=sharing, block_m=block_m, device=DEVICE, causal=causal)
    assert tiles.first.tolist() == [0, 1, 34, 34, 51, 53] and tiles.kv_tokens.tolist() == keys
    found, walked = [], []
    for row, number in zip(tiles.row.tolist(), tiles.number.tolist(), strict=True):
        pairs = range(number * block_m, min((number + 1) * block_m, queries[row] * sharing))
        assert pairs
        found += [(row, pair) for pair in pairs]
        walked.append(keys[row] - queries[row] + pairs[-1] // sharing + 1 if causal else keys[row])
    assert sorted(found) == [(row, pair) for row in range(5) for pair in range(queries[row] * sharing)]
    assert walked == sorted(walked, reverse=True)


TILES = query_tiles([2, 1], [5, 1], sharing=2, block_m=64, device=DEVICE)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"q": normal(3, 7, 16)}, "7 query heads cannot share 2 key heads evenly"),
    ({"q": normal(4, 4, 16)}, "q holds 4 queries and tables 2 rows; tiles are for 3 and 2"),
    ({"tables": int32(0, 1)[:, None][:1]}, "q holds 3 queries and tables 1 rows"),
    ({"tiles": TILES._replace(sharing=1)}, "tiles are for 1 query heads per key head in tiles of 64; .* have 2 and 64"),
    ({"config": SMALL._replace(block_m=32)}, "in tiles of 64; q and config have 2 and 32"),
    ({"tiles": TILES._replace(causal=False), "window": 4}, "window is 4, but tiles are not causal"),
    ({"window": 0}, "window is 0"),
    ({"out": normal(3, 4, 8)}, r"out has shape \[3, 4, 8\]; it must be \[3, 4, 16\]"),
    ({"sinks": normal(3)}, r"sinks has shape \[3\]; it must be \[4\]"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "q": normal(3, 4, 16), "k_pool": normal(32, 2, 16), "v_pool": normal(32, 2, 16), "tables": int32(0, 1)[:, None],
        "tiles": TILES, "block_tokens": 16, "config": SMALL, "out": torch.full_like(normal(3, 4, 16), 7.0), **changed,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        prefill_attention(**arguments)
    assert "out" in changed or bool((arguments["out"] == 7.0).all())


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "words"),
    [
        ([2, 1], [2], True, "2 rows of queries do not fit 1 rows of keys"),
        ([2, 3], [2, 2], True, "row 1 has 3 queries and 2 keys; keys must include those of its queries"),
        ([-1], [2], True, "row 0 has -1 queries"),
        ([1], [-1], False, "row 0 has 1 queries and -1 keys"),
    ],
)
def test_rows_that_cannot_be_are_refused(queries: list[int], keys: list[int], causal: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        query_tiles(queries, keys, sharing=1, block_m=64, device=DEVICE, causal=causal)


@pytest.mark.full_grid
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cached", [0, 1, 31, 32, 65, 255, 4095])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f44_the_full_grid(dim: int, cached: int, causal: bool, dtype: Any) -> None:
    rows = [(queries, cached) for queries in (1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 257)]
    held = memory(totals(rows)[1], 2, dim, dim, dtype, 64)
    q = queries_of(rows, 8, dim, dtype)
    config = CONFIGS[80][q.element_size(), max(64, 1 << (dim - 1).bit_length())]
    near(prefill(q, held, rows, causal, config), definition(q, held, rows, causal=causal), dtype)
