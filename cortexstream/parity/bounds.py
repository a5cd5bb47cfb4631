"""How much two machines may differ, by the number format they compute in."""

from __future__ import annotations

from typing import NamedTuple


class Bound(NamedTuple):
    """Limits on the difference of a logprob (natural logs) at any step, on the mean of these differences, on the
    Kullback-Leibler divergence at any step (nats), and on the scores of two tokens of which each machine draws another
    one: no further apart than `tie` they may change places, since either may err by half of it."""

    max_error: float
    mean_error: float
    max_kl: float
    tie: float
    why: str


BOUNDS = {
    "float32": Bound(1e-4, 3e-5, 1e-5, 2e-4, "the promise; sums in another order err by less"),
    "float16": Bound(0.2, 0.0125, 2e-3, 0.125, "rounding at 11 bits: an eighth of bfloat16's, for KL a fiftieth"),
    "bfloat16": Bound(1.6, 0.1, 0.1, 1.0, "rounding at 8 bits: twice what was measured on the embedded model"),
}
"""By dtype. The largest error is that of an unlikely token, on a text unlike any that the model was trained on; the
mean and the divergence are what tells a fault from rounding. Measured on the embedded model, largest, mean, divergence:
float32 8e-5, 5e-6, 2e-6 (mlx and torch beside numpy); float16 0.11, 0.005, 0.0009 (mlx beside float32); bfloat16 0.84,
0.04, 0.05 (mlx beside torch, mlx beside float32)."""

QUANTIZED = Bound(5e-4, 1e-4, 2e-5, 1e-3, "a group's scale * sum + bias * sum: the terms cancel, their errors do not")
"""Of a 4-bit or 8-bit checkpoint that is computed in float32; 1.2e-4, 5e-6, 2e-6 were measured at 4 bits (mlx beside
numpy). The weights themselves were rounded once, when the checkpoint was made, and are the same everywhere."""


def bound_of(*dtypes: str, quantized: bool) -> Bound:
    """The widest bound among the dtypes, and of a checkpoint of packed integers its own."""
    bounds = [BOUNDS[dtype] for dtype in dtypes]
    return max([*bounds, QUANTIZED] if quantized else bounds)
