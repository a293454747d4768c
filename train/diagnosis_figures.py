"""Figures of the diagnosis head with their intervals, beside what view and age alone reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.manifest import Decision
from cxrgaze.evidence import intervals, metrics
from cxrgaze.evidence.bounds import clopper_pearson
from cxrgaze.evidence.intervals import Interval, PatientBootstrap
from cxrgaze.evidence.labelled_set import FilmRow
from cxrgaze.train.baseline import view_and_age
from cxrgaze.train.evaluated_films import EvaluatedFilms
from cxrgaze.train.evaluation_record import (
    AucIntervals,
    CalibrationError,
    Diagnosis,
    OperatingPoint,
    WithinView,
)

MIN_PER_CLASS = 10
"""Films with and without a class that a view needs before it gets a figure."""

Scores = NDArray[np.float64]
"""Of each film for each class, `(n, C)`."""
Mask = NDArray[np.bool_]
"""Of films, `(n,)`."""


def diagnosis_of(
    films: EvaluatedFilms, training: Sequence[FilmRow] | None, *, resamples: int, seed: int
) -> tuple[Diagnosis, list[str]]:
    """The figures over the films with a label, and what is left out of them with its reason.

    Args:
        training: films that the baseline is fitted on; None for no baseline.
        resamples, seed: of the bootstrap over patients.
    """
    chosen, decision = films.has_label, films.decision
    rows = [row for row, has_label in zip(films.rows, chosen, strict=True) if has_label]
    bootstrap = PatientBootstrap([row.patient for row in rows], resamples, seed)
    truth = _Truth(films.arrays.labels[chosen], films.classes, bootstrap)
    p = films.probabilities[chosen]
    counts, classes = truth.counts, truth.classes_of_at_least(1)
    left_out = [
        f"AUC of {name}: {counts[name]} of {len(rows)} films have it"
        for index, name in enumerate(truth.names)
        if index not in classes
    ]
    if not decision.operating_points:
        left_out.append("operating points: the model has none")
    baseline = None
    if training is not None and classes:
        baseline = view_and_age(training, rows, truth.names)
    if isinstance(baseline, str):
        left_out.append(f"view-and-age baseline: {baseline}")
        baseline = None
    within_view, too_few = _within_views(truth, [row.view for row in rows], p, baseline)
    figures = Diagnosis(
        films=counts,
        auc=truth.aucs(p, classes) if classes else None,
        accuracy=truth.share(p.argmax(axis=1) == truth.labels),
        temperature=decision.temperature,
        ece=CalibrationError(
            before=truth.ece(Decision().probabilities(films.logits[chosen])), after=truth.ece(p)
        ),
        operating_points={
            name: truth.operating_point(p, name, threshold)
            for name, threshold in decision.operating_points.items()
        },
        view_and_age=None if baseline is None else truth.aucs(baseline, classes),
        within_view=within_view,
    )
    return figures, left_out + too_few


def exact_share(value: int, patients: int) -> Interval:
    """A share of 0 or 1 over so many patients with its exact interval; one trial a patient."""
    bounds = clopper_pearson(patients * value, patients)
    return Interval(value=value, low=bounds.low, high=bounds.high)


@dataclass(frozen=True)
class _Truth:
    """Labels of films: what scores are worth against them, with intervals."""

    labels: NDArray[np.int64]
    """`(n,)`, index of the class."""
    names: tuple[str, ...]
    """Of the classes."""
    bootstrap: PatientBootstrap

    def among(self, films: Mask) -> _Truth:
        """That of some of the films."""
        patients = [p for p, f in zip(self.bootstrap.patients, films, strict=True) if f]
        return replace(
            self, labels=self.labels[films], bootstrap=replace(self.bootstrap, patients=patients)
        )

    @property
    def counts(self) -> dict[str, int]:
        """Films of each class."""
        return {name: int((self.labels == c).sum()) for c, name in enumerate(self.names)}

    def classes_of_at_least(self, fewest: int) -> list[int]:
        """Classes that so many films have and so many do not have."""
        total = len(self.labels)
        return [c for c, n in enumerate(self.counts.values()) if min(n, total - n) >= fewest]

    def share(self, hit: Mask, among: Mask | None = None) -> Interval:
        """Share of hits, of all films or among some."""
        if among is None:
            among = np.ones(len(hit), dtype=bool)
        value = float(hit[among].mean())
        if value in (0, 1):  # the bootstrap is blind there
            return exact_share(int(value), len(set(self.among(among).bootstrap.patients)))
        drawn = self.bootstrap.draws(lambda w: intervals.weighted_share(hit, among, w))
        return self.bootstrap.around(value, drawn)

    def operating_point(self, p: Scores, name: str, threshold: float) -> OperatingPoint:
        """Sensitivity and specificity of a class's flag, for probabilities `p`."""
        index = self.names.index(name)
        positive, flag = self.labels == index, p[:, index] >= threshold
        return OperatingPoint(
            threshold=threshold,
            sensitivity=self.share(flag, positive) if positive.any() else None,
            specificity=self.share(~flag, ~positive) if (~positive).any() else None,
        )

    def ece(self, p: Scores) -> Interval:
        """Expected calibration error of probabilities `p`."""

        def resampled(weights: intervals.Array) -> intervals.Array:
            times = weights.astype(int)
            return np.array(
                [metrics.ece(np.repeat(p, n, axis=0), np.repeat(self.labels, n)) for n in times]
            )

        return self.bootstrap.around(metrics.ece(p, self.labels), self.bootstrap.draws(resampled))

    def aucs(self, scores: Scores, classes: Sequence[int]) -> dict[str, AucIntervals]:
        """AUC of each of these classes by name, "macro" and "micro"."""
        positive = {c: self.labels == c for c in classes}
        delong = [intervals.auc_influence(scores[:, c], positive[c]) for c in classes]
        drawn = self.bootstrap.draws(
            lambda w: np.stack(
                [intervals.weighted_auc(scores[:, c], positive[c], w) for c in classes], axis=1
            )
        )
        aucs = {self.names[c]: self._auc(*delong[k], drawn[:, k]) for k, c in enumerate(classes)}
        values, influences = zip(*delong, strict=True)
        macro = float(np.mean(values)), np.mean(influences, axis=0)
        return {
            **aucs,
            "macro": self._auc(*macro, drawn.mean(axis=1)),
            "micro": self._micro_auc(scores, classes),
        }

    def _micro_auc(self, scores: Scores, classes: Sequence[int]) -> AucIntervals:
        """AUC over the indicators of these classes, flattened."""
        flat = scores[:, list(classes)].ravel()
        positive = (np.array(classes)[None, :] == self.labels[:, None]).ravel()
        value, influence = intervals.auc_influence(flat, positive)
        drawn = self.bootstrap.draws(
            lambda w: intervals.weighted_auc(flat, positive, np.repeat(w, len(classes), axis=1))
        )
        return self._auc(value, influence.reshape(len(self.labels), -1).sum(axis=1), drawn)

    def _auc(
        self, value: float, influence: intervals.Array, drawn: intervals.Array
    ) -> AucIntervals:
        """Both intervals, from each film's part in the error and from the bootstrap's draws."""
        return AucIntervals(
            delong=intervals.from_influence(value, influence),
            bootstrap=self.bootstrap.around(value, drawn),
        )


def _within_views(
    truth: _Truth, views: Sequence[str | None], p: Scores, baseline: Scores | None
) -> tuple[dict[str, WithinView], list[str]]:
    """Macro AUC of model and baseline among the films of one view, by view; what is left out."""
    within_view, left_out = {}, []
    for view in sorted({view for view in views if view}):
        here = np.array([v == view for v in views])
        part = truth.among(here)
        classes = part.classes_of_at_least(MIN_PER_CLASS)
        if not classes:
            left_out.append(
                f"AUC within view {view}: fewer than {MIN_PER_CLASS} films with and without a class"
            )
            continue
        within_view[view] = WithinView(
            films=len(part.labels),
            macro=part.aucs(p[here], classes)["macro"],
            view_and_age=None if baseline is None else part.aucs(baseline[here], classes)["macro"],
        )
    return within_view, left_out
