"""Writing new keys and values into a layer's pools, both in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cortexstream.kernels.torch.quantized_pool import Pool
from cortexstream.kernels.triton._common import FLOAT_TYPES, FP8_TYPES, capability, check_tensor, check_tokens, narrow
from cortexstream.kernels.triton._pools import check_pools, check_scales, load_rows, store_groups


class Config(NamedTuple):
    """A program copies `block` numbers of one token's keys, and as many of its values."""

    block: int
    num_warps: int


CONFIGS = {80: Config(1024, 4), 90: Config(1024, 4)}  # by compute capability


# Pools may be a step's scratch memory, of any number of slots: a new number is no new compilation.
@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slots"])
def kv_append_kernel(
    k, v, k_pool, v_pool, slots, k_stride, v_stride, num_slots, k_scale, v_scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks): KEYS and VALUES are the numbers of one token. Slots outside of the pool are left alone."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        put(k + token * k_stride, k_pool, slot, k_scale, KEYS, BLOCK, BITS, GROUP)
        put(v + token * v_stride, v_pool, slot, v_scale, VALUES, BLOCK, BITS, GROUP)


@triton.jit
def put(
    source, pool, slot, scale, COUNT: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """A program's part of the COUNT numbers at `source`, to a slot."""
    if BITS == 0:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(source + i, mask=i < COUNT)
        tl.store(pool + slot * COUNT + i, narrow(x, pool, scale), mask=i < COUNT)
    else:
        g = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        live = g < COUNT // GROUP
        x = load_rows(source, g, live, GROUP, GROUP, MASKED=True)
        store_groups(pool, slot * (COUNT // GROUP) + g, x, live, BITS, GROUP)


def kv_append(
    k: torch.Tensor, v: torch.Tensor, k_pool: Pool, v_pool: Pool, slots: torch.Tensor, *,
    k_scale: float = 1.0, v_scale: float = 1.0, check: bool = True,
) -> None:  # fmt: skip
    """k_pool[slots[t]] = k[t] and v_pool[slots[t]] = v[t] for every t with slots[t] >= 0, in place.

    k [T, H, D] and v [T, H, Dv] float16, bfloat16 or float32, heads adjacent, tokens at any distance (parts of one
    projection, say); k_pool [S, H, D] and v_pool [S, H, Dv] of any of these types or fp8, or both `QuantizedPool`s of
    equal bits and groups; slots int32 or int64 [T]. A negative slot is padding: its token is skipped. Any D and Dv.
    Numbers are rounded to the pool's type; fp8 holds x / k_scale and x / v_scale, and its largest number for what is
    beyond. What is quantised is rounded to the type of the scales first; codes are made for scales as they are stored.

    Raises ValueError when shapes, dtypes or devices do not go together. With `check`, slots are read back, which waits
    for the device: IndexError for a slot outside of the pool, ValueError for one named twice. Nothing was written then.
    Without `check` the caller has seen to both, as it must before a CUDA graph; what it missed is not written, or
    written by either of two tokens.
    """
    tokens, heads, dim = check_tokens("k", k)
    value_dim = check_tokens("v", v, (tokens, heads))[2]
    pools = check_pools(k_pool, v_pool, (heads, dim, value_dim), (*FLOAT_TYPES, *FP8_TYPES), k.device)
    check_scales(k_pool, k_scale, v_scale)
    check_tensor("slots", slots, (tokens,), (torch.int32, torch.int64), k.device)
    if check:
        check_slots(slots, pools.slots)
    if tokens == 0:
        return
    config = CONFIGS[capability()]
    kv_append_kernel[(tokens, triton.cdiv(heads * max(dim, value_dim), config.block))](
        k, v, k_pool, v_pool, slots, k.stride(0), v.stride(0), pools.slots, k_scale, v_scale,
        KEYS=heads * dim, VALUES=heads * value_dim, BLOCK=config.block, BITS=pools.bits, GROUP=pools.group,
        num_warps=config.num_warps,
    )  # fmt: skip


def check_slots(slots: torch.Tensor, num_slots: int) -> None:
    """Reads slots back. Raises IndexError for one from num_slots on, ValueError for one that comes twice and is not
    negative."""
    live = slots[slots >= 0].cpu()
    if len(live) and int(live.max()) >= num_slots:
        raise IndexError(f"slot {int(live.max())} is outside the pool of {num_slots} slots; nothing was written")
    if len(live.unique()) != len(live):
        raise ValueError("a slot is named twice; which of the two stays is not defined, so nothing was written")
