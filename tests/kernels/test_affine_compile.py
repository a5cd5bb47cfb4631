"""Machine code of the product with packed weights, for GPUs that are not here (P2, P12, F47)."""

from __future__ import annotations

import json
import os
import re
from importlib import import_module
from typing import Any

import pytest

from tests.conftest import require

torch: Any = require("torch")
require("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process, not compiled", allow_module_level=True)
script: Any = import_module("scripts.compile_kernels")
LIMITS = json.loads(script.LIMITS.read_text())["kernels"]


def test_p12_packed_words_are_loaded_sixteen_bytes_at_a_time_and_meet_tensor_cores() -> None:
    """Of the recorded limits, which the machine code keeps."""
    products = {name: limit for name, limit in LIMITS.items() if name.endswith(": affine_matmul_kernel")}
    assert len(products) >= 30
    for name, limit in products.items():
        tensor_cores = "HGMMA" if name.startswith("sm_90") else "HMMA"
        assert limit["products"] == ("" if "float32" in name else tensor_cores), name
        assert limit["wide_loads"] >= 3 and limit["spills"] == 0, name


@pytest.mark.parametrize("arch", script.ARCHITECTURES)
def test_f47_numbers_of_rows_need_no_new_compilation(arch: int) -> None:
    """A kernel for each height of a tile, and one that adds up the splits."""
    kernels = [kernel for rows in range(1, 65) for kernel in script.compiled(arch, script.affine(rows, 4))]
    assert {kernel.name for kernel in kernels} == {"affine_matmul_kernel", "affine_merge_kernel"}
    assert len({kernel.hash for kernel in kernels}) == 4


@pytest.mark.parametrize("arch", script.ARCHITECTURES)
def test_p2_what_a_row_adds_up_is_the_same_instruction_in_every_tile(arch: int) -> None:
    """The additions of groups are fused, whatever the height of the tile: no product is rounded on its own."""
    for rows in (16, 32, 64):
        (kernel, _) = script.compiled(arch, script.affine(rows, 4))
        code = kernel.asm["ptx"]
        assert "fma.rn.f32" in code and not re.search(r"\b(mul|add|sub)(\.\w+)*\.f32", code), rows


@pytest.mark.parametrize("arch", script.ARCHITECTURES)
def test_f47_numbers_of_an_embeddings_rows_need_no_new_compilation(arch: int) -> None:
    """One group to a row: a step of 16 tokens has a number of groups that divides by 16, others do not."""
    kernels = [k for rows in range(1, 33) for k in script.compiled(arch, script.affine(0, 4, shape=(rows, 64)))]
    assert {kernel.name for kernel in kernels} == {"dequantize_kernel"}
    assert len({kernel.hash for kernel in kernels}) == 1
