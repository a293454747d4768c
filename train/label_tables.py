"""Tables of labels: what each row says of a film, in our own style and in those that are published.

own                own columns; one class in `label`; findings as `A|B` there, or in columns
NIH ChestX-ray14   film in `Image Index`, findings in `Finding Labels` as `A|B`, all others absent
CheXpert           film in `Path`, a column a finding: 1, 0, -1 (uncertain), empty (not mentioned)
VinDr-CXR          film in `image_id`, a row a reader: a column a finding, or one in `class_name`

Sources and rules: docs/training.md#classes-and-findings.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cxrgaze.errors import DataError
from cxrgaze.evidence.csv_table import csv_header, csv_rows
from cxrgaze.files import checked_relative

Policy = Literal["unknown", "present", "absent"]
Cells = Mapping[str, str]


@dataclass(frozen=True)
class FindingOptions:
    """How findings are read."""

    wanted: Callable[[str], bool] | None = None
    """Whether a column is a finding that is wanted; None: all whose cells look like findings."""
    uncertain: Policy = "unknown"
    """What -1 says (the U-Ignore, U-Ones and U-Zeroes of arXiv 1901.07031)."""
    blank: Literal["unknown", "absent"] = "unknown"
    """What an empty cell of a finding's column says."""


@dataclass(frozen=True)
class Statement:
    """Whether a film has a finding, by the table's own name of it."""

    known: Mapping[str, bool | None] = field(default_factory=dict)
    """None where its readers are divided."""
    others_absent: bool = False
    """Whether what is not in `known` is known to be absent."""

    def says(self, name: str) -> bool | None:
        """True, False, or None where it is not known."""
        return self.known.get(name, False if self.others_absent else None)


@dataclass(frozen=True)
class TableRow:
    """A film of a table."""

    where: str
    """File and row, for messages."""
    path: Path
    file: str
    """Its name below the folder of films."""
    values: Cells
    """By our own columns, as text; empty where unknown."""
    findings: Statement | None = None
    """None in a table of exclusive classes, where `values` has the label."""


@dataclass(frozen=True)
class Table:
    """What was read."""

    rows: list[TableRow]
    findings: tuple[str, ...] | None
    """Names of the findings, in the table's order; None in a table of exclusive classes."""
    notes: tuple[str, ...]
    """What was read as what, and what was dropped on the way."""


@dataclass(frozen=True)
class _Style:
    name: str
    film: str
    """Its column of films."""
    ours: Mapping[str, str] = field(default_factory=dict)
    """Our columns by its own."""
    findings: str = ""
    """Its column of findings as `A|B`."""


OWN = ("patient", "label", "view", "age", "sex", "split")
_STYLES = (
    _Style("own style", "file", {name: name for name in OWN}, "label"),
    _Style(
        "NIH ChestX-ray14",
        "Image Index",
        {
            "Patient ID": "patient",
            "View Position": "view",
            "Patient Age": "age",
            "Patient Gender": "sex",
            "Patient Sex": "sex",
        },
        "Finding Labels",
    ),
    _Style("CheXpert", "Path", {"AP/PA": "view", "Age": "age", "Sex": "sex"}),
    _Style("VinDr-CXR", "image_id"),
)
_CLASS, _READERS, _PLANE = "class_name", ("rad_id", "rad_ID"), "Frontal/Lateral"
_TRUE, _FALSE, _UNCERTAIN = ("1", "1.0"), ("0", "0.0"), ("-1", "-1.0")
_OLDEST = 130


def is_published(labels: Path) -> bool:
    """Whether a table is in a published style, whose labels are findings."""
    return _style(labels).film != "file"


def read_exclusive(films: Path, labels: Path) -> Table:
    """The films of a table of our own, each of one class or of none that is known.

    Raises:
        DataError: naming the row: a film that is not there or lies outside the folder, several
            labels in one cell.
    """
    rows = []
    for number, cells in csv_rows(labels, ["file"], None):
        where = f"{labels}, row {number}"
        if "|" in cells.get("label", ""):
            raise DataError(
                f"{where}: {cells['label']!r} are several labels; give --findings if the labels do "
                "not exclude each other"
            )
        path, file = _exactly(films, cells["file"], where)
        rows.append(TableRow(where, path, file, cells))
    return Table(rows, None, ())


def read_findings(films: Path, labels: Path, options: FindingOptions) -> Table:
    """The films of a table of findings, which do not exclude each other; readers by majority.

    "No Finding" says that all findings are absent; it is a finding itself where it is wanted.

    Raises:
        DataError: naming the row: no style that is known, a film that is not there or lies outside
            the folder, a cell of a wanted finding that is none of 1, 0, -1 and empty.
    """
    style = _style(labels)
    table = list(csv_rows(labels, [style.film], None))
    header = csv_header(labels)
    in_columns = options.wanted is not None and any(map(options.wanted, header))
    is_listed = _CLASS in header or (style.findings in header and not in_columns)
    columns = [] if is_listed else _finding_columns(header, table, style, options)
    find = _finder(films, style)
    rows: dict[Path, TableRow] = {}
    said: dict[Path, dict[str, Statement]] = defaultdict(dict)  # by reader
    dropped: Counter[str] = Counter()
    for number, cells in table:
        where = f"{labels}, row {number}"
        if cells.get(_PLANE, "").strip().lower() == "lateral":
            dropped["rows of lateral films left out"] += 1
            continue
        path, file = find(cells[style.film].strip(), where)
        values = _values(cells, style, dropped)
        rows.setdefault(path, TableRow(where, path, file, values))
        reader = next((cells[name].strip() for name in _READERS if name in cells), str(number))
        if _CLASS in cells:
            before = said[path].get(reader, Statement())
            found = _listing([*before.known, cells[_CLASS]])
        elif is_listed:
            found = _listing(cells[style.findings].split("|"))
        else:
            found = _stated(cells, columns, options, where)
        said[path][reader] = found
    statements = {path: _majority(list(said[path].values())) for path in rows}
    names = columns or sorted({name for one in statements.values() for name in one.known})
    findings = tuple(name for name in names if not is_no_finding(name))
    notes = [f"labels read as findings ({style.name}): {', '.join(findings)}"]
    notes += [f"{count} {what}" for what, count in dropped.items()]
    labelled = [
        TableRow(row.where, path, row.file, row.values, statements[path])
        for path, row in rows.items()
    ]
    return Table(labelled, findings, tuple(notes))


def is_no_finding(name: str) -> bool:
    """Whether a label says that there is no finding."""
    return name.strip().lower().replace("_", " ") in ("no finding", "no findings")


def _style(labels: Path) -> _Style:
    header = csv_header(labels)
    for style in _STYLES:
        if style.film in header:
            return style
    known = ", ".join(f"{style.film!r} ({style.name})" for style in _STYLES)
    raise DataError(f"{labels}: no column of films; expected one of {known}, found {header}")


def _listing(names: Iterable[str]) -> Statement:
    """The statement of a list that is complete; of an empty one nothing is known."""
    named = [name.strip() for name in names if name.strip()]
    return Statement(dict.fromkeys(named, True), others_absent=bool(named))


def _stated(cells: Cells, columns: Sequence[str], options: FindingOptions, where: str) -> Statement:
    """The statement of a column each."""
    of_policy = {"unknown": None, "present": True, "absent": False}
    known: dict[str, bool | None] = {}
    for column in columns:
        cell = cells[column].strip()
        if cell in _TRUE or cell in _FALSE:
            value: bool | None = cell in _TRUE
        elif cell in _UNCERTAIN:
            value = of_policy[options.uncertain]
        elif not cell:
            value = of_policy[options.blank]
        else:
            raise DataError(f"{where}: {column} is {cell!r}, expected 1, 0, -1 or nothing")
        if value is not None:
            known[column] = value
    if any(is_no_finding(name) and has for name, has in known.items()):
        # A tube may be there without any finding.
        absent = {c: False for c in columns if c.strip().lower() != "support devices"}
        known = {**absent, **known}
    return Statement(known)


def _majority(readings: Sequence[Statement]) -> Statement:
    """What most readers of a film say of each finding; unknown where as many say the other."""
    if len(readings) == 1:
        return readings[0]
    known: dict[str, bool | None] = {}
    for name in dict.fromkeys(name for one in readings for name in one.known):
        votes = Counter(one.says(name) for one in readings)
        divided = votes[True] == votes[False]
        known[name] = None if divided else votes[True] > votes[False]
    return Statement(known, bool(readings) and all(one.others_absent for one in readings))


def _finding_columns(
    header: Sequence[str],
    table: Sequence[tuple[int, Cells]],
    style: _Style,
    options: FindingOptions,
) -> list[str]:
    """Columns of findings: those that are wanted, or all that look like it, and "No Finding"."""
    others = {style.film, *style.ours, *_READERS, _PLANE}
    cells = {*_TRUE, *_FALSE, *_UNCERTAIN, ""}
    columns = []
    for column in header:
        if column in others:
            continue
        looks = all(row[column].strip() in cells for _, row in table)
        wanted = looks if options.wanted is None else options.wanted(column)
        if wanted or (looks and is_no_finding(column)):
            columns.append(column)
    return columns


def _values(cells: Cells, style: _Style, dropped: Counter[str]) -> dict[str, str]:
    """Our own columns of a row, in our own words."""
    there = ((theirs, ours) for theirs, ours in style.ours.items() if theirs in cells)
    values = {ours: cells[theirs].strip() for theirs, ours in there if ours != "label"}
    if style.film == "file":
        return values
    if style.film == "Path":
        parts = Path(cells["Path"]).parts
        values["patient"] = next((p for p in parts if p.lower().startswith("patient")), "")
    values["sex"] = values.get("sex", "")[:1].upper()
    if values["sex"] not in ("F", "M", "O"):
        values["sex"] = ""
    age = values.get("age", "").rstrip("Yy")
    if age and not (age.replace(".", "", 1).isdigit() and float(age) <= _OLDEST):
        dropped[f"ages beyond {_OLDEST} years, or no numbers, left out"] += 1
        age = ""
    return values | {"age": age}


def _exactly(films: Path, name: str, where: str) -> tuple[Path, str]:
    """The film of that path below the folder."""
    try:
        path = films / checked_relative(name)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if not path.is_file():
        raise DataError(f"{where}: {path} does not exist")
    return path, name


def _finder(films: Path, style: _Style) -> Callable[[str, str], tuple[Path, str]]:
    """Finds a row's film: by its path, or in a published table by its name anywhere below."""
    if style.film == "file":
        return lambda name, where: _exactly(films, name, where)
    named: dict[str, list[Path]] = defaultdict(list)
    for folder, _, files in os.walk(films):
        for path in (Path(folder, file) for file in files):
            for name in {path.name, path.stem}:  # VinDr-CXR names its films without a suffix
                named[name].append(path)

    def find(name: str, where: str) -> tuple[Path, str]:
        asked = Path(name)
        fitting: dict[int, list[Path]] = defaultdict(list)
        for path in named.get(asked.name, []):
            fitting[_common_end(path, asked)].append(path)
        if not fitting:
            raise DataError(f"{where}: {name} does not exist below {films}")
        best = fitting[max(fitting)]
        if len(best) > 1:
            raise DataError(
                f"{where}: {name} may be any of {len(best)} files below {films}: {best[0]}, ..."
            )
        return best[0], best[0].relative_to(films).as_posix()

    return find


def _common_end(path: Path, asked: Path) -> int:
    """How many folders above the file two paths share: published ones begin elsewhere."""
    shared = 0
    for one, other in zip(reversed(path.parent.parts), reversed(asked.parent.parts), strict=False):
        if one != other:
            break
        shared += 1
    return shared
