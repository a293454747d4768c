"""The labelled set: one folder format for training, calibration, gate, evaluation and bench.

    SET/set.json        schema version, name, origin, domain, classes, SHA-256 of the split
    SET/films.csv       one row a film; the split column is the only home of the split; where the
                        classes are findings, a column finding_NAME each: 1, 0, empty if unknown
    SET/fixations.csv   one row a gaze sample or fixation, in pixels of the source film
    SET/...             the films, where films.csv says

Films without a label or without gaze are legal. Converters write this format; nothing else is read.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from cxrgaze.command import say
from cxrgaze.environment import now_utc
from cxrgaze.errors import DataError, IntegrityError
from cxrgaze.evidence.class_presets import class_named
from cxrgaze.evidence.csv_table import csv_rows, write_csv
from cxrgaze.evidence.gaze import GAZE_COLUMNS, GAZE_OPTIONAL, Gaze, gaze_records, read_gaze
from cxrgaze.files import (
    checked_relative,
    new_folder,
    read_regular,
    render_json,
    sha256,
)
from cxrgaze.records import Frozen, Record, complaint, parse_record
from cxrgaze.spec import ClassKind, DiseaseClass, Domain, PixelSource, require_distinct

MARKER = "set.json"


LOOKS = "looks.jsonl"
"""Log of the looks at the test split, kept when a set is made again."""


FILM_LIMIT = 1 << 30  # bytes of one film file


Split = Literal["train", "val", "test"]


SPLITS: tuple[Split, ...] = ("train", "val", "test")


def with_collection(content: Any, key: str) -> Any:
    """A record's content with its `collection`, where it says it in the words of `key` alone."""
    if isinstance(content, dict) and "collection" not in content:
        return {**content, "collection": collection_of(str(content.get(key, "")))}
    return content


def collection_of(words: str) -> str:
    """The collection that a person names in words, "" where it is none that is known.

    EGD-CXR and REFLACX are gaze on films of MIMIC-CXR.
    """
    return "mimic-cxr" if _MIMIC.search(words) else ""


_MIMIC = re.compile(r"\b(mimic|egd|reflacx)", re.IGNORECASE)


def split_named(name: str) -> Split | None:
    """The split of that name, None for "all"."""
    return next((split for split in SPLITS if split == name), None)


class SetInfo(Record):
    """What `set.json` holds."""

    VERSION = 1
    WHAT = "labelled set"
    REMEDY = "make the set again with this version"

    schema_version: int = VERSION
    name: str
    origin: str
    """Where films and gaze came from, in a sentence."""
    collection: str = ""
    """The public collection that the films are of, such as `mimic-cxr`; "" for none that is known.

    Films of one collection may stand in several sets: leakage is judged by it.
    """
    domain: Domain
    classes: tuple[DiseaseClass, ...]
    """What films are labelled with; none where no film has a label."""
    class_kind: ClassKind = "exclusive"
    """One of the classes (column `label`), or findings of which a film may have any."""
    split_sha256: str = ""
    """SHA-256 over film, patient and split of every row, see `split_hash`."""

    @model_validator(mode="before")
    @classmethod
    def _older_sets_say_it_in_words(cls, content: Any) -> Any:
        return with_collection(content, "origin")

    @field_validator("classes", mode="before")
    @classmethod
    def _older_sets_have_names_alone(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [class_named(one) if isinstance(one, str) else one for one in value]
        return value

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> SetInfo:
        require_distinct(self.classes, self.class_kind)
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(c.name for c in self.classes)


class FilmRow(Frozen):
    """One row of `films.csv`."""

    film: str
    """Path relative to the set's folder, with forward slashes."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    patient: str = Field(min_length=1)
    """Pseudonym; rows of one patient never cross splits."""
    label: str | None = None
    """The film's class; None where it is not known, or the classes are findings."""
    findings: dict[str, bool] = {}
    """Whether the film has a finding, by name, where that is known."""
    view: str | None = None
    """DICOM ViewPosition: PA, AP, LL, ..."""
    age: float | None = Field(default=None, ge=0, le=130)
    sex: Literal["F", "M", "O"] | None = None
    spacing: float | None = Field(default=None, gt=0)
    """Millimetres per pixel where both axes agree."""
    pixel_source: PixelSource
    redistributable: bool = False
    split: Split | None = None

    @field_validator("film")
    @classmethod
    def _film_stays_inside(cls, value: str) -> str:
        return str(checked_relative(value))


FILM_COLUMNS = tuple(name for name in FilmRow.model_fields if name != "findings")
_FINDING = "finding_"
_CELLS = {"1": True, "0": False}


@dataclass(frozen=True)
class LabelledSet:
    """A labelled set; `open` checks it, `write` makes one."""

    folder: Path
    info: SetInfo
    rows: tuple[FilmRow, ...]
    gaze: Mapping[str, Gaze] = field(default_factory=dict)
    """Gaze by film; films without gaze have no entry."""

    @classmethod
    def open(cls, folder: Path | str) -> LabelledSet:
        """Read and check the tables; films are checked when they are read (`film_bytes`).

        Raises:
            DataError: naming the file and the row that breaks a rule.
        """
        folder = Path(folder)
        if not (folder / MARKER).is_file():
            raise DataError(f"{folder} is not a labelled set: it has no {MARKER}")
        try:
            data = (folder / MARKER).read_bytes()
            info = parse_record(SetInfo, data, str(folder / MARKER))
        except IntegrityError as error:
            raise DataError(str(error)) from error
        rows = _read_films(folder / "films.csv", info)
        missing = [row.film for row in rows if not (folder / row.film).is_file()]
        if missing:
            raise DataError(
                f"{folder / 'films.csv'}: {len(missing)} films are missing, first {missing[0]}"
            )
        check_split(rows)
        if info.split_sha256 != split_hash(rows):
            raise DataError(
                f"{folder}: the split column does not match split_sha256 in {MARKER}: the split "
                "was changed after the set was made; make the set again"
            )
        path = folder / "fixations.csv"
        gaze = read_gaze(path, {row.film for row in rows}) if path.is_file() else {}
        return cls(folder, info, rows, gaze)

    def split(self, name: Split | None) -> LabelledSet:
        """The rows of one split; all for None."""
        if name is None:
            return self
        rows = tuple(row for row in self.rows if row.split == name)
        return LabelledSet(self.folder, self.info, rows, self.gaze)

    def known(self, row: FilmRow) -> dict[str, bool]:
        """Whether a film has a class, by name, where that is known."""
        if self.info.class_kind == "findings":
            return row.findings
        if row.label is None:
            return {}
        return {name: name == row.label for name in self.info.class_names}

    def film_bytes(self, row: FilmRow) -> bytes:
        """Bytes of a film, verified against its SHA-256.

        Raises:
            DataError: the film is not the one that was entered.
        """
        data = read_regular(self.folder / row.film, FILM_LIMIT)
        if sha256(data) != row.sha256:
            raise DataError(f"{self.folder / row.film}: SHA-256 differs from films.csv")
        return data


class Look(Frozen):
    """One look at a set's test split."""

    number: int | None
    """Its place in the set's log; None where it was not logged."""
    logged: bool


def log_look(labelled: LabelledSet, model: str, model_sha256: str, what: str) -> Look:
    """Add a look at the test split to the log in the set's folder.

    Args:
        model: name of the network. what: it was looked at for.
    """
    line = {
        "utc": now_utc(),
        "what": what,
        "model": model,
        "model_sha256": model_sha256,
        "split_sha256": labelled.info.split_sha256,
    }
    path = labelled.folder / LOOKS
    try:
        with path.open("ab") as file:
            file.write(render_json(line).replace(b"\n", b" ").strip() + b"\n")
    except OSError as error:
        say(f"this look at the test split is not logged: {path}: {error.strerror}")
        return Look(number=None, logged=False)
    return Look(number=len(path.read_bytes().splitlines()), logged=True)


def write_set(
    folder: Path,
    info: SetInfo,
    rows: Sequence[FilmRow],
    gaze: Mapping[str, Gaze],
    films: Iterable[tuple[str, bytes]],
) -> LabelledSet:
    """Write a labelled set whole or not at all, and open it.

    Args:
        films: path in the set and bytes of each film; taken one by one.

    Raises:
        DataError: a rule is broken. UsageError: `folder` is something else.
    """
    check_split(rows)
    for row in rows:
        _require_known(row, info, row.film)
    info = info.model_copy(update={"split_sha256": split_hash(rows)})
    with new_folder(folder, MARKER) as new:
        for name, data in films:
            (new / checked_relative(name)).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(data)
        findings = _finding_columns(info)
        write_csv(new / "films.csv", (*FILM_COLUMNS, *findings), map(_cells, rows))
        columns = (*GAZE_COLUMNS, *GAZE_OPTIONAL)
        write_csv(new / "fixations.csv", columns, gaze_records(gaze))
        (new / MARKER).write_bytes(info.rendered())
        if (folder / LOOKS).is_file():
            (new / LOOKS).write_bytes((folder / LOOKS).read_bytes())
        written = LabelledSet.open(new)
    return replace(written, folder=folder)


def split_hash(rows: Sequence[FilmRow]) -> str:
    """SHA-256 over the sorted lines film, patient, split (tab-separated)."""
    lines = sorted(f"{row.film}\t{row.patient}\t{row.split or ''}\n" for row in rows)
    return sha256("".join(lines).encode())


def check_split(rows: Sequence[FilmRow]) -> None:
    """Refuse a patient on two sides.

    Raises:
        DataError: with the list of patients.
    """
    sides = defaultdict(set)
    for row in rows:
        if row.split:
            sides[row.patient].add(row.split)
    crossing = sorted(patient for patient, splits in sides.items() if len(splits) > 1)
    if crossing:
        listed = ", ".join(crossing[:20]) + (" ..." if len(crossing) > 20 else "")
        raise DataError(f"{len(crossing)} patients are in more than one split: {listed}")


def assign_splits(
    rows: Sequence[FilmRow], shares: Mapping[Split, float], seed: int
) -> tuple[FilmRow, ...]:
    """Deal patients to splits: grouped by patient, stratified by label and view.

    A patient's stratum is that of the patient's first film; of findings the one that the fewest
    films have of those that the patient has. Within a stratum, patients are shuffled
    by `seed` and each goes to the split that is furthest below its share of films so far.

    Raises:
        DataError: shares that are not positive.
    """
    if not shares or min(shares.values()) <= 0:
        raise DataError(f"split shares must be positive, found {dict(shares)}")
    films: dict[str, list[FilmRow]] = defaultdict(list)
    for row in rows:
        films[row.patient].append(row)
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    common = Counter(name for row in rows for name, has in row.findings.items() if has)
    for patient in sorted(films):
        first = films[patient][0]
        has = {name for row in films[patient] for name, there in row.findings.items() if there}
        rarest = min(has, key=lambda name: (common[name], name), default="")
        strata[first.label or rarest, first.view or ""].append(patient)
    rng = np.random.default_rng(seed)
    total = sum(shares.values())
    count = dict.fromkeys(shares, 0.0)
    assigned: dict[str, Split] = {}
    for stratum in sorted(strata):
        for index in rng.permutation(len(strata[stratum])):
            patient = strata[stratum][index]
            dealt = sum(count.values()) + len(films[patient])
            split = max(shares, key=lambda s: shares[s] / total * dealt - count[s])
            assigned[patient] = split
            count[split] += len(films[patient])
    return tuple(row.model_copy(update={"split": assigned[row.patient]}) for row in rows)


def _finding_columns(info: SetInfo) -> dict[str, str]:
    """Columns of `films.csv` of the findings, and their names."""
    names = info.class_names if info.class_kind == "findings" else ()
    return {f"{_FINDING}{name}": name for name in names}


def _require_known(row: FilmRow, info: SetInfo, where: str) -> None:
    """Refuse a label or a finding that the set does not have.

    Raises:
        DataError: naming both.
    """
    names, is_findings = info.class_names, info.class_kind == "findings"
    if row.label is not None and is_findings:
        raise DataError(f"{where}: label {row.label!r}, but films of this set have findings")
    if row.label is not None and row.label not in names:
        raise DataError(f"{where}: label {row.label!r} is not one of {names}")
    known = names if is_findings else ()
    if foreign := sorted(set(row.findings) - set(known)):
        raise DataError(f"{where}: finding {foreign[0]!r} is not one of {known}")


def _cells(row: FilmRow) -> dict[str, Any]:
    """A row of `films.csv`."""
    findings = {f"{_FINDING}{name}": int(has) for name, has in row.findings.items()}
    return {**row.model_dump(exclude={"findings"}), **findings}


def _read_films(path: Path, info: SetInfo) -> tuple[FilmRow, ...]:
    rows: dict[str, FilmRow] = {}
    columns = _finding_columns(info)
    for number, cells in csv_rows(path, (*FILM_COLUMNS, *columns), ()):
        findings = {name: cells.pop(column) for column, name in columns.items()}
        if wrong := [n for n, cell in findings.items() if cell and cell not in _CELLS]:
            raise DataError(f"{path}, row {number}: finding {wrong[0]}: expected 1, 0 or nothing")
        values: dict[str, Any] = {k: v for k, v in cells.items() if v != ""}
        values["findings"] = {n: _CELLS[cell] for n, cell in findings.items() if cell}
        try:
            row = FilmRow.model_validate(values)
        except ValidationError as error:
            raise DataError(f"{path}, row {number}: {complaint(error)}") from error
        _require_known(row, info, f"{path}, row {number}")
        if row.film in rows:
            raise DataError(f"{path}, row {number}: {row.film} is listed twice")
        rows[row.film] = row
    if not rows:
        raise DataError(f"{path}: no films")
    return tuple(rows.values())
