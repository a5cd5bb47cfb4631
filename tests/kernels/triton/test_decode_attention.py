"""`kernels.triton.decode_attention` against its definition in float64 (F44, F45, F48, F50, P4, P12).

Everything outside of the rows' positions is NaN or infinity: what leaks shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference import decode_attention as reference
from cortexstream.kernels.triton.decode_attention import (
    CONFIGS,
    Config,
    decode_attention,
    make_workspace,
)
from cortexstream.kernels.triton.decode_splits import most_splits, split_offsets
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

SMALL = Config(split=64, block_n=32, num_warps=4, num_stages=2, programs_per_sm=1)
LENGTHS = [0, 1, 31, 32, 63, 64, 65, 255]
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def definition(q: Any, held: Memory, lengths: list[int], **options: Any) -> Any:
    options = {"scale": q.shape[2] ** -0.5, **options, "sinks": exact(options.get("sinks"))}
    tables = held.tables.cpu().numpy()
    return reference.decode_attention(
        exact(q), exact(held.k_pool), exact(held.v_pool), tables, np.array(lengths), block_tokens=held.block_tokens,
        **options,
    )  # fmt: skip


def decode(q: Any, held: Memory, lengths: list[int], one_launch: bool = False, **options: Any) -> Any:
    options = {"config": SMALL, "max_tokens": max(*lengths, 1), **options}
    counts = int32(*lengths)
    if one_launch:
        options["offsets"] = split_offsets(
            counts, max_tokens=options["max_tokens"], split=options["config"].split, window=options.get("window")
        )  # fmt: skip
    return decode_attention(
        q, held.k_pool, held.v_pool, held.tables, counts, block_tokens=held.block_tokens, **options
    )  # fmt: skip


CASES = [  # query heads, key heads, head, value head, dtype, block
    (4, 4, 64, 64, HALF, 16),
    (4, 4, 64, 64, FLOAT, 64),
    (6, 2, 80, 80, BRAIN, 64),
    (4, 2, 96, 96, HALF, 16),
    (4, 1, 128, 128, HALF, 64),
    (8, 2, 128, 128, BRAIN, 16),
    (4, 2, 192, 128, HALF, 64),
    (2, 1, 256, 256, BRAIN, 64),
    (28, 4, 16, 16, FLOAT, 16),
    (48, 1, 32, 32, HALF, 64),
    (5, 5, 8, 24, FLOAT, 32),
    (8, 2, 64, 64, HALF, None),
    (4, 2, 80, 96, FLOAT, None),
]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim", "dtype", "block_tokens"), CASES, ids=str)
def test_f44_f45_f50_rows_of_any_length_get_what_is_defined(
    heads: int, kv_heads: int, dim: int, value_dim: int, dtype: Any, block_tokens: int | None
) -> None:
    lengths = LENGTHS if kv_heads < 4 else [0, 1, 65, 130]
    held = memory(lengths, kv_heads, dim, value_dim, dtype, block_tokens)
    q = normal(len(lengths), heads, dim, dtype=dtype)
    got = decode(q, held, lengths)
    near(got, definition(q, held, lengths), dtype)
    assert not got[0].any()  # padding


OPTIONS: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 20},
    {"window": 64},
    {"window": 65},
    {"window": 1000},
    {"softcap": 30.0},
    {"sinks": 1.0},
    {"scale": 0.3},
    {"window": 100, "softcap": 50.0, "sinks": 3.0, "scale": 0.2},
]


def with_sinks(options: dict[str, Any], heads: int = 4) -> dict[str, Any]:
    """Options in which sinks are numbers of that size, if there are any."""
    return options | ({"sinks": normal(heads, seed=9) * options["sinks"]} if "sinks" in options else {})


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_f39_windows_caps_and_sinks(options: dict[str, Any], block_tokens: int) -> None:
    lengths = [0, 1, 33, 64, 129, 200]
    held = memory(lengths, 2, 32, 32, FLOAT, block_tokens)
    q = normal(len(lengths), 4, 32)
    options = with_sinks(options)
    near(decode(q, held, lengths, **options), definition(q, held, lengths, **options), FLOAT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[-1], {}], ids=named)
def test_f48_one_launch_gives_the_bits_of_two(options: dict[str, Any], dtype: Any) -> None:
    lengths = [0, 200, 1, 64, 65]
    held = memory(lengths, 2, 32, 48, dtype, 16)
    q = normal(len(lengths), 4, 32, dtype=dtype)
    options = with_sinks(options)
    assert same(decode(q, held, lengths, one_launch=True, **options), decode(q, held, lengths, **options))


@pytest.mark.parametrize("one_launch", [False, True])
def test_p4_a_row_gets_the_same_bits_alone_and_in_any_batch(one_launch: bool) -> None:
    lengths = [3, 200, 0, 64, 129]
    held = memory(lengths, 2, 32, 32, HALF, 16)
    q = normal(len(lengths), 4, 32, dtype=HALF)
    together = decode(q, held, lengths, one_launch)
    for rows in ([1], [4, 1], [0, 1, 2, 3]):
        part = held._replace(tables=held.tables[rows])
        assert same(decode(q[rows], part, [lengths[r] for r in rows], one_launch, max_tokens=208), together[rows])


def test_f48_splits_change_the_rounding_only() -> None:
    held = memory([255], 1, 64, 64, FLOAT, 16)
    q = normal(1, 4, 64)
    whole = decode(q, held, [255], config=SMALL._replace(split=256))
    near(decode(q, held, [255]), exact(whole), FLOAT)
    assert not same(decode(q, held, [255]), whole)  # they are really two ways


@pytest.mark.parametrize("arch", CONFIGS)
def test_the_tables_lines_run_as_they_are(arch: int) -> None:
    held = memory([700, 513, 20], 1, 64, 64, HALF, 64)
    q = normal(3, 4, 64, dtype=HALF)
    near(decode(q, held, [700, 513, 20], config=CONFIGS[arch][2, 64]), definition(q, held, [700, 513, 20]), HALF)


def test_the_tables_are_whole() -> None:
    for lines in CONFIGS.values():
        assert set(lines) == {(size, dim) for size in (2, 4) for dim in (64, 128, 256)}
        assert all(line.split % line.block_n == 0 for line in lines.values())


def test_without_a_config_the_devices_line_is_taken() -> None:
    held = memory([70], 1, 32, 32, HALF, 16)
    q = normal(1, 2, 32, dtype=HALF)
    near(decode(q, held, [70], config=None), definition(q, held, [70]), HALF)


@pytest.mark.parametrize("pool_dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_f89_fp8_keys_and_values_with_a_scale(dtype: Any, pool_dtype: Any) -> None:
    """fp8 is exact in float16 and bfloat16: no error but that of the sums."""
    lengths = [1, 65, 200]
    held = memory(lengths, 2, 64, 64, pool_dtype, 16)
    q = normal(3, 4, 64, dtype=dtype)
    scaled = held._replace(k_pool=held.k_pool.float() * 0.5, v_pool=held.v_pool.float() * 2.0)
    got = decode(q, held, lengths, k_scale=0.5, v_scale=2.0)
    near(got / 2, definition(q, scaled, lengths) / 2, dtype)


def test_a_row_longer_than_told_gives_nan_and_harms_no_other() -> None:
    lengths = [100, 129, 40, 300]
    held = memory(lengths, 1, 32, 32, FLOAT, 16)
    q = normal(4, 4, 32)
    for one_launch in (False, True):
        got = decode(q, held, lengths, one_launch, max_tokens=128)
        near(got[[0, 2]], definition(q, held, lengths)[[0, 2]], FLOAT)
        assert bool(got[[1, 3]].isnan().all())
        got = decode(q, held, lengths, one_launch, max_tokens=60)  # one split at most
        near(got[2:3], definition(q, held, lengths)[2:3], FLOAT)
        assert bool(got[[0, 1, 3]].isnan().all())


def test_scratch_memory_may_be_shared_by_launches() -> None:
    """A larger one than needed, full of NaN; the one-launch form leaves its counters at zero."""
    lengths = [70, 200, 0]
    held = memory(lengths, 2, 32, 32, HALF, 16)
    q = normal(3, 4, 32, dtype=HALF)
    workspace = make_workspace(normal(8, 4, 32, dtype=HALF), 32, max_tokens=2000, config=SMALL)
    workspace.partial.fill_(float("nan"))
    workspace.sums.fill_(float("nan"))
    want = decode(q, held, lengths)
    for one_launch in (True, False, True):
        assert same(decode(q, held, lengths, one_launch, workspace=workspace), want)
        assert not workspace.finished.any()


def test_f48_rows_share_the_memory_for_splits() -> None:
    """One launch takes as many items as there are splits; a row that finds none left gives NaN, and no other does."""
    lengths = [70, 0, 200, 1, 130]  # 2, 1, 4, 1 and 3 splits
    held = memory(lengths, 2, 32, 48, HALF, 16)
    q = normal(5, 4, 32, dtype=HALF)
    want = decode(q, held, lengths)
    fits = make_workspace(q, 48, max_tokens=2000, total_tokens=401, config=SMALL)
    assert len(fits.sums) == 401 // 64 + 5 < 5 * most_splits(2000, None, 64)
    assert len(make_workspace(q, 48, max_tokens=100, total_tokens=9999, config=SMALL).sums) == 5 * 2
    for _ in range(2):
        assert same(decode(q, held, lengths, one_launch=True, workspace=fits), want)
        assert not fits.finished.any()
    short = make_workspace(q, 48, max_tokens=2000, total_tokens=300, config=SMALL)  # two items too few for the last
    got = decode(q, held, lengths, one_launch=True, workspace=short)
    assert same(got[:4], want[:4]) and bool(got[4].isnan().all())
    with pytest.raises(ValueError, match="workspace holds 9 splits"):
        decode(q, held, lengths, workspace=short)


def test_f47_the_same_launch_serves_other_lengths() -> None:
    """As when a graph replays it: nothing but what lies in lengths, tables and offsets changes."""
    held = memory([300, 200, 150], 1, 32, 32, FLOAT, 16)
    q, counts, offsets = normal(3, 4, 32), int32(0, 0, 0), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    workspace, out = make_workspace(q, 32, max_tokens=320, config=SMALL), torch.zeros(3, 4, 32, device=DEVICE)
    for lengths in ([300, 200, 150], [1, 0, 64], [65, 129, 0], [0, 0, 0]):
        counts.copy_(int32(*lengths))
        split_offsets(counts, max_tokens=320, split=SMALL.split, out=offsets)
        decode_attention(
            q, *held[:3], counts, block_tokens=16, max_tokens=320, offsets=offsets, workspace=workspace, out=out,
            config=SMALL,
        )  # fmt: skip
        near(out, definition(q, held, lengths), FLOAT)


def test_tables_and_lengths_may_be_parts_of_larger_ones() -> None:
    lengths = [9, 70, 33]
    held = memory(lengths, 1, 32, 32, FLOAT, 16)
    q = normal(3, 2, 32)
    wider = torch.nn.functional.pad(held.tables, (1, 3), value=10**6)
    part = held._replace(tables=wider[:, 1:-3])
    assert same(
        decode(q[1:].contiguous(), part._replace(tables=part.tables[1:]), lengths[1:]), decode(q, held, lengths)[1:]
    )


@pytest.mark.parametrize("block_tokens", [16, 64])
def test_nothing_beyond_an_array_is_touched(block_tokens: int) -> None:
    """Tables as narrow as can be; the last row's last block is the pool's last, and just begun."""
    if not INTERPRETED:
        pytest.skip("the fences are in the host's memory")
    lengths = [33, 65, 129]
    held = memory(lengths, 1, 24, 40, FLOAT, block_tokens)
    columns = -(-129 // block_tokens)
    last = len(held.k_pool) // block_tokens - 1
    held.tables[2, columns - 1] = last
    for pool in (held.k_pool, held.v_pool):
        pool[last * block_tokens] = 0.5
    q = normal(3, 3, 24)
    tables = fenced(held.tables[:, :columns].contiguous())
    apart = Memory(fenced(held.k_pool), fenced(held.v_pool), tables, block_tokens)
    want = definition(q, held, lengths)
    for one_launch in (False, True):
        got = decode(fenced(q), apart, lengths, one_launch, out=fenced(normal(3, 3, 40)))
        near(got, want, FLOAT)


@pytest.mark.parametrize("window", [None, 1, 64, 65, 100, 1000])
def test_work_lists_count_every_split(window: int | None) -> None:
    """More rows than the kernel takes at a time."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 400, 300)
    got = split_offsets(int32(*lengths), max_tokens=350, split=64, window=window).cpu().numpy()
    kept = np.minimum(lengths, 350)
    first = np.maximum(kept - (window or 350), 0) // 64
    counts = np.maximum(-(-kept // 64) - first, 1)
    assert np.array_equal(got, np.concatenate(([0], np.cumsum(counts))))
    assert counts.max() <= most_splits(350, window, 64)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"q": normal(2, 7, 16)}, "7 query heads cannot share 2 key heads evenly"),
    ({"q": normal(2, 16)}, r"q has shape \[2, 16\]; it must be \[any, any, any\]"),
    ({"q": normal(2, 4, 32)[:, :, ::2]}, "q has strides .* it must be contiguous"),
    ({"q": normal(2, 4, 24)}, r"k_pool has shape \[64, 2, 16\]; it must be \[any, any, 24\]"),
    ({"k_pool": normal(64, 2, 16).half()}, "k_pool is torch.float16; it must be torch.float32 or .*e5m2 or .*e4m3fn"),
    ({"v_pool": normal(63, 2, 16)}, r"v_pool has shape \[63, 2, 16\]; it must be \[64, 2, any\]"),
    ({"q": normal(2, 4, 264), "k_pool": normal(64, 2, 264)}, "q has heads of 264 numbers; these kernels take 1 to 256"),
    ({"tables": torch.zeros(2, 4)}, r"tables is torch.float32 \[2, 4\] .* it must be int32 \[rows, blocks\]"),
    ({"block_tokens": 24}, "block_tokens is 24; it must be a power of two"),
    ({"block_tokens": None}, "tables has 4 columns; without block_tokens it must have one"),
    ({"lengths": int32(1, 2, 3)}, r"lengths has shape \[3\]; it must be \[2\]"),
    ({"max_tokens": 65}, "2 rows of at most 65 tokens do not fit 2 rows of tables, which hold 64"),
    ({"max_tokens": 0}, "2 rows of at most 0 tokens"),
    ({"tables": int32(0, 1, 2, 3)[None]}, "2 rows of at most 64 tokens do not fit 1 rows"),
    ({"window": 0}, "window is 0; it must be at least 1"),
    ({"softcap": 0.0}, "softcap is 0.0; it must be above 0"),
    ({"k_scale": 0.5}, "k_scale is 0.5, but the pools are not of fp8; leave it at 1"),
    ({"v_scale": 0.0}, "v_scale is 0.0; it must be above 0 and finite"),
    ({"sinks": normal(2)}, r"sinks has shape \[2\]; it must be \[4\]"),
    ({"out": normal(2, 4, 15)}, r"out has shape \[2, 4, 15\]; it must be \[2, 4, 16\]"),
    ({"offsets": int32(0, 1)}, r"offsets has shape \[2\]; it must be \[3\]"),
    (
        {"workspace": make_workspace(normal(1, 4, 16), 16, max_tokens=64, config=SMALL)},
        "workspace holds 1 splits and 4 counters; 2 rows .* need 2 and 8",
    ),
    (
        {"workspace": make_workspace(normal(2, 4, 16), 8, max_tokens=64, config=SMALL)},
        r"workspace is for results \[4, 8\]; these are \[4, 16\]",
    ),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "q": normal(2, 4, 16), "k_pool": normal(64, 2, 16), "v_pool": normal(64, 2, 16), "block_tokens": 16,
        "tables": int32(0, 1, 2, 3, 3, 2, 1, 0).reshape(2, 4), "lengths": int32(5, 7), "max_tokens": 64,
        "config": SMALL, "out": torch.full_like(normal(2, 4, 16), 7.0), **changed,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        decode_attention(**arguments)
    assert "out" in changed or bool((arguments["out"] == 7.0).all())


@pytest.mark.full_grid
@pytest.mark.parametrize("block_tokens", [16, 64, None])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (7, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_f44_the_full_grid(heads: int, kv_heads: int, dim: int, block_tokens: int | None, dtype: Any) -> None:
    lengths = [*LENGTHS, 511, 512, 513, 4095]
    held = memory(lengths, kv_heads, dim, dim, dtype, block_tokens)
    q = normal(len(lengths), heads, dim, dtype=dtype)
    near(decode(q, held, lengths, config=None), definition(q, held, lengths), dtype)
    assert same(decode(q, held, lengths, one_launch=True), decode(q, held, lengths))
