"""Part a, kernels that write keys and values, normalise, gate and multiply: each on one input, with its judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gpu_check_case import Case, Touched, relative
from gpu_check_memory import (
    FP8,
    GROUP,
    Exact,
    bits_of,
    empty_pools,
    exact,
    fenced,
    numbers_of,
    parts,
    random_rows,
    unchanged,
)

from cortexstream.kernels.reference import affine_matmul as product_definition
from cortexstream.kernels.reference import rms_norm as norm_definition
from cortexstream.kernels.reference import rope_append as rope_definition
from cortexstream.kernels.reference import swiglu as gated_definition
from cortexstream.kernels.torch.quantized_pool import Pool
from cortexstream.kernels.triton.affine_matmul import affine_matmul
from cortexstream.kernels.triton.kv_append import kv_append
from cortexstream.kernels.triton.rms_norm import rms_norm
from cortexstream.kernels.triton.rope_append import rope_append
from cortexstream.kernels.triton.swiglu import gated

STORED = {"int8": 2e-2, "int4": 0.25, "fp8 e4m3": 0.06, "fp8 e5m2": 0.12}  # error of a stored head over its norm
POSITIONS = 4000


def append_case(dtype: torch.dtype, kind: str, rope: bool, norm: bool, smoke: bool, device: torch.device) -> Case:
    """kv_append, or rope_append with or without norms: what is stored, what comes back, and nothing else touched."""
    tokens, heads, kv_heads, dim = (3, 2, 1, GROUP) if smoke else (70, 32, 8, 128)
    q, k, v = (random_rows(tokens, n, dim, dtype=dtype, device=device, seed=n) for n in (heads, kv_heads, kv_heads + 1))
    v = v[:, :kv_heads].contiguous()
    rng = np.random.default_rng(0)
    num_slots = 8 * tokens
    slots = rng.permutation(num_slots)[:tokens]
    slots[1] = -1  # padding
    positions = rng.integers(0, POSITIONS, tokens)
    table = turns(dim)
    weights = [random_rows(dim, dtype=dtype, device=device, seed=s) for s in (4, 5)] if norm else [None, None]
    on_device = [torch.from_numpy(x).to(device) for x in (table, positions, slots)]
    scales: dict[str, Any] = {"k_scale": 0.5, "v_scale": 2.0} if kind in FP8 else {}
    live = slots >= 0
    stored = {"k": exact(k), "v": exact(v)}
    wanted_q: Exact | None = None
    if rope:
        pools = [np.zeros((num_slots, kv_heads, dim)) for _ in range(2)]
        known = [None if w is None else exact(w) for w in weights]
        wanted_q = rope_definition.rope_append(
            exact(q), exact(k), exact(v), pools[0], pools[1], table.astype(np.float64), positions, slots,
            q_weight=known[0], k_weight=known[1],
        )  # fmt: skip
        stored = {"k": pools[0][slots], "v": pools[1][slots]}

    def fresh() -> tuple[Pool, Pool]:
        return empty_pools(num_slots, kv_heads, dim, dtype, kind, device)

    untouched = [part for pool in fresh() for part in parts(pool)]
    away = torch.ones(num_slots, dtype=torch.bool)
    away[slots[live]] = False
    last: list[Pool] = []

    def launch() -> Sequence[torch.Tensor]:
        last[:] = fresh()
        written = [part for pool in last for part in parts(pool)]
        if not rope:
            kv_append(k, v, last[0], last[1], on_device[2], **scales)
            return written
        out = torch.zeros_like(q)
        rope_append(
            q, k, v, last[0], last[1], *on_device, q_weight=weights[0], k_weight=weights[1], out=out, **scales
        )  # fmt: skip
        return [*written, out]

    def judge(found: Sequence[torch.Tensor]) -> float:
        for before, after in zip(untouched, found, strict=False):
            if not torch.equal(bits_of(before.cpu()[away]), bits_of(after.cpu()[away])):
                raise Touched("a slot that no token has was written")
        errors = [] if wanted_q is None else [relative(found[-1], wanted_q)]
        for name, pool in zip(("k", "v"), last, strict=True):
            factor = scales.get(f"{name}_scale", 1.0)
            got = numbers_of(pool, kind)[slots[live]] * factor
            heads_of = (int(live.sum()) * kv_heads, dim)
            errors.append(relative(got.reshape(heads_of), stored[name][live].reshape(heads_of)))
        return max(errors)

    name = (
        f"{'rope_append' if rope else 'kv_append'}{', norms' if norm else ''} {named(dtype)}, KV {kind or named(dtype)}"
    )
    return Case(name, dtype, launch, judge, limit=STORED.get(kind))


def turns(dim: int) -> npt.NDArray[np.float32]:
    """Cosines and sines [POSITIONS, dim], as rotary embedding has them."""
    angles = np.arange(POSITIONS)[:, None] * 10000.0 ** -np.linspace(0, 1, dim // 2, endpoint=False)
    return np.concatenate((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)


def norm_case(dtype: torch.dtype, dim: int, device: torch.device) -> Case:
    """With and without the addition that comes before."""
    x, whole = fenced(random_rows(5, dim, dtype=dtype, device=device))
    weight = random_rows(dim, dtype=dtype, device=device, seed=1)
    added = random_rows(5, dim, dtype=dtype, device=device, seed=2)

    def launch() -> Sequence[torch.Tensor]:
        out, around = fenced(torch.full_like(x, float("nan")))
        residual = added.clone()
        rms_norm(x, weight, 1e-6, residual=residual, unit_offset=True, out=out)
        return [out, residual, around, rms_norm(x, weight, 1e-6)]

    def judge(found: Sequence[torch.Tensor]) -> float:
        _untouched(whole, x)
        _untouched(found[2], found[0])
        total, w = exact(x + added), exact(weight)
        wanted = norm_definition.rms_norm(total, w, 1e-6, unit_offset=True)
        alone = norm_definition.rms_norm(exact(x), w, 1e-6)
        return max(relative(found[0], wanted), relative(found[1], total), relative(found[3], alone))

    return Case(f"rms_norm {dim} {named(dtype)}", dtype, launch, judge)


def gated_case(dtype: torch.dtype, activation: str, width: int, device: torch.device) -> Case:
    x, whole = fenced(random_rows(4, 2 * width, dtype=dtype, device=device))

    def launch() -> Sequence[torch.Tensor]:
        out, around = fenced(x.new_full((len(x), width), float("nan")))
        gated(x, activation, out=out)
        return [out, around]

    def judge(found: Sequence[torch.Tensor]) -> float:
        _untouched(whole, x)
        _untouched(found[1], found[0])
        return relative(found[0], gated_definition.gated(exact(x), activation))

    return Case(f"gated {activation} {named(dtype)}", dtype, launch, judge)


def product_case(
    dtype: torch.dtype, bits: int, group: int, rows: int, shape: tuple[int, int], device: torch.device
) -> Case:
    """x times packed weights of this shape, [N, K], whose scales and biases lie between NaN."""
    columns, depth = shape
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**32, (columns, depth * bits // 32), dtype=np.uint32)
    packed = torch.from_numpy(words.view(np.int32)).to(device)
    scales, _ = fenced(torch.from_numpy(rng.random((columns, depth // group)) / 2**bits).to(device, dtype))
    biases, _ = fenced(torch.from_numpy(rng.standard_normal((columns, depth // group)) / 4).to(device, dtype))
    x, whole = fenced(random_rows(rows, depth, dtype=dtype, device=device))

    def launch() -> Sequence[torch.Tensor]:
        out, around = fenced(x.new_full((rows, columns), float("nan")))
        affine_matmul(x, packed, scales, biases, bits, group, out=out)
        return [out, around]

    def judge(found: Sequence[torch.Tensor]) -> float:
        _untouched(whole, x)
        _untouched(found[1], found[0])
        wanted = product_definition.affine_matmul(exact(x), words, exact(scales), exact(biases), bits, group)
        return relative(found[0], wanted)

    return Case(f"affine_matmul {bits} bits, groups of {group}, {rows} rows, {named(dtype)}", dtype, launch, judge)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _untouched(whole: torch.Tensor, inner: torch.Tensor) -> None:
    if not unchanged(whole, inner):
        raise Touched("memory before or after a tensor was written")
