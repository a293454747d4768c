"""Figures of the diagnosis head with their intervals, beside what view and age alone reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.served import Decision
from cxrgaze.evidence import intervals, metrics
from cxrgaze.evidence.bounds import clopper_pearson
from cxrgaze.evidence.intervals import Interval, PatientBootstrap
from cxrgaze.evidence.labelled_set import FilmRow
from cxrgaze.evidence.truth import (
    HAS,
    HAS_NOT,
    UNKNOWN,
    Truth,
    class_index,
    columns,
    present_classes,
)
from cxrgaze.spec import LOGITS
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
    chosen, served = films.has_label, films.served
    rows = [row for row, has_label in zip(films.rows, chosen, strict=True) if has_label]
    bootstrap = PatientBootstrap([row.patient for row in rows], resamples, seed)
    truth = _Truth(films.truth[chosen], films.classes, bootstrap)
    p = films.probabilities[chosen]
    counts, classes = truth.counts, present_classes(truth.truth)
    left_out = [
        f"AUC of {name}: {counts[name]} of {truth.known[name]} films have it"
        for index, name in enumerate(truth.names)
        if index not in classes
    ]
    if not served.decided:
        left_out.append("operating points: the model has none")
    left_out += [
        f"operating point of {name}: the model has none"
        for name in served.classes
        if served.decided and name not in served.decided
    ]
    baseline = None
    if training is not None and classes:
        known = films.known_of
        baseline = view_and_age([(row, known(row)) for row in training], rows, truth.names)
    if isinstance(baseline, str):
        left_out.append(f"view-and-age baseline: {baseline}")
        baseline = None
    within_view, too_few = _within_views(truth, [row.view for row in rows], p, baseline)
    exclusive = served.spec.class_kind == "exclusive"
    plain = replace(served, decision=Decision()).probabilities(films.outputs[LOGITS][chosen])
    figures = Diagnosis(
        films=counts,
        known=None if exclusive else truth.known,
        auc=truth.aucs(p, classes) if classes else None,
        accuracy=truth.accuracy(p) if exclusive else None,
        temperature=served.decision.temperature if exclusive else None,
        temperatures=None if exclusive else served.decision.temperatures,
        ece=truth.label_calibration(plain, p) if exclusive else None,
        ece_by_finding=None if exclusive else truth.finding_calibration(plain, p),
        operating_points={
            name: truth.operating_point(p, name, served.decision.operating_points[name])
            for name in served.decided
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
    """Classes of films: what scores are worth against them, with intervals."""

    truth: Truth
    """`(n, K)`."""
    names: tuple[str, ...]
    """Of the classes."""
    bootstrap: PatientBootstrap

    def among(self, films: Mask) -> _Truth:
        """That of some of the films."""
        patients = [p for p, f in zip(self.bootstrap.patients, films, strict=True) if f]
        return replace(
            self, truth=self.truth[films], bootstrap=replace(self.bootstrap, patients=patients)
        )

    @property
    def counts(self) -> dict[str, int]:
        """Films that have each class."""
        return {name: int((self.truth[:, c] == HAS).sum()) for c, name in enumerate(self.names)}

    @property
    def known(self) -> dict[str, int]:
        """Films of which each class is known."""
        return {name: int((self.truth[:, c] != UNKNOWN).sum()) for c, name in enumerate(self.names)}

    def share(self, hit: Mask, among: Mask | None = None) -> Interval:
        """Share of hits, of all films or among some."""
        if among is None:
            among = np.ones(len(hit), dtype=bool)
        value = float(hit[among].mean())
        if value in (0, 1):  # the bootstrap is blind there
            return exact_share(int(value), len(set(self.among(among).bootstrap.patients)))
        drawn = self.bootstrap.draws(lambda w: intervals.weighted_share(hit, among, w))
        return self.bootstrap.around(value, drawn)

    def accuracy(self, p: Scores) -> Interval | None:
        """Share of films whose most probable class is theirs; None where none has a class served.

        A film of a class that is not served (nothing taught it) counts as wrong.
        """
        return self.share(p.argmax(axis=1) == class_index(self.truth)) if len(p) else None

    def operating_point(self, p: Scores, name: str, threshold: float) -> OperatingPoint:
        """Sensitivity and specificity of a class's flag, for probabilities `p`."""
        index = self.names.index(name)
        positive, negative = self.truth[:, index] == HAS, self.truth[:, index] == HAS_NOT
        flag = p[:, index] >= threshold
        return OperatingPoint(
            threshold=threshold,
            sensitivity=self.share(flag, positive) if positive.any() else None,
            specificity=self.share(~flag, negative) if negative.any() else None,
        )

    def label_calibration(self, before: Scores, after: Scores) -> CalibrationError:
        """ECE of the most probable class, before and after temperature scaling."""

        def of(p: Scores) -> Interval:
            return self._ece(p.max(axis=1), p.argmax(axis=1) == class_index(self.truth))

        return CalibrationError(before=of(before), after=of(after))

    def finding_calibration(self, before: Scores, after: Scores) -> dict[str, CalibrationError]:
        """ECE of each finding over the films of which it is known."""
        found = {}
        for c, (known, has) in enumerate(columns(self.truth)):
            if known.any():
                part = self.among(known)
                old, new = (part._ece(p[known, c], has) for p in (before, after))
                found[self.names[c]] = CalibrationError(before=old, after=new)
        return found

    def _ece(self, confidence: NDArray[np.float64], right: Mask) -> Interval:
        def resampled(weights: intervals.Array) -> intervals.Array:
            times = weights.astype(int)
            return np.array(
                [metrics.ece(np.repeat(confidence, n), np.repeat(right, n)) for n in times]
            )

        value = metrics.ece(confidence, right)
        return self.bootstrap.around(value, self.bootstrap.draws(resampled))

    def aucs(self, scores: Scores, classes: Sequence[int]) -> dict[str, AucIntervals]:
        """AUC of each of these classes by name, "macro" and "micro"."""
        parts = list(columns(self.truth))
        delong = [self._influence(scores[:, c], *parts[c]) for c in classes]
        drawn = self.bootstrap.draws(
            lambda w: np.stack(
                [
                    intervals.weighted_auc(scores[known, c], has, w[:, known])
                    for c, (known, has) in ((c, parts[c]) for c in classes)
                ],
                axis=1,
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

    def _influence(
        self, scores: NDArray[np.float64], known: Mask, has: Mask
    ) -> tuple[float, intervals.Array]:
        """AUC of one class and each film's part in its error, 0 where it is not known."""
        value, parts = intervals.auc_influence(scores[known], has)
        influence: intervals.Array = np.zeros(len(scores))
        influence[known] = parts
        return value, influence

    def _micro_auc(self, scores: Scores, classes: Sequence[int]) -> AucIntervals:
        """AUC over what is known of these classes, flattened."""
        cells = self.truth[:, list(classes)]
        known = (cells != UNKNOWN).ravel()
        flat, positive = scores[:, list(classes)].ravel()[known], (cells == HAS).ravel()[known]
        value, parts = intervals.auc_influence(flat, positive)
        influence: intervals.Array = np.zeros(cells.size)
        influence[known] = parts
        drawn = self.bootstrap.draws(
            lambda w: intervals.weighted_auc(
                flat, positive, np.repeat(w, len(classes), axis=1)[:, known]
            )
        )
        return self._auc(value, influence.reshape(cells.shape).sum(axis=1), drawn)

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
        classes = present_classes(part.truth, MIN_PER_CLASS)
        if not classes:
            left_out.append(
                f"AUC within view {view}: fewer than {MIN_PER_CLASS} films with and without a class"
            )
            continue
        within_view[view] = WithinView(
            films=len(part.truth),
            macro=part.aucs(p[here], classes)["macro"],
            view_and_age=None if baseline is None else part.aucs(baseline[here], classes)["macro"],
        )
    return within_view, left_out
