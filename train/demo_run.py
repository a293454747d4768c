"""The demo run: phantoms, a joint fit, held-out figures, a checkpoint."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrgaze import heatmaps
from cxrgaze.command import Steps, say
from cxrgaze.phantom import HARD, write_phantom_set
from cxrgaze.train import checkpoint
from cxrgaze.train.dataset import Arrays, load_arrays
from cxrgaze.train.evaluate import evaluate
from cxrgaze.train.fit import FitConfig, fit
from cxrgaze.train.model import spec_of

PRESET = heatmaps.PRESETS["phantom"]
HELD_OUT = 300
HARD_FIRST_SEED = 100_000  # apart from the seeds that training and the easy test use


def train_demo(
    path: Path, config: FitConfig, *, films: int, shuffle: bool = False
) -> checkpoint.Card:
    """Train on `films` phantoms, evaluate on held-out ones, write the checkpoint to `path`.

    Args:
        shuffle: the negative control: every film gets another film's label and gaze.
    """
    name = "demo-shuffled" if shuffle else "demo"
    spec = spec_of(
        config.variant, model_version=f"{name}-1", pixel_source="image-8bit", domain="phantom"
    )
    step = Steps(4)
    with tempfile.TemporaryDirectory(prefix="cxrgaze-demo-") as folder:
        with step(f"draw {films} + {2 * HELD_OUT} phantoms"):
            easy = write_phantom_set(Path(folder, "easy"), {"train": films, "test": HELD_OUT})
            hard = write_phantom_set(
                Path(folder, "hard"),
                {"test": HELD_OUT},
                difficulty=HARD,
                first_seed=HARD_FIRST_SEED,
            )
        with step("read them"):
            train = load_arrays(easy.split("train"), spec, PRESET)
            test = load_arrays(easy.split("test"), spec, PRESET)
            test_hard = load_arrays(hard, spec, PRESET)
    prior = heatmaps.centre_prior(train.densities[:, 0])
    if shuffle:
        train = _shuffled(train, config.seed)
    with step(f"train {config.variant} for {config.epochs} epochs"):
        say("")
        network = fit(train, config, lambda epoch, loss: say(f"  epoch {epoch}: loss {loss:.3f}"))
    with step("evaluate on held-out phantoms"):
        results = {
            "held_out": evaluate(network, test, prior, PRESET),
            "held_out_hard": {"difficulty": HARD, **evaluate(network, test_hard, prior, PRESET)},
            "note": "synthetic (phantom) figures: they say nothing of clinical performance",
        }
    return checkpoint.save(
        path,
        network,
        name=name,
        spec=spec,
        trained_on=f"{films} cxrgaze phantoms (synthetic drawings), seeds 0 to {films - 1}",
        command=f"cxrgaze-train demo --films {films} --epochs {config.epochs} --seed {config.seed}"
        + (" --shuffle-targets" if shuffle else ""),
        config={**config.model_dump(), "films": films, "heatmap": PRESET.model_dump()},
        results=results,
    )


def _shuffled(arrays: Arrays, seed: int) -> Arrays:
    order: NDArray[np.int64] = np.random.default_rng([seed, 1]).permutation(len(arrays.films))
    return replace(
        arrays,
        labels=arrays.labels[order],
        densities=arrays.densities[order],
        gaze=tuple(arrays.gaze[i] for i in order),
    )
