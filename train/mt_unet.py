"""MT-UNet: the multi-task UNet of Zhu, Rohling & Salcudean (arXiv 2202.07118), as a variant.

The authors' baseline. One encoder of plain double convolutions, a UNet decoder on its skips, and
the two heads of the paper's network (docs/method.md#mt-unet).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from cxrgaze.records import Frozen
from cxrgaze.spec import HEADS, LOG_DENSITY, LOGITS, Head
from cxrgaze.train.layers import (
    CentrePrior,
    HeadTensors,
    UpStep,
    classifier,
    conv_bn_relu,
    global_mean,
    saliency_head,
    spatial_log_softmax,
)


class MTUNetVariant(Frozen):
    """Sizes of one MT-UNet."""

    height: int
    width: int
    channels: tuple[int, ...]
    """Of the encoder's levels, at strides 1, 2, 4, ...; the last is the bottleneck."""
    hidden: int = 64
    """Units of the classifier's hidden layer."""
    centre_prior: bool = False
    """Add a learnable low-resolution log-prior to the saliency logits (not theirs)."""


class MTUNet(nn.Module):
    """Diagnosis and gaze from one grey image, or one of the two.

    Without the map there is no decoder, and the diagnosis sees the bottleneck alone; without the
    diagnosis there is no classifier.

    Args:
        variant: sizes.
        classes: number of classes; 0 without the diagnosis.
        heads: that it has.

    Source: docs/method.md#mt-unet.
    """

    def __init__(self, variant: MTUNetVariant, classes: int, heads: Sequence[Head] = HEADS) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.classes = classes
        widths = variant.channels
        self.encoder = nn.ModuleList(
            nn.Sequential(*conv_bn_relu(below, here), *conv_bn_relu(here, here))
            for below, here in pairwise((1, *widths))
        )
        self.pool = nn.MaxPool2d(2)
        seen = widths[-1]
        if LOG_DENSITY in heads:
            self.decoder = nn.ModuleList(
                UpStep(below, here, here) for below, here in pairwise(reversed(widths))
            )
            self.saliency = saliency_head(widths[0])
            seen += widths[0]
        if LOGITS in heads:
            self.classifier = classifier(seen, variant.hidden, classes)
        has_prior = variant.centre_prior and LOG_DENSITY in heads
        self.prior = CentrePrior(variant.height, variant.width) if has_prior else None

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules by the part of the network that a training stage can name."""
        parts: dict[str, list[nn.Module]] = {"encoder": [self.encoder]}
        if LOG_DENSITY in self.heads:
            saliency = [self.saliency, *([self.prior] if self.prior else [])]
            parts |= {"decoder": [self.decoder], "saliency": saliency}
        if LOGITS in self.heads:
            parts["classifier"] = [self.classifier]
        return parts

    def forward(self, image: Tensor) -> HeadTensors:
        """The heads for `image` `(N, 1, H, W)` float32 in [0, 1], H and W multiples of 16."""
        levels: list[Tensor] = []
        for block in self.encoder:
            levels.append(block(self.pool(levels[-1]) if levels else image))
        *skips, bottleneck = levels
        features = [global_mean(bottleneck)]
        outputs: dict[Head, Tensor] = {}
        if LOG_DENSITY in self.heads:
            x = bottleneck
            for step, skip in zip(self.decoder, reversed(skips), strict=True):
                x = step(x, skip)
            features.append(global_mean(x))
            saliency = self.saliency(x)
            if self.prior:
                saliency = self.prior(saliency)
            outputs[LOG_DENSITY] = spatial_log_softmax(saliency)
        if LOGITS in self.heads:
            outputs[LOGITS] = self.classifier(torch.cat(features, dim=1))
        return outputs
