"""How often the gate's search ships what it must not: `python -m cxrgaze.evidence.simulation`.

Every form of a sequence loses exactly its limit, so that whatever passes is an error; outcomes of
forms are correlated, as those of one network's are. Shares are drawn by patient through a Gaussian
copula; the bootstrapped quantity is a mean of paired changes, as CC and Brier are. On a ladder,
forms lose less the more is kept, and what counts is whether one beyond its limit ships, and
whether anything does. Seeds are fixed; figures stand in docs/precision.md#search.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.verdicts import Limits
from cxrgaze.command import steps
from cxrgaze.evidence.bounds import clopper_pearson, paired_shares, studentised_mean

PATIENTS = 300
OF_A_CLASS = 150
FORMS = 18
"""Looks that a search may take."""
CORRELATIONS = (0.0, 0.5, 0.8, 0.95)
RESAMPLES = 400
SPREAD = 0.05
"""Standard deviation of a patient's change, as the gate's tests draw it."""

Look = Callable[[NDArray[np.float64], float], bool]
"""Whether a form passes whose patients have these standard normal numbers and this true loss."""


def _events(normal: NDArray[np.float64], share: float) -> int:
    return int((normal < NormalDist().inv_cdf(share)).sum()) if share > 0 else 0


@cache
def _flips_pass(count: int, patients: int) -> bool:
    return clopper_pearson(count, patients).bound < Limits().flips


@cache
def _sensitivity_passes(lost: int, patients: int) -> bool:
    return paired_shares(lost, 0, patients).bound < Limits().sensitivity


def flips_pass(normal: NDArray[np.float64], share: float) -> bool:
    """Of a share of patients whose decision flips."""
    return _flips_pass(_events(normal, share), len(normal))


def sensitivity_passes(normal: NDArray[np.float64], share: float) -> bool:
    """Of a share of a class's patients who are lost, none gained."""
    some = normal[:OF_A_CLASS]
    return _sensitivity_passes(_events(some, share), len(some))


def mean_passes(normal: NDArray[np.float64], loss: float) -> bool:
    """Of a mean change by the studentised bootstrap, with skewed changes."""
    chance = np.clip(0.5 * (1 + np.vectorize(math.erf)(normal / math.sqrt(2))), 1e-12, 1 - 1e-12)
    changes = -loss - SPREAD * (-np.log1p(-chance) - 1)  # exponential: most lose little
    patients = [f"{i:04d}" for i in range(len(changes))]
    found = studentised_mean(patients, changes, resamples=RESAMPLES)
    return -found.bound < Limits().cc


def shipped(look: Look, losses: Sequence[float], correlation: float, seed: int) -> int | None:
    """The last form of a sequence that passed before one did not; None where the first did not.

    Args:
        losses: true loss of each form, the most precise first.
    """
    rng = np.random.default_rng([seed, round(1e4 * correlation)])
    shared = rng.normal(size=PATIENTS)
    last = None
    for number, loss in enumerate(losses):
        own = rng.normal(size=PATIENTS)
        if not look(math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own, loss):
            break
        last = number
    return last


def upper(count: int, runs: int) -> float:
    """The one-sided upper 99 % bound of a simulated probability, by the normal approximation."""
    share = count / runs
    return share + NormalDist().inv_cdf(0.99) * math.sqrt(max(share * (1 - share), 1 / runs) / runs)


LOOKS: dict[str, tuple[Look, float]] = {
    "flips": (flips_pass, Limits().flips),
    "sensitivity": (sensitivity_passes, Limits().sensitivity),
    "mean (CC, Brier)": (mean_passes, Limits().cc),
}


def at_the_limit(name: str, correlation: float, runs: int) -> int:
    """In how many of so many sequences a form ships, all of which truly lose their limit."""
    look, limit = LOOKS[name]
    return sum(
        shipped(look, [limit] * FORMS, correlation, seed) is not None for seed in range(runs)
    )


def on_a_ladder(name: str, correlation: float, runs: int) -> tuple[int, int]:
    """Sequences in which a form beyond its limit ships, and those in which any does.

    Forms lose from nothing to twice their limit, in equal steps.
    """
    look, limit = LOOKS[name]
    losses = [2 * limit * number / (FORMS - 1) for number in range(FORMS)]
    found = [shipped(look, losses, correlation, seed) for seed in range(runs)]
    beyond = sum(number is not None and losses[number] > limit for number in found)
    return beyond, sum(number is not None for number in found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m cxrgaze.evidence.simulation", description=__doc__
    )
    parser.add_argument("--runs", type=int, default=10_000, help="of each case (default 10000)")
    parser.add_argument("--bootstrapped-runs", type=int, help="of those that resample (as --runs)")
    args = parser.parse_args(arguments)
    print("| quantity | correlation | P(any ships, all at the limit) | upper 99 % bound |")
    print("| --- | --- | --- | --- |")
    cases = [(name, correlation) for name in LOOKS for correlation in CORRELATIONS]
    bar = steps(len(cases), True)
    for name, correlation in cases:
        runs = args.runs
        if LOOKS[name][0] is mean_passes and args.bootstrapped_runs:
            runs = args.bootstrapped_runs
        count = at_the_limit(name, correlation, runs)
        bar.update()
        print(
            f"| {name} | {correlation} | {count / runs:.4f} of {runs} | {upper(count, runs):.4f} |"
        )
    bar.close()
    print("\n| ladder | correlation | P(one beyond its limit ships) | P(anything ships) |")
    print("| --- | --- | --- | --- |")
    for name in ("flips", "sensitivity"):
        for correlation in CORRELATIONS:
            beyond, some = on_a_ladder(name, correlation, args.runs)
            print(f"| {name} | {correlation} | {beyond / args.runs:.4f} | {some / args.runs:.4f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
