"""Part c, what is not attention: writing keys and values, products with packed weights, the sampler."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gpu_check_record import Figure, Report, missing, ratio, reason
from gpu_check_timing import Call, Clock, against

from cortexstream.kernels.triton.affine_matmul import affine_matmul
from cortexstream.kernels.triton.kv_append import kv_append
from cortexstream.kernels.triton.rope_append import rope_append
from cortexstream.kernels.triton.sample import RowParameters, sample

BRAIN = torch.bfloat16
APPENDS = [(16, 8, 8, 64, torch.float16), (64, 32, 8, 128, BRAIN)]  # rows, heads, key heads, dim
SLOTS = 1 << 17  # of a pool: the rows' slots are all over it
LAUNCHES = 16  # with slots of their own
PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate and up": (28672, 4096), "down": (4096, 14336)}  # [N, K]
ROWS = (1, 16, 64, 512)
GROUP = 64
VOCABULARY = 128256

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # packed, scales, biases


def append_speed(report: Report, clock: Clock) -> None:
    """One token of every row. So few bytes that a launch's own time is what is seen."""
    shapes = [(2, 2, 1, 16, torch.float16)] if clock.smoke else APPENDS
    for rows, heads, kv_heads, dim, dtype in shapes:
        device, num_slots = clock.device, 64 if clock.smoke else SLOTS
        q, k, v = (torch.randn(rows, n, dim, dtype=dtype, device=device) for n in (heads, kv_heads, kv_heads))
        k_pool, v_pool = (torch.zeros(num_slots, kv_heads, dim, dtype=dtype, device=device) for _ in "kv")
        table = torch.randn(4096, dim, device=device)
        positions = torch.randint(0, 4096, (rows,), device=device)
        slots = [torch.randperm(num_slots, device=device)[:rows] for _ in range(1 if clock.smoke else LAUNCHES)]
        one: list[Call] = [partial(kv_append, k, v, k_pool, v_pool, where, check=False) for where in slots]
        both: list[Call] = [
            partial(rope_append, q, k, v, k_pool, v_pool, table, positions, where, check=False) for where in slots
        ]
        kv_bytes = 2 * (k.nbytes + v.nbytes)
        report.add(
            "append", f"B{rows} {heads}/{kv_heads}x{dim} {str(dtype)[6:]}", kv_append=clock.time(one),
            kv_append_bytes=Figure(kv_bytes / 1e3, "kB", "counted"), rope_append=clock.time(both),
            rope_append_bytes=Figure((kv_bytes + 2 * q.nbytes) / 1e3, "kB", "counted"),
        )  # fmt: skip


def product_speed(report: Report, clock: Clock, read: Figure) -> None:
    """x [M, K] times packed weights; torch's int4 product and cuBLAS on bf16 weights of the same shape."""
    shapes = {"small": (64, 128)} if clock.smoke else PRODUCTS
    dtype = torch.float32 if clock.smoke else BRAIN
    for name, (columns, depth) in shapes.items():
        dense = torch.empty(0)
        for bits in (4, 8):
            packed_bytes = columns * depth * bits // 8 + 2 * columns * (depth // GROUP) * dtype.itemsize
            weights = [random_packed(columns, depth, bits, dtype, clock) for _ in range(clock.sets(packed_bytes))]
            for rows in (2,) if clock.smoke else ROWS:
                label = f"W{bits}A16 {name} {columns}x{depth}, M {rows}"
                with report.attempt("product", label):
                    x = torch.randn(rows, depth, dtype=dtype, device=clock.device)
                    calls: list[Call] = [partial(affine_matmul, x, *w, bits, GROUP) for w in weights]
                    moved = packed_bytes + (x.numel() + rows * columns) * dtype.itemsize
                    figures = against(moved, clock.time(calls), read)
                    if bits == 4:
                        figures["torch_int4"] = int4(clock, x, weights, columns, depth)
                    dense_bytes = columns * depth * dtype.itemsize
                    if not len(dense):
                        copies = clock.sets(dense_bytes)
                        dense = torch.randn(copies, columns, depth, dtype=dtype, device=clock.device) / depth**0.5
                    figures["cublas"] = clock.time([partial(torch.nn.functional.linear, x, w) for w in dense])
                    figures["cublas_ratio"] = ratio(figures["cublas"], figures["time"], "times as long as ours")
                    report.add("product", label, figures)


def random_packed(columns: int, depth: int, bits: int, dtype: torch.dtype, clock: Clock) -> Weights:
    shape, device = (columns, depth // GROUP), clock.device
    packed = torch.randint(-(2**31), 2**31 - 1, (columns, depth * bits // 32), dtype=torch.int32, device=device)
    scales = torch.rand(shape, dtype=torch.float32, device=device) / 2**bits / depth**0.5
    return packed, scales.to(dtype), (-(2 ** (bits - 1)) * scales).to(dtype)


def int4(clock: Clock, x: torch.Tensor, weights: list[Weights], columns: int, depth: int) -> Figure:
    """torch's product with 4-bit weights, given the same weights; its result is compared with ours first."""
    try:
        x = x.to(BRAIN)
        calls: list[Call] = [partial(int4_product, x, *for_torch(w, columns, depth)) for w in weights]
        ours = affine_matmul(x, *weights[0], 4, GROUP) if not clock.smoke else None
        theirs: Any = calls[0]()
        if ours is not None and not float((theirs - ours).norm() / ours.norm()) <= 2e-2:  # NaN is no agreement
            return missing("us", "it gives other numbers, so it was not given the same weights")
        return clock.time(calls)
    except (RuntimeError, AttributeError) as error:
        return missing("us", f"it does not run: {reason(error)[:150]}")


def for_torch(weight: Weights, columns: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights as torch's kernel wants them: a number is (code - 8) * scale + zero."""
    packed, scales, biases = weight
    shifts = torch.arange(0, 32, 4, device=packed.device)
    codes = (packed[..., None] >> shifts & 15).int().view(columns, depth)
    pairs = torch.stack((scales.float(), biases.float() + 8 * scales.float()), dim=-1)
    zeros = pairs.transpose(0, 1).contiguous().to(BRAIN)
    if packed.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), zeros
    octets = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(octets, 8), zeros


def int4_product(x: torch.Tensor, packed: torch.Tensor, zeros: torch.Tensor) -> Any:
    if x.device.type == "cpu":
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, zeros)
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, zeros)


def sampler_speed(report: Report, clock: Clock, read: Figure) -> None:
    """Float32 logits of which a few hundred tokens matter; with filters all of top-k, top-p and min-p are on."""
    vocabulary = 300 if clock.smoke else VOCABULARY
    for rows in (2,) if clock.smoke else (1, 32, 256):
        num_bytes = 4 * rows * vocabulary
        logits = [3 * torch.randn(rows, vocabulary, device=clock.device) for _ in range(clock.sets(num_bytes))]
        for name, filters, temperature in (("greedy", False, 0.0), ("plain", False, 0.8), ("filters", True, 0.8)):
            label = f"B{rows}, {vocabulary} tokens, {name}"
            with report.attempt("sampler", label):
                asked = parameters(rows, temperature, filters, clock.device)
                calls: list[Call] = [partial(sample, x, asked, filters=filters) for x in logits]
                figures = against(num_bytes, clock.time(calls), read)
                if name == "greedy":
                    figures["torch_argmax"] = clock.time([partial(torch.argmax, x, -1) for x in logits])
                report.add("sampler", label, figures)


def parameters(rows: int, temperature: float, filters: bool, device: torch.device) -> RowParameters:
    def floats(value: float) -> torch.Tensor:
        return torch.full((rows,), value, dtype=torch.float32, device=device)

    def integers(value: int) -> torch.Tensor:
        return torch.full((rows,), value, dtype=torch.int32, device=device)

    return RowParameters(
        slot=torch.arange(rows, dtype=torch.int32, device=device), bias_slot=integers(-1),
        temperature=floats(temperature), top_k=integers(50 if filters else 0), top_p=floats(0.9 if filters else 1.0),
        log_min_p=floats(-3.9 if filters else float("-inf")), seed=torch.arange(rows, device=device),
        position=integers(7), sample_index=integers(0), repetition_penalty=floats(1.0),
        frequency_penalty=floats(0.0), presence_penalty=floats(0.0),
    )  # fmt: skip
