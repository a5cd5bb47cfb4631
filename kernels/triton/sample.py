"""One token per row on the device, as `cortexstream.sampling` defines it: no sort, no wait for the host.

The 2 or 4 launches depend on the host for the numbers of rows and of tokens alone, so a graph can hold them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from cortexstream.kernels.triton._common import FLOAT_TYPES, capability, check_tensor
from cortexstream.kernels.triton._sample import BINS, list_kernel, scan_kernel, survey_kernel
from cortexstream.kernels.triton._sample_draw import draw_kernel

WIDEST = 2**20
COUNT_TYPES = (torch.int16, torch.int32)


class Config(NamedTuple):
    """Tiles of the kernels, in tokens."""

    split: int  # of the vocabulary, whole blocks of `sampling.BLOCK`; int16 must hold it
    split_warps: int
    group: int  # splits whose bins a program adds at a time
    capacity: int  # of a row's list; rows with more candidates are searched whole, by one program
    block: int  # candidates that the search takes at a time
    block_warps: int
    block_registers: int = 128  # left to itself, ptxas aims at 64 and spills


_ANY = Config(split=2048, split_warps=8, group=32, capacity=8192, block=2048, block_warps=16)
CONFIGS = {80: _ANY, 90: _ANY}  # compute capability -> Config


class RowParameters(NamedTuple):
    """How each row draws: tensors [R] on the device. What a value means is in `cortexstream.plan.SampleSpec`."""

    slot: torch.Tensor  # int32: line of `counts` and `seen`; below 0 the row is padding and nothing is written for it
    bias_slot: torch.Tensor  # int32: line of `bias`; below 0 the row has none
    temperature: torch.Tensor  # float32, 0 is greedy
    top_k: torch.Tensor  # int32, 0 is off
    top_p: torch.Tensor  # float32, 1 is off
    log_min_p: torch.Tensor  # float32: the natural logarithm of min-p, rounded from float64; -inf is off
    seed: torch.Tensor  # int64: 64 bits
    position: torch.Tensor  # int32: of the drawn token
    sample_index: torch.Tensor  # int32
    repetition_penalty: torch.Tensor  # float32, 1 is off
    frequency_penalty: torch.Tensor  # float32, 0 is off
    presence_penalty: torch.Tensor  # float32, 0 is off


INTEGERS = {
    **dict.fromkeys(("slot", "bias_slot", "top_k", "position", "sample_index"), torch.int32), "seed": torch.int64,
}  # fmt: skip


class Tables(NamedTuple):
    """What rows with penalties or a bias look up, a line [V] each; None where no row needs it.

    bias float32 is added to the logits; -inf bans a token, whatever its logit. counts int16 or int32: how often each
    token occurred in the output. seen uint8: not 0 if it occurred in the prompt. Penalties are over what is here.
    """

    bias: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    seen: torch.Tensor | None = None


NO_TABLES = Tables()


class Drawn(NamedTuple):
    """tokens int64 [R]; broken bool [R]: nothing could be drawn, `tokens` has 0; logprobs float32 [R] or None."""

    tokens: torch.Tensor
    broken: torch.Tensor
    logprobs: torch.Tensor | None = None


class Partial(NamedTuple):
    """What the kernels tell each other: per row and split, then per row."""

    best: torch.Tensor  # float32 [R, splits]
    ids: torch.Tensor  # int32 [R, splits]
    raw_most: torch.Tensor | None = None  # float32 [R, splits]: of the raw logits the largest
    raw_sum: torch.Tensor | None = None  # and the sum of exp(logit - largest)
    bins: torch.Tensor | None = None  # int16 [R, splits, BINS]
    mass: torch.Tensor | None = None  # float32 [R, splits]
    list_ids: torch.Tensor | None = None  # int32 [R, capacity]
    list_scores: torch.Tensor | None = None  # float32 [R, capacity]
    found: torch.Tensor | None = None  # int32 [R, 2]


def sample(
    logits: torch.Tensor, rows: RowParameters, tables: Tables = NO_TABLES, *, filters: bool = True,
    logprobs: bool = False, count: bool = False, out: Drawn | None = None, config: Config | None = None,
) -> Drawn:  # fmt: skip
    """Draw a token for each row of logits [R, V], float16, bfloat16 or float32, contiguous; V up to 2^20.

    The token is that of `cortexstream.sampling.draw` from the same logits in float32, whatever the batch. A row whose
    logits with their bias hold NaN or +inf, or nothing finite, is `broken`. `logprobs` asks for the drawn tokens'
    natural logarithms of probability in the raw distribution, before bias and all else. `count` adds the drawn tokens
    to `tables.counts`; the rows' slots must differ then. `filters=False` says that no row has top-k, top-p or min-p,
    which then are not looked at: 2 launches and not 4; rows without filters do no more than return in the other two.

    Results are in `out` if given, else in new tensors, whose padding rows have 0. Numbers on the device are not
    checked: slots must be lines of the tables. Raises ValueError when shapes, dtypes or devices do not go together;
    nothing was written then.
    """
    num_rows, vocab_size = _check(logits, rows, tables)
    if count and tables.counts is None:
        raise ValueError("count is True, but there are no counts to add the drawn tokens to: give tables.counts")
    out = _results(out, logprobs, num_rows, logits.device)
    if not num_rows:
        return out
    config = config or CONFIGS[capability()]
    splits = triton.cdiv(vocab_size, config.split)
    pad = triton.next_power_of_2(splits)
    partial = _partial(num_rows, splits, config.capacity, logits.device, filters, logprobs)
    # A product and a sum that are rounded as one differ from the definition's in the last bit.
    options: dict[str, Any] = {"num_warps": config.split_warps, "enable_fp_fusion": False}
    grid, shared = (splits, num_rows), (logits, rows, tables, partial)
    scan_kernel[grid](*shared, vocab_size, SPLIT=config.split, FILTERS=filters, LOGPROBS=logprobs, **options)
    if filters:
        survey_kernel[grid](*shared, vocab_size, SPLIT=config.split, PAD=pad, **options)
        list_kernel[grid](
            *shared, vocab_size, SPLIT=config.split, PAD=pad, GROUP=config.group, CAPACITY=config.capacity, **options
        )  # fmt: skip
    options["num_warps"] = config.block_warps if filters else config.split_warps
    draw_kernel[(num_rows,)](
        *shared, out, vocab_size, splits, PAD=pad, BLOCK=config.block, CAPACITY=config.capacity, FILTERS=filters,
        COUNT=count, maxnreg=config.block_registers, **options,
    )  # fmt: skip
    return out


def _check(logits: torch.Tensor, rows: RowParameters, tables: Tables) -> tuple[int, int]:
    """The shape of the logits."""
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= WIDEST:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [R, V] with V of 1 to {WIDEST}")
    num_rows, vocab_size = logits.shape
    check_tensor("logits", logits, (num_rows, vocab_size), FLOAT_TYPES, logits.device)
    for name, tensor in rows._asdict().items():
        check_tensor(name, tensor, (num_rows,), (INTEGERS.get(name, torch.float32),), logits.device)
    kinds = {"bias": (torch.float32,), "counts": COUNT_TYPES, "seen": (torch.uint8,)}
    for name, table in tables._asdict().items():
        if table is not None:
            check_tensor(name, table, (None, vocab_size), kinds[name], logits.device)
    return num_rows, vocab_size


def _results(out: Drawn | None, logprobs: bool, num_rows: int, device: torch.device) -> Drawn:
    """`out`, or new tensors in its place."""
    kinds = {"tokens": torch.int64, "broken": torch.bool, "logprobs": torch.float32}
    if out is None:
        if not logprobs:
            del kinds["logprobs"]
        return Drawn(**{name: torch.zeros(num_rows, dtype=dtype, device=device) for name, dtype in kinds.items()})
    if logprobs != (out.logprobs is not None):
        raise ValueError(f"logprobs is {logprobs}; out.logprobs must be {'a tensor' if logprobs else 'None'} then")
    for name, tensor in out._asdict().items():
        if tensor is not None:
            check_tensor(f"out.{name}", tensor, (num_rows,), (kinds[name],), device)
    return out


def _partial(
    num_rows: int, splits: int, capacity: int, device: torch.device, filters: bool, logprobs: bool
) -> Partial:  # fmt: skip
    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=device)

    floats, integers = torch.float32, torch.int32
    partial = Partial(empty(floats, splits), empty(integers, splits))
    if logprobs:
        partial = partial._replace(raw_most=empty(floats, splits), raw_sum=empty(floats, splits))
    if filters:
        partial = partial._replace(
            bins=empty(torch.int16, splits, BINS.value), mass=empty(floats, splits), list_ids=empty(integers, capacity),
            list_scores=empty(floats, capacity), found=empty(integers, 2),
        )  # fmt: skip
    return partial
