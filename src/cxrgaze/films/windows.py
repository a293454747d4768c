"""Windows: from integer pixels to display values in [0, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrgaze.spec import PixelSource

PERCENTILES = (0.5, 99.5)
"""The window of a film that brings none of its own: these percentiles of its pixels."""


Window = tuple[float, float]


_ROWS = 256  # worked on at once: an index of a whole film takes eight bytes a pixel


def level_counts(values: NDArray[Any]) -> tuple[int, NDArray[np.int64]]:
    """The smallest of integer pixels, along any axes, and how many have each value from it on."""
    low, high = int(values.min()), int(values.max())
    counts = np.zeros(high - low + 1, dtype=np.int64)
    for start in range(0, len(values), _ROWS):
        part = values[start : start + _ROWS].astype(np.int64) - low
        counts += np.bincount(part.ravel(), minlength=len(counts))
    return low, counts


def look_up(
    values: NDArray[np.integer], low: int, table: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The entry of `table` for each of integer pixels `(H, W)`; its first is that of `low`."""
    out = np.empty(values.shape, dtype=np.float32)
    for start in range(0, len(values), _ROWS):
        part = slice(start, start + _ROWS)
        out[part] = table[values[part].astype(np.int64) - low]
    return out


def percentile_window(values: NDArray[Any]) -> tuple[float, float]:
    """Lower and upper end of the stated percentile window (`PERCENTILES`) of integer pixels."""
    low, counts = level_counts(values)
    share = np.cumsum(counts) / values.size
    lower, upper = (int(np.searchsorted(share, p / 100)) + low for p in PERCENTILES)
    return float(lower), float(upper)


def apply_window(values: NDArray[np.generic], lower: float, upper: float) -> NDArray[np.float32]:
    """Linear ramp from 0 at `lower` to 1 at `upper`, clipped; a step where they are equal."""
    out = values.astype(np.float32)
    out -= np.float32(lower)
    with np.errstate(over="ignore"):  # of a step: infinity is clipped
        out /= np.float32(max(upper - lower, np.finfo(np.float32).tiny))
    return np.clip(out, 0, 1, out=out)


def without_frame(values: NDArray[Any]) -> NDArray[Any]:
    """The part of `values` `(H, W)` inside a constant frame, all of it where there is none.

    A frame takes half a percent of the pixels or more (less moves none of `PERCENTILES`), and what
    it frames is not constant too.
    """
    inside = values
    for corner in (0, -1):
        differs = inside != inside[corner, corner]
        if not differs.any():
            return values
        rows, columns = (np.flatnonzero(differs.any(axis=axis)) for axis in (1, 0))
        inside = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    is_frame = inside.size < (1 - PERCENTILES[0] / 100) * values.size
    return inside if is_frame and inside.min() < inside.max() else values


FRAME = "a constant frame around the film was left out of its percentiles"


def grey_levels(
    values: NDArray[np.generic],
) -> tuple[NDArray[np.float32], PixelSource, tuple[str, ...]]:
    """Display values of uint8 or uint16 pixels, what they are, and what is to be noted."""
    if values.dtype == np.uint8:
        return values.astype(np.float32) / np.float32(255), "image-8bit", ()
    inside = without_frame(values)
    window = percentile_window(inside)
    notes = (FRAME,) if inside.size < values.size else ()
    return apply_window(values, *window), "image-16bit", notes
