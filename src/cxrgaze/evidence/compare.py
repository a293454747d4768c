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

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.verdicts import (
    HEAD_OF,
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
from cxrgaze.evidence.metrics import present_classes
from cxrgaze.evidence.power import (
    NOTHING_SHOWN,
    can_show,
    lack_of_gaze,
    lack_of_labels,
    numbered,
    patients_for_flips,
    rounded_up,
)
from cxrgaze.spec import LOG_DENSITY, LOGITS


@dataclass(frozen=True)
class Paired:
    """What candidate and reference said of the same n films.

    Raises:
        ValueError: lengths that differ, no films, or a label that is no class.
    """

    patients: Sequence[str]
    """Patient of each film, `(n,)`."""
    labels: NDArray[np.integer]
    """Class of each film, `(n,)`; -1 where it is not known."""
    reference_logits: Array
    """`(n, C)`, or any monotone score of it, such as probabilities."""
    candidate_logits: Array
    reference_cc: Array
    """CC to the human map, `(n,)`; NaN where a film has no gaze."""
    candidate_cc: Array

    def __post_init__(self) -> None:
        n = len(self.patients)
        shapes = [np.shape(v) for v in (self.labels, self.reference_cc, self.candidate_cc)]
        scores = {np.shape(self.reference_logits), np.shape(self.candidate_logits)}
        if not n or any(shape != (n,) for shape in shapes) or len(scores) > 1:
            raise ValueError(f"expected outputs of the same n > 0 films, found {n}, {shapes}")
        (shape,) = scores
        if len(shape) != 2 or shape[0] != n or shape[1] < 2:
            raise ValueError(f"expected logits ({n}, C) with C > 1, found {shape}")
        low, high = int(np.min(self.labels)), int(np.max(self.labels))
        if low < -1 or high >= shape[1]:
            raise ValueError(f"expected labels in -1 to {shape[1] - 1}, found {low} to {high}")

    @property
    def has_gaze(self) -> NDArray[np.bool_]:
        """Films whose reference has a CC, `(n,)`."""
        return np.isfinite(self.reference_cc)


def compare(
    paired: Paired,
    limits: Limits | None = None,
    *,
    untrained: Collection[str] = (),
    classes: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """The verdict on a candidate.

    Overall *fail* if any quantity fails; *pass* if every quantity of a taught head passes, and
    there is one of accuracy among them; else *inconclusive*. So a set without gaze cannot pass a
    network with a taught saliency head. Outputs that are not finite fail, taught or not.

    Args:
        limits: None for the defaults.
        untrained: heads that nothing taught (`Manifest.untrained`), which cannot lose anything.
        classes: names of the columns of the logits, for the report.

    Raises:
        ValueError: another number of names than of columns.
    """
    limits = limits or Limits()
    patients = len(set(paired.patients))
    names = tuple(classes) or numbered(np.shape(paired.reference_logits)[1])
    if len(names) != np.shape(paired.reference_logits)[1]:
        raise ValueError(f"expected a name for each column of the logits, found {names}")
    broken = {LOGITS: _broken_logits(paired), LOG_DENSITY: _broken_cc(paired)}
    changes = [] if broken[LOGITS] else _class_changes(paired, names)
    flipped = _flipped(paired)
    measures: dict[QuantityName, tuple[float, Callable[[float], Quantity]]] = {
        "macro AUC": (
            limits.macro_auc,
            lambda limit: _macro_auc(paired, limit, changes, names, resamples, seed),
        ),
        "CC": (limits.cc, lambda limit: _cc(paired, limit, resamples, seed)),
        "flips": (
            limits.flips,
            lambda limit: judge_flips(_patients(paired, flipped), patients, limit),
        ),
    }
    quantities = []
    for name, (limit, measure) in measures.items():
        head = HEAD_OF[name]
        if reason := broken[head]:
            quantities.append(Quantity(name=name, limit=limit, verdict="fail", reason=reason))
        elif head in untrained:
            reason = f"nothing taught the output {head}"
            quantities.append(_not_measured(name, limit, reason))
        else:
            quantities.append(measure(limit))
    verdict, reason = _overall(quantities, untrained)
    loss = np.where(paired.has_gaze, paired.reference_cc - paired.candidate_cc, np.nan)
    loss[~np.isfinite(loss)] = np.nan
    worst = int(np.nanargmax(loss)) if np.isfinite(loss).any() else None
    return Comparison(
        verdict=verdict,
        limits=limits,
        reason=reason,
        films=len(paired.patients),
        patients=patients,
        quantities=tuple(quantities),
        classes=tuple(change for _, change, _ in changes),
        flipped_films=int(flipped.sum()),
        flipped_patients=_patients(paired, flipped),
        worst_film=worst,
        worst_cc_loss=None if worst is None else float(loss[worst]),
        can_show=can_show(
            paired.patients, paired.labels, paired.has_gaze, limits, untrained, names
        ),
        resamples=resamples,
        seed=seed,
    )


_REMEDY = "keep more of the network in higher precision"


def _class_changes(paired: Paired, names: Sequence[str]) -> list[tuple[int, ClassChange, Array]]:
    """Column, change of the AUC and its influence `(labelled films,)` of every class with one."""
    labelled = np.asarray(paired.labels) >= 0
    labels = np.asarray(paired.labels)[labelled]
    changes = []
    for c in present_classes(labels, len(names)):
        (before, old), (after, new) = (
            auc_influence(scores[labelled, c], labels == c)
            for scores in (paired.reference_logits, paired.candidate_logits)
        )
        change = ClassChange(
            name=names[c],
            films=int((labels == c).sum()),
            reference=before,
            candidate=after,
            difference=after - before,
        )
        changes.append((c, change, new - old))
    return changes


def _macro_auc(
    paired: Paired,
    limit: float,
    changes: Sequence[tuple[int, ClassChange, Array]],
    names: Sequence[str],
    resamples: int,
    seed: int,
) -> Quantity:
    labels, who = np.asarray(paired.labels), np.asarray(paired.patients)
    lack = lack_of_labels(who, labels, names)
    if not changes:
        return _not_measured("macro AUC", limit, lack)
    labelled = labels >= 0
    before, after = (
        float(np.mean([getattr(change, side) for _, change, _ in changes]))
        for side in ("reference", "candidate")
    )

    def difference(weights: Array) -> Array:
        differences = [
            weighted_auc(paired.candidate_logits[labelled, c], labels[labelled] == c, weights)
            - weighted_auc(paired.reference_logits[labelled, c], labels[labelled] == c, weights)
            for c, _, _ in changes
        ]
        return np.asarray(np.mean(differences, axis=0))

    bounds = None
    if not lack:
        influence = np.mean([part for _, _, part in changes], axis=0)
        bounds = studentised(
            who[labelled].tolist(),
            after - before,
            influence,
            difference,
            resamples=resamples,
            seed=seed,
        )
    return _judged("macro AUC", before, after, bounds, limit, len(set(who[labelled])), lack)


def _cc(paired: Paired, limit: float, resamples: int, seed: int) -> Quantity:
    some = paired.has_gaze
    who = np.asarray(paired.patients)[some]
    candidate, reference = paired.candidate_cc[some], paired.reference_cc[some]
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


def _overall(quantities: Sequence[Quantity], untrained: Collection[str]) -> tuple[GateOutcome, str]:
    def of(verdict: str) -> list[Quantity]:
        return sorted((q for q in quantities if q.verdict == verdict), key=_excess, reverse=True)

    if failed := of("fail"):
        return "fail", failed[0].reason
    if missing := [q for q in of("not_measured") if q.head not in untrained]:
        return "inconclusive", f"{missing[0].name} not measured: {missing[0].reason}"
    if unclear := of("inconclusive"):
        return "inconclusive", unclear[0].reason
    if not (passed := of("pass")):
        return "inconclusive", "nothing measured: nothing taught either output"
    return "pass", f"nearest to its limit: {passed[0].reason}"


def _excess(quantity: Quantity) -> float:
    """How far the bound is outside its limit, in limits; infinite where there is none."""
    if quantity.bound is None:
        return float("inf")
    loss = quantity.bound if quantity.name == "flips" else -quantity.bound
    return (loss - quantity.limit) / max(quantity.limit, 1e-9)


def _flipped(paired: Paired) -> NDArray[np.bool_]:
    """Films with another decision, `(n,)`; one that is not finite is another."""
    reference, candidate = paired.reference_logits, paired.candidate_logits
    finite = np.isfinite(reference).all(axis=1) & np.isfinite(candidate).all(axis=1)
    return np.asarray((reference.argmax(axis=1) != candidate.argmax(axis=1)) | ~finite)


def _patients(paired: Paired, films: NDArray[np.bool_]) -> int:
    return len({p for p, some in zip(paired.patients, films, strict=True) if some})


def _broken_logits(paired: Paired) -> str:
    """Why the logits are no numbers, "" where they are."""
    for whose in ("candidate", "reference"):
        finite = np.isfinite(getattr(paired, f"{whose}_logits")).all(axis=1)
        if not finite.all():
            return _not_finite(f"logits of the {whose}", int((~finite).sum()), len(finite))
    return ""


def _broken_cc(paired: Paired) -> str:
    """Why the candidate's CC are no numbers, "" where they are."""
    films = int((~np.isfinite(paired.candidate_cc[paired.has_gaze])).sum())
    return _not_finite("CC of the candidate", films, len(paired.patients)) if films else ""


def _not_finite(what: str, films: int, of: int) -> str:
    return f"{what} are not finite in {films} of {of} films: look for an overflow"
