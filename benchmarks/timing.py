"""Order statistics of latencies with intervals, and the rule that says when a warm-up is over.

No mean, no clipping, a count beside every figure. Latencies that follow each other are alike: their
intervals come from a bootstrap that draws blocks of neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cxrgaze.evidence.intervals import LEVEL, Interval
from cxrgaze.records import Frozen

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
NEEDED = {"p50": 1, "p90": 10, "p95": 20, "p99": 100, "p99_9": 10_000}
"""Samples from which a percentile is given: below 1 / (1 - p) it would only repeat the maximum."""

SMALLEST_INTERVAL = 20
"""Samples below which no interval is given."""

_RESAMPLES = 1000
_CHUNK = 1 << 21  # samples drawn at once


class Latency(Frozen):
    """Percentiles in milliseconds; None where there are too few samples to have one."""

    count: int
    p50: Interval | None
    p90: Interval | None
    p95: Interval | None
    p99: Interval | None
    p99_9: Interval | None
    max: float


def latency(samples_ms: Sequence[float], seed: int = 0) -> Latency:
    """Percentiles by the nearest-rank definition, each a latency that really occurred.

    Their 95 % intervals are percentiles of a circular block bootstrap with blocks of about the
    square root of the count; an interval never ends beyond what occurred, so that of a high
    percentile is a lower bound of what may come.

    Raises:
        ValueError: no samples.

    Source: Politis and Romano, "A circular block-resampling procedure for stationary data" (1992).

    Example:
        >>> latency([1.0, 2.0, 3.0, 4.0]).p50.value
        2.0
    """
    if not samples_ms:
        raise ValueError("no latency samples")
    samples = np.asarray(samples_ms, dtype=np.float64)
    asked = [name for name, needed in NEEDED.items() if len(samples) >= needed]
    shares = [PERCENTILES[name] for name in asked]
    values = _quantiles(samples[None], shares)[:, 0]
    bounds = None
    if len(samples) >= SMALLEST_INTERVAL:
        drawn = _block_bootstrap(samples, shares, seed)
        bounds = np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=1)
    percentiles: dict[str, Interval | None] = dict.fromkeys(NEEDED)
    for index, name in enumerate(asked):
        low, high = bounds[:, index] if bounds is not None else (None, None)
        percentiles[name] = Interval(value=values[index], low=low, high=high)
    return Latency(count=len(samples), max=float(samples.max()), **percentiles)


def _quantiles(samples: NDArray[np.float64], shares: Sequence[float]) -> NDArray[np.float64]:
    """Nearest-rank quantiles of each row of `samples` `(b, n)`: `(shares, b)`."""
    return np.asarray(np.quantile(samples, shares, axis=1, method="inverted_cdf"))


def _block_bootstrap(
    samples: NDArray[np.float64], shares: Sequence[float], seed: int
) -> NDArray[np.float64]:
    """Quantiles `(shares, resamples)` of series made of blocks of neighbours."""
    count = len(samples)
    length = max(round(count**0.5), 1)
    blocks = -(-count // length)
    rng = np.random.default_rng(seed)
    within = np.arange(length)
    drawn, left = [], _RESAMPLES
    while left:
        size = min(left, max(_CHUNK // count, 1))
        starts = rng.integers(count, size=(size, blocks, 1))
        indices = ((starts + within) % count).reshape(size, -1)[:, :count]
        drawn.append(_quantiles(samples[indices], shares))
        left -= size
    return np.concatenate(drawn, axis=1)


WINDOW = 10
"""Readings of a window of the warm-up."""
WINDOWS = 3
"""Windows whose medians must be alike."""
TOLERANCE = 0.05
"""Largest difference between the medians, over the smallest."""
RULE = (
    f"settled when the medians of {WINDOWS} windows in a row, of {WINDOW} readings each, are "
    f"within {TOLERANCE:.0%} of each other"
)


class WarmUp(Frozen):
    """What came before the samples."""

    readings: int
    settled: bool
    spread: float | None
    """Largest over smallest median of the last windows, minus 1; None with fewer windows."""
    rule: str = RULE


def warm_up(reading: Callable[[], float], seconds: float) -> WarmUp:
    """Call `reading`, which gives milliseconds, until it has settled or `seconds` have passed."""
    deadline = time.perf_counter() + seconds
    medians: list[float] = []
    while True:
        medians.append(float(np.median([reading() for _ in range(WINDOW)])))
        last = medians[-WINDOWS:]
        spread = max(last) / min(last) - 1 if len(last) == WINDOWS else None
        settled = spread is not None and spread <= TOLERANCE
        if settled or time.perf_counter() > deadline:
            return WarmUp(readings=WINDOW * len(medians), settled=settled, spread=spread)
