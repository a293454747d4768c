"""Every metric against an independent oracle (scipy, scikit-learn, numpy) and by hand."""

from __future__ import annotations

import doctest
import inspect
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from cxrgaze.evidence import metrics
from cxrgaze.evidence.truth import UNKNOWN, one_of

RNG = np.random.default_rng(7)


def _maps(shape=(12, 9)):
    return RNG.random(shape) ** 3, RNG.random(shape) ** 2


def _scores(n=200, classes=3, ties=False):
    labels = RNG.integers(classes, size=n)
    scores = RNG.random((n, classes)) + 0.4 * np.eye(classes)[labels]
    if ties:
        scores = np.round(scores, 1)
    return scores / scores.sum(axis=1, keepdims=True), labels


def _findings(n=300, classes=4):
    """Sigmoids' scores, and a truth of which each column has its own share of unknown cells."""
    has = RNG.random((n, classes)) < (0.5, 0.3, 0.2, 0.1)
    scores = 1 / (1 + np.exp(1 - 1.5 * has - RNG.normal(size=has.shape)))
    known = RNG.random(has.shape) > (0, 0.2, 0.4, 0.6)
    return scores, np.where(known, has, UNKNOWN).astype(np.int8)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_equals_scikit_learn(ties):
    scores, labels = _scores(ties=ties)
    scores = np.round(scores, 1) if ties else scores
    for c in range(3):
        expected = sklearn.metrics.roc_auc_score(labels == c, scores[:, c])
        assert metrics.auc(scores[:, c], labels == c) == pytest.approx(expected, abs=1e-12)


def test_auc_equals_mann_whitney():
    scores, labels = _scores()
    positive, negative = scores[labels == 0, 0], scores[labels != 0, 0]
    u = scipy.stats.mannwhitneyu(positive, negative).statistic
    expected = u / (positive.size * negative.size)
    assert metrics.auc(scores[:, 0], labels == 0) == pytest.approx(expected, abs=1e-12)


def test_auc_by_hand():
    assert metrics.auc(np.array([1.0, 2.0, 3.0]), np.array([False, False, True])) == 1
    assert metrics.auc(np.array([3.0, 2.0, 1.0]), np.array([False, False, True])) == 0
    assert metrics.auc(np.array([1.0, 1.0]), np.array([False, True])) == 0.5


def test_auc_refuses_one_class_and_nan():
    with pytest.raises(ValueError, match="0 negatives"):
        metrics.auc(np.array([1.0, 2.0]), np.array([True, True]))
    with pytest.raises(ValueError, match="NaN"):
        metrics.auc(np.array([1.0, np.nan]), np.array([True, False]))


def test_macro_and_micro_equal_scikit_learn():
    scores, labels = _scores()
    truth = one_of(labels, 3)
    macro = sklearn.metrics.roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    micro = sklearn.metrics.roc_auc_score(np.eye(3)[labels], scores, average="micro")
    assert metrics.macro_auc(scores, truth) == pytest.approx(macro, abs=1e-12)
    assert metrics.micro_auc(scores, truth) == pytest.approx(micro, abs=1e-12)
    expected = sklearn.metrics.accuracy_score(labels, scores.argmax(axis=1))
    assert metrics.accuracy(scores, truth) == pytest.approx(expected)


def test_each_findings_auc_is_scikit_learns_over_the_films_where_it_is_known():
    scores, truth = _findings()
    known = truth != UNKNOWN
    assert len(set(known.sum(axis=0).tolist())) == 4
    expected = [
        sklearn.metrics.roc_auc_score(truth[some, c], scores[some, c])
        for c, some in enumerate(known.T)
    ]
    found = metrics.auc_per_class(scores, truth)
    assert list(found) == [0, 1, 2, 3]
    assert list(found.values()) == pytest.approx(expected, abs=1e-12)
    assert metrics.macro_auc(scores, truth) == pytest.approx(np.mean(expected), abs=1e-12)
    micro = sklearn.metrics.roc_auc_score(truth[known], scores[known])
    assert metrics.micro_auc(scores, truth) == pytest.approx(micro, abs=1e-12)


def test_a_score_of_what_is_not_known_does_not_matter():
    scores, truth = _findings()
    other = np.where(truth == UNKNOWN, 1 - scores, scores)
    assert metrics.auc_per_class(other, truth) == metrics.auc_per_class(scores, truth)
    assert metrics.micro_auc(other, truth) == metrics.micro_auc(scores, truth)


def test_a_class_that_all_known_films_have_or_lack_has_no_auc():
    scores, truth = _findings()
    for column, alike in ((1, 0), (2, 1)):
        truth[truth[:, column] != UNKNOWN, column] = alike
    found = metrics.auc_per_class(scores, truth)
    assert list(found) == [0, 3]
    assert metrics.macro_auc(scores, truth) == pytest.approx((found[0] + found[3]) / 2)
    assert metrics.micro_auc(scores, truth) == metrics.micro_auc(scores[:, ::3], truth[:, ::3])
    for nothing in (truth[:, 1:3], np.full_like(truth, UNKNOWN)):
        with pytest.raises(ValueError, match="no class has films with it"):
            metrics.macro_auc(scores[:, : nothing.shape[1]], nothing)


def test_the_top_label_is_of_films_with_a_label_and_wrong_where_they_have_another():
    scores, labels = _scores()
    labels[::5] = UNKNOWN
    truth = one_of(labels, 3)[:, :2]  # films of the third have neither of the two
    confidence, right = metrics.top_label(scores[:, :2], truth)
    kept = labels != UNKNOWN
    assert confidence.tolist() == scores[kept, :2].max(axis=1).tolist()
    assert right.tolist() == (scores[kept, :2].argmax(axis=1) == labels[kept]).tolist()
    assert not right[labels[kept] == 2].any()
    assert metrics.accuracy(scores[:, :2], truth) == pytest.approx(right.mean())


def test_brier_of_exclusive_classes_is_scikit_learns_summed_over_them():
    scores, labels = _scores()
    found = metrics.brier(scores, one_of(labels, 3), exclusive=True)
    expected = sum(
        sklearn.metrics.brier_score_loss(labels == c, scores[:, c], pos_label=True)
        for c in range(3)
    )
    assert found.shape == (200,) and found.mean() == pytest.approx(expected, abs=1e-12)


def test_brier_of_findings_is_of_those_that_are_known():
    """Each film's mean over them, also where all are known and one is there."""
    scores, truth = _findings()
    known = truth != UNKNOWN
    found = metrics.brier(scores, truth, exclusive=False)
    whole = known.all(axis=1)
    assert 10 < whole.sum() < len(truth) - 10
    assert {0, 1, 2} <= set((truth[whole] == 1).sum(axis=1).tolist())
    for film, (p, y, some) in enumerate(zip(scores, truth, known, strict=True)):
        expected = sklearn.metrics.brier_score_loss(y[some], p[some], pos_label=1, labels=[0, 1])
        assert found[film] == pytest.approx(expected, abs=1e-12)
    by_column = [
        sklearn.metrics.brier_score_loss(truth[some, c], scores[some, c])
        for c, some in enumerate(known.T)
    ]
    each = np.full_like(truth, UNKNOWN)
    for c, some in enumerate(known.T):
        alone = each.copy()
        alone[:, c] = truth[:, c]
        assert np.mean(metrics.brier(scores, alone, exclusive=False)[some]) == pytest.approx(
            by_column[c]
        )


def test_brier_by_hand():
    """0 is right and sure; nothing is said of a film of which nothing is known."""
    truth = one_of([0, 1, UNKNOWN], 2)
    sure = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = metrics.brier(sure, truth, exclusive=True)
    assert found[:2].tolist() == [0, 2] and np.isnan(found[2])
    half = metrics.brier(np.full((2, 2), 0.5), truth[:2], exclusive=True)
    assert half.tolist() == [0.5, 0.5]


def test_cc_equals_numpy_and_scipy():
    p, q = _maps()
    assert metrics.cc(p, q) == pytest.approx(np.corrcoef(p.ravel(), q.ravel())[0, 1], abs=1e-12)
    assert metrics.cc(p, q) == pytest.approx(scipy.stats.pearsonr(p.ravel(), q.ravel()).statistic)


def test_cc_of_constant_maps():
    flat, p = np.full((4, 4), 0.5), np.arange(16.0).reshape(4, 4)
    assert metrics.cc(flat, p) == 0
    assert math.isnan(metrics.cc(flat, flat))
    assert metrics.cc(p, 3 * p + 1) == pytest.approx(1)
    assert metrics.cc(p, -p) == pytest.approx(-1)


def test_sim_by_definition_and_by_hand():
    p, q = _maps()
    slow = sum(min(a, b) for a, b in zip((p / p.sum()).ravel(), (q / q.sum()).ravel(), strict=True))
    assert metrics.sim(p, q) == pytest.approx(slow, abs=1e-12)
    assert metrics.sim(p, 5 * p) == pytest.approx(1)
    assert metrics.sim(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])) == 0


def test_kld_equals_scipy_where_eps_does_not_matter_and_is_not_symmetric():
    p, q = (m + 0.01 for m in _maps())
    expected = scipy.stats.entropy(q.ravel(), p.ravel())  # of the truth from the prediction
    assert metrics.kld(p, q) == pytest.approx(expected, abs=1e-9)
    assert metrics.kld(p, q) != pytest.approx(metrics.kld(q, p), abs=1e-4)
    assert metrics.kld(p, p) == pytest.approx(0, abs=1e-12)


def test_kld_has_the_mit_epsilon():
    prediction, truth = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert metrics.kld(prediction, truth) == pytest.approx(-math.log(2.2204e-16), rel=1e-9)


def test_nss_equals_scipy_zscore():
    p, _ = _maps()
    fixations = np.array([[0, 0], [8, 11], [3, 5], [3, 5]])
    z = scipy.stats.zscore(p, axis=None)
    expected = np.mean([z[y, x] for x, y in fixations])
    assert metrics.nss(p, fixations) == pytest.approx(expected, abs=1e-12)
    assert metrics.nss(np.ones((3, 3)), np.array([[1, 1]])) == 0


def test_auc_judd_equals_scikit_learn_with_repeats_and_ties():
    p = np.round(_maps()[0], 1)
    fixations = np.array([[0, 0], [8, 11], [3, 5], [3, 5], [1, 2]])
    scores = [p[y, x] for x, y in fixations] + list(p.ravel())
    truth = [1] * len(fixations) + [0] * p.size
    expected = sklearn.metrics.roc_auc_score(truth, scores)
    assert metrics.auc_judd(p, fixations) == pytest.approx(expected, abs=1e-12)


def test_shuffled_auc_equals_scikit_learn_with_repeats_and_ties():
    p = np.round(_maps()[0], 1)
    fixations = np.array([[0, 0], [8, 11], [3, 5], [3, 5], [1, 2]])
    others = np.array([[1, 2], [8, 0], [8, 0], [4, 4]])
    scores = [p[y, x] for x, y in (*fixations, *others)]
    expected = sklearn.metrics.roc_auc_score([1] * 5 + [0] * 4, scores)
    assert metrics.shuffled_auc(p, fixations, others) == pytest.approx(expected, abs=1e-12)
    assert metrics.shuffled_auc(p, fixations, fixations) == 0.5


def test_information_gain_is_the_difference_of_log_likelihoods_in_bits():
    p, b = _maps()
    fixations = np.array([[0, 0], [8, 11], [3, 5], [3, 5]])
    every = np.array([y * p.shape[1] + x for x, y in fixations])
    of = [scipy.stats.rv_discrete(values=(range(m.size), (m / m.sum()).ravel())) for m in (p, b)]
    expected = np.mean(of[0].logpmf(every) - of[1].logpmf(every)) / np.log(2)
    assert metrics.information_gain(5 * p, 3 * b, fixations) == pytest.approx(expected, abs=1e-9)
    assert metrics.information_gain(p, p, fixations) == 0


def test_information_gain_is_bounded_where_a_map_is_zero():
    p, at = np.array([[0.0, 1.0]]), np.array([[0, 0]])
    assert metrics.information_gain(p, np.ones((1, 2)), at) == pytest.approx(-51, abs=1e-3)
    assert metrics.information_gain(np.ones((1, 2)), p, at) == pytest.approx(51, abs=1e-3)


def test_x_is_the_column():
    p = np.zeros((2, 5))
    p[1, 4] = 1
    assert metrics.nss(p, np.array([[4, 1]])) == pytest.approx(3)  # (1 - 0.1) / 0.3


@pytest.mark.parametrize(
    "fixations", [np.zeros((0, 2), int), np.array([[5, 0]]), np.array([[-1, 0]])]
)
def test_fixations_outside_or_missing_are_refused(fixations):
    p, inside = np.ones((5, 5)), np.array([[1, 1]])
    for metric in (metrics.nss, metrics.auc_judd):
        with pytest.raises(ValueError, match="fixations"):
            metric(p, fixations)
    for arguments in ((fixations, inside), (inside, fixations)):
        with pytest.raises(ValueError, match="fixations"):
            metrics.shuffled_auc(p, *arguments)
    with pytest.raises(ValueError, match="fixations"):
        metrics.information_gain(p, p, fixations)


def test_shapes_and_densities_are_checked():
    for metric in (metrics.cc, metrics.sim, metrics.kld):
        with pytest.raises(ValueError, match="one shape"):
            metric(np.ones((2, 2)), np.ones((2, 3)))
    for metric in (metrics.sim, metrics.kld):
        with pytest.raises(ValueError, match="non-negative"):
            metric(np.zeros((2, 2)), np.ones((2, 2)))
    at = np.array([[1, 1]])
    with pytest.raises(ValueError, match="one shape"):
        metrics.information_gain(np.ones((2, 2)), np.ones((2, 3)), at)
    for maps in ((np.zeros((2, 2)), np.ones((2, 2))), (np.ones((2, 2)), np.zeros((2, 2)))):
        with pytest.raises(ValueError, match="non-negative"):
            metrics.information_gain(*maps, at)


@pytest.mark.parametrize("bins", [10, 15])
def test_ece_equals_torchmetrics(bins):
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.classification import multiclass_calibration_error

    scores, labels = _scores(n=500)
    expected = multiclass_calibration_error(
        torch.from_numpy(scores), torch.from_numpy(labels), num_classes=3, n_bins=bins, norm="l1"
    )
    top = metrics.top_label(scores, one_of(labels, 3))
    assert metrics.ece(*top, bins) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("bins", [10, 15])
def test_ece_of_a_finding_equals_torchmetrics(bins):
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.classification import binary_calibration_error

    scores, truth = _findings(n=500)
    some = truth[:, 1] != UNKNOWN
    probability, has = scores[some, 1], truth[some, 1]
    expected = binary_calibration_error(
        torch.from_numpy(probability), torch.from_numpy(has), n_bins=bins, norm="l1"
    )
    assert metrics.ece(probability, has == 1, bins) == pytest.approx(float(expected), abs=1e-6)


def test_micro_auc_takes_no_credit_for_a_class_that_nobody_has():
    scores, labels = _scores()
    labels = np.minimum(labels, 1)
    scores[:, 2] = 0
    two = sklearn.metrics.roc_auc_score(np.eye(2)[labels].ravel(), scores[:, :2].ravel())
    three = sklearn.metrics.roc_auc_score(np.eye(3)[labels].ravel(), scores.ravel())
    assert metrics.micro_auc(scores, one_of(labels, 3)) == pytest.approx(two)
    assert three > two


def test_ece_by_hand():
    sure = np.array([[0.9, 0.1]] * 10)
    for wrong, expected in ((1, 0), (5, 0.4)):
        top = metrics.top_label(sure, one_of([0] * (10 - wrong) + [1] * wrong, 2))
        assert metrics.ece(*top) == pytest.approx(expected)


def test_every_public_metric_has_an_example_with_its_number():
    """tests/test_public_api.py runs them."""
    found = {test.name.split(".")[-1]: test for test in doctest.DocTestFinder().find(metrics)}
    public = [
        name
        for name, value in inspect.getmembers(metrics, inspect.isfunction)
        if value.__module__ == metrics.__name__ and not name.startswith("_")
    ]
    assert len(public) > 10
    for name in public:
        shown = [example.want for example in found[name].examples if f"{name}(" in example.source]
        assert any(character.isdigit() for want in shown for character in want), name
