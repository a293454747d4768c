"""Whether probabilities are what they say: log-loss, calibration slope and intercept, null level.

A proper score (Brier, `cxrgaze.evidence.metrics.brier`, or the log-loss) has an interval that holds
what it estimates. The expected calibration error does not: it is biased upwards, a bootstrap of it
more so, and it is not zero for probabilities that are exactly right. So it is a point here, beside
the level that such probabilities would show on as many films (`ece_null`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxrgaze.evidence import metrics
from cxrgaze.evidence.truth import HAS, UNKNOWN, Truth

Array = NDArray[np.float64]

_SMALLEST = 1e-12
"""Probabilities are taken as at least this far from 0 and 1: certainty has no finite log-loss."""
_STEPS = 50
_TOLERANCE = 1e-8


def log_loss(probabilities: NDArray[np.floating], truth: Truth, *, exclusive: bool) -> Array:
    """Log-loss of each film in nats, `(n,)`; lower is better. NaN where nothing is known of a film.

    Of exclusive classes minus the logarithm of the film's own, NaN where it has none of them; of
    findings the mean over those that are known of minus the logarithm of what is so.

    Source: Good, J. R. Stat. Soc. B 14 (1952) 107.

    Example:
        >>> log_loss(np.array([[0.5, 0.5]]), np.array([[1, 0]]), exclusive=True).round(4)
        array([0.6931])
    """
    p = np.clip(np.asarray(probabilities, dtype=np.float64), _SMALLEST, 1 - _SMALLEST)
    known = truth != UNKNOWN
    if exclusive:
        has = truth == HAS
        own = np.where(has, p, 1.0).min(axis=1)
        return np.where(has.any(axis=1), -np.log(own), np.nan)
    losses = np.where(known, -np.log(np.where(truth == HAS, p, 1 - p)), 0.0)
    with np.errstate(invalid="ignore"):
        return np.asarray(losses.sum(axis=1) / known.sum(axis=1))


def slope(probabilities: Array, has: NDArray[np.bool_], weights: Array) -> Array:
    """Calibration slope for each row of `weights` `(b, n)`: b of logit P(has) = a + b logit(p).

    1 is right, below 1 is overconfident. NaN where there is no finite one: a class alone, or films
    that the probability parts without an error.

    Args:
        probabilities: `(n,)`, of one class. has: `(n,)`. weights: how often each film counts.

    Source: Cox, Biometrika 45 (1958) 562; Van Calster et al., BMC Med. 17 (2019) 230.
    """
    logit = _logit(probabilities)
    columns = np.column_stack([np.ones_like(logit), logit])
    return _logistic(columns, np.zeros_like(logit), has, weights)[:, 1]


def intercept(probabilities: Array, has: NDArray[np.bool_], weights: Array) -> Array:
    """Calibration in the large for each row of `weights`: a of logit P(has) = a + logit(p).

    0 is right, below 0 is a class that is said too often. NaN as in `slope`, whose arguments and
    source it has.
    """
    logit = _logit(probabilities)
    return _logistic(np.ones((len(logit), 1)), logit, has, weights)[:, 0]


def ece_null(
    confidence: NDArray[np.floating], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """What ECE (`metrics.ece`) is where each confidence is exactly the chance to be right.

    Args:
        confidence: `(n,)`.

    Returns:
        The mean of `draws` simulations, and what 95 % of them stay below.
    """
    rng = np.random.default_rng(seed)
    found = [
        metrics.ece(confidence, rng.random(len(confidence)) < confidence) for _ in range(draws)
    ]
    return float(np.mean(found)), float(np.quantile(found, 0.95))


def _logit(probabilities: Array) -> Array:
    p = np.clip(np.asarray(probabilities, dtype=np.float64), _SMALLEST, 1 - _SMALLEST)
    return np.asarray(np.log(p) - np.log1p(-p))


def _logistic(columns: Array, offset: Array, has: NDArray[np.bool_], weights: Array) -> Array:
    """Coefficients of a logistic regression for each row of weights, `(b, d)`, by Newton's method.

    Args:
        columns: `(n, d)`. offset: `(n,)`, added to the linear part.
    """
    found: Array = np.zeros((len(weights), columns.shape[1]))
    outcome = np.asarray(has, dtype=np.float64)
    done = np.zeros(len(weights), dtype=bool)
    products = columns[:, :, None] * columns[:, None, :]
    for _ in range(_STEPS):
        mean = 1 / (1 + np.exp(-np.clip(found @ columns.T + offset, -700, 700)))
        gradient = (weights * (outcome - mean)) @ columns
        curvature = np.tensordot(weights * mean * (1 - mean), products, axes=1)
        step = (np.linalg.pinv(curvature) @ gradient[:, :, None])[:, :, 0]
        step = np.clip(step, -2.0, 2.0)  # far from the optimum a whole one may overshoot
        # Where films are parted without an error it walks until nothing curves any more.
        curved = np.linalg.eigvalsh(curvature)[:, 0] > _TOLERANCE
        done = curved & (np.abs(step).max(axis=1) < _TOLERANCE)
        found += step
        if done.all():
            break
    positive = weights @ outcome
    some = (positive > 0) & (positive < weights.sum(axis=1))
    found[~(done & some)] = np.nan
    return found
