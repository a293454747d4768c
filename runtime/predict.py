"""Outcomes written down: files per film, a table, and a line on standard output."""

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

from cxrgaze.command import counted, say, shown
from cxrgaze.errors import UsageError, unforeseen
from cxrgaze.files import render_json, write_atomic
from cxrgaze.films.ahead import Decode, in_order
from cxrgaze.films.find import SUFFIXES, Found
from cxrgaze.runtime import overlay
from cxrgaze.runtime.outcomes import Outcome, outcome_of
from cxrgaze.runtime.reader import Reader
from cxrgaze.runtime.reading import Reading
from cxrgaze.spec import LOG_DENSITY

Heatmap = Literal["npy", "png16"]
Record = dict[str, Any]
"""The JSON of a film."""
TABLE = "readings.csv"
MOST_WORKERS = 4
"""Threads of a run at most: as many films are held in memory."""
_MODEL = ("name", "bundle_sha256", "backend", "device", "plan")
"""What the table says of the network and of what ran it."""
_SUFFIXES = (".json", ".overlay.png", ".heatmap.npy", ".heatmap.png")


@dataclass(frozen=True)
class PredictOptions:
    """What `cxrgaze-predict` was asked for."""

    output: Path | None = None
    """Folder for the files; None writes none."""
    heatmap: Heatmap | None = None
    overlay: bool = True
    """Draw an overlay a film."""
    as_json: bool = False
    """The line on standard output is the film's JSON instead of a summary."""
    force: bool = False
    """Read films that are not applicable."""
    workers: int = 1
    """Threads, each with a film; `Backend.at_once` of them infer at once."""


def predict(reader: Reader, found: Found, decode: Decode, options: PredictOptions) -> list[Record]:
    """Read every film and write its files below `output` and a line to standard output.

    Args:
        found: each film is named by its relative path; what was skipped is listed last.
        decode: makes a film of a path.

    An interrupt leaves the finished films and a table of them.

    Returns:
        The JSON of each file; neither pixels nor maps are kept.

    Raises:
        UsageError: heatmaps of a network without a map; a result that would overwrite a film.
    """
    require_heatmaps(reader, options.heatmap)
    paths = [path for path, _ in found.films]
    names = _output_names([relative for _, relative in found.films])
    if options.output:
        _check_inputs_are_safe(paths, names, options.output)
    done: dict[int, Record] = {}

    def work(index: int) -> Record:
        outcome = outcome_of(reader, paths[index], decode, force=options.force)
        record = outcome.to_json()
        if options.output:
            record = _written(outcome, record, options.output / names[index], options)
        done[index] = record
        return record

    # Each film goes its whole way in one thread: the processors are busy without waiting for each
    # other, and what is held is a film a thread.
    stream = in_order(range(len(paths)), work, workers=options.workers, waiting=options.workers)
    try:
        for record in counted(stream, len(paths), "film"):
            _print(record, options)
            if record["status"] == "failed":
                say(f"failed: {shown(record['reason'])}")
        for number, (path, reason) in enumerate(found.skipped, start=len(paths)):
            done[number] = Outcome(path, "skipped", reason).to_json()
            _print(done[number], options)
    finally:
        stream.close()
        records = [record for _, record in sorted(done.items())]
        if options.output and records:
            write_atomic(options.output / TABLE, _table(records, reader).encode())
    return records


def require_heatmaps(reader: Reader, heatmap: Heatmap | None) -> None:
    """Refuse to write heatmaps of a network without a map.

    Raises:
        UsageError: there is none.
    """
    if heatmap and LOG_DENSITY not in reader.served.heads:
        raise UsageError(
            f"--heatmap {heatmap}: {reader.bundle.manifest.name} gives no map, it has the "
            "diagnosis alone; leave --heatmap out"
        )


def _print(record: Record, options: PredictOptions) -> None:
    print(json.dumps(record) if options.as_json else _summary(record), flush=True)


def _written(outcome: Outcome, record: Record, stem: Path, options: PredictOptions) -> Record:
    """The record once the film's files are written, or that of why they could not be."""
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix in _SUFFIXES:  # of an earlier run: it is not the result of this one
            _with(stem, suffix).unlink(missing_ok=True)
        if outcome.reading and outcome.film:
            if options.overlay:
                overlaid = overlay.png(outcome.reading, outcome.film.pixels)
                write_atomic(_with(stem, ".overlay.png"), overlaid)
            if options.heatmap:
                _write_heatmap(stem, outcome.reading, options.heatmap)
        write_atomic(_with(stem, ".json"), render_json(record))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise  # a full disk concerns every film
        reason = f"its results cannot be written: {error.strerror}"
        return Outcome(outcome.path, "failed", reason).to_json()
    except Exception as error:
        reason = str(unforeseen(str(outcome.path), error))
        return Outcome(outcome.path, "failed", reason).to_json()
    return record


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
    taken: Counter[Path] = Counter()  # where to go on counting: many may be named alike
    for relative, short in zip(relatives, plain, strict=True):
        name = wanted = short if count[short] == 1 else relative
        while name in names:
            taken[wanted] += 1
            name = wanted.with_name(f"{wanted.name}-{taken[wanted] + 1}")
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


def _summary(record: Record) -> str:
    film = shown(record["film"])
    if record["status"] != "read":
        return f"{film}\t{record['status']}\t{shown(record['reason'])}"
    said = [film]
    if record.get("label"):
        said += [record["label"], f"{record['probabilities'][record['label']]:.3f}"]
    elif "flags" in record:
        said.append(_raised(record) or "no flag")
    if "peak_px" in record:
        said.append(f"peak ({record['peak_px']['x']:.0f}, {record['peak_px']['y']:.0f})")
    return "\t".join(said)


def _raised(record: Record) -> str:
    return ", ".join(name for name, raised in record["flags"].items() if raised)


def _table(records: Sequence[Record], reader: Reader) -> str:
    served = reader.served
    has_map = LOG_DENSITY in served.heads
    columns = ["film", "status"]
    columns += ["label"] if served.classes and served.spec.exclusive else []
    columns += [f"p_{name}" for name in served.classes]
    columns += [f"flag_{name}" for name in served.decided]
    columns += ["peak_x_px", "peak_y_px"] if has_map else []
    columns += ["reason", "warnings", *_MODEL, "notice"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for record in records:
        row = {key: record.get(key) for key in ("film", "status", "reason", "notice")}
        if record["status"] == "read":
            row |= {"label": record["label"]} if "label" in columns else {}
            row |= {f"p_{name}": record["probabilities"][name] for name in served.classes}
            row |= {f"flag_{name}": int(record["flags"][name]) for name in served.decided}
            if has_map:
                row |= {"peak_x_px": record["peak_px"]["x"], "peak_y_px": record["peak_px"]["y"]}
            row["warnings"] = " | ".join(record["warnings"])
            row |= {key: record["model"].get(key) for key in _MODEL}
        table.writerow(row)
    return text.getvalue()
