"""Table 2 of bench_kv.py: bytes of KV that joins, leaves and growth copy, here and in mlx-lm's batches.

Both serve one trace of the embedded model, as bench_engine.py plays it: 24 prompts of random tokens, 16 to 1,000
long, 16 to 256 tokens of output, log-uniform, at most 16 at once, greedy. They arrive while the first third of all
output is generated, so about seven run at a time. Prefix caching is off. Both must draw the same tokens. Nothing is
timed, and the counts do not depend on the machine.

Ours: `EngineStats.moved_bytes`, split by what the plans' moves are for: a run that grew in place and is laid out
anew, one that moved to a hole to grow, one that was slid by a compaction.

mlx-lm's: what the methods of `BatchKVCache` copy under `BatchGenerator`. Each of these makes a new array of keys and
one of values per layer out of older ones:

    join    `extend`: both batches padded to one length and concatenated
    leave   `filter`: the rows that stay, gathered
    grow    `update_and_fetch` beyond the capacity, every 256 tokens: the old array and an empty one, concatenated
    roll    `finalize`: prompts of different lengths, computed together, rolled from right to left padding
    merge   `merge` of caches that hold something

`bytes` are those of each new array: what is copied, padding included, since mlx-lm keeps a batch as one rectangle; of
a grown array only the old part. `live_bytes` are of these the keys and values of live tokens alone, the least that
one can count. A byte counts once, where it ends, on both sides. Not counted: the padded temporaries of `extend`; the
copy that MLX makes when `update_and_fetch` writes to the slice that `filter` left; `extract` of a finished row, which
nobody evaluates here; copies of cache objects, which share their arrays; `trim`, which moves an index.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_engine import CortexStream, Job, MlxLm, Side, play, trace

from cortexstream import EngineConfig
from cortexstream.backend import BackendOptions
from cortexstream.engine import EngineCore
from cortexstream.models import resolve_model
from cortexstream.plan import Move, StepPlan
from cortexstream.platform import load

MAX_NUM_SEQS = 16
SEED = 0


class Watched:
    """A backend whose moves are counted by what they are for, in tokens; everything else is the backend's."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.tokens: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def submit(self, plan: StepPlan) -> Any:
        for op in plan.moves:
            if isinstance(op, Move):
                if op.source_blocks == op.target_blocks:
                    self.tokens["slid"] += op.num_tokens
                else:
                    self.tokens["grown in place" if op.source == op.target else "relocated"] += op.num_tokens
        return self._backend.submit(plan)


class Ours(CortexStream):
    """EngineCore on the mlx backend without prefix caching."""

    def __init__(self, model: Path) -> None:
        options: dict[str, Any] = {"model": str(model), "max_num_seqs": MAX_NUM_SEQS}
        self.backend = Watched(load("mlx", BackendOptions(**options)))
        self.core = self._core = EngineCore(
            self.backend, EngineConfig(backend="mlx", enable_prefix_caching=False, **options)
        )
        self._out = []
        self._prompt_tokens = 0
        self.settings = {
            "device": self.backend.info.device, "dtype": self.backend.info.dtype,
            "prefix_caching": self.core.arena.prefix_caching,
        }  # fmt: skip

    def copied(self) -> dict[str, Any]:
        moved, size = self.core.stats().moved_bytes, self.backend.model.kv_bytes_per_token
        parts = {name: tokens * size for name, tokens in sorted(self.backend.tokens.items())}
        if sum(parts.values()) != moved:
            raise SystemExit(f"the plans move {sum(parts.values())} bytes, the engine counts {moved}")
        return {"bytes": moved, "live_bytes": moved, "parts": parts}


class CopyCounter:
    """What BatchKVCache's methods copied, in bytes by cause."""

    def __init__(self) -> None:
        self._whole: Counter[str] = Counter()
        self._live: Counter[str] = Counter()

    def add(self, cause: str, cache: Any, shape: tuple[int, int], lengths: list[int]) -> None:
        """`cache` got arrays of (rows, tokens) `shape`, in which rows of `lengths` tokens are of use."""
        rows, slots = cache.keys.shape[0], cache.keys.shape[2]
        token_bytes = (cache.keys.nbytes + cache.values.nbytes) // (rows * slots)
        self._whole[cause] += shape[0] * shape[1] * token_bytes
        self._live[cause] += sum(lengths) * token_bytes

    def copied(self) -> dict[str, Any]:
        return {
            "bytes": self._whole.total(), "live_bytes": self._live.total(), "parts": dict(sorted(self._whole.items())),
            "live_parts": dict(sorted(self._live.items())),
        }  # fmt: skip


@contextmanager
def counting(counter: CopyCounter) -> Iterator[None]:
    """Count the copies of all BatchKVCache objects while this is open."""
    from mlx_lm.models.cache import BatchKVCache

    plain: dict[str, Callable[..., Any]] = {
        name: getattr(BatchKVCache, name) for name in ("update_and_fetch", "extend", "filter", "finalize")
    }
    merge = BatchKVCache.__dict__["merge"]

    def update_and_fetch(cache: Any, keys: Any, values: Any) -> Any:
        held = cache.keys is not None
        if held and cache._idx + keys.shape[2] > cache.keys.shape[2]:
            counter.add("grow", cache, (cache.keys.shape[0], cache._idx), cache.offset.tolist())
        return plain["update_and_fetch"](cache, keys, values)

    def extend(cache: Any, other: Any) -> None:
        plain["extend"](cache, other)
        if cache.keys is not None:
            counter.add("join", cache, (cache.keys.shape[0], cache.keys.shape[2]), cache.offset.tolist())

    def filter(cache: Any, batch_indices: Any) -> None:
        slots = 0 if cache.keys is None else cache.keys.shape[2]
        plain["filter"](cache, batch_indices)
        if slots:
            counter.add("leave", cache, (cache.keys.shape[0], slots), cache.offset.tolist())

    def finalize(cache: Any) -> None:
        rolls = cache._right_padding is not None
        plain["finalize"](cache)
        if rolls:
            counter.add("roll", cache, (cache.keys.shape[0], cache.keys.shape[2]), cache.offset.tolist())

    def merged(kind: Any, caches: Any) -> Any:
        cache = merge.__get__(None, kind)(caches)
        if cache.keys is not None:
            counter.add("merge", cache, (cache.keys.shape[0], cache.keys.shape[2]), cache.offset.tolist())
        return cache

    wrapped = (update_and_fetch, extend, filter, finalize)
    try:
        for method in wrapped:
            setattr(BatchKVCache, method.__name__, method)
        BatchKVCache.merge = classmethod(merged)
        yield
    finally:
        for name, function in plain.items():
            setattr(BatchKVCache, name, function)
        BatchKVCache.merge = merge


def tokens_of(side: Side, jobs: list[Job]) -> tuple[list[list[int]], float]:
    """What each request got, and how many ran in a step, on average."""
    tokens: list[list[int]] = [[] for _ in jobs]
    steps = 0
    for step in play(side, jobs):
        steps += 1
        for number, token in step.tokens:
            tokens[number].append(token)
    return tokens, sum(map(len, tokens)) / steps


def measure(quick: bool) -> dict[str, Any]:
    model = resolve_model(None)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    requests, longest_prompt, longest_output = (4, 64, 24) if quick else (24, 1000, 256)
    spread = trace(SEED, requests, longest_prompt, longest_output, vocab_size)
    jobs = [job._replace(arrival=job.arrival // 2) for job in spread]
    ours = Ours(model)
    our_tokens, rows = tokens_of(ours, jobs)
    ours.core.close()
    counter = CopyCounter()
    with counting(counter):
        their_tokens, _ = tokens_of(MlxLm(model, MAX_NUM_SEQS, None), jobs)
    mine, theirs = ours.copied(), counter.copied()
    return {
        "trace": {
            "requests": requests, "longest_prompt": longest_prompt, "longest_output": longest_output, "seed": SEED,
            "max_num_seqs": MAX_NUM_SEQS, "prompt_tokens": sum(len(job.prompt) for job in jobs),
            "output_tokens": sum(job.num_output for job in jobs), "mean_rows": rows,
        },
        "settings": ours.settings, "kv_bytes_per_token": ours.backend.model.kv_bytes_per_token,
        "sides": {"cortexstream": mine, "mlx-lm": theirs}, "ratio": mine["bytes"] / theirs["bytes"],
        "ratio_to_live": mine["live_bytes"] / theirs["live_bytes"],
        "with_equal_tokens": sum(a == b for a, b in zip(our_tokens, their_tokens, strict=True)),
    }  # fmt: skip


def report(found: dict[str, Any]) -> None:
    about, token_bytes = found["trace"], found["kv_bytes_per_token"]
    print(f"{about['requests']} requests, {about['mean_rows']:.1f} at a time, {about['prompt_tokens']:,} prompt and "
          f"{about['output_tokens']:,} output tokens of {token_bytes:,} bytes of KV")  # fmt: skip
    print(f"{'':14}{'copied, MiB':>13}{'live alone':>12}  of which")
    for side, copied in found["sides"].items():
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in copied["parts"].items())
        print(f"{side:14}{copied['bytes'] / 2**20:13.1f}{copied['live_bytes'] / 2**20:12.1f}  {parts}")
    print(f"CortexStream copies {found['ratio']:.1%} of what mlx-lm copies ({found['ratio_to_live']:.1%} of its live "
          "part); the aim is 5%")  # fmt: skip
    print(f"greedy tokens: {found['with_equal_tokens']} of {about['requests']} requests are the same on both sides")
