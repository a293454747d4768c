"""REFLACX (PhysioNet reflacx-xray-localization 1.0.0) with MIMIC-CXR films, as a source.

Reads `main_data/metadata_phase_{1,2,3}.csv` and each reading's `fixations.csv` in their published
form: docs/method.md#reflacx. Fixations only; the 1000 Hz samples are not needed for a density.

There is no Normal, CHF or pneumonia label in REFLACX: films are unlabelled unless the caller maps
findings to classes. A finding is present in a film if at least half of its readings give it with
certainty 3 (about 50 %) or more, as the data set's authors count; a film without any finding has
the finding "No finding"; a film whose findings map to two classes stays unlabelled.

Differs from the authors' heat maps in that a Gaussian is not cut at the rectangle that was shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cxrgaze.errors import DataError
from cxrgaze.evidence.csv_table import csv_rows
from cxrgaze.evidence.gaze import Gaze
from cxrgaze.films.film import Film
from cxrgaze.train.prepare import Check, Entry, Source, find_mimic_film

CERTAIN = 3
NO_FINDING = "No finding"

_IDENTITY = (
    "id",
    "split",
    "eye_tracking_data_discarded",
    "image",
    "dicom_id",
    "subject_id",
    "image_size_x",
    "image_size_y",
)
_NOT_FINDINGS = (*_IDENTITY, "Other", "Quality issue", "Support devices")
_FIXATION = (
    "timestamp_start_fixation",
    "timestamp_end_fixation",
    "x_position",
    "y_position",
    "angular_resolution_x_pixels_per_degree",
    "angular_resolution_y_pixels_per_degree",
    "xmin_shown_from_image",
    "ymin_shown_from_image",
    "xmax_shown_from_image",
    "ymax_shown_from_image",
)


class _FilmReadings:
    """What the readings of one film say."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.readings = 0
        self.findings: Counter[str] = Counter()
        self.gaze: list[Gaze] = []


def read_reflacx(folder: Path, films: Path, classes: Mapping[str, str]) -> Source:
    """The films, readings and fixations of REFLACX in `folder`, with MIMIC-CXR films below `films`.

    Args:
        classes: finding (a column of the metadata, or "No finding") to class.

    Raises:
        DataError: naming file and row: no metadata, a film or a reading's file that is not there, a
            reading without fixations, a certainty or coordinate that is no number, a finding in
            `classes` that no metadata file has.
    """
    tables = sorted((folder / "main_data").glob("metadata_phase_[123].csv"))
    if not tables:
        raise DataError(f"{folder / 'main_data'}: no metadata_phase_1.csv, _2 or _3")
    by_film: dict[str, _FilmReadings] = {}
    findings = {NO_FINDING}
    discarded = 0
    for table in tables:
        for number, cells in csv_rows(table, _IDENTITY, None):
            where = f"{table}, row {number}"
            findings |= {column for column in cells if column not in _NOT_FINDINGS}
            if _is_true(cells["eye_tracking_data_discarded"]):
                discarded += 1
                continue
            film = _film_of(by_film, cells, films, where)
            film.readings += 1
            film.findings.update(_findings(cells, where))
            path = folder / "main_data" / cells["id"].strip() / "fixations.csv"
            film.gaze.append(_read_fixations(path, cells["id"].strip(), where))
    if unknown := sorted(set(classes) - findings):
        raise DataError(
            f"no metadata file has the finding {unknown[0]!r}; there are {sorted(findings)}"
        )
    notes = [f"{discarded} readings dropped: their eye tracking was discarded"] if discarded else []
    entries, gaze, two = [], {}, 0
    for film in by_film.values():
        label, conflicting = _label(film, classes)
        two += conflicting
        entries.append(
            Entry(
                film.entry.where,
                film.entry.path,
                film.entry.file,
                {**film.entry.values, "label": label},
                film.entry.checks,
            )
        )
        gaze[film.entry.file] = _joined(film.gaze)
    if two:
        notes.append(f"{two} films unlabelled: their findings map to more than one class")
    return Source(entries, gaze, tuple(notes), collection="mimic-cxr")


def _film_of(
    by_film: dict[str, _FilmReadings], cells: Mapping[str, str], films: Path, where: str
) -> _FilmReadings:
    identity = cells["dicom_id"].strip().lower()
    if identity not in by_film:
        image = cells["image"].strip()
        path = find_mimic_film(films, image[image.find("files/") :], where)
        try:
            size = (int(float(cells["image_size_y"])), int(float(cells["image_size_x"])))
        except ValueError as error:
            raise DataError(f"{where}: image_size_x and image_size_y must be numbers") from error
        values = {"patient": cells["subject_id"].strip()}
        file = f"{identity}{path.suffix.lower()}"
        by_film[identity] = _FilmReadings(Entry(where, path, file, values, [_size_check(size)]))
    return by_film[identity]


def _size_check(size: tuple[int, int]) -> Check:
    def check(film: Film) -> str | None:
        if film.shape == size:
            return None
        return (
            f"the film has {film.shape[1]} x {film.shape[0]} pixels, the metadata says "
            f"{size[1]} x {size[0]}: fixations would be elsewhere"
        )

    return check


def _findings(cells: Mapping[str, str], where: str) -> list[str]:
    """Findings of one reading with certainty `CERTAIN` or more, or "No finding"."""
    present = []
    for column, cell in cells.items():
        text = cell.strip()
        if column in _NOT_FINDINGS or not text:
            continue
        try:
            certainty = CERTAIN * _is_true(text) if text.isalpha() else float(text)
        except ValueError as error:
            raise DataError(f"{where}: certainty of {column!r} is no number") from error
        if certainty >= CERTAIN:
            present.append(column)
    return present or [NO_FINDING]


def _label(film: _FilmReadings, classes: Mapping[str, str]) -> tuple[str, bool]:
    """Class of a film, empty where there is none, and whether findings map to several."""
    present = [name for name, count in film.findings.items() if 2 * count >= film.readings]
    labels = {classes[name] for name in present if classes.get(name)}
    return (labels.pop() if len(labels) == 1 else ""), len(labels) > 1


def _read_fixations(path: Path, reading: str, where: str) -> Gaze:
    if not path.is_file():
        raise DataError(f"{where}: {path} does not exist")
    rows = []
    for number, cells in csv_rows(path, _FIXATION, None):
        try:
            start, end, x, y, *rest = (float(cells[name]) for name in _FIXATION)
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        rows.append([x, y, (end - start) * 1000, *rest])
        if not np.isfinite(rows[-1]).all() or end < start or min(rest[:2]) <= 0:
            raise DataError(
                f"{path}, row {number}: times, positions and degrees must be finite, in order and "
                "positive"
            )
    if not rows:
        raise DataError(f"{path}: a reading without fixations")
    return Gaze((reading,) * len(rows), ("fixation",) * len(rows), np.array(rows))


def _joined(readings: list[Gaze]) -> Gaze:
    return Gaze(
        tuple(reader for gaze in readings for reader in gaze.readers),
        tuple(kind for gaze in readings for kind in gaze.kinds),
        np.concatenate([gaze.values for gaze in readings]),
    )


def _is_true(cell: str) -> bool:
    return cell.strip().lower() == "true"
