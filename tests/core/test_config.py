"""Options that make no sense are refused with one short sentence, whatever their type and size (F29)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cortexstream.config import MAX_BYTES, EngineConfig, parse_bytes
from cortexstream.errors import MAX_SHOWN, InvalidRequestError, shown

HUGE = 10**5000  # Python refuses to write it out
FIELDS = ("kv_cache_memory", "swap_memory")


def refused(message: str, **options: Any) -> None:
    """The sentence begins like this, names the field, and is short."""
    (field,) = options
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig(**options)
    assert str(caught.value).startswith(f"{field}: is {message}") and caught.value.field == field
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", FIELDS)
def test_f29_bytes_have_a_limit(field: str) -> None:
    most = "must be at most 2**62 bytes"
    for value in (MAX_BYTES + 1, 10**400, HUGE, "9" * 400, "9" * 10_000, "4194304.5TiB"):
        refused(f"{shown(value)}; {most}", **{field: value})
    refused(f"a whole number of 16610 bits; {most}", **{field: HUGE})
    refused(f"'{'9' * (MAX_SHOWN - 1)}... (402 characters); {most}", **{field: "9" * 400})
    for value in (MAX_BYTES, str(MAX_BYTES), "4194304TiB"):
        assert getattr(EngineConfig.from_kwargs({field: value}), field) == MAX_BYTES
    assert parse_bytes(field, 2**53 + 1) == 2**53 + 1  # a number is taken as it is, not by way of a float


@pytest.mark.parametrize("field", FIELDS)
def test_f29_what_is_no_number_of_bytes(field: str) -> None:
    numbers = (True, False, -1, -HUGE, 0.0, 1e300, math.inf, math.nan)
    for value in (*numbers, "0", "", "many", "1e400", "-1GiB", [1], b"1", "x" * 999):
        refused(f"{shown(value)}; must be a number of bytes, or a text like '512MiB' or '4GiB'", **{field: value})


def test_f91_no_swap_memory_is_a_choice_of_its_own() -> None:
    assert EngineConfig(swap_memory=0).swap_memory == 0 and EngineConfig().swap_memory is None
    refused("0; must be a number of bytes", kv_cache_memory=0)


def test_f29_shares_are_numbers() -> None:
    for value in (True, False, 0, -0.5, 1.0001, math.nan, math.inf, HUGE, "0.5", [0.5]):
        refused(f"{shown(value)}; must be a number above 0, at most 1", memory_utilization=value)
    for share in (1, 1.0, 1e-9):
        assert EngineConfig(memory_utilization=share).memory_utilization == share


def test_f29_what_is_refused_is_not_repeated_at_length() -> None:
    for field in ("max_num_seqs", "seed", "kv_layout", "backend", "preemption_mode", "enable_prefix_caching"):
        for value in (HUGE, -HUGE, "9" * 10_000, [0] * 10_000):
            refused(f"{shown(value)}; must be", **{field: value})


def test_f29_so_many_blocks_cannot_be_managed() -> None:
    for value in (2**31, 10**13, HUGE):
        refused(f"{shown(value)}; must be at most 2147483647", num_kv_blocks=value)
    assert EngineConfig(num_kv_blocks=2**31 - 1).num_kv_blocks == 2**31 - 1


def test_what_is_shown_of_a_value() -> None:
    assert shown("a" * 58) == repr("a" * 58) and shown(10**59) == str(10**59)
    assert shown("a" * 59) == "'" + "a" * 59 + "... (61 characters)"
    assert shown(-(2**300)) == "a whole number of 301 bits" and shown(True) == "True"
