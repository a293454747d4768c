"""Bounds of an estimate over patients: exact for shares, studentised for differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, expm1, lgamma, log, log1p, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from cxrgaze.evidence.intervals import (
    LEVEL,
    MIN_PATIENTS,
    Array,
    PatientBootstrap,
    weighted_mean,
)

RESAMPLES = 2000


SEED = 0


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


def paired_shares(lost: int, gained: int, total: int) -> Bounds:
    """Interval of a paired difference of shares, (lost - gained) / total, and its upper bound.

    The score interval; where changes go one way only, or there are none, not narrower than the
    exact interval of that one share, since the score's size then goes up to 0.06.

    Source: Tango, Statist. Med. 17 (1998) 891, equations 7 to 9; `clopper_pearson`.

    Raises:
        ValueError: counts below 0 or above a total that is above 0.
    """
    if min(lost, gained) < 0 or lost + gained > total or not total:
        raise ValueError(f"expected counts in a total above 0, found {lost}, {gained} of {total}")

    def score(difference: float) -> float:
        """Of the hypothesis of this difference; it falls as the difference rises."""
        half = difference * (1 - difference)
        b = (2 * total - lost + gained) * difference - lost - gained
        gaining = (sqrt(max(b**2 + 8 * total * gained * half, 0)) - b) / (4 * total)
        variance = total * (2 * gaining + half)
        excess = lost - gained - total * difference
        return excess / sqrt(variance) if variance > 0 else float("inf") * excess if excess else 0.0

    def where(level: float) -> float:
        wanted, low, high = NormalDist().inv_cdf(level), -1.0, 1.0
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if score(middle) > wanted else (low, middle)
        return middle

    tail = (1 - LEVEL) / 2
    low, high, bound = where(1 - tail), where(tail), where(1 - LEVEL)
    if not gained:
        exact = clopper_pearson(lost, total)
        high, bound = max(high, exact.high), max(bound, exact.bound)
    if not lost:
        low = min(low, -clopper_pearson(gained, total).high)
    return Bounds(low, high, bound)


def unseen(patients: int, level: float) -> float:
    """The share of patients of whom none among so many need not surprise at a level.

    The rule of three: 3 / n at 0.95, exactly 1 - (1 - level)^(1 / n).
    """
    return -expm1(log(1 - level) / patients)


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
    (sum p^2)^2 / sum p^4 over their parts p. Where no patient has a part, the rule of three: as
    many as `unseen` may differ, and each of them lose all.

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
        two, one = (unseen(count, level) for level in ((1 + LEVEL) / 2, LEVEL))
        return Bounds(value - two, value + two, value - one)
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
            pivot_of_draw: Array = np.asarray((statistic(weights) - value) / own)
        return pivot_of_draw

    drawn = PatientBootstrap(patients, resamples, seed).draws(pivots)
    defined = np.clip(drawn[~np.isnan(drawn)], -_FAR, _FAR)
    quantiles = np.quantile(defined, levels, method="weibull")  # of b + 1, as for a pivot
    return Bounds(*(float(value - error * q) for q in quantiles))


def studentised_mean(
    patients: Sequence[str], values: Array, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Bounds:
    """`studentised` of the mean of each film's value, `(n,)`."""
    mean = float(values.mean())
    return studentised(
        patients,
        mean,
        (values - mean) / len(values),
        lambda weights: weighted_mean(values, weights),
        resamples=resamples,
        seed=seed,
    )


_FAR = 1e6  # a pivot whose resample has no error


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
