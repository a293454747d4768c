"""`cxrgaze-train compare`: models on the same films, from what `evaluate` wrote of each film."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import DataError, UsageError
from cxrgaze.evidence.intervals import Interval, PatientBootstrap, weighted_auc, weighted_mean
from cxrgaze.evidence.truth import UNKNOWN, Truth, columns, one_of, present_classes

Array = NDArray[np.float64]
TABLE = "films.csv"


@dataclass(frozen=True)
class Films:
    """One `films.csv`."""

    where: Path
    films: tuple[str, ...]
    patients: tuple[str, ...]
    truth: Truth
    """`(n, K)`."""
    probabilities: Array
    """`(n, K)`; K is 0 without a diagnosis."""
    cc: Array
    """`(n,)`, NaN without gaze or map."""


@dataclass(frozen=True)
class Compared:
    """New minus base, mean over the pairs, on the same films and resamples of patients."""

    films: int
    patients: int
    pairs: int
    macro_auc: Interval | None
    """None without a diagnosis."""
    cc: Interval | None
    """None without a map."""


def compare_reports(
    base: Sequence[Path], new: Sequence[Path], *, resamples: int = 5000, seed: int = 0
) -> Compared:
    """What each new model adds to the base that stands at its place, mean over the pairs.

    Args:
        base, new: folders that `cxrgaze-train evaluate` wrote; as many of the one as of the other,
            all of the same films.

    Raises:
        UsageError: not as many, or a folder without a table.
        DataError: other films, labels or classes; nothing that could be compared.
    """
    if len(base) != len(new) or not base:
        raise UsageError(f"{len(base)} of --base and {len(new)} of --new: expected as many of each")
    pairs = [(read_films(one), read_films(other)) for one, other in zip(base, new, strict=True)]
    first = pairs[0][0]
    for table in (table for pair in pairs for table in pair):
        same = (table.films, table.patients) == (first.films, first.patients)
        if not same or not np.array_equal(table.truth, first.truth):
            raise DataError(f"{table.where}: other films, labels or classes than {first.where}")
    bootstrap = PatientBootstrap(first.patients, resamples, seed)
    classes = present_classes(first.truth)
    parts = list(columns(first.truth))

    def macro(table: Films, weights: Array) -> Array:
        each = [
            weighted_auc(table.probabilities[known, c], has, weights[:, known])
            for c, (known, has) in ((c, parts[c]) for c in classes)
        ]
        return np.asarray(np.mean(each, axis=0))

    def mean_cc(table: Films, weights: Array) -> Array:
        return weighted_mean(table.cc, weights)

    def added(statistic: Callable[[Films, Array], Array], there: bool) -> Interval | None:
        if not there:
            return None

        def difference(weights: Array) -> Array:
            each = [statistic(b, weights) - statistic(a, weights) for a, b in pairs]
            return np.asarray(np.mean(each, axis=0))

        value = float(difference(np.ones((1, len(first.films))))[0])
        return bootstrap.around(value, bootstrap.draws(difference))

    has_map = all(np.isfinite(table.cc).any() for pair in pairs for table in pair)
    compared = Compared(
        films=len(first.films),
        patients=len(set(first.patients)),
        pairs=len(pairs),
        macro_auc=added(macro, bool(classes)),
        cc=added(mean_cc, has_map),
    )
    if compared.macro_auc is None and compared.cc is None:
        raise DataError(f"{first.where}: neither a class with an AUC nor a CC to compare")
    return compared


def read_films(folder: Path) -> Films:
    """The table of an evaluation.

    Raises:
        UsageError: there is none. DataError: it is not one.
    """
    path = folder / TABLE
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; expected a folder of cxrgaze-train evaluate"
        ) from error
    header = list(rows[0]) if rows else []
    names = [name[2:] for name in header if name.startswith("p_")]
    try:
        probabilities = np.array([[float(row[f"p_{n}"]) for n in names] for row in rows])
        if "label" in header:
            index = [
                names.index(row["label"]) if row["label"] in names else UNKNOWN for row in rows
            ]
            truth = one_of(index, len(names))
        else:
            cells = [[int(row[f"has_{n}"] or UNKNOWN) for n in names] for row in rows]
            truth = np.array(cells, dtype=np.int8).reshape(len(rows), len(names))
        return Films(
            path,
            tuple(row["film"] for row in rows),
            tuple(row["patient"] for row in rows),
            truth,
            probabilities.reshape(len(rows), len(names)),
            np.array([float(row.get("cc") or "nan") for row in rows]),
        )
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} is no table of cxrgaze-train evaluate: {error}") from error
