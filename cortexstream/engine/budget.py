"""How many blocks the memory budget buys, and the longest sequence that they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from cortexstream.backend import Backend
from cortexstream.config import EngineConfig
from cortexstream.errors import OutOfMemoryBudgetError
from cortexstream.kv import KVArena, Ring
from cortexstream.limits import Limits
from cortexstream.plan import ring_tokens

TYPICAL_WINDOWS = 4  # full-attention tokens per ring token: sequences of four windows use up both pools alike
SWAP_SHARE, MAX_SWAP_BYTES = 0.25, 4 << 30


class KVSize(NamedTuple):
    """Blocks for the full-attention layers, and for each window's rings."""

    num_blocks: int
    rings: tuple[Ring, ...]


def kv_size(backend: Backend, config: EngineConfig) -> KVSize:
    """What to allocate; raises OutOfMemoryBudgetError with the numbers if the budget buys no block.

    The budget is `kv_cache_memory`, or the share `memory_utilization` of what is free after the weights. Rings get as
    many blocks as full attention has, divided by TYPICAL_WINDOWS, but at least one ring and at most one per slot;
    `num_kv_blocks` fixes the full-attention blocks and gives rings as many, at most one ring per slot.
    """
    info, model = backend.info, backend.model
    longest = min(config.max_model_len or model.max_context_tokens, model.max_context_tokens)
    most = config.max_num_seqs * -(-longest // info.block_tokens)  # more than every slot's whole context is of no use
    if config.num_kv_blocks is not None:
        return KVSize(config.num_kv_blocks, _rings(backend, config, config.num_kv_blocks, 1))
    budget = _budget(backend, config)
    low, high = 0, most  # the largest number of blocks whose pools fit
    while low < high:
        middle = (low + high + 1) // 2
        if _bytes(backend, KVSize(middle, _rings(backend, config, middle, TYPICAL_WINDOWS))) <= budget:
            low = middle
        else:
            high = middle - 1
    if low < 1:
        block_bytes = _bytes(backend, KVSize(1, _rings(backend, config, 1, TYPICAL_WINDOWS)))
        raise OutOfMemoryBudgetError(
            f"the KV budget of {budget:,} bytes holds no block of {info.block_tokens} tokens ({block_bytes:,} bytes); "
            f"{info.memory_bytes:,} bytes are free on {info.device}: raise kv_cache_memory or memory_utilization"
        )
    return KVSize(low, _rings(backend, config, low, TYPICAL_WINDOWS))


def swap_budget_bytes(config: EngineConfig, kv_bytes: int) -> int:
    """The most host memory that copies of preempted sequences take at a time, beside the KV memory and only while they
    are kept: `swap_memory`, or a quarter of the KV memory, at most 4 GiB."""
    if isinstance(config.swap_memory, int):
        return config.swap_memory
    return min(int(kv_bytes * SWAP_SHARE), MAX_SWAP_BYTES)


def limits_of(backend: Backend, config: EngineConfig, arena: KVArena) -> Limits:
    """The longest sequence is the smallest of the model's context, max_model_len and the arena."""
    model, capacity_tokens = backend.model, arena.capacity_tokens
    longest = model.max_context_tokens
    reason = f"the model's context is {longest} tokens"
    if config.max_model_len is not None and config.max_model_len < longest:
        longest, reason = config.max_model_len, f"max_model_len is {config.max_model_len}"
    if capacity_tokens + 1 < longest:  # the last token of a sequence never needs KV
        longest, reason = capacity_tokens + 1, f"the KV arena holds {capacity_tokens} tokens; raise kv_cache_memory"
    return Limits(
        model.vocab_size, longest, reason, model.eos_token_ids, config.max_num_seqs, config.max_num_batched_tokens
    )


def split(target: Backend, draft: Backend, config: EngineConfig) -> tuple[EngineConfig, EngineConfig]:
    """What `config` is for a model and for one that drafts for it: both hold keys and values of as many tokens."""
    if config.num_kv_blocks is not None:
        tokens = config.num_kv_blocks * target.info.block_tokens
        return config, replace(config, num_kv_blocks=-(-tokens // draft.info.block_tokens))
    budget = _budget(draft, config)  # it was loaded last: what is free now is free after both models' weights
    mine, its = target.model.kv_bytes_per_token, draft.model.kv_bytes_per_token
    share = budget * its // (mine + its)
    return replace(config, kv_cache_memory=max(1, budget - share)), replace(config, kv_cache_memory=max(1, share))


def _budget(backend: Backend, config: EngineConfig) -> int:
    if isinstance(config.kv_cache_memory, int):
        return config.kv_cache_memory
    info = backend.info
    share = info.memory_share if config.memory_utilization is None else config.memory_utilization
    return int(info.memory_bytes * share)


def _rings(backend: Backend, config: EngineConfig, num_blocks: int, share: int) -> tuple[Ring, ...]:
    rings = []
    for window in backend.model.windows:
        ring = ring_tokens(window, backend.info.block_tokens) // backend.info.block_tokens
        blocks = min(num_blocks, max(-(-num_blocks // share), ring), config.max_num_seqs * ring)
        rings.append(Ring(window, blocks))
    return tuple(rings)


def _bytes(backend: Backend, size: KVSize) -> int:
    blocks = (size.num_blocks, *(ring.num_blocks for ring in size.rings))
    per_token = backend.model.pool_bytes_per_token
    return backend.info.block_tokens * sum(n * b for n, b in zip(blocks, per_token, strict=True))
