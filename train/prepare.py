"""A labelled set from a source: a folder of films with a CSV of labels, or a data set's own files.

The CSV has a column `file` (path below the folder of films) and any of `patient`, `label`, `view`,
`age`, `sex`, `split`; other columns are left alone. Films that cannot be read or must not be read
are left out and said so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cxrgaze.command import counted, say
from cxrgaze.errors import DataError, FilmError
from cxrgaze.evidence.csv_table import csv_rows
from cxrgaze.evidence.gaze import Gaze, read_gaze
from cxrgaze.evidence.labelled_set import (
    FilmRow,
    LabelledSet,
    SetInfo,
    Split,
    assign_splits,
    collection_of,
    write_set,
)
from cxrgaze.files import checked_relative
from cxrgaze.films.decode import film_from_bytes, read_file
from cxrgaze.films.film import Film
from cxrgaze.films.find import looks_like_dicom
from cxrgaze.films.stripped import stripped
from cxrgaze.records import complaint
from cxrgaze.train.classes import CLASSES

_COLUMNS = ("patient", "label", "view", "age", "sex", "split")

Check = Callable[[Film], str | None]


@dataclass(frozen=True)
class Entry:
    """One film of a source."""

    where: str
    """File and row that it comes from, for messages."""
    path: Path
    """The film's file."""
    file: str
    """Its name in the set, below `films/`."""
    values: Mapping[str, str]
    """Cells of `films.csv` by column, as text; empty where unknown."""
    checks: list[Check] = field(default_factory=list)
    """Each says what is wrong with the film, or None."""


@dataclass(frozen=True)
class Source:
    """Films, their labels and their gaze, before they are checked."""

    entries: list[Entry]
    gaze: Mapping[str, Gaze] = field(default_factory=dict)
    """By `Entry.file`."""
    notes: tuple[str, ...] = ()
    """What was dropped on the way."""
    collection: str = ""
    """As `SetInfo.collection`; "" takes it from the words of the origin."""


@dataclass(frozen=True)
class PrepareOptions:
    """What `cxrgaze-train prepare` was asked for."""

    output: Path
    origin: str
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Label of the source to class; an empty class leaves the film unlabelled."""
    shares: Mapping[Split, float] = field(
        default_factory=lambda: {"train": 0.7, "val": 0.1, "test": 0.2}
    )
    """Shares of the split where the source has none."""
    seed: int = 0
    patient_per_film: bool = False
    """Treat every film as a patient of its own where the source has no patients."""
    synthetic: bool = False
    """The films are drawings; every figure of the set will say so."""
    strip: bool = False
    """Keep of DICOM films only what their pixels need (`cxrgaze.films.stripped`)."""


def read_table(films: Path, labels: Path, gaze: Path | None = None) -> Source:
    """The source of a folder of films and a CSV of labels, and gaze of any eye tracker.

    Args:
        gaze: a CSV in the form of `fixations.csv` (`gaze.GAZE_COLUMNS`), its column
            film as the labels' column file.

    Raises:
        DataError: naming the row: a film that is not there or lies outside the folder.
    """
    entries = []
    for number, cells in csv_rows(labels, ["file"], None):
        where = f"{labels}, row {number}"
        try:
            path = films / checked_relative(cells["file"])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if not path.is_file():
            raise DataError(f"{where}: {path} does not exist")
        entries.append(Entry(where, path, cells["file"], cells))
    return Source(entries, read_gaze(gaze, {entry.file for entry in entries}) if gaze else {})


def prepare(source: Source, options: PrepareOptions) -> LabelledSet:
    """Make the set; the splits are patient-grouped and stratified by label and view.

    Raises:
        DataError: naming file and row: an unknown label, no patient, a patient in two splits, gaze
            that does not belong to its film.
    """
    rows, left_out = _rows(source, options)
    if not any(row.split for row in rows):
        rows = list(assign_splits(rows, options.shares, options.seed))
    info = SetInfo(
        name=options.output.name,
        origin=options.origin,
        collection=source.collection or collection_of(options.origin),
        domain="phantom" if options.synthetic else "clinical",
        classes=tuple(c.name for c in CLASSES),
    )
    used = {row.film for row in rows}
    paths = {_name(entry): entry.path for entry in source.entries}
    gaze = {
        _name(entry): source.gaze[entry.file]
        for entry in source.entries
        if entry.file in source.gaze and _name(entry) in used
    }
    originals = ((row.film, _content(paths[row.film], options)) for row in rows)
    labelled = write_set(options.output, info, rows, gaze, originals)
    for note in source.notes:
        say(note)
    if not options.strip and (count := sum(_has_header(paths[row.film]) for row in rows)):
        say(
            f"{count} films are DICOM files, copied with the patient data in their headers: keep "
            "the set where such data may be, or prepare it with --strip"
        )
    for name, reason in left_out:
        say(f"left out: {name}: {reason}")
    return labelled


def find_mimic_film(films: Path, path: str, where: str) -> Path:
    """The MIMIC-CXR film of a published path, with or without `files/`, as DICOM, JPG or PNG.

    Raises:
        DataError: it is not there; `where` names the row.
    """
    relative = Path(path.strip().lstrip("/"))
    shorter = Path(*relative.parts[1:]) if relative.parts[:1] == ("files",) else relative
    if ".." in relative.parts:
        raise DataError(f"{where}: the film's path leaves its folder")
    for candidate in (relative, shorter):
        for suffix in (relative.suffix, ".jpg", ".png", ".dcm"):
            if (films / candidate.with_suffix(suffix)).is_file():
                return films / candidate.with_suffix(suffix)
    raise DataError(f"{where}: {films / relative} does not exist, nor as .jpg or .png")


def summary(labelled: LabelledSet) -> str:
    """Films and patients per split and class, films per reader, a line each."""
    lines = [f"{'split':8}{'class':16}{'films':>8}{'patients':>10}"]
    counts = Counter((row.split or "-", row.label or "unlabelled") for row in labelled.rows)
    for (split, label), films in sorted(counts.items()):
        patients = {
            row.patient
            for row in labelled.rows
            if (row.split or "-", row.label or "unlabelled") == (split, label)
        }
        lines.append(f"{split:8}{label:16}{films:8}{len(patients):10}")
    readers = Counter(reader for gaze in labelled.gaze.values() for reader in set(gaze.readers))
    if len(readers) > 8:  # REFLACX has a reader for each reading
        lines.append(f"gaze: {sum(readers.values())} readings of {len(labelled.gaze)} films")
    else:
        lines += [f"gaze of {reader}: {films} films" for reader, films in sorted(readers.items())]
    return "\n".join(lines)


def _rows(source: Source, options: PrepareOptions) -> tuple[list[FilmRow], list[tuple[str, str]]]:
    rows, left_out = [], []
    for entry in counted(source.entries, len(source.entries), "film"):
        try:
            film = film_from_bytes(_content(entry.path, options), str(entry.path))
        except FilmError as error:
            left_out.append((entry.file, str(error)))
            continue
        if film.reasons:
            left_out.append((entry.file, "; ".join(film.reasons)))
            continue
        for check in entry.checks:
            if wrong := check(film):
                raise DataError(f"{entry.where}: {wrong}")
        rows.append(_row(entry, film, options))
    if not rows:
        raise DataError(f"no film could be used; {len(left_out)} were left out")
    return rows, left_out


def _content(path: Path, options: PrepareOptions) -> bytes:
    """The bytes that the set will have of a film."""
    data = read_file(path)
    return stripped(data, str(path)) if options.strip and looks_like_dicom(data) else data


def _has_header(path: Path) -> bool:
    with path.open("rb") as file:
        return looks_like_dicom(file.read(132))


def _row(entry: Entry, film: Film, options: PrepareOptions) -> FilmRow:
    label = entry.values.get("label", "")
    label = options.label_map.get(label, label)
    classes = [c.name for c in CLASSES]
    if label and label not in classes:
        raise DataError(
            f"{entry.where}: label {label!r} is not one of {classes}; give --map '{label}=CLASS', "
            f"or --map '{label}=' to leave such films unlabelled"
        )
    values: dict[str, Any] = {key: entry.values[key] for key in _COLUMNS if entry.values.get(key)}
    values["label"] = label or None
    if options.patient_per_film:
        values.setdefault("patient", entry.file)
    if film.spacing_mm and film.spacing_mm[0] == film.spacing_mm[1]:
        values["spacing"] = film.spacing_mm[0]
    values |= {
        "film": _name(entry),
        "sha256": film.sha256,
        "pixel_source": film.pixel_source,
    }
    try:
        return FilmRow.model_validate(values)
    except ValidationError as error:
        hint = (
            "; --patient-per-film if every film is of another patient"
            if "patient" not in values
            else ""
        )
        raise DataError(f"{entry.where}: {complaint(error)}{hint}") from error


def _name(entry: Entry) -> str:
    return f"films/{entry.file}"
