"""Agreement of a map with the gaze of one film's readers, over the film's area.

Imports no torch: maps may come from anywhere.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import DataError
from cxrgaze.evidence import heatmaps, metrics
from cxrgaze.evidence.arrays import Arrays, canvas_density
from cxrgaze.evidence.gaze import Gaze
from cxrgaze.films.canvas import Geometry

Array = NDArray[np.floating]


def saliency_by_film(
    arrays: Arrays,
    log_density: NDArray[np.float32],
    prior: Array | None,
    preset: heatmaps.HeatmapPreset,
) -> dict[int, dict[str, float]]:
    """Saliency metrics of every film with gaze, over the film's area, by the film's index.

    Args:
        log_density: `(N, H, W)`.
        prior: centre prior `(H, W)` of the *training* films on the canvas; None where they have
            no gaze.
        preset: how the readers' own maps are made, for the inter-reader CC.

    Returns:
        cc, sim, kld, nss, auc_judd of the prediction (the last two at fixations, or at samples
        where a film has no fixations); the same of the centre prior
        (`..._centre_prior`); cc_between_readers, the mean over all pairs of readers, and
        cc_single_reader, of the prediction with one reader's own map, the mean over readers: both
        NaN with one reader; pad_mass.
    """
    return {
        index: _saliency_of_film(arrays, index, np.exp(log_density[index]), prior, preset)
        for index in np.flatnonzero(arrays.has_gaze).tolist()
    }


def _saliency_of_film(
    arrays: Arrays,
    index: int,
    predicted: Array,
    prior: Array | None,
    preset: heatmaps.HeatmapPreset,
) -> dict[str, float]:
    geometry, gaze = arrays.geometries[index], arrays.gaze[index]
    assert gaze is not None
    prediction, truth = (geometry.crop(m) for m in (predicted, arrays.densities[index, 0]))
    inside = fixations_on_film(gaze, geometry)
    saliency = agreement(prediction, truth, inside)
    if prior is not None:
        of_prior = agreement(geometry.crop(prior), truth, inside)
        saliency |= {f"{key}_centre_prior": value for key, value in of_prior.items()}
    readers = reader_maps(gaze, geometry, preset)
    saliency["cc_between_readers"] = cc_between(readers)
    saliency["cc_single_reader"] = cc_with_single(prediction, readers)
    saliency["pad_mass"] = float(1 - prediction.sum())
    return saliency


def fixations_on_film(gaze: Gaze, geometry: Geometry) -> NDArray[np.int64]:
    """Pixels of the film's area that were fixated, `(n, 2)` `(x, y)`; those beside it are dropped.

    A sample of the eye tracker is no fixation: samples count only where there are no fixations.
    """
    points = gaze.select(kind="fixation" if "fixation" in gaze.kinds else None).points
    pixels = np.rint(geometry.to_canvas(points) - (geometry.left, geometry.top)).astype(np.int64)
    inside = ((pixels >= 0) & (pixels < (geometry.width, geometry.height))).all(axis=1)
    return np.asarray(pixels[inside])


def reader_maps(gaze: Gaze, geometry: Geometry, preset: heatmaps.HeatmapPreset) -> list[Array]:
    """Each reader's own map over the film's area; a reader who looked elsewhere has none."""
    maps = []
    for reader in sorted(set(gaze.readers)):
        with contextlib.suppress(DataError):
            density = canvas_density(gaze.select(reader=reader), geometry, preset)
            maps.append(geometry.crop(density))
    return maps


def cc_between(readers: Sequence[Array]) -> float:
    """CC of one reader's map with another's, the mean over all pairs; NaN with one reader."""
    pairs = [metrics.cc(*pair) for pair in itertools.combinations(readers, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")


def cc_with_single(prediction: Array, readers: Sequence[Array]) -> float:
    """CC of a map with one reader's own, the mean over readers; NaN with one reader.

    The like to `cc_between`: a pooled map has less noise than a reader's own.
    """
    if len(readers) < 2:
        return float("nan")
    return float(np.mean([metrics.cc(prediction, single) for single in readers]))


def agreement(prediction: Array, truth: Array, fixations: NDArray[np.integer]) -> dict[str, float]:
    """Metrics of one map; NaN for those at fixations where there is none on the film."""
    seen = len(fixations) > 0  # a density can reach in from fixations beside the film
    return {
        "cc": metrics.cc(prediction, truth),
        "sim": metrics.sim(prediction, truth),
        "kld": metrics.kld(prediction, truth),
        "nss": metrics.nss(prediction, fixations) if seen else float("nan"),
        "auc_judd": metrics.auc_judd(prediction, fixations) if seen else float("nan"),
    }
