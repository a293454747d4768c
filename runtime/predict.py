"""Many films, one reader: files per film, a table, and errors that stop nothing else."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from cxrgaze.command import counted, say
from cxrgaze.errors import FilmError, NotApplicableError, UsageError
from cxrgaze.files import render_json, write_atomic
from cxrgaze.runtime import overlay
from cxrgaze.runtime.film import SUFFIXES, Film
from cxrgaze.runtime.isolate import Decode, decode_ahead
from cxrgaze.runtime.reader import Reader
from cxrgaze.runtime.reading import Reading
from cxrgaze.spec import NOTICE

Heatmap = Literal["npy", "png16"]
TABLE = "readings.csv"
_SUFFIXES = (".json", ".overlay.png", ".heatmap.npy", ".heatmap.png")


@dataclass(frozen=True)
class Outcome:
    """What became of one film."""

    status: Literal["read", "not_applicable", "failed"]
    record: dict[str, Any]
    """The JSON of the film."""


@dataclass(frozen=True)
class Options:
    """What `cxrgaze-predict` was asked for."""

    output: Path | None = None
    """Folder for the files; None writes none."""
    heatmap: Heatmap | None = None
    as_json: bool = False
    """The line on standard output is the film's JSON instead of a summary."""
    force: bool = False
    """Read films that are not applicable."""


def predict(
    reader: Reader, films: Sequence[tuple[Path, Path]], decode: Decode, options: Options
) -> list[Outcome]:
    """Read every film and write its files below `output` and a line to standard output.

    Args:
        films: path and the relative path that its output is named by (`find_films`).
        decode: makes a film of a path; it runs ahead of inference in a thread of its own.

    An interrupt leaves the finished films and a table of them.
    """
    outcomes: list[Outcome] = []
    names = _output_names([relative for _, relative in films])
    output = options.output
    paths = [path for path, _ in films]
    if output:
        _check_inputs_are_safe(paths, names, output)
    decoded = decode_ahead(paths, decode)
    try:
        rows = zip(paths, names, decoded, strict=True)
        for path, name, film in counted(rows, len(films), "film"):
            outcome = _one(reader, path, film, output / name if output else None, options)
            outcomes.append(outcome)
            line = json.dumps(outcome.record) if options.as_json else _summary(outcome)
            print(line, flush=True)
            if outcome.status == "failed":
                say(f"failed: {outcome.record['reason']}")
    finally:
        decoded.close()
        if output and outcomes:
            write_atomic(output / TABLE, _table(outcomes, reader).encode())
    return outcomes


def _one(
    reader: Reader, path: Path, film: Film | FilmError, stem: Path | None, options: Options
) -> Outcome:
    try:
        if isinstance(film, FilmError):
            raise film
        reading = reader.read(film, force=options.force)
    except NotApplicableError as error:
        outcome = _unread(path, "not_applicable", "; ".join(error.reasons))
    except FilmError as error:
        outcome = _unread(path, "failed", str(error))
    else:
        outcome = Outcome("read", {**reading.to_json(), "film": _printable(path)})
    if not stem:
        return outcome
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        if outcome.status == "read" and isinstance(film, Film):
            write_atomic(_with(stem, ".overlay.png"), overlay.png(reading, film.pixels))
            if options.heatmap:
                _write_heatmap(stem, reading, options.heatmap)
        write_atomic(_with(stem, ".json"), render_json(outcome.record))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise  # a full disk concerns every film
        return _unread(path, "failed", f"its results cannot be written: {error.strerror}")
    return outcome


def _unread(path: Path, status: Literal["not_applicable", "failed"], reason: str) -> Outcome:
    record = {"film": _printable(path), "status": status, "reason": _printable(reason)}
    record["notice"] = NOTICE
    return Outcome(status, record)


def _printable(text: Path | str) -> str:
    """Text that can be encoded: bytes of a file name that are no UTF-8 become escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _write_heatmap(stem: Path, reading: Reading, kind: Heatmap) -> None:
    density = reading.heatmap()
    if kind == "npy":
        buffer = io.BytesIO()
        np.save(buffer, density)
        write_atomic(_with(stem, ".heatmap.npy"), buffer.getvalue())
    else:
        levels = np.rint(density / density.max() * 65535).astype(np.uint16)
        write_atomic(_with(stem, ".heatmap.png"), cv2.imencode(".png", levels)[1].tobytes())


def _output_names(relatives: Sequence[Path]) -> list[Path]:
    """One name a film, without its format's suffix; where two clash, with it, then a number."""
    plain = [r.with_suffix("") if r.suffix.lower() in SUFFIXES else r for r in relatives]
    count = Counter(plain)
    names: dict[Path, None] = {}
    for relative, short in zip(relatives, plain, strict=True):
        wanted = short if count[short] == 1 else relative
        name, number = wanted, 2
        while name in names:
            name, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
        names[name] = None
    return list(names)


def _check_inputs_are_safe(paths: Sequence[Path], names: Sequence[Path], output: Path) -> None:
    """Refuse to write over a film that is to be read."""
    inputs = {os.path.realpath(path) for path in paths}
    written = [output / TABLE, *(_with(output / n, s) for n in names for s in _SUFFIXES)]
    for file in written:
        if os.path.realpath(file) in inputs:
            raise UsageError(f"{file} is one of the films; choose an --output elsewhere")


def _with(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _summary(outcome: Outcome) -> str:
    record = outcome.record
    if outcome.status != "read":
        return f"{record['film']}\t{outcome.status}\t{record['reason']}"
    peak = record["peak_px"]
    return (
        f"{record['film']}\t{record['label']}\t{record['probabilities'][record['label']]:.3f}\t"
        f"peak ({peak['x']:.0f}, {peak['y']:.0f})"
    )


def _table(outcomes: Sequence[Outcome], reader: Reader) -> str:
    classes = reader.bundle.manifest.spec.class_names
    probabilities = [f"p_{name}" for name in classes]
    text = io.StringIO()
    columns = ["film", "status", "label", *probabilities, "peak_x_px", "peak_y_px", "reason"]
    table = csv.DictWriter(text, [*columns, "warnings", "notice"], lineterminator="\n")
    table.writeheader()
    for outcome in outcomes:
        record = outcome.record
        row = {key: record.get(key) for key in ("film", "status", "label", "reason", "notice")}
        if outcome.status == "read":
            row |= {f"p_{name}": record["probabilities"][name] for name in classes}
            row |= {"peak_x_px": record["peak_px"]["x"], "peak_y_px": record["peak_px"]["y"]}
            row["warnings"] = " | ".join(record["warnings"])
        table.writerow(row)
    return text.getvalue()
