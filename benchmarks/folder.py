"""A folder of films: from files to files, beside the bare network's rate in the same run."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from cxrgaze.command import counted
from cxrgaze.files import temporary_folder
from cxrgaze.films.canvas import canvases, load_for
from cxrgaze.films.film import Film
from cxrgaze.films.find import find_films
from cxrgaze.records import Frozen
from cxrgaze.runtime.predict import MOST_WORKERS, PredictOptions, predict
from cxrgaze.runtime.reader import load
from cxrgaze.spec import NOTICE

TURNS = 5
"""Rounds in which every way takes a turn."""


class FolderRates(Frozen):
    """Films a second; medians over turns, ratios within them."""

    notice: str = NOTICE
    bundle: str
    backend: str
    device: str
    threads: int
    workers: int
    """Films that are worked on at the same time."""
    films: int
    turns: int
    bare: float
    """Canvas to heads, one film after another on all threads: nothing is decoded or written."""
    overlays: float
    """`cxrgaze-predict --output`: file to JSON, overlay and table."""
    without_overlays: float
    """The same with `--no-overlay`."""
    overlays_ratio: float
    """Median over turns of overlays over bare."""
    without_overlays_ratio: float


def folder_rates(
    bundle: Path,
    films: Sequence[tuple[Path, Film]],
    device: str,
    threads: int,
    turns: int = TURNS,
) -> FolderRates:
    """The rates of a bundle on some films that it may be applied to.

    Args:
        films: with their paths; decoded to make the canvases of the bare network.
        turns: 1 at least.

    Raises:
        CxrgazeError: as `load`.
    """
    workers = min(threads, MOST_WORKERS)
    found = find_films([path for path, _ in films])
    rng = np.random.default_rng(0)
    with (
        load(bundle, device, threads=threads) as one,
        load(bundle, device, threads=threads, at_once=workers) as many,
        temporary_folder("bench") as folder,
    ):
        spec = one.bundle.manifest.spec
        images, _ = canvases((film for _, film in films), spec)

        def bare() -> None:
            for image in images:
                one.backend.infer(image[None])

        def whole(*, overlay: bool) -> None:
            options = PredictOptions(Path(folder), overlay=overlay, workers=workers)
            with contextlib.redirect_stdout(io.StringIO()):
                predict(many, found, partial(load_for, spec), options)

        ways: dict[str, Callable[[], None]] = {
            "bare": bare,
            "overlays": lambda: whole(overlay=True),
            "without_overlays": lambda: whole(overlay=False),
        }
        for way in ways.values():  # finds the caches, once
            way()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in counted(range(turns), turns, "turn"):
            for index in rng.permutation(len(ways)):
                name = list(ways)[index]
                start = time.perf_counter()
                ways[name]()
                seconds[name].append(time.perf_counter() - start)
        described = (one.bundle.manifest.name, one.backend.name, one.backend.device)
    rates = {name: median(len(films) / s for s in taken) for name, taken in seconds.items()}
    over_bare = {
        name: median(b / s for b, s in zip(seconds["bare"], taken, strict=True))
        for name, taken in seconds.items()
    }
    name, backend, where = described
    return FolderRates(
        bundle=name,
        backend=backend,
        device=where,
        threads=threads,
        workers=workers,
        films=len(films),
        turns=turns,
        bare=rates["bare"],
        overlays=rates["overlays"],
        without_overlays=rates["without_overlays"],
        overlays_ratio=over_bare["overlays"],
        without_overlays_ratio=over_bare["without_overlays"],
    )
