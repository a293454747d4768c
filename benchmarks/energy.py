"""Energy of an inference from the sensors that a machine has, with the idle power subtracted.

Sensors, in the order that they are looked for: NVML's energy counter, or else its power, of the
card that CUDA sees first; the INA3221 rails of a Jetson, from sysfs; the RAPL counter of an x86
processor's package. What they see differs: a card, a module with its board, a processor without its
memory. The figure names its sensor.

NVML's counter was read on an NVIDIA H200: it moves every 0.1 s, and a card that has just worked
draws more than one at rest, so idle power is taken before and after. The reading of sysfs was
tested on files that look like it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrgaze.records import Frozen

INTERVAL = 0.02
"""Seconds between samples."""
COVERAGE = 0.9
"""Share of the measured time that samples must cover."""
_GAP = 5  # a pause between samples of more intervals than this covers nothing
_STEP = 0.25  # seconds, longer than a counter takes to move


class Energy(Frozen):
    """Energy of films that were read one after another."""

    sensor: str
    films: int
    seconds: float
    samples: int
    coverage: float
    """Share of the time between samples that followed each other closely."""
    idle_watts: float
    """Mean of before and after."""
    idle_drift_watts: float = 0.0
    """Half of what they differ by."""
    busy_watts: float
    joules_per_film: float
    joules_per_film_above_idle: float

    @property
    def drift_joules_per_film(self) -> float:
        """What `joules_per_film_above_idle` may be off by, since idle power drifts."""
        return self.idle_drift_watts * self.seconds / self.films

    @property
    def stated(self) -> str:
        """Joules a film, and above idle where that can be told."""
        above, drift = self.joules_per_film_above_idle, self.drift_joules_per_film
        if above <= drift:
            return f"{self.joules_per_film:.3f} J a film, not to be told from idle"
        return f"{self.joules_per_film:.3f} J a film, {above:.3f} ± {drift:.3f} above idle"


@dataclass(frozen=True)
class Sensor:
    """Something that reads power or energy."""

    name: str
    read: Callable[[], float]
    """Watts, or joules since some time."""
    counts: bool
    """It gives joules."""
    wraps_at: float = float("inf")
    """Joules at which the counter begins anew."""


def find_sensor(root: Path = Path("/")) -> Sensor | None:
    """The first sensor that this process can read, None where there is none."""
    for find in (_nvml, lambda: _ina3221(root), lambda: _rapl(root)):
        sensor = find()
        if sensor is None:
            continue
        with contextlib.suppress(OSError):
            sensor.read()
            return sensor
    return None


def _nvml() -> Sensor | None:
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except ImportError:
        return None
    except nvml.NVMLError:
        return None
    try:
        gpu = _chosen(nvml, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    except nvml.NVMLError:
        return None
    name = f"NVML, {nvml.nvmlDeviceGetName(gpu)}"
    for counts, ask, unit in (
        (True, nvml.nvmlDeviceGetTotalEnergyConsumption, "energy counter"),
        (False, nvml.nvmlDeviceGetPowerUsage, "power"),
    ):
        try:
            ask(gpu)
        except nvml.NVMLError:
            continue
        return Sensor(f"{name}, {unit}", _milli(ask, gpu), counts)
    return None


def _chosen(nvml: Any, visible: str) -> Any:
    """The card that CUDA sees first: NVML knows nothing of CUDA_VISIBLE_DEVICES."""
    first = visible.split(",")[0].strip()
    if not first or first.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(first or 0))
    cards = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
    for card in cards:  # the beginning of a UUID is enough for CUDA
        if str(nvml.nvmlDeviceGetUUID(card)).startswith(first):
            return card
    raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)


def _milli(ask: Callable[[Any], int], gpu: Any) -> Callable[[], float]:
    return lambda: ask(gpu) / 1e3


def _ina3221(root: Path) -> Sensor | None:
    """The input rail of a Jetson, VDD_IN where there is one, else the sum of all.

    Source: the kernel's hwmon interface: inN_label, inN_input in mV, currN_input in mA.
    """
    rails: dict[str, tuple[Path, Path]] = {}
    for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in[1-3]_label")):
        number = label.name[2]
        volts, amperes = (label.with_name(f"{kind}{number}_input") for kind in ("in", "curr"))
        if volts.is_file() and amperes.is_file():
            rails[label.read_text().strip()] = (volts, amperes)
    if not rails:
        return None
    chosen = {"VDD_IN": rails["VDD_IN"]} if "VDD_IN" in rails else rails

    def watts() -> float:
        return sum(float(v.read_text()) * float(a.read_text()) / 1e6 for v, a in chosen.values())

    return Sensor(f"INA3221, {' + '.join(chosen)}", watts, counts=False)


def _rapl(root: Path) -> Sensor | None:
    """The processor's package. Source: the kernel's powercap interface, in microjoules."""
    for zone in sorted(root.glob("sys/class/powercap/*:0")):
        counter, largest = zone / "energy_uj", zone / "max_energy_range_uj"
        if re.fullmatch(r"[a-z-]+:0", zone.name) and counter.is_file() and largest.is_file():
            name = (zone / "name").read_text().strip()
            wraps_at = float(largest.read_text()) / 1e6
            return Sensor(f"RAPL, {name}", _joules_of(counter), True, wraps_at)
    return None


def _joules_of(counter: Path) -> Callable[[], float]:
    return lambda: float(counter.read_text()) / 1e6


class Meter:
    """Samples a sensor in a thread of its own.

    Args:
        interval: seconds between samples.
    """

    def __init__(self, sensor: Sensor, interval: float = INTERVAL) -> None:
        self.sensor = sensor
        self._interval = interval
        self._samples: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sample while the block runs."""
        stop = threading.Event()
        self._samples = []

        def sample() -> None:
            while True:
                with contextlib.suppress(OSError):  # a sample that is missing lowers the coverage
                    self._samples.append((time.perf_counter(), self.sensor.read()))
                if stop.wait(self._interval):
                    return

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def total(self, start: float, end: float) -> tuple[float, float, int]:
        """Joules between two times of `time.perf_counter`, the coverage, and the samples."""
        times, values = np.array(self._samples, dtype=np.float64).reshape(-1, 2).T
        joules, coverage = integrated(times, values, self.sensor, start, end, self._interval)
        return joules, coverage, len(times)


def integrated(
    times: NDArray[np.float64],
    values: NDArray[np.float64],
    sensor: Sensor,
    start: float,
    end: float,
    interval: float = INTERVAL,
) -> tuple[float, float]:
    """Joules from `start` to `end` and the share of that time that samples cover.

    Power is integrated by the trapezoid rule. A counter is differenced between the samples at which
    it moved, since it may move more seldom than it is read. Uncovered time is filled with the mean
    power of what is covered.

    Args:
        times, values: `(n,)`, in seconds, and in watts or joules.
    """
    moved = np.flatnonzero(np.diff(values)) + 1 if sensor.counts else np.arange(len(times))
    if len(moved) < 2:
        return 0.0, 0.0
    pause = np.maximum.reduceat(np.diff(times), moved[:-1])
    times, values = times[moved], values[moved]
    length = np.diff(times)
    if sensor.counts:
        step = np.diff(values)
        step = np.where(step < 0, step + sensor.wraps_at, step)
    else:
        step = (values[:-1] + values[1:]) / 2 * length
    inside = np.clip(np.minimum(times[1:], end) - np.maximum(times[:-1], start), 0, None)
    near = pause <= _GAP * interval
    covered = float((inside * near).sum())
    if covered <= 0:
        return 0.0, 0.0
    joules = float((step / length * inside * near).sum())
    coverage = min(covered / (end - start), 1.0)
    return joules / coverage, coverage


def measure(
    reading: Callable[[int], object], seconds: float, sensor: Sensor, idle_seconds: float = 3.0
) -> Energy | str:
    """Energy of films read for some seconds; a sentence where the samples do not cover them.

    Args:
        reading: reads film number i; the first one is not measured.
        idle_seconds: before, and as many after.
    """
    reading(0)
    meter = Meter(sensor)
    with meter.running():
        time.sleep(_STEP)
        start = time.perf_counter()
        time.sleep(idle_seconds)
        quiet = time.perf_counter()
        films = 0
        while time.perf_counter() < quiet + seconds:
            reading(films)
            films += 1
        end = time.perf_counter()
        time.sleep(idle_seconds)
        last = time.perf_counter()
        time.sleep(_STEP)
    spans = ((start, quiet), (quiet, end), (end, last))
    totals = [meter.total(begin, until) for begin, until in spans]
    coverage = min(covered for _, covered, _ in totals)
    if coverage < COVERAGE:
        return f"{sensor.name}: samples cover {coverage:.0%} of the time, {COVERAGE:.0%} is needed"
    before, busy, after = (
        joules / (until - begin)
        for (joules, _, _), (begin, until) in zip(totals, spans, strict=True)
    )
    idle, length = (before + after) / 2, end - quiet
    return Energy(
        sensor=sensor.name,
        films=films,
        seconds=length,
        samples=totals[1][2],
        coverage=coverage,
        idle_watts=idle,
        idle_drift_watts=abs(after - before) / 2,
        busy_watts=busy,
        joules_per_film=busy * length / films,
        joules_per_film_above_idle=(busy - idle) * length / films,
    )
