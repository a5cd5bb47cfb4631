"""The kernels that `sample` starts, and what they are made of.

A row's vocabulary is cut into splits of a fixed number of tokens. `scan_kernel` takes a split to its best token, or
to the token that its best block draws, and `draw_kernel` merges a row's splits: two launches. For rows with filters two
more come between them. `survey_kernel` counts a split's tokens by their distance to the row's largest score, and
`list_kernel` writes down those that may be kept, of all splits, in the order of their ids. `draw_kernel` then finds the
thresholds among these few. No sort is needed: it narrows a bracket of floats, taken as ordered integers, until one
token or one float is left in it.

All sums have a fixed order, so that a row's result is the same bits in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below every key
FINITE = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32
NEGATIVE = tl.constexpr(float("-inf"))
POSITIVE = tl.constexpr(float("inf"))
BINS = tl.constexpr(64)  # of distances to the largest score
BINS_PER_UNIT = tl.constexpr(2.0)
BLOCK_IDS = tl.constexpr(128)  # token ids of a block
OF_TOKENS, OF_BLOCKS = tl.constexpr(0), tl.constexpr(1)  # kinds of noise
WAYS = tl.constexpr(8)  # thresholds that are tried at a time
SLACK = tl.constexpr(1e-5)  # of the whole mass: far more than what rounding may add to a tail


@triton.jit
def gumbel(bits):
    """Gumbel(0, 1) noise from 32 random bits, as `cortexstream.sampling.noise` defines it.

    log1p is not in Triton's language. log(v) * u / (1 - v) with v = 1 - u makes good what v lost in rounding (Kahan's
    way, in Goldberg, "What every computer scientist should know about floating-point arithmetic", 1991, theorem 4).
    """
    u = tl.minimum(bits.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    v = 1.0 - u
    e = tl.where(v == 1.0, u, -tl.log(v) * (u / tl.where(v == 1.0, 1.0, 1.0 - v)))
    return -tl.log(e)


@triton.jit
def random_words(rows, r, counter, KIND: tl.constexpr):
    """Four words of Philox-4x32-10 for each counter, for the row's seed, position and index."""
    zero = counter * 0
    position = tl.load(rows.position + r).to(tl.uint32)
    index = tl.load(rows.sample_index + r).to(tl.uint32)
    return tl.philox(tl.load(rows.seed + r), counter, zero + position, zero + index, zero + KIND)


@triton.jit
def noise_from(rows, r, start, N: tl.constexpr, KIND: tl.constexpr):
    """Noise [N] of the entries from `start` on, a multiple of 4."""
    a, b, c, d = random_words(rows, r, (start // 4 + tl.arange(0, N // 4)).to(tl.uint32), KIND)
    return gumbel(tl.join(tl.join(a, c), tl.join(b, d)).reshape(N))


@triton.jit
def noise_of(rows, r, ids, KIND: tl.constexpr):
    """Noise of any entries; four times the work."""
    a, b, c, d = random_words(rows, r, (ids // 4).to(tl.uint32), KIND)
    lane = ids % 4
    return gumbel(tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d)))


@triton.jit
def is_filtered(rows, r, V):
    """Does the row draw from less than all tokens? Greedy rows do not draw."""
    k = tl.load(rows.top_k + r)
    some = (tl.load(rows.top_p + r) < 1.0) | (tl.load(rows.log_min_p + r) > NEGATIVE) | ((k > 0) & (k < V))
    return some & (tl.load(rows.temperature + r) != 0.0)


@triton.jit
def biased(logits, ids, ok, r, rows, tables, V):
    """The row's logits with their bias, float32; -inf where not `ok`."""
    z = tl.load(logits + r.to(tl.int64) * V + ids, mask=ok, other=NEGATIVE).to(tl.float32)
    if tables.bias is not None:
        line = tl.load(rows.bias_slot + r).to(tl.int64)
        added = tl.load(tables.bias + line * V + ids, mask=ok & (ids < tl.where(line >= 0, V, 0)), other=0.0)
        z = tl.where(added == NEGATIVE, NEGATIVE, z + added)  # a banned token cannot break a row
    return z


@triton.jit
def tempered(z, ids, ok, r, rows, tables, V):
    """Biased logits after penalties and temperature, which a greedy row has at 1."""
    if (tables.counts is not None) or (tables.seen is not None):
        repetition = tl.load(rows.repetition_penalty + r)
        frequency, presence = tl.load(rows.frequency_penalty + r), tl.load(rows.presence_penalty + r)
        at = tl.load(rows.slot + r).to(tl.int64) * V + ids
        some = (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)
        penalised = ok & (ids < tl.where(some, V, 0))
        used = ids < 0
        if tables.seen is not None:
            used = tl.load(tables.seen + at, mask=penalised, other=0) != 0
        if tables.counts is not None:
            count = tl.load(tables.counts + at, mask=penalised, other=0).to(tl.float32)
            used = used | (count > 0.0)
        z = tl.where(used, tl.where(z > 0.0, tl.div_rn(z, repetition), z * repetition), z)
        if tables.counts is not None:
            z = z - frequency * count - tl.where(count > 0.0, presence, 0.0)
    temperature = tl.load(rows.temperature + r)
    return tl.div_rn(z, tl.where(temperature == 0.0, 1.0, temperature))


@triton.jit
def scores(logits, ids, ok, r, rows, tables, V):
    """What filters and noise are applied to, float32; -inf where not `ok`."""
    return tempered(biased(logits, ids, ok, r, rows, tables, V), ids, ok, r, rows, tables, V)


@triton.jit
def draw_by_blocks(z, rows, r, s, SPLIT: tl.constexpr):
    """(largest noisy sum of split s's blocks, the token that this block draws), as `cortexstream.sampling` has it."""
    COUNT: tl.constexpr = SPLIT // BLOCK_IDS
    blocks, first = z.reshape(COUNT, BLOCK_IDS), s * COUNT
    peaks = tl.max(blocks, 1)
    finite = tl.where(peaks == NEGATIVE, 0.0, peaks)[:, None]
    below = tl.where(blocks == peaks[:, None], 0.0, blocks - finite)  # 0 where all is -inf, or +inf
    b, place = tl.arange(0, COUNT), tl.arange(0, BLOCK_IDS)
    sums = peaks + tl.log(tl.sum(tl.exp(below), 1)) + noise_of(rows, r, first + b + BLOCK_IDS, OF_BLOCKS)
    best = tl.max(sums, 0)
    chosen = tl.min(tl.where(sums == best, b, COUNT - 1), 0)
    drawn = tl.max(tl.where(b[:, None] == chosen, blocks, NEGATIVE), 0) + noise_from(rows, r, 0, BLOCK_IDS, OF_BLOCKS)
    return best, (first + chosen) * BLOCK_IDS + tl.min(tl.where(drawn == tl.max(drawn, 0), place, BLOCK_IDS - 1), 0)


@triton.jit
def scan_kernel(
    logits, rows, tables, partial, V, SPLIT: tl.constexpr, FILTERS: tl.constexpr, LOGPROBS: tl.constexpr
):  # fmt: skip
    """Grid (splits, rows). A split's best score and its id; of a row that draws from all tokens, the best block's noisy
    sum and what that block draws.

    NaN for a best score says that a logit is NaN or +inf.
    """
    s, r = tl.program_id(0), tl.program_id(1)
    if tl.load(rows.slot + r) >= 0:
        ids = s * SPLIT + tl.arange(0, SPLIT)
        out = r * tl.num_programs(0) + s
        if LOGPROBS:
            raw = tl.load(logits + r.to(tl.int64) * V + ids, mask=ids < V, other=NEGATIVE).to(tl.float32)
            most = tl.max(raw, 0)
            tl.store(partial.raw_most + out, most)
            tl.store(partial.raw_sum + out, tl.sum(tl.where(raw == NEGATIVE, 0.0, tl.exp(raw - most)), 0))
        x = biased(logits, ids, ids < V, r, rows, tables, V)
        z = tempered(x, ids, ids < V, r, rows, tables, V)
        noisy = tl.load(rows.temperature + r) != 0.0
        if FILTERS:
            noisy = noisy & (is_filtered(rows, r, V) == 0)
        if noisy:
            best, token = draw_by_blocks(tl.where(z == z, z, NEGATIVE), rows, r, s, SPLIT)
        else:
            best = tl.max(z, 0)
            token = tl.min(tl.where(z == best, ids, V), 0)
        tl.store(partial.ids + out, token)
        bad = tl.max(((x != x) | (x == POSITIVE)).to(tl.int32), 0)
        tl.store(partial.best + out, tl.where(bad != 0, float("nan"), best))


@triton.jit
def merged(partial, r, SPLITS, PAD: tl.constexpr):
    """(best score of a row, can nothing be drawn?)"""
    s = tl.arange(0, PAD)
    best = tl.load(partial.best + r * SPLITS + s, mask=s < SPLITS, other=NEGATIVE)
    bad = tl.max((best != best).to(tl.int32), 0) != 0
    peak = tl.max(tl.where(best == best, best, NEGATIVE), 0)
    return peak, bad | (peak == NEGATIVE)


@triton.jit
def token_of(partial, r, peak, SPLITS, PAD: tl.constexpr):
    """The lowest id with a row's best score."""
    s = tl.arange(0, PAD)
    best = tl.load(partial.best + r * SPLITS + s, mask=s < SPLITS, other=NEGATIVE)
    ids = tl.load(partial.ids + r * SPLITS + s, mask=s < SPLITS, other=2**31 - 1)
    return tl.min(tl.where(best == peak, ids, 2**31 - 1), 0)


@triton.jit
def floor_of(rows, r, peak):
    """The lowest score that min-p keeps; no more than finite scores without it."""
    log_min_p = tl.load(rows.log_min_p + r)
    return tl.where(log_min_p > NEGATIVE, tl.maximum(peak + log_min_p, FINITE), FINITE)


@triton.jit
def distance(z, peak):
    """How far a score is below the largest; a score that overflowed is the largest, not NaN away from it."""
    return tl.where(z == peak, 0.0, peak - z)


@triton.jit
def bin_of(z, peak):
    return tl.minimum(distance(z, peak) * BINS_PER_UNIT, BINS - 1.0).to(tl.int32)


@triton.jit
def survey_kernel(logits, rows, tables, partial, V, SPLIT: tl.constexpr, PAD: tl.constexpr):
    """Grid (splits, rows). How many tokens of a split that min-p keeps lie in each bin, and their mass."""
    s, r = tl.program_id(0), tl.program_id(1)
    if tl.load(rows.slot + r) >= 0 and is_filtered(rows, r, V):
        splits = tl.num_programs(0)
        peak, broken = merged(partial, r, splits, PAD)
        if broken == 0:
            ids = s * SPLIT + tl.arange(0, SPLIT)
            z = scores(logits, ids, ids < V, r, rows, tables, V)
            kept = (ids < V) & (z >= floor_of(rows, r, peak))
            counts = tl.histogram(tl.where(kept, bin_of(z, peak), 0), BINS, mask=kept)
            out = r * splits + s
            tl.store(partial.bins + out * BINS + tl.arange(0, BINS), counts.to(tl.int16))
            tl.store(partial.mass + out, tl.sum(tl.where(kept, tl.exp(-distance(z, peak)), 0.0), 0))


@triton.jit
def mass_of_row(partial, r, splits, PAD: tl.constexpr):
    s = tl.arange(0, PAD)
    return tl.sum(tl.load(partial.mass + r * splits + s, mask=s < splits, other=0.0), 0)


@triton.jit
def enough(rows, r, totals, mass, V):
    """The last bin that may hold a token to keep, given how many tokens each bin holds."""
    b = tl.arange(0, BINS)
    k, p = tl.load(rows.top_k + r), tl.load(rows.top_p + r)
    if (k > 0) & (k < V):
        found = tl.cumsum(totals, 0) >= tl.minimum(k, tl.sum(totals, 0))
    else:  # what lies beyond a bin weighs at most as if it lay at the near edge of its own
        most = totals.to(tl.float32) * tl.exp(-b.to(tl.float32) / BINS_PER_UNIT)
        tail = tl.sum(most, 0) - tl.cumsum(most, 0)
        found = tail <= tl.where(p < 1.0, (1.0 - p - SLACK) * mass, NEGATIVE)
    return tl.min(tl.where(found, b, BINS - 1), 0)


@triton.jit
def list_kernel(
    logits, rows, tables, partial, V, SPLIT: tl.constexpr, PAD: tl.constexpr, GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Grid (splits, rows). The ids and scores of tokens that may be kept, unless they are more than CAPACITY.

    `partial.found` gets [how many there are, the last bin they lie in].
    """
    s, r = tl.program_id(0), tl.program_id(1)
    if tl.load(rows.slot + r) >= 0 and is_filtered(rows, r, V):
        splits = tl.num_programs(0)
        peak, broken = merged(partial, r, splits, PAD)
        if broken == 0:
            b = tl.arange(0, BINS)
            totals, before = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
            for start in range(0, splits, GROUP):
                other = start + tl.arange(0, GROUP)[:, None]
                at = partial.bins + (r * splits + other) * BINS + b[None, :]
                counts = tl.load(at, mask=other < splits, other=0).to(tl.int32)
                totals += tl.sum(counts, 0)
                before += tl.sum(tl.where(other < s, counts, 0), 0)
            last = enough(rows, r, totals, mass_of_row(partial, r, splits, PAD), V)
            count = tl.sum(tl.where(b <= last, totals, 0), 0)
            if s == 0:
                tl.store(partial.found + 2 * r, count)
                tl.store(partial.found + 2 * r + 1, last)
            if count <= CAPACITY:
                ids = s * SPLIT + tl.arange(0, SPLIT)
                z = scores(logits, ids, ids < V, r, rows, tables, V)
                kept = (ids < V) & (z >= floor_of(rows, r, peak))
                kept = kept & (tl.where(kept, bin_of(z, peak), BINS) <= last)
                at = r * CAPACITY + tl.sum(tl.where(b <= last, before, 0), 0) + tl.cumsum(kept.to(tl.int32), 0) - 1
                tl.store(partial.list_ids + at, ids, mask=kept)
                tl.store(partial.list_scores + at, z, mask=kept)


@triton.jit
def key_of(z):
    """An int32 that orders as the float does; both zeros have one."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def candidates(logits, i, count, listed, r, rows, tables, partial, V, CAPACITY: tl.constexpr):
    """(scores, keys) of candidates i; keys are LOWEST beyond `count`."""
    ok = i < count
    if listed:
        z = tl.load(partial.list_scores + r * CAPACITY + i, mask=ok, other=NEGATIVE)
    else:
        z = scores(logits, i, ok, r, rows, tables, V)
    return z, tl.where(ok, key_of(z), LOWEST)
