"""Everything that needs a GPU, in one command of less than eight minutes, without a network.

    python scripts/gpu_check.py --json gpu.json
    python scripts/gpu_check.py --only a,c
    python scripts/gpu_check.py --smoke    # runs all of it on a CPU with tiny shapes and measures nothing

a  every Triton kernel against its definition in float64, among NaN, 20 times with the same bits
b  tokens of small models equal to those of the CPU device in float32: graphs or none, alone, mixed, with guesses
c  bandwidth, attention, appends, products with packed weights, the sampler: microseconds, bytes, share of the bandwidth
d  a random model of Llama 3 8B's shape: decode steps against their floor, tokens/s beside transformers, launches
e  steps of each kind of draw that never wait, no kernel compiled for a new length, memory that does not grow

It needs torch, triton, transformers and numpy, and this checkout. Each part has processes of its own and a time limit,
so that one that crashes does not take the others' results along. What was not measured is said to be not measured, and
why. The exit code is 1 if a check does not hold or a part did not come to its end, 2 if there is no GPU; goals that are
missed do not change it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import gpu_check_goals  # noqa: E402
from gpu_check_record import Report  # noqa: E402

TOTAL_S = 470.0  # of all parts
PARTS = "abcde"


class Stage(NamedTuple):
    """A process: `module.function(report, smoke)`. Those of one wave run at once: they time nothing."""

    part: str
    module: str
    function: str
    limit_s: float
    wave: int
    interpreted: bool = False  # does a smoke run need Triton's interpreter?


STAGES = {
    "writes": Stage("a", "gpu_check_kernels", "run_writes", 150, 0, interpreted=True),
    "products": Stage("a", "gpu_check_kernels", "run_products", 150, 0, interpreted=True),
    "decode": Stage("a", "gpu_check_kernels", "run_decode", 150, 0, interpreted=True),
    "prefill": Stage("a", "gpu_check_kernels", "run_prefill", 150, 0, interpreted=True),
    "tokens": Stage("b", "gpu_check_tokens", "run", 150, 0, interpreted=True),
    "steps": Stage("e", "gpu_check_steps", "run", 150, 0),
    "launches": Stage("d", "gpu_check_peers", "run_launches", 90, 0),
    "speed": Stage("c", "gpu_check_speed", "run", 150, 1, interpreted=True),
    "model bf16": Stage("d", "gpu_check_model", "run_bfloat16", 90, 2),
    "model 4-bit": Stage("d", "gpu_check_model", "run_packed", 110, 3),
    "generate": Stage("d", "gpu_check_peers", "run_generate", 60, 4),
    "generate_batch": Stage("d", "gpu_check_peers", "run_generate_batch", 70, 5),
}


def run_stage(name: str, smoke: bool, folder: Path, deadline_s: float) -> dict[str, Any]:
    """Run a stage in a process of its own; what it found, and how it ended."""
    stage, began_s = STAGES[name], monotonic()
    limit_s = min(stage.limit_s, deadline_s - began_s)
    if limit_s < 1:
        return ended(stage, 0.0, f"not started: the {TOTAL_S:.0f} s of the whole run are used up", [])
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if smoke:
        command.append("--smoke")
        env |= {"TRITON_INTERPRET": str(int(stage.interpreted)), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True, stdin=subprocess.DEVNULL
        )
        try:
            code = process.wait(limit_s)
            how = "finished" if code == 0 else f"ended with {code}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            how = f"stopped after {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    rows = json.loads(out.read_text()) if out.exists() else []
    seconds = monotonic() - began_s
    if how == "finished":
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("  ")]
    else:
        lines = [f"  {row['group']}: {row['name']}  {row.get('why', '')}" for row in rows]
    print(f"\n{stage.part}: {name}, {how}, {seconds:.0f} s", *lines, sep="\n", flush=True)
    return ended(stage, seconds, how, rows)


def ended(stage: Stage, seconds: float, how: str, rows: list[Any]) -> dict[str, Any]:
    return {"part": stage.part, "ended": how, "seconds": {"value": round(seconds, 1), "unit": "s"}, "rows": rows}


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing"


def run_all(names: list[str], smoke: bool) -> dict[str, Any]:
    """Stages wave by wave; in a smoke run, where nothing is timed, two at a time whatever their wave."""
    found: dict[str, Any] = {}
    deadline_s = monotonic() + TOTAL_S
    waves = sorted({STAGES[name].wave for name in names})
    groups = [names] if smoke else [[name for name in names if STAGES[name].wave == wave] for wave in waves]
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            with ThreadPoolExecutor(2 if smoke else len(group)) as pool:
                running = {n: pool.submit(run_stage, n, smoke, Path(folder), deadline_s) for n in group}
                found |= {name: future.result() for name, future in running.items()}
    return {name: found[name] for name in STAGES if name in found}


def device_facts(smoke: bool) -> dict[str, Any]:
    """What the machine says of itself."""
    if smoke:
        return {"name": f"CPU ({platform.machine()}); a smoke run measures nothing"}
    import torch

    facts = torch.cuda.get_device_properties(0)
    driver = "unknown: there is no nvidia-smi"
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return {
        "name": torch.cuda.get_device_name(0), "driver": driver, "cuda": torch.version.cuda,
        "compute_capability": f"{facts.major}.{facts.minor}", "multiprocessors": facts.multi_processor_count,
        "memory": {"value": facts.total_memory, "unit": "bytes"}, "l2": {"value": facts.L2_cache_size, "unit": "bytes"},
    }  # fmt: skip


def record_of(args: argparse.Namespace, parts: dict[str, Any], goals: list[gpu_check_goals.Goal]) -> dict[str, Any]:
    from bench_record import commit, versions

    known = args.commit or (commit() if shutil.which("git") else None)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "smoke": args.smoke, "commit": known or "unknown",
        "device": device_facts(args.smoke), "system": platform.platform(), "python": platform.python_version(),
        "versions": versions(), "parts": parts, "goals": [goal.recorded() for goal in goals],
    }  # fmt: skip


def unusable(smoke: bool) -> str | None:
    """Why the check cannot run here; None if it can."""
    try:
        for module in ("torch", "triton", "transformers", "numpy"):
            importlib.import_module(module)
    except ImportError as error:
        return f"the GPU check needs torch, triton, transformers and numpy: {error}; install what is missing"
    import torch

    if not smoke and not torch.cuda.is_available():
        return "this PyTorch sees no NVIDIA GPU; check nvidia-smi and the installed torch, or see it run with --smoke"
    return None


def parts_of(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PARTS or len(name) != 1:
            raise argparse.ArgumentTypeError(f"{name!r} is no part; choose from {','.join(PARTS)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the machine and every figure")
    parser.add_argument("--only", type=parts_of, default=list(PARTS), metavar="PARTS", help="some of a,b,c,d,e")
    parser.add_argument("--smoke", action="store_true", help="run everything on a CPU, tiny; no figure is measured")
    parser.add_argument("--commit", help="what is checked, where git cannot tell")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        stage = STAGES[args.stage]
        getattr(importlib.import_module(stage.module), stage.function)(Report(args.out, args.smoke), args.smoke)
        return 0
    problem = unusable(args.smoke)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    names = [name for name, stage in STAGES.items() if stage.part in args.only]
    parts = run_all(names, args.smoke)
    goals = list(gpu_check_goals.goals(parts))
    record = record_of(args, parts, goals)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    gpu_check_goals.show(parts, goals)
    print(f"\n{record['device']['name']}, {record['date']}, commit {record['commit']}")
    return 0 if gpu_check_goals.sound(parts) else 1


if __name__ == "__main__":
    sys.exit(main())
