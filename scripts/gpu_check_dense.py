"""What torch offers for attention, on dense keys and values [B, Hkv, S, D]: the fastest way that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from gpu_check_record import Figure, missing, reason
from gpu_check_timing import Call, Clock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip


def fastest(clock: Clock, ways: Mapping[str, Sequence[Call]]) -> Figure:
    """The best of the ways that run, and its name in the note; what does not run is named, too."""
    found: dict[str, Figure] = {}
    failed = []
    for name, calls in ways.items():
        try:
            found[name] = clock.time(calls)
        except (RuntimeError, TypeError, ValueError, torch.OutOfMemoryError) as error:
            failed.append(f"{name} ({reason(error)[:80]})")
    measured = {name: figure for name, figure in found.items() if figure.value is not None}
    if not measured:
        return next(iter(found.values()), missing("us", f"none runs: {'; '.join(failed)}"))
    name, best = min(measured.items(), key=lambda item: item[1].value or 0.0)
    others = ", ".join(f"{other} {figure.shown()}" for other, figure in measured.items() if other != name)
    return best._replace(note=f"{name}" + (f"; {others}" if others else ""))


def within(backend: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    shared = q.shape[1] != k.shape[1]
    if backend is None:
        out: torch.Tensor = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
        return out
    with sdpa_kernel(backend):
        forced: torch.Tensor = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
        return forced


def sdpa_decode(clock: Clock, q: torch.Tensor, dense: Sequence[Sequence[torch.Tensor]]) -> Figure:
    """q [B, Hq, D]. Where heads share keys also with those heads as queries of one, which reads keys once."""
    rows, heads, dim = q.shape
    kv_heads = dense[0][0].shape[1]
    shapes = {"": q[:, :, None]}
    if heads != kv_heads:
        shapes[", packed"] = q.view(rows, kv_heads, heads // kv_heads, dim)
    backends = {"default": None} if clock.smoke else {"default": None, **BACKENDS}
    ways = {
        name + packed: [partial(within, backend, queries, k, v, False) for k, v in dense]
        for packed, queries in shapes.items() for name, backend in backends.items()
    }  # fmt: skip
    return fastest(clock, ways)


def sdpa_prefill(clock: Clock, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Figure:
    backends = {"default": None} if clock.smoke else {"default": None, **BACKENDS}
    return fastest(clock, {name: [partial(within, b, q, k, v, True)] for name, b in backends.items()})


def flex(clock: Clock, q: torch.Tensor, dense: Sequence[Sequence[torch.Tensor]]) -> Figure:
    """FlexAttention, compiled (in a smoke run as it is)."""
    try:
        from torch.nn.attention.flex_attention import flex_attention

        function: Any = flex_attention if clock.smoke else torch.compile(flex_attention, dynamic=False)
        shared = q.shape[1] != dense[0][0].shape[1]
        calls = [partial(function, q[:, :, None], k, v, enable_gqa=shared) for k, v in dense]
        return clock.time(calls)
    except Exception as error:
        return missing("us", f"it does not run: {reason(error)[:150]}")
