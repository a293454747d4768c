"""Confidence intervals that know which films belong to one patient.

Two ways to an interval for an AUC, side by side: DeLong's variance from placements, and a bootstrap
that draws patients, not films. Everything else is bootstrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cxrgaze.evidence.truth import Truth, columns
from cxrgaze.records import Frozen

Array = NDArray[np.float64]

LEVEL = 0.95
_CHUNK = 1 << 17  # weights held at once: what a core keeps near is summed in half the time
_DEFINED = 0.9  # share of resamples that must give a value
MIN_PATIENTS = 10
"""Fewer patients get no interval: a bootstrap of so few says next to nothing."""


class Interval(Frozen):
    """An estimate and its two-sided 95 % interval; no bounds where they are not defined."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f} (no interval)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def auc_influence(scores: Array, positive: NDArray[np.bool_]) -> tuple[float, Array]:
    """The AUC and each film's part in its error, `(n,)`: the sum of squares is DeLong's variance.

    The part of a positive is (V10 - AUC) / sqrt(m (m - 1)), V10 the share of negatives below it,
    ties one half, m the number of positives; that of a negative likewise. NaN where a class has
    fewer than two films. Add the parts of one patient before squaring for a variance that allows
    films of one patient to be alike.

    Source: DeLong et al., Biometrics 44 (1988) 837, equations 4 to 6; for clusters Obuchowski,
    Biometrics 53 (1997) 567.

    Raises:
        ValueError: one of the two classes is empty.
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        raise ValueError(f"AUC needs both classes, found {m} positives and {n} negatives")
    rank = _mid_ranks(scores)
    placement = np.empty(len(scores))
    placement[positive] = (rank[positive] - _mid_ranks(scores[positive])) / n
    placement[~positive] = 1 - (rank[~positive] - _mid_ranks(scores[~positive])) / m
    value = float(placement[positive].mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt(np.where(positive, m * (m - 1.0), n * (n - 1.0)))
        return value, (placement - value) / scale


def from_influence(value: float, influence: Array) -> Interval:
    """The normal interval on the logit scale, which cannot leave [0, 1].

    No bounds for a value of 0 or 1 (its variance estimate is zero) or undefined parts.

    Args:
        influence: `(n,)`, parts of the error; independent of each other.
    """
    error = float(np.sqrt((influence**2).sum()))
    if not 0 < value < 1 or not np.isfinite(error):
        return Interval(value=value)
    logit = np.log(value / (1 - value))
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * error / (value * (1 - value))
    low, high = 1 / (1 + np.exp(-(logit + np.array([-half, half]))))
    return Interval(value=value, low=float(low), high=float(high))


def bootstrap(
    patients: Sequence[str],
    statistic: Callable[[Array], Array],
    *,
    resamples: int,
    seed: int,
) -> Array:
    """Values of a statistic over resamples of patients, `(resamples, ...)`.

    Args:
        patients: patient of each film, `(n,)`.
        statistic: takes weights `(b, n)`, how often each film was drawn in each of b resamples,
            and returns `(b, ...)`.
    """
    _, cluster = np.unique(np.asarray(patients), return_inverse=True)
    count = int(cluster.max()) + 1
    rng = np.random.default_rng(seed)
    statistics, left = [], resamples
    while left:
        size = min(left, max(_CHUNK // len(cluster), 1))
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=size)
        statistics.append(statistic(drawn[:, cluster].astype(np.float64)))
        left -= size
    return np.concatenate(statistics)


def percentile_interval(value: float, samples: Array, patients: int) -> Interval:
    """The percentile interval of bootstrap `samples` `(resamples,)` around an estimate.

    Resamples without a value (a class that was not drawn) are dropped. No bounds where they are
    more than a tenth, where all resamples give the same (the bootstrap is blind at the edge of what
    can be), or with fewer than `MIN_PATIENTS` patients.
    """
    defined = samples[np.isfinite(samples)]
    few = len(defined) < _DEFINED * len(samples) or patients < MIN_PATIENTS
    if few or not np.isfinite(value) or np.ptp(defined) == 0:
        return Interval(value=value)
    low, high = np.quantile(defined, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Interval(value=value, low=float(low), high=float(high))


@dataclass(frozen=True)
class PatientBootstrap:
    """The bootstrap of some films' patients: the same draws for every statistic."""

    patients: Sequence[str]
    """Patient of each film, `(n,)`."""
    resamples: int
    seed: int

    def draws(self, statistic: Callable[[Array], Array]) -> Array:
        """Values of `statistic` over the resamples (`bootstrap`)."""
        return bootstrap(self.patients, statistic, resamples=self.resamples, seed=self.seed)

    def interval(self, statistic: Callable[[Array], Array]) -> Interval:
        """The statistic of the films as they are, with its interval."""
        value = float(statistic(np.ones((1, len(self.patients))))[0])
        return self.around(value, self.draws(statistic))

    def mean(self, values: NDArray[np.floating]) -> Interval:
        """Mean of each film's value `(n,)` with its interval; NaN values do not count."""
        return self.interval(lambda weights: weighted_mean(values, weights))

    def around(self, value: float, samples: Array) -> Interval:
        """The percentile interval of `draws` around an estimate (`percentile_interval`)."""
        return percentile_interval(value, samples, len(set(self.patients)))


def weighted_auc(scores: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
    """AUC of each row of `weights` `(b, n)`, as if film i had been seen `weights[:, i]` times.

    NaN where a class has no weight. Ties count one half.
    """
    order = np.argsort(scores, kind="stable")
    ordered = np.asarray(scores)[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    weights, positive = weights[:, order], np.asarray(positive)[order]
    above = np.add.reduceat(weights * positive, starts, axis=1)
    below = np.add.reduceat(weights * ~positive, starts, axis=1)
    wins = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
    total = above.sum(axis=1) * below.sum(axis=1)
    return _ratio(wins, total)


def weighted_aucs(scores: Array, truth: Truth, classes: Sequence[int], weights: Array) -> Array:
    """`weighted_auc` of each of some classes over the films of which it is known, `(b, k)`.

    Args:
        scores: `(n, C)`. truth: `(n, C)`. classes: k columns. weights: `(b, n)`.
    """
    parts, each = list(columns(truth)), []
    for c in classes:
        known, has = parts[c]
        each.append(weighted_auc(scores[known, c], has, weights[:, known]))
    return np.stack(each, axis=1)


def weighted_share(hit: NDArray[np.bool_], among: NDArray[np.bool_], weights: Array) -> Array:
    """Share of hits among some films, for each row of `weights` `(b, n)`; NaN where none is."""
    return weighted_mean(np.where(among, hit, np.nan), weights)


def weighted_mean(values: NDArray[np.floating], weights: Array) -> Array:
    """Mean of `values` `(n,)` for each row of `weights` `(b, n)`; NaN values do not count."""
    finite = np.isfinite(values)
    total = weights[:, finite].sum(axis=1)
    summed = weights[:, finite] @ values[finite]
    return _ratio(summed, total)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """The ratio, NaN where the denominator is zero."""
    nan: Array = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=nan, where=denominator > 0)
    return nan


def _mid_ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], dtype=np.float64)
