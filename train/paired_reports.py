"""`cxrgaze-train compare`: models on the same films, from what `evaluate` wrote of each film."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import DataError, UsageError
from cxrgaze.evidence.intervals import Interval, PatientBootstrap, weighted_aucs
from cxrgaze.evidence.truth import HAS, HAS_NOT, UNKNOWN, Truth, any_known, present_classes
from cxrgaze.train.evaluation_record import FILE, Evaluation, read_evaluation

Array = NDArray[np.float64]
TABLE = "films.csv"


@dataclass(frozen=True)
class Films:
    """One evaluation: its record, and what it says of each film."""

    where: Path
    record: Evaluation
    films: tuple[str, ...]
    patients: tuple[str, ...]
    classes: tuple[str, ...]
    truth: Truth
    """`(n, K)`."""
    probabilities: Array
    """`(n, K)`; K is 0 without a diagnosis."""
    cc: Array
    """`(n,)`, NaN without gaze or map."""

    @property
    def of(self) -> tuple[object, ...]:
        """What two have to have in common."""
        return (self.record.set.split_sha256, self.record.set.split, self.films, self.classes)

    @property
    def heatmap(self) -> str | None:
        """Preset of the human maps; None without a map."""
        return self.record.saliency.heatmap if self.record.saliency else None


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
    tables = [table for pair in pairs for table in pair]
    first = tables[0]
    for table in tables:
        if table.of != first.of or not np.array_equal(table.truth, first.truth):
            raise DataError(f"{table.where}: other films, labels or classes than {first.where}")
    if len(blurs := {table.heatmap for table in tables if table.heatmap}) > 1:
        raise DataError(
            f"human maps by {' and '.join(sorted(blurs))}: CC compares only at the same blur; "
            "evaluate again with one --heatmap"
        )
    changes = np.mean([other.cc - one.cc for one, other in pairs], axis=0)
    classes, labelled = present_classes(first.truth), any_known(first.truth)

    def aucs(table: Films, weights: Array) -> Array:
        p, truth = table.probabilities[labelled], table.truth[labelled]
        return weighted_aucs(p, truth, classes, weights)

    def added_auc(weights: Array) -> Array:
        each = [aucs(other, weights) - aucs(one, weights) for one, other in pairs]
        return np.asarray(np.mean(each, axis=(0, 2)))

    def among(films: NDArray[np.bool_]) -> PatientBootstrap:
        """Of the patients of some films."""
        return PatientBootstrap([first.patients[i] for i in np.flatnonzero(films)], resamples, seed)

    seen = np.isfinite(changes)
    compared = Compared(
        films=len(first.films),
        patients=len(set(first.patients)),
        pairs=len(pairs),
        macro_auc=among(labelled).interval(added_auc) if classes else None,
        cc=among(seen).mean(changes[seen]) if seen.any() else None,
    )
    if compared.macro_auc is None and compared.cc is None:
        raise DataError(f"{first.where}: neither a class with an AUC nor a CC to compare")
    return compared


def read_films(folder: Path) -> Films:
    """The table of an evaluation.

    Raises:
        UsageError: there is none. DataError: it is not one. IntegrityError: an altered record.
    """
    path = folder / TABLE
    record = read_evaluation(folder / FILE) if (folder / FILE).is_file() else None
    if record is None or not path.is_file():
        raise UsageError(f"{folder} has no {TABLE} and {FILE}; expected one of evaluate's folders")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        header = list(rows[0]) if rows else []
        names = [name[2:] for name in header if name.startswith("p_")]
        probabilities = np.array([[float(row[f"p_{n}"]) for n in names] for row in rows])
        truth: Truth = np.full((len(rows), len(names)), UNKNOWN, dtype=np.int8)
        for cells, row in zip(truth, rows, strict=True):
            if row.get("label"):  # of a class that is not served: it has none of the others
                cells[:] = [HAS if row["label"] == name else HAS_NOT for name in names]
            elif "label" not in header:
                cells[:] = [int(row[f"has_{name}"] or UNKNOWN) for name in names]
        return Films(
            path,
            record,
            tuple(row["film"] for row in rows),
            tuple(row["patient"] for row in rows),
            tuple(names),
            truth,
            probabilities.reshape(len(rows), len(names)),
            np.array([float(row.get("cc") or "nan") for row in rows]),
        )
    except (KeyError, ValueError, csv.Error) as error:
        raise DataError(f"{path} is no table of cxrgaze-train evaluate: {error}") from error
