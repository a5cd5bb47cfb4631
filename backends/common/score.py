"""How likely a prompt's own tokens are, and what else is told on the host of logits that came there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cortexstream import sampling
from cortexstream.plan import Score, TokenScore


def score_tokens(logits: npt.NDArray[np.float32], score: Score) -> tuple[TokenScore, ...]:
    """How likely `score.targets[i]` is under row i of `logits` float32 [targets, V]."""
    scores = []
    for row, target in zip(logits, score.targets, strict=True):
        logprobs = sampling.log_softmax(row)
        scores.append(TokenScore(float(logprobs[target]), sampling.top_logprobs(logprobs, score.logprobs)))
    return tuple(scores)
