"""`attention_with_kv_cache` on the Triton kernels: the tests of ../test_attention_with_kv_cache.py, and what only a GPU
can show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cortexstream.kernels.torch import attention_with_kv_cache as module
from tests.kernels.test_attention_with_kv_cache import (  # noqa: F401 - tests, collected here, too
    Q,
    cache_of,
    projections,
    test_a_scale_and_views_with_other_strides,
    test_f39_a_window_looks_back_from_each_query,
    test_f43_a_first_call_makes_a_cache_that_the_caller_owns,
    test_f43_a_prompt_and_then_tokens_are_one_causal_attention,
    test_f43_without_an_update_nothing_changes,
    test_f45_rows_of_different_lengths,
    test_f46_an_overflow_is_told_and_nothing_written,
    test_f46_unchecked_a_length_beyond_int32_is_left_out,
    test_f46_unchecked_a_negative_length_is_left_out,
    test_f46_unchecked_a_row_that_overflows_is_left_out,
    test_f50_query_heads_share_key_heads,
    test_f51_a_prompt_in_chunks_gives_the_same,
    test_f51_equal_scores_give_running_means,
    test_there_are_no_gradients,
    test_what_does_not_fit_is_refused,
)
from tests.kernels.triton.support import DEVICE, INTERPRETED, fenced, torch


@pytest.fixture(autouse=True)
def nothing_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of this file fails if torch computes."""

    def fail(reason: str) -> None:
        raise AssertionError(f"computed in torch: {reason}")

    monkeypatch.setattr(module, "_tell", fail)


def test_heads_that_the_kernels_do_not_take_are_left_to_torch() -> None:
    wide = torch.zeros(1, 1, 1, 257, device=DEVICE)
    assert module._why_torch(wide, Q, Q) == module._why_torch(Q, Q, wide) == "heads have more than 256 numbers"
    assert module._why_torch(Q, Q, Q) is None


@pytest.mark.parametrize("tokens", [1, 3])
def test_every_launch_is_on_the_tensors_device(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is made the current one before any kernel and not left until the last."""
    from cortexstream.kernels.triton import decode_attention, kv_append, prefill_attention

    events: list[str] = []

    @contextmanager
    def current(device: Any) -> Iterator[None]:
        events.append(f"to {device}")
        yield
        events.append("back")

    def watched(name: str, launch: Any) -> Any:
        def told(*args: Any, **options: Any) -> Any:
            events.append(name)
            return launch(*args, **options)

        return told

    monkeypatch.setattr(module, "_current", current)
    for kernels, name in ((kv_append, "kv_append"), (decode_attention, "decode_attention"),
                          (prefill_attention, "prefill_attention")):  # fmt: skip
        monkeypatch.setattr(kernels, name, watched(name, getattr(kernels, name)))
    q, k, v = projections(2, 4, 2, tokens)
    module.attention_with_kv_cache(q, k, v, cache_max_len=8)
    assert events == [f"to {q.device}", "kv_append", f"{'decode' if tokens == 1 else 'prefill'}_attention", "back"]


@pytest.mark.parametrize("tokens", [1, 2])
def test_f46_unchecked_nothing_beyond_the_cache_is_touched(tokens: int) -> None:
    if not INTERPRETED:
        pytest.skip("the fences are in the host's memory")
    cache = cache_of([8], 8, 1, 256)
    cache = cache._replace(keys=fenced(cache.keys), values=fenced(cache.values))
    q, k, v = projections(1, 2, 1, tokens, 256)
    output, _ = module.attention_with_kv_cache(q, k, v, cache, check=False)
    assert bool(output.isnan().all()) and cache.seq_lens.tolist() == [8]


@pytest.mark.parametrize("where", ["host", "device"])
def test_f47_decoding_waits_for_nothing(where: str) -> None:
    """200 tokens while whatever waits for the GPU is an error; lengths on the device are not checked then."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    cache = cache_of([0, 17, 200, 64], 512, 2, 64)
    cache = cache._replace(seq_lens=cache.seq_lens.to(DEVICE if where == "device" else "cpu"))
    q, k, v = projections(4, 8, 2, 1, 64)
    module.attention_with_kv_cache(q, k, v, cache, check=where == "host")  # compiles
    mode: Any = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(200):
            module.attention_with_kv_cache(q, k, v, cache, check=where == "host")
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert cache.seq_lens.tolist() == [n + 201 for n in (0, 17, 200, 64)]
