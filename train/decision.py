"""Decision parameters fitted on validation films: temperature and operating points."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cxrgaze.bundles.manifest import Decision
from cxrgaze.command import say

MIN_FILMS = 30
"""Labelled validation films that a temperature needs."""
_LOG_TEMPERATURE = (np.log(0.05), np.log(20.0))


def fit_decision(
    logits: NDArray[np.floating],
    labels: NDArray[np.integer],
    classes: tuple[str, ...],
    sensitivity: float | None = None,
) -> Decision:
    """Temperature and operating points from the labelled validation films.

    Args:
        logits: `(n, C)` of films with a label. labels: `(n,)`.
        sensitivity: that each operating point reaches on these films; None: the point with the
            largest Youden's J.

    Returns:
        The defaults where there is nothing to fit: temperature 1 with fewer than `MIN_FILMS` films,
        one class alone or films that are all right (any sharper would be better), no operating
        point for a class that all or none of the films have.
    """
    if not len(labels):
        return Decision()
    all_right = bool((logits.argmax(axis=1) == labels).all())
    if len(labels) < MIN_FILMS or len(set(labels.tolist())) < 2 or all_right:
        say("note: temperature 1: too few validation films, one class alone, or all are right")
        temperature = 1.0
    else:
        temperature = fit_temperature(logits, labels)
    probabilities = Decision(temperature=temperature).probabilities(logits)
    points = {}
    for index, name in enumerate(classes):
        positive = labels == index
        if 0 < positive.sum() < len(positive):
            points[name] = operating_point(probabilities[:, index], positive, sensitivity)
    return Decision(temperature=temperature, operating_points=points)


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """The temperature in [0.05, 20] that minimises the cross-entropy of softmax(logits / T).

    Source: Guo et al., arXiv 1706.04599, section 4.2.
    """
    logits = np.asarray(logits, dtype=np.float64)
    rows = np.arange(len(labels))

    def cross_entropy(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-scaled[rows, labels].mean())

    minimum = minimize_scalar(cross_entropy, bounds=_LOG_TEMPERATURE, method="bounded")
    return float(np.exp(minimum.x))


def operating_point(
    scores: NDArray[np.floating], positive: NDArray[np.bool_], sensitivity: float | None = None
) -> float:
    """The threshold t of the rule `score >= t`.

    It lies midway between two neighbouring scores, so that no rounding of a score flips a film. By
    Youden's J = sensitivity + specificity - 1 (Cancer 3, 1950, 32), ties to the higher
    sensitivity; or the highest threshold that reaches `sensitivity`.
    """
    values = np.unique(np.asarray(scores, dtype=np.float64))
    thresholds = np.concatenate([[values[0] / 2], (values[1:] + values[:-1]) / 2])
    flagged = scores[None, :] >= thresholds[:, None]
    sensitivities = (flagged & positive).sum(1) / positive.sum()
    if sensitivity is not None:
        return float(thresholds[np.flatnonzero(sensitivities >= sensitivity)[-1]])
    specificity = (~flagged & ~positive).sum(1) / (~positive).sum()
    return float(thresholds[int(np.argmax(sensitivities + specificity))])
