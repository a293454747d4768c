"""EGD-CXR (PhysioNet egd-cxr 1.0.0) with MIMIC-CXR films, as a source of a labelled set.

Reads `master_sheet.csv` (labels, patients), `fixations.csv` (fixations) and `eye_gaze.csv` (raw
60 Hz samples) in their published form: docs/method.md#egd-cxr. The films come from
MIMIC-CXR, as DICOM or JPG, below one folder; their pixels must be those of the original DICOM.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import DataError
from cxrgaze.evidence.class_presets import PRESETS
from cxrgaze.evidence.csv_table import csv_rows
from cxrgaze.evidence.gaze import Gaze
from cxrgaze.films.film import Film
from cxrgaze.train.prepare import Check, Entry, Source, find_mimic_film

CLASSES = {"Normal": "normal", "CHF": "heart_failure", "pneumonia": "pneumonia"}
"""Columns of the master sheet, exactly one of which is 1, and our classes."""

READER = "egd-radiologist"
SAMPLE_MS = 1000 / 60
"""Duration of one row of eye_gaze.csv: the tracker runs at 60 Hz."""

_SCREEN = (1920, 1080)
_ID_LENGTH = 44  # calibration screens have shorter ids
_NEEDED = ("DICOM_ID", "FPOGX", "FPOGY", "FPOGD", "X_ORIGINAL", "Y_ORIGINAL")
_CHECKED = 50  # rows of each film that the screen-to-image check looks at
_TOLERANCE_PX = 2

Pads = tuple[int, int, int, int]
"""Top, bottom, left, right: black borders of the stimulus in screen pixels."""


def screen_to_image(
    fpog: NDArray[np.floating], pads: Pads, width: int, height: int
) -> NDArray[np.int64]:
    """Film pixels `(n, 2)` of gaze points on the screen, as the data set's authors compute them.

    Args:
        fpog: `(n, 2)`, `(x, y)` as fractions of the screen.
        pads: of the film on the screen.
        width: of the film in pixels; odd sizes count as one more.
        height: likewise.

    Points outside the film become negative. The vertical scale is that of a 1,024-line picture
    taken for 1,080 lines, as published. Source: docs/method.md#screen-mapping.
    """
    top, bottom, left, right = pads
    low, high = np.array([left, top]), np.array([right, bottom])
    screen = np.asarray(fpog) * _SCREEN
    inside = ((screen > low) & (screen < np.array(_SCREEN) - high)).all(axis=1)
    on_picture = np.where(inside[:, None], screen - low, -1.0)
    even = np.array([width + width % 2, height + height % 2])
    scale = even / (np.array(_SCREEN) - low - high)
    return np.asarray(scale * on_picture, dtype=np.int64)


def read_egd(folder: Path, films: Path) -> Source:
    """The films, labels and gaze of EGD-CXR in `folder`, with MIMIC-CXR films below `films`.

    Rows of calibration screens are dropped, and so are points outside the film, which the data set
    marks by negative coordinates.

    Raises:
        DataError: naming file and row: no class or two, a film that is not there, a gaze row of an
            unknown film or with coordinates that are no numbers; no gaze file at all.
    """
    entries, pads = _read_master(folder / "master_sheet.csv", films)
    names = {Path(entry.file).stem: entry.file for entry in entries}
    readings: dict[str, _Rows] = defaultdict(_Rows)
    dropped: Counter[str] = Counter()
    present = [
        (folder / file, kind)
        for file, kind in (("fixations.csv", "fixation"), ("eye_gaze.csv", "sample"))
        if (folder / file).is_file()
    ]
    if not present:
        raise DataError(f"{folder}: neither fixations.csv nor eye_gaze.csv is there")
    for path, kind in present:
        _read_gaze(path, kind, names, readings, dropped)
    gaze = {file: rows.gaze() for file, rows in readings.items() if rows.kinds}
    for entry in entries:
        if entry.file in readings:
            entry.checks.append(_screen_check(readings[entry.file], pads[entry.file]))
    without = len(entries) - len(gaze)
    notes = [f"{count} gaze rows dropped: {why}" for why, count in sorted(dropped.items())]
    if without:
        notes.append(f"{without} films have no gaze")
    return Source(entries, gaze, tuple(notes), collection="mimic-cxr", classes=PRESETS["paper"])


class _Rows:
    """Gaze rows of one film while its files are read."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.values = array("d")
        self.checked = array("d")  # FPOGX, FPOGY, X_ORIGINAL, Y_ORIGINAL of some rows

    def gaze(self) -> Gaze:
        given = np.array(self.values).reshape(-1, 3)
        values = np.full((len(given), 9), np.nan)
        values[:, :3] = given
        return Gaze((READER,) * len(given), tuple(self.kinds), values)


def _read_master(path: Path, films: Path) -> tuple[list[Entry], dict[str, Pads]]:
    entries, pads = [], {}
    for number, cells in csv_rows(path, ("dicom_id", "path", "patient_id", *CLASSES), None):
        where = f"{path}, row {number}"
        chosen = [name for column, name in CLASSES.items() if _is_one(cells[column])]
        if len(chosen) != 1:
            raise DataError(f"{where}: {len(chosen)} of {[*CLASSES]} are 1, expected exactly one")
        film = find_mimic_film(films, cells["path"], where)
        file = f"{cells['dicom_id'].strip().lower()}{film.suffix.lower()}"
        values = {
            "patient": cells["patient_id"].strip(),
            "label": chosen[0],
            "view": "PA",
            "sex": cells.get("gender", "").strip()[:1].upper(),
            "age": _middle_of(cells.get("anchor_age", "")),
        }
        entries.append(Entry(where, film, file, values))
        sides = ("top", "bottom", "left", "right")
        try:
            found = [
                int(float(cells.get(f"image_{s}_pad") or cells.get(f"image_{s}") or 0))
                for s in sides
            ]
        except ValueError as error:
            raise DataError(f"{where}: the pads of the picture are not numbers") from error
        pads[file] = (found[0], found[1], found[2], found[3])
    return entries, pads


def _read_gaze(
    path: Path,
    kind: str,
    names: Mapping[str, str],
    readings: Mapping[str, _Rows],
    dropped: Counter[str],
) -> None:
    for number, cells in csv_rows(path, _NEEDED, None):
        identity = cells["DICOM_ID"].strip().lower()
        if len(identity) != _ID_LENGTH:
            dropped["calibration screen"] += 1
            continue
        if identity not in names:
            raise DataError(f"{path}, row {number}: DICOM_ID is not in master_sheet.csv")
        try:
            fpog_x, fpog_y, seconds, x, y = (float(cells[name]) for name in _NEEDED[1:])
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        if not np.isfinite([fpog_x, fpog_y, seconds, x, y]).all():
            raise DataError(f"{path}, row {number}: coordinates and duration must be finite")
        rows = readings[names[identity]]
        if len(rows.checked) < 4 * _CHECKED:
            rows.checked.extend((fpog_x, fpog_y, x, y))
        if x < 0 or y < 0:
            dropped["outside the film"] += 1
            continue
        rows.kinds.append(kind)
        rows.values.extend((x, y, seconds * 1000 if kind == "fixation" else SAMPLE_MS))


def _screen_check(rows: _Rows, pads: Pads) -> Check:
    """A check that the recorded film pixels are those of the film at hand (see `Entry.checks`)."""
    table = np.array(rows.checked).reshape(-1, 4)

    def check(film: Film) -> str | None:
        height, width = film.shape
        mapped = screen_to_image(table[:, :2], pads, width, height)
        off = (np.abs(mapped - table[:, 2:]) > _TOLERANCE_PX).any(axis=1)
        if off.mean() <= 0.05:
            return None
        return (
            f"gaze does not belong to this film of {width} x {height} pixels: {off.sum()} of "
            f"{len(off)} points are elsewhere; films must have the original DICOM's size"
        )

    return check


def _is_one(cell: str) -> bool:
    return cell.strip() in ("1", "1.0")


def _middle_of(age: str) -> str:
    """The middle of a range such as "20 - 30", empty where there is none."""
    ends = [part.strip() for part in age.split("-")]
    if len(ends) == 2 and all(end.isdigit() for end in ends):
        return str((int(ends[0]) + int(ends[1])) / 2)
    return ends[0] if len(ends) == 1 else ""
