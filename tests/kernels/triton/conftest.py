"""Tests of the Triton kernels run on a GPU if torch has one, else in Triton's interpreter, in a process of its own.

The folder's tests are collected as all others are. The first of a file to run starts `tests.kernels.triton.interpreter`
for all of the file that were selected; each then waits for its own outcome. With TRITON_INTERPRET=1 they run in this
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import pytest

from tests.conftest import require

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


class Interpreter:
    """The other process: node ids go in, outcomes come out in whatever order it runs them."""

    def __init__(self, items: list[pytest.Item]) -> None:
        self._outcomes: dict[str, tuple[str, str]] = {}
        self._files = [tempfile.TemporaryFile("w+"), tempfile.NamedTemporaryFile("w")]
        self._log, names = self._files
        names.write("\n".join(item.nodeid for item in items))
        names.flush()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.triton.interpreter", names.name], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=self._log, env={**os.environ, "TRITON_INTERPRET": "1"},
        )  # fmt: skip

    def outcome(self, nodeid: str) -> tuple[str, str]:
        """("passed", "failed" or "skipped", why) of a test; waits for it."""
        lines: IO[str] | None = self._process.stdout
        assert lines is not None
        while nodeid not in self._outcomes:
            line = lines.readline()
            if not line:
                self._log.seek(0)
                return (
                    "failed",
                    f"the interpreter's process ended with {self._process.wait()}:\n{self._log.read()[-4000:]}",
                )
            name, outcome, why = json.loads(line)
            self._outcomes[name] = outcome, why
        return self._outcomes[nodeid]

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        for file in self._files:
            file.close()


INTERPRETERS = pytest.StashKey[dict[Path, Interpreter]]()  # by file


def runs_here() -> bool:
    """Can kernels run in this process? Only asked once torch is imported: the tests need it to be collected."""
    return os.environ.get("TRITON_INTERPRET") == "1" or bool(sys.modules["torch"].cuda.is_available())


class NeedsTriton(pytest.Module):
    """A file of this folder: left out, or failed if CI must have them, where torch or triton are missing."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        require("torch")
        require("triton")
        return super().collect()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    made: pytest.Module = NeedsTriton.from_parent(parent, path=module_path)
    return made


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if runs_here():
        return None
    config, session = pyfuncitem.config, pyfuncitem.session
    running = config.stash.setdefault(INTERPRETERS, {})
    if pyfuncitem.path not in running:
        running[pyfuncitem.path] = Interpreter([item for item in session.items if item.path == pyfuncitem.path])
        config.add_cleanup(running[pyfuncitem.path].stop)
    outcome, why = running[pyfuncitem.path].outcome(pyfuncitem.nodeid)
    if outcome == "failed":
        pytest.fail(why, pytrace=False)
    if outcome == "skipped":
        pytest.skip(why)
    return True
