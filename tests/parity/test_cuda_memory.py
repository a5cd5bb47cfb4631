"""The CUDA backend's memory over many steps, on its CPU device (F52): pools stay where they are, nothing piles up."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from cortexstream.backend import BackendOptions
from cortexstream.plan import PENDING, KVRows, PlanRow, SampleSpec, StepPlan, ring_tokens
from tests.conftest import require
from tests.parity.torch_models import ARCHITECTURES, write_model

torch: Any = require("torch")
require("transformers")

STEPS, BLOCK = 1000, 4


def tensor_bytes() -> int:
    """Bytes of all tensors that somebody still holds."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def test_f52_a_thousand_steps_leave_no_tensors_behind(tmp_path: Path) -> None:
    """Rows with a window, seeded draws and penalties; a row leaves and another takes its slot every hundred steps."""
    from cortexstream.backends.cuda import create

    folder = write_model(tmp_path, "gemma2", {**ARCHITECTURES["gemma2"], "num_hidden_layers": 2})
    backend: Any = create(BackendOptions(str(folder), block_tokens=BLOCK, max_num_seqs=2, extra={"device": "cpu"}))
    (window,) = backend.model.windows
    ring = ring_tokens(window, BLOCK) // BLOCK
    backend.allocate_kv(2 * 26, (2 * ring,))
    stores = [store for pool in backend._memory.pools for store in pool._stores]
    places = [part.data_ptr() for store in stores for part in store.parts]
    rows = [
        KVRows(tuple(range(26 * s, 26 * s + 26)), True, (KVRows(tuple(range(ring * s, ring * s + ring)), True),))
        for s in range(2)
    ]
    spec = SampleSpec(temperature=0.8, seed=3, top_p=0.9, frequency_penalty=0.3, output_tokens=(4, 4, 9))
    after = 0
    for step in range(STEPS):
        position = step % 100
        token = 5 if position == 0 else PENDING
        plan = StepPlan(step + 1, tuple(
            PlanRow(s + 2 * (step // 100), s, (token,), position, rows[s], spec) for s in range(2)
        ))  # fmt: skip
        result = backend.collect(backend.submit(plan))
        assert not any(row.error for row in result.rows)
        if step == 10:
            after = tensor_bytes()
    assert tensor_bytes() <= after
    assert [part.data_ptr() for store in stores for part in store.parts] == places


def test_free_memory_counts_what_torch_keeps_of_freed_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose cache of freed tensors is 3 bytes until it is emptied."""
    from cortexstream.backends.cuda.backend import _free_bytes

    kept = [3]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 - sum(kept), 200))
    assert _free_bytes(torch.device("cuda", 0)) == 100
    assert _free_bytes(torch.device("cpu")) > 100
