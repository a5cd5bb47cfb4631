"""Part c: bandwidth, attention, writing of keys and values, products with packed weights, the sampler: how fast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_check_dense import flex, sdpa_decode, sdpa_prefill
from gpu_check_memory import FP8, GROUP, INTEGERS
from gpu_check_record import Figure, Report, ratio
from gpu_check_speed_more import append_speed, product_speed, sampler_speed
from gpu_check_timing import Call, Clock, against, bandwidth

from cortexstream.backends.cuda.quantize import quantize
from cortexstream.kernels.torch.quantized_pool import Pool, QuantizedPool
from cortexstream.kernels.triton.decode_attention import choose_config, decode_attention, make_workspace
from cortexstream.kernels.triton.decode_splits import split_offsets
from cortexstream.kernels.triton.prefill_attention import choose_config as choose_prefill_config
from cortexstream.kernels.triton.prefill_attention import prefill_attention, query_tiles

HALF, BRAIN = torch.float16, torch.bfloat16
PAGE = 64


class Shape(NamedTuple):
    """Rows of equal length that decode."""

    rows: int
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    dtype: torch.dtype
    kind: str = ""
    flex: bool = False  # is FlexAttention, which takes long to compile, measured beside it?

    def named(self) -> str:
        kept = f", KV {self.kind}" if self.kind else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B{self.rows} {self.heads}/{self.kv_heads}x{self.dim} S{self.tokens} {dtype}{kept}"

    def kv_bytes(self) -> int:
        """Of the keys and values that a launch must read, with scales."""
        numbers: int = 2 * self.rows * self.kv_heads * self.tokens * self.dim
        if self.kind in INTEGERS:
            return numbers * INTEGERS[self.kind] // 8 + int(2 * (numbers // GROUP) * self.dtype.itemsize)
        item: int = 1 if self.kind in FP8 else self.dtype.itemsize
        return numbers * item

    def moved(self) -> int:
        """Bytes: keys, values, queries and results."""
        numbers = 2 * self.rows * self.heads * self.dim
        return self.kv_bytes() + int(numbers * self.dtype.itemsize)


SHAPES = [
    Shape(16, 8, 8, 64, 2048, HALF, flex=True),
    Shape(16, 8, 8, 64, 2048, HALF, "fp8 e4m3"),
    Shape(16, 8, 8, 64, 2048, HALF, "int8"),
    Shape(16, 8, 2, 64, 2048, HALF),
    Shape(16, 8, 1, 64, 2048, HALF),
    Shape(16, 32, 8, 128, 2048, BRAIN, flex=True),
    Shape(16, 32, 8, 128, 2048, BRAIN, "fp8 e4m3"),
    Shape(16, 32, 8, 128, 2048, BRAIN, "int4"),
    Shape(64, 32, 8, 128, 2048, BRAIN),
    Shape(1, 32, 8, 128, 32768, BRAIN),
]
FEW_SHAPES = [Shape(2, 2, 1, 64, 64, HALF, flex=True), Shape(2, 2, 2, 64, 64, torch.float32, "int8")]
PROMPTS = [(1, 2048), (4, 2048), (1, 8192)]  # rows, tokens of each


def run(report: Report, smoke: bool) -> None:
    clock = Clock(smoke)
    found = bandwidth(clock)
    report.add("bandwidth", "4 GiB buffers", copy=found.copy, read=found.read)
    parts: list[tuple[str, Callable[[], None]]] = [
        (f"decode {shape.named()}", partial(decode_speed, report, clock, shape, found.read))
        for shape in (FEW_SHAPES if smoke else SHAPES)
    ]
    parts += [
        (f"prefill {rows} x {tokens}", partial(prefill_speed, report, clock, rows, tokens))
        for rows, tokens in ([(1, 5)] if smoke else PROMPTS)
    ]
    parts += [
        ("append", partial(append_speed, report, clock)),
        ("sampler", partial(sampler_speed, report, clock, found.read)),
        ("products", partial(product_speed, report, clock, found.read)),
    ]
    for name, part in parts:
        with report.attempt("speed", name):
            part()
        if not smoke:
            torch.cuda.empty_cache()


def pool_of(x: torch.Tensor, kind: str) -> Pool:
    if kind in INTEGERS:
        return QuantizedPool(*quantize(x, INTEGERS[kind], GROUP))
    return x.to(FP8[kind]) if kind else x


def decode_speed(report: Report, clock: Clock, shape: Shape, read: Figure) -> None:
    """Two launches and one, over block tables in random order; SDPA and FlexAttention on dense memory."""
    device, (rows, heads, kv_heads, dim, tokens) = clock.device, shape[:5]
    sets, blocks = clock.sets(shape.kv_bytes()), tokens // PAGE * rows
    q = torch.randn(rows, heads, dim, dtype=shape.dtype, device=device)
    lengths = torch.full((rows,), tokens, dtype=torch.int32, device=device)
    pools = [
        [pool_of(torch.randn(blocks * PAGE, kv_heads, dim, dtype=shape.dtype, device=device), shape.kind) for _ in "kv"]
        for _ in range(sets)
    ]
    tables = [torch.randperm(blocks, device=device).int().view(rows, -1) for _ in range(sets)]
    offsets = split_offsets(lengths, max_tokens=tokens, split=choose_config(q, dim).split)
    workspace = make_workspace(q, dim, max_tokens=tokens)

    def calls(tables: list[torch.Tensor], page: int | None, offsets: torch.Tensor | None) -> list[Call]:
        told: dict[str, Any] = {"block_tokens": page, "max_tokens": tokens, "offsets": offsets}
        pairs = zip(pools, tables, strict=True)
        return [
            partial(decode_attention, q, k, v, table, lengths, workspace=workspace, **told) for (k, v), table in pairs
        ]

    two, one = clock.time(calls(tables, PAGE, None)), clock.time(calls(tables, PAGE, offsets))
    fastest = min((two, one), key=lambda figure: figure.value or 0.0)
    figures = {"two_launches": two, "one_launch": one, **against(shape.moved(), fastest, read)}
    if shape.kind not in INTEGERS and shape.kind not in FP8:
        runs = [torch.arange(rows, device=device).int()[:, None] * tokens for _ in range(sets)]
        figures["runs"] = clock.time(calls(runs, None, offsets))
        dense = [[x.view(rows, tokens, kv_heads, dim).transpose(1, 2).contiguous() for x in pool] for pool in pools]
        del pools[:]
        figures["sdpa"] = sdpa_decode(clock, q, dense)
        figures["sdpa_ratio"] = ratio(figures["sdpa"], fastest, "times as long as ours")
        if shape.flex:
            figures["flex_attention"] = flex(clock, q, dense)
    report.add("decode", shape.named(), figures)


def prefill_speed(report: Report, clock: Clock, rows: int, tokens: int) -> None:
    """Whole prompts, causal: floating-point operations of the lower triangle alone."""
    heads, kv_heads, dim = (2, 1, 16) if clock.smoke else (32, 8, 128)
    dtype, device = (HALF if clock.smoke else BRAIN), clock.device
    blocks = -(-tokens // PAGE)
    q = torch.randn(rows * tokens, heads, dim, dtype=dtype, device=device)
    k, v = (torch.randn(rows * blocks * PAGE, kv_heads, dim, dtype=dtype, device=device) for _ in "kv")
    tables = torch.randperm(rows * blocks, device=device).int().view(rows, -1)
    tiles = query_tiles(
        [tokens] * rows, [tokens] * rows, sharing=heads // kv_heads, block_m=choose_prefill_config(q, dim).block_m,
        device=device,
    )  # fmt: skip
    ours = clock.time([partial(prefill_attention, q, k, v, tables, tiles, block_tokens=PAGE)])
    dense = [torch.randn(rows, n, tokens, dim, dtype=dtype, device=device) for n in (heads, kv_heads, kv_heads)]
    theirs = sdpa_prefill(clock, *dense)
    work = Figure(4.0 * rows * heads * dim * tokens * (tokens + 1) / 2 / 1e6, "operations")
    report.add(
        "prefill", f"{rows} x {tokens} tokens {heads}/{kv_heads}x{dim} {str(dtype).removeprefix('torch.')}",
        time=ours, rate=ratio(work, ours, "TFLOP/s"), sdpa=theirs, sdpa_rate=ratio(work, theirs, "TFLOP/s"),
    )  # fmt: skip
