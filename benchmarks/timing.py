"""Order statistics of latencies: no mean, no clipping, a count beside every figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cxrgaze.spec import Frozen

_NEEDED = {"p50": 1, "p90": 10, "p95": 20, "p99": 100}


class Latency(Frozen):
    """Percentiles in milliseconds; None where there are too few samples to have one."""

    count: int
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float


def latency(samples_ms: Sequence[float]) -> Latency:
    """Percentiles by the nearest-rank definition, each a latency that really occurred.

    A percentile p is given from 1 / (1 - p) samples on: below, it would only repeat the maximum.

    Raises:
        ValueError: no samples.

    Example:
        >>> latency([1.0, 2.0, 3.0, 4.0]).p50
        2.0
    """
    if not samples_ms:
        raise ValueError("no latency samples")
    ordered = np.sort(np.asarray(samples_ms, dtype=np.float64))
    found = {
        name: float(np.quantile(ordered, int(name[1:]) / 100, method="inverted_cdf"))
        if len(ordered) >= needed
        else None
        for name, needed in _NEEDED.items()
    }
    return Latency(count=len(ordered), max=float(ordered[-1]), **found)
