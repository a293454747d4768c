"""Gaze on films: samples and fixations, as `fixations.csv` holds them."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import DataError
from cxrgaze.evidence.csv_table import csv_rows
from cxrgaze.evidence.heatmaps import HeatmapPreset

GAZE_COLUMNS = ("film", "reader", "kind", "x_px", "y_px", "duration_ms")


GAZE_OPTIONAL = (
    "sigma_x_px",
    "sigma_y_px",
    "shown_xmin_px",
    "shown_ymin_px",
    "shown_xmax_px",
    "shown_ymax_px",
)


_KINDS = ("sample", "fixation")


@dataclass(frozen=True)
class Gaze:
    """Gaze on one film, rows in their recorded order.

    `values` is float64 `(n, 9)`: x_px, y_px, duration_ms and the six optional columns, NaN where
    empty. Points may lie outside the film.
    """

    readers: tuple[str, ...]
    kinds: tuple[str, ...]
    values: NDArray[np.float64]

    def select(self, *, kind: str | None = None, reader: str | None = None) -> Gaze:
        """The rows of one kind and one reader; None takes all."""
        keep = [
            i
            for i, (k, r) in enumerate(zip(self.kinds, self.readers, strict=True))
            if kind in (None, k) and reader in (None, r)
        ]
        return Gaze(
            tuple(self.readers[i] for i in keep),
            tuple(self.kinds[i] for i in keep),
            self.values[keep],
        )

    @property
    def points(self) -> NDArray[np.float64]:
        """`(n, 2)`, `(x, y)` in pixels of the source film."""
        return self.values[:, :2]

    def weighted(
        self, preset: HeatmapPreset, width: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Points `(n, 2)`, weights `(n,)` and sigmas `(n, 2)` in pixels of a film `width` wide.

        Raises:
            DataError: the preset wants a sigma of each row and one is missing.
        """
        rows = self.select(kind=preset.kind)
        weights = rows.values[:, 2] if preset.weight == "duration" else np.ones(len(rows.values))
        sigma = preset.sigma_px or (preset.sigma_share and preset.sigma_share * width)
        sigmas = np.full((len(weights), 2), sigma) if sigma else rows.values[:, 3:5]
        if np.isnan(sigmas).any():
            raise DataError("this preset needs sigma_x_px and sigma_y_px in every fixation row")
        return rows.points, weights, sigmas


def read_gaze(path: Path, films: Set[str]) -> dict[str, Gaze]:
    """Gaze by film from a table in the form of `fixations.csv`.

    Raises:
        DataError: naming the row: a film that is not in `films`, another kind than sample or
            fixation, a coordinate or duration that is not finite.
    """
    readers: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, list[str]] = defaultdict(list)
    values: dict[str, array[float]] = defaultdict(lambda: array("d"))
    for number, cells in csv_rows(path, GAZE_COLUMNS, GAZE_OPTIONAL):
        film = cells["film"]
        try:
            needed = [float(cells[name]) for name in GAZE_COLUMNS[3:]]
            optional = [float(cells.get(name) or "nan") for name in GAZE_OPTIONAL]
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        if film not in films:
            raise DataError(f"{path}, row {number}: {film} is not in films.csv")
        if cells["kind"] not in _KINDS:
            raise DataError(f"{path}, row {number}: kind {cells['kind']!r} is not one of {_KINDS}")
        if not np.isfinite(needed).all() or needed[2] < 0:
            raise DataError(f"{path}, row {number}: coordinates and duration must be finite")
        readers[film].append(cells["reader"])
        kinds[film].append(cells["kind"])
        values[film].extend(needed + optional)
    return {
        film: Gaze(tuple(readers[film]), tuple(kinds[film]), np.array(values[film]).reshape(-1, 9))
        for film in readers
    }


def gaze_records(gaze: Mapping[str, Gaze]) -> Iterator[dict[str, Any]]:
    """Rows of `fixations.csv`, rounded to thousandths."""
    columns = (*GAZE_COLUMNS, *GAZE_OPTIONAL)
    for film, rows in gaze.items():
        for reader, kind, values in zip(rows.readers, rows.kinds, rows.values, strict=True):
            cells = [None if np.isnan(v) else round(float(v), 3) for v in values]
            yield dict(zip(columns, (film, reader, kind, *cells), strict=True))
