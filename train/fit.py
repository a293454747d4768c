"""A plain joint training run: cross-entropy plus saliency KL, AdamW, one cycle.

The demo network comes from here (`cxrgaze-train demo`). The paper's multi-stage training is not
here yet (CHANGELOG.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

from cxrgaze.spec import Frozen
from cxrgaze.train.dataset import UNLABELLED, Arrays
from cxrgaze.train.losses import saliency_kl
from cxrgaze.train.model import VARIANTS, Network


class FitConfig(Frozen):
    """One joint run; saved in the checkpoint's card."""

    variant: str = "tiny"
    epochs: int = Field(default=14, gt=0)
    batch: int = Field(default=32, gt=1)
    learning_rate: float = Field(default=4e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    seed: int = 0
    threads: int = Field(default=1, gt=0)
    """Torch threads. One gives the same weights each time on one machine and never starves."""


def fit(
    arrays: Arrays, config: FitConfig, progress: Callable[[int, float], None] | None = None
) -> Network:
    """Train a network from random weights on both heads at once.

    Args:
        progress: called after each epoch with its number (from 1) and mean loss.

    Films without a label or without gaze take part in the other head's loss only.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    order = np.random.default_rng(config.seed)
    network = Network(VARIANTS[config.variant])
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    steps = max(len(arrays.films) // config.batch, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=steps * config.epochs
    )
    images, labels, targets = (
        torch.from_numpy(a) for a in (arrays.images, arrays.labels, arrays.densities)
    )
    network.train()
    for epoch in range(1, config.epochs + 1):
        losses = []
        shuffled = torch.from_numpy(order.permutation(len(images)))
        for index in shuffled[: steps * config.batch].split(config.batch):
            out = network(images[index])
            loss = saliency_kl(out.log_density, targets[index])
            if (labels[index] != UNLABELLED).any():
                loss = loss + F.cross_entropy(out.logits, labels[index], ignore_index=UNLABELLED)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if progress:
            progress(epoch, float(np.mean(losses)))
    return network.eval()
