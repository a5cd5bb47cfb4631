"""Causal attention whose bits depend on a query's position and on what it sees, and on nothing else, in torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from cortexstream.kernels.torch.fixed_rows import agreeing_heights, filled, tiles

SPLIT = 128  # keys of one product; splits begin at multiples of it


class Split(NamedTuple):
    """SPLIT keys [Hkv, D, SPLIT] and values [Hkv, SPLIT, Dv] from position `start`, zeros where there are none."""

    start: int
    keys: torch.Tensor
    values: torch.Tensor


class FixedAttention:
    """`kernels.torch.attention.attention` with products of fixed shapes, added in the order of the positions.

    The keys are cut at multiples of SPLIT, the queries into tiles of `heights` rows (`attention_heights`), so a query
    has the same bits decoded alone, in a chunk and in a whole prompt. What a query does not see adds zeros.
    """

    def __init__(self, heights: tuple[int, ...]) -> None:
        self.heights = heights

    def decode_height(self, group: int) -> int | None:
        """Of the product of one query's `group` heads, if that is one."""
        return next((height for height in self.heights if height >= group), None)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, first: int = 0, window: int | None = None,
        scale: float = 1.0, soft_cap: float | None = None, sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Arguments, result and errors as of `kernels.torch.attention.attention`; float32 within."""
        tokens, heads, dim = q.shape
        length, kv_heads, _ = k.shape
        if heads % kv_heads or k.shape[:2] != v.shape[:2] or first + length != start + tokens:
            raise ValueError(f"q {tuple(q.shape)} from {start}, k {tuple(k.shape)} and v {tuple(v.shape)} from {first}")
        group = heads // kv_heads
        rows = q.float().view(tokens, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, tokens * group, dim)
        splits = _splits(k.float(), v.float(), first)
        sink = None if sinks is None else sinks.float().view(kv_heads, group)
        parts = []
        for a, b, height in tiles(tokens * group, self.heights):
            low, high = start + a // group, start + (b - 1) // group
            seen = [split for split in splits if split.start <= high]
            scores = rows.new_empty(len(seen), kv_heads, height, SPLIT)
            tile = filled(rows[:, a:b], height)
            for split, part in zip(seen, scores, strict=True):
                torch.bmm(tile, split.keys, out=part)
            scores *= scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            if low == high:
                _hide(scores, seen[0].start, low, window)
            else:
                queries = [start + row // group for row in range(a, b)] + [high] * (height - b + a)
                _mask(scores, seen[0].start, queries, window)
            extra = None if sink is None else sink[:, [row % group for row in range(a, a + height)], None]
            parts.append(_weighted(scores, [split.values for split in seen], extra)[:, : b - a])
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out.view(kv_heads, tokens, group, -1).transpose(0, 1).reshape(tokens, heads, -1).to(q.dtype)


def attention_heights(kv_heads: int, key_dim: int, value_dim: int, device: torch.device) -> tuple[int, ...]:
    """Heights at which a query's bits do not depend on its place in its tile, in either product; see
    `agreeing_heights`."""
    generator = torch.Generator().manual_seed(1)
    stored = (torch.randn(SPLIT + 1, kv_heads, dim, generator=generator).to(device) for dim in (key_dim, value_dim))
    keys, values = (side[1:] for side in stored)
    split = _split(keys, values, 0)
    numbers = kv_heads * SPLIT
    by_keys = agreeing_heights(
        lambda x: torch.bmm(x, split.keys), keys.new_empty(kv_heads, 1, key_dim), numbers * key_dim
    )
    by_values = agreeing_heights(
        lambda x: torch.bmm(x, split.values), keys.new_empty(kv_heads, 1, SPLIT), numbers * value_dim
    )
    return tuple(height for height in by_keys if height in by_values) or (1,)


def _splits(k: torch.Tensor, v: torch.Tensor, first: int) -> list[Split]:
    """Keys and values [L, Hkv, ..] of the positions from `first` on."""
    splits = []
    for start in range(first // SPLIT * SPLIT, first + len(k), SPLIT):
        a, b = max(start - first, 0), min(start - first + SPLIT, len(k))
        before = first + a - start
        if b - a == SPLIT:
            splits.append(_split(k[a:b], v[a:b], start))
            continue
        around = (0, 0, 0, 0, before, SPLIT - before - (b - a))
        splits.append(_split(functional.pad(k[a:b], around), functional.pad(v[a:b], around), start))
    return splits


def _split(k: torch.Tensor, v: torch.Tensor, start: int) -> Split:
    return Split(start, k.permute(1, 2, 0), v.transpose(0, 1))


def _hide(scores: torch.Tensor, first: int, query: int, window: int | None) -> None:
    """Set -inf in scores [splits, Hkv, M, SPLIT] of the keys from `first` on that the queries, all at one position, do
    not see."""
    end = query + 1 - first
    if end % SPLIT:
        scores[-1, ..., end % SPLIT :] = -torch.inf  # the last split holds the query's own key
    if window is not None:
        unseen = max(query - window + 1 - first, 0)
        scores[: unseen // SPLIT] = -torch.inf
        scores[unseen // SPLIT, ..., : unseen % SPLIT] = -torch.inf


def _mask(scores: torch.Tensor, first: int, queries: list[int], window: int | None) -> None:
    """The same for queries at several positions, one for each of the M rows."""
    query = torch.tensor(queries, device=scores.device)[:, None]
    keys = torch.arange(first, first + len(scores) * SPLIT, device=scores.device).view(-1, 1, 1, SPLIT)
    hidden = keys > query if window is None else (keys > query) | (keys <= query - window)
    scores.masked_fill_(hidden, -torch.inf)


def _weighted(scores: torch.Tensor, values: list[torch.Tensor], sink: torch.Tensor | None) -> torch.Tensor:
    """softmax over all scores, of the values: [Hkv, M, Dv]. One split is added after the other."""
    largest = scores.amax(-1, keepdim=True).amax(0)
    if sink is not None:
        largest = torch.maximum(largest, sink)
    weights = scores.sub_(largest).exp_()
    shares = weights.sum(-1, keepdim=True)
    total, out = shares[0], torch.bmm(weights[0], values[0])
    for share, part, value in zip(shares[1:], weights[1:], values[1:], strict=True):
        total, out = total + share, out + torch.bmm(part, value)
    if sink is not None:
        total = total + torch.exp(sink - largest)
    return out / total
