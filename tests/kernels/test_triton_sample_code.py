"""What is compiled for `kernels.triton.sample`: its launches, compilations and rounding (F47, F75, P5)."""

from __future__ import annotations

import os
import re
from importlib import import_module
from typing import Any

import pytest

from tests.conftest import require

torch = require("torch")
require("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process, not compiled", allow_module_level=True)
script: Any = import_module("scripts.compile_kernels")

PLAIN = ["scan_kernel", "draw_kernel"]
FILTERED = ["scan_kernel", "survey_kernel", "list_kernel", "draw_kernel"]


def test_f75_rows_without_filters_take_two_launches() -> None:
    for filters, names in ((False, PLAIN), (True, FILTERED)):
        found = script.compiled(90, script.draw(4096, tables=False, filters=filters))
        assert [kernel.name for kernel in found] == names


def test_f47_batches_need_no_new_compilation() -> None:
    found = [k for rows in (1, 2, 3, 16, 33, 256) for k in script.compiled(90, script.draw(4096, rows=rows))]
    assert len({kernel.hash for kernel in found}) == len(FILTERED)


@pytest.mark.parametrize("arch", script.ARCHITECTURES)
def test_p5_products_and_quotients_are_rounded_as_the_definition_rounds_them(arch: int) -> None:
    """No product is fused with a sum but inside of Triton's logarithm, whose instructions are marked ftz, and
    penalties and temperature divide to the nearest float."""
    for kernel in script.compiled(arch, script.draw(128256, logprobs=True, count=True)):
        code = kernel.asm["ptx"]
        assert not re.findall(r"\bfma\.rn\.f32\b", code), kernel.name
        assert len(re.findall(r"\bdiv\.rn\.f32\b", code)) >= 2, kernel.name
