"""Causal attention of many single queries at once, with the bits of `fixed_attention`, in torch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cortexstream.kernels.torch.fixed_attention import SPLIT
from cortexstream.kernels.torch.fixed_rows import filled

Ints = npt.NDArray[np.int64]

BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Pieces(NamedTuple):
    """The keys of B queries, cut at multiples of SPLIT: P pieces, one query's after the other's, in order."""

    slots: Ints  # [P * SPLIT]: where the keys lie; of those that are not there, where the query's own lies
    hidden: torch.Tensor  # bool [P, 1, SPLIT]: not seen
    query: torch.Tensor  # int64 [P]: whose
    first: torch.Tensor  # int64 [B]: each query's first piece
    later: list[tuple[torch.Tensor, torch.Tensor]]  # queries with a second piece, and which it is; a third; ...


def pieces_of(slots: list[Ints], first: list[int], device: torch.device) -> Pieces:
    """`slots[i]` hold query i's keys, at positions from `first[i]` to its own."""
    starts = [begin // SPLIT * SPLIT for begin in first]
    counts = [-(-(begin + len(s) - start) // SPLIT) for begin, s, start in zip(first, slots, starts, strict=True)]
    where = np.repeat([own[-1] for own in slots], np.array(counts) * SPLIT)
    hidden = np.ones(len(where), bool)
    offsets = np.cumsum([0, *counts[:-1]])
    for begin, own, start, offset in zip(first, slots, starts, offsets, strict=True):
        here = slice(offset * SPLIT + begin - start, offset * SPLIT + begin - start + len(own))
        where[here], hidden[here] = own, False
    later = []
    for number in range(1, max(counts)):
        queries = [query for query, count in enumerate(counts) if count > number]
        later.append((_ints(queries, device), _ints(offsets[queries] + number, device)))
    unseen = torch.from_numpy(hidden).to(device).view(-1, 1, SPLIT)
    query = np.repeat(np.arange(len(slots)), counts)
    return Pieces(where, unseen, _ints(query, device), _ints(offsets, device), later)


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: Pieces, height: int, batches: tuple[int, ...],
    scale: float = 1.0, soft_cap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """q [B, Hq, D]; k [P * SPLIT, Hkv, D] and v [P * SPLIT, Hkv, Dv] from `pieces.slots` -> [B, Hq, Dv] of q's dtype.

    `height` rows of one product hold a query's heads of one key head; `batches` are numbers of products that may be
    done at once (`agreeing_batches`).
    """
    queries, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    keys, values = (side.float().view(-1, SPLIT, kv_heads, side.shape[2]) for side in (k, v))
    rows = filled(q.float().view(queries, kv_heads, group, dim).transpose(0, 1), height)[:, pieces.query]
    scores = _products(rows, keys.transpose(1, 3), batches).mul_(scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    peaks = scores.masked_fill_(pieces.hidden, -torch.inf).amax(-1, keepdim=True)
    largest = peaks[:, pieces.first]
    for who, piece in pieces.later:
        largest[:, who] = torch.maximum(largest[:, who], peaks[:, piece])
    if sinks is not None:
        sink = filled(sinks.float().view(kv_heads, 1, group, 1), height)
        largest = torch.maximum(largest, sink)
    weights = scores.sub_(largest[:, pieces.query]).exp_()
    shares, products = weights.sum(-1, keepdim=True), _products(weights, values, batches)
    total, out = shares[:, pieces.first], products[:, pieces.first]
    for who, piece in pieces.later:
        total[:, who], out[:, who] = total[:, who] + shares[:, piece], out[:, who] + products[:, piece]
    if sinks is not None:
        total = total + torch.exp(sink - largest)
    return (out / total)[:, :, :group].transpose(0, 1).reshape(queries, heads, -1).to(q.dtype)


@cache
def agreeing_batches(kv_heads: int, key_dim: int, value_dim: int, height: int, device: torch.device) -> tuple[int, ...]:
    """How many of `decode`'s products may be done at once, so that each has the bits that `FixedAttention`'s have at
    this height; found on random numbers. Empty if not even one."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    keys, values = (random(SPLIT, kv_heads, dim) for dim in (key_dim, value_dim))
    rows, weights = random(kv_heads, height, key_dim), random(kv_heads, height, SPLIT)
    scores, products = torch.bmm(rows, keys.permute(1, 2, 0)), torch.bmm(weights, values.transpose(0, 1))
    found = []
    for size in BATCHES:
        many = [side.expand(size, *side.shape).contiguous() for side in (keys, values)]
        some = [side[:, None].expand(kv_heads, size, *side.shape[1:]).contiguous() for side in (rows, weights)]
        same = (_products(some[0], many[0].transpose(1, 3), (size,)) == scores[:, None]).all()
        if same and (_products(some[1], many[1], (size,)) == products[:, None]).all():
            found.append(size)
    return tuple(found) if 1 in found else ()


def _products(rows: torch.Tensor, others: torch.Tensor, batches: tuple[int, ...]) -> torch.Tensor:
    """rows [Hkv, P, M, K] times others, of which [P, K, Hkv, N] is seen: [Hkv, P, M, N]."""
    kv_heads, pieces, height, _ = rows.shape
    out = rows.new_empty(kv_heads, pieces, height, others.shape[3])
    for head in range(kv_heads):
        first = 0
        while first < pieces:
            end = first + max(size for size in batches if size <= pieces - first)
            torch.bmm(rows[head, first:end], others[first:end, :, head], out=out[head, first:end])
            first = end
    return out


def _ints(numbers: list[int] | Ints, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(numbers, np.int64)).to(device)
