"""A labelled set from a source: a folder of films with a CSV of labels, or a data set's own files.

Tables of labels are read by `cxrgaze.train.label_tables`. The classes of a set are those that were
asked for, or those that its labels name. Films that cannot be read or must not be read are left out
and said so.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cxrgaze.command import counted, say
from cxrgaze.errors import DataError, FilmError
from cxrgaze.evidence.class_presets import Classes, class_named, in_order_of_presets
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
from cxrgaze.films.decode import film_from_bytes, read_file
from cxrgaze.films.film import Film
from cxrgaze.films.find import looks_like_dicom
from cxrgaze.films.stripped import stripped
from cxrgaze.records import complaint
from cxrgaze.spec import ClassKind
from cxrgaze.train.label_tables import OWN, Statement, Table

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
    findings: Statement | None = None
    """What is said of findings, by the source's own names; None of exclusive classes."""


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
    classes: Classes | None = None
    """Those that the source has whatever its labels name; None for those that they name."""
    findings: tuple[str, ...] = ()
    """Names of its findings, where the entries have such."""


@dataclass(frozen=True)
class PrepareOptions:
    """What `cxrgaze-train prepare` was asked for."""

    output: Path
    origin: str
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Label of the source to class; an empty class leaves films unlabelled, or drops a finding."""
    classes: Classes | None = None
    """That the set shall have; None for those of the source or of its labels. Their kind counts
    where the source's labels are of none."""
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


def source_of(films: Path, table: Table, gaze: Path | None = None) -> Source:
    """The source of a folder of films and a table of labels, and gaze of any eye tracker.

    Args:
        gaze: a CSV in the form of `fixations.csv` (`gaze.GAZE_COLUMNS`), its column
            film as the names of the table's films.

    Raises:
        DataError: as `read_gaze`.
    """
    entries = [
        Entry(row.where, row.path, row.file, row.values, findings=row.findings)
        for row in table.rows
    ]
    looked = read_gaze(gaze, {entry.file for entry in entries}) if gaze else {}
    return Source(entries, looked, table.notes, findings=table.findings or ())


def prepare(source: Source, options: PrepareOptions) -> LabelledSet:
    """Make the set; the splits are patient-grouped and stratified by label and view.

    Raises:
        DataError: naming file and row: an unknown label, no patient, a patient in two splits, gaze
            that does not belong to its film.
    """
    classes = _classes(source, options)
    rows, left_out = _rows(source, options, classes)
    if not any(row.split for row in rows):
        rows = list(assign_splits(rows, options.shares, options.seed))
    info = SetInfo(
        name=options.output.name,
        origin=options.origin,
        collection=source.collection or collection_of(options.origin),
        domain="phantom" if options.synthetic else "clinical",
        classes=classes.classes,
        class_kind=classes.kind,
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
    names = labelled.info.class_names
    width = max(map(len, (*names, "unlabelled"))) + 1
    lines = [f"{'split':8}{'class':{width}}{'films':>8}{'patients':>10}"]
    films: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in labelled.rows:
        known = labelled.known(row)
        # Of findings a film may have several, or none of all that are known.
        has = [name for name, there in known.items() if there] or [
            "no class" if known else "unlabelled"
        ]
        for name in has:
            films[row.split or "-", name].append(row.patient)
    for (split, label), patients in sorted(films.items()):
        lines.append(f"{split:8}{label:{width}}{len(patients):8}{len(set(patients)):10}")
    readers = Counter(reader for gaze in labelled.gaze.values() for reader in set(gaze.readers))
    if len(readers) > 8:  # REFLACX has a reader for each reading
        lines.append(f"gaze: {sum(readers.values())} readings of {len(labelled.gaze)} films")
    else:
        lines += [f"gaze of {reader}: {films} films" for reader, films in sorted(readers.items())]
    return "\n".join(lines)


def _classes(source: Source, options: PrepareOptions) -> Classes:
    """The classes of the set.

    Raises:
        DataError: classes of another kind than the labels; exclusive ones of which there is one.
    """
    kind: ClassKind = "findings" if source.findings else "exclusive"
    asked = options.classes or source.classes
    if asked:
        return Classes(asked.classes, kind)
    if source.findings:
        labels = [options.label_map.get(name, name) for name in source.findings]
    else:
        found = {entry.values.get("label", "").strip() for entry in source.entries}
        mapped = {options.label_map.get(label, label) for label in found}
        labels = sorted(mapped, key=str.lower)
    try:
        named = {c.name: c for c in (class_named(label) for label in labels if label)}
    except ValueError as error:
        raise DataError(f"{error}; give --map 'LABEL=CLASS'") from error
    if kind == "exclusive" and len(named) == 1:
        raise DataError(
            f"all labelled films are {labels[-1]!r}: a diagnosis needs two classes or more; give "
            "--classes for all that the network shall know"
        )
    return Classes(in_order_of_presets(named.values()), kind)


def _rows(
    source: Source, options: PrepareOptions, classes: Classes
) -> tuple[list[FilmRow], list[tuple[str, str]]]:
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
        rows.append(_row(entry, film, options, classes))
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


def _label(entry: Entry, options: PrepareOptions, classes: Classes) -> str | None:
    """The film's class of exclusive ones.

    Raises:
        DataError: a label that is none of them.
    """
    label = entry.values.get("label", "").strip()
    label = options.label_map.get(label, label)
    if entry.findings is not None or not label:
        return None
    known = [c.name for c in classes.classes]
    if label in known:
        return label
    with contextlib.suppress(ValueError):
        if (name := class_named(label).name) in known:
            return name
    raise DataError(
        f"{entry.where}: label {label!r} is not one of {known}; give --map '{label}=CLASS', "
        f"--map '{label}=' to leave such films unlabelled, or --classes with all that there are"
    )


def _findings(entry: Entry, options: PrepareOptions, classes: Classes) -> dict[str, bool]:
    """Whether a film has each finding, where that is known; any of several names of it will do."""
    if entry.findings is None:
        return {}
    names: dict[str, list[str]] = {c.name: [] for c in classes.classes}
    for name in dict.fromkeys((*entry.findings.known, *options.label_map)):
        if label := options.label_map.get(name, name):
            names.setdefault(class_named(label).name, []).append(name)
    found = {}
    for one in classes.classes:
        said = [entry.findings.says(name) for name in names[one.name] or [one.display]]
        if any(said) or None not in said:
            found[one.name] = any(said)
    return found


def _row(entry: Entry, film: Film, options: PrepareOptions, classes: Classes) -> FilmRow:
    values: dict[str, Any] = {key: entry.values[key] for key in OWN if entry.values.get(key)}
    values["label"] = _label(entry, options, classes)
    values["findings"] = _findings(entry, options, classes)
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
