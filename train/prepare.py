"""A labelled set from a folder of films and a CSV of labels.

The CSV has a column `file` (path below the folder of films) and any of `patient`, `label`, `view`,
`age`, `sex`, `split`; other columns are left alone. Films that cannot be read or must not be read
are left out and said so. Gaze comes with converters of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cxrgaze.command import counted, say
from cxrgaze.errors import DataError, FilmError
from cxrgaze.files import checked_relative
from cxrgaze.runtime.film import Film, load_film
from cxrgaze.samples import (
    FilmRow,
    LabelledSet,
    SetInfo,
    Split,
    assign_splits,
    csv_rows,
    write_set,
)
from cxrgaze.spec import CLASSES, complaint

_COLUMNS = ("patient", "label", "view", "age", "sex", "split")


@dataclass(frozen=True)
class Options:
    """What `cxrgaze-train prepare` was asked for."""

    films: Path
    labels: Path
    output: Path
    origin: str
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Label in the CSV to class; an empty class leaves the film unlabelled."""
    shares: Mapping[Split, float] = field(
        default_factory=lambda: {"train": 0.7, "val": 0.1, "test": 0.2}
    )
    """Shares of the split where the CSV has none."""
    seed: int = 0
    patient_per_film: bool = False
    """Treat every film as a patient of its own where the CSV has no patients."""


def prepare(options: Options) -> LabelledSet:
    """Make the set; the splits are patient-grouped and stratified by label and view.

    Raises:
        DataError: naming file and row: a missing film, an unknown label, no patients, a patient in
            two splits.
    """
    rows, left_out = _rows(options)
    if not any(row.split for row in rows):
        rows = list(assign_splits(rows, options.shares, options.seed))
    info = SetInfo(
        name=options.output.name,
        origin=options.origin,
        domain="clinical",
        classes=tuple(c.name for c in CLASSES),
    )
    originals = ((row.film, (options.films / _original(row)).read_bytes()) for row in rows)
    made = write_set(options.output, info, rows, {}, originals)
    for name, reason in left_out:
        say(f"left out: {name}: {reason}")
    return made


def summary(labelled: LabelledSet) -> str:
    """Films and patients per split and class, a line each."""
    lines = [f"{'split':8}{'class':16}{'films':>8}{'patients':>10}"]
    counts = Counter((row.split or "-", row.label or "unlabelled") for row in labelled.rows)
    for (split, label), films in sorted(counts.items()):
        patients = {
            row.patient
            for row in labelled.rows
            if (row.split or "-", row.label or "unlabelled") == (split, label)
        }
        lines.append(f"{split:8}{label:16}{films:8}{len(patients):10}")
    return "\n".join(lines)


def _rows(options: Options) -> tuple[list[FilmRow], list[tuple[str, str]]]:
    table = list(csv_rows(options.labels, ["file"], None))
    rows, left_out = [], []
    for number, cells in counted(table, len(table), "film"):
        where = f"{options.labels}, row {number}"
        try:
            path = options.films / checked_relative(cells["file"])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if not path.is_file():
            raise DataError(f"{where}: {path} does not exist")
        try:
            film = load_film(path)
        except FilmError as error:
            left_out.append((cells["file"], str(error)))
            continue
        if film.reasons:
            left_out.append((cells["file"], "; ".join(film.reasons)))
            continue
        rows.append(_row(cells, film, options, where))
    if not rows:
        raise DataError(f"{options.labels}: no film could be used; {len(left_out)} were left out")
    return rows, left_out


def _row(cells: Mapping[str, str], film: Film, options: Options, where: str) -> FilmRow:
    label = cells.get("label", "")
    label = options.label_map.get(label, label)
    known = [c.name for c in CLASSES]
    if label and label not in known:
        raise DataError(
            f"{where}: label {label!r} is not one of {known}; give --map '{label}=CLASS', or "
            f"--map '{label}=' to leave such films unlabelled"
        )
    values: dict[str, Any] = {key: cells[key] for key in _COLUMNS if cells.get(key)}
    values["label"] = label or None
    if options.patient_per_film:
        values.setdefault("patient", cells["file"])
    if film.spacing_mm and film.spacing_mm[0] == film.spacing_mm[1]:
        values["spacing"] = film.spacing_mm[0]
    try:
        return FilmRow.model_validate(
            {
                **values,
                "film": f"films/{cells['file']}",
                "sha256": film.sha256,
                "pixel_source": film.pixel_source,
            }
        )
    except ValidationError as error:
        hint = "; --patient-per-film if every film is of another patient" * (
            "patient" not in values
        )
        raise DataError(f"{where}: {complaint(error)}{hint}") from error


def _original(row: FilmRow) -> str:
    return row.film.removeprefix("films/")
