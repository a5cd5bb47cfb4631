"""The numpy definitions over block tables, against torch and plain arithmetic (F39, F42, F45, F51, F90)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.kernels.reference.attention import attention
from cortexstream.kernels.reference.block_table import table_slots
from cortexstream.kernels.reference.decode_attention import decode_attention
from cortexstream.kernels.reference.prefill_attention import prefill_attention
from cortexstream.kernels.reference.rms_norm import rms_norm
from cortexstream.kernels.reference.rope import rope
from cortexstream.kernels.reference.rope_append import rope_append, rotate
from tests.conftest import require

ROWS = [(3, 7), (1, 9), (0, 4), (5, 5)]  # queries, keys
TABLES = np.array([[4, 0], [2, 6], [1, 1], [5, 3]])  # blocks of 5


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def pools() -> tuple[Any, Any]:
    """35 slots for 2 key heads; those that no row has hold NaN."""
    k, v = random(35, 2, 8, seed=1), random(35, 2, 6, seed=2)
    used = {slot for table, (_, keys) in zip(TABLES, ROWS, strict=True) for slot in table_slots(table, keys, 5)}
    for pool in (k, v):
        pool[[slot for slot in range(35) if slot not in used]] = np.nan
    return k, v


def by_torch(
    q: Any, k: Any, v: Any, start: int, scale: float, window: int | None = None, softcap: float | None = None,
    sinks: Any = None, causal: bool = True,
) -> Any:  # fmt: skip
    """Attention in float64, written for torch tensors: explicit mask, sinks as a column of logits."""
    torch = require("torch")
    q, k, v = (torch.from_numpy(x).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    logits = q @ k.transpose(1, 2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    position, key = start + torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None, :]
    if causal:
        logits = logits.masked_fill(key > position, float("-inf"))
    if window:
        logits = logits.masked_fill(key <= position - window, float("-inf"))
    if sinks is not None:
        column = torch.from_numpy(sinks)[:, None, None].expand(-1, q.shape[1], 1)
        logits = torch.cat((logits, column), 2)
    return (logits.softmax(2)[:, :, : k.shape[1]] @ v).transpose(0, 1).numpy()


OPTIONS: list[dict[str, Any]] = [{}, {"window": 3}, {"softcap": 1.5}, {"sinks": random(4, seed=3)}]
OPTIONS.append({name: value for options in OPTIONS for name, value in options.items()})


@pytest.mark.parametrize("options", OPTIONS)
def test_f45_f51_ragged_rows_are_torchs(options: dict[str, Any]) -> None:
    q, (k, v) = random(9, 4, 8), pools()
    queries, keys = (list(numbers) for numbers in zip(*ROWS, strict=True))
    got = prefill_attention(q, k, v, TABLES, queries, keys, block_tokens=5, scale=0.4, **options)
    begin = 0
    for table, (count, length) in zip(TABLES, ROWS, strict=True):
        own, slots = slice(begin, begin + count), table_slots(table, length, 5)
        want = by_torch(q[own], k[slots], v[slots], length - count, 0.4, **options)
        np.testing.assert_allclose(got[own], want, atol=1e-12)
        begin += count


@pytest.mark.parametrize("options", OPTIONS)
def test_f45_decoding_rows_are_torchs_and_padding_gives_zeros(options: dict[str, Any]) -> None:
    q, (k, v) = random(4, 4, 8), pools()
    got = decode_attention(q, k, v, TABLES, np.array([7, 0, 4, 5]), block_tokens=5, scale=0.4, **options)
    assert not got[1].any()
    for row, length in ((0, 7), (2, 4), (3, 5)):
        slots = table_slots(TABLES[row], length, 5)
        want = by_torch(q[row : row + 1], k[slots], v[slots], length - 1, 0.4, **options)
        np.testing.assert_allclose(got[row : row + 1], want, atol=1e-12)


def test_without_a_causal_order_every_query_sees_all_of_its_row() -> None:
    q, (k, v) = random(12, 4, 8), pools()
    got = prefill_attention(q, k, v, TABLES[:3], [9, 2, 1], [5, 0, 4], block_tokens=5, scale=0.4, causal=False)
    slots = table_slots(TABLES[0], 5, 5)
    np.testing.assert_allclose(got[:9], by_torch(q[:9], k[slots], v[slots], 0, 0.4, causal=False), atol=1e-12)
    assert not got[9:11].any() and np.isfinite(got[11]).all()


def test_float32_and_float64_give_their_own() -> None:
    q, k, v = random(3, 4, 8), random(5, 2, 8, seed=1), random(5, 2, 8, seed=2)
    single = attention(q.astype(np.float32), k.astype(np.float32), v.astype(np.float32), 2, 0.4)
    double = attention(q, k, v, 2, 0.4)
    assert single.dtype == np.float32 and double.dtype == np.float64
    np.testing.assert_allclose(single, double, atol=1e-6)
    with pytest.raises(ValueError, match=r"softcap is 0\.0; it must be above 0"):
        attention(q, k, v, 2, 0.4, softcap=0.0)


def test_f90_slots_of_tables_and_runs() -> None:
    assert table_slots(np.array([3, 1, 9]), 6, 4).tolist() == [12, 13, 14, 15, 4, 5]
    assert table_slots(np.array([7]), 3, None).tolist() == [7, 8, 9]
    assert table_slots(np.array([7]), 0, 4).tolist() == []
    assert table_slots(np.array([2**27], np.int32), 1, 64).tolist() == [2**33]
    with pytest.raises(ValueError, match="9 positions need more than a table of 2 blocks of 4 tokens"):
        table_slots(np.array([0, 1]), 9, 4)


def test_rotate_turns_the_first_dimensions_as_rope_does() -> None:
    x, positions = random(3, 2, 12).astype(np.float32), np.array([0, 5, 90])
    inv_freq = (100.0 ** (-np.arange(4) / 4)).astype(np.float32)
    angle = positions.astype(np.float32)[:, None] * inv_freq
    turned = rotate(x, np.concatenate((np.cos(angle), np.sin(angle)), 1))
    assert np.array_equal(turned[..., :8], rope(x[..., :8], positions, inv_freq))
    assert np.array_equal(turned[..., 8:], x[..., 8:])


def test_f34_rope_append_norms_rotates_and_writes_what_is_not_padding() -> None:
    q, k, v = random(3, 4, 8), random(3, 2, 8, seed=1), random(3, 2, 6, seed=2)
    table, positions, slots = random(10, 8, seed=3), np.array([4, 0, 9]), np.array([2, -1, 0])
    weights = random(2, 8, seed=4)
    k_pool, v_pool = np.zeros((4, 2, 8)), np.zeros((4, 2, 6))
    got = rope_append(
        q, k, v, k_pool, v_pool, table, positions, slots, q_weight=weights[0], k_weight=weights[1], unit_offset=True
    )  # fmt: skip
    for token, slot in ((0, 2), (2, 0)):
        turns = table[positions[token]][None]
        normed = [rms_norm(x[token][None], w + 1, 1e-6) for x, w in ((q, weights[0]), (k, weights[1]))]
        assert np.array_equal(got[token], rotate(normed[0], turns)[0])
        assert np.array_equal(k_pool[slot], rotate(normed[1], turns)[0])
        assert np.array_equal(v_pool[slot], v[token])
    assert not got[1].any() and not k_pool[[1, 3]].any() and not v_pool[[1, 3]].any()
