"""Fixations to gaze densities: presets as data, and the centre prior.

A density is float32 `(H, W)` and sums to 1. Points are `(x, y)` pixels of the map's own grid, the
centre of the top-left pixel at (0, 0).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cxrgaze.records import Frozen

Array = NDArray[np.floating]


class HeatmapPreset(Frozen):
    """How fixations become a density."""

    kind: Literal["sample", "fixation"]
    """Which rows of `fixations.csv` count: raw gaze samples or fixations."""
    weight: Literal["count", "duration"]
    """Each row counts once, or by its duration."""
    sigma_px: float | None = Field(default=None, gt=0)
    """Standard deviation in pixels of the source film."""
    sigma_share: float | None = Field(default=None, gt=0)
    """Standard deviation as a share of the source film's width."""
    source: str
    """Where the preset comes from. Without either sigma, each row's own is used (one degree)."""


PRESETS = {
    "paper": HeatmapPreset(
        kind="sample",
        weight="count",
        sigma_px=75.5,
        source="authors' code at 6873ddf (docs/method.md#heatmaps); border cut, not reflected",
    ),
    "egd-authors": HeatmapPreset(
        kind="fixation",
        weight="count",
        sigma_px=150.0,
        source="EGD-CXR authors' code (docs/method.md#heatmaps)",
    ),
    "reflacx": HeatmapPreset(
        kind="fixation", weight="duration", source="REFLACX authors' code (docs/method.md#heatmaps)"
    ),
    "phantom": HeatmapPreset(
        kind="fixation", weight="duration", sigma_share=0.05, source="docs/method.md#phantom"
    ),
}


def density(
    points: Array, weights: Array, sigmas: Array, shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Sum of axis-aligned Gaussians, truncated at the map's border and normalised to sum 1.

    Args:
        points: `(n, 2)`, `(x, y)` in pixels of the map; points outside still reach in.
        weights: `(n,)`, non-negative, in any unit.
        sigmas: `(n, 2)`, standard deviations `(x, y)` in pixels of the map, positive.
        shape: `(H, W)` of the map.

    Raises:
        ValueError: no points, a value that is not finite, or no weight inside the map.
    """
    points, weights, sigmas = (np.asarray(a, dtype=np.float64) for a in (points, weights, sigmas))
    if not len(points) or not all(np.isfinite(a).all() for a in (points, weights, sigmas)):
        raise ValueError(f"a density needs finite fixations, found {len(points)} rows")
    along_y, along_x = (
        np.exp(-0.5 * ((np.arange(size)[:, None] - points[:, axis]) / sigmas[:, axis]) ** 2)
        for size, axis in zip(shape, (1, 0), strict=True)
    )
    peak = weights / (2 * np.pi * sigmas[:, 0] * sigmas[:, 1])
    total = (along_y * peak) @ along_x.T
    mass = total.sum()
    if not mass > 0:
        raise ValueError("no fixation has weight inside the map")
    return np.asarray(total / mass, dtype=np.float32)


def centre_prior(densities: Iterable[Array]) -> NDArray[np.float32]:
    """Mean of the training densities, sum 1: what a model without eyes would predict.

    Its CC stands beside every CC (docs/method.md#centre-prior).
    """
    stack = np.stack([np.asarray(d, dtype=np.float64) for d in densities])
    mean = stack.mean(axis=0)
    return np.asarray(mean / mean.sum(), dtype=np.float32)
