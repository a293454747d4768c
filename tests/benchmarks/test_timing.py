"""Percentiles and their intervals against numpy and drawn data; the rule of the warm-up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cxrgaze.benchmarks import timing
from cxrgaze.benchmarks.timing import NEEDED, PERCENTILES, latency, warm_up


def test_percentiles_are_latencies_that_occurred():
    samples = np.random.default_rng(0).lognormal(size=10_000)
    found = latency(list(samples))
    ordered = np.sort(samples)
    # Nearest rank: the smallest sample that at least the share p does not exceed.
    for name, share in PERCENTILES.items():
        slow = next(s for i, s in enumerate(ordered, 1) if i >= share * 10_000 - 1e-6)
        assert getattr(found, name).value == slow
    assert found.max == ordered[-1] and found.count == 10_000


def test_one_slow_reading_is_not_clipped():
    assert latency([1.0] * 99 + [500.0]).max == 500


def test_too_few_samples_have_no_tail():
    for name, needed in NEEDED.items():
        assert getattr(latency([1.0] * needed), name).value == 1
        if needed > 1:
            assert getattr(latency([1.0] * (needed - 1)), name) is None
    assert latency([1.0] * 19).p50.low is None and latency([1.0] * 20).p50.low == 1
    with pytest.raises(ValueError, match="no latency"):
        latency([])


def _series(rng, count, correlation):
    noise = rng.normal(size=count)
    for i in range(1, count):
        noise[i] = correlation * noise[i - 1] + np.sqrt(1 - correlation**2) * noise[i]
    return np.exp(0.1 * noise)


def _coverage(correlation, seeds=150, count=200):
    hits = 0
    for seed in range(seeds):
        p50 = latency(list(_series(np.random.default_rng(seed), count, correlation)), seed).p50
        hits += p50.low <= 1 <= p50.high
    return hits / seeds


def test_intervals_hold_the_true_median(monkeypatch):
    assert _coverage(0.0) >= 0.9
    alike = _coverage(0.6)
    assert alike >= 0.83
    # What drawing single samples would claim of readings that are alike: the test can fail.
    monkeypatch.setattr(timing, "round", lambda number: 1, raising=False)
    assert _coverage(0.6) < alike - 0.1


def test_a_steady_machine_settles_after_three_windows():
    found = warm_up(lambda: 2.0, seconds=10)
    assert found.settled and found.readings == timing.WINDOW * timing.WINDOWS
    assert found.spread == 0


def test_a_machine_that_speeds_up_is_waited_for():
    times = iter([30.0] * 10 + [20.0] * 10 + [10.0] * 40)
    found = warm_up(lambda: next(times), seconds=10)
    assert found.settled and found.readings == 50


def test_one_that_never_settles_is_said_to_be_so():
    times = itertools.cycle([1.0] * timing.WINDOW + [2.0] * timing.WINDOW)
    found = warm_up(lambda: next(times), seconds=0.01)
    assert not found.settled and found.readings >= timing.WINDOW
