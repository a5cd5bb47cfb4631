"""The memory tracker by itself: F33."""

from __future__ import annotations

import gc
import threading

import pytest

from cortexstream.cache import MemoryTracker, Purpose
from cortexstream.errors import ArenaError, CacheValueError


class Owner:
    """Something that holds memory."""


def test_f33_record_and_release_by_purpose() -> None:
    tracker = MemoryTracker()
    weights = tracker.record(1000, "weights", "layer 0")
    tracker.record(20, Purpose.KV_CACHE)
    scratch = tracker.record(3, Purpose.INTERMEDIATE)
    tracker.record(0)
    assert tracker.usage_by_purpose() == {"weights": 1000, "kv_cache": 20, "intermediate": 3, "unknown": 0}
    assert (tracker.total_bytes, tracker.allocation_count) == (1023, 4)
    tracker.release(weights)
    tracker.release(scratch)
    assert tracker.usage("weights") == 0 and tracker.usage(Purpose.KV_CACHE) == 20
    assert (tracker.total_bytes, tracker.allocation_count) == (20, 2)
    assert [held.purpose for held in tracker.allocations()] == [Purpose.KV_CACHE, Purpose.UNKNOWN]


def test_f33_report() -> None:
    tracker = MemoryTracker()
    tracker.record(25_165_824, "kv_cache", "KV cache of 24 layers, 2048 tokens")
    tracker.record(494_032_768, "weights")
    assert tracker.report() == (
        "memory: 519,198,592 bytes in 2 allocations\n"
        "  weights             494,032,768 bytes\n"
        "  kv_cache             25,165,824 bytes\n"
        "  intermediate                  0 bytes\n"
        "  unknown                       0 bytes\n"
        "  #2 weights: 494,032,768 bytes, no description\n"
        "  #1 kv_cache: 25,165,824 bytes, KV cache of 24 layers, 2048 tokens"
    )
    assert MemoryTracker().report().startswith("memory: 0 bytes in 0 allocations\n")


def test_f33_double_and_foreign_release_are_refused() -> None:
    tracker, other = MemoryTracker(), MemoryTracker()
    first, foreign = tracker.record(10), other.record(10)
    assert first.number == foreign.number
    with pytest.raises(ArenaError, match="double or foreign release"):
        tracker.release(foreign)
    assert tracker.total_bytes == 10
    tracker.release(first)
    with pytest.raises(ArenaError, match="double or foreign release"):
        tracker.release(first)
    assert (tracker.total_bytes, other.total_bytes) == (0, 10)


def test_f33_bad_numbers_and_purposes_are_refused() -> None:
    tracker = MemoryTracker()
    with pytest.raises(CacheValueError, match="nbytes is -1; must be at least 0"):
        tracker.record(-1)
    with pytest.raises(CacheValueError, match=r"nbytes is 1\.5; must be an integer"):
        tracker.record(1.5)  # type: ignore[arg-type]
    for call in (lambda: tracker.record(1, "cache"), lambda: tracker.usage("cache")):
        with pytest.raises(CacheValueError, match="purpose is 'cache'; must be one of weights, kv_cache, intermediate"):
            call()
    with pytest.raises(TypeError):
        tracker.attach(3, 10)
    assert tracker.allocation_count == 0


def test_f33_an_owner_takes_its_bytes_with_it() -> None:
    tracker, owner = MemoryTracker(), Owner()
    release = tracker.attach(owner, 100, "weights")
    tracker.attach(owner, 10)
    release()
    release()
    assert tracker.total_bytes == 10
    del owner
    gc.collect()
    assert tracker.total_bytes == 0


def test_f33_released_by_hand_and_then_collected() -> None:
    tracker, owner = MemoryTracker(), Owner()
    tracker.attach(owner, 100)
    (held,) = tracker.allocations()
    tracker.release(held)
    fresh = tracker.record(7)
    del owner
    gc.collect()
    assert tracker.allocations() == [fresh]


def test_f33_the_collector_may_run_inside_the_tracker() -> None:
    """Owners die in cycles while another thread and this one use the tracker: no deadlock, and the ledger ends at 0."""
    tracker, threshold = MemoryTracker(), gc.get_threshold()
    gc.set_threshold(5)

    def work() -> None:
        for number in range(3000):
            owner = Owner()
            owner.itself = owner  # type: ignore[attr-defined]
            tracker.attach(owner, number)
            if number % 10 == 0:
                assert tracker.total_bytes >= 0 and tracker.report()

    try:
        threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads), "a deadlock"
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert (tracker.total_bytes, tracker.allocation_count) == (0, 0)


def test_f33_releasing_what_the_collector_released_is_refused() -> None:
    tracker, owner = MemoryTracker(), Owner()
    tracker.attach(owner, 100)
    (held,) = tracker.allocations()
    del owner
    gc.collect()
    with pytest.raises(ArenaError, match="double or foreign release"):
        tracker.release(held)
    with pytest.raises(ArenaError, match="double or foreign release: None is not held"):
        tracker.release(None)  # type: ignore[arg-type]
    assert tracker.total_bytes == 0
