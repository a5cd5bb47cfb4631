"""The draw on the device: `cortexstream.sampling` in torch, all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cortexstream.plan import PENDING, SampleSpec
from cortexstream.sampling import PHILOX_M, PHILOX_ROUNDS, PHILOX_W

WORD = 0xFFFFFFFF


def draw(
    logits: torch.Tensor, specs: Sequence[SampleSpec], positions: Sequence[int], pending: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sample`, and which rows are broken, bool [rows]: their logits hold NaN or +inf, or nothing finite."""
    usable = torch.isfinite(bias(logits, specs).amax(-1))  # a NaN is the maximum of its row
    return sample(torch.where(usable[:, None], logits, 0.0), specs, positions, pending), ~usable


def sample(
    logits: torch.Tensor, specs: Sequence[SampleSpec], positions: Sequence[int], pending: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """Draw one token per row, int64 [rows], from float32 logits [rows, vocabulary].

    `positions` are those of the drawn tokens. `pending[i]` is the token (a scalar) that PENDING stands for in row i.
    """
    z = _penalise(bias(logits, specs), specs, pending)
    greedy = torch.argmax(z, dim=-1)  # the lowest index of equals: asserted by a test
    hot = [spec.temperature != 0.0 for spec in specs]
    if not any(hot):
        return greedy
    temperature = _column([spec.temperature if h else 1.0 for spec, h in zip(specs, hot, strict=True)], z)
    z = _keep(z / temperature, specs)
    drawn = torch.argmax(z + noise(specs, positions, z.shape[1], z.device), dim=-1)
    return drawn if all(hot) else torch.where(torch.tensor(hot, device=z.device), drawn, greedy)


def noise(specs: Sequence[SampleSpec], positions: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Gumbel noise float32 [rows, vocabulary]; bit for bit the words of `cortexstream.sampling.noise`."""

    def words(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)[:, None]

    seeds = [spec.seed for spec in specs]
    low, high = words([s & WORD for s in seeds]), words([s >> 32 & WORD for s in seeds])
    zero = torch.zeros(len(specs), -(-vocab_size // 4), dtype=torch.int64, device=device)
    c0, c1 = zero + torch.arange(zero.shape[1], device=device)[None], zero + words(positions)
    c2, c3 = zero + words([spec.sample_index for spec in specs]), zero
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]  # modulo 2**64, of which the upper half is wanted unsigned
        c0, c2 = (p1 >> 32 & WORD) ^ c1 ^ low, (p0 >> 32 & WORD) ^ c3 ^ high
        c1, c3 = p1 & WORD, p0 & WORD
        low, high = (low + PHILOX_W[0]) & WORD, (high + PHILOX_W[1]) & WORD
    bits = torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :vocab_size]
    u = bits.float() * 2.0**-32 + 2.0**-33
    return -torch.log(-torch.log1p(-u.clamp_max(1 - 2.0**-24)))


def bias(z: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Logits with biases added and banned tokens at -inf."""
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
        z[torch.tensor(rows, device=z.device), torch.tensor(tokens, device=z.device)] = -torch.inf
    return z


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _penalise(z: torch.Tensor, specs: Sequence[SampleSpec], pending: Sequence[torch.Tensor | None]) -> torch.Tensor:
    if not any(spec.penalised for spec in specs):
        return z
    histories = [_history(spec, last, z) for spec, last in zip(specs, pending, strict=True)]
    used, count = torch.stack([h[0] for h in histories]), torch.stack([h[1] for h in histories])
    repetition = _column([spec.repetition_penalty for spec in specs], z)
    z = torch.where(used, torch.where(z > 0, z / repetition, z * repetition), z)
    frequency = _column([spec.frequency_penalty for spec in specs], z)
    presence = _column([spec.presence_penalty for spec in specs], z)
    return z - frequency * count - presence * (count > 0)


def _history(spec: SampleSpec, last: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(which tokens occurred at all, how often each occurred in the output) of one row."""
    vocab_size = like.shape[1]
    known = [token for token in spec.output_tokens if token != PENDING]
    count = torch.from_numpy(np.bincount(known, minlength=vocab_size).astype(np.float32)).to(like.device)
    if len(known) < len(spec.output_tokens):
        if last is None:
            raise ValueError("a penalised row has a pending token, but its slot drew none")
        count[last] += 1.0
    prompt = np.zeros(vocab_size, bool)
    prompt[list(spec.prompt_tokens)] = True
    return torch.from_numpy(prompt).to(like.device) | (count > 0), count


def _keep(z: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    vocab_size = z.shape[1]
    if any(spec.min_p > 0.0 for spec in specs):
        floor = _column([float(np.float32(np.log(s.min_p))) if s.min_p > 0.0 else -np.inf for s in specs], z)
        z = torch.where(z >= z.amax(-1, keepdim=True) + floor, z, -torch.inf)
    if not any(spec.top_p < 1.0 or 0 < spec.top_k < vocab_size for spec in specs):
        return z
    descending = z.sort(dim=-1, descending=True).values
    last = [(spec.top_k if 0 < spec.top_k < vocab_size else vocab_size) - 1 for spec in specs]
    threshold = descending.gather(1, torch.tensor(last, device=z.device)[:, None])
    if any(spec.top_p < 1.0 for spec in specs):
        p = torch.exp(torch.where(descending >= threshold, descending, -torch.inf) - descending[:, :1])
        p = p / p.sum(-1, keepdim=True)
        # Rounding may lift the sum of all above 1; a row with top-p off keeps everything whatever the sum.
        share = _column([spec.top_p if spec.top_p < 1.0 else np.inf for spec in specs], z)
        kept = (p.cumsum(-1) - p < share).sum(-1, keepdim=True)
        crossing = (kept - 1).clamp_min(0)  # a top-p that rounds to 0 still keeps the likeliest
        threshold = torch.maximum(threshold, descending.gather(1, crossing))
    return torch.where(z >= threshold, z, -torch.inf)
