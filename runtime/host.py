"""Facts about the machine that a figure needs beside it."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from pathlib import Path


def cpu_count(root: Path = Path("/")) -> int:
    """Processors that this process may use: by its affinity and its container's quota."""
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


def cpu_name() -> str:
    """Model name of the processor, or its architecture where the system does not say."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def host_platform() -> str:
    """Operating system and machine, as plans are tied to both: "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine().lower()}"


def l4t_release(root: Path = Path("/")) -> str | None:
    """Release of Jetson Linux such as "36.4.0", None on other machines.

    Source: the first line of /etc/nv_tegra_release, "# R36 (release), REVISION: 4.0, ...".
    """
    path = root / "etc/nv_tegra_release"
    if not path.is_file():
        return None
    text = path.read_text(errors="replace")
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{release[1]}.{release[2]}" if release else "not understood"


def power_mode(root: Path = Path("/")) -> str | None:
    """Power mode of a Jetson: number and name, None where the system does not say.

    Source: nvpmodel's own state file and the names in its configuration, which need no root.
    """
    status, names = root / "var/lib/nvpmodel/status", root / "etc/nvpmodel.conf"
    if not status.is_file():
        return None
    mode = re.search(r"pmode:(\d+)", status.read_text(errors="replace"))
    if not mode:
        return None
    number = int(mode[1])
    configuration = names.read_text(errors="replace") if names.is_file() else ""
    name = re.search(rf"POWER_MODEL\s+ID={number}\s+NAME=(\S+)", configuration)
    return f"{number} ({name[1]})" if name else str(number)


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that the kernel can give without swapping, None where it does not say."""
    path = root / "proc/meminfo"
    available = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.is_file() else None
    return int(available[1]) * 1024 if available else None


def peak_memory_bytes(root: Path = Path("/")) -> int:
    """Largest resident set of this process so far.

    On Linux the kernel's high-water mark of the address space: `getrusage` hands the peak of the
    process that started this one on to it.
    """
    status = root / "proc/self/status"
    high_water = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if high_water:
        return int(high_water[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
