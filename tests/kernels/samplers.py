"""The samplers that run on every machine, with one face, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cortexstream.backends.common import fast_draw
from cortexstream.plan import SampleSpec
from tests.conftest import require

Floats = npt.NDArray[np.float32]
Sampler: TypeAlias = Callable[[Floats, Sequence[SampleSpec], Sequence[int]], tuple[list[int], list[bool]]]
"""(logits float32 [rows, vocabulary], specs, positions) -> tokens, 0 where a row is broken, and which rows are."""


def by_numpy(logits: Floats, specs: Sequence[SampleSpec], positions: Sequence[int]) -> tuple[list[int], list[bool]]:
    found = fast_draw.draw(logits, specs, positions)
    broken = found == fast_draw.NOTHING
    return np.where(broken, 0, found).tolist(), broken.tolist()


def by_mlx(logits: Floats, specs: Sequence[SampleSpec], positions: Sequence[int]) -> tuple[list[int], list[bool]]:
    mx = require("mlx")
    require("mlx_lm")
    from cortexstream.backends.mlx.sample import draw

    tokens, broken = draw(mx.array(logits), specs, positions, [None] * len(specs))
    return _lists(tokens, broken)


def by_torch(logits: Floats, specs: Sequence[SampleSpec], positions: Sequence[int]) -> tuple[list[int], list[bool]]:
    torch = require("torch")
    require("transformers")
    from cortexstream.backends.cuda.sample import draw

    tokens, broken = draw(torch.from_numpy(logits.copy()), specs, positions, [None] * len(specs))
    return _lists(tokens, broken)


def by_host(logits: Floats, specs: Sequence[SampleSpec], positions: Sequence[int]) -> tuple[list[int], list[bool]]:
    torch = require("torch")
    require("transformers")
    from cortexstream.backends.cuda.host_sample import draw

    return _lists(*draw(torch.from_numpy(logits.copy()), specs, positions, [None] * len(specs)))


def _lists(tokens: Any, broken: Any) -> tuple[list[int], list[bool]]:
    return tokens.tolist(), broken.tolist()


SAMPLERS: dict[str, Sampler] = {
    "numpy": by_numpy,
    "mlx": by_mlx,
    "torch": by_torch,
    "torch, host": by_host,
}
