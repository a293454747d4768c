"""MLPerf's offline scenario on our own reader, and LoadGen itself where it is installed.

Single stream is what `measure` does from file to files; LoadGen's is canvas to both heads.
Source: Reddi et al., MLPerf Inference Benchmark (2020), section 4.1.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrgaze.benchmarks.record import LoadGen, Offline
from cxrgaze.environment import versions
from cxrgaze.errors import FilmError
from cxrgaze.films.ahead import decode_ahead
from cxrgaze.films.canvas import load_for
from cxrgaze.films.film import Film
from cxrgaze.runtime.backend import Backend
from cxrgaze.runtime.reader import MAX_BATCH, Reader

TURNS = 5
"""Turns of the throughput comparison, fewer where time runs out."""
LOADGEN_SECONDS = 3.0
"""Of each scenario. LoadGen's own rules ask for 600."""
_AMPLE = 1.5  # times the rate that was seen: LoadGen calls an offline run that ends early invalid


def offline(
    reader: Reader, films: Sequence[Path], decoded: Sequence[Film], seconds: float
) -> Offline:
    """Films a second with all films at hand, in turns: plain, decoded ahead, batched."""
    spec = reader.bundle.manifest.spec

    def plain() -> None:
        for path in films:
            reader.read(path)

    def ahead() -> None:
        for film in decode_ahead(films, partial(load_for, spec)):
            if isinstance(film, FilmError):
                raise film
            reader.read(film)

    def batched() -> None:
        reader.read_batch(decoded)

    runs: dict[str, Callable[[], None]] = {"plain": plain, "ahead": ahead, "batched": batched}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    while len(rates["batched"]) < TURNS:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            rates[name].append(len(films) / (time.perf_counter() - start))
        if time.perf_counter() > deadline:
            break
    ratios = [a / p for a, p in zip(rates["ahead"], rates["plain"], strict=True)]
    return Offline(
        films=len(films),
        turns=len(ratios),
        plain_films_per_s=median(rates["plain"]),
        ahead_films_per_s=median(rates["ahead"]),
        ahead_ratio=median(ratios),
        batch=min(MAX_BATCH, len(films)),
        batched_films_per_s=median(rates["batched"]),
    )


def loadgen(backend: Backend, canvases: NDArray[np.float32]) -> LoadGen | str:
    """Single stream and offline by LoadGen, performance only.

    Args:
        canvases: `(n, 1, 1, H, W)`, the sample library.
    """
    try:
        import mlperf_loadgen as lg
    except ImportError:
        return "not measured: LoadGen is not installed (the extra 'peers')"

    issued = [0]

    def issue(queries: Sequence[Any]) -> None:
        issued[0] += len(queries)
        for query in queries:
            backend.infer(canvases[query.index])
            lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, 0, 0)])

    def summary(scenario: Any) -> str:
        settings = lg.TestSettings()
        settings.scenario = scenario
        settings.mode = lg.TestMode.PerformanceOnly
        settings.min_duration_ms = settings.max_duration_ms = int(LOADGEN_SECONDS * 1e3)
        settings.min_query_count = 1
        settings.offline_expected_qps = expected
        with tempfile.TemporaryDirectory(prefix="cxrgaze-loadgen-") as folder:
            logs = lg.LogSettings()
            logs.log_output.outdir = folder
            logs.log_output.copy_summary_to_stdout = False
            system = lg.ConstructSUT(issue, lambda: None)
            library = lg.ConstructQSL(
                len(canvases), len(canvases), lambda indices: None, lambda indices: None
            )
            try:
                lg.StartTestWithLogSettings(system, library, settings, logs)
            finally:
                lg.DestroyQSL(library)
                lg.DestroySUT(system)
            return Path(folder, "mlperf_log_summary.txt").read_text()

    times = []
    for canvas in canvases:
        start = time.perf_counter()
        backend.infer(canvas)
        times.append(time.perf_counter() - start)
    expected = _AMPLE / median(times)
    single = summary(lg.TestScenario.SingleStream)
    together = summary(lg.TestScenario.Offline)
    return LoadGen(
        version=versions("mlcommons-loadgen")["mlcommons-loadgen"],
        queries=issued[0],
        single_stream_p90_ms=_figure(single, r"90.0+ percentile latency \(ns\)\s*: (\d+)") / 1e6,
        offline_films_per_s=_figure(together, r"Samples per second: ([\d.e+]+)"),
        valid="Result is : VALID" in single and "Result is : VALID" in together,
    )


def _figure(text: str, pattern: str) -> float:
    figure = re.search(pattern, text)
    if not figure:
        raise ValueError(f"LoadGen's summary has nothing like {pattern!r}")
    return float(figure[1])
