"""What a model says of every film of one split, beside what is known of the film."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.manifest import Decision
from cxrgaze.errors import DataError, ParityError
from cxrgaze.evidence import heatmaps
from cxrgaze.evidence.arrays import UNLABELLED, Arrays, load_arrays
from cxrgaze.evidence.labelled_set import FilmRow, LabelledSet, Split
from cxrgaze.spec import ModelSpec
from cxrgaze.train.evaluated_model import EvaluatedModel
from cxrgaze.train.figures import saliency_by_film


@dataclass(frozen=True)
class EvaluatedFilms:
    """The films of a split and the outputs of one model, in the order of the set's rows."""

    rows: Sequence[FilmRow]
    arrays: Arrays
    classes: tuple[str, ...]
    decision: Decision
    """Of the model."""
    logits: NDArray[np.float32]
    """`(N, C)`."""
    log_density: NDArray[np.float32]
    """`(N, H, W)`."""
    saliency: Mapping[int, Mapping[str, float]]
    """Metrics of each film with gaze, by its index (`saliency_by_film`)."""
    left_out: tuple[str, ...]
    """What there is nothing to compute from."""

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """`(N, C)`, at the fitted temperature."""
        return self.decision.probabilities(self.logits)

    @property
    def has_label(self) -> NDArray[np.bool_]:
        """`(N,)`, whether a film has a label."""
        return np.asarray(self.arrays.labels != UNLABELLED)

    def table(self) -> bytes:
        """A row a film as CSV: label, prediction, probabilities, saliency metrics."""
        keys = list(next(iter(self.saliency.values()), {}))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = (f"p_{name}" for name in self.classes)
        writer.writerow(["film", "patient", "label", "predicted", *columns, *keys])
        for index, (row, p) in enumerate(zip(self.rows, self.probabilities, strict=True)):
            values = [self.saliency.get(index, {}).get(key, np.nan) for key in keys]
            cells = (f"{v:.6f}" if np.isfinite(v) else "" for v in values)
            predicted = self.classes[int(p.argmax())]
            probabilities = (f"{v:.6f}" for v in p)
            writer.writerow(
                [row.film, row.patient, row.label or "", predicted, *probabilities, *cells]
            )
        return text.getvalue().encode()


def evaluate_films(
    labelled: LabelledSet, split: Split, model: EvaluatedModel, heatmap: str
) -> EvaluatedFilms:
    """The model's outputs and saliency metrics of the films of a split.

    Args:
        heatmap: preset that makes densities of the gaze.

    Raises:
        DataError: the split has no films, or none with a label or gaze.
        ParityError: an output that is not finite.
    """
    preset = heatmaps.PRESETS[heatmap]
    part = labelled.split(split)
    if not part.rows:
        raise DataError(f"{labelled.folder}: no films in split {split}")
    arrays = load_arrays(part, model.spec, preset)
    logits, log_density = model.predict(arrays.images)
    if not (np.isfinite(logits).all() and np.isfinite(log_density).all()):
        raise ParityError(
            f"{model.path} gives NaN or infinity on these films: its weights are damaged"
        )
    left_out = [f"a meaning of {head}: nothing taught this output" for head in model.untrained]
    prior = None
    if arrays.has_gaze.any():
        prior = _training_prior(labelled, model.spec, preset)
        if prior is None:
            left_out.append("centre prior: the set has no training film with gaze")
    saliency = saliency_by_film(arrays, log_density[:, 0], prior, preset)
    unlabelled = int((arrays.labels == UNLABELLED).sum())
    total = len(part.rows)
    if unlabelled == total and not saliency:
        raise DataError(f"{labelled.folder}: no film of split {split} has a label or gaze")
    for lacking, what in ((unlabelled, "label"), (total - len(saliency), "gaze")):
        if lacking:
            left_out.append(f"{lacking} of {total} films have no {what}")
    return EvaluatedFilms(
        rows=part.rows,
        arrays=arrays,
        classes=model.spec.class_names,
        decision=model.decision,
        logits=logits,
        log_density=log_density[:, 0],
        saliency=saliency,
        left_out=tuple(left_out),
    )


def _training_prior(
    labelled: LabelledSet, spec: ModelSpec, preset: heatmaps.HeatmapPreset
) -> NDArray[np.float32] | None:
    """The centre prior of the training films `(H, W)`, None where they have no gaze."""
    training = labelled.split("train")
    gazed = tuple(row for row in training.rows if row.film in labelled.gaze)
    if not gazed:
        return None
    arrays = load_arrays(replace(training, rows=gazed), spec, preset)
    return heatmaps.centre_prior(arrays.densities[:, 0])
