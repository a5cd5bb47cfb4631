"""How the GPU check times: calls in a CUDA graph, over buffers that the L2 cannot hold, medians of many replays."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from gpu_check_record import SMOKE, Figure, missing, ratio

CALLS = 20  # in a graph, at least
REPLAYS = 25
MOST_SETS = 64
BUFFER_BYTES = 4 << 30  # of the bandwidth's buffers
READ_BLOCK = 4096  # numbers that a program reads at a time
READ_PROGRAMS = 132 * 8 * 4

Call = Callable[[], object]


class Bandwidth(NamedTuple):
    copy: Figure  # bytes read and written
    read: Figure


class Clock:
    """Times calls on the current device; in a smoke run it runs them once and times nothing."""

    def __init__(self, smoke: bool) -> None:
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")

    def sets(self, num_bytes: int) -> int:
        """How many sets of buffers of so many bytes calls must rotate over to find none in the L2."""
        if self.smoke:
            return 1
        cache = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        return max(2, min(MOST_SETS, math.ceil(8 * cache / max(1, num_bytes))))

    def time(self, calls: Sequence[Call]) -> Figure:
        """Microseconds of one call, the median over replays of a graph that makes all of them in order.

        What cannot be captured is queued behind a pause and timed with events, which counts gaps between launches.
        """
        with torch.inference_mode():
            for call in calls:
                call()
            if self.smoke:
                return missing("us", SMOKE)
            torch.cuda.synchronize()
            many = list(calls) * math.ceil(CALLS / len(calls))
            try:
                graph = captured(many)
            except RuntimeError as error:
                torch.cuda.synchronize()
                return Figure(queued(many), "us", f"events, since it cannot be captured: {str(error)[:100]}")
            return Figure(replayed(graph, REPLAYS) / len(many), "us", "graph")


def captured(calls: Sequence[Call]) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(graph: Any, replays: int) -> float:
    """Median microseconds of a replay."""
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return float(statistics.median(times))


def queued(calls: Sequence[Call]) -> float:
    """Median microseconds of a call, with all of them queued before the first starts."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda._sleep(200_000_000)  # clock cycles
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    return float(statistics.median(1e3 * a.elapsed_time(b) for a, b in pairwise(events)))


def _read(x, out, rounds, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum float32 numbers: programs take turns, `rounds` blocks each."""
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    at = x + program * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(rounds):
        total += tl.load(at)
        at += step
    tl.store(out + program, tl.sum(total, 0))


READ = triton.jit(_read)


def bandwidth(clock: Clock) -> Bandwidth:
    """What a copy and what reading reach on large buffers: the best of two ways to read, TB/s of 1e12 bytes."""
    programs = 2 if clock.smoke else READ_PROGRAMS
    block = 64 if clock.smoke else READ_BLOCK
    rounds = 2 if clock.smoke else BUFFER_BYTES // 4 // (programs * block)
    count = programs * block * rounds
    source = torch.randn(count, device=clock.device)
    target = torch.empty_like(source)
    copy = rate(2 * source.nbytes, clock.time([lambda: target.copy_(source)]))
    out = torch.empty(programs, device=clock.device)
    ways: dict[str, Call] = {"torch.sum": lambda: torch.sum(source)}
    if not clock.smoke or triton.knobs.runtime.interpret:
        ways["a Triton kernel"] = lambda: READ[(programs,)](source, out, rounds, BLOCK=block, num_warps=8)
    rates = {name: rate(source.nbytes, clock.time([way])) for name, way in ways.items()}
    name, best = max(rates.items(), key=lambda item: item[1].value or 0.0)
    return Bandwidth(copy, best if best.value is None else best._replace(note=name))


def rate(num_bytes: float, time: Figure) -> Figure:
    """TB/s of so many bytes in a time in microseconds."""
    return ratio(Figure(num_bytes / 1e6, "bytes"), time, "TB/s")


def against(num_bytes: float, time: Figure, read: Figure) -> dict[str, Figure]:
    """What a row says of a kernel that moves so many bytes."""
    reached = rate(num_bytes, time)
    return {
        "time": time, "bytes": Figure(num_bytes / 1e6, "MB", "counted"), "rate": reached,
        "share": ratio(reached, read, "% of the read bandwidth", 100.0),
    }  # fmt: skip
