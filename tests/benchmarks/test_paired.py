"""The comparison's verdicts on drawn times whose truth is known."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from cxrgaze.benchmarks import paired
from cxrgaze.benchmarks.paired import ROUNDS, TURN, compare, interleave

KINDS = ("plain", "drift", "two modes", "heavy tail")


def _times(rng, kind, effect, rounds=ROUNDS):
    """Base and new as `interleave` would time them: what the machine does hits whoever runs."""
    count = rounds * 2 * TURN
    number = np.arange(count)
    if kind == "drift":
        walk = np.cumsum(rng.normal(size=count)) / np.sqrt(count)
        machine = 1 + 0.5 * number / count + 0.1 * walk
    elif kind == "two modes":  # 40 % slower for 25 readings or so, then fast again
        machine = 1 + 0.4 * (np.cumsum(rng.random(count) < 1 / 25) % 2)
    elif kind == "heavy tail":
        machine = np.where(rng.random(count) < 0.05, 1 + rng.pareto(1.2, count), 1)
    else:
        machine = np.ones(count)
    taken = (machine * rng.lognormal(0, 0.05, count)).reshape(rounds, 2, TURN)
    order = np.array([rng.permutation(2) for _ in range(rounds)])
    base, new = (taken[np.arange(rounds), order[:, i]] for i in (0, 1))
    return base, new * effect


def _verdicts(kind, effect, seeds, **options):
    counts = Counter()
    for seed in range(seeds):
        base, new = _times(np.random.default_rng(seed), kind, effect, **options)
        counts[compare(base, new, seed=seed).verdict] += 1
    return {verdict: count / seeds for verdict, count in counts.items()}


def _judge(kind, seeds, *, false_alarms, power):
    alike = _verdicts(kind, 1.0, seeds)
    assert alike.get("faster", 0) + alike.get("slower", 0) <= false_alarms, alike
    assert alike.get("no difference", 0) >= 0.85, alike
    assert _verdicts(kind, 1.05, seeds).get("slower", 0) >= power
    assert _verdicts(kind, 1 / 1.05, seeds).get("faster", 0) >= power


@pytest.mark.parametrize("kind", KINDS)
def test_no_false_alarms_and_five_percent_are_found(kind):
    _judge(kind, 100, false_alarms=0.07, power=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_false_alarms_and_five_percent_are_found_over_1000_seeds(kind):
    _judge(kind, 1000, false_alarms=0.07, power=0.9)


def test_too_few_rounds_say_nothing():
    base, new = _times(np.random.default_rng(0), "plain", 3.0, rounds=paired.FEWEST - 1)
    found = compare(base, new)
    assert found.verdict == "inconclusive" and "too few" in found.reason
    assert found.ratio.value == pytest.approx(3, rel=0.1) and found.ratio.low is None


def test_comparing_without_pairs_would_be_fooled_by_drift():
    """Base first, new after it, on a machine that slows down: what taking turns is for."""
    drift = np.linspace(1, 1.5, 2 * ROUNDS * TURN).reshape(2, ROUNDS, TURN)
    assert compare(drift[0], drift[1]).verdict == "slower"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.98, 1.02, "no difference"),
        (1.001, 1.02, "no difference"),  # there, and too small to matter
        (0.90, 0.99, "faster"),
        (1.01, 1.20, "slower"),
        (0.90, 1.01, "inconclusive"),
        (0.99, 1.20, "inconclusive"),
    ],
)
def test_verdicts_of_intervals(low, high, verdict):
    assert paired._verdict(low, high, 0.03)[0] == verdict


def test_times_that_are_none_are_refused():
    good = np.ones((20, 5))
    for bad in (np.ones((19, 5)), np.zeros((20, 5)), good * np.nan):
        with pytest.raises(ValueError, match="positive times of the same rounds"):
            compare(good, bad)


def test_contenders_take_turns_on_the_same_films():
    seen = {"a": [], "b": []}
    readers = {name: seen[name].append for name in seen}
    times = interleave(readers, rounds=6, turn=3)
    assert {name: t.shape for name, t in times.items()} == {"a": (6, 3), "b": (6, 3)}
    assert seen["a"] == seen["b"] and len(seen["a"]) == 6 * 4  # one of each turn does not count
    assert seen["a"][4:8] == [3, 3, 4, 5]


def test_the_order_changes_and_time_is_limited():
    order = []
    readers = {name: (lambda film, name=name: order.append(name)) for name in "abc"}
    interleave(readers, rounds=8, turn=1)
    firsts = {tuple(order[i : i + 6 : 2]) for i in range(0, len(order), 6)}
    assert len(firsts) > 1
    slow = {"a": lambda film: time.sleep(0.01)}
    assert len(interleave(slow, rounds=1000, seconds=0.05)["a"]) < 10


def test_slow_contenders_take_one_reading_a_turn(monkeypatch):
    readers = {"a": lambda film: time.sleep(0.002)}
    assert interleave(readers, rounds=2)["a"].shape == (2, TURN)
    monkeypatch.setattr(paired, "SLOW_MS", 1.0)
    assert interleave(readers, rounds=2)["a"].shape == (2, 1)
