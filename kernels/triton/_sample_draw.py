"""The last kernel that `sample` starts: thresholds, the draw, and what is known of the drawn token."""

from __future__ import annotations

import triton
import triton.language as tl

from cortexstream.kernels.triton._sample import (
    BINS,
    BINS_PER_UNIT,
    FINITE,
    NEGATIVE,
    OF_TOKENS,
    WAYS,
    candidates,
    distance,
    floor_of,
    is_filtered,
    key_of,
    mass_of_row,
    merged,
    noise_from,
    noise_of,
    token_of,
)


@triton.jit
def mass_above(
    lo, peak, logits, count, listed, r, rows, tables, partial, V, BLOCK: tl.constexpr, CAPACITY: tl.constexpr
):  # fmt: skip
    """What the candidates from key `lo` on weigh, the likeliest being 1."""
    mass = tl.full((), 0.0, tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z, key = candidates(logits, i, count, listed, r, rows, tables, partial, V, CAPACITY)
        mass += tl.sum(tl.where(key >= lo, tl.exp(-distance(z, peak)), 0.0), 0)
    return mass


@triton.jit
def search(
    lo, want_count, want_mass, peak, logits, count, listed, r, rows, tables, partial, V, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """The largest key from which on candidates are at least so many and weigh at least so much; `lo` if none is.

    That, or a key between it and the next lower candidate's. The likeliest candidates are always above it.
    """
    hi = key_of(peak) + 1
    many_lo, many_hi = count, count * 0
    ways = tl.arange(0, WAYS)
    while (hi.to(tl.int64) - lo > 1) & (many_lo - many_hi > 1):
        step = tl.maximum((hi.to(tl.int64) - lo) * (ways + 1) // (WAYS + 1), 1)
        keys = (lo + step).to(tl.int32)
        many, mass = tl.zeros((WAYS,), tl.int32), tl.zeros((WAYS,), tl.float32)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            z, key = candidates(logits, i, count, listed, r, rows, tables, partial, V, CAPACITY)
            above = key[:, None] >= keys[None, :]
            many += tl.sum(above.to(tl.int32), 0)
            mass += tl.sum(tl.where(above, tl.exp(-distance(z, peak))[:, None], 0.0), 0)
        good = (many >= want_count) & (mass >= want_mass)
        many_lo = tl.minimum(many_lo, tl.min(tl.where(good, many, many_lo), 0))
        many_hi = tl.maximum(many_hi, tl.max(tl.where(good, many_hi, many), 0))
        lo = tl.maximum(lo, tl.max(tl.where(good, keys, lo), 0))
        hi = tl.minimum(hi, tl.min(tl.where(good, hi, keys), 0))
    return lo


@triton.jit
def draw_filtered(
    peak, logits, r, rows, tables, partial, V, SPLITS, PAD: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr
):  # fmt: skip
    """The token that a row with filters draws: from its list, or from the whole row if it has no list."""
    found, last = tl.load(partial.found + 2 * r), tl.load(partial.found + 2 * r + 1)
    listed = found <= CAPACITY
    count = tl.where(listed, found, V)
    # One bin more than the last, for what rounding does to a bin's edge.
    edge = tl.where(last < BINS - 1, peak - (last + 2).to(tl.float32) / BINS_PER_UNIT, FINITE)
    lo = key_of(tl.maximum(edge, floor_of(rows, r, peak)))
    k, p = tl.load(rows.top_k + r), tl.load(rows.top_p + r)
    by_count = (k > 0) & (k < V)
    if by_count:
        lo = search(
            lo, tl.minimum(k, found), NEGATIVE, peak, logits, count, listed, r, rows, tables, partial, V, BLOCK,
            CAPACITY,
        )  # fmt: skip
    if p < 1.0:
        if by_count:
            mass = mass_above(
                lo, peak, logits, count, listed, r, rows, tables, partial, V, BLOCK, CAPACITY
            )  # fmt: skip
        else:
            mass = mass_of_row(partial, r, SPLITS, PAD)
        lo = search(
            lo, 0, p * mass, peak, logits, count, listed, r, rows, tables, partial, V, BLOCK, CAPACITY
        )  # fmt: skip
    best, token = tl.full((), NEGATIVE, tl.float32), V
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z, key = candidates(logits, i, count, listed, r, rows, tables, partial, V, CAPACITY)
        if listed:
            ids = tl.load(partial.list_ids + r * CAPACITY + i, mask=i < count, other=0)
            drawn = z + noise_of(rows, r, ids, OF_TOKENS)
        else:
            ids = i
            drawn = z + noise_from(rows, r, start, BLOCK, OF_TOKENS)
        drawn = tl.where(key >= lo, drawn, NEGATIVE)
        most = tl.max(drawn, 0)
        if most > best:  # the ids rise: of equals the lowest stays
            best, token = most, tl.min(tl.where(drawn == most, ids, V), 0)
    return token


@triton.jit
def draw_kernel(
    logits, rows, tables, partial, out, V, SPLITS, PAD: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
    FILTERS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Grid (rows,)."""
    r = tl.program_id(0)
    slot = tl.load(rows.slot + r)
    if slot >= 0:
        peak, broken = merged(partial, r, SPLITS, PAD)
        token = token_of(partial, r, peak, SPLITS, PAD)
        if FILTERS:
            if is_filtered(rows, r, V) and broken == 0:
                token = draw_filtered(
                    peak, logits, r, rows, tables, partial, V, SPLITS, PAD, BLOCK, CAPACITY
                )  # fmt: skip
        token = tl.where(broken, 0, token)
        tl.store(out.tokens + r, token.to(tl.int64))
        tl.store(out.broken + r, broken)
        if out.logprobs is not None:
            s = tl.arange(0, PAD)
            mosts = tl.load(partial.raw_most + r * SPLITS + s, mask=s < SPLITS, other=NEGATIVE)
            sums = tl.load(partial.raw_sum + r * SPLITS + s, mask=s < SPLITS, other=0.0)
            most = tl.max(mosts, 0)
            total = tl.sum(tl.where(mosts == NEGATIVE, 0.0, sums * tl.exp(mosts - most)), 0)
            x = tl.load(logits + r.to(tl.int64) * V + token).to(tl.float32)
            tl.store(out.logprobs + r, x - most - tl.log(total))
        if COUNT:
            at = tables.counts + slot.to(tl.int64) * V + token
            if broken == 0:
                tl.store(at, tl.load(at) + 1)
