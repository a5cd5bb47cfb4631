"""What the KV arena costs and saves: four tables.

    python scripts/bench_kv.py --json kv.json
    python scripts/bench_kv.py --only alloc,fit
    python scripts/bench_kv.py --quick    # a glance, in seconds

alloc   time of an operation at 2,000, 20,000 and 200,000 blocks       (bench_kv_alloc.py)
copies  bytes of KV copied for joins, leaves and growth, against mlx-lm (bench_kv_copies.py)
prefix  conversations with and without prefix reuse                     (bench_kv_prefix.py)
fit     sequences that fit a full arena, by placement and policy        (bench_kv_fit.py)

The method of each table is in its file, and in the record. Without mlx and mlx-lm, `copies` and mlx's rows of `prefix`
are left out, with the reason. The exit code is 1 if tokens differ that should be the same.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import bench_kv_alloc
import bench_kv_copies
import bench_kv_fit
import bench_kv_prefix
from bench_record import write_record

from cortexstream import CortexStreamError
from cortexstream.platform import probe

TITLES = {
    "alloc": "1. Time of an operation",
    "copies": "2. Bytes copied by joins, leaves and growth",
    "prefix": "3. Prefix reuse in conversations",
    "fit": "4. Sequences that fit",
}
FILES: dict[str, Any] = {
    "alloc": bench_kv_alloc, "copies": bench_kv_copies, "prefix": bench_kv_prefix, "fit": bench_kv_fit,
}  # fmt: skip


def measure(table: str, quick: bool, backends: list[str]) -> Any:
    if table == "prefix":
        return bench_kv_prefix.measure(quick, backends)
    return FILES[table].measure(quick)


def agrees(table: str, found: Any) -> bool:
    """Are all tokens equal that should be?"""
    if table == "copies":
        return bool(found["with_equal_tokens"] == found["trace"]["requests"])
    return all(row.get("equal_outputs", True) for row in found)


def load_average() -> list[float]:
    """Of the last minute, five and fifteen: how busy others keep this machine."""
    return [round(value, 2) for value in os.getloadavg()]


def tables(text: str) -> list[str]:
    """The value of --only, in the order of the tables."""
    names = text.split(",")
    for name in names:
        if name not in TITLES:
            raise argparse.ArgumentTypeError(f"{name!r} is no table; choose from {','.join(TITLES)}")
    return [name for name in TITLES if name in names]


def run(names: list[str], quick: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure and print tables; returns what was found, and what was left out and why."""
    missing = probe("mlx").missing
    if missing and names == ["copies"]:
        raise SystemExit(f"error: the table of copies needs mlx and mlx-lm: {missing}")
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for table in names:
        print(f"\n{TITLES[table]}", flush=True)
        if missing and table in ("copies", "prefix"):
            name = "copies" if table == "copies" else "prefix on mlx"
            skipped[name] = missing
            print(f"left out: {name}: {missing}")
        if table not in skipped:
            found[table] = measure(table, quick, ["reference"] if missing else ["reference", "mlx"])
            FILES[table].report(found[table])
    return found, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, not how fast")
    parser.add_argument("--only", type=tables, default=list(TITLES), metavar="NAMES", help=",".join(TITLES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, methods and numbers")
    args = parser.parse_args()
    before = load_average()
    try:
        found, skipped = run(args.only, args.quick)
    except CortexStreamError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        release_mlx()
    if args.json:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": f"{os.cpu_count()} cores of {cpu_name()}",
            "load_average": {"before": before, "after": load_average()},
            "quick": args.quick,
            "skipped": skipped,
            "method": {table: FILES[table].__doc__ for table in found},
        }
        write_record(args.json, record | found)
    wrong = [table for table, result in found.items() if not agrees(table, result)]
    if wrong:
        raise SystemExit(f"error: tokens differ that should be the same: {', '.join(wrong)}")


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def release_mlx() -> None:
    """MLX wants every thread that used it to end like this."""
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].clear_streams()


if __name__ == "__main__":
    main()
