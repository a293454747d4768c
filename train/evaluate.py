"""Evaluation of both heads on arrays: AUC beside accuracy, CC beside the centre prior."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cxrgaze import heatmaps, metrics
from cxrgaze.train.dataset import UNLABELLED, Arrays, canvas_density
from cxrgaze.train.model import Network


def predict(
    network: Network, images: NDArray[np.float32], batch: int = 64
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits `(N, C)` and log-densities `(N, 1, H, W)` of the network in evaluation mode."""
    network.eval()
    logits, densities = [], []
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            out = network(torch.from_numpy(images[start : start + batch]))
            logits.append(out.logits.numpy())
            densities.append(out.log_density.numpy())
    return np.concatenate(logits), np.concatenate(densities)


def evaluate(
    network: Network,
    arrays: Arrays,
    prior: NDArray[np.floating] | None,
    preset: heatmaps.HeatmapPreset,
) -> dict[str, Any]:
    """Metrics of both heads on `arrays`.

    Args:
        prior: centre prior `(H, W)` of the *training* films on the canvas.
        preset: how the readers' own maps are made, for the inter-reader CC.

    Returns:
        Plain numbers: films, auc_<class>, auc_macro, auc_micro, accuracy, and means over films of
        cc, sim, kld, nss, auc_judd, cc_centre_prior, and cc_between_readers where two have read.
    """
    logits, log_density = predict(network, arrays.images)
    result: dict[str, Any] = {"films": len(arrays.films)}
    labelled = arrays.labels != UNLABELLED
    if labelled.any():
        # Softmax is monotone per class only up to its denominator: AUC needs probabilities.
        probabilities = torch.from_numpy(logits[labelled]).softmax(dim=1).numpy()
        labels = arrays.labels[labelled]
        result["auc_per_class"] = metrics.auc_per_class(probabilities, labels).tolist()
        result["auc_macro"] = metrics.macro_auc(probabilities, labels)
        result["auc_micro"] = metrics.micro_auc(probabilities, labels)
        result["accuracy"] = metrics.accuracy(probabilities, labels)
    rows = [
        _saliency(arrays, index, np.exp(log_density[index, 0]), prior, preset)
        for index in np.flatnonzero(arrays.has_gaze).tolist()
    ]
    for key in rows[0] if rows else ():
        result[key] = float(np.nanmean([row[key] for row in rows]))
    return result


def _saliency(
    arrays: Arrays,
    index: int,
    predicted: NDArray[np.floating],
    prior: NDArray[np.floating],
    preset: heatmaps.HeatmapPreset,
) -> dict[str, float]:
    geometry, gaze = arrays.geometries[index], arrays.gaze[index]
    assert gaze is not None
    prediction, truth, centre = (
        geometry.crop(m) for m in (predicted, arrays.densities[index, 0], prior)
    )
    points = np.rint(geometry.to_canvas(gaze.points) - (geometry.left, geometry.top)).astype(int)
    inside = ((points >= 0) & (points < (geometry.width, geometry.height))).all(axis=1)
    readers = sorted(set(gaze.readers))[:2]
    maps = [geometry.crop(canvas_density(gaze.select(reader=r), geometry, preset)) for r in readers]
    return {
        "cc": metrics.cc(prediction, truth),
        "sim": metrics.sim(prediction, truth),
        "kld": metrics.kld(prediction, truth),
        "nss": metrics.nss(prediction, points[inside]),
        "auc_judd": metrics.auc_judd(prediction, points[inside]),
        "cc_centre_prior": metrics.cc(centre, truth),
        "cc_between_readers": metrics.cc(*maps) if len(maps) == 2 else float("nan"),
        "pad_mass": float(1 - prediction.sum()),
    }
