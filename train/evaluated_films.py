"""What a model says of every film of one split, beside what is known of the film."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.served import Served
from cxrgaze.errors import DataError, ParityError
from cxrgaze.evidence import heatmaps
from cxrgaze.evidence.arrays import Arrays, load_arrays
from cxrgaze.evidence.labelled_set import FilmRow, LabelledSet, Split
from cxrgaze.evidence.truth import UNKNOWN, Truth, any_known
from cxrgaze.spec import LOG_DENSITY, LOGITS, Outputs
from cxrgaze.train.baseline import SHOWN, Baseline, Described, Name, fitted, grey_statistics
from cxrgaze.train.evaluated_model import EvaluatedModel
from cxrgaze.train.film_saliency import saliency_by_film


@dataclass(frozen=True)
class Scored:
    """What a baseline says of the films."""

    scores: NDArray[np.float64]
    """`(N, K)`."""
    fitted_on: str
    columns: frozenset[int]
    """Of the classes that it was fitted on; others have score 0."""

    def among(self, classes: Sequence[int]) -> list[int]:
        """Those of some classes that it says something of."""
        return [c for c in classes if c in self.columns]


@dataclass(frozen=True)
class EvaluatedFilms:
    """The films of a split and the outputs of one model, in the order of the set's rows."""

    rows: Sequence[FilmRow]
    arrays: Arrays
    served: Served
    """What is served of the model."""
    outputs: Outputs
    """Its heads for all films."""
    saliency: Mapping[int, Mapping[str, float]]
    """Metrics of each film with gaze, by its index (`saliency_by_film`)."""
    left_out: tuple[str, ...]
    """What there is nothing to compute from."""
    known_of: Callable[[FilmRow], Mapping[str, bool]]
    """What is known of the classes of any film of the set (`LabelledSet.known`)."""
    baselines: Mapping[Name, Scored | str]
    """What the baselines say of them, or why there is none."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes that something taught."""
        return self.served.classes

    @property
    def truth(self) -> Truth:
        """`(N, K)`, of these classes."""
        return self.arrays.truth[:, self.served.columns]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """`(N, K)`, at the fitted temperature."""
        return self.served.probabilities(self.outputs[LOGITS])

    @property
    def has_label(self) -> NDArray[np.bool_]:
        """`(N,)`, whether something is known of a film's classes."""
        return any_known(self.truth)

    def table(self) -> bytes:
        """A row a film as CSV: label, prediction, probabilities, saliency metrics.

        Of findings a column of each: 1, 0, empty where it is not known.
        """
        keys = list(next(iter(self.saliency.values()), {}))
        exclusive = self.served.spec.exclusive
        columns: list[str] = []
        if self.classes:
            columns = ["label", "predicted"] if exclusive else [f"has_{n}" for n in self.classes]
        p = self.probabilities if self.classes else np.zeros((len(self.rows), 0))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["film", "patient", *columns, *(f"p_{n}" for n in self.classes), *keys])
        for index, row in enumerate(self.rows):
            said: list[str] = []
            if self.classes and exclusive:
                said = [row.label or "", self.classes[int(p[index].argmax())]]
            elif self.classes:
                said = ["" if cell == UNKNOWN else str(cell) for cell in self.truth[index]]
            values = [self.saliency.get(index, {}).get(key, np.nan) for key in keys]
            cells = (f"{v:.6f}" if np.isfinite(v) else "" for v in values)
            writer.writerow([row.film, row.patient, *said, *(f"{v:.9g}" for v in p[index]), *cells])
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
    outputs = model.predict(arrays.images)
    if not all(np.isfinite(array).all() for array in outputs.values()):
        raise ParityError(
            f"{model.path} gives NaN or infinity on these films: its weights are damaged"
        )
    served = model.served
    left_out = [f"a meaning of {head}: nothing taught this output" for head in served.untrained]
    if LOGITS not in served.untrained:
        left_out += [f"the class {name}: nothing taught it" for name in served.untaught]
    training = _Training(labelled, split, model, heatmap)
    prior = None
    if LOG_DENSITY in served.heads and arrays.has_gaze.any():
        prior = training.prior
        if prior is None:
            left_out.append(
                "centre prior: neither network nor set has one of training films with gaze, by "
                "this heatmap preset"
            )
    saliency: Mapping[int, Mapping[str, float]] = {}
    if LOG_DENSITY in served.heads:
        saliency = saliency_by_film(arrays, outputs[LOG_DENSITY][:, 0], prior, preset)
    films = EvaluatedFilms(
        rows=part.rows,
        arrays=arrays,
        served=served,
        outputs=outputs,
        saliency=saliency,
        left_out=(),
        known_of=labelled.known,
        baselines=training.baselines(part.rows, arrays) if served.classes else {},
    )
    total, labelled_films = len(part.rows), int(films.has_label.sum())
    if not labelled_films and not saliency:
        raise DataError(
            f"{labelled.folder}: no film of split {split} has a label or gaze that this network "
            "can be judged by"
        )
    for some, head, what in (
        (labelled_films, LOGITS, "label"),
        (len(saliency), LOG_DENSITY, "gaze"),
    ):
        if head in served.heads and some < total:
            left_out.append(f"{total - some} of {total} films have no {what}")
    return replace(films, left_out=tuple(left_out))


_MOST = 2000
"""Training films that are read for a baseline."""


@dataclass(frozen=True)
class _Training:
    """What is known without the network: of its training films, else of the set's own."""

    labelled: LabelledSet
    split: Split
    model: EvaluatedModel
    heatmap: str

    @property
    def prior(self) -> NDArray[np.float32] | None:
        """The centre prior `(H, W)`, None where no training film has gaze."""
        if self.model.prior is not None and self.heatmap == self.model.heatmap:
            return self.model.prior
        gazed = tuple(row for row in self._own.rows if row.film in self.labelled.gaze)
        if not gazed:
            return None
        return heatmaps.centre_prior(self._loaded(gazed).densities[:, 0])

    def baselines(self, asked: Sequence[FilmRow], arrays: Arrays) -> dict[Name, Scored | str]:
        """What each baseline says of films; the patient number within this set alone."""
        films = Described(asked, grey_statistics(arrays))
        classes = self.model.served.classes
        kept = {one.name: one for one in self.model.baselines}
        found: dict[Name, Scored | str] = {}
        for name in SHOWN:
            baseline: Baseline | str = "neither the network nor other films of the set give one"
            fitted_on = "the network's training films"
            if name in kept:
                baseline = kept[name]
            elif self.split != "train" and self._own.rows:
                fitted_on = "the set's training films"
                rows = self._own.rows
                if name == "grey_levels" and len(rows) > _MOST:
                    chosen = np.random.default_rng(0).permutation(len(rows))[:_MOST]
                    rows = tuple(rows[i] for i in np.sort(chosen))
                    fitted_on = f"{_MOST} of the set's training films"
                grey = grey_statistics(self._loaded(rows)) if name == "grey_levels" else None
                known = [self.labelled.known(row) for row in rows]
                baseline = fitted(name, Described(rows, grey), known, classes)
            if isinstance(baseline, str):
                found[name] = baseline
                continue
            scores = baseline.scores(films, classes)
            if isinstance(scores, str):
                found[name] = scores
                continue
            columns = frozenset(c for c, one in enumerate(classes) if one in baseline.classes)
            found[name] = Scored(scores, fitted_on, columns)
        return found

    @property
    def _own(self) -> LabelledSet:
        return self.labelled.split("train")

    def _loaded(self, rows: tuple[FilmRow, ...]) -> Arrays:
        preset = heatmaps.PRESETS[self.heatmap]
        return load_arrays(replace(self._own, rows=rows), self.model.spec, preset)
