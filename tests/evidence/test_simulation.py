"""A search ships a form that truly loses its limit as rarely as one look passes it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cxrgaze.bundles.verdicts import Limits
from cxrgaze.evidence import simulation

RUNS = 500
MOST = stats.binom.ppf(0.999, RUNS, 0.05)
"""What 5 % of the runs reaches by chance."""

COUNTS = [(name, c) for name in ("flips", "sensitivity") for c in simulation.CORRELATIONS]


@pytest.mark.parametrize("name,correlation", COUNTS)
def test_a_form_at_its_limit_ships_in_a_twentieth_of_the_searches_at_most(name, correlation):
    assert simulation.at_the_limit(name, correlation, RUNS) <= MOST
    beyond, some = simulation.on_a_ladder(name, correlation, RUNS)
    assert beyond <= MOST and some == RUNS  # the first of a ladder loses nothing


@pytest.mark.slow
@pytest.mark.parametrize("correlation", simulation.CORRELATIONS)
def test_so_does_one_that_is_judged_by_resampling(correlation):
    assert simulation.at_the_limit("mean (CC, Brier)", correlation, RUNS) <= MOST


def test_a_rule_that_looks_at_the_estimate_alone_is_seen(monkeypatch):
    limit = Limits().flips

    def passes(normal, share):
        return np.mean(normal < stats.norm.ppf(share)) < limit

    monkeypatch.setitem(simulation.LOOKS, "flips", (passes, limit))
    assert simulation.at_the_limit("flips", 0.0, RUNS) > MOST


def test_a_search_ships_the_last_form_before_the_first_that_fails():
    def look(normal, loss):
        return loss != 2

    assert simulation.shipped(look, [0, 1, 2, 0], 0.5, 0) == 1
    assert simulation.shipped(look, [2, 0], 0.5, 0) is None
    assert simulation.shipped(look, [0, 1], 0.5, 0) == 1


def test_the_command_prints_both_tables(capsys):
    assert simulation.main(["--runs", "3", "--bootstrapped-runs", "1"]) == 0
    upper, ladder = capsys.readouterr().out.split("\n\n")
    cases = len(simulation.CORRELATIONS)
    assert upper.count(" of 3 |") == 2 * cases and upper.count(" of 1 |") == cases
    assert len(ladder.splitlines()) == 2 + 2 * cases
