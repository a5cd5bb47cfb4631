"""Every backend with every layout that it has."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from cortexstream.backend import Backend, BackendOptions
from cortexstream.models import tiny_folder
from tests.conftest import require_backend
from tests.contract.plans import BLOCK, CASES, NUM_BLOCKS


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name, layout = request.param
    require_backend(name)
    options: dict[str, dict[str, Any]] = {"null": {"vocab_size": 384}, "cuda": {"device": "cpu"}}
    extra = options.get(name, {})
    model = None if name == "null" else str(tiny_folder())
    module = import_module(f"cortexstream.backends.{name}")
    assert module.available() is None
    made: Backend = module.create(
        BackendOptions(model, max_num_seqs=4, block_tokens=BLOCK, kv_layout=layout, extra=extra)
    )
    made.allocate_kv(NUM_BLOCKS)
    yield made
    made.close()
    made.close()  # idempotent
