"""The dual-encoder multi-task UNet of Qiu, Rivaz & Xiao (arXiv 2403.16970), variants as data.

One class. A DenseNet encoder gives the bottleneck and the diagnosis features, a residual
squeeze-and-excitation encoder gives the skips, a UNet decoder gives the saliency map, and a
classifier fuses features of two scales (docs/method.md#network).

Differs from the authors' code at 6873ddf: taps are returned by the forward pass instead of being
left behind by hooks, ReLU on norm5 is explicit (docs/method.md#dense-encoder), and parts that the
authors' object carries but never uses are absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from monai.networks.nets.densenet import DenseNet
from torch import Tensor, nn
from torch.nn import functional as F

from cxrgaze.evidence.class_presets import PRESETS, Classes
from cxrgaze.records import Frozen
from cxrgaze.spec import (
    HEADS,
    LOG_DENSITY,
    LOGITS,
    STRIDE,
    CanvasRule,
    Head,
    ModelSpec,
    PixelSource,
)
from cxrgaze.train.layers import (
    CentrePrior,
    HeadTensors,
    UpStep,
    classifier,
    global_mean,
    saliency_head,
    spatial_log_softmax,
)
from cxrgaze.train.mt_unet import MTUNet, MTUNetVariant


class Variant(Frozen):
    """Sizes of one network; `VARIANTS` holds those that exist."""

    height: int
    width: int
    init_features: int
    """Channels of the DenseNet stem."""
    growth_rate: int
    block_config: tuple[int, int, int, int]
    """Dense layers per block."""
    skip_channels: tuple[int, int, int, int, int]
    """Channels of the residual encoder at strides 1, 2, 4, 8, 16."""
    hidden: int = 64
    """Units of the classifier's hidden layer."""
    se_reduction: int = 16
    centre_prior: bool = False
    """Add a learnable low-resolution log-prior to the saliency logits (not in the paper)."""

    @property
    def dense(self) -> tuple[int, int, tuple[int, int, int, int]]:
        """Of the DenseNet: channels of its stem, growth rate, layers per block."""
        return self.init_features, self.growth_rate, self.block_config


VARIANTS: dict[str, Variant | MTUNetVariant] = {
    # docs/method.md#network: DenseNet201, 66,637,380 parameters.
    "paper": Variant(
        height=640,
        width=512,
        init_features=64,
        growth_rate=32,
        block_config=(6, 12, 48, 32),
        skip_channels=(64, 128, 256, 512, 1024),
    ),
    # The student for small devices: 5.0 GMAC and 4.0 M parameters at 320x256.
    "edge": Variant(
        height=320,
        width=256,
        init_features=32,
        growth_rate=24,
        block_config=(4, 8, 12, 8),
        skip_channels=(16, 32, 64, 128, 192),
        se_reduction=8,
    ),
    # What a CPU can train on a few hundred films.
    "small": Variant(
        height=128,
        width=128,
        init_features=48,
        growth_rate=24,
        block_config=(4, 8, 12, 8),
        skip_channels=(16, 32, 64, 128, 192),
        se_reduction=8,
    ),
    # The demo and the tests.
    "tiny": Variant(
        height=64,
        width=64,
        init_features=16,
        growth_rate=12,
        block_config=(2, 2, 2, 2),
        skip_channels=(8, 16, 24, 40, 64),
        hidden=32,
        se_reduction=4,
    ),
    # The authors' baseline, another network: 34,632,836 parameters.
    "mt-unet": MTUNetVariant(height=640, width=512, channels=(64, 128, 256, 512, 1024)),
}


def parts_of(variant: str) -> tuple[str, ...]:
    """Names of the parts of a network with both heads, as `parts` of its class has them."""
    is_mt_unet = isinstance(VARIANTS[variant], MTUNetVariant)
    encoders = ("encoder",) if is_mt_unet else ("dense", "skips")
    return (*encoders, "decoder", "saliency", "classifier")


def kept_in(spec: ModelSpec) -> tuple[str, ...]:
    """Convolutions that stay in higher precision, by the path of their module.

    They see the image's own 256 grey levels or make the map.
    """
    has_map = LOG_DENSITY in spec.heads
    if isinstance(VARIANTS[spec.variant], MTUNetVariant):
        return ("/encoder.0/", *(("/saliency/",) if has_map else ()))
    of_the_map = ("/skips.0/", "/saliency/") if has_map else ()
    return ("/dense/conv0/", *of_the_map)


def block_of(node: str) -> str:
    """The block of the network that a node of its graph belongs to, as "dense/denseblock3".

    The first module of its path, a level of an encoder or a step of a decoder; or the first two
    where the first holds them all.
    """
    parts = node.strip("/").split("/")
    return "/".join(parts[:2]) if parts[0] == "dense" else parts[0]


class DenseTaps(NamedTuple):
    """The two taps of the dense encoder, both at stride 32 (docs/method.md#dense-encoder)."""

    bottleneck: Tensor
    """T1: the last dense block's output, before norm5, without ReLU."""
    embedding: Tensor
    """T2: mean of ReLU(norm5) over the map, `(N, features)`."""


class DenseEncoder(nn.Module):
    """DenseNet on the grey image repeated to three channels, taps returned."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        network = DenseNet(
            spatial_dims=2,
            in_channels=3,
            out_channels=1,  # MONAI's own classifier is not used and not kept
            init_features=variant.init_features,
            growth_rate=variant.growth_rate,
            block_config=variant.block_config,
        )
        self.features = network.features
        self.out_channels = int(self.get_parameter("features.norm5.weight").numel())

    def forward(self, image: Tensor) -> DenseTaps:
        """Taps of `image` `(N, 1, H, W)`."""
        x = image.expand(-1, 3, -1, -1)
        bottleneck = x
        for name, stage in self.features.named_children():
            if name == "norm5":
                bottleneck = x
            x = stage(x)
        return DenseTaps(bottleneck, global_mean(F.relu(x)))


class ResidualSE(nn.Module):
    """Residual block, then squeeze-and-excitation (docs/method.md#residual-se).

    The shortcut is always a biased 3x3 convolution without BatchNorm, as in the authors' code; the
    paper's figure draws an identity.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.excite = nn.Sequential(
            nn.Linear(out_channels, out_channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(out_channels // reduction, out_channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in, H, W)` to `(N, out, H, W)`."""
        x = self.relu(self.main(x) + self.shortcut(x))
        weights: Tensor = self.excite(global_mean(x))
        return x * weights[:, :, None, None]


class Network(nn.Module):
    """Diagnosis and gaze from one grey image, or one of the two.

    Without the map there is no residual encoder and no decoder, and the diagnosis sees the dense
    encoder's embedding alone; without the diagnosis there is no classifier.

    Args:
        variant: sizes.
        classes: number of classes; 0 without the diagnosis.
        heads: that it has.

    Source: docs/method.md#network.
    """

    def __init__(self, variant: Variant, classes: int, heads: Sequence[Head] = HEADS) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.classes = classes
        self.dense = DenseEncoder(variant)
        seen = self.dense.out_channels
        if LOG_DENSITY in heads:
            seen += self._add_map(variant)
        if LOGITS in heads:
            self.classifier = classifier(seen, variant.hidden, classes)
        # After the classifier, whose first weights are drawn before it.
        has_prior = variant.centre_prior and LOG_DENSITY in heads
        self.prior = CentrePrior(variant.height, variant.width) if has_prior else None

    def _add_map(self, variant: Variant) -> int:
        """Add what makes the map; the channels of the decoder's last step."""
        widths = variant.skip_channels
        self.skips = nn.ModuleList(
            ResidualSE(below, here, variant.se_reduction)
            for below, here in zip((1, *widths[:-1]), widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        # Steps 5 to 1 (strides 16 to 1) end at half of their skip's channels, the last two at the
        # first level's width: 512, 256, 128, 64, 64 for `paper`.
        outs = (*(widths[i] for i in (3, 2, 1, 0)), widths[0])
        ins = (self.dense.out_channels, *outs[:-1])
        self.decoder = nn.ModuleList(
            UpStep(below, skip, out)
            for below, skip, out in zip(ins, reversed(widths), outs, strict=True)
        )
        self.saliency = saliency_head(outs[-1])
        return outs[-1]

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules by the part of the network that a training stage can name."""
        parts: dict[str, list[nn.Module]] = {"dense": [self.dense]}
        if LOG_DENSITY in self.heads:
            saliency = [self.saliency, *([self.prior] if self.prior else [])]
            parts |= {"skips": [self.skips], "decoder": [self.decoder], "saliency": saliency}
        if LOGITS in self.heads:
            parts["classifier"] = [self.classifier]
        return parts

    def forward(self, image: Tensor) -> HeadTensors:
        """The heads for `image` `(N, 1, H, W)` float32 in [0, 1], H and W multiples of 32."""
        taps = self.dense(image)
        features: list[Tensor] = [taps.embedding]
        outputs: dict[Head, Tensor] = {}
        if LOG_DENSITY in self.heads:
            decoded, outputs[LOG_DENSITY] = self._map(image, taps)
            features.append(global_mean(decoded))
        if LOGITS in self.heads:
            outputs[LOGITS] = self.classifier(torch.cat(features, dim=1))
        return outputs

    def _map(self, image: Tensor, taps: DenseTaps) -> tuple[Tensor, Tensor]:
        """What the decoder ends with, and the log-density."""
        skips = []
        x = image
        for level, block in enumerate(self.skips):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        x = taps.bottleneck
        for step, skip in zip(self.decoder, reversed(skips), strict=True):
            x = step(x, skip)
        saliency = self.saliency(x)
        if self.prior:
            saliency = self.prior(saliency)
        return x, spatial_log_softmax(saliency)


def spec_of(
    variant: str,
    *,
    model_version: str,
    pixel_source: PixelSource,
    domain: str,
    canvas: tuple[int, int] | None = None,
    rule: CanvasRule = "pad",
    heads: Sequence[Head] = HEADS,
    classes: Classes = PRESETS["paper"],
) -> ModelSpec:
    """The ModelSpec of a network of this variant, by default with the paper's heads and classes.

    Args:
        canvas: `(H, W)` other than the variant's own; the network is convolutional.
        rule: how films come on the canvas.

    Raises:
        ValueError: sides that are no multiples of `STRIDE`, or that do not fit the rule.
    """
    sizes = VARIANTS[variant]
    height, width = canvas or (sizes.height, sizes.width)
    require_stride(height, width)
    return ModelSpec.model_validate(
        {
            "variant": variant,
            "model_version": model_version,
            "heads": tuple(heads),
            "classes": classes.classes if LOGITS in heads else (),
            "class_kind": classes.kind if LOGITS in heads else "exclusive",
            "height": height,
            "width": width,
            "canvas": rule,
            "pixel_source": pixel_source,
            "domain": domain,
        }
    )


def require_stride(height: int, width: int) -> None:
    """Refuse a canvas that our networks cannot halve five times.

    Raises:
        ValueError: saying so.
    """
    if height % STRIDE or width % STRIDE:
        raise ValueError(f"canvas sides must be multiples of {STRIDE}, found {height}x{width}")


AnyNetwork = Network | MTUNet
"""A network of a variant."""


def network_of(spec: ModelSpec, *, centre_prior: bool = False) -> AnyNetwork:
    """An untrained network with torch's default initialisation on the canvas of `spec`."""
    sizes = VARIANTS[spec.variant]
    own = {"height": spec.height, "width": spec.width, "centre_prior": centre_prior}
    if isinstance(sizes, MTUNetVariant):
        return MTUNet(sizes.model_copy(update=own), len(spec.classes), spec.heads)
    return Network(sizes.model_copy(update=own), len(spec.classes), spec.heads)


def random_network(spec: ModelSpec, images: Tensor, seed: int = 0) -> AnyNetwork:
    """An untrained network for latency work: seeded Kaiming weights, BatchNorm calibrated once.

    One forward pass over `images` `(N, 1, H, W)` sets every BatchNorm's running statistics to those
    of that batch, so that activations stay in a sane range at every depth.

    BatchNorm's scale is 0.5 and its shift 1, not 1 and 0: with those, a random network this deep
    multiplies any rounding (log-density off by 0.75 in float16, 0.00064 in float32; with these,
    0.028 and 0.00015; one phantom, ONNX Runtime): parity would judge chaos, not the conversion.
    """
    generator = torch.Generator().manual_seed(seed)
    network = network_of(spec)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.constant_(norm.weight, 0.5)
        nn.init.constant_(norm.bias, 1.0)
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average: one batch gives exactly its statistics
    network.train()
    with torch.no_grad():
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def imagenet_to_dense(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's DenseNet weights under the names of `DenseEncoder`.

    Torchvision writes `features.denseblock1.denselayer1.norm1.weight` (`norm.1` in its published
    files), MONAI `...denselayer1.layers.norm1.weight`. The ImageNet classifier is left out.

    Raises:
        KeyError: a name that is not torchvision's.
    """
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("classifier."):
            continue
        parts = name.split(".")
        if parts[0] != "features" or len(parts) < 3:
            raise KeyError(f"{name} is not a name of torchvision's DenseNet")
        if len(parts) > 3 and parts[2].startswith("denselayer"):
            parts[3:] = [*_joined(parts[3:])]
            parts.insert(3, "layers")
        renamed[".".join(parts)] = tensor
    return renamed


def _joined(parts: list[str]) -> list[str]:
    """`["norm", "1", "weight"]` of the published files as `["norm1", "weight"]`."""
    return [parts[0] + parts[1], *parts[2:]] if parts[1].isdigit() else parts
