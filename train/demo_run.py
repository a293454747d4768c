"""The demo run: phantoms, the preset demo, held-out figures, a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cxrgaze.command import say
from cxrgaze.evidence import heatmaps
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.labelled_set import LabelledSet, write_set
from cxrgaze.evidence.phantom import HARD, write_phantom_set
from cxrgaze.train import checkpoint
from cxrgaze.train.card import Card
from cxrgaze.train.config import TrainConfig
from cxrgaze.train.figures import point_figures
from cxrgaze.train.fit import fit
from cxrgaze.train.run_folder import Start

HELD_OUT = 300
HARD_FIRST_SEED = 100_000  # apart from the seeds that training and the easy test use


def train_demo(
    run: Path,
    config: TrainConfig,
    *,
    films: int,
    start: Start = Start(),  # noqa: B008 - frozen
    shuffle: bool = False,
    command: str = "",
) -> Card:
    """Draw phantoms, fit on `films` of them, evaluate on held-out ones, add that to the card.

    Args:
        run: a new folder for the run (`fit`).
        shuffle: the negative control: every film gets another film's label and gaze.
    """
    with tempfile.TemporaryDirectory(prefix="cxrgaze-demo-") as folder:
        val = films // 6
        say(f"drawing {films} + {val} + {2 * HELD_OUT} phantoms")
        easy = write_phantom_set(
            Path(folder, "easy"), {"train": films, "val": val, "test": HELD_OUT}
        )
        hard = write_phantom_set(
            Path(folder, "hard"), {"test": HELD_OUT}, difficulty=HARD, first_seed=HARD_FIRST_SEED
        )
        training = _shuffled(easy, Path(folder, "shuffled"), config.seed) if shuffle else easy
        # A stage may be left out for a trial: what it would have taught is recorded as untaught.
        start = start.model_copy(update={"allow_untaught": True})
        fit(training, config, run, start=start, command=command)
        path = run / f"{config.name}.safetensors"
        network, card = checkpoint.load(path)
        preset = heatmaps.PRESETS[config.heatmap]
        train, test, test_hard = (
            load_arrays(part, card.spec, preset)
            for part in (easy.split("train"), easy.split("test"), hard)
        )
        gazed = train.densities[train.has_gaze, 0]
        prior = heatmaps.centre_prior(gazed) if len(gazed) else None
    served = card.served
    results: dict[str, Any] = {
        **card.results,
        "held_out": point_figures(network, test, prior, preset, served),
        "held_out_hard": {
            "difficulty": HARD,
            **point_figures(network, test_hard, prior, preset, served),
        },
        "note": "synthetic (phantom) figures: they say nothing of clinical performance",
    }
    card = card.model_copy(update={"results": results})
    checkpoint.write_card(path, card)
    return card


def _shuffled(labelled: LabelledSet, folder: Path, seed: int) -> LabelledSet:
    """The set with labels and gaze dealt to other films."""
    rows = labelled.rows
    order = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist()
    changed = [
        row.model_copy(update={"label": rows[i].label}) for row, i in zip(rows, order, strict=True)
    ]
    gaze = {row.film: labelled.gaze[rows[i].film] for row, i in zip(rows, order, strict=True)}
    films = ((row.film, labelled.film_bytes(row)) for row in rows)
    return write_set(folder, labelled.info, changed, gaze, films)
