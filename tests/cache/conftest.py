"""`lib`: every cache test runs on numpy, mlx and torch."""

from __future__ import annotations

import pytest

from tests.cache.libraries import Library


@pytest.fixture(params=["numpy", "mlx", "torch"])
def lib(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)
