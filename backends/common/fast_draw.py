"""Draws of many rows on the host: the tokens of `cortexstream.sampling.draw`, every one, for less work.

What is left out cannot change a draw:

* Penalties touch only the tokens that occurred.
* A token that a threshold drops needs no noise. What may be above the thresholds is found by one comparison with a
  bound that is never too high (`_top_k_bound`, `_nucleus_threshold`); the thresholds are then taken among these few.
* Without thresholds, a block whose largest score is too low for its noise is not summed (`_draw_by_blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cortexstream import sampling
from cortexstream.plan import SampleSpec

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

NOTHING = -1
"""In place of a token: nothing can be drawn."""

LOWEST = np.finfo(np.float32).min
ABOVE = np.float32(np.log(sampling.BLOCK) + 0.001)
SMALL = 4096  # vocabularies of which all rows are drawn from together
STRIPES = 1024  # whose maxima bound the k-th largest


class Candidates(NamedTuple):
    """What the thresholds leave to row `row`; ids rise."""

    row: int
    ids: Ints
    scores: Floats  # tempered


def draw(logits: Floats, specs: Sequence[SampleSpec], positions: Sequence[int]) -> Ints:
    """Draw row i of float32 logits [R, V] by `specs[i]` for `positions[i]`; int64 [R].

    NOTHING stands for rows whose logits with their bias hold NaN or +inf, or nothing finite. Calls each `mask` once.
    Raises ValueError for an empty vocabulary.
    """
    tokens: Ints = logits.argmax(axis=1)
    peaks = logits[np.arange(len(tokens)), tokens]  # a NaN is the maximum of its row
    few: list[Candidates] = []
    whole: list[tuple[int, Floats]] = []
    with np.errstate(over="ignore"):  # a score beyond float32 is +inf or -inf, as defined
        for r, spec in enumerate(specs):
            z, peak = logits[r], peaks[r]
            if spec.logit_bias or spec.banned or spec.mask is not None:
                z = sampling.bias(z, spec)
                tokens[r] = z.argmax()
                peak = z[tokens[r]]
            if not np.isfinite(peak):
                tokens[r] = NOTHING
                continue
            if spec.penalised:
                z = penalise(z, spec)
                tokens[r] = z.argmax()
            if spec.temperature == 0.0:
                continue
            if spec.filtered(len(z)):
                few.append(_candidates(r, z, z[tokens[r]], spec))
            else:
                whole.append((r, z))
        _draw_few(tokens, few, specs, positions)
        _draw_whole(tokens, whole, specs, positions)
    return tokens


def penalise(z: Floats, spec: SampleSpec) -> Floats:
    """`sampling.penalise` at the tokens that occurred; the others are copied."""
    output = np.array(spec.output_tokens, np.int64)
    used = np.concatenate((np.array(spec.prompt_tokens, np.int64), output))
    z = z.copy()
    at, repetition = z[used], np.float32(spec.repetition_penalty)
    z[used] = np.where(at > 0, at / repetition, at * repetition)
    ids, counts = np.unique(output, return_counts=True)
    z[ids] = z[ids] - np.float32(spec.frequency_penalty) * counts.astype(np.float32) - np.float32(spec.presence_penalty)
    return z


def _candidates(row: int, z: Floats, largest: np.float32, spec: SampleSpec) -> Candidates:
    """`largest` is that of the penalised logits `z`."""
    scores, peak = z / np.float32(spec.temperature), largest / np.float32(spec.temperature)
    if np.isinf(peak):  # of the scores that overflowed the first wins, whatever its noise
        first = int(scores.argmax())
        return Candidates(row, np.array([first]), scores[first : first + 1])
    by_count = 0 < spec.top_k < len(scores)
    floor = max(LOWEST, peak + np.float32(np.log(spec.min_p))) if spec.min_p > 0.0 else LOWEST
    if by_count:
        floor = max(floor, _top_k_bound(scores, spec.top_k))
    left = scores[scores >= floor]
    if by_count and len(left) > spec.top_k:
        floor = np.partition(left, -spec.top_k)[-spec.top_k]
        left = left[left >= floor]
    if spec.top_p < 1.0:
        floor = _nucleus_threshold(left, peak, spec.top_p)
    ids = np.flatnonzero(scores >= floor)
    return Candidates(row, ids, scores[ids])


def _top_k_bound(scores: Floats, k: int) -> np.float32:
    """At most the k-th largest score: k stripes of tokens have a maximum that is not lower."""
    width = len(scores) // STRIPES
    if width < 2 or k > STRIPES // 2:
        return np.float32(np.partition(scores, -k)[-k])
    maxima = scores[: width * STRIPES].reshape(width, STRIPES).max(axis=0)
    return np.float32(np.partition(maxima, -k)[-k])


def _nucleus_threshold(alive: Floats, peak: np.float32, top_p: float) -> np.float32:
    """The score of the token that crosses `top_p`, as `sampling.keep` has it."""
    mass = np.exp(alive - peak).sum(dtype=np.float32)
    # Tokens of less than the share's n-th part weigh less than it together. Most often a higher bound is low enough.
    share = np.float32(max(1.0 - top_p, 1e-9)) * mass / np.float32(len(alive))
    for bound in (peak + np.log(32 * share), peak + np.log(share), LOWEST):
        descending = -np.sort(-alive[alive >= bound])
        held = np.cumsum(np.exp(descending - peak) / mass, dtype=np.float32)
        if len(held) and held[-1] >= np.float32(top_p):
            break  # what comes after it is not counted
    return np.float32(descending[np.count_nonzero(held[:-1] < np.float32(top_p))])


def _keys(rows: Sequence[int], specs: Sequence[SampleSpec], positions: Sequence[int]) -> tuple[Words, Words, Words]:
    """Seeds, positions and sample indices of rows, uint64 [rows] each."""
    columns = [specs[r].seed for r in rows], [positions[r] for r in rows], [specs[r].sample_index for r in rows]
    seed, position, sample = (np.array(column, np.uint64) for column in columns)
    return seed, position, sample


def _draw_few(
    tokens: Ints, few: Sequence[Candidates], specs: Sequence[SampleSpec], positions: Sequence[int]
) -> None:  # fmt: skip
    """Noise for the candidates of all rows in one go; four neighbours share a counter."""
    if not few:
        return
    sizes = np.array([len(found.ids) for found in few])
    ids, place = np.concatenate([found.ids for found in few]), np.repeat(np.arange(len(few)), sizes)
    group = ids // 4
    fresh = np.ones(len(ids), bool)
    fresh[1:] = (group[1:] != group[:-1]) | (place[1:] != place[:-1])
    seed, position, sample = (key[place[fresh]] for key in _keys([found.row for found in few], specs, positions))
    words = np.stack(sampling.philox(seed, (group[fresh], position, sample, sampling.TOKENS)))
    scores = np.concatenate([found.scores for found in few])
    scores += sampling.gumbel(words[ids % 4, np.cumsum(fresh) - 1])
    end = 0
    for found in few:
        start, end = end, end + len(found.ids)
        tokens[found.row] = found.ids[scores[start:end].argmax()]


def _draw_whole(
    tokens: Ints, whole: Sequence[tuple[int, Floats]], specs: Sequence[SampleSpec], positions: Sequence[int]
) -> None:  # fmt: skip
    """Noise for the places and blocks of all rows in one go."""
    if not whole:
        return
    count = sampling.noise_count(len(whole[0][1]))
    seed, position, sample = (key[:, None] for key in _keys([row for row, _ in whole], specs, positions))
    lanes = sampling.philox(seed, (np.arange(-(-count // 4)), position, sample, sampling.BLOCKS))
    noise = sampling.gumbel(np.stack(lanes, axis=2).reshape(len(whole), -1)[:, :count])
    if len(whole[0][1]) <= SMALL:
        rows = [row for row, _ in whole]
        temperatures = np.array([specs[row].temperature for row in rows], np.float32)
        tokens[rows] = _draw_together(np.stack([z for _, z in whole]) / temperatures[:, None], noise)
        return
    for (row, z), own in zip(whole, noise, strict=True):
        tokens[row] = _draw_by_blocks(z / np.float32(specs[row].temperature), own)


def _draw_together(scores: Floats, noise: Floats) -> Ints:
    """`sampling.draw_by_blocks` of each row of scores [R, V] by its row of noise; int64 [R]."""
    size, (rows, vocab_size) = sampling.BLOCK, scores.shape
    padded = np.full((rows, (noise.shape[1] - size) * size), -np.inf, np.float32)
    padded[:, :vocab_size] = scores
    sums = sampling.log_sums(padded.reshape(-1, size)).reshape(rows, -1)
    best: Ints = np.argmax(sums + noise[:, size:], axis=1)
    places = padded.reshape(rows, -1, size)[np.arange(rows), best] + noise[:, :size]
    tokens: Ints = best * size + np.argmax(places, axis=1)
    return tokens


def _draw_by_blocks(scores: Floats, noise: Floats) -> int:
    """`sampling.draw_by_blocks`, which sums no block that cannot be the best: the log of a sum lies at most log(BLOCK)
    above the largest score. Rounding keeps the order of what is compared."""
    size = sampling.BLOCK
    blocks, bonus = sampling.in_blocks(scores), noise[size:]
    peaks = np.maximum.reduceat(blocks.reshape(-1), np.arange(0, blocks.size, size))
    able = np.flatnonzero((peaks + ABOVE) + bonus >= (peaks + bonus).max())
    best = able[np.argmax(sampling.log_sums(blocks[able]) + bonus[able])]
    return int(best * size + np.argmax(blocks[best] + noise[:size]))
