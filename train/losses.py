"""Losses of both heads."""

from __future__ import annotations

import torch
from torch import Tensor


def saliency_kl(log_density: Tensor, target: Tensor) -> Tensor:
    """KL(target || prediction) in nats, mean over the films that have gaze; 0 if none has.

    Formula: sum_x G(x) [ln G(x) - ln P(x)], zeros of G contribute nothing (reference.md 2.1). Over
    the whole canvas, where G is zero in the pad: this also drives predicted mass out of the pad.

    Args:
        log_density: `(N, 1, H, W)`, natural-log softmax over the canvas.
        target: `(N, 1, H, W)`, sum 1, or all zero for a film without gaze.
    """
    entropy = torch.special.xlogy(target, target)
    per_film = (entropy - target * log_density).flatten(1).sum(1)
    has_gaze = target.flatten(1).sum(1) > 0
    mean: Tensor = (per_film * has_gaze).sum() / has_gaze.sum().clamp(min=1)
    return mean
