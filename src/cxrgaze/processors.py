"""Processors that this process may use: by its affinity and its container's quota."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_count(root: Path = Path("/")) -> int:
    """How many there are for this process, one at least."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return min(here, max(int(quota), 1)) if quota else here


def is_confined(root: Path = Path("/")) -> bool:
    """Whether this process may use fewer processors than there are."""
    return cpu_count(root) < (os.cpu_count() or 1)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the control groups of this process allow, None without limit.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and
    scheduler/sched-bwc.rst (cpu.cfs_quota_us of version 1).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = base / path.strip("/")
        for group in (folder, *folder.parents):
            quotas.append(_quota_of(group))
            if group == base:
                break
    known = [quota for quota in quotas if quota]
    return min(known) if known else None


def _quota_of(group: Path) -> float | None:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such file
        return None
