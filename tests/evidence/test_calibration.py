"""Log-loss, slope, intercept and null level against scikit-learn, scipy and simulation."""

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss

from cxrgaze.evidence import calibration, metrics
from cxrgaze.evidence.truth import one_of


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.fixture(scope="module")
def films():
    """Probabilities of a class and whether it is there, with true slope 0.6 and intercept 0.4."""
    rng = np.random.default_rng(3)
    z = rng.normal(0, 2, 400)
    return _sigmoid(z), rng.random(400) < _sigmoid(0.4 + 0.6 * z)


def test_log_loss_is_scikit_learns():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 60)
    label = rng.integers(0, 3, 60)
    found = calibration.log_loss(p, one_of(label, 3), exclusive=True)
    assert found.mean() == pytest.approx(sklearn_log_loss(label, p, labels=[0, 1, 2]), rel=1e-12)
    has = (rng.random((60, 3)) < 0.4).astype(np.int8)
    found = calibration.log_loss(p, has, exclusive=False)
    each = [sklearn_log_loss(has[:, c], p[:, c], labels=[0, 1]) for c in range(3)]
    assert found.mean() == pytest.approx(np.mean(each), rel=1e-12)


def test_log_loss_counts_what_is_known_and_stays_finite():
    p, truth = np.array([[0.5, 0.25], [1.0, 0.0]]), np.array([[-1, 1], [-1, -1]])
    found = calibration.log_loss(p, truth, exclusive=False)
    assert found[0] == pytest.approx(np.log(4)) and np.isnan(found[1])
    certain_and_wrong = calibration.log_loss(p[1:], np.array([[0, 1]]), exclusive=True)
    assert certain_and_wrong[0] == pytest.approx(12 * np.log(10))


@pytest.mark.parametrize("draw", range(4))
def test_slope_and_intercept_are_those_of_a_regression(films, draw):
    p, has = films
    weights = np.ones(len(p))
    if draw:
        weights = np.random.default_rng(draw).multinomial(len(p), np.full(len(p), 1 / len(p)))
    logit = np.log(p / (1 - p))
    oracle = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000)
    oracle.fit(logit[:, None], has, sample_weight=weights)
    (slope,) = calibration.slope(p, has, weights[None].astype(float))
    assert slope == pytest.approx(oracle.coef_[0, 0], rel=1e-5)
    (found,) = calibration.intercept(p, has, weights[None].astype(float))
    expected = brentq(lambda a: float((weights * (has - _sigmoid(a + logit))).sum()), -9, 9)
    assert found == pytest.approx(expected, rel=1e-7)


def test_there_is_no_slope_of_films_that_are_parted_without_error_or_of_one_class(films):
    p, _ = films
    weights = np.ones((1, len(p)))
    for has in (p > 0.5, np.ones(len(p), bool), np.zeros(len(p), bool)):
        assert np.isnan(calibration.slope(p, has, weights))
    wide = _sigmoid(np.linspace(-30, 30, 40))
    assert np.isnan(calibration.slope(wide, wide > 0.5, np.ones((1, 40))))
    assert np.isnan(calibration.intercept(p, np.ones(len(p), bool), weights))
    assert np.isfinite(calibration.intercept(p, p > 0.5, weights))


def test_overconfidence_is_a_slope_below_one_and_scaling_mends_it(films):
    p, has = films
    logit = np.log(p / (1 - p))
    weights = np.ones((1, len(p)))
    slopes = [calibration.slope(_sigmoid(logit * k), has, weights)[0] for k in (1, 2, 0.5)]
    np.testing.assert_allclose(np.array(slopes) * (1, 2, 0.5), slopes[0], rtol=1e-6)
    assert slopes[1] < slopes[0] < 1 < slopes[2]


def test_the_null_level_is_what_right_probabilities_show():
    """ECE of confidences that are exactly right lies below the 95 % level in 95 % of cases."""
    rng = np.random.default_rng(5)
    confidence = rng.uniform(0.4, 1, 150)
    mean, high = calibration.ece_null(confidence, draws=2000)
    found = [metrics.ece(confidence, rng.random(150) < confidence) for _ in range(2000)]
    assert mean == pytest.approx(np.mean(found), rel=0.03)
    assert np.mean(np.array(found) <= high) == pytest.approx(0.95, abs=0.015)
    wrong = [metrics.ece(confidence, rng.random(150) < confidence - 0.2) for _ in range(200)]
    assert np.mean(np.array(wrong) > high) > 0.9, "and what is wrong shows"
