"""Facts about the machine that a figure needs beside it."""

from __future__ import annotations

import platform
import re
import resource
import sys
from pathlib import Path


def cpu_name() -> str:
    """Model name of the processor, or its architecture where the system does not say."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


_FEATURES = frozenset(
    "avx2 avx512f avx_vnni avx512_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16 amx_fp16 "
    "asimd asimdhp asimddp i8mm bf16 sve".split()
)
"""Instructions by which the libraries choose kernels for 8 and 16 bit, as the kernel names them."""


def cpu_features(root: Path = Path("/")) -> tuple[str, ...]:
    """Those of `_FEATURES` that the processor has, sorted; empty where the system does not say.

    Source: /proc/cpuinfo, "flags" on x86, "Features" on ARM.
    """
    info = root / "proc/cpuinfo"
    text = info.read_text(errors="replace") if info.is_file() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return tuple(sorted(_FEATURES.intersection(flags[1].split()))) if flags else ()


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
