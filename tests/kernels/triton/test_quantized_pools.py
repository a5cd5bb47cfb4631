"""Integers with scales and biases in pools, in all kernels that take pools (F34, F39, F44, F46, F48, F89).

What is written is held to `kernels.reference.kv_quantize`, bit for bit; attention to its definition on the numbers that
the codes stand for. Slots that no row has hold NaN and infinity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference import kv_quantize
from cortexstream.kernels.torch.quantized_pool import QuantizedPool
from cortexstream.kernels.triton import decode_attention as decoding
from cortexstream.kernels.triton import prefill_attention as prefilling
from cortexstream.kernels.triton.decode_attention import decode_attention
from cortexstream.kernels.triton.kv_append import kv_append
from cortexstream.kernels.triton.prefill_attention import prefill_attention, query_tiles
from cortexstream.kernels.triton.rope_append import rope_append
from tests.kernels.test_kv_quantize import KINDS, rows
from tests.kernels.triton import test_decode_attention as of_decode
from tests.kernels.triton import test_prefill_attention as of_prefill
from tests.kernels.triton.support import (
    DEVICE,
    INTERPRETED,
    Memory,
    fenced,
    int32,
    memory,
    named,
    near,
    normal,
    same,
    torch,
)
from tests.kernels.triton.test_rope_append import LIVE, POSITIONS, SLOTS, angles, projections

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
FORMATS = [(4, 32), (8, 64)]
FEW = [(17, 31), (1, 65), (33, 0)]


def empty(slots: int, heads: int, dim: int, dtype: Any, bits: int, group: int, seed: int = 5) -> QuantizedPool:
    """A pool in which anything lies."""
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (slots, heads, dim * bits // 32), dtype=np.int32)
    ends = (normal(slots, heads, dim // group, dtype=dtype, seed=seed + i) for i in range(2))
    return QuantizedPool(torch.from_numpy(words).to(DEVICE), *ends)


def decoded(pool: QuantizedPool, bits: int, group: int) -> Any:
    """The numbers that a pool stands for, from codes, scales and biases, with one rounding to float32."""
    codes = torch.from_numpy(codes_of(pool, bits, group)).double()
    grouped = codes.unflatten(-1, (-1, group))
    scales, biases = (x.cpu().double()[..., None] for x in (pool.scales, pool.biases))
    return (grouped * scales + biases).flatten(-2).float().to(DEVICE)


def codes_of(pool: QuantizedPool, bits: int, group: int) -> Any:
    ones = np.ones(pool.scales.shape, np.float32)
    stored = kv_quantize.Quantized(pool.packed.cpu().numpy().view(np.uint32), ones, 0 * ones)
    return kv_quantize.dequantize(stored, bits, group)


def clone(pool: QuantizedPool) -> QuantizedPool:
    return QuantizedPool(*(part.clone() for part in pool))


def equal(left: QuantizedPool, right: QuantizedPool, slots: Any = slice(None)) -> bool:
    return all(same(a[slots], b[slots]) for a, b in zip(left, right, strict=True))


def is_stored(pool: QuantizedPool, slots: Any, x: Any, bits: int, group: int) -> None:
    """Assert that `slots` hold x [T, H, D]: the definition's scales and biases rounded, and codes made for them."""
    part = QuantizedPool(*(tensor[slots].cpu() for tensor in pool))
    x = x.to(part.scales.dtype).float().cpu().numpy()
    want = kv_quantize.quantize(x, bits, group)
    scales, biases = (torch.from_numpy(ends).to(part.scales.dtype) for ends in want[1:])
    assert same(part.scales, scales) and same(part.biases, biases)
    if part.scales.dtype == FLOAT:
        assert np.array_equal(part.packed.numpy().view(np.uint32), want.packed)
    steps = (x.reshape(*biases.shape, group) - biases.float().numpy()[..., None]) / scales.float().numpy()[..., None]
    codes = np.clip(np.rint(steps), 0, 2**bits - 1).reshape(x.shape)
    assert np.array_equal(codes_of(part, bits, group), codes)


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_f89_what_is_appended_has_the_definitions_bits(kind: str, bits: int, group: int) -> None:
    x = torch.from_numpy(rows(kind)[:8]).to(DEVICE).reshape(4, 2, 256)
    k_pool, v_pool = (empty(8, 2, dim, FLOAT, bits, group) for dim in (256, 128))
    before = clone(k_pool), clone(v_pool)
    slots, k, v = int32(6, -1, 0, 3), x, x[..., 100:228].contiguous()
    kv_append(k, v, k_pool, v_pool, slots)
    live, rest = [6, 0, 3], [1, 2, 4, 5, 7]
    is_stored(k_pool, live, k[[0, 2, 3]], bits, group)
    is_stored(v_pool, live, v[[0, 2, 3]], bits, group)
    assert equal(k_pool, before[0], rest) and equal(v_pool, before[1], rest)


@pytest.mark.parametrize(
    ("heads", "dim", "value_dim", "group"), [(3, 96, 32, 32), (2, 64, 192, 64), (1, 128, 1280, 128)]
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_f34_f89_any_heads_of_any_type(heads: int, dim: int, value_dim: int, group: int, bits: int, dtype: Any) -> None:
    """Projections of float32, scales of another type; the numbers are rounded to it first."""
    k_pool, v_pool = (empty(8, heads, size, dtype, bits, group) for size in (dim, value_dim))
    both = normal(3, heads * (dim + value_dim) + 8)
    k, v = both[:, : heads * dim].unflatten(1, (heads, dim)), both[:, heads * dim : -8].unflatten(1, (heads, value_dim))
    kv_append(k, v, k_pool, v_pool, int32(5, 2, 7))
    is_stored(k_pool, [5, 2, 7], k, bits, group)
    is_stored(v_pool, [5, 2, 7], v, bits, group)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_f89_what_is_not_finite_stays_so_and_in_its_group(bad: float) -> None:
    k = normal(1, 1, 128)
    k[0, 0, 70], k[0, 0, 90] = bad, -bad
    k_pool, v_pool = (empty(2, 1, 128, FLOAT, 8, 64) for _ in range(2))
    with np.errstate(all="ignore"):  # the interpreter computes in numpy
        kv_append(k, k, k_pool, v_pool, int32(1))
        numbers = decoded(k_pool, 8, 64)[1, 0]
    assert not numbers[64:].isfinite().any() and bool(numbers[:64].isfinite().all())


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize(("dim", "turned"), [(64, 64), (96, 32), (128, 128), (192, 128)])
@pytest.mark.parametrize("norm", [False, True])
def test_f34_f89_rope_append_stores_what_append_stores(
    dim: int, turned: int, norm: bool, bits: int, group: int
) -> None:
    """The same bits as by way of a pool of numbers, in the type of the scales."""
    if dim % group:
        pytest.skip("heads have no whole number of groups")
    q, k, v = projections(4, 3, dim, 64, BRAIN)
    weight = normal(dim, dtype=BRAIN, seed=7) * 0.2 if norm else None
    dense: list[Any] = [torch.zeros(32, 3, size, dtype=BRAIN, device=DEVICE) for size in (dim, 64)]
    ours, theirs = ([empty(32, 3, size, BRAIN, bits, group) for size in (dim, 64)] for _ in range(2))
    rest: dict[str, Any] = {"q_weight": weight, "k_weight": weight}
    want = rope_append(q, k, v, dense[0], dense[1], angles(turned), POSITIONS, SLOTS, **rest)
    got = rope_append(q, k, v, ours[0], ours[1], angles(turned), POSITIONS, SLOTS, **rest)
    live = SLOTS[LIVE].long()
    kv_append(dense[0][live], dense[1][live], theirs[0], theirs[1], live)
    assert same(got[LIVE], want[LIVE])
    assert equal(ours[0], theirs[0]) and equal(ours[1], theirs[1])


# ------------------------------------------------------------------------------------------------------- attention


def poisoned(
    tokens: list[int], heads: int, dim: int, value_dim: int, dtype: Any, block: int | None, bits: int, group: int
) -> tuple[Memory, Memory]:
    """Rows in quantised pools, and the same rows as numbers. Slots of no row have scales of NaN and infinite biases."""
    numbers = memory(tokens, heads, dim, value_dim, FLOAT, block)
    pools, dense = [], []
    for seed, pool in enumerate((numbers.k_pool, numbers.v_pool)):
        slots, _, size = pool.shape
        made = empty(slots, heads, size, dtype, bits, group, seed)
        scales, biases = made.scales / 2**bits, made.biases * 0.8  # of unit variance, about
        nobodys = ~pool.isfinite().flatten(1).all(1)
        scales[nobodys], biases[nobodys] = float("nan"), float("inf")
        pools.append(QuantizedPool(made.packed, scales, biases))
        dense.append(decoded(pools[-1], bits, group))
    return numbers._replace(k_pool=pools[0], v_pool=pools[1]), numbers._replace(k_pool=dense[0], v_pool=dense[1])


def prefill(q: Any, held: Memory, pairs: list[tuple[int, int]], config: Any = of_prefill.SMALL, **options: Any) -> Any:
    sharing = q.shape[1] // held.k_pool.packed.shape[1]
    tiles = query_tiles(*of_prefill.totals(pairs), sharing=sharing, block_m=config.block_m, device=DEVICE)
    pools = held.k_pool, held.v_pool
    return prefill_attention(q, *pools, held.tables, tiles, block_tokens=held.block_tokens, config=config, **options)


CASES = [  # query heads, key heads, head, value head, dtype, block, bits, group
    (4, 2, 64, 64, HALF, 16, 8, 64),
    (4, 2, 64, 64, BRAIN, 64, 4, 32),
    (4, 1, 128, 128, BRAIN, 64, 4, 64),
    (6, 2, 96, 32, FLOAT, 16, 8, 32),
    (2, 1, 192, 128, HALF, 64, 4, 64),
    (4, 1, 256, 256, HALF, None, 8, 128),
]
NAMES = ("heads", "kv_heads", "dim", "value_dim", "dtype", "block", "bits", "group")


@pytest.mark.parametrize(NAMES, CASES, ids=str)
def test_f44_f89_decoding_sees_what_the_codes_stand_for(
    heads: int, kv_heads: int, dim: int, value_dim: int, dtype: Any, block: int | None, bits: int, group: int
) -> None:
    """Both forms, with the same bits."""
    lengths = [0, 1, 31, 64, 65, 200]
    held, dense = poisoned(lengths, kv_heads, dim, value_dim, dtype, block, bits, group)
    q = normal(len(lengths), heads, dim, dtype=dtype)
    got = of_decode.decode(q, held, lengths, scale=0.5 * dim**-0.5)
    near(got, of_decode.definition(q, dense, lengths, scale=0.5 * dim**-0.5), dtype)
    assert same(of_decode.decode(q, held, lengths, one_launch=True, scale=0.5 * dim**-0.5), got)


@pytest.mark.parametrize(NAMES, CASES, ids=str)
def test_f44_f89_prompts_see_what_the_codes_stand_for(
    heads: int, kv_heads: int, dim: int, value_dim: int, dtype: Any, block: int | None, bits: int, group: int
) -> None:
    held, dense = poisoned(of_prefill.totals(FEW)[1], kv_heads, dim, value_dim, dtype, block, bits, group)
    q = of_prefill.queries_of(FEW, heads, dim, dtype)
    got = prefill(q, held, FEW, scale=0.5 * dim**-0.5)
    near(got, of_prefill.definition(q, dense, FEW, scale=0.5 * dim**-0.5), dtype)


@pytest.mark.parametrize("options", [{"window": 20}, {"window": 65, "softcap": 50.0, "sinks": 3.0}], ids=named)
def test_f39_f89_windows_caps_and_sinks(options: dict[str, Any]) -> None:
    lengths = [3, 33, 129]
    held, dense = poisoned(lengths, 2, 64, 64, FLOAT, 16, 4, 32)
    q, options = normal(3, 4, 64), of_decode.with_sinks({"scale": 0.05, **options})
    near(of_decode.decode(q, held, lengths, **options), of_decode.definition(q, dense, lengths, **options), FLOAT)
    q, pairs = normal(23, 4, 64), [(3, 0), (10, 23), (10, 119)]
    near(prefill(q, held, pairs, **options), of_prefill.definition(q, dense, pairs, **options), FLOAT)


def test_p4_f89_a_row_gets_the_same_bits_alone_and_in_chunks() -> None:
    held, _ = poisoned([80, 150], 1, 64, 64, HALF, 16, 8, 64)
    q = normal(40, 2, 64, dtype=HALF)
    together = prefill(q, held, [(20, 60), (20, 130)])
    alone = held._replace(tables=held.tables[1:])
    assert same(prefill(q[20:], alone, [(20, 130)]), together[20:])
    assert same(prefill(q[20:27], alone, [(7, 130)]), together[20:27])
    last, tables = q[:2].contiguous(), held.tables
    pair = of_decode.decode(last, held._replace(tables=tables), [80, 150], max_tokens=160)
    assert same(of_decode.decode(last[1:], alone, [150], max_tokens=160), pair[1:])


@pytest.mark.parametrize("arch", decoding.QUANTIZED_CONFIGS)
def test_the_tables_lines_run_as_they_are(arch: int) -> None:
    held, dense = poisoned([600], 1, 64, 64, HALF, 64, 8, 64)
    q = normal(1, 2, 64, dtype=HALF)
    line = decoding.QUANTIZED_CONFIGS[arch][2, 64]
    near(
        of_decode.decode(q, held, [600], config=line, scale=0.05),
        of_decode.definition(q, dense, [600], scale=0.05),
        HALF,
    )
    q, chunk = normal(40, 2, 64, dtype=HALF), [(40, 560)]
    got = prefill(q, held, chunk, prefilling.QUANTIZED_CONFIGS[arch][2, 64], scale=0.05)
    near(got, of_prefill.definition(q, dense, chunk, scale=0.05), HALF)


def test_the_tables_fit_the_same_work_lists() -> None:
    for arch, lines in decoding.CONFIGS.items():
        for key, line in lines.items():
            assert decoding.QUANTIZED_CONFIGS[arch][key].split == line.split
            assert line.split % decoding.QUANTIZED_CONFIGS[arch][key].block_n == 0
            assert prefilling.QUANTIZED_CONFIGS[arch][key].block_m == prefilling.CONFIGS[arch][key].block_m


@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_beyond_an_array_is_touched(bits: int) -> None:
    """The last row's last block is the pools' last, and just begun."""
    if not INTERPRETED:
        pytest.skip("the fences are in the host's memory")
    held, dense = poisoned([33, 65], 1, 64, 32, FLOAT, 16, bits, 32)
    last = len(dense.k_pool) // 16 - 1
    held.tables[1, 4] = last
    for pool, numbers in ((held.k_pool, dense.k_pool), (held.v_pool, dense.v_pool)):
        pool.scales[last * 16], pool.biases[last * 16] = 0.1, 0.5
        numbers[last * 16] = decoded(pool, bits, 32)[last * 16]
    tables = fenced(held.tables[:, :5].contiguous())
    k_pool, v_pool = (QuantizedPool(*map(fenced, pool)) for pool in (held.k_pool, held.v_pool))
    apart, q, pairs = Memory(k_pool, v_pool, tables, 16), normal(2, 3, 64), [(1, 32), (1, 64)]
    options = {"scale": 0.05, "out": fenced(normal(2, 3, 32))}
    want = of_decode.definition(q, dense, [33, 65], scale=0.05)
    near(of_decode.decode(fenced(q), apart, [33, 65], **options), want, FLOAT)
    near(prefill(fenced(q), apart, pairs, **options), want, FLOAT)
    slots, kept = int32(len(dense.k_pool) - 1), clone(k_pool)
    kv_append(fenced(normal(1, 1, 64)), fenced(normal(1, 1, 32)), k_pool, v_pool, slots)
    assert equal(k_pool, kept, slice(-1)) and not equal(k_pool, kept)


# -------------------------------------------------------------------------------------------------------- refusals


GOOD = empty(8, 2, 64, FLOAT, 8, 32)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"v_pool": normal(8, 2, 64)}, "one of k_pool and v_pool is quantised; both must be, or neither"),
    (
        {"v_pool": empty(8, 2, 64, FLOAT, 4, 32)},
        r"v_pool.packed has shape \[8, 2, 8\]|v_pool.scales has shape \[8, 2, 2\]",
    ),
    ({"v_pool": empty(8, 2, 64, FLOAT, 8, 64)}, r"v_pool.scales has shape \[8, 2, 1\]; it must be \[8, 2, 2\]"),
    ({"v_pool": empty(7, 2, 64, FLOAT, 8, 32)}, r"v_pool.packed has shape \[7, 2, 16\]"),
    ({"v_pool": empty(8, 2, 64, HALF, 8, 32)}, "v_pool.scales is torch.float16; it must be torch.float32"),
    (
        {"k_pool": GOOD._replace(packed=GOOD.packed[0])},
        r"k_pool.packed has shape \[2, 16\]; .* \[slots, heads, numbers\]",
    ),
    ({"k_pool": GOOD._replace(packed=GOOD.packed.long())}, "k_pool.packed is torch.int64; it must be torch.int32"),
    (
        {"k_pool": GOOD._replace(packed=GOOD.packed.transpose(0, 1).contiguous().transpose(0, 1))},
        "k_pool.packed has strides .* it must be contiguous",
    ),
    ({"k_pool": GOOD._replace(packed=GOOD.packed[..., :4])}, "4 words and 2 scales for a head of 64 numbers; words of"),
    (
        {"k_pool": GOOD._replace(scales=normal(8, 2, 4))},
        "16 words and 4 scales for a head of 64 .* groups of 32, 64, 128",
    ),
    ({"k_pool": GOOD._replace(biases=normal(8, 2, 1))}, r"k_pool.biases has shape \[8, 2, 1\]; it must be \[8, 2, 2\]"),
    ({"k_scale": 0.5}, "k_scale is 0.5, but the pools are not of fp8; leave it at 1"),
    ({"v_scale": float("nan")}, "v_scale is nan; it must be above 0 and finite"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
@pytest.mark.parametrize("call", ["append", "rope", "decode", "prefill"])
def test_f46_what_does_not_fit_is_refused_and_nothing_written(call: str, changed: dict[str, Any], words: str) -> None:
    pools: dict[str, Any] = {"k_pool": clone(GOOD), "v_pool": clone(GOOD), **changed}
    before = clone(GOOD)
    x, slots, tables = normal(1, 2, 64), int32(3), int32(0)[:, None]
    with pytest.raises(ValueError, match=words):
        if call == "append":
            kv_append(x, x, slots=slots, **pools)
        elif call == "rope":
            rope_append(x, x, x, table=angles(64), positions=slots, slots=slots, **pools)
        elif call == "decode":
            decode_attention(x, tables=tables, lengths=slots, block_tokens=None, max_tokens=8, **pools)
        else:
            tiles = query_tiles([1], [3], sharing=1, block_m=64, device=DEVICE)
            prefill_attention(x, tables=tables, tiles=tiles, block_tokens=None, **pools)
    for name in {"k_pool", "v_pool"} - changed.keys():
        assert equal(pools[name], before)


def test_scales_of_another_type_than_the_queries_are_refused() -> None:
    tables = int32(0)[:, None]
    with pytest.raises(ValueError, match=r"k_pool.scales is torch.float32; it must be torch.float16"):
        decode_attention(
            normal(1, 2, 64, dtype=HALF), GOOD, GOOD, tables, int32(3), block_tokens=None, max_tokens=8
        )  # fmt: skip
