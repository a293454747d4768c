"""What a contrastive stage is judged by, shown on a random and a trained encoder.

`python -m cxrgaze.train.criterion SET RUN [RUN ...]` prints, of an encoder of the run's seed with
random weights and of the encoder after the contrastive stage, over the set's validation films: the
mean over the triplets that violate the margin, the criterion (over all triplets, within the chunks
of a run), and the AUC of the five nearest neighbours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxrgaze.evidence import heatmaps, metrics
from cxrgaze.evidence.arrays import Arrays, load_arrays
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.evidence.truth import HAS, UNKNOWN
from cxrgaze.train import checkpoint
from cxrgaze.train.fit import spec_for
from cxrgaze.train.losses import triplet
from cxrgaze.train.model import DenseEncoder, Network, network_of
from cxrgaze.train.run_folder import read_run
from cxrgaze.train.stage_module import in_chunks

NEIGHBOURS = 5
_MOST = 256  # films at once: triplets are their cube


def embedded(encoder: DenseEncoder, arrays: Arrays, shrink: int) -> Tensor:
    """Embeddings of films by the dense encoder, `(n, features)`."""
    encoder.eval()
    with torch.inference_mode():
        images = torch.nn.functional.avg_pool2d(torch.from_numpy(arrays.images), shrink)
        return torch.cat([encoder(batch).embedding for batch in images.split(16)])


def neighbours_auc(rows: Tensor, truth: NDArray[np.int8]) -> float:
    """Macro AUC of the share of each class among the nearest films, the film itself left out."""
    rows = torch.nn.functional.normalize(rows, dim=1)
    likeness = (rows @ rows.T).fill_diagonal_(-torch.inf)
    nearest = likeness.topk(NEIGHBOURS, dim=1).indices.numpy()
    return metrics.macro_auc((truth == HAS)[nearest].mean(axis=1), truth)


def main(arguments: list[str]) -> None:
    """Print the table."""
    if len(arguments) < 2:
        sys.exit("usage: python -m cxrgaze.train.criterion SET RUN [RUN ...]")
    labelled = LabelledSet.open(Path(arguments[0]))
    print("run, encoder, loss (violating triplets), criterion (all triplets), 5-NN AUC")
    for run in map(Path, arguments[1:]):
        config = read_run(run).config
        number = list(config.stages).index("contrastive") + 1
        spec = spec_for(labelled, config)
        preset = heatmaps.PRESETS[config.heatmap]
        arrays = load_arrays(labelled.split("val"), spec, preset)
        known = (arrays.truth != UNKNOWN).all(axis=1)
        torch.manual_seed(config.seed)
        network = network_of(spec, centre_prior=config.centre_prior)
        assert isinstance(network, Network)  # no other has a contrastive stage
        weights = safetensors.torch.load_file(run / "stages" / f"{number}-contrastive.safetensors")
        for name in ("random", "trained"):
            if name == "trained":
                checkpoint.load_weights(network, weights, str(run))
            rows = embedded(network.dense, arrays, config.stages["contrastive"].shrink)[known]
            truth = torch.from_numpy(arrays.truth[known])
            violating = triplet(rows[:_MOST], truth[:_MOST])
            criterion = in_chunks("triplet", rows, truth, config.seed)
            auc = neighbours_auc(rows, arrays.truth[known])
            print(f"{run}, {name}, {violating:.3f}, {criterion:.3f}, {auc:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
