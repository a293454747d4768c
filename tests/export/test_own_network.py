"""A network that is not ours, from a torch module to a reading, in every precision and form."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cxrgaze
from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.command import Steps
from cxrgaze.errors import IncompatibleError, ParityError, UsageError
from cxrgaze.evidence import gate
from cxrgaze.evidence.truth import UNKNOWN
from cxrgaze.export import graph, pipeline
from cxrgaze.export.forms import Forms
from cxrgaze.export.options import ExportOptions
from cxrgaze.export.source import Facts, Layout, TorchSource
from cxrgaze.runtime.ort import witness
from cxrgaze.spec import DiseaseClass, ModelSpec


class Stranger(nn.Module):
    """Three layers, two heads: a diagnosis of two classes and a map.

    Args:
        gives: what becomes of the two.
    """

    def __init__(self, gives=lambda logits, log_density: (logits, log_density)):
        super().__init__()
        self.gives = gives
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.map = nn.Conv2d(8, 1, 5, padding=2)
        self.diagnosis = nn.Linear(8, 2)

    def forward(self, image):
        features = self.body(image)
        saliency = self.map(features)
        log_density = saliency.flatten(1).log_softmax(dim=1).reshape(saliency.shape)
        return self.gives(self.diagnosis(features.mean(dim=(2, 3))), log_density)


def _class(name):
    return DiseaseClass(name=name, display=name.title())


SPEC = ModelSpec(
    variant="stranger",
    model_version="1",
    classes=(_class("clear"), _class("effusion")),
    height=96,
    width=64,
    pixel_source="image-8bit",
    domain="none",
)


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    facts = Facts("stranger", "a test", "0" * 64, "nothing: untrained")
    return TorchSource(Stranger(), SPEC, facts)


FORMS = [("fp32", "tensorrt"), ("fp16", "tensorrt"), ("int8", "tensorrt"), ("int8", "cpu")]


@pytest.mark.parametrize(("precision", "target"), FORMS)
def test_it_becomes_a_bundle_that_reads_films(source, films, tmp_path, precision, target):
    bundle = pipeline.export(source, ExportOptions(precision, target, tmp_path), Steps())
    manifest = bundle.manifest
    assert manifest.parity.verdict == "pass" and manifest.rewrites == ()
    work = graph.convolution_macs(onnx.load_from_string(bundle.read(GRAPH)))
    assert set(work) == {precision} and work == manifest.convolution_macs
    assert sum(work.values()) == 96 * 64 * (9 * 8 + 25 * 8)
    if (precision, target) == ("int8", "tensorrt"):
        with pytest.raises(IncompatibleError, match="does not serve int8 graphs for target tensor"):
            cxrgaze.load(bundle.path)
        return
    film = films / "nih_00001507_002_512.png"
    with cxrgaze.load(bundle.path) as reader:
        reading = reader.read(film)
        outputs = reader.backend.infer(_canvas(film))
    assert list(reading.probabilities) == ["clear", "effusion"]
    assert sum(reading.probabilities.values()) == pytest.approx(1)
    assert reading.log_density.shape == (96, 64) and reading.heatmap().sum() == pytest.approx(1)
    answers = source.answers(_canvas(film))
    for head, limit in (("logits", 0.05), ("log_density", 0.3)):
        assert outputs[head].shape == answers.outputs[head].shape == SPEC.shapes(1)[head]
        assert np.abs(outputs[head] - answers.outputs[head]).max() < limit
    assert any("Untrained" in warning for warning in reading.warnings)


ALONE = {
    "logits": ({"heads": ("logits",)}, lambda logits, log_density: logits),
    "log_density": (
        {"heads": ("log_density",), "classes": ()},
        lambda logits, log_density: {"log_density": log_density},
    ),
    "one finding": (
        {"heads": ("logits",), "classes": SPEC.classes[1:], "class_kind": "findings"},
        lambda logits, log_density: logits[:, :1],
    ),
}


@pytest.mark.parametrize("what", ALONE)
@pytest.mark.parametrize(("precision", "target"), [("fp16", "tensorrt"), ("int8", "cpu")])
def test_one_head_alone_becomes_a_bundle_too(source, films, tmp_path, what, precision, target):
    changes, gives = ALONE[what]
    spec = ModelSpec.model_validate({**SPEC.model_dump(), **changes})
    torch.manual_seed(0)
    alone = TorchSource(Stranger(gives), spec, source.facts)
    bundle = pipeline.export(alone, ExportOptions(precision, target, tmp_path), Steps())
    (head,), manifest = spec.heads, bundle.manifest
    assert set(manifest.parity.outputs) == {head} and manifest.parity.verdict == "pass"
    assert all(set(of) == {head} for of in manifest.self_test.values())
    assert set(manifest.audit.rounding) == {head}
    assert (manifest.parity.agreement_cc_min is None) == (head == "logits")
    assert (manifest.parity.flips is None) == (head == "log_density")
    assert (bundle.path / "report/maps.png").is_file() == (head == "log_density")
    with cxrgaze.load(bundle.path) as reader:
        reading = reader.read(films / "nih_00001507_002_512.png")
        outputs = reader.backend.infer(_canvas(films / "nih_00001507_002_512.png"))
    assert list(outputs) == [head]
    assert tuple(reading.probabilities) == spec.class_names
    assert (reading.log_density is None) == (head == "logits")
    assert (reading.label is None) == (what != "logits")


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda logits, log_density: logits, "gives 1 outputs, its spec says"),
        (lambda logits, log_density: (logits, log_density, logits), "gives 3 outputs"),
        (
            lambda logits, log_density: {"logits": logits, "map": log_density},
            r"\['logits', 'map'\]",
        ),
    ],
)
def test_other_outputs_than_its_spec_says_are_a_usage_error(source, tmp_path, gives, said):
    other = TorchSource(Stranger(gives), SPEC, source.facts)
    with pytest.raises(UsageError, match=said):
        pipeline.export(other, ExportOptions("fp32", "tensorrt", tmp_path), Steps())
    with pytest.raises(UsageError, match=said):
        other.answers(np.zeros((1, 1, 96, 64), np.float32))
    assert not list(tmp_path.iterdir())
    assert not other.module._forward_hooks


def test_heads_by_name_come_in_the_order_of_the_spec(source):
    """Whatever order the module gives them in."""
    swapped = Stranger(lambda logits, log_density: {"log_density": log_density, "logits": logits})
    swapped.load_state_dict(source.module.state_dict())
    image = np.random.default_rng(0).random((2, 1, 96, 64), dtype=np.float32)
    one, other = (
        TorchSource(module, SPEC, source.facts).answers(image).outputs
        for module in (source.module, swapped)
    )
    assert list(one) == list(other) == ["logits", "log_density"]
    assert all(np.array_equal(one[head], other[head]) for head in one)
    model = TorchSource(swapped, SPEC, source.facts).graph()
    assert [output.name for output in model.graph.output] == ["logits", "log_density"]
    found = witness(graph.finished(model, SPEC))(image)
    assert np.allclose(found["logits"], one["logits"], atol=1e-4)


def _canvas(path):
    from cxrgaze.films.canvas import canvases
    from cxrgaze.films.decode import load_film

    return canvases([load_film(path)], SPEC)[0]


def test_its_blocks_are_its_own_and_kept_ones_stay_float(source, tmp_path):
    model = source.graph()
    forms = Forms(model, "fp16", "tensorrt", Layout())
    assert forms.blocks() == ["body", "map"]
    (half,) = forms.with_kept(["map"])
    assert graph.convolution_macs(half.model) == {
        "fp16": 96 * 64 * 9 * 8,
        "fp32": 96 * 64 * 25 * 8,
    }
    kept = TorchSource(source.module, SPEC, source.facts, Layout(kept=("/body/",)))
    options = ExportOptions("int8", "tensorrt", tmp_path)
    manifest = pipeline.export(kept, options, Steps()).manifest
    assert manifest.convolution_macs == {"fp16": 96 * 64 * 9 * 8, "int8": 96 * 64 * 25 * 8}
    gone = TorchSource(source.module, SPEC, source.facts, Layout(kept=("/dense/conv0/",)))
    with pytest.raises(ParityError, match="no convolution belongs to"):
        pipeline.export(gone, options, Steps())


def test_a_graph_that_is_not_the_module_is_a_parity_error_and_leaves_nothing(source, tmp_path):
    class Other(TorchSource):
        def graph(self, rewrites=()):
            torch.manual_seed(1)
            return TorchSource(Stranger(), self.spec, self.facts).graph()

    other = Other(source.module, SPEC, source.facts)
    with pytest.raises(ParityError, match="disagree"):
        pipeline.export(other, ExportOptions("fp32", "tensorrt", tmp_path), Steps())
    assert not list(tmp_path.iterdir())


def test_phantoms_of_classes_that_it_does_not_know_are_unlabelled():
    drawn = gate.phantom_set(SPEC, 8)
    assert drawn.arrays.truth.shape == (8, 2)
    assert (drawn.arrays.truth == UNKNOWN).all() and drawn.arrays.has_gaze.all()


def test_the_bundle_opens_whole(source, tmp_path):
    bundle = pipeline.export(source, ExportOptions("fp16", "cpu", tmp_path), Steps())
    opened = Bundle.open(bundle.path)
    opened.verify()
    assert opened.manifest.provenance.random_seed is None and opened.manifest.spec == SPEC
