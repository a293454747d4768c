"""Measure a bundle as it ships: film file to reading, stage by stage, and a cold start."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from cxrgaze.benchmarks.timing import Latency, latency
from cxrgaze.bundle import GRAPH, Bundle
from cxrgaze.errors import CxrgazeError, FilmError, UsageError
from cxrgaze.runtime import host
from cxrgaze.runtime.canvas import to_canvas
from cxrgaze.runtime.film import load_film
from cxrgaze.runtime.isolate import decode_ahead
from cxrgaze.runtime.reader import Reader, load
from cxrgaze.spec import NOTICE, Frozen

SCHEMA_VERSION = 1
PER_FILM = 10
"""Decodings of each film for its row."""
TURNS = 5
"""Turns of the throughput comparison, fewer where time runs out."""

STAGES = {
    "decode": "file on disk to display values in [0, 1]",
    "preprocess": "display values to canvas",
    "infer": "canvas to both heads, host memory to host memory",
    "postprocess": "logits to probabilities; the map stays on the canvas",
    "heatmap": "map on the canvas to a density in pixels of the film",
    "end_to_end": "file on disk to reading and heatmap, by one clock around all of it",
}
"""Where each figure begins and ends."""


class Config(Frozen):
    """What was asked for."""

    samples: int
    warmup: int
    seconds: float
    """Sampling, and then the throughput comparison, each stop after this time."""
    threads: int | None
    cold_starts: int


class ColdStart(Frozen):
    """Process start to the first reading; medians over `count` processes, in milliseconds."""

    count: int
    process_ms: float
    import_ms: float
    load_ms: float
    first_reading_ms: float
    peak_memory_bytes: int
    """Largest resident set of a process that does nothing else; largest of all."""


class FilmTimes(Frozen):
    """One film's share of the work; names are left out, they may identify a patient."""

    film: str
    """First 12 digits of the file's SHA-256."""
    container: str
    """Suffix of the file and source of its pixel values."""
    width: int
    height: int
    decode: Latency
    preprocess: Latency


class Throughput(Frozen):
    """The films read one after another, decoded ahead of inference and not, in turns."""

    films: int
    """Films per turn."""
    turns: int
    plain_films_per_s: float
    """Median over turns: decode, then infer, then the next."""
    ahead_films_per_s: float
    """Median over turns: the next films are decoded while one is inferred."""
    ratio: float
    """Median over turns of ahead over plain of the same turn."""


class Report(Frozen):
    """Content of `report.json`."""

    schema_version: int = SCHEMA_VERSION
    notice: str = NOTICE
    caution: str | None
    bundle: dict[str, Any]
    config: Config
    films: int
    boundaries: dict[str, str]
    steady: dict[str, Latency]
    """Latency by stage, in milliseconds, one film at a time, after warm-up."""
    per_film: tuple[FilmTimes, ...]
    throughput: Throughput
    cold: ColdStart
    not_measured: tuple[str, ...]
    host: dict[str, Any]
    """Machine, versions and time: what differs when the same is run elsewhere or again."""


def measure(bundle: Path, films: Sequence[Path], config: Config) -> Report:
    """Run the benchmark.

    Raises:
        CxrgazeError: a film cannot be read, a cold start failed, or the bundle cannot be loaded.
    """
    for path in films:
        if reasons := load_film(path).reasons:
            raise UsageError(f"{path} is not applicable ({'; '.join(reasons)}); leave it out")
    before = list(os.getloadavg())
    Bundle.open(bundle).verify()  # its error, not that of a child process
    cold = cold_start(bundle, films[0], config)
    with load(bundle, threads=config.threads) as reader:
        for index in range(config.warmup):
            _sample(reader, films[index % len(films)])
        steady = _steady(reader, films, config)
        per_film = tuple(_film_times(reader, path) for path in films)
        throughput = _throughput(reader, films, config)
        described, caution = _described(reader), reader.bundle.manifest.spec.caution
    return Report(
        caution=caution,
        bundle=described,
        config=config,
        films=len(films),
        boundaries=STAGES,
        steady=steady,
        per_film=per_film,
        throughput=throughput,
        cold=cold,
        not_measured=("energy", "GPU", "clocks and temperature", "throughput in batches"),
        host={
            "created_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(
                timespec="seconds"
            ),
            "cpu": host.cpu_name(),
            "cpu_count": host.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "cxrgaze": version("cxrgaze"),
            "onnxruntime": version("onnxruntime"),
            "numpy": version("numpy"),
            "load_average_before": before,
        },
    )


def cold_start(bundle: Path, film: Path, config: Config) -> ColdStart:
    """Start processes that read one film each; medians of their parts.

    Raises:
        CxrgazeError: such a process failed.
    """
    runs = []
    for _ in range(config.cold_starts):
        arguments = [str(bundle), str(film), str(config.threads or 0)]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cxrgaze.benchmarks.cold", *arguments],
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


def _steady(reader: Reader, films: Sequence[Path], config: Config) -> dict[str, Latency]:
    samples: dict[str, list[float]] = {stage: [] for stage in STAGES}
    deadline = time.perf_counter() + config.seconds
    for index in range(config.samples):
        for stage, ms in _sample(reader, films[index % len(films)]).items():
            samples[stage].append(ms)
        if time.perf_counter() > deadline:
            break
    return {stage: latency(values) for stage, values in samples.items()}


def _sample(reader: Reader, film: Path) -> dict[str, float]:
    start = time.perf_counter()
    reading = reader.read(film)
    read = time.perf_counter()
    reading.heatmap()
    done = time.perf_counter()
    return {
        **reading.timings_ms,
        "heatmap": (done - read) * 1e3,
        "end_to_end": (done - start) * 1e3,
    }


def _film_times(reader: Reader, path: Path) -> FilmTimes:
    decode, preprocess = [], []
    for _ in range(PER_FILM):
        film = load_film(path)
        start = time.perf_counter()
        to_canvas(film.pixels, reader.bundle.manifest.spec)
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


def _throughput(reader: Reader, films: Sequence[Path], config: Config) -> Throughput:
    def plain() -> None:
        for path in films:
            reader.read(path)

    def ahead() -> None:
        for film in decode_ahead(films, load_film):
            if isinstance(film, FilmError):
                raise film
            reader.read(film)

    rates: dict[str, list[float]] = {"plain": [], "ahead": []}
    deadline = time.perf_counter() + config.seconds
    while len(rates["ahead"]) < TURNS:
        for name, run in (("plain", plain), ("ahead", ahead)):
            start = time.perf_counter()
            run()
            rates[name].append(len(films) / (time.perf_counter() - start))
        if time.perf_counter() > deadline:
            break
    ratios = [a / p for a, p in zip(rates["ahead"], rates["plain"], strict=True)]
    return Throughput(
        films=len(films),
        turns=len(ratios),
        plain_films_per_s=median(rates["plain"]),
        ahead_films_per_s=median(rates["ahead"]),
        ratio=median(ratios),
    )


def _described(reader: Reader) -> dict[str, Any]:
    bundle: Bundle = reader.bundle
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "sha256": bundle.sha256,
        "variant": manifest.spec.variant,
        "canvas": f"{manifest.spec.height} x {manifest.spec.width}",
        "precision": manifest.precision,
        "target": manifest.target,
        "backend": reader.backend.name,
        "device": reader.backend.device,
        "graph_bytes": next(r.size for r in manifest.files if r.path == GRAPH),
        "gate": manifest.gate.verdict,
    }
