"""The process in which this folder's tests run: `python -m tests.kernels.triton.interpreter FILE`.

Triton decides when it is imported whether kernels are compiled or interpreted, so a process of its own has
TRITON_INTERPRET=1. FILE holds the tests' node ids, one a line. Prints a line of JSON for each test that ended.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TextIO

import pytest


class Reporter:
    """A pytest plugin that tells each test's outcome at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first phase that does not pass is the test's outcome, else its last."""
        over = report.when == "teardown" or not report.passed
        if over and report.nodeid not in self._told:
            self._told.add(report.nodeid)
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            print(json.dumps([report.nodeid, report.outcome, text]), file=self._stream, flush=True)


def main() -> int:
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what pytest and the tests print is for a person, on stderr
    everything = "full_grid or not full_grid"  # the tests were selected by name
    options = [f"@{sys.argv[1]}", "-m", everything, "-q", "-p", "no:cacheprovider"]
    return int(pytest.main(options, plugins=[Reporter(stream)]))


if __name__ == "__main__":
    sys.exit(main())
