"""The definition of a draw, in numpy: the order of operations and the noise.

A backend's sampler must give the same token from the same float32 logits. Order (vLLM's): logit bias and bans,
penalties, temperature, min-p, top-k, top-p, then Gumbel-max (the largest of z/T + noise, which samples softmax(z/T)
exactly). Every threshold keeps its ties; top-p keeps the token that crosses it; at least one token is always kept.
Temperature 0 skips everything after the penalties and takes the largest logit, the lowest id among equals.

The noise of a token depends on (seed, position, sample index, token id) and on nothing else: not on the batch, the step
or the device. Gumbel-max and not inverse CDF because a logit error of 1e-3 between devices then changes 0.07 % of the
draws instead of 5 to 16 %.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cortexstream.plan import SampleSpec

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.uint32]

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10


def philox(seed: int, counter: tuple[Ints, Ints, Ints, Ints]) -> tuple[Ints, Ints, Ints, Ints]:
    """Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    `seed` is the 64-bit key, low word first; the four counter words are uint32 arrays of one shape. Returns four such.
    """
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    word = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * np.uint64(PHILOX_M[0]), c2 * np.uint64(PHILOX_M[1])
        c0, c2 = (p1 >> shift) ^ c1 ^ np.uint64(low), (p0 >> shift) ^ c3 ^ np.uint64(high)
        c1, c3 = p1 & word, p0 & word
        low, high = (low + PHILOX_W[0]) & 0xFFFFFFFF, (high + PHILOX_W[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def noise(seed: int, position: int, index: int, vocab_size: int) -> Floats:
    """Gumbel(0, 1) noise for every token id, float32 [vocab_size].

    Bits: Philox with counter (id // 4, position, index, 0), lane id % 4. Then u = (bits + 1/2) / 2^32 in float32, kept
    below 1, and noise = -log(-log1p(-u)): small u, where the large noise is, keeps all 32 bits.
    """
    counter = np.arange(-(-vocab_size // 4), dtype=np.uint32)
    zero = np.zeros_like(counter)
    lanes = philox(seed, (counter, zero + np.uint32(position), zero + np.uint32(index), zero))
    bits = np.stack(lanes, axis=1).reshape(-1)[:vocab_size]
    u = bits.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    u = np.minimum(u, np.float32(1 - 2.0**-24))
    result: Floats = -np.log(-np.log1p(-u))
    return result


def draw(logits: Floats, spec: SampleSpec, position: int) -> int:
    """The token that `spec` draws for `position` from float32 logits [vocab_size]."""
    z = penalise(bias(logits.astype(np.float32), spec), spec)
    if spec.temperature == 0.0:
        return int(np.argmax(z))
    z = keep(z / np.float32(spec.temperature), spec)
    return int(np.argmax(z + noise(spec.seed, position, spec.sample_index, len(z))))


def bias(z: Floats, spec: SampleSpec) -> Floats:
    """Add the logit bias; banned tokens become -inf."""
    if spec.logit_bias or spec.banned:
        z = z.copy()
        for token, value in spec.logit_bias:
            z[token] += np.float32(value)
        z[list(spec.banned)] = -np.inf
    return z


def penalise(z: Floats, spec: SampleSpec) -> Floats:
    """Repetition penalty over prompt and output (Keskar et al., CTRL, 2019: divide positive, multiply negative logits),
    then frequency (per occurrence) and presence (once) over the output."""
    if not spec.penalised:
        return z
    seen = np.zeros(len(z), bool)
    seen[[*spec.prompt_tokens, *spec.output_tokens]] = True
    rp = np.float32(spec.repetition_penalty)
    z = np.where(seen, np.where(z > 0, z / rp, z * rp), z)
    counts = np.bincount(spec.output_tokens, minlength=len(z)).astype(np.float32)
    z = z - np.float32(spec.frequency_penalty) * counts - np.float32(spec.presence_penalty) * (counts > 0)
    return z.astype(np.float32)


def keep(z: Floats, spec: SampleSpec) -> Floats:
    """min-p, top-k and top-p on tempered logits: what is filtered out becomes -inf."""
    if spec.min_p > 0.0:
        z = np.where(z >= z.max() + np.float32(np.log(spec.min_p)), z, -np.inf).astype(np.float32)
    if 0 < spec.top_k < len(z):
        z = np.where(z >= np.partition(z, -spec.top_k)[-spec.top_k], z, -np.inf).astype(np.float32)
    if spec.top_p < 1.0:
        descending = -np.sort(-z)
        p = np.exp(descending - descending[0])
        p /= p.sum(dtype=np.float32)
        before = np.cumsum(p, dtype=np.float32) - p  # what the likelier tokens already hold
        count = int(np.count_nonzero(before < np.float32(spec.top_p)))
        last = descending[max(count, 1) - 1]  # a top_p below 1e-45 is 0 in float32
        z = np.where(z >= last, z, -np.inf).astype(np.float32)
    return z


def log_softmax(logits: Floats) -> Floats:
    """Natural log of the raw distribution, float32 [vocab_size]."""
    z = logits.astype(np.float32) - logits.max()
    result: Floats = z - np.log(np.exp(z).sum(dtype=np.float32))
    return result


def top_logprobs(logprobs: Floats, k: int) -> tuple[tuple[int, float], ...]:
    """The k likeliest tokens as (id, logprob), likeliest first, lower id first among equals."""
    order = np.argsort(-logprobs, kind="stable")[:k]
    return tuple((int(i), float(logprobs[i])) for i in order)
