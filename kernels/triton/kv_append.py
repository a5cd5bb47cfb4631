"""Writing new keys and values into a layer's pools, both in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.triton._common import FLOAT_TYPES, FP8_TYPES, capability, check_tensor, check_tokens, narrow


class Config(NamedTuple):
    """A program copies `block` numbers of one token's keys, and as many of its values."""

    block: int
    num_warps: int


CONFIGS = {80: Config(1024, 4), 90: Config(1024, 4)}  # by compute capability


@triton.jit(do_not_specialize_on_alignment=["slots"])
def kv_append_kernel(
    k, v, k_pool, v_pool, slots, k_stride, v_stride, num_slots, k_scale, v_scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks): KEYS and VALUES are the numbers of one token. Slots outside of the pool are left alone."""
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(k + token.to(tl.int64) * k_stride + i, mask=i < KEYS)
        y = tl.load(v + token.to(tl.int64) * v_stride + i, mask=i < VALUES)
        tl.store(k_pool + slot * KEYS + i, narrow(x, k_pool, k_scale), mask=i < KEYS)
        tl.store(v_pool + slot * VALUES + i, narrow(y, v_pool, v_scale), mask=i < VALUES)


def kv_append(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor, *,
    k_scale: float = 1.0, v_scale: float = 1.0, check: bool = True,
) -> None:  # fmt: skip
    """k_pool[slots[t]] = k[t] and v_pool[slots[t]] = v[t] for every t with slots[t] >= 0, in place.

    k [T, H, D] and v [T, H, Dv] float16, bfloat16 or float32, heads adjacent, tokens at any distance (parts of one
    projection, say); k_pool [S, H, D] and v_pool [S, H, Dv] of any of these types or fp8; slots int32 or int64 [T]. A
    negative slot is padding: its token is skipped. Any D and Dv. Numbers are rounded to the pool's type; fp8 holds
    x / k_scale and x / v_scale, and its largest number for what is beyond.

    Raises ValueError when shapes, dtypes or devices do not go together. With `check`, slots are read back, which waits
    for the device: IndexError for a slot outside of the pool, ValueError for one named twice. Nothing was written then.
    Without `check` the caller has seen to both, as it must before a CUDA graph; what it missed is not written, or
    written by either of two tokens.
    """
    tokens, heads, dim = check_tokens("k", k)
    value_dim = check_tokens("v", v, (tokens, heads))[2]
    check_tensor("k_pool", k_pool, (None, heads, dim), (*FLOAT_TYPES, *FP8_TYPES), k.device)
    check_tensor("v_pool", v_pool, (len(k_pool), heads, value_dim), (k_pool.dtype,), k.device)
    check_tensor("slots", slots, (tokens,), (torch.int32, torch.int64), k.device)
    if check:
        check_slots(slots, len(k_pool))
    if tokens == 0:
        return
    config = CONFIGS[capability()]
    kv_append_kernel[(tokens, triton.cdiv(heads * max(dim, value_dim), config.block))](
        k, v, k_pool, v_pool, slots, k.stride(0), v.stride(0), len(k_pool), k_scale, v_scale,
        KEYS=heads * dim, VALUES=heads * value_dim, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip


def check_slots(slots: torch.Tensor, num_slots: int) -> None:
    """Reads slots back. Raises IndexError for one from num_slots on, ValueError for one that comes twice and is not
    negative."""
    live = slots[slots >= 0].cpu()
    if len(live) and int(live.max()) >= num_slots:
        raise IndexError(f"slot {int(live.max())} is outside the pool of {num_slots} slots; nothing was written")
    if len(live.unique()) != len(live):
        raise ValueError("a slot is named twice; which of the two stays is not defined, so nothing was written")
