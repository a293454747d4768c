"""Does a low-precision network lose accuracy? Paired differences on the same films, with a verdict.

Three quantities, candidate minus reference: macro AUC, mean CC to the human map, and the share of
patients whose decision flips. Patients are drawn, not films: films of one patient are alike, and
the same draw serves candidate and reference. A quantity passes where its one-sided 95 % bound is
inside the limit, and fails where its whole two-sided 95 % interval is outside.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.verdicts import (
    ClassChange,
    Comparison,
    GateOutcome,
    Limits,
    Quantity,
    QuantityName,
    shown,
)
from cxrgaze.evidence.bounds import RESAMPLES, SEED, Bounds, clopper_pearson, studentised
from cxrgaze.evidence.intervals import (
    Array,
    auc_influence,
    weighted_auc,
    weighted_mean,
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
from cxrgaze.evidence.truth import Truth, any_known, columns, present_classes
from cxrgaze.spec import LOGITS


def largest(scores: Array) -> NDArray[np.int64]:
    """The column of the largest score of each film, `(n, 1)`: what exclusive classes decide."""
    return np.asarray(scores.argmax(axis=1))[:, None]


@dataclass(frozen=True)
class Diagnoses:
    """What candidate and reference say of the classes of n films.

    Raises:
        ValueError: lengths that differ, or no classes.
    """

    truth: Truth
    """`(n, C)` (`cxrgaze.evidence.truth`)."""
    reference: Array
    """Scores `(n, C)`: probabilities, or any monotone function of them."""
    candidate: Array
    decide: Callable[[Array], NDArray[Any]] = largest
    """What is decided of films by their scores, `(n, D)`; D is 0 where nothing is."""

    def __post_init__(self) -> None:
        shapes = {np.shape(v) for v in (self.truth, self.reference, self.candidate)}
        (shape, *others) = shapes
        if others or len(shape) != 2 or 0 in shape:
            raise ValueError(f"expected truth and scores of one shape (n, C), found {shapes}")
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
    flipped = None
    names: tuple[str, ...] = ()
    if diagnoses:
        names = tuple(classes) or numbered(np.shape(diagnoses.reference)[1])
        if len(names) != np.shape(diagnoses.reference)[1]:
            raise ValueError(f"expected a name for each column of the scores, found {names}")
        flipped = _flipped(diagnoses)
        if reason := _broken_scores(diagnoses):
            quantities += _failed(("macro AUC", "flips"), limits, reason)
        else:
            who = np.asarray(paired.patients)
            changes = _class_changes(diagnoses, names)
            auc = _macro_auc(diagnoses, who, limits.macro_auc, changes, names, resamples, seed)
            quantities += [auc, _flips(paired, diagnoses, flipped, limits.flips)]
    loss = None
    if maps:
        loss = np.where(maps.has_gaze, maps.reference - maps.candidate, np.nan)
        loss[~np.isfinite(loss)] = np.nan
        if reason := _broken_cc(maps):
            quantities += _failed(("CC",), limits, reason)
        else:
            quantities.append(_cc(paired.patients, maps, limits.cc, resamples, seed))
    quantities.sort(key=lambda quantity: _SHOWN.index(quantity.name))
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


_SHOWN: tuple[QuantityName, ...] = ("macro AUC", "CC", "flips")
_REMEDY = "keep more of the network in higher precision"


def _failed(names: Sequence[QuantityName], limits: Limits, reason: str) -> list[Quantity]:
    of = {"macro AUC": limits.macro_auc, "CC": limits.cc, "flips": limits.flips}
    return [Quantity(name=n, limit=of[n], verdict="fail", reason=reason) for n in names]


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
            for scores in (diagnoses.reference, diagnoses.candidate)
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
    parts = list(columns(diagnoses.truth[some]))
    before, after = (
        float(np.mean([getattr(change, side) for _, change, _ in changes]))
        for side in ("reference", "candidate")
    )

    def difference(weights: Array) -> Array:
        differences = []
        for c, _, _ in changes:
            known, has = parts[c]
            candidate, reference = (
                weighted_auc(scores[some, c][known], has, weights[:, known])
                for scores in (diagnoses.candidate, diagnoses.reference)
            )
            differences.append(candidate - reference)
        return np.asarray(np.mean(differences, axis=0))

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
        bounds = studentised(
            who.tolist(),
            change,
            (changes - change) / len(changes),
            lambda weights: weighted_mean(changes, weights),
            resamples=resamples,
            seed=seed,
        )
    return _judged("CC", before, before + change, bounds, limit, len(set(who)), lack)


def _flips(
    paired: Paired, diagnoses: Diagnoses, flipped: NDArray[np.bool_], limit: float
) -> Quantity:
    if not diagnoses.decide(diagnoses.reference).shape[1]:
        return _not_measured("flips", limit, "no finding has an operating point, so none decides")
    return judge_flips(_patients(paired, flipped), len(set(paired.patients)), limit)


def judge_flips(count: int, patients: int, limit: float) -> Quantity:
    """The verdict on decisions that flip in `count` of so many patients.

    Raises:
        ValueError: as `clopper_pearson`.
    """
    bounds = clopper_pearson(count, patients)
    return _judged("flips", 0.0, count / patients, bounds, limit, patients, "")


def _judged(
    name: QuantityName,
    before: float,
    after: float,
    bounds: Bounds | None,
    limit: float,
    patients: int,
    lack: str,
) -> Quantity:
    """The verdict on a difference of so many patients.

    Args:
        lack: why there are no bounds.
    """
    change = after - before
    sign = 1 if name == "flips" else -1  # which way a loss goes
    measured = f"{name} {shown(name, change)} in {patients} patients"
    if bounds is None:
        verdict: GateOutcome = "inconclusive"
        reason = f"{measured}, no interval: {lack}"
    else:
        ends = (shown(name, bounds.low), shown(name, bounds.high))
        within = f"95 % bound {shown(name, bounds.bound)}, limit {shown(name, sign * limit)}"
        if sign * bounds.bound < limit:
            verdict, reason = "pass", f"{measured}, {within}"
        elif min(sign * bounds.low, sign * bounds.high) > limit:
            verdict = "fail"
            reason = (
                f"{measured}, 95 % interval {ends[0]} to {ends[1]}, limit "
                f"{shown(name, sign * limit)}: {_REMEDY}"
            )
        else:
            verdict = "inconclusive"
            if not limit:
                remedy = NOTHING_SHOWN
            elif sign * change >= limit:
                remedy = f"the estimate is outside; {_REMEDY}, or take more patients"
            elif name == "flips":
                remedy = f"take about {patients_for_flips(change, limit)} patients"
            else:
                ratio = (change - bounds.bound) / (change + limit)
                remedy = f"take about {rounded_up(patients * ratio**2)} patients"
            reason = f"{measured}, {within}: {remedy}"
    return Quantity(
        name=name,
        reference=before,
        candidate=after,
        difference=change,
        low=bounds.low if bounds else None,
        high=bounds.high if bounds else None,
        bound=bounds.bound if bounds else None,
        limit=limit,
        verdict=verdict,
        reason=reason,
    )


def _not_measured(name: QuantityName, limit: float, reason: str) -> Quantity:
    return Quantity(name=name, limit=limit, verdict="not_measured", reason=reason)


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
    loss = quantity.bound if quantity.name == "flips" else -quantity.bound
    return (loss - quantity.limit) / max(quantity.limit, 1e-9)


def _flipped(diagnoses: Diagnoses) -> NDArray[np.bool_]:
    """Films with another decision, `(n,)`; one that is not finite is another."""
    reference, candidate = diagnoses.reference, diagnoses.candidate
    finite = np.isfinite(reference).all(axis=1) & np.isfinite(candidate).all(axis=1)
    other = (diagnoses.decide(reference) != diagnoses.decide(candidate)).any(axis=1)
    return np.asarray(other | ~finite)


def _patients(paired: Paired, films: NDArray[np.bool_]) -> int:
    return len({p for p, some in zip(paired.patients, films, strict=True) if some})


def _broken_scores(diagnoses: Diagnoses) -> str:
    """Why the scores are no numbers, "" where they are."""
    for whose in ("candidate", "reference"):
        finite = np.isfinite(getattr(diagnoses, whose)).all(axis=1)
        if not finite.all():
            return _not_finite(f"{LOGITS} of the {whose}", int((~finite).sum()), len(finite))
    return ""


def _broken_cc(maps: Maps) -> str:
    """Why the candidate's CC are no numbers, "" where they are."""
    films = int((~np.isfinite(maps.candidate[maps.has_gaze])).sum())
    return _not_finite("CC of the candidate", films, len(maps.candidate)) if films else ""


def _not_finite(what: str, films: int, of: int) -> str:
    return f"{what} are not finite in {films} of {of} films: look for an overflow"
