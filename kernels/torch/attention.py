"""Causal attention with grouped heads, in torch; `kernels.reference.attention` is the definition."""

from __future__ import annotations

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, first: int = 0, window: int | None = None,
    scale: float = 1.0, soft_cap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """softmax(q k^T * scale) v, in which the query at position p sees the keys at positions up to p.

    q [T, Hq, D] are the queries at positions start .. start + T - 1; k [L, Hkv, D] and v [L, Hkv, Dv] hold positions
    first .. first + L - 1 with first + L = start + T (the causal mask is aligned at the bottom right). Query head h
    reads key head h // (Hq / Hkv). With a `window` of W the query at p sees p - W + 1 .. p only. `soft_cap` c turns a
    score s into c * tanh(s / c) (Gemma 2). `sinks` [Hq] are logits that take part in each head's softmax but carry no
    value. Computes in float32 and returns [T, Hq, Dv] of q's dtype. Raises ValueError when shapes and numbers do not
    go together.
    """
    tokens, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    if heads % kv_heads or k.shape[:2] != v.shape[:2] or first + length != start + tokens:
        raise ValueError(f"q {tuple(q.shape)} from {start}, k {tuple(k.shape)} and v {tuple(v.shape)} from {first}")
    grouped = q.float().view(tokens, kv_heads, heads // kv_heads, -1)
    scores = torch.einsum("tkgd,lkd->kgtl", grouped, k.float()) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if tokens > 1 or window is not None:
        queries = torch.arange(start, start + tokens, device=q.device)[:, None]
        keys = torch.arange(first, first + length, device=q.device)[None]
        seen = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
        scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        extra = sinks.float().view(kv_heads, -1, 1, 1).expand(-1, -1, tokens, 1)
        scores = torch.cat((scores, extra), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :length]
    out = torch.einsum("kgtl,lkd->tkgd", weights, v.float())
    return out.reshape(tokens, heads, -1).to(q.dtype)
