"""A model for the command line, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command_line import write_random_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights whose completions go on until --max-tokens."""
    return write_random_llama(tmp_path_factory.mktemp("random-llama"))
