"""Is one faster than the other? Interleaved turns on one machine, paired ratios, a verdict.

What a machine does besides, its clocks and its neighbours, changes in seconds and hits whoever runs
then. So contenders take turns, in an order drawn anew for every round, and are compared within
rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cxrgaze.command import counted
from cxrgaze.evidence.intervals import LEVEL, Interval
from cxrgaze.records import Frozen

ROUNDS = 60
"""Rounds of a comparison."""
TURN = 5
"""Readings of a turn, after one that does not count: it finds the caches of whoever ran before."""
SLOW_MS = 200.0
"""A turn is one reading where the slowest contender takes longer."""
MARGIN = 0.03
"""A ratio nearer to 1 than this is no difference."""
FEWEST = 10
"""Rounds below which no verdict is given."""

_RESAMPLES = 2000
_PAUSE = 0.01  # seconds between turns: threads of the one before stop spinning

Times = NDArray[np.float64]
"""Milliseconds `(rounds, readings)`, in the order that they were taken."""
Verdict = Literal["faster", "slower", "no difference", "inconclusive"]


class Ratio(Frozen):
    """Time of the new over that of the base: below 1 the new is faster."""

    ratio: Interval
    """Median over rounds of the ratio of the turns' medians, with its 95 % interval."""
    rounds: int
    margin: float
    verdict: Verdict
    reason: str


def interleave(
    contenders: Mapping[str, Callable[[int], object]],
    *,
    rounds: int = ROUNDS,
    turn: int | None = None,
    seconds: float = float("inf"),
    seed: int = 0,
) -> dict[str, Times]:
    """Times of contenders that take turns, in milliseconds by their names.

    Args:
        contenders: each reads film number i, the same of all in the same place of a round.
        turn: readings of a turn; None: `TURN`, or one of slow contenders.
        seconds: no new round begins after this time.
    """
    if turn is None:
        turn = 1 if max(_once(reading) for reading in contenders.values()) > SLOW_MS else TURN
    rng = np.random.default_rng(seed)
    rounds_ms: dict[str, list[list[float]]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds
    for number in counted(range(rounds), rounds, "round"):
        for index in rng.permutation(len(contenders)):
            name, reading = list(contenders.items())[index]
            time.sleep(_PAUSE)
            reading(number * turn)
            times = []
            for film in range(number * turn, (number + 1) * turn):
                start = time.perf_counter()
                reading(film)
                times.append((time.perf_counter() - start) * 1e3)
            rounds_ms[name].append(times)
        if time.perf_counter() > deadline:
            break
    return {name: np.array(times) for name, times in rounds_ms.items()}


def _once(reading: Callable[[int], object]) -> float:
    start = time.perf_counter()
    reading(0)
    return (time.perf_counter() - start) * 1e3


def compare(base: Times, new: Times, margin: float = MARGIN, seed: int = 0) -> Ratio:
    """The ratio of the same rounds, by a bootstrap over rounds, and a verdict.

    *no difference*: the whole interval is within the margin; *faster*, *slower*: the whole
    interval is on one side of 1; else *inconclusive*, as with fewer than `FEWEST` rounds.

    Raises:
        ValueError: not the same rounds, or a time that is not positive.

    Example:
        >>> base = np.full((12, 5), 2.0)
        >>> compare(base, base * 0.5).verdict
        'faster'
    """
    if base.shape[:1] != new.shape[:1] or not (base > 0).all() or not (new > 0).all():
        raise ValueError(f"expected positive times of the same rounds, {base.shape}, {new.shape}")
    logs = np.log(np.median(new, axis=1) / np.median(base, axis=1))
    value = float(np.exp(np.median(logs)))
    rounds = len(logs)
    if rounds < FEWEST:
        return Ratio(
            ratio=Interval(value=value),
            rounds=rounds,
            margin=margin,
            verdict="inconclusive",
            reason=f"{rounds} rounds are too few, {FEWEST} are needed",
        )
    drawn = np.random.default_rng(seed).integers(rounds, size=(_RESAMPLES, rounds))
    ends = np.quantile(np.median(logs[drawn], axis=1), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    low, high = np.exp(ends).tolist()
    verdict, reason = _verdict(low, high, margin)
    return Ratio(
        ratio=Interval(value=value, low=low, high=high),
        rounds=rounds,
        margin=margin,
        verdict=verdict,
        reason=reason,
    )


def _verdict(low: float, high: float, margin: float) -> tuple[Verdict, str]:
    between = f"takes {low:.3f} to {high:.3f} of the base's time (95 %)"
    if 1 / (1 + margin) <= low and high <= 1 + margin:
        return "no difference", f"{between}, within {margin:.0%}"
    if high < 1:
        return "faster", between
    if low > 1:
        return "slower", between
    return "inconclusive", f"{between}: wider than {margin:.0%} and not on one side of 1"
