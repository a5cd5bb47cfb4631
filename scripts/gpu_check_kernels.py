"""Part a: every Triton kernel against its definition in float64, among poison; repeats must have the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from gpu_check_attention import decode_cases, prefill_cases
from gpu_check_case import Case, broken, check
from gpu_check_cases import STORED, append_case, gated_case, norm_case, product_case
from gpu_check_record import Report, reason
from gpu_check_sampler import check_sampler

from cortexstream.kernels.triton.swiglu import ACTIVATIONS

REPEATS = 20
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


Makers = Iterable[tuple[str, Callable[[], Case]]]


def run_writes(report: Report, smoke: bool) -> None:
    """Appends, norms, activations."""
    run(report, writes(smoke, device_of(smoke)), smoke)


def run_products(report: Report, smoke: bool) -> None:
    """Products with packed weights, and the sampler."""
    run(report, products(smoke, device_of(smoke)), smoke)
    with report.attempt("kernel", "sampler", check=True):
        check_sampler(report, smoke, device_of(smoke), repeats_of(smoke))


def run_decode(report: Report, smoke: bool) -> None:
    run(report, decode_cases(smoke, device_of(smoke)), smoke)


def run_prefill(report: Report, smoke: bool) -> None:
    run(report, prefill_cases(smoke, device_of(smoke)), smoke)


def run(report: Report, makers: Makers, smoke: bool) -> None:
    """Check case by case; one that fails leaves the others, unless the device has failed for good."""
    for name, make in makers:
        try:
            check(report, make(), repeats_of(smoke))
        except Exception as error:
            report.add("kernel", name, ok=False, why=reason(error))
            if broken(error):
                report.add("kernel", "all others", ok=False, why="not measured: the device failed in the one before")
                return


def device_of(smoke: bool) -> torch.device:
    return torch.device("cpu" if smoke else "cuda")


def repeats_of(smoke: bool) -> int:
    return 2 if smoke else REPEATS


def writes(smoke: bool, device: torch.device) -> Makers:
    """Names and makers. Every format of pools is written from bfloat16."""
    for dtype in [FLOAT] if smoke else [BRAIN, HALF, FLOAT]:
        for kind in ["", *STORED] if dtype == BRAIN else ["", "int8"]:
            if kind == "fp8 e4m3" and torch.cuda.get_device_capability() < (8, 9):
                continue
            for rope, norm in ((False, False), (True, False), (True, True)):
                yield f"append to {kind or dtype}", partial(append_case, dtype, kind, rope, norm, smoke, device)
        for dim in (48,) if smoke else (128, 4096, 5120):
            yield f"rms_norm {dim} {dtype}", partial(norm_case, dtype, dim, device)
        for activation in ACTIVATIONS:
            width = 32 if smoke else 14336
            yield f"gated {activation} {dtype}", partial(gated_case, dtype, activation, width, device)


def products(smoke: bool, device: torch.device) -> Makers:
    """One row, full tiles, more than a tile, and enough rows for dense weights; bfloat16 with all groups."""
    if smoke:
        for bits in (4, 8):
            yield f"affine_matmul {bits} bits", partial(product_case, FLOAT, bits, 64, 2, (32, 128), device)
        return
    kinds = [(BRAIN, bits, group) for bits in (4, 8) for group in (32, 64, 128)]
    kinds += [(dtype, bits, 64) for dtype in (HALF, FLOAT) for bits in (4, 8)]
    cases = [(*kind, rows) for kind in kinds for rows in (1, 16, 33, 64, 130)]
    for dtype, bits, group, rows in [*cases, (BRAIN, 6, 64, 3)]:
        made = partial(product_case, dtype, bits, group, rows, (640, 1024), device)
        yield f"affine_matmul {bits} bits, groups of {group}, {rows} rows, {dtype}", made
