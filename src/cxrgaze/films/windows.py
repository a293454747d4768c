"""Windows: from integer pixels to display values in [0, 1]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxrgaze.spec import PixelSource

PERCENTILES = (0.5, 99.5)
"""The window of a film that brings none of its own: these percentiles of its pixels."""


Window = tuple[float, float]


def percentile_window(values: NDArray[np.integer]) -> tuple[float, float]:
    """Lower and upper end of the stated percentile window (`PERCENTILES`) of integer pixels."""
    low = int(values.min())
    counts = np.bincount((values.ravel() - low).astype(np.int64))
    share = np.cumsum(counts) / values.size
    ends = (int(np.searchsorted(share, p / 100)) + low for p in PERCENTILES)
    lower, upper = ends
    return float(lower), float(upper)


def apply_window(values: NDArray[np.generic], lower: float, upper: float) -> NDArray[np.float32]:
    """Linear ramp from 0 at `lower` to 1 at `upper`, clipped; a step where they are equal."""
    out = values.astype(np.float32)
    out -= np.float32(lower)
    with np.errstate(over="ignore"):  # of a step: infinity is clipped
        out /= np.float32(max(upper - lower, np.finfo(np.float32).tiny))
    return np.clip(out, 0, 1, out=out)


def without_frame(values: NDArray[np.generic]) -> NDArray[np.generic]:
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
    window = percentile_window(inside.astype(np.int64))
    notes = (FRAME,) if inside.size < values.size else ()
    return apply_window(values, *window), "image-16bit", notes
