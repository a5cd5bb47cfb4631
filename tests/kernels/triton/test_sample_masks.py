"""The draw of the cuda backend by the Triton kernels: masks, batches and seeds, against torch's (F73, P5)."""

from __future__ import annotations

import random

import numpy as np

from cortexstream import sampling
from cortexstream.backends.cuda import triton_sample
from cortexstream.constraint import Mask, mask_of
from cortexstream.plan import SampleSpec
from tests.kernels.test_mlx_sample import random_spec
from tests.kernels.triton.support import DEVICE, torch

VOCAB = 150
HOT = SampleSpec(temperature=0.7, seed=1)


def draw(logits: np.ndarray, specs: list[SampleSpec], positions: list[int]) -> tuple[list[int], list[bool]]:
    tokens, broken = triton_sample.draw(torch.from_numpy(logits).to(DEVICE), specs, positions, [None] * len(specs))
    return tokens.tolist(), broken.tolist()


def test_masks_leave_what_they_allow() -> None:
    rng, numbers = random.Random(3), np.random.default_rng(3)
    logits = (3 * numbers.standard_normal((12, VOCAB))).astype(np.float32)
    asked: list[int] = []
    specs = []
    for row in range(12):
        ids = rng.sample(range(VOCAB), rng.randint(1, 20))

        def mask(row: int = row, ids: list[int] = ids) -> Mask:
            asked.append(row)
            return mask_of(ids, VOCAB)

        spec = random_spec(rng, VOCAB)
        specs.append(spec if row % 4 == 0 else spec._replace(mask=mask, banned=()))
    found, broken = draw(logits, specs, list(range(12)))
    assert asked == [row for row in range(12) if row % 4] and not any(broken)
    assert found == [sampling.draw(*row) for row in zip(logits, specs, range(12), strict=True)]


def test_a_mask_that_leaves_nothing_breaks_its_row_alone() -> None:
    logits = np.array([[0, 3, 2, np.nan]] * 5, np.float32)
    one, none = mask_of([2], 4), mask_of([], 4)
    specs = [
        SampleSpec(mask=lambda: one), SampleSpec(mask=lambda: none), HOT._replace(mask=lambda: one),
        HOT._replace(mask=lambda: none, top_p=0.5), SampleSpec(mask=lambda: one, banned=(2,)),
    ]  # fmt: skip
    assert draw(logits, specs, list(range(5))) == ([2, 0, 2, 0, 0], [False, True, False, True, True])


def test_p5_f73_seeded_draws_are_the_definitions_in_any_batch() -> None:
    """500 draws; then the same rows in batches of 1 and 7, and in another order."""
    rng, numbers = random.Random(5), np.random.default_rng(5)
    for batch in range(5):
        logits = (2.5 * numbers.standard_normal((100, VOCAB))).astype(np.float32)
        specs, positions = [random_spec(rng, VOCAB) for _ in range(100)], list(range(100 * batch, 100 * batch + 100))
        together, broken = draw(logits, specs, positions)
        assert not any(broken)
        assert together == [sampling.draw(*row) for row in zip(logits, specs, positions, strict=True)]
    for order in ([99], [3], list(range(7)), rng.sample(range(100), 32)):
        found, _ = draw(logits[order], [specs[row] for row in order], [positions[row] for row in order])
        assert found == [together[row] for row in order]
