"""The machine that a figure was measured on, and what it did besides."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrgaze import processors
from cxrgaze.environment import versions
from cxrgaze.records import Frozen
from cxrgaze.runtime import host

_PACKAGES = (
    "cxrgaze",
    "numpy",
    "opencv-python-headless",
    "onnxruntime",
    "torch",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


class Machine(Frozen):
    """What it is; None where the system does not say."""

    cpu: str
    cpu_count: int
    """Processors that this process may use."""
    virtual: bool
    """Under a hypervisor: clocks and neighbours are out of sight."""
    memory_bytes: int | None
    governor: str | None
    system: str
    python: str
    versions: dict[str, str]
    l4t: str | None
    power_mode: str | None
    gpus: tuple[dict[str, str], ...]
    """By NVML; empty without a card or without nvidia-ml-py."""


class Conditions(Frozen):
    """What the machine did while it was measured; None where it does not say."""

    seconds: float
    load_average_before: float | None
    load_average_after: float | None
    other_cpu_share: float | None
    """Share of all processors' time that other processes took."""
    steal_share: float | None
    """Share that the hypervisor gave to others."""
    mhz_before: float | None
    mhz_after: float | None
    celsius_before: float | None
    """Hottest thermal zone."""
    celsius_after: float | None
    throttled: int | None
    """Throttling events that the processor counted meanwhile."""
    gpus_before: tuple[dict[str, str], ...]
    gpus_after: tuple[dict[str, str], ...]


def machine(root: Path = Path("/")) -> Machine:
    """The record of this machine."""
    info = _text(root / "proc/cpuinfo") or ""
    total = re.search(r"MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo") or "")
    return Machine(
        cpu=host.cpu_name(),
        cpu_count=processors.cpu_count(),
        virtual=" hypervisor" in info,
        memory_bytes=int(total[1]) * 1024 if total else None,
        governor=_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        system=platform.platform(),
        python=platform.python_version(),
        versions=versions(*_PACKAGES),
        l4t=host.l4t_release(root),
        power_mode=host.power_mode(root),
        gpus=gpus(_FACTS),
    )


class Watch:
    """Reads the machine's counters when it is made, and again for `conditions`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before = _Counters.read(root)
        self._gpus = gpus(_STATE)

    def conditions(self) -> Conditions:
        """What happened since."""
        before, after = self._before, _Counters.read(self._root)
        total = after.total - before.total
        busy = after.busy - before.busy - (after.own - before.own)
        return Conditions(
            seconds=after.at - before.at,
            load_average_before=before.load,
            load_average_after=after.load,
            other_cpu_share=max(busy, 0.0) / total if total > 0 else None,
            steal_share=(after.steal - before.steal) / total if total > 0 else None,
            mhz_before=before.mhz,
            mhz_after=after.mhz,
            celsius_before=before.celsius,
            celsius_after=after.celsius,
            throttled=None
            if before.throttled is None or after.throttled is None
            else after.throttled - before.throttled,
            gpus_before=self._gpus,
            gpus_after=gpus(_STATE),
        )


@dataclass(frozen=True)
class _Counters:
    at: float
    total: float  # seconds of all processors
    busy: float
    steal: float
    own: float
    load: float | None
    mhz: float | None
    celsius: float | None
    throttled: int | None

    @classmethod
    def read(cls, root: Path) -> _Counters:
        ticks = [0.0] * 8
        jiffies = re.match(r"cpu +(.+)", _text(root / "proc/stat") or "")
        if jiffies:
            ticks = [int(t) / os.sysconf("SC_CLK_TCK") for t in jiffies[1].split()[:8]]
        idle, steal = ticks[3] + ticks[4], ticks[7]
        own = os.times()
        cpus = root / "sys/devices/system/cpu"
        clocks = _numbers(cpus, "cpu[0-9]*/cpufreq/scaling_cur_freq")
        said = re.findall(r"^cpu MHz\s*: ([\d.]+)", _text(root / "proc/cpuinfo") or "", re.M)
        mhz = [c / 1e3 for c in clocks] or [float(s) for s in said]
        heat = _numbers(root / "sys/class/thermal", "thermal_zone*/temp")
        events = _numbers(cpus, "cpu[0-9]*/thermal_throttle/core_throttle_count")
        return cls(
            at=time.perf_counter(),
            total=sum(ticks),
            busy=sum(ticks) - idle - steal,
            steal=steal,
            own=own.user + own.system + own.children_user + own.children_system,
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            mhz=sum(mhz) / len(mhz) if mhz else None,
            celsius=max(heat) / 1e3 if heat else None,
            throttled=int(sum(events)) if events else None,
        )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _numbers(folder: Path, pattern: str) -> list[float]:
    texts = (_text(path) for path in sorted(folder.glob(pattern)))
    return [float(text) for text in texts if text and re.fullmatch(r"-?\d+", text)]


Nvml = Callable[[Any, Any], object]  # of the module pynvml and a device

_FACTS: Mapping[str, Nvml] = {
    "name": lambda nvml, gpu: nvml.nvmlDeviceGetName(gpu),
    "uuid": lambda nvml, gpu: nvml.nvmlDeviceGetUUID(gpu),
    "driver": lambda nvml, gpu: nvml.nvmlSystemGetDriverVersion(),
    "memory_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    "power_limit_mw": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu),
    "max_sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "ecc": lambda nvml, gpu: nvml.nvmlDeviceGetEccMode(gpu)[0],
    "mig": lambda nvml, gpu: nvml.nvmlDeviceGetMigMode(gpu)[0],
}
_STATE: Mapping[str, Nvml] = {
    "sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "celsius": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "power_mw": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu),
    "throttle_reasons": lambda nvml, gpu: hex(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)),
    "used_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "other_processes": lambda nvml, gpu: sum(
        process.pid != os.getpid() for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    ),
}


def gpus(asked: Mapping[str, Nvml]) -> tuple[dict[str, str], ...]:
    """What NVML says of each card; a value that it refuses is "not measured"."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except ImportError:
        return ()
    except nvml.NVMLError:  # no driver here
        return ()
    try:
        cards = []
        for index in range(nvml.nvmlDeviceGetCount()):
            gpu = nvml.nvmlDeviceGetHandleByIndex(index)
            values = {}
            for name, ask in asked.items():
                try:
                    values[name] = str(ask(nvml, gpu))
                except nvml.NVMLError:
                    values[name] = "not measured"
            cards.append(values)
        return tuple(cards)
    finally:
        nvml.nvmlShutdown()
