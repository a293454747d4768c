"""Metrics of both heads, in plain numpy.

Diagnosis: ROC AUC per class, macro and micro. Saliency: CC, SIM, KLD, NSS, AUC-Judd, each as the
MIT/Tuebingen saliency benchmark defines it (Bylinskii et al., "What do different evaluation metrics
tell us about saliency models?", arXiv 1604.03605).

Saliency maps are `(H, W)`, non-negative; `prediction` and `truth` need not be normalised. Fixations
are `(n, 2)` integer-valued `(x, y)` pixels inside the map. Crop the pad away first: densities are
defined over the film's area (`Geometry.crop`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

MIT_EPSILON = 2.2204e-16
"""The constant of the MIT benchmark's KLD (Matlab's eps as printed there)."""


def auc(scores: Array, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of `scores` for the boolean labels `positive`, both `(n,)`.

    The Mann-Whitney form: P(score of a positive > score of a negative), ties count one half.

    Raises:
        ValueError: if one of the two classes is empty, or a score is NaN.

    Source: Hanley & McNeil, Radiology 143 (1982) 29.

    Example:
        >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
        0.75
    """
    scores = np.asarray(scores, dtype=np.float64)
    positive = np.asarray(positive, dtype=bool)
    n_positive = int(positive.sum())
    n_negative = positive.size - n_positive
    if not n_positive or not n_negative:
        raise ValueError(
            f"AUC needs both classes, found {n_positive} positives and {n_negative} negatives"
        )
    if np.isnan(scores).any():
        raise ValueError("AUC of NaN scores is not defined")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(counts) - (counts - 1) / 2  # 1-based, ties share their mean rank
    rank_sum = float(mid_rank[inverse][positive].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def auc_per_class(probabilities: Array, labels: NDArray[np.integer]) -> Array:
    """One-versus-rest AUC of each class, `(C,)`.

    Args:
        probabilities: `(n, C)`, any monotone score.
        labels: `(n,)`, class indices; every class must occur and not be the only one.

    Source: docs/method.md#metrics (`class_i_ROC_AUC`).

    Example:
        >>> probabilities = np.array([[0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [0.25, 0.75]])
        >>> auc_per_class(probabilities, np.array([0, 0, 1, 1]))
        array([0.75, 0.75])
    """
    return np.array([auc(probabilities[:, c], labels == c) for c in range(probabilities.shape[1])])


def present_classes(labels: NDArray[np.integer], classes: int) -> list[int]:
    """Classes that some and not all of `labels` have: those that an AUC exists for.

    Example:
        >>> present_classes(np.array([0, 2, 2]), 3)
        [0, 2]
    """
    return [c for c in range(classes) if 0 < (labels == c).sum() < len(labels)]


def macro_auc(
    probabilities: Array, labels: NDArray[np.integer], classes: Sequence[int] | None = None
) -> float:
    """Unweighted mean of the one-versus-rest AUCs (Fawcett, Pattern Recognit. Lett. 27, 2006).

    Args:
        classes: columns to take, None for all.

    Example:
        >>> probabilities = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
        >>> macro_auc(probabilities, np.array([0, 1, 2]))
        0.75
    """
    chosen = range(probabilities.shape[1]) if classes is None else classes
    return float(np.mean([auc(probabilities[:, c], labels == c) for c in chosen]))


def micro_auc(
    probabilities: Array, labels: NDArray[np.integer], classes: Sequence[int] | None = None
) -> float:
    """AUC over class indicators flattened ("micro AUC", docs/method.md#metrics).

    Args:
        classes: columns to take, None for all. A class that no film has would lift the figure by
            its easy negatives alone.

    Example:
        >>> probabilities = np.array([[0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [0.25, 0.75]])
        >>> micro_auc(probabilities, np.array([0, 0, 1, 1]))
        0.78125
    """
    chosen = np.arange(probabilities.shape[1]) if classes is None else np.asarray(classes)
    indicators = chosen[None, :] == np.asarray(labels)[:, None]
    return auc(probabilities[:, chosen].ravel(), indicators.ravel())


def accuracy(probabilities: Array, labels: NDArray[np.integer]) -> float:
    """Share of films whose largest probability is the true class's.

    Example:
        >>> probabilities = np.array([[0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [0.25, 0.75]])
        >>> accuracy(probabilities, np.array([0, 0, 1, 1]))
        0.75
    """
    return float((probabilities.argmax(axis=1) == labels).mean())


def reliability(
    probabilities: Array, labels: NDArray[np.integer], bins: int = 15
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Mean confidence, accuracy and films of each non-empty bin, `(b,)` each.

    Confidence is the largest probability; bins are of equal width, closed on the right.
    Source: Guo et al., arXiv 1706.04599, equations 1 and 2.

    Example:
        >>> probabilities = np.array([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
        >>> reliability(probabilities, np.array([0, 1, 0, 0]), bins=4)
        (array([0.5 , 0.75, 1.  ]), array([1. , 0.5, 1. ]), array([1, 2, 1]))
    """
    confidence = np.asarray(probabilities, dtype=np.float64).max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    some = counts > 0
    confidences, hits = (np.bincount(bin_of, v, bins)[some] for v in (confidence, right))
    return confidences / counts[some], hits / counts[some], counts[some]


def ece(probabilities: Array, labels: NDArray[np.integer], bins: int = 15) -> float:
    """Expected calibration error of the largest probability, in [0, 1].

    Formula: sum over bins of films / n |accuracy - confidence|.
    Source: Guo et al., arXiv 1706.04599, equation 3.

    Example:
        >>> probabilities = np.array([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
        >>> ece(probabilities, np.array([0, 1, 0, 0]), bins=4)
        0.25
    """
    confidence, hits, counts = reliability(probabilities, labels, bins)
    return float((counts * np.abs(hits - confidence)).sum() / counts.sum())


def cc(prediction: Array, truth: Array) -> float:
    """Pearson correlation over pixels, in [-1, 1]; 0 if just one map is constant, NaN if both are.

    Formula: cov(p, q) / (std(p) std(q)). Source: arXiv 1604.03605 section 4, CC.

    Example:
        >>> round(cc(np.array([[0, 1], [1, 2]]), np.array([[0, 1], [2, 1]])), 6)
        0.5
    """
    p, q = _same_shape(prediction, truth)
    p, q = p - p.mean(), q - q.mean()
    p_norm, q_norm = float(np.linalg.norm(p)), float(np.linalg.norm(q))
    if p_norm == 0 and q_norm == 0:
        return float("nan")
    if p_norm == 0 or q_norm == 0:
        return 0.0
    return float((p * q).sum() / (p_norm * q_norm))


def sim(prediction: Array, truth: Array) -> float:
    """Similarity, also histogram intersection: sum min(p, q) of the normalised maps, in [0, 1].

    Source: arXiv 1604.03605 section 4, SIM; "HS" in the authors' code (docs/method.md#metrics).

    Example:
        >>> sim(np.array([[1, 3]]), np.array([[3, 1]]))
        0.5
    """
    p, q = _same_shape(prediction, truth)
    return float(np.minimum(_normalised(p), _normalised(q)).sum())


def kld(prediction: Array, truth: Array) -> float:
    """Kullback-Leibler divergence of the prediction from the truth, MIT form, natural log, >= 0.

    Formula: sum q ln(eps + q / (p + eps)), q = truth, p = prediction, eps = `MIT_EPSILON`.
    Source: arXiv 1604.03605 section 4, KL. Not symmetric.

    Example:
        >>> round(kld(np.array([[1, 3]]), np.array([[3, 1]])), 6)  # ln(3) / 2
        0.549306
    """
    p, q = _same_shape(prediction, truth)
    p, q = _normalised(p), _normalised(q)
    return float((q * np.log(MIT_EPSILON + q / (p + MIT_EPSILON))).sum())


def nss(prediction: Array, fixations: NDArray[np.integer]) -> float:
    """Normalised scanpath saliency: mean over fixations of (p - mean) / std, population std.

    Repeated fixations count each time; a constant prediction gives 0.
    Source: Peters et al., Vision Research 45 (2005) 2397; arXiv 1604.03605 section 4, NSS.

    Example:
        >>> nss(np.array([[1, 3]]), np.array([[1, 0]]))
        1.0
    """
    p, x, y = _at_fixations(prediction, fixations)
    std = float(p.std())
    return float((p[y, x].mean() - p.mean()) / std) if std > 0 else 0.0


def auc_judd(prediction: Array, fixations: NDArray[np.integer]) -> float:
    """AUC with the values at fixations (repeats kept) against those of all pixels, ties one half.

    Source: Judd et al., ICCV 2009; the "uniform" AUC of arXiv 1604.03605 section 4.

    Example:
        >>> auc_judd(np.array([[1, 2], [3, 4]]), np.array([[1, 1]]))
        0.875
    """
    p, x, y = _at_fixations(prediction, fixations)
    scores = np.concatenate([p[y, x], p.ravel()])
    return auc(scores, np.arange(scores.size) < x.size)


def _same_shape(prediction: Array, truth: Array) -> tuple[Array, Array]:
    p, q = np.asarray(prediction, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if p.shape != q.shape or p.ndim != 2:
        raise ValueError(f"expected two maps of one shape (H, W), found {p.shape} and {q.shape}")
    return p, q


def _normalised(p: Array) -> Array:
    total = float(p.sum())
    if p.min() < 0 or not total > 0:
        raise ValueError("a density must be non-negative with a positive sum")
    return p / total


def _at_fixations(
    prediction: Array, fixations: NDArray[np.integer]
) -> tuple[Array, NDArray[np.integer], NDArray[np.integer]]:
    p = np.asarray(prediction, dtype=np.float64)
    points = np.asarray(fixations)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"expected fixations (n, 2) with n > 0, found shape {points.shape}")
    x, y = points[:, 0], points[:, 1]
    height, width = p.shape
    if x.min() < 0 or y.min() < 0 or x.max() >= width or y.max() >= height:
        raise ValueError(f"fixations outside the map of {width} x {height}: drop them first")
    return p, x, y
