"""Attention whose bits do not depend on the step: every position alone, and in every company, against the whole."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest

from tests.conftest import require

torch: Any = require("torch")

from cortexstream.kernels.torch.attention import attention  # noqa: E402
from cortexstream.kernels.torch.fixed_attention import FixedAttention, attention_heights  # noqa: E402
from cortexstream.kernels.torch.fixed_decode import agreeing_batches, decode, pieces_of  # noqa: E402

CPU = torch.device("cpu")
LENGTH = 390  # three splits of 128 and a bit
CASES = [  # window, soft cap, sinks
    (None, None, False), (None, 20.0, True), (1, None, False), (127, None, False), (128, None, True),
    (129, 30.0, False), (300, None, False),
]  # fmt: skip


class World(NamedTuple):
    """A prompt's queries, keys and values, and what they give as a whole."""

    fixed: FixedAttention
    q: Any
    k: Any
    v: Any
    window: int | None
    options: tuple[Any, ...]
    whole: Any

    def first(self, position: int) -> int:
        """The oldest key that this query sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window)


@pytest.fixture(params=CASES, ids=str, scope="module")
def world(request: pytest.FixtureRequest) -> World:
    """The newer a key, the larger: a query's largest score is mostly in its last split."""
    window, cap, sinks = request.param
    generator = torch.Generator().manual_seed(0)
    q, k, v, sink = (torch.randn(*shape, generator=generator) for shape in ((LENGTH, 6, 20), (LENGTH, 2, 20),
                                                                            (LENGTH, 2, 24), (6,)))  # fmt: skip
    k *= torch.linspace(0.2, 3.0, LENGTH)[:, None, None]
    options = (0.2, cap, sink if sinks else None)
    fixed = FixedAttention(attention_heights(2, 20, 24, CPU))
    return World(fixed, q, k, v, window, options, fixed(q, k, v, 0, 0, window, *options))


def test_p4_the_whole_is_attention(world: World) -> None:
    expected = attention(world.q, world.k, world.v, 0, 0, world.window, *world.options)
    assert torch.allclose(world.whole, expected, atol=3e-6)


def test_p4_every_token_decoded_alone_is_as_in_the_whole(world: World) -> None:
    for position in range(LENGTH):
        seen = slice(world.first(position), position + 1)
        q, k, v = world.q[position : position + 1], world.k[seen], world.v[seen]
        found = world.fixed(q, k, v, position, seen.start, world.window, *world.options)
        assert torch.equal(found, world.whole[position : position + 1]), f"position {position}"


def test_p4_chunks_of_any_size_are_as_in_the_whole(world: World) -> None:
    """A chunk may be given more keys than its first query sees."""
    rng = random.Random(0)
    for size in (2, 3, 5, 8, 31, 64, 100, 128, 129):
        start = rng.randrange(LENGTH - size)
        for first in {world.first(start), world.first(start) // 2}:
            k, v = (side[first : start + size] for side in (world.k, world.v))
            found = world.fixed(world.q[start : start + size], k, v, start, first, world.window, *world.options)
            assert torch.equal(found, world.whole[start : start + size]), f"{size} tokens from {start}"


def test_p4_tokens_decoded_together_are_as_in_the_whole(world: World) -> None:
    """Few and many, of like and unlike lengths, so that some have pieces that no other has."""
    height = world.fixed.decode_height(3)
    assert height is not None
    batches = agreeing_batches(2, 20, 24, height, CPU)
    rng = random.Random(1)
    companies = [[LENGTH - 1], [LENGTH - 1, 3], [128, 127], [0, 0], [5, 255, 256], list(range(0, LENGTH, 7))]
    companies += [[rng.randrange(LENGTH) for _ in range(rng.randint(1, 9))] for _ in range(30)]
    for positions in companies:
        slots = [torch.arange(world.first(position), position + 1).numpy() for position in positions]
        pieces = pieces_of(slots, [world.first(position) for position in positions], CPU)
        k, v = world.k[pieces.slots], world.v[pieces.slots]
        found = decode(world.q[positions], k, v, pieces, height, batches, *world.options)
        assert torch.equal(found, world.whole[positions]), f"positions {positions}"
