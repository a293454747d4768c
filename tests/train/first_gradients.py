"""Gradients of the first step of a stage, after the processes have averaged them.

Run by test_fit.py as: first_gradients.py SET DEVICES BATCH OUTPUT; writes OUTPUT-STAGE.npz.
Lightning starts it again for every further process.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import lightning
import numpy as np
import torch

from cxrgaze.evidence import heatmaps
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.evidence.truth import UNKNOWN
from cxrgaze.train import checkpoint
from cxrgaze.train.config import load_config
from cxrgaze.train.distill import taught
from cxrgaze.train.model import network_of, spec_of
from cxrgaze.train.stage_module import Films, StageModule


class Keep(lightning.Callback):
    """Write the gradients before the optimizer takes its step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.is_global_zero:
            named = {k: p.grad.numpy() for k, p in module.named_parameters() if p.grad is not None}
            np.savez(self.path, **named)


def main(folder: str, devices: int, batch: int, output: str) -> None:
    torch.set_num_threads(1)
    spec = spec_of("tiny", model_version="t", pixel_source="image-8bit", domain="phantom")
    labelled = LabelledSet.open(folder).split("train")
    plain = load_arrays(labelled, spec, heatmaps.PRESETS["phantom"])
    truth, densities = plain.truth.copy(), plain.densities.copy()
    truth[::3], densities[::4] = UNKNOWN, 0  # films count unevenly on the processes
    teacher, card = checkpoint.load(checkpoint.demo_path())
    masked = replace(plain, truth=truth, densities=densities)
    masked = taught(masked, labelled, spec, teacher, card.spec)
    runs = {"contrastive": "demo", "encoder": "demo", "saliency": "demo"}
    for which, base in (runs | {"joint": "joint", "distill": "distill"}).items():
        config = load_config(base, ["variant=tiny", "heatmap=phantom"])
        arrays = plain if base == "demo" else masked
        changes = {"batch": batch, "freeze_batch_norm": True, "schedule": "constant", "clip": None}
        torch.manual_seed(0)
        network = network_of(spec)
        network.classifier[2].p = 0.0
        module = StageModule(
            network,
            config.stages[which].model_copy(update=changes),
            Films(arrays, arrays, spec),
            number=1,
            seed=0,
            aug=config.augment,
        )
        module.train()
        lightning.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            max_steps=1,
            limit_val_batches=0,
            callbacks=[Keep(f"{output}-{which}.npz")],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), str(Path(sys.argv[4])))
