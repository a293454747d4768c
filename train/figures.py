"""Point figures of the heads: AUC beside accuracy, CC beside the centre prior."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.command import counted
from cxrgaze.errors import DataError
from cxrgaze.evidence import heatmaps, metrics
from cxrgaze.evidence.arrays import Arrays, canvas_density
from cxrgaze.evidence.gaze import Gaze
from cxrgaze.evidence.truth import present_classes
from cxrgaze.films.canvas import Geometry
from cxrgaze.spec import LOG_DENSITY, LOGITS, Head, Outputs
from cxrgaze.train.model import AnyNetwork


def predict(network: AnyNetwork, images: NDArray[np.float32], batch: int = 16) -> Outputs:
    """The heads of the network in evaluation mode for `images` `(N, 1, H, W)`."""
    network.eval()
    parts: dict[Head, list[NDArray[np.float32]]] = {head: [] for head in network.heads}
    with torch.inference_mode():
        starts = range(0, len(images), batch)
        for start in counted(starts, len(starts), "batch"):
            for head, tensor in network(torch.tensor(images[start : start + batch])).items():
                parts[head].append(tensor.numpy())
    return {head: np.concatenate(arrays) for head, arrays in parts.items()}


def point_figures(
    network: AnyNetwork,
    arrays: Arrays,
    prior: NDArray[np.floating] | None,
    preset: heatmaps.HeatmapPreset,
    served: Served,
) -> dict[str, Any]:
    """Metrics of the heads on `arrays`, without intervals.

    Args:
        prior: centre prior `(H, W)` of the *training* films on the canvas; None where they have
            no gaze.
        preset: how the readers' own maps are made, for the inter-reader CC.
        served: what is served of the network; classes that nothing taught have no figure.

    Returns:
        Plain numbers: films; where there are labels, auc_per_class (of the classes that some and
        not all films have), auc_macro (their mean), auc_micro, of exclusive classes accuracy; where
        there is gaze, means over films of `saliency_by_film`.
    """
    outputs = predict(network, arrays.images)
    figures: dict[str, Any] = {"films": len(arrays.films)}
    truth = arrays.truth[:, served.columns]
    if present_classes(truth):
        # Softmax is monotone per class only up to its denominator: AUC needs probabilities.
        probabilities = replace(served, decision=Decision()).probabilities(outputs[LOGITS])
        aucs = metrics.auc_per_class(probabilities, truth)
        figures["auc_per_class"] = {served.classes[c]: area for c, area in aucs.items()}
        figures["auc_macro"] = metrics.macro_auc(probabilities, truth)
        figures["auc_micro"] = metrics.micro_auc(probabilities, truth)
        if served.spec.exclusive:
            figures["accuracy"] = metrics.accuracy(probabilities, truth)
    if LOG_DENSITY not in served.heads:
        return figures
    by_film = saliency_by_film(arrays, outputs[LOG_DENSITY][:, 0], prior, preset)
    for key in next(iter(by_film.values()), {}):
        values = np.array([saliency[key] for saliency in by_film.values()])
        if not np.isnan(values).all():
            figures[key] = float(np.nanmean(values))
    return figures


def saliency_by_film(
    arrays: Arrays,
    log_density: NDArray[np.float32],
    prior: NDArray[np.floating] | None,
    preset: heatmaps.HeatmapPreset,
) -> dict[int, dict[str, float]]:
    """Saliency metrics of every film with gaze, over the film's area, by the film's index.

    Args:
        log_density: `(N, H, W)`. prior, preset: as in `point_figures`.

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
    predicted: NDArray[np.floating],
    prior: NDArray[np.floating] | None,
    preset: heatmaps.HeatmapPreset,
) -> dict[str, float]:
    geometry, gaze = arrays.geometries[index], arrays.gaze[index]
    assert gaze is not None
    prediction, truth = (geometry.crop(m) for m in (predicted, arrays.densities[index, 0]))
    # A sample of the eye tracker is no fixation: NSS and AUC-Judd take fixations where there are.
    fixations = gaze.select(kind="fixation" if "fixation" in gaze.kinds else None).points
    points = np.rint(geometry.to_canvas(fixations) - (geometry.left, geometry.top)).astype(int)
    inside = points[((points >= 0) & (points < (geometry.width, geometry.height))).all(axis=1)]
    saliency = _agreement(prediction, truth, inside)
    if prior is not None:
        of_prior = _agreement(geometry.crop(prior), truth, inside)
        saliency |= {f"{key}_centre_prior": value for key, value in of_prior.items()}
    maps = _reader_maps(gaze, geometry, preset)
    # A pooled map has less noise than a reader's own: like stands beside like.
    several = len(maps) > 1
    pairs = [metrics.cc(*pair) for pair in itertools.combinations(maps, 2)]
    alone = [metrics.cc(prediction, single) for single in maps]
    saliency["cc_between_readers"] = float(np.mean(pairs)) if several else float("nan")
    saliency["cc_single_reader"] = float(np.mean(alone)) if several else float("nan")
    saliency["pad_mass"] = float(1 - prediction.sum())
    return saliency


def _reader_maps(
    gaze: Gaze, geometry: Geometry, preset: heatmaps.HeatmapPreset
) -> list[NDArray[np.floating]]:
    """Each reader's own map over the film's area; a reader who looked elsewhere has none."""
    maps = []
    for reader in sorted(set(gaze.readers)):
        with contextlib.suppress(DataError):
            density = canvas_density(gaze.select(reader=reader), geometry, preset)
            maps.append(geometry.crop(density))
    return maps


def _agreement(
    prediction: NDArray[np.floating], truth: NDArray[np.floating], fixations: NDArray[np.integer]
) -> dict[str, float]:
    """Metrics of one map; NaN for those at fixations where there is none on the film."""
    seen = len(fixations) > 0  # a density can reach in from fixations beside the film
    return {
        "cc": metrics.cc(prediction, truth),
        "sim": metrics.sim(prediction, truth),
        "kld": metrics.kld(prediction, truth),
        "nss": metrics.nss(prediction, fixations) if seen else float("nan"),
        "auc_judd": metrics.auc_judd(prediction, fixations) if seen else float("nan"),
    }
