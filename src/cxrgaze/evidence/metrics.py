"""Metrics of both heads, in plain numpy.

Diagnosis: ROC AUC per class, macro and micro. Saliency: CC, SIM, KLD, NSS, AUC-Judd, shuffled AUC
and information gain, each as the MIT/Tuebingen saliency benchmark defines it (Bylinskii et al.,
"What do different evaluation metrics tell us about saliency models?", arXiv 1604.03605).

Saliency maps are `(H, W)`, non-negative; `prediction` and `truth` need not be normalised. Fixations
are `(n, 2)` integer-valued `(x, y)` pixels inside the map. Crop the pad away first: densities are
defined over the film's area (`Geometry.crop`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxrgaze.evidence.truth import (
    HAS,
    UNKNOWN,
    Truth,
    any_known,
    class_index,
    columns,
    present_classes,
)

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


def auc_per_class(scores: Array, truth: Truth) -> dict[int, float]:
    """AUC of each class against the films that have it not, by its column.

    Films of which the class is not known do not count; classes that all or no films have are not
    there.

    Args:
        scores: `(n, C)`, any monotone score: of exclusive classes probabilities, since logits of
            different films share no zero.
        truth: `(n, C)` (`cxrgaze.evidence.truth`).

    Source: docs/method.md#metrics (`class_i_ROC_AUC`).

    Example:
        >>> scores = np.array([[0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [0.25, 0.75]])
        >>> auc_per_class(scores, np.array([[1, 0], [1, 0], [0, 1], [0, 1]]))
        {0: 0.75, 1: 0.75}
    """
    present = present_classes(truth)
    parts = list(columns(truth))
    return {c: auc(scores[parts[c][0], c], parts[c][1]) for c in present}


def macro_auc(scores: Array, truth: Truth) -> float:
    """Unweighted mean of `auc_per_class` (Fawcett, Pattern Recognit. Lett. 27, 2006).

    Raises:
        ValueError: no class has one.

    Example:
        >>> scores = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
        >>> macro_auc(scores, np.eye(3))
        0.75
    """
    aucs = auc_per_class(scores, truth)
    if not aucs:
        raise ValueError("no class has films with it and films without it")
    return float(np.mean(list(aucs.values())))


def micro_auc(scores: Array, truth: Truth) -> float:
    """AUC over what is known of all classes, flattened ("micro AUC", docs/method.md#metrics).

    Of the classes that have an AUC: one that no film has would lift the figure by its easy
    negatives alone.

    Example:
        >>> scores = np.array([[0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [0.25, 0.75]])
        >>> micro_auc(scores, np.array([[1, 0], [1, 0], [0, 1], [0, 1]]))
        0.78125
    """
    present = present_classes(truth)
    known = truth[:, present] != UNKNOWN
    return auc(scores[:, present][known], truth[:, present][known] == HAS)


def top_label(probabilities: Array, truth: Truth) -> tuple[Array, NDArray[np.bool_]]:
    """Largest probability of each film with a label, and whether it is that of its class, `(m,)`.

    A film that has none of these classes counts as wrong.

    Args:
        probabilities: of exclusive classes, `(n, C)`. truth: `(n, C)`.

    Example:
        >>> probabilities = np.array([[0.75, 0.25], [0.625, 0.375], [0.5, 0.5]])
        >>> top_label(probabilities, np.array([[1, 0], [0, 1], [-1, -1]]))
        (array([0.75 , 0.625]), array([ True, False]))
    """
    known = any_known(truth)
    chosen = np.asarray(probabilities, dtype=np.float64)[known]
    return chosen.max(axis=1), chosen.argmax(axis=1) == class_index(truth)[known]


def stated(
    probabilities: Array, truth: Truth, *, exclusive: bool
) -> tuple[Array, NDArray[np.bool_]]:
    """What reliability is about: probabilities, and whether it is so, `(m,)` each.

    Of exclusive classes the `top_label`; of findings all that are known, together.

    Example:
        >>> stated(np.array([[0.75, 0.25]]), np.array([[1, -1]]), exclusive=False)
        (array([0.75]), array([ True]))
    """
    if exclusive:
        return top_label(probabilities, truth)
    known = truth != UNKNOWN
    return np.asarray(probabilities, dtype=np.float64)[known], truth[known] == HAS


def accuracy(probabilities: Array, truth: Truth) -> float:
    """Share of films whose largest probability is that of their exclusive class.

    Example:
        >>> probabilities = np.array([[0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [0.25, 0.75]])
        >>> accuracy(probabilities, np.array([[1, 0], [1, 0], [0, 1], [0, 1]]))
        0.75
    """
    return float(top_label(probabilities, truth)[1].mean())


def brier(probabilities: Array, truth: Truth, *, exclusive: bool) -> Array:
    """Brier score of each film, `(n,)`; lower is better. NaN where nothing is known of a film.

    Formula: (p - y)^2, of exclusive classes summed over them, in [0, 2]; of findings the mean over
    those that are known, in [0, 1]. Source: Brier, Mon. Weather Rev. 78 (1950) 1.

    Example:
        >>> probabilities = np.array([[0.75, 0.25], [0.5, 0.5]])
        >>> brier(probabilities, np.array([[1, 0], [0, 1]]), exclusive=True)
        array([0.125, 0.5  ])
        >>> brier(probabilities, np.array([[1, 1], [-1, 1]]), exclusive=False)
        array([0.3125, 0.25  ])
    """
    known = truth != UNKNOWN
    squares = np.where(known, (np.asarray(probabilities, dtype=np.float64) - truth) ** 2, 0.0)
    some = known.sum(axis=1)
    parts = np.minimum(some, 1) if exclusive else some
    with np.errstate(invalid="ignore"):
        return np.asarray(squares.sum(axis=1) / parts)


def reliability(
    confidence: Array, right: NDArray[np.bool_], bins: int = 15
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Mean confidence, share of hits and films of each non-empty bin, `(b,)` each.

    Bins are of equal width, closed on the right. Source: Guo et al., arXiv 1706.04599, equations 1
    and 2.

    Args:
        confidence, right: `(n,)` (`stated`).

    Example:
        >>> confidence, right = np.array([0.75, 0.75, 0.5, 1.0]), np.array([1, 0, 1, 1]) == 1
        >>> reliability(confidence, right, bins=4)
        (array([0.5 , 0.75, 1.  ]), array([1. , 0.5, 1. ]), array([1, 2, 1]))
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    some = counts > 0
    confidences, hits = (np.bincount(bin_of, v, bins)[some] for v in (confidence, right))
    return confidences / counts[some], hits / counts[some], counts[some]


def ece(confidence: Array, right: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error, in [0, 1].

    Formula: sum over bins of films / n |share of hits - confidence|.
    Source: Guo et al., arXiv 1706.04599, equation 3.

    Args:
        confidence, right: as in `reliability`.

    Example:
        >>> ece(np.array([0.75, 0.75, 0.5, 1.0]), np.array([1, 0, 1, 1]) == 1, bins=4)
        0.25
    """
    confidence, hits, counts = reliability(confidence, right, bins)
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


def shuffled_auc(
    prediction: Array, fixations: NDArray[np.integer], others: NDArray[np.integer]
) -> float:
    """AUC with the values at fixations against those where other films were fixated, ties one half.

    What every film shares, as a centre prior, is worth one half. Repeats count in both.

    Args:
        others: `(m, 2)`, fixations of other films, scaled into this map.

    Source: Tatler et al., Vision Research 45 (2005) 643; arXiv 1604.03605 section 4, sAUC; all
    other films as in pysaliency (docs/method.md#metrics).

    Example:
        >>> shuffled_auc(np.array([[1, 2], [3, 4]]), np.array([[1, 1]]), np.array([[0, 0], [1, 1]]))
        0.75
    """
    p, x, y = _at_fixations(prediction, fixations)
    _, other_x, other_y = _at_fixations(prediction, others)
    scores = np.concatenate([p[y, x], p[other_y, other_x]])
    return auc(scores, np.arange(scores.size) < x.size)


def information_gain(prediction: Array, baseline: Array, fixations: NDArray[np.integer]) -> float:
    """Information gain over a baseline, mean over fixations, in bits per fixation.

    Formula: mean of log2(eps + p) - log2(eps + b) at fixations, p = prediction, b = baseline, both
    normalised, eps = `MIT_EPSILON`. Below 0 the baseline says better where readers look.
    Source: Kuemmerer et al., PNAS 112 (2015) 16054; with eps arXiv 1604.03605 section 4, IG.

    Example:
        >>> round(information_gain(np.array([[1, 3]]), np.array([[1, 1]]), np.array([[0, 0]])), 6)
        -1.0
    """
    p, b = _same_shape(prediction, baseline)
    (p, x, y), b = _at_fixations(_normalised(p), fixations), _normalised(b)
    return float((np.log2(MIT_EPSILON + p[y, x]) - np.log2(MIT_EPSILON + b[y, x])).mean())


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
