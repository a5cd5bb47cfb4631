"""The draw on the device: `cortexstream.sampling` in MLX ops, all rows of a batch at once.

Sums over the vocabulary are taken as the last of a cumulative sum, whose order does not depend on the other rows; those
of a block of 128 are the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from cortexstream.plan import PENDING, SampleSpec
from cortexstream.sampling import BLOCK, BLOCKS, PHILOX_M, PHILOX_ROUNDS, PHILOX_W, TOKENS, WORD, noise_count

FEW = 1024  # a top-k up to this is found by partition, without sorting the vocabulary
EVERYTHING = np.uint32(WORD)  # a word of a mask that allows all


Way = Callable[[mx.array, Sequence[SampleSpec], Sequence[int]], mx.array]
"""(logits after penalties float32 [rows, vocabulary], specs, positions) -> tokens [rows]"""


def draw(
    logits: mx.array, specs: Sequence[SampleSpec], positions: Sequence[int], pending: Sequence[mx.array | None]
) -> tuple[mx.array, mx.array]:
    """Draw one token per row from float32 logits [rows, vocabulary]: tokens int32 [rows], broken bool [rows].

    `positions` are those of the drawn tokens. `pending[i]` is the token (scalar array) that PENDING stands for in row
    i. A row is broken if its logits with their bias hold NaN or +inf, or nothing finite; its token is 0. Each mask is
    called once. Raises ValueError when a penalised row has a PENDING without its token.
    """
    z = _bias(logits, specs)
    broken = ~mx.isfinite(mx.max(z, axis=-1))  # a NaN is the maximum of its row
    z = _penalise(z, specs, pending)
    tokens = mx.zeros(len(specs), mx.int32)
    ways: dict[Way, list[int]] = {}
    for row, spec in enumerate(specs):
        ways.setdefault(_way_of(spec, z.shape[1]), []).append(row)
    for way, rows in ways.items():
        drawn = way(_rows(z, rows), [specs[row] for row in rows], [positions[row] for row in rows]).astype(mx.int32)
        if len(ways) == 1:
            tokens = drawn
        else:
            tokens[mx.array(rows)] = drawn
    return mx.where(broken, 0, tokens), broken


def _way_of(spec: SampleSpec, vocab_size: int) -> Way:
    if spec.temperature == 0.0:
        return _greedy
    return _draw_filtered if spec.filtered(vocab_size) else _draw_by_blocks


def _greedy(z: mx.array, specs: Sequence[SampleSpec], positions: Sequence[int]) -> mx.array:
    return mx.argmax(z, axis=-1)


def _draw_filtered(z: mx.array, specs: Sequence[SampleSpec], positions: Sequence[int]) -> mx.array:
    return mx.argmax(_keep(_tempered(z, specs), specs) + noise(specs, positions, z.shape[1]), axis=-1)


def _draw_by_blocks(z: mx.array, specs: Sequence[SampleSpec], positions: Sequence[int]) -> mx.array:
    """As `cortexstream.sampling.draw_by_blocks` has it."""
    scores = _tempered(z, specs)
    left = -scores.shape[1] % BLOCK
    padded = mx.pad(scores, ((0, 0), (0, left)), constant_values=-mx.inf) if left else scores
    blocks = padded.reshape(len(specs), -1, BLOCK)
    sums = mx.logsumexp(blocks, axis=-1)
    found = noise(specs, positions, noise_count(z.shape[1]), BLOCKS)
    best = mx.argmax(sums + found[:, BLOCK:], axis=-1)
    places = mx.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0] + found[:, :BLOCK]
    return best * BLOCK + mx.argmax(places, axis=-1)


def noise(specs: Sequence[SampleSpec], positions: Sequence[int], count: int, kind: int = TOKENS) -> mx.array:
    """Gumbel noise float32 [rows, count]; bit for bit the words of `cortexstream.sampling.noise`."""
    keys = [
        [s.seed & WORD for s in specs], [s.seed >> 32 & WORD for s in specs], list(positions),
        [s.sample_index for s in specs],
    ]  # fmt: skip
    low, high, c1, c2 = (mx.array(np.array(key, dtype=np.uint64))[:, None] for key in keys)
    c0 = mx.arange(-(-count // 4), dtype=mx.uint64)[None]
    c3 = mx.full((1, 1), kind, mx.uint64)
    word, shift = mx.array(WORD, mx.uint64), mx.array(32, mx.uint64)
    m0, m1, w0, w1 = (mx.array(v, mx.uint64) for v in (*PHILOX_M, *PHILOX_W))
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c2 = (p1 >> shift) ^ (c1 ^ low), (p0 >> shift) ^ (c3 ^ high)
        c1, c3 = p1 & word, p0 & word
        low, high = (low + w0) & word, (high + w1) & word
    bits = mx.stack([c.astype(mx.uint32) for c in (c0, c1, c2, c3)], axis=-1).reshape(len(specs), -1)[:, :count]
    u = bits.astype(mx.float32) * 2.0**-32 + 2.0**-33
    return -mx.log(-mx.log1p(-mx.minimum(u, 1 - 2.0**-24)))


def log_softmax(logits: mx.array) -> mx.array:
    """Natural log of the raw distribution, float32 [rows, vocabulary]."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _tempered(z: mx.array, specs: Sequence[SampleSpec]) -> mx.array:
    return z / _column([spec.temperature for spec in specs])


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(values, dtype=mx.float32)[:, None]


def _rows(z: mx.array, rows: Sequence[int]) -> mx.array:
    return z if len(rows) == z.shape[0] else z[mx.array(rows)]


def _bias(z: mx.array, specs: Sequence[SampleSpec]) -> mx.array:
    """Logits with their biases, -inf where a token is banned or outside of its row's mask."""
    biased = [(r, token, value) for r, spec in enumerate(specs) for token, value in spec.logit_bias]
    banned = [(r, token) for r, spec in enumerate(specs) for token in spec.banned]
    if biased:
        rows, tokens = mx.array([b[0] for b in biased]), mx.array([b[1] for b in biased])
        z = z.at[rows, tokens].add(mx.array([b[2] for b in biased], dtype=mx.float32))
    if banned:
        rows, tokens = mx.array([b[0] for b in banned]), mx.array([b[1] for b in banned])
        hit = mx.zeros(z.shape, mx.bool_)
        hit[rows, tokens] = True
        z = mx.where(hit, -mx.inf, z)
    if any(spec.mask is not None for spec in specs):
        z = mx.where(_allowed(specs, z.shape[1]), z, -mx.inf)
    return z


def _allowed(specs: Sequence[SampleSpec], vocab_size: int) -> mx.array:
    """What the masks allow, bool [rows, vocabulary]; their words are sent, not their bits."""
    words = np.full((len(specs), -(-vocab_size // 32)), EVERYTHING)
    for row, spec in enumerate(specs):
        if spec.mask is not None:
            words[row] = spec.mask()
    bits = mx.array(words)[:, :, None] >> mx.arange(32, dtype=mx.uint32) & 1
    return bits.reshape(len(specs), -1)[:, :vocab_size] == 1


def _penalise(z: mx.array, specs: Sequence[SampleSpec], pending: Sequence[mx.array | None]) -> mx.array:
    penalised = [row for row, spec in enumerate(specs) if spec.penalised]
    if not penalised:
        return z
    known = [_known(spec) for spec in specs]
    count = mx.zeros(z.shape).at[_pairs(penalised, known)].add(1.0)
    for row in penalised:
        last = pending[row]
        if len(known[row]) < len(specs[row].output_tokens):
            if last is None:
                raise ValueError("a penalised row has a pending token, but its slot drew none")
            count = count.at[row, last].add(1.0)
    used = count > 0
    used[_pairs(penalised, [spec.prompt_tokens for spec in specs])] = True
    repetition = _column([spec.repetition_penalty for spec in specs])
    z = mx.where(used, mx.where(z > 0, z / repetition, z * repetition), z)
    frequency = _column([spec.frequency_penalty for spec in specs])
    presence = _column([spec.presence_penalty for spec in specs])
    return z - frequency * count - presence * (count > 0)


def _known(spec: SampleSpec) -> tuple[int, ...]:
    """The output's tokens but for a PENDING, which may only be the last."""
    return spec.output_tokens[:-1] if spec.output_tokens[-1:] == (PENDING,) else spec.output_tokens


def _pairs(rows: Sequence[int], tokens: Sequence[tuple[int, ...]]) -> tuple[mx.array, mx.array]:
    """Row and token of each of the rows' tokens, for use as an index."""
    row = np.repeat(np.array(rows, np.int32), [len(tokens[row]) for row in rows])
    return mx.array(row), mx.array(np.concatenate([np.array(tokens[row], np.int32) for row in rows]))


def _keep(z: mx.array, specs: Sequence[SampleSpec]) -> mx.array:
    if any(spec.min_p > 0.0 for spec in specs):
        floor = _column([float(np.float32(np.log(s.min_p))) if s.min_p > 0.0 else -np.inf for s in specs])
        floor = mx.where(floor > -mx.inf, mx.max(z, axis=-1, keepdims=True) + floor, floor)  # not inf - inf
        z = mx.where(z >= floor, z, -mx.inf)
    cut = [row for row, spec in enumerate(specs) if spec.top_p < 1.0 or 0 < spec.top_k < z.shape[1]]
    if not cut:
        return z
    threshold = mx.full((z.shape[0], 1), -mx.inf)
    threshold[mx.array(cut)] = _threshold(_rows(z, cut), [specs[row] for row in cut])
    return mx.where(z >= threshold, z, -mx.inf)


def _threshold(z: mx.array, specs: Sequence[SampleSpec]) -> mx.array:
    """The lowest score that top-k and top-p keep, float32 [rows, 1]."""
    vocab_size = z.shape[1]
    counts = [spec.top_k if 0 < spec.top_k < vocab_size else vocab_size for spec in specs]
    # The k likeliest alone, if all rows have a top-k, and it is small.
    likeliest = mx.topk(z, max(counts), axis=-1) if max(counts) <= min(FEW, vocab_size - 1) else z
    descending = -mx.sort(-likeliest, axis=-1)
    last = mx.array([count - 1 for count in counts])[:, None]
    lowest = mx.take_along_axis(descending, last, axis=-1)
    if all(spec.top_p == 1.0 for spec in specs):
        return lowest
    peak = descending[:, :1]
    held = mx.cumsum(mx.exp(descending - peak), axis=-1)
    ties = mx.sum(z >= lowest, axis=-1, keepdims=True) - 1 - last  # that top-k keeps beyond its k
    mass = mx.take_along_axis(held, last, axis=-1) + ties * mx.exp(lowest - peak)
    # A row with top-p off keeps everything whatever the sum.
    share = _column([spec.top_p if spec.top_p < 1.0 else np.inf for spec in specs])
    crossing = mx.minimum(mx.sum(held < share * mass, axis=-1, keepdims=True), last)
    return mx.take_along_axis(descending, crossing, axis=-1)
