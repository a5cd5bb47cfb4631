"""The definition of a draw, in numpy: the order of operations and the noise.

A backend's sampler must give the same token from the same float32 logits. Order (vLLM's): logit bias and bans,
penalties, temperature, min-p, top-k, top-p, then Gumbel-max (the largest of z/T + noise, which samples softmax(z/T)
exactly). Every threshold keeps its ties; top-p keeps the token that crosses it; at least one token is always kept.
Temperature 0 skips everything after the penalties and takes the largest logit, the lowest id among equals.

Thresholds leave few tokens, and each has noise of its own. Without them a large vocabulary would need a hundred
thousand numbers for one token. Such a row draws a block of neighbours by Gumbel-max over the blocks' sums, and then a
token of that block (`draw_by_blocks`): softmax(z/T) as exactly, with a hundredth of the noise.

Noise depends on (seed, position, sample index, token id or block) and on nothing else: not on the batch, the step or
the device. Gumbel-max and not inverse CDF because a logit error of 1e-3 between devices then changes 0.07 % of the
draws instead of 5 to 16 %.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cortexstream.constraint import Mask
from cortexstream.outputs import TokenMetadata
from cortexstream.plan import SampleSpec

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.uint32]

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF
TOKENS, BLOCKS = 0, 1  # the last word of the counter: noise for every token, or for a block's places and the blocks
BLOCK = 128  # token ids; near the square root of large vocabularies, and a multiple of what a GPU's warp holds


def philox(
    seed: int | npt.NDArray[np.uint64], counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]
) -> tuple[Ints, Ints, Ints, Ints]:
    """Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    `seed` is the 64-bit key, low word first. It and the four words of the counter, integers of 32 bits, broadcast
    against each other. Returns four uint32 arrays.
    """
    words: list[Any] = [np.asarray(word, np.uint64) for word in counter]
    c0, c1, c2, c3 = words
    low, high = seed & WORD, seed >> 32 & WORD
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c2 = (p1 >> 32) ^ (c1 ^ low), (p0 >> 32) ^ (c3 ^ high)
        c1, c3 = p1 & WORD, p0 & WORD
        low, high = (low + PHILOX_W[0]) & WORD, (high + PHILOX_W[1]) & WORD
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def noise(seed: int, position: int, index: int, count: int, kind: int = TOKENS) -> Floats:
    """Gumbel(0, 1) noise, float32 [count].

    TOKENS: entry i is that of token i. BLOCKS: the first BLOCK entries are those of a block's places, whichever block
    is drawn, and those after them of the blocks. Bits: Philox with counter (i // 4, position, index, kind), lane i % 4.
    """
    lanes = philox(seed, (np.arange(-(-count // 4)), position, index, kind))
    return gumbel(np.stack(lanes, axis=1).reshape(-1)[:count])


def noise_count(vocab_size: int) -> int:
    """How much noise of kind BLOCKS a draw from so many tokens takes."""
    return BLOCK + -(-vocab_size // BLOCK)


def gumbel(bits: Ints) -> Floats:
    """Gumbel(0, 1) noise from 32 random bits each, between -2.82 and 22.88.

    u = (bits + 1/2) / 2^32 in float32, kept below 1, and noise = -log(-log1p(-u)): small u, where the large noise is,
    keeps all 32 bits.
    """
    u = bits.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    u = np.minimum(u, np.float32(1 - 2.0**-24))
    result: Floats = -np.log(-np.log1p(-u))
    return result


def draw(logits: Floats, spec: SampleSpec, position: int) -> int:
    """The token that `spec` draws for `position` from float32 logits [vocab_size].

    Defined where `bias` leaves a finite maximum: without NaN and +inf, and with one finite logit at least. Backends
    look first and draw nothing from other rows. Those that draw many rows on the host use
    `backends.common.fast_draw`, which gives the same tokens.
    """
    z = process(logits, spec)
    if spec.temperature == 0.0:
        return int(np.argmax(z))
    if spec.filtered(len(z)):
        return int(np.argmax(z + noise(spec.seed, position, spec.sample_index, len(z))))
    return draw_by_blocks(z, noise(spec.seed, position, spec.sample_index, noise_count(len(z)), BLOCKS))


def draw_by_blocks(z: Floats, noise: Floats) -> int:
    """A token by scores [vocab_size] and noise of kind BLOCKS: the best token of the best block; of equals the first.

    The top-down way to Gumbel-max (Maddison, Tarlow, Minka, "A* sampling", NIPS 2014): the largest of a block's noisy
    scores is distributed as the log of its summed exp(score) with noise.
    """
    blocks = in_blocks(z)
    best = int(np.argmax(log_sums(blocks) + noise[BLOCK:]))
    return best * BLOCK + int(np.argmax(blocks[best] + noise[:BLOCK]))


def in_blocks(z: Floats) -> Floats:
    """Scores [vocab_size] as [n, BLOCK], with -inf beyond the last."""
    left = -len(z) % BLOCK
    return (np.append(z, np.full(left, -np.inf, np.float32)) if left else z).reshape(-1, BLOCK)


def log_sums(blocks: Floats) -> Floats:
    """log(sum(exp(score))) of each of [n, BLOCK], float32 [n]; +inf for a block with scores of +inf."""
    peaks = blocks.max(axis=1)
    with np.errstate(invalid="ignore"):  # inf - inf
        below = blocks - peaks[:, None]
    if not np.isfinite(peaks).all():
        below[blocks == peaks[:, None]] = 0.0
    sums: Floats = peaks + np.log(np.exp(below, out=below).sum(axis=1))
    return sums


def process(logits: Floats, spec: SampleSpec) -> Floats:
    """Everything but the draw: float32 [vocab_size], -inf where a token cannot be drawn."""
    z = penalise(bias(logits.astype(np.float32), spec), spec)
    return z if spec.temperature == 0.0 else keep(z / np.float32(spec.temperature), spec)


def bias(z: Floats, spec: SampleSpec) -> Floats:
    """Add the logit bias; banned tokens, and those outside of the mask, become -inf."""
    if spec.logit_bias or spec.banned:
        z = z.copy()
        for token, value in spec.logit_bias:
            z[token] += np.float32(value)
        z[list(spec.banned)] = -np.inf
    if spec.mask is not None:
        z = np.where(unpack(spec.mask(), len(z)), z, np.float32(-np.inf))
    return z


def unpack(mask: Mask, vocab_size: int) -> npt.NDArray[np.bool_]:
    """A mask's bits as bool [vocab_size]."""
    bits = np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), count=vocab_size, bitorder="little")
    return bits.view(np.bool_)


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
    alive = z[z > -np.inf]
    if spec.top_p < 1.0 and len(alive):  # a low temperature may take all that is very negative to -inf
        descending = -np.sort(-alive)
        mass = np.exp(alive - descending[0]).sum(dtype=np.float32)
        held = np.cumsum(np.exp(descending - descending[0]) / mass, dtype=np.float32)
        last = descending[np.count_nonzero(held[:-1] < np.float32(spec.top_p))]
        z = np.where(z >= last, z, -np.inf).astype(np.float32)
    return z


class Description(NamedTuple):
    """What is told about a drawn token; fields as in `cortexstream.plan.RowResult`."""

    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    metadata: TokenMetadata | None


def describe(logits: Floats, spec: SampleSpec, token: int) -> Description:
    """What `spec` wants to know of a token that was drawn from float32 logits [vocab_size]."""
    raw = log_softmax(logits)
    processed = log_softmax(process(logits, spec)) if spec.needs_logits else raw
    logprobs = processed if spec.processed else raw
    metadata = None
    if spec.metadata:
        held = np.exp(raw)
        entropy = -float(np.sum(held * np.where(held > 0.0, raw, 0.0), dtype=np.float32))
        chosen = 1.0 if spec.temperature == 0.0 else float(np.exp(processed[token]))
        metadata = TokenMetadata(entropy, chosen, int(np.count_nonzero(np.isneginf(processed))))
    if spec.logprobs is None:
        return Description(None, (), metadata)
    top = top_logprobs(logprobs, spec.logprobs)
    if spec.processed:  # what was filtered out is none of the likeliest
        top = tuple(pair for pair in top if pair[1] > -np.inf)
    return Description(float(logprobs[token]), top, metadata)


def log_softmax(logits: Floats) -> Floats:
    """Natural log of the distribution that logits stand for, float32 [vocab_size]."""
    z = logits.astype(np.float32) - logits.max()
    result: Floats = z - np.log(np.exp(z).sum(dtype=np.float32))
    return result


def top_logprobs(logprobs: Floats, k: int) -> tuple[tuple[int, float], ...]:
    """The k likeliest tokens as (id, logprob), likeliest first, lower id first among equals."""
    order = np.argsort(-logprobs, kind="stable")[:k]
    return tuple((int(i), float(logprobs[i])) for i in order)
