"""Figures of the diagnosis head with their intervals, beside what is said without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.served import Decision
from cxrgaze.evidence import calibration, intervals, metrics
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
from cxrgaze.train.baseline import SHOWN, Name
from cxrgaze.train.evaluated_films import EvaluatedFilms, Scored
from cxrgaze.train.evaluation_record import (
    AucIntervals,
    BaselineFigures,
    Calibration,
    ClassCalibration,
    Diagnosis,
    OperatingPoint,
    Subgroup,
)

MIN_PER_CLASS = 10
"""Films with and without a class that a subgroup needs before it gets a figure."""
_AGES = {
    "age under 18": (0, 18),
    "age 18 to 39": (18, 40),
    "age 40 to 64": (40, 65),
    "age 65 and over": (65, np.inf),
}

Scores = NDArray[np.float64]
"""Of each film for each class, `(n, C)`."""
Mask = NDArray[np.bool_]
"""Of films, `(n,)`."""


def diagnosis_of(
    films: EvaluatedFilms, *, resamples: int, seed: int
) -> tuple[Diagnosis, list[str]]:
    """The figures over the films with a label, and what is left out of them with its reason.

    Args:
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
    scored: dict[Name, Scored] = {}
    for name, found in films.baselines.items() if classes else ():
        if isinstance(found, str):
            left_out.append(f"baseline {SHOWN[name]}: {found}")
        elif not found.among(classes):
            left_out.append(f"baseline {SHOWN[name]}: it was fitted on other classes")
        else:
            scored[name] = replace(found, scores=found.scores[chosen])
    beside = scored.get("view_and_age")
    subgroups, too_few = _subgroups(truth, rows, p, beside)
    exclusive = served.spec.exclusive
    plain = replace(served, decision=Decision()).probabilities(films.outputs[LOGITS][chosen])
    served_by_none = int((class_index(truth.truth) == UNKNOWN).sum()) if exclusive else 0
    if served_by_none:
        left_out.append(f"log-loss of {served_by_none} films: their class is not served")
    drawn = truth.drawn(p, classes) if classes else np.empty((0, 0))
    figures = Diagnosis(
        patients=len(set(bootstrap.patients)),
        films=counts,
        known=None if exclusive else truth.known,
        auc=truth.aucs(p, classes, drawn) if classes else None,
        accuracy=truth.accuracy(p) if exclusive else None,
        temperature=served.decision.temperature if exclusive else None,
        temperatures=None if exclusive else served.decision.temperatures,
        calibration=truth.calibration(plain, p, exclusive=exclusive),
        calibration_by_class={truth.names[c]: truth.class_calibration(p, c) for c in classes},
        operating_points={
            name: truth.operating_point(p, name, point) for name, point in served.points.items()
        },
        baselines={name: truth.beside(p, drawn, found, classes) for name, found in scored.items()},
        subgroups=subgroups,
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
        known = int(positive.sum() + negative.sum())
        return OperatingPoint(
            threshold=threshold,
            prevalence=float(positive.sum() / known) if known else None,
            sensitivity=self.share(flag, positive) if positive.any() else None,
            specificity=self.share(~flag, negative) if negative.any() else None,
        )

    def calibration(self, before: Scores, after: Scores, *, exclusive: bool) -> Calibration:
        """Of all classes together, before and after temperature scaling."""
        brier, losses, confidences, eces = [], [], [], []
        for p in (before, after):
            brier.append(metrics.brier(p, self.truth, exclusive=exclusive))
            losses.append(calibration.log_loss(p, self.truth, exclusive=exclusive))
            confidence, right = metrics.stated(p, self.truth, exclusive=exclusive)
            confidences.append(confidence)
            eces.append(metrics.ece(confidence, right))
        null, null_high = calibration.ece_null(confidences[1], seed=self.bootstrap.seed)
        return Calibration(
            brier=self.bootstrap.mean(brier[1]),
            brier_before=float(np.nanmean(brier[0])),
            log_loss=self.bootstrap.mean(losses[1]) if np.isfinite(losses[1]).any() else None,
            log_loss_before=float(np.nanmean(losses[0])) if np.isfinite(losses[0]).any() else None,
            ece=eces[1],
            ece_before=eces[0],
            ece_null=null,
            ece_null_high=null_high,
        )

    def class_calibration(self, p: Scores, column: int) -> ClassCalibration:
        """Of one class, over the films of which it is known."""
        known = self.truth[:, column] != UNKNOWN
        part = self.among(known)
        own, has = p[known, column], part.truth[:, column] == HAS

        def interval(statistic: Callable[[Scores, Mask, Scores], Scores]) -> Interval | None:
            value = float(statistic(own, has, np.ones((1, len(own))))[0])
            if not np.isfinite(value):
                return None
            return part.bootstrap.around(
                value, part.bootstrap.draws(lambda w: statistic(own, has, w))
            )

        return ClassCalibration(
            slope=interval(calibration.slope),
            intercept=interval(calibration.intercept),
            brier=part.bootstrap.mean((own - has) ** 2),
        )

    def beside(
        self, p: Scores, drawn: intervals.Array, baseline: Scored, classes: Sequence[int]
    ) -> BaselineFigures:
        """A baseline on the classes that it was fitted on, and what the network adds there.

        Args:
            drawn: of the network, for `classes`.
        """
        own = baseline.among(classes)
        aucs = [metrics.auc_per_class(s, self.truth) for s in (p, baseline.scores)]
        alone = self.drawn(baseline.scores, own)
        more = drawn[:, [list(classes).index(c) for c in own]] - alone
        return BaselineFigures(
            auc=self.aucs(baseline.scores, own, alone),
            added=self.bootstrap.around(
                float(np.mean([aucs[0][c] - aucs[1][c] for c in own])), more.mean(axis=1)
            ),
            fitted_on=baseline.fitted_on,
        )

    def drawn(self, scores: Scores, classes: Sequence[int]) -> intervals.Array:
        """AUC of each of these classes over the resamples, `(resamples, classes)`."""
        return self.bootstrap.draws(
            lambda w: intervals.weighted_aucs(scores, self.truth, classes, w)
        )

    def aucs(
        self, scores: Scores, classes: Sequence[int], drawn: intervals.Array
    ) -> dict[str, AucIntervals]:
        """AUC of each of these classes by name, "macro" and "micro", with the draws of `drawn`."""
        parts = list(columns(self.truth))
        delong = [self._influence(scores[:, c], *parts[c]) for c in classes]
        aucs = {self.names[c]: self._auc(*delong[k], drawn[:, k]) for k, c in enumerate(classes)}
        values, influences = zip(*delong, strict=True)
        macro = float(np.mean(values)), np.mean(influences, axis=0)
        return {
            **aucs,
            "macro": self._auc(*macro, drawn.mean(axis=1)),
            "micro": self._micro_auc(scores, classes),
        }

    def macro(self, scores: Scores, classes: Sequence[int]) -> AucIntervals:
        """Mean AUC of these classes."""
        return self.aucs(scores, classes, self.drawn(scores, classes))["macro"]

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


def _subgroups(
    truth: _Truth, rows: Sequence[FilmRow], p: Scores, baseline: Scored | None
) -> tuple[dict[str, Subgroup], list[str]]:
    """Macro AUC of model and view and age among some of the films; what is left out."""
    found, left_out = {}, []
    for name, here in _groups(rows).items():
        part = truth.among(here)
        classes = present_classes(part.truth, MIN_PER_CLASS)
        if not classes:
            left_out.append(
                f"AUC within {name}: fewer than {MIN_PER_CLASS} films with and without a class"
            )
            continue
        found[name] = Subgroup(
            films=len(part.truth),
            classes=tuple(part.names[c] for c in classes),
            macro=part.macro(p[here], classes),
            view_and_age=part.macro(baseline.scores[here], classes)
            if baseline and baseline.among(classes) == classes
            else None,
        )
    return found, left_out


def _groups(rows: Sequence[FilmRow]) -> dict[str, Mask]:
    """The films of each view, sex and band of age that is there."""
    groups: dict[str, Mask] = {}
    for what in ("view", "sex"):
        values = [getattr(row, what) for row in rows]
        for value in sorted({v for v in values if v}):
            groups[f"{what} {value}"] = np.array([v == value for v in values])
    ages = np.array([np.nan if row.age is None else row.age for row in rows])
    for name, (low, high) in _AGES.items():
        groups[name] = (ages >= low) & (ages < high)
    return {name: here for name, here in groups.items() if here.any()}
