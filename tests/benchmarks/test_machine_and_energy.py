"""What a machine says of itself, and its energy, on files that look like sysfs and procfs."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from cxrgaze.benchmarks import energy
from cxrgaze.benchmarks.energy import Sensor, find_sensor, integrated
from cxrgaze.benchmarks.machine import Watch, gpus, machine
from cxrgaze.runtime.host import peak_memory_bytes


def _write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _stat(root, user, idle, steal):
    _write(root, proc__stat=f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 0 0 1 0 0 0 0 0 0\n")


def test_conditions_are_the_counters_differences(tmp_path):
    base = tmp_path / "sys/devices/system/cpu/cpu0"
    for folder in ("cpufreq", "thermal_throttle"):
        (base / folder).mkdir(parents=True)
    (tmp_path / "sys/class/thermal/thermal_zone0").mkdir(parents=True)
    clock, heat = base / "cpufreq/scaling_cur_freq", tmp_path / "sys/class/thermal/thermal_zone0"
    throttled = base / "thermal_throttle/core_throttle_count"
    _stat(tmp_path, user=1000, idle=5000, steal=0)
    clock.write_text("2300000\n")
    (heat / "temp").write_text("41000\n")
    throttled.write_text("3\n")
    watch = Watch(tmp_path)
    _stat(tmp_path, user=101_000, idle=255_000, steal=50_000)
    clock.write_text("1200000\n")
    (heat / "temp").write_text("88500\n")
    throttled.write_text("10\n")
    found = watch.conditions()
    assert found.other_cpu_share == pytest.approx(0.25, abs=0.001)  # this process took next to none
    assert found.steal_share == pytest.approx(0.125)
    assert (found.mhz_before, found.mhz_after) == (2300, 1200)
    assert (found.celsius_before, found.celsius_after) == (41, 88.5)
    assert found.throttled == 7


def test_what_a_machine_does_not_say_is_none(tmp_path):
    found = Watch(tmp_path).conditions()
    assert (found.other_cpu_share, found.steal_share, found.mhz_after) == (None, None, None)
    assert (found.celsius_after, found.throttled) == (None, None)
    record = machine(tmp_path)
    assert (record.memory_bytes, record.governor, record.l4t) == (None, None, None)
    assert not record.virtual and record.versions["numpy"] == np.__version__


def test_this_machine_is_described():
    record = machine()
    assert record.cpu and record.cpu_count >= 1 and record.memory_bytes > 1e9
    assert Watch().conditions().seconds >= 0


def test_without_nvml_there_are_no_cards(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus({}) == () and energy._nvml() is None


def test_the_peak_is_of_this_process_and_not_of_its_parent(tmp_path):
    _write(tmp_path, proc__self__status="VmPeak:\t  999 kB\nVmHWM:\t   1234 kB\nVmRSS:\t 99 kB\n")
    assert peak_memory_bytes(tmp_path) == 1234 * 1024
    assert peak_memory_bytes(tmp_path / "nothing") > 1e6


def _rail(root, number, label, mv, ma):
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"in{number}_label").write_text(label + "\n")
    (folder / f"in{number}_input").write_text(f"{mv}\n")
    (folder / f"curr{number}_input").write_text(f"{ma}\n")


def test_the_rails_of_a_jetson_are_read(tmp_path):
    _rail(tmp_path, 2, "VDD_CPU_GPU_CV", 5000, 400)
    _rail(tmp_path, 3, "VDD_SOC", 5000, 200)
    some = find_sensor(tmp_path)
    assert some.name == "INA3221, VDD_CPU_GPU_CV + VDD_SOC" and not some.counts
    assert some.read() == pytest.approx(3.0)
    _rail(tmp_path, 1, "VDD_IN", 5000, 1500)  # has the others in it
    whole = find_sensor(tmp_path)
    assert whole.name == "INA3221, VDD_IN" and whole.read() == pytest.approx(7.5)


def test_the_counter_of_a_processor_is_read(tmp_path):
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (("energy_uj", "2500000"), ("max_energy_range_uj", "9e6"), ("name", "pkg-0")):
        (zone / name).write_text(text + "\n")
    sensor = find_sensor(tmp_path)
    assert (sensor.name, sensor.counts, sensor.wraps_at) == ("RAPL, pkg-0", True, 9)
    assert sensor.read() == 2.5
    (zone / "energy_uj").unlink()  # as for one who may not read it
    assert find_sensor(tmp_path) is None


def test_there_is_nothing_where_there_is_no_sensor(tmp_path):
    assert find_sensor(tmp_path) is None


class _Nvml:
    """As much of NVML as finds a card."""

    NVML_ERROR_NOT_FOUND = 6
    uuids = ("GPU-aaaa1111-2222", "GPU-bbbb1111-2222")

    class NVMLError(Exception):
        pass

    nvmlDeviceGetHandleByIndex = staticmethod(range(2).__getitem__)  # noqa: N815 NVML's name

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetUUID(self, card):  # noqa: N802
        return self.uuids[card]


@pytest.mark.parametrize(
    ("visible", "card"), [("", 0), ("1", 1), ("1,0", 1), ("GPU-bbbb", 1), ("GPU-aaaa1111-2222", 0)]
)
def test_energy_is_of_the_card_that_cuda_sees_first(visible, card):
    """B10: it was the first card's, whichever computed."""
    assert energy._chosen(_Nvml(), visible) == card


def test_a_card_that_nvml_does_not_know_has_no_energy():
    with pytest.raises(_Nvml.NVMLError):
        energy._chosen(_Nvml(), "GPU-cccc")


POWER = Sensor("power", lambda: 0.0, counts=False)
COUNTER = Sensor("counter", lambda: 0.0, counts=True, wraps_at=100.0)
COUNTER_OF_ALL = Sensor("counter", lambda: 0.0, counts=True)


def test_power_is_integrated_as_numpy_does():
    times = np.linspace(0, 2, 101)
    watts = 5 + np.sin(7 * times)
    joules, coverage = integrated(times, watts, POWER, 0, 2, interval=0.02)
    assert joules == pytest.approx(np.trapezoid(watts, times)) and coverage == 1
    half, _ = integrated(times, np.full(101, 4.0), POWER, 0.5, 1.0, interval=0.02)
    assert half == pytest.approx(2.0)


def test_a_counter_that_begins_anew_loses_nothing():
    times = np.linspace(0, 1, 51)
    counted = (80 + 40 * times) % 100
    assert integrated(times, counted, COUNTER, 0, 1)[0] == pytest.approx(40)


def test_a_counter_that_moves_more_seldom_than_it_is_read_tells_no_noise():
    """NVML's on an H200 moves every 0.1 s; between two samples it is still, or 12 J further."""
    times = np.arange(0, 3, 0.02) + 0.003
    power = np.where(times < 1, 100.0, 150.0)
    counted = np.floor(times / 0.1) * 0.1
    joules = np.where(counted < 1, 100 * counted, 100 + 150 * (counted - 1))
    idle, covered = integrated(times, joules, COUNTER_OF_ALL, 0.2, 0.95)
    assert idle / 0.75 == pytest.approx(100, rel=0.02) and covered == pytest.approx(1)
    busy, _ = integrated(times, joules, COUNTER_OF_ALL, 1.05, 2.8)
    assert busy / 1.75 == pytest.approx(power[-1], rel=0.03)


def test_a_counter_that_never_moves_covers_nothing():
    times = np.arange(0, 1, 0.02)
    assert integrated(times, np.full(len(times), 7.0), COUNTER, 0, 1) == (0.0, 0.0)


def test_a_pause_of_a_counter_lowers_the_coverage():
    times = np.concatenate([np.arange(0, 0.5, 0.02), np.arange(0.9, 1.5, 0.02)])
    _, coverage = integrated(times, 3 * times, COUNTER, 0.02, 1.4)
    assert coverage == pytest.approx(1 - 0.42 / 1.38, abs=0.02)


def test_a_pause_of_the_sensor_lowers_the_coverage():
    times = np.concatenate([np.arange(0, 0.5, 0.02), np.arange(0.9, 1.5, 0.02)])
    joules, coverage = integrated(times, np.full(len(times), 3.0), POWER, 0, 1.4, interval=0.02)
    assert coverage == pytest.approx(1 - 0.42 / 1.4, abs=0.02)
    assert joules == pytest.approx(3 * 1.4, rel=0.01)  # filled with the mean
    assert integrated(times[:1], times[:1], POWER, 0, 1) == (0.0, 0.0)


def _pretended(at_rest, at_work):
    """A sensor and a reading: what it says while a film is read, and while none is."""
    busy = [False]

    def reading(number):
        busy[0] = True
        time.sleep(0.005)
        busy[0] = False

    return Sensor("pretended", lambda: at_work if busy[0] else at_rest(), counts=False), reading


def test_energy_above_idle():
    sensor, reading = _pretended(lambda: 2.0, 12.0)
    found = energy.measure(reading, 0.3, sensor, idle_seconds=0.3)
    assert found.idle_watts == pytest.approx(2, rel=0.2) and 6 < found.busy_watts <= 12
    above = found.joules_per_film_above_idle / found.joules_per_film
    assert above == pytest.approx(1 - found.idle_watts / found.busy_watts)
    assert "above idle" in found.stated


def test_energy_is_not_told_from_an_idle_that_drifts_more():
    begun = time.perf_counter()
    sensor, reading = _pretended(lambda: 100 + 40 * (time.perf_counter() - begun), 125.0)
    found = energy.measure(reading, 0.3, sensor, idle_seconds=0.3)
    assert found.idle_drift_watts > 5
    assert found.stated.endswith("not to be told from idle")


def test_the_first_film_is_not_measured():
    """A backend may choose its kernels on it, which took 2.8 s on a card."""
    sensor, _ = _pretended(lambda: 2.0, 12.0)
    seen = []

    def reading(number):
        seen.append(number)
        time.sleep(0.5 if len(seen) == 1 else 0.005)

    found = energy.measure(reading, 0.2, sensor, idle_seconds=0.1)
    assert seen[:2] == [0, 0] and found.films == len(seen) - 1 and found.films > 10


def test_a_sensor_that_fails_gives_no_energy():
    def read():
        raise OSError("gone")

    found = energy.measure(lambda number: None, 0.1, Sensor("bad", read, False), idle_seconds=0.1)
    assert found == "bad: samples cover 0% of the time, 90% is needed"
