"""The draw on the device: `cortexstream.sampling` in MLX ops, all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from cortexstream.plan import PENDING, SampleSpec
from cortexstream.sampling import PHILOX_M, PHILOX_ROUNDS, PHILOX_W

LOW_WORD = 0xFFFFFFFF


def sample(
    logits: mx.array, specs: Sequence[SampleSpec], positions: Sequence[int], pending: Sequence[mx.array | None]
) -> mx.array:
    """Draw one token per row, int32 [rows], from float32 logits [rows, vocabulary].

    `positions` are those of the drawn tokens. `pending[i]` is the token (scalar array) that PENDING stands for in row
    i.
    """
    z = _penalise(_bias(logits, specs), specs, pending)
    greedy = mx.argmax(z, axis=-1).astype(mx.int32)
    hot = [spec.temperature != 0.0 for spec in specs]
    if not any(hot):
        return greedy
    temperature = [spec.temperature if h else 1.0 for spec, h in zip(specs, hot, strict=True)]
    z = _keep(z / _column(temperature), specs)
    drawn = mx.argmax(z + noise(specs, positions, z.shape[1]), axis=-1).astype(mx.int32)
    return drawn if all(hot) else mx.where(mx.array(hot), drawn, greedy)


def noise(specs: Sequence[SampleSpec], positions: Sequence[int], vocab_size: int) -> mx.array:
    """Gumbel noise float32 [rows, vocabulary]; bit for bit the words of `cortexstream.sampling.noise`."""

    def words(values: Sequence[int]) -> mx.array:
        return mx.array(np.array(values, dtype=np.uint64))[:, None]

    seeds = [spec.seed for spec in specs]
    low, high = words([s & LOW_WORD for s in seeds]), words([s >> 32 & LOW_WORD for s in seeds])
    zero = mx.zeros((len(specs), -(-vocab_size // 4)), mx.uint64)
    c0, c1 = zero + mx.arange(zero.shape[1], dtype=mx.uint64)[None], zero + words(positions)
    c2, c3 = zero + words([spec.sample_index for spec in specs]), zero
    word, shift = mx.array(LOW_WORD, mx.uint64), mx.array(32, mx.uint64)
    m0, m1, w0, w1 = (mx.array(v, mx.uint64) for v in (*PHILOX_M, *PHILOX_W))
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        c0, c2 = (p1 >> shift) ^ c1 ^ low, (p0 >> shift) ^ c3 ^ high
        c1, c3 = p1 & word, p0 & word
        low, high = (low + w0) & word, (high + w1) & word
    bits = mx.stack([c0, c1, c2, c3], axis=-1).reshape(len(specs), -1)[:, :vocab_size]
    u = bits.astype(mx.uint32).astype(mx.float32) * 2.0**-32 + 2.0**-33
    return -mx.log(-mx.log1p(-mx.minimum(u, 1 - 2.0**-24)))


def log_softmax(logits: mx.array) -> mx.array:
    """Natural log of the raw distribution, float32 [rows, vocabulary]."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(values, dtype=mx.float32)[:, None]


def _bias(z: mx.array, specs: Sequence[SampleSpec]) -> mx.array:
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
    return z


def _penalise(z: mx.array, specs: Sequence[SampleSpec], pending: Sequence[mx.array | None]) -> mx.array:
    if not any(spec.penalised for spec in specs):
        return z
    seen, counts = zip(
        *(_history(spec, last, z.shape[1]) for spec, last in zip(specs, pending, strict=True)), strict=True
    )
    used, count = mx.stack(seen), mx.stack(counts)
    repetition = _column([spec.repetition_penalty for spec in specs])
    z = mx.where(used, mx.where(z > 0, z / repetition, z * repetition), z)
    frequency = _column([spec.frequency_penalty for spec in specs])
    presence = _column([spec.presence_penalty for spec in specs])
    return z - frequency * count - presence * (count > 0)


def _history(spec: SampleSpec, last: mx.array | None, vocab_size: int) -> tuple[mx.array, mx.array]:
    """(which tokens occurred at all, how often each occurred in the output) of one row."""
    known = [token for token in spec.output_tokens if token != PENDING]
    count = mx.array(np.bincount(known, minlength=vocab_size).astype(np.float32))
    if len(known) < len(spec.output_tokens):
        if last is None:
            raise ValueError("a penalised row has a pending token, but its slot drew none")
        count = count.at[last].add(1.0)
    prompt = np.zeros(vocab_size, bool)
    prompt[list(spec.prompt_tokens)] = True
    return mx.array(prompt) | (count > 0), count


def _keep(z: mx.array, specs: Sequence[SampleSpec]) -> mx.array:
    vocab_size = z.shape[1]
    if any(spec.min_p > 0.0 for spec in specs):
        floor = _column([float(np.float32(np.log(s.min_p))) if s.min_p > 0.0 else -np.inf for s in specs])
        z = mx.where(z >= mx.max(z, axis=-1, keepdims=True) + floor, z, -mx.inf)
    if not any(spec.top_p < 1.0 or 0 < spec.top_k < vocab_size for spec in specs):
        return z
    descending = -mx.sort(-z, axis=-1)
    last = mx.array([(spec.top_k if 0 < spec.top_k < vocab_size else vocab_size) - 1 for spec in specs])[:, None]
    threshold = mx.take_along_axis(descending, last, axis=-1)
    if any(spec.top_p < 1.0 for spec in specs):
        p = mx.exp(mx.where(descending >= threshold, descending, -mx.inf) - descending[:, :1])
        p = p / mx.sum(p, axis=-1, keepdims=True)
        # Rounding may lift the sum of all above 1; a row with top-p off keeps everything whatever the sum.
        share = _column([spec.top_p if spec.top_p < 1.0 else np.inf for spec in specs])
        kept = mx.sum(mx.cumsum(p, axis=-1) - p < share, axis=-1, keepdims=True)
        crossing = mx.maximum(kept - 1, 0)  # a top-p that rounds to 0 still keeps the likeliest
        threshold = mx.maximum(threshold, mx.take_along_axis(descending, crossing, axis=-1))
    return mx.where(z >= threshold, z, -mx.inf)
