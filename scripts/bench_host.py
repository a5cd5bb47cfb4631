"""What the engine itself costs per decode step: everything outside the backend, which here answers at once.

    python scripts/bench_host.py --json host.json
    python scripts/bench_host.py --rows 64 --contexts 128 8192 --steps 50

The scheduler plans, the arena grows, tokens are appended and handed to receivers that do nothing; text is not made.
Rows join with prompts of the given length, then only decode steps are timed: `EngineStats.host_s` of each, median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from bench_record import write_record

from cortexstream import EngineConfig, SamplingParams
from cortexstream.backend import BackendInfo, LayerKV, LayerState, ModelInfo, WarmupReport
from cortexstream.engine import EngineCore
from cortexstream.errors import EngineError
from cortexstream.plan import KVRows, RowResult, StepPlan, StepResult
from cortexstream.request import Request
from cortexstream.scheduler import TokenEvent

Layout = Literal["run", "paged"]
LAYOUTS: tuple[Layout, ...] = ("run", "paged")
BLOCK_TOKENS = 16
WARM_STEPS = 10
TARGET_ROWS, TARGET_US = 64, 50 + 64 * 1.0  # "at most 1 us per row + 50 us at 64 rows"


class InstantTicket(NamedTuple):
    step: int
    result: StepResult


class InstantBackend:
    """Answers every row with the same token, without memory and without work."""

    def __init__(self, layout: Layout, max_context_tokens: int) -> None:
        self.info = BackendInfo(
            name="instant",
            device="none",
            kv_layout=layout,
            block_tokens=BLOCK_TOKENS,
            memory_bytes=1 << 40,
            dtype="none",
        )
        self.model = ModelInfo(
            architecture="none", vocab_size=4096, max_context_tokens=max_context_tokens, eos_token_ids=frozenset(),
            layers=(LayerKV(1, 1, 1),), kv_item_bytes=1, weight_bytes=0,
        )  # fmt: skip

    def allocate_kv(self, num_blocks: int, ring_blocks: tuple[int, ...] = ()) -> int:
        return num_blocks * BLOCK_TOKENS * self.model.kv_bytes_per_token

    def submit(self, plan: StepPlan) -> InstantTicket:
        rows = tuple(RowResult(row.seq_id, 1) for row in plan.rows if row.sample is not None)
        return InstantTicket(plan.step, StepResult(plan.step, rows))

    def collect(self, ticket: Any) -> StepResult:
        result: StepResult = ticket.result
        return result

    def warmup(self, prompt_tokens: int, batch: int) -> WarmupReport:
        return WarmupReport(())

    def reset(self) -> None:
        pass

    def read_kv(self, kv: KVRows, num_tokens: int) -> list[LayerState]:
        raise EngineError("this backend has no memory to read")

    def write_kv(self, kv: KVRows, num_tokens: int, layers: list[LayerState]) -> None:
        raise EngineError("this backend has no memory to write")

    def memory_addresses(self) -> list[int]:
        return []

    def close(self) -> None:
        pass


def host_us(layout: Layout, rows: int, context_tokens: int, steps: int) -> list[float]:
    """Microseconds outside the backend of each of `steps` decode steps of `rows` rows."""
    longest = context_tokens + WARM_STEPS + steps + 2
    config = EngineConfig(max_num_seqs=rows, max_num_batched_tokens=rows * context_tokens, memory_utilization=1.0)
    core = EngineCore(InstantBackend(layout, 2 * longest), config)
    sampling = SamplingParams(temperature=0, max_tokens=longest - context_tokens)

    def take(event: TokenEvent) -> bool:
        return False

    for number in range(rows):
        core.add(Request(number, (number,) * context_tokens, sampling, seed=0), take)  # no two begin alike
    core.step()  # the prompts
    for _ in range(WARM_STEPS):
        core.step()
    found = []
    for _ in range(steps):
        before = core.stats()
        core.step()
        after = core.stats()
        if after.output_tokens - before.output_tokens != rows or after.prompt_tokens != before.prompt_tokens:
            raise SystemExit(f"a step of {rows} rows was not a plain decode step; give fewer --steps")
        found.append((after.host_s - before.host_s) * 1e6)
    return found


def measure(layouts: list[Layout], rows: list[int], contexts: list[int], steps: int) -> Iterator[dict[str, Any]]:
    for layout in layouts:
        for context in contexts:
            for count in rows:
                samples = sorted(host_us(layout, count, context, steps))
                median = statistics.median(samples)
                yield {
                    "layout": layout, "context_tokens": context, "rows": count, "steps": steps,
                    "median_us_per_step": median, "median_us_per_row": median / count,
                    "p90_us_per_step": samples[int(0.9 * (steps - 1))],
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8192], help="tokens per prompt")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=200, help="decode steps timed for each line")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and numbers")
    args = parser.parse_args()
    if min(args.steps, *args.rows, *args.contexts) < 1:
        parser.error("--rows, --contexts and --steps must be at least 1")
    print(f"{'layout':8}{'context':>8}{'rows':>6}{'us/step':>10}{'us/row':>9}{'p90':>9}")
    results = []
    for result in measure(args.layouts, args.rows, args.contexts, args.steps):
        results.append(result)
        print(f"{result['layout']:8}{result['context_tokens']:8}{result['rows']:6}{result['median_us_per_step']:10.1f}"
              f"{result['median_us_per_row']:9.2f}{result['p90_us_per_step']:9.1f}", flush=True)  # fmt: skip
    at_target = [r["median_us_per_step"] for r in results if r["rows"] == TARGET_ROWS]
    if at_target:
        print(f"at {TARGET_ROWS} rows: at most {max(at_target):.1f} us per step; the aim is {TARGET_US:.0f}")
    if args.json:
        write_record(args.json, {"results": results})


if __name__ == "__main__":
    main()
