"""Intervals against slow forms, and against the truth on drawn data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cxrgaze.evidence import intervals


def _drawn(n=40, seed=0):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    positive[:4] = [True, True, False, False]
    return np.round(rng.normal(size=n) + positive, 1), positive  # rounded: there are ties


def _slow_delong(scores, positive):
    """DeLong et al. 1988 with loops over pairs."""
    x, y = scores[positive], scores[~positive]

    def psi(a, b):
        return 1.0 if a > b else 0.5 if a == b else 0.0

    v10 = np.array([np.mean([psi(a, b) for b in y]) for a in x])
    v01 = np.array([np.mean([psi(a, b) for a in x]) for b in y])
    return v10.mean(), v10.var(ddof=1) / len(x) + v01.var(ddof=1) / len(y)


@pytest.mark.parametrize("seed", range(5))
def test_the_influence_adds_up_to_delongs_variance(seed):
    scores, positive = _drawn(seed=seed)
    value, influence = intervals.auc_influence(scores, positive)
    slow_value, slow_variance = _slow_delong(scores, positive)
    assert value == pytest.approx(slow_value) == pytest.approx(roc_auc_score(positive, scores))
    assert (influence**2).sum() == pytest.approx(slow_variance)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_auc_is_the_auc_of_repeated_films(seed):
    scores, positive = _drawn(seed=seed)
    weights = np.random.default_rng(seed).integers(0, 4, size=(6, len(scores)))
    found = intervals.weighted_auc(scores, positive, weights.astype(float))
    for w, value in zip(weights, found, strict=True):
        slow = roc_auc_score(np.repeat(positive, w), np.repeat(scores, w))
        assert value == pytest.approx(slow)


def test_weighted_auc_without_a_class_is_nan():
    scores, positive = _drawn()
    weights = np.stack([positive, ~positive, np.ones(len(positive))]).astype(float)
    found = intervals.weighted_auc(scores, positive, weights)
    assert np.isnan(found).tolist() == [True, True, False]


def test_weighted_means_leave_nan_out():
    values, weights = np.array([1.0, np.nan, 4.0]), np.array([[1.0, 5, 1], [0, 1, 0], [2, 0, 1]])
    np.testing.assert_allclose(intervals.weighted_mean(values, weights), [2.5, np.nan, 2.0])
    hit, among = np.array([True, False, True]), np.array([True, True, False])
    np.testing.assert_allclose(intervals.weighted_share(hit, among, weights), [1 / 6, 0, 1])


def test_the_bootstrap_draws_patients_and_not_films():
    patients = ["a", "a", "b", "c"]
    seen = []
    intervals.bootstrap(patients, lambda w: seen.append(w) or w[:, 0], resamples=500, seed=0)
    weights = np.concatenate(seen)
    assert weights.shape == (500, 4)
    assert (weights[:, 0] == weights[:, 1]).all(), "films of one patient were drawn apart"
    assert (weights[:, 0] + weights[:, 2] + weights[:, 3] == 3).all()
    assert np.unique(weights[:, 0]).tolist() == [0, 1, 2, 3]


def test_the_same_seed_draws_the_same():
    patients = [str(i // 2) for i in range(30)]
    draw = lambda seed: intervals.bootstrap(  # noqa: E731
        patients, lambda w: w[:, 0], resamples=50, seed=seed
    )
    assert (draw(1) == draw(1)).all() and (draw(1) != draw(2)).any()


def test_an_interval_cannot_leave_zero_to_one_and_a_perfect_auc_has_none():
    scores = np.array([0.0, 1, 2, 3, 4, 5, 6, 7])
    positive = scores > 3
    perfect = intervals.from_influence(*intervals.auc_influence(scores, positive))
    assert (perfect.value, perfect.low, perfect.high) == (1.0, None, None)
    assert "no interval" in str(perfect)
    scores[3] = 4.5
    close = intervals.from_influence(*intervals.auc_influence(scores, positive))
    assert 0 < close.low < close.value < close.high < 1


def test_one_film_of_a_class_gives_no_delong_interval():
    found = intervals.auc_influence(np.array([1.0, 2, 0]), np.array([False, True, False]))
    assert intervals.from_influence(*found).low is None


def test_too_few_defined_resamples_give_no_interval():
    samples = np.array([0.4, 0.6] * 40 + [np.nan] * 20)
    assert intervals.percentile_interval(0.5, samples, 50).low is None
    assert intervals.percentile_interval(0.5, samples[:85], 50).low == pytest.approx(0.4)
    assert intervals.percentile_interval(0.5, samples[:85], 9).low is None


def test_resamples_that_are_all_the_same_give_no_interval():
    """As for an AUC of 1: the bootstrap does not see what it did not draw."""
    assert intervals.percentile_interval(1.0, np.ones(100), 50).low is None


def test_a_class_must_be_there():
    with pytest.raises(ValueError, match="needs both classes"):
        intervals.auc_influence(np.arange(3.0), np.ones(3, bool))


def _patients(rng, patients, shift):
    """Two films a patient whose scores share a patient's part."""
    positive = np.repeat(rng.random(patients) < 0.5, 2)
    scores = np.repeat(rng.normal(size=patients), 2) + 0.6 * rng.normal(size=2 * patients)
    return scores + shift * positive, positive, [str(i // 2) for i in range(2 * patients)]


def test_both_intervals_cover_the_truth():
    """200 drawn sets of 60 patients with two alike films each.

    Over 200 sets the share of a true 95 % interval lies above 0.90 with probability 0.998; DeLong
    for independent films is too narrow here and must show it.
    """
    rng = np.random.default_rng(3)
    large = _patients(rng, 100_000, 1.2)
    truth = intervals.auc_influence(*large[:2])[0]
    covered = {"clustered": 0, "bootstrap": 0, "independent": 0}
    for seed in range(200):
        scores, positive, patients = _patients(rng, 60, 1.2)
        value, influence = intervals.auc_influence(scores, positive)
        summed = np.array(
            [sum(v for _, v in group) for _, group in itertools.groupby(
                zip(patients, influence, strict=True), key=lambda pair: pair[0]
            )]
        )  # fmt: skip
        samples = intervals.bootstrap(
            patients,
            lambda w, s=scores, p=positive: intervals.weighted_auc(s, p, w),
            resamples=400,
            seed=seed,
        )
        found = {
            "clustered": intervals.from_influence(value, summed),
            "bootstrap": intervals.percentile_interval(value, samples, 60),
            "independent": intervals.from_influence(value, influence),
        }
        for key, interval in found.items():
            covered[key] += interval.low <= truth <= interval.high
    assert covered["clustered"] >= 180 and covered["bootstrap"] >= 180, covered
    assert covered["independent"] < covered["clustered"], covered
