"""Measure a bundle as it ships: film file to reading and files, part by part."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from cxrgaze import children
from cxrgaze.benchmarks import energy, paired, scenarios
from cxrgaze.benchmarks.machine import Watch, machine
from cxrgaze.benchmarks.plain import Plain
from cxrgaze.benchmarks.record import (
    STAGES,
    ColdStart,
    Config,
    FilmTimes,
    Host,
    Memory,
    Objective,
    Overhead,
    Peer,
    Report,
    Sweep,
)
from cxrgaze.benchmarks.timing import NEEDED, SMALLEST_INTERVAL, Latency, latency, warm_up
from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.command import Steps
from cxrgaze.environment import now_utc
from cxrgaze.errors import CxrgazeError, UsageError
from cxrgaze.evidence.intervals import Interval
from cxrgaze.files import render_json, temporary_folder, write_atomic
from cxrgaze.films.ahead import Decode, Usable, usable
from cxrgaze.films.canvas import canvases, load_for, to_canvas
from cxrgaze.films.decode import load_film
from cxrgaze.films.film import Film
from cxrgaze.runtime import overlay
from cxrgaze.runtime.reader import Reader, load
from cxrgaze.spec import ModelSpec

PER_FILM = 10
"""Decodings of each film for its row."""
IDLE_SECONDS = 1.0
"""Pause before each reading after idle."""

Peers = Callable[[Sequence[Film]], tuple[Peer, ...]]
Sweeps = Callable[[Sequence[Film]], tuple[Sweep, ...]]


def measure(
    bundle: Path,
    films: Sequence[Path],
    config: Config,
    step: Steps,
    *,
    slo: Mapping[str, float] | None = None,
    peers: Peers = lambda films: (),
    sweeps: Sweeps = lambda films: (),
) -> Report:
    """Run the benchmark.

    Args:
        slo: limits of the end-to-end latency in milliseconds, by percentile.
        peers, sweeps: measure further parts, of the same films, once the bundle's reader is closed.

    Raises:
        UsageError: no film can be read.
        CxrgazeError: a cold start failed, or the bundle cannot be loaded.
    """
    spec = Bundle.open(bundle).manifest.spec
    given = usable_films(films, spec)
    films, decoded = [path for path, _ in given.films], [film for _, film in given.films]
    watch = Watch()
    load(bundle, config.device, threads=config.threads).close()  # its error, not a child's
    with step(f"cold starts, processes: {config.cold_starts}"):
        cold = cold_start(bundle, films[0], config)
    with (
        load(bundle, config.device, threads=config.threads) as reader,
        temporary_folder("bench") as folder,
    ):
        work = _Work(reader, films, Path(folder))
        with step("warm up"):
            settled = warm_up(lambda: work.sample(work.next())["end_to_end"], config.warmup_seconds)
        with step(f"steady state, at most {config.samples} readings"):
            samples = _steady(work, config)
        with step(f"after idle, readings: {config.after_idle}"):
            after_idle = _after_idle(work, config)
        with step("films one by one, all at once, and under load"):
            per_film = tuple(_film_times(reader, path) for path in films)
            offline = scenarios.offline(reader, films, decoded, config.seconds)
            images, _ = canvases(decoded, reader.bundle.manifest.spec)
            loaded = scenarios.loadgen(reader.backend, images[:, None])
        with step("energy"):
            spent = _energy(reader, decoded, config)
        with step("our own overhead"):
            overhead = _overhead(reader, decoded, config)
        memory, described = _memory(reader, cold), _described(reader)
    others, swept = peers(decoded), sweeps(decoded)
    return Report(
        caution=" ".join(filter(None, (reader.bundle.manifest.spec.caution, given.share))) or None,
        bundle=described,
        config=config,
        films=len(films),
        warm_up=settled,
        cold=cold,
        steady={stage: latency(values) for stage, values in samples.items()},
        after_idle=after_idle,
        idle_seconds=IDLE_SECONDS,
        per_film=per_film,
        offline=offline,
        loadgen=loaded,
        memory=memory,
        energy=spent,
        overhead=overhead,
        peers=others,
        sweeps=swept,
        objectives=tuple(
            objective(name, limit, samples["end_to_end"]) for name, limit in (slo or {}).items()
        ),
        samples={stage: tuple(values) for stage, values in samples.items()},
        host=Host(
            created_utc=now_utc(),
            machine=machine(),
            conditions=watch.conditions(),
        ),
    )


def usable_films(paths: Sequence[Path], *specs: ModelSpec) -> Usable:
    """The films that can be measured, with what the networks of `specs` need of them.

    Raises:
        UsageError: there is none.
    """
    decode: Decode = load_film
    for spec in specs:
        if spec.needs_stored:
            decode = partial(load_for, spec)
    given = usable(paths, decode)
    if not given.films:
        raise UsageError(f"none of {len(paths)} films can be read")
    return given


def cold_start(bundle: Path, film: Path, config: Config) -> ColdStart:
    """Start processes that read one film each; medians of their parts.

    Raises:
        CxrgazeError: such a process failed.
    """
    runs = []
    for _ in range(config.cold_starts):
        arguments = [str(bundle), str(film), str(config.threads), config.device]
        start = time.perf_counter()
        done = subprocess.run(
            children.python("cxrgaze.benchmarks.cold", *arguments),
            capture_output=True,
            text=True,
            check=False,
        )
        process_ms = (time.perf_counter() - start) * 1e3
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise CxrgazeError(f"a cold start failed: {last[0]}")
        runs.append({"process_ms": process_ms, **json.loads(done.stdout)})
    middle = len(runs) // 2
    medians = {key: sorted(run[key] for run in runs)[middle] for key in runs[0]}
    medians["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in runs)
    return ColdStart(count=len(runs), **medians)


class _Work:
    """Reads the films in turn, from file to files."""

    def __init__(self, reader: Reader, films: Sequence[Path], folder: Path) -> None:
        self._reader = reader
        self._films = films
        self._folder = folder
        self._done = 0

    def next(self) -> Path:
        """The next film."""
        self._done += 1
        return self._films[(self._done - 1) % len(self._films)]

    def sample(self, path: Path) -> dict[str, float]:
        """Milliseconds of each stage of one film."""
        start = time.perf_counter()
        film = load_for(self._reader.bundle.manifest.spec, path)
        reading = self._reader.read(film)
        read = time.perf_counter()
        if reading.log_density is not None:
            reading.heatmap()
        mapped = time.perf_counter()
        write_atomic(self._folder / "film.overlay.png", overlay.png(reading, film.pixels))
        write_atomic(self._folder / "film.json", render_json(reading.to_json()))
        done = time.perf_counter()
        return {
            **reading.timings_ms,
            **({} if reading.log_density is None else {"heatmap": (mapped - read) * 1e3}),
            "write": (done - mapped) * 1e3,
            "end_to_end": (done - start) * 1e3,
        }


def _steady(work: _Work, config: Config) -> dict[str, list[float]]:
    taken: list[dict[str, float]] = []
    deadline = time.perf_counter() + config.seconds
    while len(taken) < config.samples and (not taken or time.perf_counter() < deadline):
        taken.append(work.sample(work.next()))
    return {
        stage: [round(sample[stage], 4) for sample in taken]
        for stage in STAGES
        if stage in taken[0]
    }


def _after_idle(work: _Work, config: Config) -> Latency:
    times_ms = []
    for _ in range(config.after_idle):
        time.sleep(IDLE_SECONDS)
        times_ms.append(work.sample(work.next())["end_to_end"])
    return latency(times_ms)


def objective(percentile: str, limit_ms: float, samples: Sequence[float]) -> Objective:
    """The verdict on one objective: met or missed where the whole interval says so.

    With too few samples for the percentile, or an interval around the limit, inconclusive.
    """
    interval: Interval | None = getattr(latency(samples), percentile)
    verdict, reason = _met(percentile, interval, limit_ms, len(samples))
    return Objective(
        percentile=percentile,
        limit_ms=limit_ms,
        found_ms=interval.value if interval else None,
        missed_share=sum(sample > limit_ms for sample in samples) / len(samples),
        verdict=verdict,
        reason=reason,
    )


def _met(
    percentile: str, interval: Interval | None, limit_ms: float, count: int
) -> tuple[Literal["met", "missed", "inconclusive"], str]:
    if interval is None or interval.low is None or interval.high is None:
        needed = max(NEEDED[percentile], SMALLEST_INTERVAL)
        return "inconclusive", f"{count} samples say nothing of {percentile}, which needs {needed}"
    between = f"{percentile} is {interval.low:.2f} to {interval.high:.2f} ms (95 %)"
    if interval.high <= limit_ms:
        return "met", between
    if interval.low > limit_ms:
        return "missed", between
    around = f"around the limit of {limit_ms:g} ms: more --samples, or a quieter machine"
    return "inconclusive", f"{between}, {around}"


def _film_times(reader: Reader, path: Path) -> FilmTimes:
    spec = reader.bundle.manifest.spec
    decode, preprocess = [], []
    for _ in range(PER_FILM):
        film = load_for(spec, path)
        start = time.perf_counter()
        to_canvas(film, spec)
        preprocess.append((time.perf_counter() - start) * 1e3)
        decode.append(film.decode_ms)
    return FilmTimes(
        film=film.sha256[:12],
        container=f"{path.suffix.lower() or 'no suffix'}, {film.pixel_source}",
        width=film.shape[1],
        height=film.shape[0],
        decode=latency(decode),
        preprocess=latency(preprocess),
    )


def _energy(reader: Reader, films: Sequence[Film], config: Config) -> energy.Energy | str:
    sensor = energy.find_sensor()
    if sensor is None:
        return "not measured: no power sensor that this process can read (NVML, INA3221, RAPL)"
    return energy.measure(
        lambda number: reader.read(films[number % len(films)]), min(config.seconds, 10.0), sensor
    )


def _overhead(reader: Reader, films: Sequence[Film], config: Config) -> Overhead | str:
    if reader.backend.name != "onnxruntime":
        return f"not measured: the script by hand runs ONNX Runtime, not {reader.backend.name}"
    manifest = reader.bundle.manifest
    size = (manifest.spec.height, manifest.spec.width)
    graph = reader.bundle.read(GRAPH)
    served = reader.served
    if served.classes != manifest.spec.class_names:
        return "not measured: the script by hand serves classes that nothing taught, we do not"
    decision = manifest.decision
    exclusive = manifest.spec.exclusive
    each = [decision.temperatures.get(name, 1.0) for name in manifest.spec.class_names]
    temperature = decision.temperature if exclusive else np.array(each)
    plain = Plain(graph, size, temperature, config.threads, exclusive=exclusive)
    ours_ms: list[dict[str, float]] = []
    plain_ms: list[dict[str, float]] = []

    def ours(number: int) -> None:
        start = time.perf_counter()
        reading = reader.read(films[number % len(films)])
        whole = (time.perf_counter() - start) * 1e3
        stages = {name: reading.timings_ms[name] for name in ("preprocess", "infer", "postprocess")}
        ours_ms.append({**stages, "rest": whole - sum(stages.values())})

    def by_hand(number: int) -> None:
        start = time.perf_counter()
        plain(films[number % len(films)].pixels)
        whole = (time.perf_counter() - start) * 1e3
        plain_ms.append({**plain.timings_ms, "rest": whole - sum(plain.timings_ms.values())})

    times = paired.interleave({"plain": by_hand, "ours": ours}, seconds=config.seconds)
    return Overhead(
        ratio=paired.compare(times["plain"], times["ours"]),
        ours_us=_medians_us(ours_ms),
        plain_us=_medians_us(plain_ms),
    )


def _medians_us(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: 1e3 * median(sample[name] for sample in samples) for name in samples[0]}


def _memory(reader: Reader, cold: ColdStart) -> Memory:
    files = reader.bundle.manifest.files
    on_device = reader.backend.memory_bytes
    return Memory(
        graph=next(r.size for r in files if r.path == GRAPH),
        bundle=sum(r.size for r in files),
        plan=on_device.get("plan"),
        host_peak=cold.peak_memory_bytes,
        device_used=on_device.get("device"),
    )


def _described(reader: Reader) -> dict[str, Any]:
    manifest = reader.bundle.manifest
    return {
        "name": manifest.name,
        "sha256": reader.bundle.sha256,
        "variant": manifest.spec.variant,
        "canvas": f"{manifest.spec.height} x {manifest.spec.width}",
        "precision": manifest.precision,
        "target": manifest.target,
        "rewrites": list(manifest.rewrites),
        "gmac": sum(manifest.convolution_macs.values()) / 1e9,
        "domain": manifest.spec.domain,
        "backend": reader.backend.name,
        "device": reader.backend.device,
        "gate": (reader.backend.gate or manifest.gate).verdict,
    }
