"""Random changes of training films on the canvas; image and map move together."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cxrgaze.train.config import Augment


def augmented(image: Tensor, maps: list[Tensor], config: Augment) -> tuple[Tensor, list[Tensor]]:
    """Image and maps `(N, 1, H, W)` after one random similarity transform per film.

    Image values are then raised to a random exponent. Maps are brought back to their former sum
    (one, or zero where there is no gaze); what leaves the canvas is lost. A map of another shape
    than `(N, 1, H, W)` (there is none) is returned as it is. Uses torch's global random numbers.
    """
    n, _, height, width = image.shape

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, device=image.device) * 2 - 1) * limit

    angle = uniform(math.radians(config.rotate_deg))
    zoom = 1 + uniform(config.scale)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    aspect = height / width
    theta = torch.stack(
        [
            torch.stack([cos, sin * aspect, 2 * uniform(config.shift)], dim=1),
            torch.stack([-sin / aspect, cos, 2 * uniform(config.shift)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [n, 1, height, width], align_corners=False)
    image = F.grid_sample(image, grid, align_corners=False)
    exponent = uniform(config.gamma).exp()
    image = image.clamp(0, 1) ** exponent[:, None, None, None]
    return image, [_moved(m, grid) if m.ndim == 4 else m for m in maps]


def _moved(density: Tensor, grid: Tensor) -> Tensor:
    before = density.sum((1, 2, 3), keepdim=True)
    moved = F.grid_sample(density, grid, align_corners=False)
    after = moved.sum((1, 2, 3), keepdim=True)
    return torch.where(after > 0, moved * before / after.clamp(min=1e-12), moved)
