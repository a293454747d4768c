from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from cxrgaze.train.decision import fit_decision, fit_temperature, operating_point


def _overconfident(n=4000, factor=3.0, seed=0):
    """Labels drawn from softmax(logits); the logits given are `factor` times too large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 2
    p = softmax(logits, axis=1)
    labels = np.array([rng.choice(3, p=row) for row in p])
    return logits * factor, labels


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(factor):
    logits, labels = _overconfident(factor=factor)
    assert fit_temperature(logits, labels) == pytest.approx(factor, rel=0.06)


def test_the_temperature_is_the_best_of_a_fine_grid():
    logits, labels = _overconfident(n=150, seed=4)
    grid = np.exp(np.linspace(np.log(0.5), np.log(20), 500))
    losses = [log_loss(labels, softmax(logits / t, axis=1), labels=[0, 1, 2]) for t in grid]
    assert fit_temperature(logits, labels) == pytest.approx(grid[np.argmin(losses)], rel=1e-2)


def _slow_point(scores, positive, wanted):
    values = sorted(set(scores))
    candidates = [values[0] / 2] + [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    rated = []
    for t in candidates:
        found = np.mean([s >= t for s, p in zip(scores, positive, strict=True) if p])
        spared = np.mean([s < t for s, p in zip(scores, positive, strict=True) if not p])
        rated.append((t, found, found + spared))
    if wanted is not None:
        return max(t for t, found, _ in rated if found >= wanted)
    best = max(j for _, _, j in rated)
    return min(t for t, _, j in rated if j == best)


@pytest.mark.parametrize("wanted", [None, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_the_operating_point_equals_its_slow_form(seed, wanted):
    rng = np.random.default_rng(seed)
    positive = rng.random(60) < 0.3
    scores = np.round(rng.random(60) * 0.6 + 0.3 * positive, 2)
    found = operating_point(scores, positive, wanted)
    assert found == pytest.approx(_slow_point(scores, positive, wanted))
    if wanted:
        assert (scores[positive] >= found).mean() >= wanted


def test_a_class_that_no_film_or_every_film_has_gets_no_point():
    logits, labels = _overconfident(n=100)
    labels[labels == 2] = 1
    decision = fit_decision(logits, labels, ("a", "b", "c"))
    assert set(decision.operating_points) == {"a", "b"}
    assert fit_decision(logits, np.zeros(100, int), ("a", "b", "c")).operating_points == {}
    assert fit_decision(logits, np.zeros(100, int), ("a", "b", "c")).temperature == 1.0
    assert fit_decision(logits[:20], labels[:20], ("a", "b", "c")).temperature == 1.0
    sure = np.eye(3)[labels] * 2.0
    assert fit_decision(sure, labels, ("a", "b", "c")).temperature == 1.0  # all are right
    assert fit_decision(logits, labels, ("a", "b", "c")).temperature != 1.0
    empty = fit_decision(np.zeros((0, 3)), np.zeros(0, int), ("a", "b", "c"))
    assert empty.temperature == 1.0 and empty.operating_points == {}
