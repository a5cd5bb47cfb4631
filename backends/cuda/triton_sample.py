"""The draw by the Triton kernels: what rows ask for is sent in one copy, and nothing waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cortexstream.backends.cuda.sample import allowed
from cortexstream.backends.cuda.step import upload
from cortexstream.kernels.triton.sample import Drawn, RowParameters, Tables, sample
from cortexstream.plan import PENDING, SampleSpec

BELOW_ONE = 1 - 2.0**-24  # in float32: a row with a top-p is drawn from as one, however near to 1 it is
INTEGERS = 6  # rows of the upload that are integers; the others are the bits of float32


def draw(
    logits: torch.Tensor, specs: Sequence[SampleSpec], positions: Sequence[int], pending: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `backends.cuda.sample.draw`."""
    rows, vocab_size = range(len(specs)), logits.shape[1]
    penalised = [i for i in rows if specs[i].penalised]
    biased = [i for i in rows if specs[i].logit_bias or specs[i].banned or specs[i].mask is not None]
    lines = {i: line for line, i in enumerate(penalised)}
    bias_lines = {i: line for line, i in enumerate(biased)}
    parameters = _parameters(
        specs, positions, vocab_size, [lines.get(i, 0) for i in rows], [bias_lines.get(i, -1) for i in rows],
        logits.device,
    )  # fmt: skip
    counts, seen = _history([specs[i] for i in penalised], [pending[i] for i in penalised], vocab_size, logits.device)
    tables = Tables(_bias([specs[i] for i in biased], vocab_size, logits.device), counts, seen)
    filters = any(spec.min_p > 0.0 or spec.top_p < 1.0 or spec.top_k > 0 for spec in specs)
    drawn: Drawn = sample(logits, parameters, tables, filters=filters)
    return drawn.tokens, drawn.broken


def _parameters(
    specs: Sequence[SampleSpec], positions: Sequence[int], vocab_size: int, lines: list[int], bias_lines: list[int],
    device: torch.device,
) -> RowParameters:  # fmt: skip
    integers = [
        lines, bias_lines, [s.top_k if 0 < s.top_k < vocab_size else 0 for s in specs],  # int32: it may be any number
        list(positions), [s.sample_index for s in specs],
        [s.seed - (1 << 64) if s.seed >= 1 << 63 else s.seed for s in specs],
    ]  # fmt: skip
    floats = [
        [s.temperature for s in specs], [min(s.top_p, BELOW_ONE) if s.top_p < 1.0 else 1.0 for s in specs],
        [np.log(s.min_p) if s.min_p > 0.0 else -np.inf for s in specs],
        [s.repetition_penalty for s in specs], [s.frequency_penalty for s in specs],
        [s.presence_penalty for s in specs],
    ]  # fmt: skip
    bits = np.array(floats, np.float32).view(np.int32).tolist()
    sent = upload(device, *integers, *bits)
    slot, bias_slot, top_k, position, index = (numbers.int() for numbers in sent[: INTEGERS - 1])
    seed = sent[INTEGERS - 1].clone()  # kernels are compiled by alignment: a part of the copy may begin anywhere
    temperature, top_p, log_min_p, repetition, frequency, presence = (
        numbers.int().view(torch.float32) for numbers in sent[INTEGERS:]
    )
    # Rows without penalties look up line 0 with penalties that change nothing.
    return RowParameters(
        slot, bias_slot, temperature, top_k, top_p, log_min_p, seed, position, index, repetition, frequency, presence
    )


def _bias(specs: Sequence[SampleSpec], vocab_size: int, device: torch.device) -> torch.Tensor | None:
    """A line float32 [vocabulary] per row: the biases, -inf where a token is banned or outside of the row's mask."""
    if not specs:
        return None
    table = torch.zeros(len(specs), vocab_size, device=device)
    biased = [(line, token, value) for line, spec in enumerate(specs) for token, value in spec.logit_bias]
    banned = [(line, token) for line, spec in enumerate(specs) for token in spec.banned]
    if biased:
        bits = np.array([value for _, _, value in biased], np.float32).view(np.int32).tolist()
        line, token, value = upload(device, [b[0] for b in biased], [b[1] for b in biased], bits)
        table.index_put_((line, token), value.int().view(torch.float32), accumulate=True)
    if banned:
        line, token = upload(device, [b[0] for b in banned], [b[1] for b in banned])
        table.index_put_((line, token), table.new_full((), -torch.inf))  # a number would wait: it comes from the host
    masks = {line: spec.mask() for line, spec in enumerate(specs) if spec.mask is not None}
    return table.masked_fill_(~allowed(masks, len(specs), table), -torch.inf) if masks else table


def _history(
    specs: Sequence[SampleSpec], pending: Sequence[torch.Tensor | None], vocab_size: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Per row, how often each token occurred in the output (int32), and whether it did in the prompt (uint8)."""
    if not specs:
        return None, None
    counts = torch.zeros(len(specs), vocab_size, dtype=torch.int32, device=device)
    seen = torch.zeros(len(specs), vocab_size, dtype=torch.uint8, device=device)
    made = [(line, token) for line, s in enumerate(specs) for token in s.output_tokens if token != PENDING]
    given = [(line, token) for line, s in enumerate(specs) for token in s.prompt_tokens]
    sent = upload(device, *([pair[i] for pair in pairs] for pairs in (made, given) for i in (0, 1)))
    counts.index_put_((sent[0], sent[1]), torch.ones_like(sent[0], dtype=torch.int32), accumulate=True)
    seen.index_put_((sent[2], sent[3]), seen.new_ones(()))
    for line, (spec, last) in enumerate(zip(specs, pending, strict=True)):
        if PENDING in spec.output_tokens:
            if last is None:
                raise ValueError("a penalised row has a pending token, but its slot drew none")
            counts[line].index_add_(0, last.view(1), torch.ones(1, dtype=torch.int32, device=device))
    return counts, seen
