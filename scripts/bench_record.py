"""What every benchmark's record says about where and how it was made."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from cortexstream import __version__

PACKAGES = ("numpy", "mlx", "mlx-lm", "torch", "triton", "transformers")


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as JSON, preceded by the command, the machine, versions and the checkout's commit."""
    record = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {"cortexstream": __version__, **versions()},
        "commit": commit(),
    }
    path.write_text(json.dumps(record | values, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of the installed ones among PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with "+changes" if files differ from it; None outside of a checkout."""
    folder = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    status = ["git", "status", "--porcelain", "--untracked-files=no"]
    changed = subprocess.run(status, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")
