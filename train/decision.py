"""Decision parameters fitted on validation films: temperature and operating points."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.command import say
from cxrgaze.evidence.truth import UNKNOWN, Truth, class_index, columns

MIN_FILMS = 30
"""Labelled validation films that a temperature needs."""
_LOG_TEMPERATURE = (np.log(0.05), np.log(20.0))


def fit_decision(
    logits: NDArray[np.floating],
    truth: Truth,
    served: Served,
    sensitivity: float | None = None,
) -> Decision:
    """Temperatures and operating points from the labelled validation films.

    Args:
        logits: `(n, C)`. truth: `(n, C)`; what is not known does not count.
        served: the network, for its classes that something taught and their kind.
        sensitivity: that each operating point reaches on these films; None: the point with the
            largest Youden's J.

    Returns:
        The defaults where there is nothing to fit: temperature 1 with fewer than `MIN_FILMS` films,
        one class alone or films that are all right (any sharper would be better), no operating
        point for a class that all or none of the films have.
    """
    every, truth = np.asarray(logits), truth[:, served.columns]
    logits = every[:, served.columns]
    if served.spec.exclusive:
        decision = Decision(temperature=_of_softmax(logits, class_index(truth)))
    else:
        parts = enumerate(columns(truth))
        found = {served.classes[c]: _of_sigmoid(logits[k, c], has) for c, (k, has) in parts}
        decision = Decision(temperatures={name: t for name, t in found.items() if t != 1})
    probabilities = replace(served, decision=decision).probabilities(every)
    points = {}
    for column, (known, has) in enumerate(columns(truth)):
        if 0 < has.sum() < len(has):
            point = operating_point(probabilities[known, column], has, sensitivity)
            points[served.classes[column]] = point
    return decision.model_copy(update={"operating_points": points})


def _of_softmax(logits: NDArray[np.floating], index: NDArray[np.integer]) -> float:
    """The temperature of exclusive classes, 1 where there is none to fit."""
    logits, index = logits[index != UNKNOWN], index[index != UNKNOWN]
    if not len(index):
        return 1.0
    all_right = bool((logits.argmax(axis=1) == index).all())
    if len(index) < MIN_FILMS or len(set(index.tolist())) < 2 or all_right:
        say("note: temperature 1: too few validation films, one class alone, or all are right")
        return 1.0
    return fit_temperature(logits, index)


def _of_sigmoid(logits: NDArray[np.floating], has: NDArray[np.bool_]) -> float:
    """The temperature of a finding, 1 where there is none to fit."""
    right = (logits > 0) == has
    if len(has) < MIN_FILMS or has.all() or not has.any() or right.all():
        return 1.0
    return fit_temperature(np.column_stack([np.zeros(len(logits)), logits]), has.astype(int))


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """The temperature in [0.05, 20] that minimises the cross-entropy of softmax(logits / T).

    A sigmoid is the softmax of its logit beside 0.

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
