"""Does a low-precision network lose accuracy? Paired differences on the same films, with a verdict.

What is compared is what is served: labels and flags at each network's own temperature and operating
points. Candidate minus reference: macro AUC, mean CC to the human map, the share of patients with
another decision, sensitivity and specificity of each class over its own patients, the mean Brier
score. Patients are drawn, not films: films of one patient are alike, and the same draw serves
candidate and reference. A quantity passes where its one-sided 95 % bound is inside the limit, and
fails where its whole two-sided 95 % interval is outside. A class of which the set has too few
patients is a line that was not measured, and so no pass.

The interval of a difference is the studentised bootstrap over patients: of all that were tried, the
one that stays near 95 % where a loss comes from few patients, and where percentiles cover 60 to
85 %. Where fewer than ten patients carry the difference, no resampling of them says enough, and
Student's t with Johnson's correction for skewness takes its place. No interval sees what no patient
of the set shows: a macro AUC that truly loses the limit because 1.25 % of all patients get scores
that say nothing passes with probability 0.24 on 150 patients, 0.09 on 300 and 0.06 on 600 or more
(simulated). Other figures: `RECOMMENDED_PATIENTS` and the tests.

Limits and rule: docs/graphs.md#gate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.served import Served
from cxrgaze.bundles.verdicts import (
    ClassChange,
    Comparison,
    DecisionChange,
    GateOutcome,
    Limits,
    Quantity,
    QuantityKind,
    losing,
    shown,
)
from cxrgaze.evidence import metrics
from cxrgaze.evidence.bounds import (
    RESAMPLES,
    SEED,
    Bounds,
    clopper_pearson,
    paired_shares,
    studentised,
    studentised_mean,
)
from cxrgaze.evidence.intervals import (
    MIN_PATIENTS,
    Array,
    auc_influence,
    weighted_aucs,
)
from cxrgaze.evidence.power import (
    NOTHING_SHOWN,
    can_show,
    lack_of_gaze,
    lack_of_labels,
    numbered,
    patients_for_flips,
    rounded_up,
)
from cxrgaze.evidence.truth import HAS, HAS_NOT, Truth, any_known, columns, present_classes
from cxrgaze.spec import LOGITS


@dataclass(frozen=True)
class Says:
    """What one network says of the classes of n films, as it is served.

    Raises:
        ValueError: shapes that differ.
    """

    probabilities: Array
    """`(n, K)`."""
    labels: NDArray[np.bool_]
    """`(n, K)`, whether a class is the label; of findings never."""
    flags: NDArray[np.bool_]
    """`(n, K)`, whether a class is flagged, or the label where it has no operating point."""

    def __post_init__(self) -> None:
        shapes = {np.shape(v) for v in (self.probabilities, self.labels, self.flags)}
        (shape, *others) = shapes
        if others or len(shape) != 2 or 0 in shape:
            raise ValueError(f"expected arrays of one shape (n, K), found {shapes}")

    @classmethod
    def of(cls, served: Served, logits: Array) -> Says:
        """What is served of logits `(n, C)`."""
        p = served.probabilities(logits)
        return cls(p, served.labelled(p), served.flagged(p))


@dataclass(frozen=True)
class Diagnoses:
    """What candidate and reference say of the classes of n films.

    Raises:
        ValueError: shapes that differ, or a truth that is none.
    """

    truth: Truth
    """`(n, K)` (`cxrgaze.evidence.truth`)."""
    reference: Says
    candidate: Says
    decides: NDArray[np.bool_]
    """`(K,)`, of which classes something is decided."""
    exclusive: bool = True
    """Whether a film has one of the classes, and not any findings."""

    def __post_init__(self) -> None:
        shapes = {np.shape(v) for v in (self.truth, self.reference.flags, self.candidate.flags)}
        if len(shapes) > 1 or np.shape(self.decides) != np.shape(self.truth)[1:]:
            raise ValueError(f"expected truth and outputs of one shape (n, K), found {shapes}")
        if int(np.min(self.truth)) < -1 or int(np.max(self.truth)) > 1:
            raise ValueError("expected a truth of -1, 0 and 1")


@dataclass(frozen=True)
class Maps:
    """How well the maps of candidate and reference agree with the human ones of n films.

    Raises:
        ValueError: lengths that differ.
    """

    reference: Array
    """CC to the human map, `(n,)`; NaN where a film has no gaze."""
    candidate: Array

    def __post_init__(self) -> None:
        if np.shape(self.reference) != np.shape(self.candidate) or np.ndim(self.reference) != 1:
            raise ValueError("expected a CC of each film, of candidate and reference")

    @property
    def has_gaze(self) -> NDArray[np.bool_]:
        """Films whose reference has a CC, `(n,)`."""
        return np.isfinite(self.reference)


@dataclass(frozen=True)
class Paired:
    """What candidate and reference said of the same n films; an output is None where none is.

    Raises:
        ValueError: lengths that differ, no films.
    """

    patients: Sequence[str]
    """Patient of each film, `(n,)`."""
    diagnoses: Diagnoses | None = None
    maps: Maps | None = None

    def __post_init__(self) -> None:
        n = len(self.patients)
        lengths = {len(self.diagnoses.truth)} if self.diagnoses else set()
        lengths |= {len(self.maps.reference)} if self.maps else set()
        if not n or lengths - {n}:
            raise ValueError(f"expected outputs of the same n > 0 films, found {n}, {lengths}")


def compare(
    paired: Paired,
    limits: Limits | None = None,
    *,
    classes: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """The verdict on a candidate.

    Overall *fail* if any quantity fails; *pass* if every quantity passes, and there is one; else
    *inconclusive*. So a set without gaze cannot pass a network with a map. Outputs that are not
    finite fail.

    Args:
        limits: None for the defaults.
        classes: names of the columns of the scores, for the report.

    Raises:
        ValueError: another number of names than of columns.
    """
    limits = limits or Limits()
    patients = len(set(paired.patients))
    diagnoses, maps = paired.diagnoses, paired.maps
    quantities: list[Quantity] = []
    changes: list[tuple[int, ClassChange, Array]] = []
    decisions: tuple[DecisionChange, ...] = ()
    flipped = None
    names: tuple[str, ...] = ()
    who = np.asarray(paired.patients)
    if diagnoses:
        columns_of = np.shape(diagnoses.truth)[1]
        names = tuple(classes) or numbered(columns_of)
        if len(names) != columns_of:
            raise ValueError(f"expected a name for each column of the scores, found {names}")
        flipped = _flipped(diagnoses)
        decisions = _decision_changes(diagnoses, who, names)
        if reason := _broken_scores(diagnoses):
            quantities += [
                Quantity(kind=kind, limit=limits.of(kind), verdict="fail", reason=reason)
                for kind in _OF_DIAGNOSES
            ]
        else:
            changes = _class_changes(diagnoses, names)
            quantities += [
                _macro_auc(diagnoses, who, limits.macro_auc, changes, names, resamples, seed),
                _flips(paired, diagnoses, flipped, limits.flips),
                *_by_class(diagnoses, who, limits, names),
                _brier(diagnoses, who, limits.brier, resamples, seed),
            ]
    loss = None
    if maps:
        loss = np.where(maps.has_gaze, maps.reference - maps.candidate, np.nan)
        loss[~np.isfinite(loss)] = np.nan
        if reason := _broken_cc(maps):
            quantities.append(Quantity(kind="CC", limit=limits.cc, verdict="fail", reason=reason))
        else:
            quantities.append(_cc(paired.patients, maps, limits.cc, resamples, seed))
    quantities.sort(key=lambda quantity: _SHOWN.index(quantity.kind))
    verdict, reason = _overall(quantities)
    worst = int(np.nanargmax(loss)) if loss is not None and np.isfinite(loss).any() else None
    return Comparison(
        verdict=verdict,
        limits=limits,
        reason=reason,
        films=len(paired.patients),
        patients=patients,
        quantities=tuple(quantities),
        classes=tuple(change for _, change, _ in changes),
        decisions=decisions,
        flipped_films=None if flipped is None else int(flipped.sum()),
        flipped_patients=None if flipped is None else _patients(paired, flipped),
        worst_film=worst,
        worst_cc_loss=None if worst is None or loss is None else float(loss[worst]),
        can_show=can_show(
            paired.patients,
            diagnoses.truth if diagnoses else None,
            maps.has_gaze if maps else None,
            limits,
            names,
        ),
        resamples=resamples,
        seed=seed,
    )


_SHOWN: tuple[QuantityKind, ...] = (
    "macro AUC",
    "CC",
    "flips",
    "sensitivity",
    "specificity",
    "Brier",
)
_OF_DIAGNOSES: tuple[QuantityKind, ...] = tuple(kind for kind in _SHOWN if kind != "CC")
_REMEDY = "keep more of the network in higher precision"


def _class_changes(
    diagnoses: Diagnoses, names: Sequence[str]
) -> list[tuple[int, ClassChange, Array]]:
    """Column, change of the AUC and its influence `(labelled films,)` of every class with one."""
    some = any_known(diagnoses.truth)
    parts = list(columns(diagnoses.truth[some]))
    changes = []
    for c in present_classes(diagnoses.truth):
        known, has = parts[c]
        (before, old), (after, new) = (
            auc_influence(scores[some, c][known], has)
            for scores in (diagnoses.reference.probabilities, diagnoses.candidate.probabilities)
        )
        change = ClassChange(
            name=names[c],
            films=int(has.sum()),
            reference=before,
            candidate=after,
            difference=after - before,
        )
        influence: Array = np.zeros(len(known))
        influence[known] = new - old
        changes.append((c, change, influence))
    return changes


def _macro_auc(
    diagnoses: Diagnoses,
    who: NDArray[np.str_],
    limit: float,
    changes: Sequence[tuple[int, ClassChange, Array]],
    names: Sequence[str],
    resamples: int,
    seed: int,
) -> Quantity:
    lack = lack_of_labels(who, diagnoses.truth, names)
    if not changes:
        return _not_measured("macro AUC", limit, lack)
    some = any_known(diagnoses.truth)
    truth, present = diagnoses.truth[some], [c for c, _, _ in changes]
    candidate, reference = (
        says.probabilities[some] for says in (diagnoses.candidate, diagnoses.reference)
    )
    before, after = (
        float(np.mean([getattr(change, side) for _, change, _ in changes]))
        for side in ("reference", "candidate")
    )

    def difference(weights: Array) -> Array:
        drawn = (weighted_aucs(p, truth, present, weights) for p in (candidate, reference))
        return np.asarray(np.subtract(*drawn).mean(axis=1))

    bounds = None
    if not lack:
        influence = np.mean([part for _, _, part in changes], axis=0)
        bounds = studentised(
            who[some].tolist(),
            after - before,
            influence,
            difference,
            resamples=resamples,
            seed=seed,
        )
    return _judged("macro AUC", before, after, bounds, limit, len(set(who[some])), lack)


def _cc(patients: Sequence[str], maps: Maps, limit: float, resamples: int, seed: int) -> Quantity:
    some = maps.has_gaze
    who = np.asarray(patients)[some]
    candidate, reference = maps.candidate[some], maps.reference[some]
    lack = lack_of_gaze(len(set(who)))
    if not len(who):
        return _not_measured("CC", limit, lack)
    changes = np.asarray(candidate - reference, dtype=np.float64)
    before, change = float(reference.mean()), float(changes.mean())
    bounds = None
    if not lack:
        bounds = studentised_mean(who.tolist(), changes, resamples=resamples, seed=seed)
    return _judged("CC", before, before + change, bounds, limit, len(set(who)), lack)


def _flips(
    paired: Paired, diagnoses: Diagnoses, flipped: NDArray[np.bool_], limit: float
) -> Quantity:
    if not diagnoses.decides.any():
        return _not_measured("flips", limit, "no finding has an operating point, so none decides")
    return judge_flips(_patients(paired, flipped), len(set(paired.patients)), limit)


def _by_class(
    diagnoses: Diagnoses, who: NDArray[np.str_], limits: Limits, names: Sequence[str]
) -> list[Quantity]:
    """Sensitivity and specificity of what is decided of each class, over its own patients.

    A patient who has the class is found where any of the films that have it is flagged; one with
    films that have it not is spared where none of those is.
    """
    quantities = []
    sides: tuple[tuple[QuantityKind, bool], ...] = (("sensitivity", True), ("specificity", False))
    for (kind, has), (c, name) in itertools.product(sides, enumerate(names)):
        limit = limits.of(kind)
        if not diagnoses.decides[c]:
            reason = f"{name} has no operating point"
            quantities.append(_not_measured(kind, limit, reason, name))
            continue
        films = diagnoses.truth[:, c] == (HAS if has else HAS_NOT)
        patients = len(set(who[films]))
        what = "have it" if has else "have a film without it"
        lack = f"{patients} patients {what}, expected {MIN_PATIENTS} or more; take a set with them"
        if patients < MIN_PATIENTS:
            quantities.append(_not_measured(kind, limit, f"of {name} {lack}", name))
            continue
        right = []
        for says in (diagnoses.reference, diagnoses.candidate):
            flagged = set(who[films & says.flags[:, c]])
            right.append(flagged if has else set(who[films]) - flagged)
        lost, gained = len(right[0] - right[1]), len(right[1] - right[0])
        loss = paired_shares(lost, gained, patients)
        bounds = Bounds(-loss.high, -loss.low, -loss.bound)
        before, after = (len(found) / patients for found in right)
        quantities.append(_judged(kind, before, after, bounds, limit, patients, "", name))
    return quantities


def _decision_changes(
    diagnoses: Diagnoses, who: NDArray[np.str_], names: Sequence[str]
) -> tuple[DecisionChange, ...]:
    """Patients in whom a decision changed, by class and direction."""
    before, after = diagnoses.reference.flags, diagnoses.candidate.flags
    return tuple(
        DecisionChange(
            name=name,
            raised=len(set(who[after[:, c] & ~before[:, c]])),
            dropped=len(set(who[before[:, c] & ~after[:, c]])),
        )
        for c, name in enumerate(names)
        if diagnoses.decides[c]
    )


def _brier(
    diagnoses: Diagnoses, who: NDArray[np.str_], limit: float, resamples: int, seed: int
) -> Quantity:
    """The rise of the mean Brier score over the films with a label."""
    some = any_known(diagnoses.truth)
    patients = who[some].tolist()
    lack = ""
    if len(set(patients)) < MIN_PATIENTS:
        lack = f"{len(set(patients))} patients have a label, expected {MIN_PATIENTS} or more"
    if not patients:
        return _not_measured("Brier", limit, "no film has a label; take a set with labels")
    before, after = (
        metrics.brier(
            says.probabilities[some], diagnoses.truth[some], exclusive=diagnoses.exclusive
        )
        for says in (diagnoses.reference, diagnoses.candidate)
    )
    changes = before - after  # below 0 where the candidate is worse: bounds are of a loss downwards
    change = float(changes.mean())
    bounds = None
    if not lack:
        found = studentised_mean(patients, changes, resamples=resamples, seed=seed)
        bounds = Bounds(-found.high, -found.low, -found.bound)
    start = float(before.mean())
    return _judged("Brier", start, start - change, bounds, limit, len(set(patients)), lack)


def judge_flips(count: int, patients: int, limit: float) -> Quantity:
    """The verdict on decisions that flip in `count` of so many patients.

    Raises:
        ValueError: as `clopper_pearson`.
    """
    bounds = clopper_pearson(count, patients)
    return _judged("flips", 0.0, count / patients, bounds, limit, patients, "")


def _judged(
    kind: QuantityKind,
    before: float,
    after: float,
    bounds: Bounds | None,
    limit: float,
    patients: int,
    lack: str,
    of: str = "",
) -> Quantity:
    """The verdict on a difference of so many patients.

    Args:
        lack: why there are no bounds.
        of: the class, of what is one's.
    """
    change, sign = after - before, losing(kind)
    quantity = Quantity(kind=kind, of=of, limit=limit, verdict="inconclusive", reason="")
    measured = f"{quantity.name} {shown(kind, change)} in {patients} patients"
    if bounds is None:
        verdict: GateOutcome = "inconclusive"
        reason = f"{measured}, no interval: {lack}"
    else:
        ends = (shown(kind, bounds.low), shown(kind, bounds.high))
        within = f"95 % bound {shown(kind, bounds.bound)}, limit {shown(kind, sign * limit)}"
        if sign * bounds.bound < limit:
            verdict, reason = "pass", f"{measured}, {within}"
        elif min(sign * bounds.low, sign * bounds.high) > limit:
            verdict = "fail"
            reason = (
                f"{measured}, 95 % interval {ends[0]} to {ends[1]}, limit "
                f"{shown(kind, sign * limit)}: {_REMEDY}"
            )
        else:
            verdict = "inconclusive"
            reason = f"{measured}, {within}: {_remedy(quantity, change, bounds, patients)}"
    return quantity.model_copy(
        update={
            "reference": before,
            "candidate": after,
            "difference": change,
            "low": bounds.low if bounds else None,
            "high": bounds.high if bounds else None,
            "bound": bounds.bound if bounds else None,
            "verdict": verdict,
            "reason": reason,
        }
    )


def _remedy(quantity: Quantity, change: float, bounds: Bounds, patients: int) -> str:
    """What to do where a bound is beyond its limit and the interval is not."""
    limit, loss = quantity.limit, losing(quantity.kind) * change
    if not limit:
        return NOTHING_SHOWN
    if loss >= limit:
        return f"the estimate is outside; {_REMEDY}, or take more patients"
    if quantity.kind == "flips":
        return f"take about {patients_for_flips(change, limit)} patients"
    width = abs(bounds.bound - change) / (limit - loss)
    # What nobody shows shrinks with the number of patients, all else with its root.
    power = 1 if not change else 2
    more = rounded_up(patients * width**power)
    who = f" who have {quantity.of}" if quantity.kind == "sensitivity" else ""
    return f"take about {more} patients{who}"


def _not_measured(kind: QuantityKind, limit: float, reason: str, of: str = "") -> Quantity:
    return Quantity(kind=kind, of=of, limit=limit, verdict="not_measured", reason=reason)


def _overall(quantities: Sequence[Quantity]) -> tuple[GateOutcome, str]:
    def of(verdict: str) -> list[Quantity]:
        return sorted((q for q in quantities if q.verdict == verdict), key=_excess, reverse=True)

    if failed := of("fail"):
        return "fail", failed[0].reason
    if missing := of("not_measured"):
        return "inconclusive", f"{missing[0].name} not measured: {missing[0].reason}"
    if unclear := of("inconclusive"):
        return "inconclusive", unclear[0].reason
    if not (passed := of("pass")):
        return "inconclusive", "nothing measured: nothing taught any output"
    return "pass", f"nearest to its limit: {passed[0].reason}"


def _excess(quantity: Quantity) -> float:
    """How far the bound is outside its limit, in limits; infinite where there is none."""
    if quantity.bound is None:
        return float("inf")
    loss = losing(quantity.kind) * quantity.bound
    return (loss - quantity.limit) / max(quantity.limit, 1e-9)


def _flipped(diagnoses: Diagnoses) -> NDArray[np.bool_]:
    """Films with another decision, `(n,)`; one that is not finite is another."""
    one, other = diagnoses.reference, diagnoses.candidate
    flags = ((one.flags != other.flags) & diagnoses.decides).any(axis=1)
    finite = [np.isfinite(says.probabilities).all(axis=1) for says in (one, other)]
    labels = (one.labels != other.labels).any(axis=1)
    return np.asarray(flags | labels | ~(finite[0] & finite[1]))


def _patients(paired: Paired, films: NDArray[np.bool_]) -> int:
    return len({p for p, some in zip(paired.patients, films, strict=True) if some})


def _broken_scores(diagnoses: Diagnoses) -> str:
    """Why the scores are no numbers, "" where they are."""
    for whose in ("candidate", "reference"):
        finite = np.isfinite(getattr(diagnoses, whose).probabilities).all(axis=1)
        if not finite.all():
            return _not_finite(f"{LOGITS} of the {whose}", int((~finite).sum()), len(finite))
    return ""


def _broken_cc(maps: Maps) -> str:
    """Why the candidate's CC are no numbers, "" where they are."""
    films = int((~np.isfinite(maps.candidate[maps.has_gaze])).sum())
    return _not_finite("CC of the candidate", films, len(maps.candidate)) if films else ""


def _not_finite(what: str, films: int, of: int) -> str:
    return f"{what} are not finite in {films} of {of} films: look for an overflow"
