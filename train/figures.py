"""Point figures of the heads: AUC beside accuracy, CC beside the centre prior."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.command import counted
from cxrgaze.evidence import heatmaps, metrics
from cxrgaze.evidence.arrays import Arrays
from cxrgaze.evidence.truth import present_classes
from cxrgaze.spec import LOG_DENSITY, LOGITS, Head, Outputs
from cxrgaze.train.film_saliency import saliency_by_film
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
