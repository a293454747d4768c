"""The network against docs/method.md#network."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cxrgaze.errors import IntegrityError
from cxrgaze.spec import HEADS
from cxrgaze.train import checkpoint
from cxrgaze.train.model import (
    VARIANTS,
    DenseEncoder,
    Network,
    ResidualSE,
    Variant,
    imagenet_to_dense,
    random_network,
    spec_of,
)

MAP_PARTS = ("skips", "decoder", "saliency")
SMALL = Variant(
    height=64,
    width=64,
    init_features=8,
    growth_rate=4,
    block_config=(2, 1, 1, 2),
    skip_channels=(8, 8, 8, 8, 8),
    se_reduction=4,
)


def _count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_paper_has_the_parameters_of_the_authors_network():
    """docs/method.md#parameters."""
    with torch.device("meta"):
        network = Network(VARIANTS["paper"], 3)
    assert _count(network.dense) == 18_092_928
    levels = [_count(level) for level in network.skips]
    assert levels == [38_976, 297_856, 1_189_632, 4_754_944, 19_012_608]
    assert _count(network.decoder) == 23_086_080
    assert _count(network.saliency) == 37_121
    assert _count(network.classifier) == 127_235
    assert _count(network) == 66_637_380


def test_paper_shapes_at_640_by_512():
    """Without arithmetic, on the meta device: docs/method.md#decoder."""
    with torch.device("meta"):
        network = Network(VARIANTS["paper"], 3).eval()
        taps = network.dense(torch.zeros(2, 1, 640, 512))
        out = network(torch.zeros(2, 1, 640, 512))
    assert taps.bottleneck.shape == (2, 1920, 20, 16) and taps.embedding.shape == (2, 1920)
    assert out["logits"].shape == (2, 3) and out["log_density"].shape == (2, 1, 640, 512)
    assert [step.up[1].out_channels for step in network.decoder] == [512, 256, 128, 64, 64]
    assert [step.fuse[0].in_channels for step in network.decoder] == [1536, 768, 384, 192, 128]
    assert network.classifier[0].in_features == 1984


def test_tiny_has_a_few_hundred_thousand_parameters():
    assert 200_000 < _count(Network(VARIANTS["tiny"], 3)) < 500_000


@pytest.mark.parametrize("head", HEADS)
def test_a_network_of_one_head_has_no_part_of_the_other(head):
    network = Network(SMALL, 3, [head]).eval()
    out = network(torch.rand(2, 1, 64, 96))
    shape = {"logits": (2, 3), "log_density": (2, 1, 64, 96)}[head]
    assert {name: tensor.shape for name, tensor in out.items()} == {head: shape}
    parts = {"logits": ["dense", "classifier"], "log_density": ["dense", *MAP_PARTS]}[head]
    assert [*network.parts()] == parts
    assert {name.split(".")[0] for name in network.state_dict()} == set(parts)


def test_log_density_sums_to_one():
    out = Network(SMALL, 3).eval()(torch.rand(3, 1, 64, 96))
    assert out["log_density"].detach().exp().sum((1, 2, 3)).numpy() == pytest.approx(
        [1, 1, 1], abs=1e-5
    )


def test_the_bottleneck_is_before_norm5_and_the_embedding_after_its_relu():
    encoder = DenseEncoder(SMALL).eval()
    image = torch.rand(2, 1, 64, 64)
    taps = encoder(image)
    assert taps.bottleneck.min() < 0  # no ReLU
    expected = F.relu(encoder.features.norm5(taps.bottleneck)).mean((2, 3))
    assert torch.allclose(taps.embedding, expected, atol=1e-6)
    again = encoder(image).bottleneck
    assert torch.equal(taps.bottleneck, again)  # nothing later wrote into the tap


def test_the_se_block_equals_a_slow_reference():
    block = ResidualSE(3, 8, 4).eval()
    x = torch.rand(2, 3, 5, 7)
    main = block.main[4](block.main[3](F.relu(block.main[1](block.main[0](x)))))
    summed = F.relu(main + block.shortcut(x))
    slow = summed.clone()
    for n in range(2):
        squeeze = torch.stack([summed[n, c].mean() for c in range(8)])
        weight = torch.sigmoid(block.excite[2].weight @ F.relu(block.excite[0].weight @ squeeze))
        for c in range(8):
            slow[n, c] = summed[n, c] * weight[c]
    assert torch.allclose(block(x), slow, atol=1e-6)


def _torchvision_names(published: bool) -> dict[str, torch.Tensor]:
    """A DenseNet state dict as torchvision names it, written from its documented layout."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def conv(name, out, into, size):
        weights[f"{name}.weight"] = torch.randn(out, into, size, size, generator=generator) * 0.1

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean"):
            weights[f"{name}.{part}"] = torch.randn(channels, generator=generator) * 0.1
        weights[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5
        weights[f"{name}.num_batches_tracked"] = torch.tensor(1)

    dot = "." if published else ""
    channels = SMALL.init_features
    conv("features.conv0", channels, 3, 7)
    norm("features.norm0", channels)
    for b, layers in enumerate(SMALL.block_config, start=1):
        for i in range(1, layers + 1):
            layer = f"features.denseblock{b}.denselayer{i}"
            norm(f"{layer}.norm{dot}1", channels)
            conv(f"{layer}.conv{dot}1", 4 * SMALL.growth_rate, channels, 1)
            norm(f"{layer}.norm{dot}2", 4 * SMALL.growth_rate)
            conv(f"{layer}.conv{dot}2", SMALL.growth_rate, 4 * SMALL.growth_rate, 3)
            channels += SMALL.growth_rate
        if b < 4:
            norm(f"features.transition{b}.norm", channels)
            conv(f"features.transition{b}.conv", channels // 2, channels, 1)
            channels //= 2
    norm("features.norm5", channels)
    weights["classifier.weight"] = torch.zeros(1000, channels)
    weights["classifier.bias"] = torch.zeros(1000)
    return weights


def _slow_densenet(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """DenseNet up to norm5 (Huang et al., CVPR 2017) straight from torchvision's names."""

    def norm(name, x):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(w[f"{name}.{key}"] for key in keys))

    x = F.conv2d(x, w["features.conv0.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(norm("features.norm0", x)), 3, 2, 1)
    for b, layers in enumerate(SMALL.block_config, start=1):
        for i in range(1, layers + 1):
            layer = f"features.denseblock{b}.denselayer{i}"
            y = F.conv2d(F.relu(norm(f"{layer}.norm1", x)), w[f"{layer}.conv1.weight"])
            y = F.conv2d(F.relu(norm(f"{layer}.norm2", y)), w[f"{layer}.conv2.weight"], padding=1)
            x = torch.cat([x, y], 1)
        if b < 4:
            t = f"features.transition{b}"
            x = F.avg_pool2d(F.conv2d(F.relu(norm(f"{t}.norm", x)), w[f"{t}.conv.weight"]), 2)
    return norm("features.norm5", x)


@pytest.mark.parametrize("published", [False, True])
def test_torchvision_weights_load_completely_and_compute_the_same(published):
    encoder = DenseEncoder(SMALL).eval()
    encoder.load_state_dict(imagenet_to_dense(_torchvision_names(published)), strict=True)
    image = torch.rand(2, 1, 64, 64)
    slow = _slow_densenet(_torchvision_names(False), image.repeat(1, 3, 1, 1))
    expected = F.relu(slow).mean((2, 3))
    assert torch.allclose(encoder(image).embedding, expected, atol=1e-5)


def test_the_key_map_covers_densenet201_and_refuses_other_names():
    """All names of the paper's encoder are reached from torchvision's names for it."""
    with torch.device("meta"):
        wanted = set(DenseEncoder(VARIANTS["paper"]).state_dict())
    torchvision = {name.replace(".layers.", "."): torch.zeros(1) for name in wanted}
    assert not any(".layers." in name for name in torchvision)
    assert set(imagenet_to_dense(torchvision)) == wanted
    with pytest.raises(KeyError, match="not a name of torchvision"):
        imagenet_to_dense({"layer1.0.conv1.weight": torch.zeros(1)})


def test_random_networks_are_seeded_sane_and_calibrated():
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    spec = spec_of("tiny", model_version="r", pixel_source="image-8bit", domain="none")
    a, b, c = (random_network(spec, images, seed) for seed in (0, 0, 1))
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert not torch.equal(a.saliency[3].weight, c.saliency[3].weight)
    peak = 0.0

    def watch(module, inputs, output):
        nonlocal peak
        peak = max(peak, float(output.abs().max()))

    for module in a.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum == 0.1
            module.register_forward_hook(watch)
    with torch.no_grad():
        a(images)
    assert not a.training and 1 < peak < 50


def test_the_spec_of_an_untrained_network_says_so():
    spec = spec_of("paper", model_version="r", pixel_source="image-8bit", domain="none")
    assert (spec.height, spec.width) == (640, 512) and "Untrained" in (spec.caution or "")


@pytest.mark.parametrize(
    ("variant", "gmac", "parameters"),
    [("paper", 275.29, 66_637_380), ("edge", 5.03, 3_971_188), ("small", 1.03, 4_000_808)],
)
def test_cost_of_a_variant(variant, gmac, parameters):
    """As the documents say; edge within 12 GMAC and 5 M parameters (docs/method.md#variants)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = Network(VARIANTS[variant], 3).eval()
        image = torch.empty(1, 1, VARIANTS[variant].height, VARIANTS[variant].width)
    with FlopCounterMode(display=False) as counter:
        network(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.01)
    assert _count(network) == parameters


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value):
    """B11: they were reported as an overflow of float16, with the wrong advice."""
    network, _ = checkpoint.load(checkpoint.demo_path())
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    name = next(key for key, tensor in weights.items() if tensor.is_floating_point())
    weights[name].view(-1)[0] = value
    with pytest.raises(IntegrityError, match=f"{re.escape(name)} has NaN or infinite values"):
        checkpoint.load_weights(network, weights, "x.safetensors")
