"""The draw on the device: `cortexstream.sampling` in torch, all rows of a batch at once.

Sums over the vocabulary are taken as the last of a cumulative sum: torch may add up a single row in another order than
several, and a row's draw must not depend on the others. Those of a block of 128 have the same bits in any batch, on a
CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cortexstream.constraint import Mask
from cortexstream.plan import PENDING, SampleSpec
from cortexstream.sampling import BLOCK, BLOCKS, PHILOX_M, PHILOX_ROUNDS, PHILOX_W, TOKENS, WORD, noise_count

FEW = 1024  # a top-k up to this is found without sorting the vocabulary
EVERYTHING = np.uint32(WORD)  # a word of a mask that allows all


Way = Callable[[torch.Tensor, Sequence[SampleSpec], Sequence[int]], torch.Tensor]
"""(logits after penalties float32 [rows, vocabulary], specs, positions) -> tokens int64 [rows]"""


def draw(
    logits: torch.Tensor, specs: Sequence[SampleSpec], positions: Sequence[int], pending: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row from float32 logits [rows, vocabulary]: tokens int64 [rows], broken bool [rows].

    `positions` are those of the drawn tokens. `pending[i]` is the token (a scalar) that PENDING stands for in row i. A
    row is broken if its logits with their bias hold NaN or +inf, or nothing finite; its token is 0. Each mask is called
    once. Raises ValueError when a penalised row has a PENDING without its token.
    """
    z = bias(logits, specs)
    broken = ~torch.isfinite(z.amax(-1))  # a NaN is the maximum of its row
    z = _penalise(z, specs, pending)
    tokens = torch.empty(len(specs), dtype=torch.int64, device=z.device)
    ways: dict[Way, list[int]] = {}
    for row, spec in enumerate(specs):
        ways.setdefault(_way_of(spec, z.shape[1]), []).append(row)
    for way, rows in ways.items():
        drawn = way(_rows(z, rows), [specs[row] for row in rows], [positions[row] for row in rows])
        if len(ways) == 1:
            tokens = drawn
        else:
            tokens[torch.tensor(rows, device=z.device)] = drawn
    return tokens.masked_fill(broken, 0), broken


def _way_of(spec: SampleSpec, vocab_size: int) -> Way:
    if spec.temperature == 0.0:
        return _greedy
    return _draw_filtered if spec.filtered(vocab_size) else _draw_by_blocks


def _greedy(z: torch.Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> torch.Tensor:
    return torch.argmax(z, dim=-1)  # the lowest index of equals: asserted by a test


def _draw_filtered(z: torch.Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> torch.Tensor:
    scores = _keep(_tempered(z, specs), specs)
    return torch.argmax(scores + noise(specs, positions, z.shape[1], z.device), dim=-1)


def _draw_by_blocks(z: torch.Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> torch.Tensor:
    """As `cortexstream.sampling.draw_by_blocks` has it."""
    scores, left = _tempered(z, specs), -z.shape[1] % BLOCK
    padded = torch.nn.functional.pad(scores, (0, left), value=-torch.inf) if left else scores
    blocks = padded.view(len(specs), -1, BLOCK)
    sums = torch.logsumexp(blocks, dim=-1)
    found = noise(specs, positions, noise_count(z.shape[1]), z.device, BLOCKS)
    best = torch.argmax(sums + found[:, BLOCK:], dim=-1)
    places = blocks[torch.arange(len(specs), device=z.device), best] + found[:, :BLOCK]
    return best * BLOCK + torch.argmax(places, dim=-1)


def noise(
    specs: Sequence[SampleSpec], positions: Sequence[int], count: int, device: torch.device, kind: int = TOKENS
) -> torch.Tensor:  # fmt: skip
    """Gumbel noise float32 [rows, count]; bit for bit the words of `cortexstream.sampling.noise`."""
    keys = [
        [s.seed & WORD for s in specs], [s.seed >> 32 & WORD for s in specs], list(positions),
        [s.sample_index for s in specs],
    ]  # fmt: skip
    low, high, c1, c2 = torch.tensor(keys, dtype=torch.int64).to(device)[:, :, None]
    c0 = torch.arange(-(-count // 4), device=device)[None]
    c3 = torch.full_like(c1, kind)
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]  # modulo 2**64, of which the upper half is wanted unsigned
        c0, c2 = (p1 >> 32 & WORD) ^ (c1 ^ low), (p0 >> 32 & WORD) ^ (c3 ^ high)
        c1, c3 = p1 & WORD, p0 & WORD
        low, high = (low + PHILOX_W[0]) & WORD, (high + PHILOX_W[1]) & WORD
    bits = torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :count]
    u = bits.float() * 2.0**-32 + 2.0**-33
    return -torch.log(-torch.log1p(-u.clamp_max(1 - 2.0**-24)))


def bias(z: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Logits with their biases, -inf where a token is banned or outside of its row's mask."""
    biased = [(r, token, value) for r, spec in enumerate(specs) for token, value in spec.logit_bias]
    banned = [(r, token) for r, spec in enumerate(specs) for token in spec.banned]
    if biased or banned:
        z = z.clone()
    if biased:
        rows, tokens, values = zip(*biased, strict=True)
        where = torch.tensor(rows, device=z.device), torch.tensor(tokens, device=z.device)
        z[where] += torch.tensor(values, dtype=torch.float32, device=z.device)
    if banned:
        rows, tokens = zip(*banned, strict=True)
        where = torch.tensor(rows, device=z.device), torch.tensor(tokens, device=z.device)
        z.index_put_(where, z.new_full((), -torch.inf))  # a number would wait: it comes from the host
    masks = {row: spec.mask() for row, spec in enumerate(specs) if spec.mask is not None}
    return torch.where(allowed(masks, len(specs), z), z, -torch.inf) if masks else z


def allowed(masks: dict[int, Mask], num_rows: int, like: torch.Tensor) -> torch.Tensor:
    """What masks allow, bool [num_rows, vocabulary]: all in a row without one. Their words are sent, not their bits."""
    words = np.full((num_rows, -(-like.shape[1] // 32)), EVERYTHING)
    for row, mask in masks.items():
        words[row] = mask
    host = torch.from_numpy(words.view(np.int32))
    sent = host.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else host
    bits = sent[:, :, None] >> torch.arange(32, dtype=torch.int32, device=like.device) & 1
    return bits.flatten(1)[:, : like.shape[1]].bool()


def _rows(z: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    return z if len(rows) == z.shape[0] else z[torch.tensor(rows, device=z.device)]


def _tempered(z: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    return z / _column([spec.temperature for spec in specs], z)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _penalise(z: torch.Tensor, specs: Sequence[SampleSpec], pending: Sequence[torch.Tensor | None]) -> torch.Tensor:
    penalised = [row for row, spec in enumerate(specs) if spec.penalised]
    if not penalised:
        return z
    known = [_known(spec) for spec in specs]
    count, one = torch.zeros_like(z), torch.ones((), device=z.device)
    count.index_put_(_pairs(penalised, known, z.device), one, accumulate=True)
    for row in penalised:
        last = pending[row]
        if len(known[row]) < len(specs[row].output_tokens):
            if last is None:
                raise ValueError("a penalised row has a pending token, but its slot drew none")
            count[row].index_add_(0, last.view(1), one.view(1))
    used = count > 0
    used.index_put_(_pairs(penalised, [spec.prompt_tokens for spec in specs], z.device), used.new_ones(()))
    repetition, frequency, presence = torch.tensor(
        [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in specs], dtype=torch.float32
    ).to(z.device).T[:, :, None]  # fmt: skip
    z = torch.where(used, torch.where(z > 0, z / repetition, z * repetition), z)
    return z - frequency * count - presence * (count > 0)


def _known(spec: SampleSpec) -> tuple[int, ...]:
    """The output's tokens but for a PENDING, which may only be the last."""
    return spec.output_tokens[:-1] if spec.output_tokens[-1:] == (PENDING,) else spec.output_tokens


def _pairs(rows: Sequence[int], tokens: Sequence[tuple[int, ...]], device: torch.device) -> list[torch.Tensor]:
    """Row and token of each of the rows' tokens, for use as an index."""
    row = np.repeat(np.array(rows, np.int64), [len(tokens[row]) for row in rows])
    pairs = np.stack((row, np.concatenate([np.array(tokens[row], np.int64) for row in rows])))
    return list(torch.from_numpy(pairs).to(device))


def _keep(z: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    if any(spec.min_p > 0.0 for spec in specs):
        floor = _column([float(np.float32(np.log(s.min_p))) if s.min_p > 0.0 else -np.inf for s in specs], z)
        floor = torch.where(floor > -torch.inf, z.amax(-1, keepdim=True) + floor, floor)  # not inf - inf
        z = torch.where(z >= floor, z, -torch.inf)
    cut = [row for row, spec in enumerate(specs) if spec.top_p < 1.0 or 0 < spec.top_k < z.shape[1]]
    if not cut:
        return z
    threshold = torch.full_like(z[:, :1], -torch.inf)
    threshold[torch.tensor(cut, device=z.device)] = _threshold(_rows(z, cut), [specs[row] for row in cut])
    return torch.where(z >= threshold, z, -torch.inf)


def _threshold(z: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """The lowest score that top-k and top-p keep, float32 [rows, 1]."""
    vocab_size = z.shape[1]
    counts = [spec.top_k if 0 < spec.top_k < vocab_size else vocab_size for spec in specs]
    if max(counts) <= FEW:  # all rows have a top-k, or the vocabulary is small
        descending = z.topk(max(counts), dim=-1).values
    else:
        descending = z.sort(dim=-1, descending=True).values
    last = torch.tensor(counts, device=z.device)[:, None] - 1
    lowest = descending.gather(1, last)
    if all(spec.top_p == 1.0 for spec in specs):
        return lowest
    peak = descending[:, :1]
    held = torch.exp(descending - peak).cumsum(-1)
    ties = (z >= lowest).sum(-1, keepdim=True) - 1 - last  # that top-k keeps beyond its k
    mass = held.gather(1, last) + ties * torch.exp(lowest - peak)
    # A row with top-p off keeps everything whatever the sum.
    share = _column([spec.top_p if spec.top_p < 1.0 else np.inf for spec in specs], z)
    crossing = (held < share * mass).sum(-1, keepdim=True).minimum(last)
    return descending.gather(1, crossing)
