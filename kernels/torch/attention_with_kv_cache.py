"""Attention over a cache of keys and values, in one call: for those who want the kernels and nothing else.

    output, cache = attention_with_kv_cache(query, key, value)           # a prompt
    output, cache = attention_with_kv_cache(query, key, value, cache)    # and each token after it

On an NVIDIA GPU the Triton kernels compute, elsewhere torch; the log says once why, where it is torch.
"""

from __future__ import annotations

import functools
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from cortexstream.kernels.torch.attention import attention

log = logging.getLogger(__name__)

WIDEST_HEAD = 256  # that the Triton kernels take


class KVCache(NamedTuple):
    """Keys and values of a batch, and how many of them there are: what one call returns and the next one takes.

    The caller owns all three. A call writes into them, in place, and returns the same tensors; it keeps none of them.
    """

    keys: torch.Tensor  # [B, Hkv, cache_max_len, D]; from a row's length on anything may lie there
    values: torch.Tensor  # [B, Hkv, cache_max_len, Dv]
    seq_lens: torch.Tensor  # int32 or int64 [B], on the host or on the device


class Call(NamedTuple):
    """A call after all checks."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    seq_lens: torch.Tensor  # before the call
    lengths: list[int] | None  # the same as numbers; None: they are not read back
    scale: float
    is_causal: bool
    window: int | None


def attention_with_kv_cache(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    past_key_value: KVCache | tuple[torch.Tensor, torch.Tensor] | None = None, seq_lens: torch.Tensor | None = None,
    cache_max_len: int = 4096, update_cache: bool = True, *, is_causal: bool = True, scale: float | None = None,
    window: int | None = None, check: bool = True,
) -> tuple[torch.Tensor, KVCache | None]:  # fmt: skip
    """Append key and value to the cache and attend to all that it holds: (output [B, Hq, T, Dv], the cache).

    query [B, Hq, T, D], key [B, Hkv, T, D] and value [B, Hkv, T, Dv] float16, bfloat16 or float32 on one device; query
    head h reads key head h // (Hq / Hkv). Row b's new tokens have the positions seq_lens[b] .. seq_lens[b] + T - 1; a
    query sees its own position and those before (aligned at the bottom right), with a `window` of W the W latest of
    them, or with is_causal=False all of its row. `scale` multiplies the scores (default D ** -0.5). No gradients.

    `past_key_value` is what a call returned, or keys and values as in `KVCache` with `seq_lens` beside them. Without it
    a cache of `cache_max_len` tokens is made; with it the limit is what it has room for. Keys and values are written
    and T is added to `seq_lens`, in place. With update_cache=False all three stay as they are and are returned so (None
    without a past); the result is the same, from a copy, and may go beyond the cache's end.

    `seq_lens` of a new cache are on the host, where an overflow is seen without waiting for the device. On the device
    they are read back, which waits, unless check=False: then a row that overflows, or whose length is negative, is not
    written, its length stays and its output is NaN. With check=False lengths on the host are copied to the device and
    the news of what had room back, which waits: check=False is for lengths on the device. Lengths and batch sizes lead
    to no new compilation.

    Raises RuntimeError "Cache overflow for batch .." and ValueError for whatever else does not go together, before
    anything is written.
    """
    _check_new(query, key, value)
    for name, given in (("update_cache", update_cache), ("is_causal", is_causal), ("check", check)):
        if not isinstance(given, bool):
            raise ValueError(f"{name} is {given!r}; it must be True or False")
    _check_numbers(scale, window, is_causal, cache_max_len if past_key_value is None else 1)
    past = _past(key, value, past_key_value, seq_lens)
    if past is not None and update_cache:
        _check_writable(past)
    lens = past.seq_lens if past else torch.zeros(len(key), dtype=torch.int32)
    lengths = lens.tolist() if check else None
    if lengths is not None:
        _check_lengths(lengths, key.shape[2] * update_cache, past.keys.shape[2] if past else cache_max_len)
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    call = Call(query, key, value, lens, lengths, scale, is_causal, window)
    with torch.no_grad():
        if not update_cache:
            return _append_and_attend(call, *_copies(call, past))[0], past
        if past is None:
            past = KVCache(*_new_cache(key, value, cache_max_len), lens)
        output, fits = _append_and_attend(call, past.keys, past.values)
        past.seq_lens.add_(key.shape[2] if fits is None else fits.to(lens.device) * key.shape[2])
    return output, past


def _append_and_attend(
    call: Call, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The output; and which rows had room, [B], if that was not known before."""
    reason = _why_torch(call.query, keys, values)
    if reason is None:
        with _current(call.query.device):
            return _by_triton(call, keys, values)
    _tell(reason)
    return _by_torch(call, keys, values)


# ---------------------------------------------------------------------------------------------------------- kernels


def _why_torch(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot do it; None if they can."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if query.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"the tensors are on {query.device.type}, not on a GPU"
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if max(query.shape[3], values.shape[3]) > WIDEST_HEAD:
        return f"heads have more than {WIDEST_HEAD} numbers"
    return "the cache has 2 ** 31 vectors or more" if keys[..., 0].numel() >= 2**31 else None


@functools.cache
def _tell(reason: str) -> None:
    log.warning("attention_with_kv_cache computes in torch, which is slow: %s", reason)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _by_triton(
    call: Call, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """A key head of a row is a run in a pool of one head: [B, Hkv, room, D] is [B * Hkv * room, 1, D]."""
    from cortexstream.kernels.triton.kv_append import kv_append

    (batch, kv_heads, tokens, _), room, device = call.key.shape, keys.shape[2], call.query.device
    if call.lengths is None:
        lens = call.seq_lens.to(device)
        fits = (lens >= 0) & (lens <= room - tokens)  # in their own type: as int32 a number beyond it may look small
        before = torch.where(fits, lens, 0).int()
        after = torch.where(fits, before + tokens, 0)
    else:
        before, fits = _on_device(call.seq_lens, call.lengths, device), None
        after = before + tokens
    starts = torch.arange(0, batch * kv_heads * room, room, dtype=torch.int32, device=device)
    slots = (starts + before.repeat_interleave(kv_heads))[:, None] + torch.arange(tokens, device=device)
    if fits is not None:
        slots = torch.where(fits.repeat_interleave(kv_heads)[:, None], slots, -1)
    k_pool, v_pool = (x.view(-1, 1, x.shape[3]) for x in (keys, values))
    k, v = (x.reshape(-1, 1, x.shape[3]).contiguous() for x in (call.key, call.value))
    kv_append(k, v, k_pool, v_pool, slots.flatten(), check=False)
    attend = _decode if tokens == 1 else _prefill
    output = attend(call, (k_pool, v_pool), starts[:, None], after.repeat_interleave(kv_heads), room)
    if fits is not None:
        output = torch.where(fits[:, None, None, None], output, float("nan"))
    return output, fits


def _decode(
    call: Call, pools: tuple[torch.Tensor, torch.Tensor], tables: torch.Tensor, lengths: torch.Tensor, room: int
) -> torch.Tensor:
    from cortexstream.kernels.triton.decode_attention import decode_attention

    batch, heads, _, dim = call.query.shape
    by_head = call.query.reshape(len(tables), -1, dim).contiguous()
    out = decode_attention(
        by_head, pools[0], pools[1], tables, lengths, block_tokens=None, scale=call.scale, window=call.window,
        max_tokens=room if call.lengths is None else max(call.lengths) + 1,
    )  # fmt: skip
    return out.view(batch, heads, 1, -1)


def _prefill(
    call: Call, pools: tuple[torch.Tensor, torch.Tensor], tables: torch.Tensor, lengths: torch.Tensor, room: int
) -> torch.Tensor:
    from cortexstream.kernels.triton.prefill_attention import choose_config, prefill_attention, query_tiles

    (batch, heads, tokens, dim), rows = call.query.shape, len(tables)
    kv_heads = rows // batch
    by_head = call.query.unflatten(1, (kv_heads, -1)).transpose(2, 3)  # [B, Hkv, T, group, D]
    config = choose_config(call.query, call.value.shape[3])
    known = [0] * batch if call.lengths is None else call.lengths
    tiles = query_tiles(
        [tokens] * rows, [length + tokens for length in known for _ in range(kv_heads)], sharing=heads // kv_heads,
        block_m=config.block_m, device=call.query.device, causal=call.is_causal,
    )  # fmt: skip
    out = prefill_attention(
        by_head.reshape(rows * tokens, -1, dim).contiguous(), pools[0], pools[1], tables,
        tiles._replace(kv_tokens=lengths), block_tokens=None, scale=call.scale, window=call.window, config=config,
    )  # fmt: skip
    return out.view(batch, kv_heads, tokens, heads // kv_heads, -1).transpose(2, 3).reshape(batch, heads, tokens, -1)


def _by_torch(
    call: Call, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Row by row, with lengths that are read back whether or not they are checked."""
    output = call.query.new_full((*call.query.shape[:3], values.shape[3]), float("nan"))
    tokens, room = call.key.shape[2], keys.shape[2]
    lengths = call.seq_lens.tolist() if call.lengths is None else call.lengths
    for row, length in enumerate(lengths):
        end = length + tokens
        if 0 <= length and end <= room:
            keys[row, :, length:end], values[row, :, length:end] = call.key[row], call.value[row]
            output[row] = _row(call, row, keys[row, :, :end].transpose(0, 1), values[row, :, :end].transpose(0, 1))
    fits = [0 <= length <= room - tokens for length in lengths]
    return output, None if call.lengths is not None else torch.tensor(fits)


def _row(call: Call, row: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """k [L, Hkv, D] and v [L, Hkv, Dv] to all of a row's queries: [Hq, T, Dv]."""
    q = call.query[row]
    (heads, tokens, dim), length = q.shape, len(k)
    if call.is_causal:
        return attention(q.transpose(0, 1), k, v, length - tokens, 0, call.window, call.scale).transpose(0, 1)
    as_heads = q.reshape(1, heads * tokens, dim)  # each query is a head of the last position
    return attention(as_heads, k, v, length - 1, scale=call.scale).view(heads, tokens, -1)


def _on_device(seq_lens: torch.Tensor, lengths: list[int], device: torch.device) -> torch.Tensor:
    """Lengths that were checked, int32 [B] on the device; numbers of the host come by a copy that does not wait."""
    if seq_lens.device == device:
        return seq_lens.to(device, torch.int32)
    host = torch.tensor(lengths, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------------ cache


def _new_cache(key: torch.Tensor, value: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    return key.new_empty(*key.shape[:2], room, key.shape[3]), value.new_empty(*value.shape[:2], room, value.shape[3])


def _copies(call: Call, past: KVCache | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache to write into in place of the past one, with room for the new tokens behind any row."""
    held = 0
    if past is not None:
        held = past.keys.shape[2] if call.lengths is None else max(call.lengths)
    copies = _new_cache(call.key, call.value, held + call.key.shape[2])
    if past is not None:
        for copy, original in zip(copies, past[:2], strict=True):
            copy[:, :, :held] = original[:, :, :held]
    return copies


def _past(key: torch.Tensor, value: torch.Tensor, past: Any, seq_lens: Any) -> KVCache | None:
    if past is None:
        if seq_lens is not None:
            raise ValueError("seq_lens are given without past_key_value; give both or neither")
        return None
    if not isinstance(past, tuple | list) or len(past) != (3 if seq_lens is None else 2):
        raise ValueError("past_key_value is (keys, values) with seq_lens beside it, or (keys, values, seq_lens)")
    cache = KVCache(past[0], past[1], past[2] if seq_lens is None else seq_lens)
    for name, given in (("cached keys", cache.keys), ("cached values", cache.values), ("seq_lens", cache.seq_lens)):
        if not isinstance(given, torch.Tensor):
            raise ValueError(f"{name} are of type {type(given).__name__}; they must be a tensor")
    for name, tensor, new in (("keys", cache.keys, key), ("values", cache.values, value)):
        if tensor.ndim != 4 or (len(tensor), tensor.shape[3]) != (len(new), new.shape[3]):
            raise ValueError(
                f"cached {name} have shape {list(tensor.shape)}; they must be [{len(new)}, {new.shape[1]}, any, "
                f"{new.shape[3]}]"
            )
        if tensor.shape[1] != new.shape[1]:
            raise ValueError(f"Cache has {tensor.shape[1]} heads, expected {new.shape[1]} (num_kv_heads)")
        if (tensor.dtype, tensor.device) != (new.dtype, new.device) or not tensor.is_contiguous():
            raise ValueError(
                f"cached {name} are {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}; they must "
                f"be {new.dtype} on {new.device} and contiguous"
            )
    if cache.keys.shape[2] != cache.values.shape[2] or not cache.keys.shape[2]:
        raise ValueError(f"keys have room for {cache.keys.shape[2]} tokens and values for {cache.values.shape[2]}")
    lens = cache.seq_lens
    if lens.shape != key.shape[:1] or lens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seq_lens is {lens.dtype} {list(lens.shape)}; it must be int32 or int64 [{len(key)}]")
    if lens.device.type != "cpu" and lens.device != key.device:
        raise ValueError(f"seq_lens is on {lens.device}; it must be on the host or on {key.device}")
    return cache


def _check_writable(cache: KVCache) -> None:
    """Of tensors that have the right shapes and types: can torch, and may we, write into them?"""
    for name, tensor in zip(("cached keys", "cached values", "seq_lens"), cache, strict=True):
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{name} were made in torch.inference_mode(); call this in it, too, or give a clone made outside of it"
            )
    if len(cache.seq_lens) > 1 and cache.seq_lens.stride(0) == 0:
        raise ValueError("seq_lens are one number expanded; T is added to each row's own: give a clone")
    for one, other in combinations(cache, 2):
        first, second = sorted((one, other), key=lambda tensor: tensor.data_ptr())
        if one.device == other.device and first.data_ptr() + first.nbytes > second.data_ptr():
            raise ValueError("cached keys, values and seq_lens overlap in memory; give each its own")


def _check_numbers(scale: Any, window: Any, is_causal: bool, cache_max_len: Any) -> None:
    if scale is not None and not (_is_a(Real, scale) and math.isfinite(scale)):
        raise ValueError(f"scale is {scale!r}; it must be a finite number")
    if window is not None and (not _is_a(Integral, window) or window < 1 or not is_causal):
        raise ValueError(
            f"window is {window!r} and is_causal {is_causal}; a window is a whole number from 1 on and needs is_causal"
        )
    if not _is_a(Integral, cache_max_len) or cache_max_len < 1:
        raise ValueError(f"cache_max_len is {cache_max_len!r}; it must be a whole number of at least 1")


def _is_a(kind: type, value: object) -> bool:
    """Python counts True among the whole numbers; given for a number it is a mistake."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_lengths(lengths: list[int], tokens: int, room: int) -> None:
    """`tokens` are to be added to each row."""
    for row, length in enumerate(lengths):
        if not 0 <= length <= room:
            raise ValueError(f"seq_lens[{row}] is {length}; it must be 0 to {room}, for which the cache has room")
        if length + tokens > room:
            raise RuntimeError(
                f"Cache overflow for batch {row}: tried to add {tokens} tokens to cache at position {length}, but "
                f"cache_max_len={room}"
            )


def _check_new(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, given in (("query", query), ("key", key), ("value", value)):
        if not isinstance(given, torch.Tensor):
            raise ValueError(f"{name} is of type {type(given).__name__}; it must be a tensor")
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if any(len(shape) != 4 or 0 in shape for shape in shapes):
        raise ValueError(f"query {shapes[0]}, key {shapes[1]} and value {shapes[2]} must have 4 dimensions, none 0")
    (batch, heads, tokens, dim), kv_heads = shapes[0], shapes[1][1]
    if heads % kv_heads:
        raise ValueError(
            f"num_query_heads ({heads}) must be divisible by num_kv_heads ({kv_heads}). Got group_size = "
            f"{heads / kv_heads:.2f} (must be integer)."
        )
    if shapes[1] != (batch, kv_heads, tokens, dim) or shapes[2][:3] != shapes[1][:3]:
        raise ValueError(
            f"query {shapes[0]}, key {shapes[1]} and value {shapes[2]} do not go together; they must be [B, Hq, T, D], "
            "[B, Hkv, T, D] and [B, Hkv, T, Dv]"
        )
    kinds = {(x.dtype, x.device) for x in (query, key, value)}
    if len(kinds) > 1 or query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype} on {query.device}, {key.device} "
            f"and {value.device}; they must be of one float16, bfloat16 or float32 on one device"
        )
