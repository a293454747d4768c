"""What our networks are built of: decoder steps, heads, and the centre prior."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxrgaze.spec import Head

HeadTensors = Mapping[Head, Tensor]
"""What the network returns, by the tensor names of the exported graph.

`logits` `(N, C)`; `log_density` `(N, 1, H, W)`, natural-log spatial softmax: exp sums to 1 over the
canvas. A head that it does not have is not there.
"""


class UpStep(nn.Module):
    """One decoder step: nearest upsample, 3x3 convolution, concat [skip, up], two convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), *conv_bn_relu(in_channels, out_channels)
        )
        self.fuse = nn.Sequential(
            *conv_bn_relu(skip_channels + out_channels, out_channels),
            *conv_bn_relu(out_channels, out_channels),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`x` at half the resolution of `skip`; the result is at that of `skip`."""
        fused: Tensor = self.fuse(torch.cat([skip, self.up(x)], dim=1))
        return fused


def classifier(seen: int, hidden: int, classes: int) -> nn.Sequential:
    """Logits `(N, classes)` of features `(N, seen)`."""
    return nn.Sequential(
        nn.Linear(seen, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(0.25),
        nn.Linear(hidden, classes),
    )


def saliency_head(channels: int) -> nn.Sequential:
    """Saliency logits `(N, 1, H, W)` of what a decoder ends with, `(N, channels, H, W)`."""
    return nn.Sequential(*conv_bn_relu(channels, channels), nn.Conv2d(channels, 1, kernel_size=1))


class CentrePrior(nn.Module):
    """A learnable low-resolution log-prior over the canvas, read out bilinearly.

    Source: the centre bias of DeepGaze (arXiv 1411.1045), here learnt and on the canvas.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.log_prior = nn.Parameter(torch.zeros(1, 1, height // 16, width // 16))

    def start_from(self, prior: Tensor) -> None:
        """Take the log of the centre prior `(H, W)` of the training films as starting value."""
        size = (self.log_prior.shape[-2], self.log_prior.shape[-1])
        small = F.adaptive_avg_pool2d(prior[None, None], size)
        with torch.no_grad():
            self.log_prior.copy_(small.clamp(min=1e-4 * float(small.max())).log())

    def forward(self, logits: Tensor) -> Tensor:
        """Saliency logits `(N, 1, H, W)` plus the prior."""
        size = (logits.shape[-2], logits.shape[-1])
        return logits + F.interpolate(self.log_prior, size, mode="bilinear", align_corners=False)


def global_mean(x: Tensor) -> Tensor:
    """Mean over the map, `(N, C, H, W)` to `(N, C)`. Stays float32 in every precision."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def spatial_log_softmax(x: Tensor) -> Tensor:
    """Natural-log softmax over all pixels of `(N, 1, H, W)`. Stays float32 in every precision."""
    return F.log_softmax(x.flatten(1), dim=1).reshape(x.shape)


def conv_bn_relu(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    """Layers of a biased 3x3 convolution with BatchNorm and ReLU."""
    return (
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
