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

Source: design.md section 7.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import ceil, exp, lgamma, log, log1p, sqrt
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cxrgaze.intervals import (
    LEVEL,
    MIN_PATIENTS,
    Array,
    PatientBootstrap,
    auc_influence,
    weighted_auc,
    weighted_mean,
)
from cxrgaze.metrics import present_classes
from cxrgaze.spec import LOG_DENSITY, LOGITS, Frozen

RESAMPLES = 2000
SEED = 0

RECOMMENDED_PATIENTS = 1500
RECOMMENDED_FILMS = 2700
"""A set of this size lets a candidate pass, at the default limits, that truly loses half of each.

Each quantity passes with probability 0.90 or more, if

- the least common class has 15 % of the films, AUCs are near 0.90 and the logits of candidate and
  reference correlate within a class at 0.99 or more,
- 1,000 of the patients have gaze and the change of a film's CC has a standard deviation of at most
  0.05, half of its variance between patients.

Flips ask for much more likeness: 6 % of such patients flip at a correlation of 0.99, 1 % at 0.9997.
A candidate that loses nothing takes a quarter of the patients for AUC and CC, and 149 for flips.
"""

Name = Literal["macro AUC", "CC", "flips"]
Outcome = Literal["pass", "fail", "inconclusive"]


class Limits(Frozen):
    """The most that a candidate may lose.

    A limit of 0 can be failed but never passed: no set shows that nothing at all is lost.
    """

    macro_auc: float = Field(default=0.005, ge=0, le=1)
    cc: float = Field(default=0.01, ge=0, le=2)
    """Of the mean CC to the human map."""
    flips: float = Field(default=0.02, ge=0, le=1)
    """Share of patients with another decision in any film."""


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


class Quantity(Frozen):
    """One gated quantity; numbers are None where they are not defined."""

    name: Name
    reference: float | None = None
    candidate: float | None = None
    difference: float | None = None
    """Candidate - reference; of flips the share of patients."""
    low: float | None = None
    """Two-sided 95 % interval of the difference."""
    high: float | None = None
    bound: float | None = None
    """One-sided 95 % bound of the difference: the lower one, of flips the upper one."""
    limit: float
    verdict: Literal["pass", "fail", "inconclusive", "not_measured"]
    reason: str

    @property
    def loss(self) -> float | None:
        """How much is lost, on the scale of the limit; below 0 where the candidate is better."""
        if self.difference is None:
            return None
        return self.difference if self.name == "flips" else -self.difference


class ClassChange(Frozen):
    """The AUC of one class against the rest; reported, not gated."""

    name: str
    films: int
    reference: float
    candidate: float
    difference: float


class Comparison(Frozen):
    """A candidate against its reference."""

    verdict: Outcome
    reason: str
    """One line: the quantity that decides, what was found, its limit, what to do."""
    films: int
    patients: int
    quantities: tuple[Quantity, ...]
    classes: tuple[ClassChange, ...]
    """Classes that some but not all of the labelled films have."""
    flipped_films: int
    flipped_patients: int
    worst_film: int | None
    """Index of the film that loses most CC."""
    worst_cc_loss: float | None
    can_show: tuple[str, ...]
    """What a set of this size can show at all (`can_show`)."""
    resamples: int
    seed: int

    @staticmethod
    def header() -> tuple[str, ...]:
        """Titles of the columns of `rows`."""
        return (
            "quantity",
            "reference",
            "candidate",
            "difference",
            "95 % interval",
            "95 % bound",
            "limit",
            "verdict",
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A table of all figures, the gated ones first."""
        rows = [_row(quantity) for quantity in self.quantities]
        for c in self.classes:
            values = (f"{c.reference:.4f}", f"{c.candidate:.4f}", f"{c.difference:+.4f}")
            rows.append((f"AUC of {c.name} ({c.films} films)", *values, "", "", "", "reported"))
        flipped = f"{self.flipped_films} of {self.films}"
        rows.append(("films with a flip", "", flipped, "", "", "", "", "reported"))
        if self.worst_film is not None and self.worst_cc_loss is not None:
            change = f"{-self.worst_cc_loss:+.4f}"
            name = f"CC of the worst film (index {self.worst_film})"
            rows.append((name, "", "", change, "", "", "", "reported"))
        return rows


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
    names = tuple(classes) or _numbered(np.shape(paired.reference_logits)[1])
    if len(names) != np.shape(paired.reference_logits)[1]:
        raise ValueError(f"expected a name for each column of the logits, found {names}")
    broken = {LOGITS: _broken_logits(paired), LOG_DENSITY: _broken_cc(paired)}
    changes = [] if broken[LOGITS] else _class_changes(paired, names)
    flipped = _flipped(paired)
    measures: dict[Name, tuple[float, Callable[[float], Quantity]]] = {
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
        if reason := broken[_HEAD[name]]:
            quantities.append(Quantity(name=name, limit=limit, verdict="fail", reason=reason))
        elif _HEAD[name] in untrained:
            reason = f"nothing taught the output {_HEAD[name]}"
            quantities.append(_not_measured(name, limit, reason))
        else:
            quantities.append(measure(limit))
    verdict, reason = _overall(quantities, untrained)
    loss = np.where(paired.has_gaze, paired.reference_cc - paired.candidate_cc, np.nan)
    loss[~np.isfinite(loss)] = np.nan
    worst = int(np.nanargmax(loss)) if np.isfinite(loss).any() else None
    return Comparison(
        verdict=verdict,
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


def can_show(
    patients: Sequence[str],
    labels: NDArray[np.integer],
    has_gaze: NDArray[np.bool_],
    limits: Limits | None = None,
    untrained: Collection[str] = (),
    classes: Sequence[str] = (),
) -> tuple[str, ...]:
    """What a set can show at all, whatever the candidate: a sentence for each quantity.

    Args:
        patients: patient of each film, `(n,)`.
        labels: `(n,)`, -1 where it is not known. has_gaze: `(n,)`.
        untrained, classes: as in `compare`.
    """
    limits = limits or Limits()
    who, labels = np.asarray(patients), np.asarray(labels)
    lines = []
    if LOGITS not in untrained:
        names = tuple(classes) or _numbered(int(labels.max()) + 1)
        lack = _lack_of_labels(who, labels, names)
        known = len(set(who[labels >= 0]))
        lines.append(f"macro AUC: {lack or _enough(known, RECOMMENDED_PATIENTS)}")
    if LOG_DENSITY not in untrained:
        known = len(set(who[np.asarray(has_gaze, dtype=bool)]))
        lines.append(f"CC: {_lack_of_gaze(known) or _enough(known, _RECOMMENDED_GAZE)}")
    if LOGITS not in untrained:
        lines.append(f"flips: {_what_flips_can_show(len(set(who)), limits.flips)}")
    return tuple(lines)


def patients_to_show(limit: float) -> int:
    """The smallest number of patients of whom no flip at all excludes a share of `limit`.

    149 for 2 %: 0.98^149 < 0.05.

    Raises:
        ValueError: a limit that no number excludes.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"no number of patients excludes a share of {limit}; expected (0, 1]")
    patients = 1 if limit == 1 else max(ceil(log(1 - LEVEL) / log1p(-limit)), 1)
    return patients if clopper_pearson(0, patients).bound < limit else patients + 1


class Bounds(NamedTuple):
    """Bounds of an estimate at 95 %."""

    low: float
    high: float
    """Two-sided."""
    bound: float
    """One-sided, on the side of the loss."""


def clopper_pearson(count: int, total: int) -> Bounds:
    """Exact interval of a share, `count` of `total`, and its upper bound.

    Source: Clopper & Pearson, Biometrika 26 (1934) 404.

    Raises:
        ValueError: not 0 <= count <= total, or a total of 0.
    """
    if not 0 <= count <= total or not total:
        raise ValueError(f"expected a count in 0 to a total above 0, found {count} of {total}")

    def upper(level: float) -> float:
        return _beta_quantile(level, count + 1, total - count) if count < total else 1.0

    tail = (1 - LEVEL) / 2
    low = _beta_quantile(tail, count, total - count + 1) if count else 0.0
    return Bounds(low, upper(1 - tail), upper(LEVEL))


def studentised(
    patients: Sequence[str],
    value: float,
    influence: Array,
    statistic: Callable[[Array], Array],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Bounds:
    """Interval of a statistic by the studentised bootstrap over patients, and its lower bound.

    Each resample's (statistic - value) is divided by its own standard error, from the influence
    summed by patient. Where k < `MIN_PATIENTS`, Student's t with k - 1 (at least 1) degrees of
    freedom and Johnson's shift for skewness; k is the number of patients who carry the variance,
    (sum p^2)^2 / sum p^4 over their parts p. No width where no patient has a part.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 12.5; Johnson,
    J. Am. Stat. Assoc. 73 (1978) 536, whose quadratic term is taken at the normal quantile.

    Args:
        patients: patient of each film, `(n,)`.
        value: the statistic of all films.
        influence: each film's part in the error, `(n,)`, as `auc_influence` gives it.
        statistic: takes weights `(b, n)` and returns `(b,)`; NaN where it is not defined.
    """
    _, first, cluster = np.unique(np.asarray(patients), return_index=True, return_inverse=True)
    parts = np.bincount(cluster, influence)
    count = len(parts)
    squares = float((parts**2).sum())
    if not squares > 0:
        return Bounds(value, value, value)
    error = sqrt(squares * count / (count - 1))
    levels = ((1 + LEVEL) / 2, (1 - LEVEL) / 2, LEVEL)
    carriers = squares**2 / float((parts**4).sum())
    if carriers < MIN_PATIENTS:
        skewness = float((parts**3).sum()) / squares**1.5

        def pivot(level: float) -> float:
            shift = skewness * (1 + 2 * NormalDist().inv_cdf(level) ** 2) / 6
            return _t_quantile(level, max(carriers - 1, 1)) - float(shift)

        return Bounds(*(value - error * pivot(level) for level in levels))

    moments = np.stack([parts, parts**2], axis=1)

    def pivots(weights: Array) -> Array:
        total, square = (weights[:, first] @ moments).T
        own = np.sqrt(np.maximum(square - total**2 / count, 0) * count / (count - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array = np.asarray((statistic(weights) - value) / own)
        return found

    drawn = PatientBootstrap(patients, resamples, seed).draws(pivots)
    known = np.clip(drawn[~np.isnan(drawn)], -_FAR, _FAR)
    quantiles = np.quantile(known, levels, method="weibull")  # of b + 1, as for a pivot
    return Bounds(*(float(value - error * q) for q in quantiles))


_FAR = 1e6  # a pivot whose resample has no error
_RECOMMENDED_GAZE = 1000


_REMEDY = "keep more of the network in higher precision"
_NOTHING = "a limit of 0 cannot be shown"
_HEAD = {"macro AUC": LOGITS, "CC": LOG_DENSITY, "flips": LOGITS}


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(f"class {c}" for c in range(classes))


def _class_changes(paired: Paired, names: Sequence[str]) -> list[tuple[int, ClassChange, Array]]:
    """Column, change of the AUC and its influence `(labelled films,)` of every class with one."""
    known = np.asarray(paired.labels) >= 0
    labels = np.asarray(paired.labels)[known]
    changes = []
    for c in present_classes(labels, len(names)):
        (before, old), (after, new) = (
            auc_influence(scores[known, c], labels == c)
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
    lack = _lack_of_labels(who, labels, names)
    if not changes:
        return _not_measured("macro AUC", limit, lack)
    known = labels >= 0
    before, after = (
        float(np.mean([getattr(change, side) for _, change, _ in changes]))
        for side in ("reference", "candidate")
    )

    def difference(weights: Array) -> Array:
        differences = [
            weighted_auc(paired.candidate_logits[known, c], labels[known] == c, weights)
            - weighted_auc(paired.reference_logits[known, c], labels[known] == c, weights)
            for c, _, _ in changes
        ]
        return np.asarray(np.mean(differences, axis=0))

    bounds = None
    if not lack:
        influence = np.mean([part for _, _, part in changes], axis=0)
        bounds = studentised(
            who[known].tolist(),
            after - before,
            influence,
            difference,
            resamples=resamples,
            seed=seed,
        )
    return _judged("macro AUC", before, after, bounds, limit, len(set(who[known])), lack)


def _cc(paired: Paired, limit: float, resamples: int, seed: int) -> Quantity:
    some = paired.has_gaze
    who = np.asarray(paired.patients)[some]
    candidate, reference = paired.candidate_cc[some], paired.reference_cc[some]
    lack = _lack_of_gaze(len(set(who)))
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
    name: Name,
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
    found = f"{name} {_shown(name, change)} in {patients} patients"
    if bounds is None:
        verdict: Outcome = "inconclusive"
        reason = f"{found}, no interval: {lack}"
    else:
        ends = (_shown(name, bounds.low), _shown(name, bounds.high))
        within = f"95 % bound {_shown(name, bounds.bound)}, limit {_shown(name, sign * limit)}"
        if sign * bounds.bound < limit:
            verdict, reason = "pass", f"{found}, {within}"
        elif min(sign * bounds.low, sign * bounds.high) > limit:
            verdict = "fail"
            reason = (
                f"{found}, 95 % interval {ends[0]} to {ends[1]}, limit "
                f"{_shown(name, sign * limit)}: {_REMEDY}"
            )
        else:
            verdict = "inconclusive"
            if not limit:
                remedy = _NOTHING
            elif sign * change >= limit:
                remedy = f"the estimate is outside; {_REMEDY}, or take more patients"
            elif name == "flips":
                remedy = f"take about {_patients_for_flips(change, limit)} patients"
            else:
                ratio = (change - bounds.bound) / (change + limit)
                remedy = f"take about {_rounded(patients * ratio**2)} patients"
            reason = f"{found}, {within}: {remedy}"
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


def _patients_for_flips(share: float, limit: float) -> int:
    """About how many patients show that a share is below the limit."""
    if not share:
        return patients_to_show(limit)
    normal = NormalDist().inv_cdf(LEVEL) ** 2 * limit * (1 - limit) / (limit - share) ** 2
    many = max(patients_to_show(limit), ceil(normal))
    while clopper_pearson(ceil(share * many), many).bound >= limit:
        many = ceil(many * 1.1)
    return _rounded(many)


def _rounded(patients: float) -> int:
    """Up to two digits."""
    step = int(10 ** max(len(str(ceil(patients))) - 2, 0))
    return ceil(patients / step) * step


def _not_measured(name: Name, limit: float, reason: str) -> Quantity:
    return Quantity(name=name, limit=limit, verdict="not_measured", reason=reason)


def _overall(quantities: Sequence[Quantity], untrained: Collection[str]) -> tuple[Outcome, str]:
    def of(verdict: str) -> list[Quantity]:
        return sorted((q for q in quantities if q.verdict == verdict), key=_excess, reverse=True)

    if failed := of("fail"):
        return "fail", failed[0].reason
    if missing := [q for q in of("not_measured") if _HEAD[q.name] not in untrained]:
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


def _shown(name: Name, value: float, signed: bool = True) -> str:
    if name == "flips":
        return _percent(value)
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _row(quantity: Quantity) -> tuple[str, ...]:
    """One row of `Comparison.rows`."""

    def shown(value: float | None, signed: bool = True) -> str:
        return "" if value is None else _shown(quantity.name, value, signed)

    flips = quantity.name == "flips"
    low, high = shown(quantity.low), shown(quantity.high)
    return (
        "flips, share of patients" if flips else quantity.name,
        shown(quantity.reference, signed=False),
        shown(quantity.candidate, signed=False),
        shown(quantity.difference),
        f"{low} to {high}" if low else "",
        shown(quantity.bound),
        shown(quantity.limit if flips else -quantity.limit),
        quantity.verdict.replace("_", " "),
    )


def _lack_of_labels(
    who: NDArray[np.str_], labels: NDArray[np.integer], names: Sequence[str]
) -> str:
    """Why labels give no interval of the macro AUC, "" where they do."""
    known = labels >= 0
    if not known.any():
        return "no film has a label; take a set with labels"
    present = present_classes(labels[known], len(names))
    if not present:
        return f"all {int(known.sum())} labelled films are of one class; take a set with others"
    fewest = {
        c: min(len(set(who[known & some])) for some in (labels == c, labels != c)) for c in present
    }
    scarce = min(present, key=lambda c: fewest[c])
    if fewest[scarce] >= MIN_PATIENTS:
        return ""
    return (
        f"{names[scarce]} against the rest has films of {fewest[scarce]} patients on one side, "
        f"expected {MIN_PATIENTS} or more"
    )


def _lack_of_gaze(patients: int) -> str:
    """Why so many patients with gaze give no interval of the CC, "" where they do."""
    if not patients:
        return "no film has gaze; take a set with gaze"
    if patients < MIN_PATIENTS:
        return f"{patients} patients have gaze, expected {MIN_PATIENTS} or more"
    return ""


def _enough(patients: int, recommended: int) -> str:
    if patients >= recommended:
        return f"{patients} patients, recommended are {recommended} at the default limits"
    return (
        f"{patients} patients, fewer than the {recommended} recommended at the default limits: a "
        "loss of half a limit may stay inconclusive"
    )


def _what_flips_can_show(patients: int, limit: float) -> str:
    if not limit:
        return _NOTHING
    needed = patients_to_show(limit)
    if patients < needed:
        return (
            f"with {patients} patients even zero flips cannot exclude {_percent(limit)}: "
            f"{needed} can"
        )
    passing = bisect_left(
        range(patients + 1), True, key=lambda k: clopper_pearson(k, patients).bound >= limit
    )
    return (
        f"up to {passing - 1} of {patients} patients may flip and exclude {_percent(limit)} still"
    )


def _beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by Lentz's continued fraction.

    Source: Press et al., Numerical Recipes, 3rd edition (2007), section 6.4.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction, m = d, 0
    while True:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = 1.0
        for term in (even, odd):
            c, d = (1 + term / c) or tiny, 1 / ((1 + term * d) or tiny)
            step = c * d
            fraction *= step
        if abs(step - 1) < 1e-15 or m > 100_000:
            break
    front = lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)
    return exp(front) * fraction / a


def _beta_quantile(level: float, a: float, b: float) -> float:
    """The inverse of `_beta_cdf`, by bisection."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _beta_cdf(middle, a, b) < level else (low, middle)
    return middle


def _t_quantile(level: float, freedom: float) -> float:
    """The quantile of Student's t with `freedom` (not only whole) degrees of freedom."""
    x = _beta_quantile(2 * min(level, 1 - level), freedom / 2, 0.5)
    return (1 if level > 0.5 else -1) * sqrt(freedom * (1 / x - 1))
