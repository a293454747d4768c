from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import log_loss

from cxrgaze.bundles.served import Served
from cxrgaze.evidence.class_presets import Classes
from cxrgaze.evidence.truth import UNKNOWN, one_of
from cxrgaze.spec import DiseaseClass
from cxrgaze.train.decision import MIN_FILMS, fit_decision, fit_temperature, operating_point
from cxrgaze.train.model import spec_of


def _served(kind, names="abc", **not_taught):
    classes = tuple(DiseaseClass(name=name, display=name.upper()) for name in names)
    spec = spec_of(
        "tiny",
        model_version="t",
        pixel_source="image-8bit",
        domain="phantom",
        classes=Classes(classes, kind),
    )
    return Served(spec, **not_taught)


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

    def fit(logits, labels):
        return fit_decision(logits, one_of(labels, 3), _served("exclusive"))

    decision = fit(logits, labels)
    assert set(decision.operating_points) == {"a", "b"}
    assert fit(logits, np.zeros(100, int)).operating_points == {}
    assert fit(logits, np.zeros(100, int)).temperature == 1.0
    assert fit(logits[:20], labels[:20]).temperature == 1.0
    sure = np.eye(3)[labels] * 2.0
    assert fit(sure, labels).temperature == 1.0  # all are right
    assert fit(logits, labels).temperature != 1.0
    empty = fit(np.zeros((0, 3)), np.zeros(0, int))
    assert empty.temperature == 1.0 and empty.operating_points == {}


def test_films_without_a_label_and_classes_that_nothing_taught_do_not_count():
    logits, labels = _overconfident(n=400)
    decision = fit_decision(logits, one_of(labels, 3), _served("exclusive"))
    assert set(decision.operating_points) == {"a", "b", "c"} and not decision.temperatures
    more = np.concatenate([logits, 9 * logits])
    truth = one_of(np.concatenate([labels, np.full(400, UNKNOWN)]), 3)
    assert fit_decision(more, truth, _served("exclusive")) == decision
    two = labels != 1
    wider = np.where(np.arange(3) == 1, 100, logits[two])
    untaught = _served("exclusive", untaught=("b",))
    pair = logits[two][:, [0, 2]], one_of(labels[two] // 2, 2)
    without = fit_decision(*pair, _served("exclusive", "ac"))
    assert fit_decision(wider, one_of(labels[two], 3), untaught) == without
    assert set(without.operating_points) == {"a", "c"} and without.temperature != 1


FACTORS = (0.3, 1.0, 3.0)


def _overconfident_findings(n=6000, seed=0):
    """Findings drawn from sigmoid(logits); each logit given is its own factor times too large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, len(FACTORS))) * 2
    truth = (rng.random(logits.shape) < expit(logits)).astype(np.int8)
    return logits * FACTORS, truth


def test_each_finding_has_the_temperature_that_was_put_in():
    decision = fit_decision(*_overconfident_findings(), _served("findings"))
    assert decision.temperature == 1
    found = [decision.temperatures[name] for name in "abc"]
    assert found == pytest.approx(FACTORS, rel=0.08)


def test_the_points_of_findings_are_those_of_their_probabilities():
    logits, truth = _overconfident_findings(n=300)
    for wanted in (None, 0.9):
        decision = fit_decision(logits, truth, _served("findings"), wanted)
        for column, name in enumerate("abc"):
            scores = expit(logits[:, column] / decision.temperatures[name])
            found = decision.operating_points[name]
            assert found == pytest.approx(_slow_point(scores, truth[:, column] == 1, wanted))


def test_findings_that_are_not_known_do_not_count():
    logits, truth = _overconfident_findings(n=300)
    decision = fit_decision(logits, truth, _served("findings"))
    rng = np.random.default_rng(1)
    more = np.concatenate([logits, rng.normal(size=logits.shape) * 50])
    unknown = np.full_like(truth, UNKNOWN)
    shuffle = rng.permuted(np.arange(len(more))[:, None].repeat(3, 1), axis=0)
    cells = shuffle, np.arange(3)  # other films for each finding
    both = np.concatenate([truth, unknown])
    again = fit_decision(more[cells], both[cells], _served("findings"))
    assert again.operating_points == pytest.approx(decision.operating_points)
    assert again.temperatures == pytest.approx(decision.temperatures)
    assert fit_decision(logits, unknown, _served("findings")).operating_points == {}


def test_a_finding_that_none_or_all_films_have_gets_no_point():
    logits, truth = _overconfident_findings(n=300)
    truth[:, 0], truth[:100, 1], truth[100:, 1] = 1, UNKNOWN, 0
    served = _served("findings")
    decision = fit_decision(logits, truth, served)
    assert set(decision.operating_points) == {"c"} and set(decision.temperatures) == {"c"}
    few = truth.copy()
    few[MIN_FILMS - 1 :, 2] = UNKNOWN  # enough for a point, too few for a temperature
    decision = fit_decision(logits, few, served)
    assert set(decision.operating_points) == {"c"} and decision.temperatures == {}
    sure = np.where(truth == 1, 2.0, -2.0)
    assert fit_decision(sure, truth, served).temperatures == {}  # all are right
    kept = fit_decision(logits, truth, _served("findings", untaught=("c",)))
    assert kept.operating_points == {} and kept.temperatures == {}
