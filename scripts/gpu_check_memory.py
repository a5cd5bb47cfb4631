"""Keys and values for the GPU check: rows in random blocks of a pool, with poison wherever no row has a position."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cortexstream.backends.cuda.quantize import quantize
from cortexstream.kernels.reference import kv_quantize
from cortexstream.kernels.reference.block_table import table_slots
from cortexstream.kernels.torch.quantized_pool import Pool, QuantizedPool

Exact = npt.NDArray[np.float64]

FP8 = {"fp8 e4m3": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2}
INTEGERS = {"int8": 8, "int4": 4}
GROUP = 64  # of a quantised pool


class Held(NamedTuple):
    """Rows in pools, and the same numbers as the definitions take them."""

    k_pool: Pool
    v_pool: Pool
    k: Exact  # [slots, heads, dim]; poison included
    v: Exact
    tables: torch.Tensor
    block_tokens: int | None


def exact(tensor: torch.Tensor) -> Exact:
    numbers: Exact = tensor.float().cpu().numpy().astype(np.float64)
    return numbers


def hold(
    tokens: list[int], kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype, kind: str,
    block_tokens: int | None, device: torch.device, seed: int = 1,
) -> Held:  # fmt: skip
    """Rows of so many tokens of unit variance. `kind` of the pools: "" is `dtype`, else a key of FP8 or INTEGERS."""
    rng = np.random.default_rng(seed)
    tables, num_slots = layout(tokens, block_tokens, rng)
    used = np.concatenate([table_slots(t, n, block_tokens) for t, n in zip(tables, tokens, strict=True)])
    generator = torch.Generator().manual_seed(seed)
    pools, numbers = [], []
    for width in (dim, value_dim):
        x = torch.randn(num_slots, kv_heads, width, generator=generator).to(dtype)
        pool, known = poisoned(x, torch.from_numpy(used), kind, device)
        pools.append(pool)
        numbers.append(known)
    known_tables = torch.from_numpy(tables.astype(np.int32)).to(device)
    return Held(pools[0], pools[1], numbers[0], numbers[1], known_tables, block_tokens)


def layout(tokens: list[int], block_tokens: int | None, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], int]:
    """Tables and the number of slots: blocks in random order, or runs with gaps; unused entries lead to poison."""
    if block_tokens is None:
        starts = np.cumsum([3, *(count + 5 for count in tokens)])
        return starts[:-1, None], int(starts[-1])
    needs = [-(-count // block_tokens) for count in tokens]
    order = rng.permutation(sum(needs) + 3).tolist()
    tables = np.full((len(tokens), max(1, *needs) + 1), order.pop())
    for row, need in enumerate(needs):
        tables[row, :need] = [order.pop() for _ in range(need)]
    return tables, (sum(needs) + 3) * block_tokens


def poisoned(x: torch.Tensor, used: torch.Tensor, kind: str, device: torch.device) -> tuple[Pool, Exact]:
    """A pool with x in the slots `used` and poison in the others, and its numbers."""
    free = torch.ones(len(x), dtype=torch.bool)
    free[used] = False
    if kind in INTEGERS:
        bits = INTEGERS[kind]
        packed, scales, biases = quantize(x, bits, GROUP)
        scales[free], biases[free] = torch.nan, torch.inf
        words = kv_quantize.Quantized(
            packed.numpy().view(np.uint32), scales.float().numpy(), biases.float().numpy()
        )  # fmt: skip
        numbers = kv_quantize.dequantize(words, bits, GROUP).astype(np.float64)
        return QuantizedPool(packed.to(device), scales.to(device), biases.to(device)), numbers
    x[free] = torch.nan
    pool = x.to(FP8[kind]) if kind else x
    return pool.to(device), exact(pool)


def empty_pools(
    num_slots: int, kv_heads: int, dim: int, dtype: torch.dtype, kind: str, device: torch.device
) -> tuple[Pool, Pool]:
    """Two pools of poison alone."""
    none = torch.zeros(0, dtype=torch.long)

    def pool() -> Pool:
        return poisoned(torch.zeros(num_slots, kv_heads, dim, dtype=dtype), none, kind, device)[0]

    return pool(), pool()


def parts(pool: Pool) -> list[torch.Tensor]:
    return list(pool) if isinstance(pool, QuantizedPool) else [pool]


def numbers_of(pool: Pool, kind: str) -> Exact:
    """What a pool's bits stand for."""
    if isinstance(pool, QuantizedPool):
        packed, scales, biases = (part.cpu() for part in pool)
        words = kv_quantize.Quantized(packed.numpy().view(np.uint32), scales.float().numpy(), biases.float().numpy())
        return kv_quantize.dequantize(words, INTEGERS[kind], GROUP).astype(np.float64)
    return exact(pool)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def fenced(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy that lies between lines of NaN, and the whole of it; numbers of 16 bytes' alignment stay aligned."""
    lines = 1 if tensor.shape[1:].numel() % 8 == 0 else 8
    whole = tensor.new_full((len(tensor) + 2 * lines, *tensor.shape[1:]), float("nan"))
    inner = whole[lines : lines + len(tensor)]
    inner.copy_(tensor)
    return inner, whole


def unchanged(whole: torch.Tensor, inner: torch.Tensor) -> bool:
    """Are the lines around `inner` still NaN?"""
    edge = (len(whole) - len(inner)) // 2
    return bool(torch.isnan(whole[:edge]).all() and torch.isnan(whole[-edge:]).all())


def random_rows(count: int, *shape: int, dtype: Any, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator).to(dtype).to(device)
