"""MT-UNet against docs/method.md#mt-unet, as a variant: training, precision, config."""

from __future__ import annotations

import pytest
import torch

from cxrgaze.errors import IncompatibleError, UsageError
from cxrgaze.evidence import phantom
from cxrgaze.export import int8
from cxrgaze.export.forms import Forms
from cxrgaze.export.source import Facts, Layout, TorchSource
from cxrgaze.spec import HEADS
from cxrgaze.train import checkpoint, fit, initial, model
from cxrgaze.train.config import load_config
from cxrgaze.train.model import VARIANTS, network_of, spec_of
from cxrgaze.train.mt_unet import MTUNet, MTUNetVariant
from cxrgaze.train.rewrites import rewrites_of

SMALL = MTUNetVariant(height=64, width=64, channels=(8, 8, 16, 16, 16))


def _spec(**changes):
    said = dict(model_version="t", pixel_source="image-8bit", domain="phantom", **changes)
    return spec_of("mt-unet", **said)


def test_it_has_the_parameters_and_shapes_of_the_authors():
    with torch.device("meta"):
        network = network_of(_spec()).eval()
        out = network(torch.zeros(2, 1, 640, 512))
    assert sum(p.numel() for p in network.parameters()) == 34_632_836
    assert out["logits"].shape == (2, 3) and out["log_density"].shape == (2, 1, 640, 512)
    assert network.classifier[0].in_features == 1088 and len(network.encoder) == 5
    assert [step.up[1].out_channels for step in network.decoder] == [512, 256, 128, 64]
    assert [step.fuse[0].in_channels for step in network.decoder] == [1024, 512, 256, 128]


@pytest.mark.parametrize("head", HEADS)
def test_one_head_alone_has_no_part_of_the_other(head):
    network = MTUNet(SMALL, 3, [head]).eval()
    assert list(network(torch.rand(2, 1, 64, 96))) == [head]
    parts = {"logits": ["encoder", "classifier"]}
    parts["log_density"] = ["encoder", "decoder", "saliency"]
    assert [*network.parts()] == parts[head]
    assert {name.split(".")[0] for name in network.state_dict()} == set(parts[head])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_of_a_variant_are_those_of_its_network(variant):
    own = {"mt-unet": SMALL}.get(variant, VARIANTS["tiny"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, variant, own)
        spec = spec_of(variant, model_version="", pixel_source="array", domain="none")
        network = network_of(spec, centre_prior=True)
    assert tuple(network.parts()) == model.parts_of(variant)
    held = [m for modules in network.parts().values() for m in modules]
    counted = sum(p.numel() for m in held for p in m.parameters())
    assert counted == sum(p.numel() for p in network.parameters())
    assert network.prior is not None
    density = network.eval()(torch.rand(1, 1, 64, 64))["log_density"].detach()
    assert density.exp().sum() == pytest.approx(1, abs=1e-5)


def test_its_graph_falls_back_by_levels_and_steps_and_has_no_rewrites(monkeypatch):
    monkeypatch.setitem(VARIANTS, "mt-unet", SMALL)
    spec = _spec()
    layout = Layout(model.kept_in(spec), model.block_of)
    source = TorchSource(network_of(spec).eval(), spec, Facts("m", "", "", ""), layout)
    graph = source.graph()
    blocks = [*(f"encoder.{level}" for level in range(5)), *(f"decoder.{s}" for s in range(4))]
    assert sorted(Forms(graph, "fp16", "tensorrt", layout).blocks()) == sorted(
        [*blocks, "saliency"]
    )
    kept = int8.kept_convolutions(graph, layout)
    assert {model.block_of(name) for name in kept} == {"encoder.0", "saliency"}
    assert len(kept) == 4 and rewrites_of(spec) == {}
    assert model.kept_in(_spec(heads=("logits",))) == ("/encoder.0/",)


def test_it_is_trained_by_its_preset(monkeypatch, tmp_path):
    monkeypatch.setitem(VARIANTS, "mt-unet", SMALL)
    made = phantom.write_phantom_set(tmp_path / "set", {"train": 12, "val": 6})
    config = load_config("mt-unet", ["heatmap=phantom", "stages.joint.epochs=1"])
    card = fit.fit(made, config, tmp_path / "run")
    network, again = checkpoint.load(tmp_path / "run" / "mt-unet.safetensors")
    assert again == card and card.untrained == () and isinstance(network, MTUNet)


@pytest.mark.parametrize("preset", ["joint", "paper"])
def test_a_stage_names_parts_of_its_variant(preset):
    with pytest.raises(UsageError, match="mt-unet has no part dense; it has encoder, decoder"):
        load_config(preset, ["variant=mt-unet"])
    with pytest.raises(UsageError, match="tiny has no part encoder; it has dense, skips"):
        load_config("mt-unet", ["variant=tiny"])


def test_weights_of_a_densenet_are_not_for_it(monkeypatch, tmp_path):
    monkeypatch.setitem(VARIANTS, "mt-unet", SMALL)
    spec = _spec()
    torch.save({"features.conv0.weight": torch.zeros(2)}, tmp_path / "w.pth")
    for given, said in (("imagenet", "DenseNet201"), (str(tmp_path / "w.pth"), "has not")):
        with pytest.raises(IncompatibleError, match=said):
            initial.start(network_of(spec), spec, given)
