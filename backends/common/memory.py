"""How much memory the host has to give."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def host_memory_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes that this process can still take without swapping.

    On Linux MemAvailable of /proc/meminfo, or what is left of the container's limit (cgroup v2) if that is less;
    elsewhere free pages where the system counts them (sysconf), else all pages.
    """
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            available = int(lines["MemAvailable"].split()[0]) * 1024
            limit = _cgroup_left_bytes(cgroup)
            return available if limit is None else min(available, limit)
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _cgroup_left_bytes(cgroup: Path) -> int | None:
    """What the container may still take; file pages count as free, since they are dropped on demand. None: no limit."""
    limit = cgroup / "memory.max"
    if not limit.is_file() or (text := limit.read_text().strip()) == "max":
        return None
    used = int((cgroup / "memory.current").read_text())
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    files = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
    return max(0, int(text) - used + files)
