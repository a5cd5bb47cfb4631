"""Compile the Triton kernels for GPUs that need not be here, and see what the machine code is like.

    python scripts/compile_kernels.py              print the figures and compare them with the limits
    python scripts/compile_kernels.py --write      make them the new limits: tests/kernels/limits.json

The real launchers run, with a driver that knows an architecture and has no device; what they would start is compiled.
ptxas, cuobjdump and nvdisasm come with triton. Every line of the modules' tables of tile sizes is compiled.

Nothing may spill registers or take more shared memory than a program can have. Against the limits, which hold for one
version of triton: no more registers or shared memory, no fewer 16-byte loads, the same kind of tensor-core products.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cortexstream.kernels.torch.quantized_pool import Pool, QuantizedPool
from cortexstream.kernels.triton.affine_matmul import affine_matmul
from cortexstream.kernels.triton.affine_matmul import dequantize as dequantize_weights
from cortexstream.kernels.triton.decode_attention import Config, choose_config, decode_attention
from cortexstream.kernels.triton.decode_splits import split_offsets
from cortexstream.kernels.triton.kv_append import kv_append
from cortexstream.kernels.triton.prefill_attention import choose_config as choose_prefill_config
from cortexstream.kernels.triton.prefill_attention import prefill_attention, query_tiles
from cortexstream.kernels.triton.rms_norm import rms_norm
from cortexstream.kernels.triton.rope_append import rope_append
from cortexstream.kernels.triton.sample import INTEGERS, RowParameters, Tables, sample
from cortexstream.kernels.triton.swiglu import gated

LIMITS = Path(__file__).parents[1] / "tests" / "kernels" / "limits.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90)
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}  # that a program can have; 163 KiB on 8.0, but 99 on 8.6 to 12.0
BRAIN, FLOAT = torch.bfloat16, torch.float32
FP8 = {80: torch.float8_e5m2, 90: torch.float8_e4m3fn}  # 8.0 has no e4m3
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([.A-Z0-9_]*)", re.MULTILINE)


class Figures(NamedTuple):
    """What a compiled kernel is like."""

    registers: int
    shared_bytes: int
    spills: int  # loads and stores of local memory
    wide_loads: int  # instructions that load 16 bytes
    products: str  # HGMMA (of warp groups, 9.0), HMMA, or "" without tensor cores


class NoDevice:
    """A driver for one architecture, enough to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(arch: int, launch: Callable[[], object]) -> list[Any]:
    """Every kernel that `launch` would start on a GPU of this architecture, compiled; nothing is started."""
    kernels: list[Any] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        kernels.append(run(self, *args, **{**kwargs, "warmup": True}))

    driver.set_active(NoDevice(arch))
    JITFunction.run = record
    try:
        launch()
    finally:
        JITFunction.run = run
        driver.set_active(None)
    return kernels


def figures(kernel: Any) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    found = INSTRUCTION.findall(code)
    names = [name for name, _ in found]
    (registers,) = re.findall(r"REG:(\d+)", usage)
    wide = sum(name in ("LDG", "LDGSTS") and ".128" in form for name, form in found)
    products = next((name for name in ("HGMMA", "QGMMA", "HMMA") if name in names), "")
    spills = names.count("LDL") + names.count("STL")
    return Figures(int(registers), kernel.metadata.shared, spills, wide, products)


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def arch_now() -> int:
    """The architecture that `compiled` compiles for, inside of a launch."""
    return int(driver.active.get_current_target().arch)


# ---------------------------------------------------------------------------------------------------------- variants


def pool(slots: int, heads: int, dim: int, dtype: torch.dtype, fp8: bool, bits: int) -> Pool:
    """Of `dtype`, of fp8, or of so many bits in groups of 64."""
    if not bits:
        return torch.empty(slots, heads, dim, dtype=FP8[arch_now()] if fp8 else dtype)
    packed = torch.empty(slots, heads, dim * bits // 32, dtype=torch.int32)
    return QuantizedPool(packed, *(torch.empty(slots, heads, dim // 64, dtype=dtype) for _ in range(2)))


def decode(
    heads: int, kv_heads: int, dim: int, value_dim: int | None = None, *, dtype: torch.dtype = BRAIN, fp8: bool = False,
    bits: int = 0, page: int | None = 64, one_launch: bool = False, sinks: bool = False, max_tokens: int = 512,
    rows: int = 2, config: Config | None = None, **options: Any,
) -> Callable[[], object]:  # fmt: skip
    def launch() -> object:
        value = value_dim or dim
        q = torch.empty(rows, heads, dim, dtype=dtype)
        k_pool, v_pool = (pool(2048, kv_heads, size, dtype, fp8, bits) for size in (dim, value))
        tables = torch.zeros(rows, 2048 // page if page else 1, dtype=torch.int32)
        lengths = torch.zeros(rows, dtype=torch.int32)
        line = config or choose_config(q, value, quantized=bits > 0)
        if one_launch:
            window = options.get("window")
            options["offsets"] = split_offsets(lengths, max_tokens=max_tokens, split=line.split, window=window)
        return decode_attention(
            q, k_pool, v_pool, tables, lengths, block_tokens=page, max_tokens=max_tokens, config=line,
            sinks=torch.empty(heads) if sinks else None, **options,
        )  # fmt: skip

    return launch


def prefill(
    heads: int, kv_heads: int, dim: int, value_dim: int | None = None, *, dtype: torch.dtype = BRAIN, fp8: bool = False,
    bits: int = 0, page: int | None = 64, causal: bool = True, sinks: bool = False, tokens: int = 100, **options: Any,
) -> Callable[[], object]:  # fmt: skip
    def launch() -> object:
        value = value_dim or dim
        q = torch.empty(tokens, heads, dim, dtype=dtype)
        k_pool, v_pool = (pool(2048, kv_heads, size, dtype, fp8, bits) for size in (dim, value))
        tables = torch.zeros(1, 2048 // page if page else 1, dtype=torch.int32)
        block_m = choose_prefill_config(q, value).block_m
        tiles = query_tiles(
            [tokens], [tokens], sharing=heads // kv_heads, block_m=block_m, device=q.device, causal=causal
        )  # fmt: skip
        return prefill_attention(
            q, k_pool, v_pool, tables, tiles, block_tokens=page, sinks=torch.empty(heads) if sinks else None, **options
        )  # fmt: skip

    return launch


def append(
    heads: int, dim: int, *, fp8: bool = False, bits: int = 0, rope: int = 0, q_heads: int = 0, norm: bool = False,
    tokens: int = 3, slots_of_pools: int = 64,
) -> Callable[[], None]:  # fmt: skip
    def launch() -> None:
        parts = torch.empty(tokens, (q_heads + 2 * heads) * dim, dtype=BRAIN)
        q, k, v = (x.unflatten(1, (-1, dim)) for x in parts.split([q_heads * dim, heads * dim, heads * dim], 1))
        k_pool, v_pool = (pool(slots_of_pools, heads, dim, BRAIN, fp8, bits) for _ in range(2))
        slots = torch.zeros(tokens, dtype=torch.int32)
        if rope:
            weight, table = torch.empty(dim, dtype=BRAIN) if norm else None, torch.empty(99, rope)
            rope_append(
                q, k, v, k_pool, v_pool, table, slots, slots, q_weight=weight, k_weight=weight, check=False
            )  # fmt: skip
        else:
            kv_append(k, v, k_pool, v_pool, slots, check=False)

    return launch


def norm(dim: int, residual: bool = False) -> Callable[[], object]:
    def launch() -> object:
        x = torch.empty(3, dim, dtype=BRAIN)
        return rms_norm(x, torch.empty(dim, dtype=BRAIN), 1e-6, residual=torch.empty_like(x) if residual else None)

    return launch


def affine(
    rows: int, bits: int, group: int = 64, dtype: torch.dtype = BRAIN, shape: tuple[int, int] = (4096, 4096)
) -> Callable[[], object]:
    """A product with packed weights of this shape, [N, K]; with 0 rows their dequantisation."""

    def launch() -> object:
        columns, depth = shape
        packed = torch.zeros(columns, depth * bits // 32, dtype=torch.int32)
        scales, biases = (torch.empty(columns, depth // group, dtype=dtype) for _ in range(2))
        if rows == 0:
            return dequantize_weights(packed, scales, biases, bits, group, dtype)
        return affine_matmul(torch.empty(rows, depth, dtype=dtype), packed, scales, biases, bits, group)

    return launch


def draw(
    vocab: int, *, dtype: torch.dtype = FLOAT, tables: bool = True, rows: int = 3, **options: Any
) -> Callable[[], object]:  # fmt: skip
    def launch() -> object:
        row = {name: torch.empty(rows, dtype=INTEGERS.get(name, FLOAT)) for name in RowParameters._fields}
        kinds = {"bias": FLOAT, "counts": torch.int32, "seen": torch.uint8} if tables else {}
        given = Tables(**{name: torch.empty(4, vocab, dtype=kind) for name, kind in kinds.items()})
        return sample(torch.empty(rows, vocab, dtype=dtype), RowParameters(**row), given, **options)

    return launch


def gate(dim: int, activation: str, dtype: torch.dtype = BRAIN) -> Callable[[], object]:
    return lambda: gated(torch.empty(3, 2 * dim, dtype=dtype), activation)


VARIANTS: dict[str, Callable[[], object]] = {  # name -> launch; heads/key heads x dim
    "decode 32/32x64": decode(32, 32, 64),
    "decode 32/8x128, two splits": decode(32, 8, 128, max_tokens=2048),
    "decode 16/8x256": decode(16, 8, 256),
    "decode 16/16x192,128": decode(16, 16, 192, 128),
    "decode 64/8x64, window, cap, sinks": decode(64, 8, 64, window=128, softcap=50.0, sinks=True),
    "decode 32/8x128, blocks of 16": decode(32, 8, 128, page=16),
    "decode 32/8x128, runs": decode(32, 8, 128, page=None),
    "decode 32/8x128, fp8": decode(32, 8, 128, fp8=True),
    "decode 32/8x128, int8": decode(32, 8, 128, bits=8),
    "decode 32/8x128, int4": decode(32, 8, 128, bits=4),
    "decode 8/8x64, float32": decode(8, 8, 64, dtype=FLOAT),
    "decode 8/8x128, float32": decode(8, 8, 128, dtype=FLOAT),
    "decode 8/8x256, float32": decode(8, 8, 256, dtype=FLOAT),
    "decode 32/32x64, one launch": decode(32, 32, 64, one_launch=True),
    "decode 32/8x128, one launch": decode(32, 8, 128, one_launch=True),
    "decode 16/8x256, one launch": decode(16, 8, 256, one_launch=True),
    "decode 16/8x64, int4, one launch": decode(16, 8, 64, bits=4, one_launch=True),
    "decode 16/8x256, int8, one launch": decode(16, 8, 256, bits=8, one_launch=True),
    "decode 16/16x64, int8, two splits": decode(16, 16, 64, bits=8, max_tokens=2048),
    "decode 32/8x128, int4, one launch": decode(32, 8, 128, bits=4, one_launch=True),
    "decode 8/8x64, int8, float32": decode(8, 8, 64, bits=8, dtype=FLOAT),
    "decode 8/8x128, int4, float32": decode(8, 8, 128, bits=4, dtype=FLOAT),
    "decode 8/8x256, int8, float32": decode(8, 8, 256, bits=8, dtype=FLOAT),
    "prefill 32/32x64": prefill(32, 32, 64),
    "prefill 32/8x128": prefill(32, 8, 128),
    "prefill 16/8x256": prefill(16, 8, 256),
    "prefill 16/16x192,128": prefill(16, 16, 192, 128),
    "prefill 64/8x64, window, cap, sinks": prefill(64, 8, 64, window=128, softcap=50.0, sinks=True),
    "prefill 32/8x128, blocks of 16": prefill(32, 8, 128, page=16),
    "prefill 32/8x128, fp8": prefill(32, 8, 128, fp8=True),
    "prefill 32/32x64, int4": prefill(32, 32, 64, bits=4),
    "prefill 32/8x128, int8": prefill(32, 8, 128, bits=8),
    "prefill 32/8x128, int4": prefill(32, 8, 128, bits=4),
    "prefill 16/8x256, int8": prefill(16, 8, 256, bits=8),
    "prefill 8/8x64, int4, float32": prefill(8, 8, 64, bits=4, dtype=FLOAT),
    "prefill 8/8x128, int8, float32": prefill(8, 8, 128, bits=8, dtype=FLOAT),
    "prefill 8/8x256, int4, float32": prefill(8, 8, 256, bits=4, dtype=FLOAT),
    "prefill 8/8x64, float32": prefill(8, 8, 64, dtype=FLOAT),
    "prefill 8/8x128, float32": prefill(8, 8, 128, dtype=FLOAT),
    "prefill 8/8x256, float32": prefill(8, 8, 256, dtype=FLOAT),
    "append 8x128": append(8, 128),
    "append 8x128, fp8": append(8, 128, fp8=True),
    "append 8x128, int8": append(8, 128, bits=8),
    "append 8x128, int4": append(8, 128, bits=4),
    "rope and append 32/8x128, int8": append(8, 128, rope=128, q_heads=32, bits=8),
    "rope and append 32/8x128, int4": append(8, 128, rope=128, q_heads=32, bits=4),
    "rope and append 32/8x128, norms": append(8, 128, rope=128, q_heads=32, norm=True),
    "rope and append 32/32x80, 32 turn": append(32, 80, rope=32, q_heads=32),
    "norm 128": norm(128),
    "norm 2048": norm(2048),
    "norm 4096, residual": norm(4096, residual=True),
    "norm 16384": norm(16384),
    "draw from 128256, all there is": draw(128256, logprobs=True, count=True),
    "draw from 151936, bfloat16, no tables": draw(151936, dtype=BRAIN, tables=False),
    "draw from 128256, no filters": draw(128256, tables=False, filters=False),
    "draw from 50257, no filters": draw(50257, tables=False, filters=False),
    "gate 14336, silu": gate(14336, "silu"),
    "gate 8192, gelu": gate(8192, "gelu"),
    "gate 8192, gelu_tanh": gate(8192, "gelu_tanh"),
    "gate 1000, silu, float32": gate(1000, "silu", FLOAT),
    **{
        f"4-bit product, groups of {group}, {rows} rows": affine(rows, 4, group)
        for group in (32, 64, 128)
        for rows in (16, 32, 64)
    },
    "8-bit product, groups of 64, 16 rows": affine(16, 8),
    "8-bit product, groups of 128, 32 rows": affine(32, 8, 128),
    "8-bit product, groups of 128, 64 rows": affine(64, 8, 128),
    "4-bit product, float16, 16 rows": affine(16, 4, dtype=torch.float16),
    "8-bit product, float16, groups of 128, 16 rows": affine(16, 8, 128, torch.float16),
    "4-bit product, float32, groups of 32": affine(16, 4, 32, FLOAT),
    "4-bit product, float32, groups of 64": affine(16, 4, 64, FLOAT),
    "8-bit product, float32, groups of 128": affine(16, 8, 128, FLOAT),
    "4-bit product, 1 row, not split": affine(1, 4, shape=(131072, 4096)),
    "4-bit weights dequantised": affine(0, 4),
    "6-bit weights dequantised": affine(0, 6),
    "8-bit weights dequantised": affine(0, 8),
}


def measured(arch: int, name: str) -> dict[str, Figures]:
    """The figures of each kernel of a variant, by "sm_90 variant: kernel"."""
    return {f"sm_{arch} {name}: {kernel.name}": figures(kernel) for kernel in compiled(arch, VARIANTS[name])}


def faults(name: str, got: Figures, limits: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel's figures, as sentences; `limits` is what LIMITS holds."""
    found = []
    if got.spills:
        found.append(f"{got.spills} instructions spill registers")
    if got.shared_bytes > SHARED_BYTES[int(name[3:5])]:
        found.append(f"{got.shared_bytes} bytes of shared memory are more than a program can have")
    if limits["triton"] != triton.__version__:
        return found  # another compiler
    if name not in limits["kernels"]:
        return [*found, "no limits are recorded: run scripts/compile_kernels.py --write"]
    limit = Figures(**limits["kernels"][name])
    for field in ("registers", "shared_bytes"):
        if getattr(got, field) > getattr(limit, field):
            found.append(f"{field} {getattr(got, field)} above the limit {getattr(limit, field)}")
    if got.wide_loads < limit.wide_loads:
        found.append(f"wide_loads {got.wide_loads} below the limit {limit.wide_loads}")
    if got.products != limit.products:
        found.append(f"products {got.products or 'without tensor cores'}, not {limit.products}")
    return found


def main() -> int:
    """Print a line a kernel: registers, bytes of shared memory, spills, 16-byte loads, tensor-core products."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the figures as the new limits")
    arguments = parser.parse_args()
    limits = {"triton": ""} if arguments.write else json.loads(LIMITS.read_text())
    found, kernels = 0, {}
    for arch in ARCHITECTURES:
        for variant in VARIANTS:
            for name, got in measured(arch, variant).items():
                kernels[name] = got._asdict()
                print(
                    f"{name:66} {got.registers:4} {got.shared_bytes:7} {got.spills:3} {got.wide_loads:4} {got.products}"
                )
                for problem in faults(name, got, limits):
                    found += 1
                    print(f"    {problem}")
    if arguments.write and not found:
        LIMITS.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
