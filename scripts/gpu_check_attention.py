"""Part a, attention: decoding and prompts against the definitions in float64, among poison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_check_case import Case, relative
from gpu_check_memory import FP8, Held, exact, hold, random_rows

from cortexstream.kernels.reference import decode_attention as decode_definition
from cortexstream.kernels.reference import prefill_attention as prefill_definition
from cortexstream.kernels.triton.decode_attention import choose_config, decode_attention
from cortexstream.kernels.triton.decode_splits import split_offsets
from cortexstream.kernels.triton.prefill_attention import choose_config as choose_prefill_config
from cortexstream.kernels.triton.prefill_attention import prefill_attention, query_tiles

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
LONG = [0, 1, 63, 64, 65, 511, 512, 513, 1300, 4095]
SHORT = [0, 1, 5]
CHUNKS = [(1, 700), (130, 130), (64, 300), (1, 1), (17, 1041), (3, 3)]  # queries, keys: decoding rows, chunks, prompts
FEW_CHUNKS = [(1, 9), (3, 5)]


class Attention(NamedTuple):
    """A layer, and how its keys and values are kept."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    kind: str = ""
    block_tokens: int | None = 64
    value_dim: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def named(self) -> str:
        block = "runs" if self.block_tokens is None else f"blocks of {self.block_tokens}"
        kept = self.kind or str(self.dtype).removeprefix("torch.")
        more = [f"window {self.window}"] if self.window else []
        more += [f"cap {self.softcap:g}"] if self.softcap else []
        more += ["sinks"] if self.sinks else []
        shape = f"{self.heads}/{self.kv_heads}x{self.dim}" + (f",{self.value_dim}" if self.value_dim else "")
        return ", ".join([f"{shape} {str(self.dtype).removeprefix('torch.')}", f"KV {kept} in {block}", *more])

    def options(self, device: torch.device) -> dict[str, Any]:
        """What the kernels are told about scores."""
        scale: dict[str, Any] = {"k_scale": 0.5, "v_scale": 2.0} if self.kind in FP8 else {}
        sinks = random_rows(self.heads, dtype=torch.float32, device=device, seed=9) if self.sinks else None
        return {"window": self.window, "softcap": self.softcap, "sinks": sinks, **scale}

    def expected(self, held: Held, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """Keys, values and options for a definition."""
        sinks = options["sinks"]
        told = {
            "scale": self.dim**-0.5, "window": self.window, "softcap": self.softcap,
            "sinks": None if sinks is None else exact(sinks),
        }  # fmt: skip
        return held.k * options.get("k_scale", 1.0), held.v * options.get("v_scale", 1.0), told


LAYERS = [
    Attention(8, 8, 64, HALF),
    Attention(8, 8, 64, BRAIN),
    Attention(8, 8, 64, FLOAT),
    Attention(8, 8, 64, HALF, block_tokens=None),
    Attention(8, 2, 64, HALF),
    Attention(8, 1, 64, HALF, block_tokens=16),
    Attention(32, 8, 128, BRAIN),
    Attention(32, 8, 128, FLOAT),
    Attention(32, 8, 128, BRAIN, "fp8 e5m2"),
    Attention(32, 8, 128, BRAIN, "fp8 e4m3"),
    Attention(32, 8, 128, BRAIN, "int8"),
    Attention(32, 8, 128, BRAIN, "int4"),
    Attention(8, 8, 64, HALF, "int4"),
    Attention(64, 8, 64, BRAIN, window=128, softcap=50.0, sinks=True),
    Attention(16, 8, 256, BRAIN, window=1024, softcap=50.0),
    Attention(16, 16, 192, BRAIN, value_dim=128),
]
FEW_LAYERS = [
    Attention(2, 2, 16, FLOAT, block_tokens=16),
    Attention(2, 1, 16, HALF, block_tokens=None),
    Attention(2, 1, 64, FLOAT, "int8", block_tokens=16),
    Attention(2, 1, 16, FLOAT, window=3, softcap=5.0, sinks=True),
]


def layers(smoke: bool) -> list[Attention]:
    """Those that this device can do."""
    if smoke:
        return FEW_LAYERS
    old = torch.cuda.get_device_capability() < (8, 9)
    return [layer for layer in LAYERS if not (old and layer.kind == "fp8 e4m3")]


def decode_case(layer: Attention, lengths: list[int], device: torch.device) -> Case:
    """Rows of all lengths: against the definition; one launch, and the last row alone, against two launches' bits."""
    value_dim = layer.value_dim or layer.dim
    held = hold(lengths, layer.kv_heads, layer.dim, value_dim, layer.dtype, layer.kind, layer.block_tokens, device)
    q = random_rows(len(lengths), layer.heads, layer.dim, dtype=layer.dtype, device=device)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    options, most = layer.options(device), max(lengths)

    def launch(rows: slice, one_launch: bool) -> torch.Tensor:
        offsets = None
        if one_launch:
            offsets = split_offsets(
                counts[rows], max_tokens=most, window=layer.window, split=choose_config(q, value_dim).split
            )
        out = q.new_full((len(counts[rows]), layer.heads, value_dim), float("nan"))
        return decode_attention(
            q[rows], held.k_pool, held.v_pool, held.tables[rows], counts[rows], block_tokens=layer.block_tokens,
            offsets=offsets, out=out, max_tokens=most, **options,
        )  # fmt: skip

    def judge(found: Sequence[torch.Tensor]) -> float:
        k, v, told = layer.expected(held, options)
        tables = held.tables.cpu().numpy()
        wanted = decode_definition.decode_attention(
            exact(q), k, v, tables, counts.cpu().numpy(), block_tokens=layer.block_tokens, **told
        )  # fmt: skip
        return relative(found[0], wanted)

    def other_ways() -> Iterator[tuple[str, Sequence[torch.Tensor], Sequence[torch.Tensor]]]:
        every, last = slice(None), slice(len(lengths) - 1, None)
        two = launch(every, False)
        yield "one launch", [launch(every, True)], [two]
        yield "a row alone", [launch(last, False)], [two[last]]

    return Case(
        f"decode {layer.named()}", layer.dtype, lambda: [launch(slice(None), False), launch(slice(None), True)], judge,
        other_ways,
    )  # fmt: skip


def prefill_case(layer: Attention, rows: list[tuple[int, int]], device: torch.device) -> Case:
    """Prompts, chunks and decoding rows in one launch against the definition; half a chunk against its bits."""
    value_dim, queries, keys = layer.value_dim or layer.dim, [q for q, _ in rows], [k for _, k in rows]
    held = hold(keys, layer.kv_heads, layer.dim, value_dim, layer.dtype, layer.kind, layer.block_tokens, device)
    q = random_rows(sum(queries), layer.heads, layer.dim, dtype=layer.dtype, device=device)
    options = layer.options(device)

    def launch(q: torch.Tensor, tables: torch.Tensor, queries: list[int], keys: list[int]) -> torch.Tensor:
        tiles = query_tiles(
            queries, keys, sharing=layer.heads // layer.kv_heads, device=device,
            block_m=choose_prefill_config(q, value_dim).block_m,
        )  # fmt: skip
        out = q.new_full((len(q), layer.heads, value_dim), float("nan"))
        return prefill_attention(
            q, held.k_pool, held.v_pool, tables, tiles, block_tokens=layer.block_tokens, out=out, **options
        )  # fmt: skip

    def judge(found: Sequence[torch.Tensor]) -> float:
        k, v, told = layer.expected(held, options)
        wanted = prefill_definition.prefill_attention(
            exact(q), k, v, held.tables.cpu().numpy(), queries, keys, block_tokens=layer.block_tokens, **told
        )  # fmt: skip
        return relative(found[0], wanted)

    def other_ways() -> Iterator[tuple[str, Sequence[torch.Tensor], Sequence[torch.Tensor]]]:
        whole = launch(q, held.tables, queries, keys)
        late = queries[1] - queries[1] // 2  # of the second row, which is cut here
        end = queries[0] + queries[1]
        part = slice(end - late, end)
        yield "a chunk alone", [launch(q[part], held.tables[1:2], [late], [keys[1]])], [whole[part]]

    return Case(
        f"prefill {layer.named()}", layer.dtype, lambda: [launch(q, held.tables, queries, keys)], judge, other_ways
    )


def decode_cases(smoke: bool, device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and makers."""
    for layer in layers(smoke):
        yield f"decode {layer.named()}", partial(decode_case, layer, SHORT if smoke else LONG, device)


def prefill_cases(smoke: bool, device: torch.device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and makers."""
    for layer in layers(smoke):
        yield f"prefill {layer.named()}", partial(prefill_case, layer, FEW_CHUNKS if smoke else CHUNKS, device)
