"""The Triton kernels compile for GPUs that are not here, and their machine code is as good as recorded (P12, F47)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

from tests.conftest import require

torch = require("torch")
require("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process, not compiled", allow_module_level=True)
script: Any = import_module("scripts.compile_kernels")
LIMITS = json.loads(script.LIMITS.read_text())


@pytest.mark.parametrize("arch", script.ARCHITECTURES)
@pytest.mark.parametrize("variant", script.VARIANTS)
def test_p12_machine_code_is_within_its_limits(variant: str, arch: int) -> None:
    kernels = script.measured(arch, variant)
    assert kernels
    found = [f"{name}: {fault}" for name, got in kernels.items() for fault in script.faults(name, got, LIMITS)]
    assert not found, "\n".join(found)


def test_limits_are_of_variants_that_exist() -> None:
    recorded = {name.split(": ")[0] for name in LIMITS["kernels"]}
    assert recorded == {f"sm_{arch} {variant}" for arch in script.ARCHITECTURES for variant in script.VARIANTS}


def test_tensor_cores_and_wide_loads_are_where_they_are_promised() -> None:
    """Of the limits themselves: nobody may record a kernel that lost them."""
    for name, limit in LIMITS["kernels"].items():
        kernel = name.split(": ")[1]
        if kernel in ("prefill_kernel", "decode_split_kernel", "decode_persistent_kernel"):
            wanted = "" if "float32" in name else "HGMMA" if "sm_90 prefill" in name else "HMMA"
            assert limit["products"] == wanted, name
            assert limit["wide_loads"] >= (2 if "int" in name else 8), name  # rows of few bytes, by many threads
        if kernel in ("kv_append_kernel", "rope_append_kernel"):
            assert limit["wide_loads"] >= 2, name
        assert limit["spills"] == 0, name


NAME = "sm_90 decode 32/8x128, two splits: decode_split_kernel"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"spills": 2}, "2 instructions spill registers"),
        ({"shared_bytes": 10**6}, "1000000 bytes of shared memory are more than a program can have"),
        ({"shared_bytes": 80_000}, "shared_bytes 80000 above the limit"),
        ({"registers": 200}, "registers 200 above the limit"),
        ({"wide_loads": 1}, "wide_loads 1 below the limit"),
        ({"products": ""}, "products without tensor cores, not HMMA"),
    ],
)
def test_worse_code_is_found(changed: dict[str, Any], words: str) -> None:
    """The control: each of these is one fault or, far out of bounds, two."""
    limits = {**LIMITS, "triton": script.triton.__version__}
    good = script.Figures(**limits["kernels"][NAME])
    assert script.faults(NAME, good, limits) == []
    assert words in "; ".join(script.faults(NAME, good._replace(**changed), limits))


def test_a_kernel_that_spills_is_measured_as_one() -> None:
    """Real code, from tiles that are too large."""
    config = script.Config(512, 64, 1, 3, 1)
    (kernel,) = script.compiled(90, script.decode(16, 8, 256, config=config))
    assert script.figures(kernel).spills > 0


def launches(name: str) -> Iterator[Callable[[], object]]:
    """The same work at many lengths and numbers of rows; and pools of many sizes, as a step's scratch memory has."""
    for n in range(1, 51):
        if name == "decode":
            yield script.decode(4, 2, 64, max_tokens=30 * n, rows=n)
        elif name == "decode, one launch":
            yield script.decode(4, 2, 64, max_tokens=30 * n, rows=n, one_launch=True)
        elif name == "decode, int4":
            yield script.decode(4, 2, 64, bits=4, max_tokens=30 * n, rows=n)
        elif name == "prefill":
            yield script.prefill(4, 2, 64, tokens=7 * n)
        elif name == "prefill, int8":
            yield script.prefill(4, 2, 64, bits=8, tokens=7 * n)
        else:
            bits = 4 if "int4" in name else 0
            rope = 64 if "rope" in name else 0
            yield script.append(2, 64, bits=bits, q_heads=4, rope=rope, tokens=n, slots_of_pools=2 * n)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("decode", {"decode_split_kernel", "decode_merge_kernel"}),
        ("decode, one launch", {"split_offsets_kernel", "decode_persistent_kernel"}),
        ("decode, int4", {"decode_split_kernel", "decode_merge_kernel"}),
        ("prefill", {"prefill_kernel"}),
        ("prefill, int8", {"prefill_kernel"}),
        ("append", {"kv_append_kernel"}),
        ("append, int4", {"kv_append_kernel"}),
        ("rope", {"rope_append_kernel"}),
    ],
)
def test_f47_lengths_and_batches_need_no_new_compilation(name: str, kernels: set[str]) -> None:
    """And keys and values go to their pools in one launch."""
    found = [kernel for launch in launches(name) for kernel in script.compiled(90, launch)]
    assert {kernel.name for kernel in found} == kernels
    assert len({kernel.hash for kernel in found}) == len(kernels)
