"""What `doctor` tells about the machine without loading a model. All values are plain JSON."""

from __future__ import annotations

import os
import platform as host
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from cortexstream.config import EngineConfig, backend_from_environment
from cortexstream.platform import REAL, Probe, choose, probe

PACKAGES = (
    "numpy", "mlx", "mlx-metal", "mlx-cpu", "mlx-lm", "torch", "triton", "transformers", "tokenizers",
    "sentencepiece", "safetensors", "llguidance",
)  # fmt: skip
ORDER = "the first that can run of: mlx on Metal, cuda on a GPU, mlx on a CPU, cuda on a CPU, reference"


def describe_machine() -> dict[str, Any]:
    """Python, system, processor and memory."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": f"{host.python_version()} ({host.python_implementation()})",
        "system": host.platform(),
        "processor": _processor(),
        "cores": usable,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def installed_versions() -> dict[str, str | None]:
    """Versions by what the installed packages say of themselves, without importing them; None if not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe_backends(asked: str) -> dict[str, Any]:
    """What was probed, which backend serves, and why; raises as `platform.choose` does."""
    chosen, asked_probes = choose(EngineConfig(backend=asked).backend)
    from_environment = backend_from_environment() if asked == "auto" else None
    if asked != "auto":
        reason = "asked for with --backend"
    elif from_environment not in (None, "auto"):
        reason = "asked for with CORTEXSTREAM_BACKEND"
    else:
        reason = ORDER
    known = {found.name: found for found in asked_probes}
    probes = [known[name] if name in known else probe(name) for name in REAL]
    return {"chosen": chosen, "reason": reason, "probed": {found.name: _verdict(found) for found in probes}}


def _verdict(found: Probe) -> str:
    if found.missing is not None:
        return f"cannot run here: {found.missing}"
    return f"can run, on {found.accelerator or 'the CPU'}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    if host.system() == "Darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return host.processor() or host.machine()
