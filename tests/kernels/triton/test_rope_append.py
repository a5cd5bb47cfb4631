"""`kernels.triton.rope_append` against its definition in float64 (F34, P12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference import rope_append as reference
from cortexstream.kernels.reference.rope import rope
from cortexstream.kernels.triton.rope_append import rope_append
from tests.kernels.triton.support import DEVICE, DTYPES, exact, int32, near, normal, same, torch

SHAPES = [  # query heads, key heads, head, value head, dimensions that turn
    (4, 2, 64, 64, 64),
    (9, 3, 80, 80, 20),
    (2, 1, 96, 48, 32),
    (17, 1, 32, 32, 32),
    (2, 2, 256, 128, 64),
]
NORMS = ["no norm", "norm", "1 + w"]
POSITIONS = int32(0, 99, 7, 50, 3)
SLOTS = int32(31, 2, -1, 16, 17)
LIVE = [0, 1, 3, 4]


def angles(turned: int) -> Any:
    """[100, turned]: cosines, then sines, of position * 10000 ** (-2 d / turned)."""
    inv_freq = 10000.0 ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    angle = torch.arange(100)[:, None] * inv_freq
    return torch.cat((angle.cos(), angle.sin()), 1).float().to(DEVICE)


def projections(heads: int, kv_heads: int, dim: int, value_dim: int, dtype: Any) -> tuple[Any, Any, Any]:
    """q, k and v of five tokens as parts of one projection."""
    widths = [heads * dim, kv_heads * dim, kv_heads * value_dim]
    parts = normal(5, sum(widths), dtype=dtype).split(widths, dim=1)
    counts = (heads, kv_heads, kv_heads)
    q, k, v = (part.unflatten(1, (count, -1)) for part, count in zip(parts, counts, strict=True))
    return q, k, v


def pools(kv_heads: int, dim: int, value_dim: int, dtype: Any) -> tuple[Any, Any]:
    return normal(32, kv_heads, dim, dtype=dtype, seed=5), normal(32, kv_heads, value_dim, dtype=dtype, seed=6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim", "turned"), SHAPES)
def test_f34_q_k_and_v_are_the_definitions(
    heads: int, kv_heads: int, dim: int, value_dim: int, turned: int, dtype: Any, norm: str
) -> None:
    q, k, v = projections(heads, kv_heads, dim, value_dim, dtype)
    k_pool, v_pool = pools(kv_heads, dim, value_dim, dtype)
    untouched = [slot for slot in range(32) if slot not in SLOTS.tolist()]
    before = k_pool[untouched].clone(), v_pool[untouched].clone()
    options: dict[str, Any] = {"eps": 1e-5, "unit_offset": norm == "1 + w"}
    q_weight, k_weight = None, None
    if norm != "no norm":
        q_weight, k_weight = normal(dim, dtype=dtype, seed=7) * 0.2, normal(dim, dtype=dtype, seed=8) * 0.2
    out = torch.full((5, heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    table = angles(turned)
    got = rope_append(
        q, k, v, k_pool, v_pool, table, POSITIONS, SLOTS, q_weight=q_weight, k_weight=k_weight, out=out, **options
    )
    k_want, v_want = exact(k_pool) * 0, exact(v_pool) * 0
    want = reference.rope_append(
        exact(q), exact(k), exact(v), k_want, v_want, exact(table), POSITIONS.cpu().long().numpy(),
        SLOTS.cpu().long().numpy(), q_weight=exact(q_weight), k_weight=exact(k_weight), **options,
    )  # fmt: skip
    assert got is out and bool(got[2].isnan().all())
    near(got[LIVE], want[LIVE], dtype)
    live = SLOTS[LIVE].long()
    near(k_pool[live], k_want[live.cpu().numpy()], dtype)
    assert same(v_pool[live], v[LIVE])
    assert same(k_pool[untouched], before[0]) and same(v_pool[untouched], before[1])


def test_a_table_of_angles_gives_what_rope_gives() -> None:
    q, k, v = projections(4, 2, 64, 64, torch.float32)
    k_pool, v_pool = pools(2, 64, 64, torch.float32)
    slots = int32(4, 3, 2, 1, 0)
    got = rope_append(q, k, v, k_pool, v_pool, angles(64), POSITIONS, slots)
    inv_freq = (10000.0 ** (-np.arange(0, 64, 2) / 64)).astype(np.float32)
    for numbers, x in ((got, q), (k_pool[slots.long()], k)):
        want = rope(x.cpu().numpy(), POSITIONS.cpu().long().numpy(), inv_freq)
        np.testing.assert_allclose(numbers.cpu().numpy(), want, atol=1e-5)


@pytest.mark.parametrize("pool_dtype", [torch.float16, torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_the_pools_may_be_of_another_type(pool_dtype: Any) -> None:
    """What is rounded are the exact keys and values: as if they had gone through a float32 pool."""
    q, k, v = projections(4, 2, 64, 32, torch.float32)
    wide = pools(2, 64, 32, torch.float32)
    k_pool, v_pool = (pool.to(pool_dtype) for pool in wide)
    rope_append(q, k, v, *wide, angles(64), POSITIONS, SLOTS)
    k_scale, v_scale = (1.0, 1.0) if pool_dtype == torch.float16 else (0.5, 0.25)
    rope_append(q, k, v, k_pool, v_pool, angles(64), POSITIONS, SLOTS, k_scale=k_scale, v_scale=v_scale)
    live = SLOTS[LIVE].long()
    assert same(k_pool[live], (wide[0][live] / k_scale).to(pool_dtype))
    assert same(v_pool[live], (wide[1][live] / v_scale).to(pool_dtype))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"slots": int32(0, 8)}, IndexError, "slot 8 is outside the pool of 8 slots; nothing was written"),
    ({"slots": int32(5, 5)}, ValueError, "a slot is named twice"),
    ({"positions": int32(3, 100)}, IndexError, "positions 3 to 100 are not all in a table of 100; nothing was written"),
    ({"positions": int32(-1, 0)}, IndexError, "positions -1 to 0 are not all"),
    ({"positions": int32(1)}, ValueError, r"positions has shape \[1\]; it must be \[2\]"),
    ({"k": normal(2, 2, 8)}, ValueError, "k has heads of 8 numbers; with this q they must have 16"),
    ({"v": normal(2, 1, 16)}, ValueError, r"v has shape \[2, 1, 16\]; it must be \[2, 2, dim\]"),
    ({"v": normal(2, 2, 16).half()}, ValueError, "v is torch.float16 on .*; q is torch.float32 on .*: make them alike"),
    ({"table": angles(32)}, ValueError, "table has 32 columns; it must have an even number from 2 to 16"),
    ({"table": angles(16)[:, :15].contiguous()}, ValueError, "table has 15 columns"),
    ({"table": angles(16).half()}, ValueError, "table is torch.float16; it must be torch.float32"),
    ({"q_weight": normal(16)}, ValueError, "q_weight and k_weight go together"),
    ({"q_weight": normal(16), "k_weight": normal(8)}, ValueError, r"k_weight has shape \[8\]; it must be \[16\]"),
    ({"out": normal(2, 4, 8)}, ValueError, r"out has shape \[2, 4, 8\]; it must be \[2, 4, 16\]"),
]


@pytest.mark.parametrize(("changed", "error", "words"), REFUSED)
def test_f46_what_does_not_fit_is_refused_and_nothing_written(
    changed: dict[str, Any], error: type[Exception], words: str
) -> None:
    k_pool, v_pool = normal(8, 2, 16), normal(8, 2, 16)
    before = k_pool.clone(), v_pool.clone()
    arguments = {
        "q": normal(2, 4, 16), "k": normal(2, 2, 16), "v": normal(2, 2, 16), "k_pool": k_pool, "v_pool": v_pool,
        "table": angles(16), "positions": int32(0, 1), "slots": int32(4, 5),
    }  # fmt: skip
    with pytest.raises(error, match=words):
        rope_append(**{**arguments, **changed})
    assert same(k_pool, before[0]) and same(v_pool, before[1])
