"""What an append costs, counted and not timed: F37."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cortexstream.cache import RingCache, address_of
from tests.cache.libraries import SLACK, Library, normal
from tests.conftest import require

CAPACITY, HEADS, DIM = 512, 8, 64
ENTRY_BYTES = CAPACITY * HEADS * DIM * 4  # of the keys, or of the values


def make(lib: Library, sinks: int = 0) -> RingCache:
    ring = RingCache(lib.namespace, sinks=sinks)
    ring.allocate(CAPACITY, 2, HEADS * DIM, HEADS)
    return ring


def advance_to(lib: Library, ring: RingCache, total: int) -> None:
    one = lib.array(np.ones(HEADS * DIM))
    for position in range(ring.state().total_tokens, total):
        ring.append(one, one, position)
        if position % 50 == 0:
            lib.settle(*ring.get_cache()[:2])
    lib.settle(*ring.get_cache()[:2])


@pytest.mark.parametrize("sinks", [0, 4])
def test_f37_an_append_writes_one_slot_before_and_after_the_wrap(lib: Library, sinks: int) -> None:
    """At half a turn and after three, one append changes the numbers of one token and no other, takes no memory that
    depends on the ring, and moves nothing."""
    ring = make(lib, sinks)
    places = [address_of(array) for array in ring._arrays]
    seen = []
    for total in (CAPACITY // 2, 3 * CAPACITY):
        advance_to(lib, ring, total)
        before = [lib.numpy(array) for array in ring._arrays]
        k, v = lib.array(normal(HEADS * DIM) + 10), lib.array(normal(HEADS * DIM, seed=1) + 10)
        lib.settle(k, v)

        def append(k: Any = k, v: Any = v, total: int = total) -> Any:
            ring.append(k, v, total)
            return ring._arrays

        taken = lib.new_bytes(append)
        changed = [int((lib.numpy(a) != b).sum()) for a, b in zip(ring._arrays, before, strict=True)]
        seen.append((changed, taken))
    assert [changed for changed, _ in seen] == [[HEADS * DIM, HEADS * DIM, 0, 0]] * 2
    assert max(taken for _, taken in seen) < ENTRY_BYTES // 20
    if lib.name != "numpy":  # there Python's own objects are in the figure
        assert seen[0][1] == seen[1][1]
    assert [address_of(array) for array in ring._arrays] == places


def test_f37_the_same_operators_before_and_after_the_wrap() -> None:
    """On torch every operator and every shape that an append and a get_cache use can be listed."""
    torch = require("torch")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Listing(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = [tuple(x.shape) for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            self.seen.append((str(func), tensors))
            return result

    lib = Library("torch")
    ring, new, lists = make(lib), torch.ones(HEADS * DIM), []
    for total in (CAPACITY, 3 * CAPACITY + 7):
        advance_to(lib, ring, total)
        with Listing() as listing:
            ring.append(new, new, total)
            ring.get_cache()
        lists.append(listing.seen)
    assert lists[0] == lists[1] and len(lists[0]) > 0
    written = [shapes for name, shapes in lists[0] if "copy_" in name]
    assert written == [[(HEADS, 1, DIM)] * 3] * 2


def test_f37_a_view_takes_no_memory(lib: Library) -> None:
    """One piece of the ring's own memory, before and after the wrap; an ordered copy does take its size."""
    ring = make(lib)
    places = [address_of(array) for array in ring._arrays[:2]]
    for total in (CAPACITY // 2, CAPACITY, 3 * CAPACITY + 5):
        advance_to(lib, ring, total)
        assert lib.new_bytes(lambda: ring.get_cache()[:2]) <= SLACK[lib.name]
        view = ring.get_cache()
        assert [address_of(view.keys), address_of(view.values)] == places
        del view
        copied = lib.new_bytes(lambda: ring.get_cache(ordered=True)[:2])
        expected = 2 * min(total, CAPACITY) * HEADS * DIM * 4
        assert expected <= copied <= expected + 2 * SLACK["mlx"]
    assert ring.metrics.get_cache_bytes == 2 * (CAPACITY // 2 + 2 * CAPACITY) * HEADS * DIM * 4


def test_f37_mlx_decoding_stays_in_place() -> None:
    """Append, attend, evaluate: the ring's arrays stay where they are over more than two turns, peak memory flat."""
    mx = require("mlx")
    lib = Library("mlx")
    ring = make(lib)
    places = [address_of(array) for array in ring._arrays]
    new = mx.ones(HEADS * DIM)
    q = mx.ones((1, HEADS, 1, DIM))
    advance_to(lib, ring, CAPACITY - 5)

    def steps() -> None:
        for position in range(CAPACITY - 5, CAPACITY + 20):
            ring.append(new, new, position)
            keys, values, _ = ring.get_cache()
            mx.eval(mx.fast.scaled_dot_product_attention(q, keys[None], values[None], scale=0.1))

    assert lib.new_bytes(lambda: steps()) < ENTRY_BYTES // 2
    assert [address_of(array) for array in ring._arrays] == places


def test_f37_mlx_a_kept_view_costs_a_copy() -> None:
    """The control for the test above: the address shows it, and both the ring and the view are right."""
    mx = require("mlx")
    ring = make(Library("mlx"))
    ring.append(mx.ones(HEADS * DIM), mx.ones(HEADS * DIM), 0)
    view = ring.get_cache()
    mx.eval(view.keys)
    place = address_of(ring._arrays[0])
    ring.append(mx.full(HEADS * DIM, 2.0), mx.ones(HEADS * DIM), 1)
    assert address_of(ring._arrays[0]) != place
    assert ring.get_cache().keys[0, :, 0].tolist() == [1, 2] and view.keys[0, :, 0].tolist() == [1]
