"""Facts about the machine that a figure needs beside it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def cpu_count() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it."""

    name: str
    capability: str
    """Compute capability without its point: "87"."""
    memory_bytes: int
    integrated: bool
    """Whether it shares the host's memory, as on a Jetson."""


def gpus() -> tuple[Gpu, ...] | str:
    """The GPUs here through NVIDIA's cuda-bindings, or why there are none to see.

    No context is made and no memory taken.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        return "cuda-bindings is not installed"
    try:
        count = _cuda(driver.cuInit(0)) or _cuda(driver.cuDeviceGetCount())
        return tuple(_gpu(driver, index) for index in range(count))
    except (RuntimeError, OSError) as error:  # no driver library among them
        return str(error).splitlines()[0] or type(error).__name__


def _gpu(driver: Any, index: int) -> Gpu:
    device = _cuda(driver.cuDeviceGet(index))
    attribute = driver.CUdevice_attribute

    def value(name: str) -> int:
        key = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_cuda(driver.cuDeviceGetAttribute(key, device)))

    return Gpu(
        name=_cuda(driver.cuDeviceGetName(128, device)).rstrip(b"\0").decode(),
        capability=f"{value('COMPUTE_CAPABILITY_MAJOR')}{value('COMPUTE_CAPABILITY_MINOR')}",
        memory_bytes=int(_cuda(driver.cuDeviceTotalMem(device))),
        integrated=bool(value("INTEGRATED")),
    )


def _cuda(returned: tuple[Any, ...]) -> Any:
    """The value of a driver call.

    Raises:
        RuntimeError: the call's error, by name.
    """
    error, *values = returned
    if int(error):
        raise RuntimeError(getattr(error, "name", str(error)))
    return values[0] if values else None


def jetson_release() -> str | None:
    """The L4T release line of a Jetson, None elsewhere."""
    path = Path("/etc/nv_tegra_release")
    return path.read_text(errors="replace").splitlines()[0].strip("# ") if path.is_file() else None


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
