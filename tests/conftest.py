"""What every test may use: `require`, for parts that are not installed everywhere."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType

import pytest

VARIABLE = "CORTEXSTREAM_REQUIRE"
OPTIONAL = {  # name: (module to import, how to get it)
    "mlx": ("mlx.core", 'pip install -e ".[mlx]"'),
    "mlx_lm": ("mlx_lm", 'pip install -e ".[mlx]"'),
    "torch": ("torch", 'pip install torch, or pip install -e ".[cuda]" with an NVIDIA GPU'),
    "transformers": ("transformers", "pip install transformers"),
    "triton": ("triton", 'pip install -e ".[cuda]"'),
}


def required() -> frozenset[str]:
    """Names in CORTEXSTREAM_REQUIRE (comma separated): what must not be missing where these tests run."""
    names = frozenset(name.strip() for name in os.environ.get(VARIABLE, "").split(",")) - {""}
    unknown = names - OPTIONAL.keys()
    if unknown:
        raise pytest.UsageError(f"{VARIABLE} names {', '.join(sorted(unknown))}; known are {', '.join(OPTIONAL)}")
    return names


def require(name: str) -> ModuleType:
    """Import an optional part, `OPTIONAL[name]`; for use in a test, a fixture, or at the top of a test module.

    Skips with a reason when it is not installed, or fails when CORTEXSTREAM_REQUIRE names it. A part that is installed
    but does not import is an error, never a skip.
    """
    module, remedy = OPTIONAL[name]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (name, module):
            raise
    reason = f"{name} is not installed; get it with: {remedy}"
    if name in required():
        pytest.fail(f"{VARIABLE} names {name}, but {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require_backend(name: str) -> None:
    """`require` what a real backend needs: "mlx", "cuda", or with a layout as in "reference-run"."""
    for part in {"mlx": ("mlx", "mlx_lm"), "cuda": ("torch", "transformers")}.get(name.partition("-")[0], ()):
        require(part)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked full_grid, unless -m says what to run."""
    if config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("full_grid")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full_grid")]


def pytest_unconfigure() -> None:
    """Tests that call MLX on the main thread must end as MLX asks every thread to end, or the process may abort."""
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].clear_streams()


def pytest_configure(config: pytest.Config) -> None:
    """A misspelt name stops the run at once."""
    required()
