"""What is tried before the first request: how a batch can be decoded, and whether the pools stay where they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from cortexstream.backend import ModelInfo
from cortexstream.backends.mlx.attention import RaggedNotPossible
from cortexstream.backends.mlx.cache import Chunk
from cortexstream.backends.mlx.forward import Forward, Mode
from cortexstream.backends.mlx.pool import RowPool, finish
from cortexstream.errors import ModelLoadError
from cortexstream.plan import PENDING, KVRows, PlanRow, SampleSpec, StepPlan, ring_tokens

log = logging.getLogger("cortexstream.backends.mlx")

PROBE_TOLERANCE = 1e-3  # of the largest logit: separates a wrong mask or position from rounding in half precision
PROBE_TOKENS = (3, 18)  # unlike lengths, neither a multiple of anything
PROBE_WINDOW = 64  # tokens; longer windows are not filled
SELF_TEST_STEPS = 3
RING_STEP = 16  # numbers that a CPU adds at once: what is masked before a window moves none to another lane
CUTS = (None, 1, 7)  # pieces of the probe's prompts, in tokens; None: whole


def find_mode(forward: Forward, model: ModelInfo, block_tokens: int, dtype: mx.Dtype) -> str | None:
    """Set `forward.mode` by running two rows together and apart, on scratch pools; returns a note on a fallback.

    The first way that gives the single rows' logits is kept: separate views, padded copies, or one row at a time.
    Raises ModelLoadError when not even one row can be decoded.
    """
    rows = _probe_rows(model, block_tokens)
    fastest = forward.mode
    modes: list[Mode] = ["single", "gathered"]
    if fastest == "ragged":
        modes.insert(1, "ragged")
    for mode in modes:
        forward.mode = mode
        try:
            logits = _logits(forward, model, block_tokens, dtype, rows)
        except Exception as error:
            if mode == "single":
                raise ModelLoadError(f"{model.architecture}: one row cannot be decoded: {error}") from error
            reason = str(error) if isinstance(error, RaggedNotPossible) else f"{type(error).__name__}: {error}"
            log.info("%s: %s decoding is not possible: %s", model.architecture, mode, reason)
            continue
        if mode == "single":
            expected = logits
        elif mx.all(mx.abs(logits - expected) <= PROBE_TOLERANCE * mx.max(mx.abs(expected))).item():
            break
    else:
        forward.mode = "single"
    if forward.mode == "ragged":
        return None
    how = "from padded copies of the KV" if forward.mode == "gathered" else "one row at a time"
    return f"{model.architecture} is decoded {how}: its attention cannot follow separate views"


def _probe_rows(model: ModelInfo, block_tokens: int) -> list[PlanRow]:
    """Two rows side by side. The second is so long that the smallest ring has wrapped, if that is small: slots and
    masks of a wrapped ring are then seen through the model's own attention. Whether a model can follow views does not
    depend on it, so a long window is not worth a long prompt at every start."""
    short, long = PROBE_TOKENS
    if model.windows and model.windows[0] < PROBE_WINDOW:
        long = max(long, ring_tokens(model.windows[0], block_tokens) + 2)
    blocks = -(-(long + 1) // block_tokens)
    return [
        PlanRow(i, i, (1,), length, trial_kv(model, block_tokens, i, blocks), None)
        for i, length in enumerate((short, long))
    ]


def ring_step(asked: bool | None, metal: bool, grouped: bool) -> int:
    """`PoolShape.step` of the rings: how they lie depends on how a prompt was cut, and so does the order of their sums,
    unless they are read in order of position. Rings that are to be read together are not, unless asked."""
    return 0 if metal or asked is False or (asked is None and grouped) else RING_STEP


def promise(
    forward: Forward, model: ModelInfo, block_tokens: int, dtype: mx.Dtype, asked: bool | None, metal: bool
) -> tuple[bool, str]:
    """Does batch invariance hold, and the sentence for `BackendInfo.invariance`. But for rings (`ring_step`) there is
    no other arithmetic to switch to, so this only finds out."""
    if asked is False:
        return False, "off: not tried; rings are read as they lie"
    if metal:
        return False, (
            "not here: Metal's products choose their kernel by how many rows there are, and mlx-lm's models give no say"
        )
    if not same_bits(forward, model, block_tokens, dtype):
        return False, (
            f"not here: in the trial at load, rows of {model.architecture} had other bits together than alone, or in "
            "pieces than whole; this MLX's BLAS rounds a row by how many there are, or rings are read as they lie"
        )
    return True, (
        "tokens and logprobs are the same bits in any batch, chunked, preempted or with a prefix hit: this MLX's BLAS "
        "sums every number of a product by itself in one order, rings are read in order of position, and a trial at "
        "load confirmed it"
    )


def same_bits(forward: Forward, model: ModelInfo, block_tokens: int, dtype: mx.Dtype) -> bool:
    """Have two rows the same logits together and alone, and with their prompts in one piece and in many?"""
    rows = _probe_rows(model, block_tokens)
    expected = _logits(forward, model, block_tokens, dtype, rows)
    for cut in CUTS:
        # Each row lies where it lay, so that the pools have their sizes.
        alone = [_logits(forward, model, block_tokens, dtype, rows, cut, [row]) for row in rows]
        if not mx.array_equal(expected, mx.concatenate(alone), equal_nan=True).item():
            return False
    return True


def _logits(
    forward: Forward, model: ModelInfo, block_tokens: int, dtype: mx.Dtype, rows: list[PlanRow],
    cut: int | None = None, only: list[PlanRow] | None = None,
) -> mx.array:  # fmt: skip
    """float32 [rows, vocabulary] of the token after each row's prompt, or after those of `only`; prompts come in pieces
    of `cut` tokens."""
    sizes = [sum(len(run.blocks) for run in runs) for runs in zip(*((r.kv, *r.kv.rings) for r in rows), strict=True)]
    pool = RowPool(model, tuple(sizes), block_tokens, dtype, forward.ring_step)
    vocab = model.vocab_size
    wanted = rows if only is None else only
    for row in wanted:
        step = row.start if cut is None else cut
        for first in range(0, row.start, step):
            end = min(first + step, row.start)
            chunk = Chunk(pool, row.kv, first, end - first)
            if chunk.needs_read_back:
                chunk.read_back()
            forward.prefill(chunk, tuple((7 * i + 3) % vocab for i in range(first, end)))
            finish(*pool.arrays)
    logits = forward.decode(pool, wanted, [row.start for row in wanted],
                            mx.array([(5 + row.slot) % vocab for row in wanted]))  # fmt: skip
    mx.eval(logits)
    return logits.astype(mx.float32)


def pools_stay(pool: RowPool, model: ModelInfo, submit: Callable[[StepPlan], Any]) -> bool:
    """Do the pools keep their addresses over a few overlapping steps? If not, overlap costs a copy of every pool."""
    before = pool.addresses()
    each = -(-SELF_TEST_STEPS // pool.block_tokens)
    if most_rows(pool, model, each) == 0:
        each = 1  # tiny pools
    count = min(2, most_rows(pool, model, each))
    for step in range(min(SELF_TEST_STEPS, each * pool.block_tokens)):
        token = PENDING if step else 0
        submit(StepPlan(step, tuple(trial_row(pool, model, slot, each, (token,), step) for slot in range(count))))
    mx.synchronize()
    return pool.addresses() == before


def trial_kv(model: ModelInfo, block_tokens: int, number: int, blocks: int) -> KVRows:
    """Where the `number`-th of equal sequences lies, `blocks` blocks long, when they lie side by side from block 0."""

    def run(size: int) -> tuple[int, ...]:
        return tuple(range(number * size, (number + 1) * size))

    rings = (min(blocks, ring_tokens(window, block_tokens) // block_tokens) for window in model.windows)
    return KVRows(run(blocks), True, tuple(KVRows(run(size), True) for size in rings))


def trial_row(
    pool: RowPool, model: ModelInfo, slot: int, blocks: int, tokens: tuple[int, ...], start: int = 0
) -> PlanRow:
    """A greedy row on the blocks that `trial_kv` gives it."""
    return PlanRow(slot, slot, tokens, start, trial_kv(model, pool.block_tokens, slot, blocks), SampleSpec())


def most_rows(pool: RowPool, model: ModelInfo, blocks: int) -> int:
    """How many sequences of `blocks` blocks each fit the pools, as `trial_kv` lays them out."""
    first = trial_kv(model, pool.block_tokens, 0, blocks)
    runs = (first, *first.rings)
    return min(size // len(run.blocks) for size, run in zip(pool.num_blocks, runs, strict=True))
