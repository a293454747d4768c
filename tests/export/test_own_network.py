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
from cxrgaze.errors import IncompatibleError, ParityError
from cxrgaze.evidence import gate
from cxrgaze.export import graph, pipeline
from cxrgaze.export.forms import Forms
from cxrgaze.export.options import ExportOptions
from cxrgaze.export.source import Facts, Layout, TorchSource
from cxrgaze.spec import DiseaseClass, ModelSpec


class Stranger(nn.Module):
    """Three layers, two heads: a diagnosis of two classes and a map."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.map = nn.Conv2d(8, 1, 5, padding=2)
        self.diagnosis = nn.Linear(8, 2)

    def forward(self, image):
        features = self.body(image)
        saliency = self.map(features)
        log_density = saliency.flatten(1).log_softmax(dim=1).reshape(saliency.shape)
        return self.diagnosis(features.mean(dim=(2, 3))), log_density


def _class(name):
    return DiseaseClass(name=name, display=name.title(), snomed="0")


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
    assert np.abs(outputs.logits - answers.logits).max() < 0.05
    assert any("Untrained" in warning for warning in reading.warnings)


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
    assert (drawn.arrays.labels == -1).all() and drawn.arrays.has_gaze.all()


def test_the_bundle_opens_whole(source, tmp_path):
    bundle = pipeline.export(source, ExportOptions("fp16", "cpu", tmp_path), Steps())
    opened = Bundle.open(bundle.path)
    opened.verify()
    assert opened.manifest.provenance.random_seed is None and opened.manifest.spec == SPEC
