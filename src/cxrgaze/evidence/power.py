"""What a labelled set can show at all, whatever the candidate."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import ceil, log, log1p
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.verdicts import Limits, percent
from cxrgaze.evidence.bounds import clopper_pearson
from cxrgaze.evidence.intervals import (
    LEVEL,
    MIN_PATIENTS,
)
from cxrgaze.evidence.truth import (
    HAS,
    HAS_NOT,
    Truth,
    any_known,
    columns,
    present_classes,
)

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


def can_show(
    patients: Sequence[str],
    truth: Truth | None,
    has_gaze: NDArray[np.bool_] | None,
    limits: Limits | None = None,
    classes: Sequence[str] = (),
) -> tuple[str, ...]:
    """What a set can show at all, whatever the candidate: a sentence for each quantity.

    Args:
        patients: patient of each film, `(n,)`.
        truth: `(n, C)`; None where there is no diagnosis to judge.
        has_gaze: `(n,)`; None where there is no map to judge.
        classes: as in `compare`.
    """
    limits = limits or Limits()
    who = np.asarray(patients)
    lines = []
    if truth is not None:
        lack = lack_of_labels(who, truth, tuple(classes) or numbered(truth.shape[1]))
        informative = len(set(who[any_known(truth)]))
        lines.append(f"macro AUC: {lack or _enough(informative, RECOMMENDED_PATIENTS)}")
    if has_gaze is not None:
        informative = len(set(who[np.asarray(has_gaze, dtype=bool)]))
        lines.append(f"CC: {lack_of_gaze(informative) or _enough(informative, _RECOMMENDED_GAZE)}")
    if truth is not None:
        lines.append(f"flips: {_what_flips_can_show(len(set(who)), limits.flips)}")
        names = tuple(classes) or numbered(truth.shape[1])
        lines += _what_classes_can_show(who, truth, names, limits)
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


_RECOMMENDED_GAZE = 1000


NOTHING_SHOWN = "a limit of 0 cannot be shown"


def numbered(classes: int) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(f"class {c}" for c in range(classes))


def patients_for_flips(share: float, limit: float) -> int:
    """About how many patients show that a share is below the limit."""
    if not share:
        return patients_to_show(limit)
    normal = NormalDist().inv_cdf(LEVEL) ** 2 * limit * (1 - limit) / (limit - share) ** 2
    many = max(patients_to_show(limit), ceil(normal))
    while clopper_pearson(ceil(share * many), many).bound >= limit:
        many = ceil(many * 1.1)
    return rounded_up(many)


def rounded_up(patients: float) -> int:
    """Up to two digits."""
    step = int(10 ** max(len(str(ceil(patients))) - 2, 0))
    return ceil(patients / step) * step


def lack_of_labels(who: NDArray[np.str_], truth: Truth, names: Sequence[str]) -> str:
    """Why labels give no interval of the macro AUC, "" where they do."""
    some = any_known(truth)
    if not some.any():
        return "no film has a label; take a set with labels"
    present = present_classes(truth)
    if not present:
        everyone = f"all {int(some.sum())} labelled films are alike in every class that is known"
        return f"{everyone}; take a set with others"
    parts = list(columns(truth))

    def fewest(column: int) -> int:
        known, has = parts[column]
        return min(len(set(who[known][side])) for side in (has, ~has))

    scarce = min(present, key=fewest)
    if fewest(scarce) >= MIN_PATIENTS:
        return ""
    return (
        f"{names[scarce]} against the rest has films of {fewest(scarce)} patients on one side, "
        f"expected {MIN_PATIENTS} or more"
    )


def lack_of_gaze(patients: int) -> str:
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


def _what_classes_can_show(
    who: NDArray[np.str_], truth: Truth, names: Sequence[str], limits: Limits
) -> list[str]:
    """Classes of too few patients for their sensitivity or specificity, whatever the candidate."""
    lines = []
    for column, name in enumerate(names):
        for kind, limit, side in (
            ("sensitivity", limits.sensitivity, HAS),
            ("specificity", limits.specificity, HAS_NOT),
        ):
            patients = len(set(who[truth[:, column] == side]))
            if limit and patients < (needed := patients_to_show(limit)):
                few = f"{patients} patients cannot exclude {percent(limit)}: {needed} can"
                lines.append(f"{kind} of {name}: {few}")
    return lines


def _what_flips_can_show(patients: int, limit: float) -> str:
    if not limit:
        return NOTHING_SHOWN
    needed = patients_to_show(limit)
    if patients < needed:
        return (
            f"with {patients} patients even zero flips cannot exclude {percent(limit)}: "
            f"{needed} can"
        )
    passing = bisect_left(
        range(patients + 1), True, key=lambda k: clopper_pearson(k, patients).bound >= limit
    )
    return f"up to {passing - 1} of {patients} patients may flip and exclude {percent(limit)} still"
