"""Parity: the verdict on a right graph, and each way in which it must fail."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from scipy.special import softmax

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.errors import DataError, ExitCode, IntegrityError, ParityError, UsageError
from cxrgaze.export import fp16, graph, network_source, parity, pipeline
from cxrgaze.export.canvases import PARITY_SEED, parity_canvases, phantom_canvases
from cxrgaze.export.options import ExportOptions
from cxrgaze.export.source import Answers, served_of
from cxrgaze.runtime.ort import witness
from cxrgaze.train import checkpoint


@pytest.fixture(scope="module")
def source():
    return network_source.source_from_checkpoint(checkpoint.demo_path())


@pytest.fixture(scope="module")
def images(source):
    return phantom_canvases(source.spec, 6, PARITY_SEED)


@pytest.fixture(scope="module")
def compare(source):
    return partial(parity.compare, domain="test", served=served_of(source))


def _graph(source, precision="fp32", change=None):
    model = source.graph()
    if change:
        change(model)
    return graph.finished(fp16.to_fp16(model) if precision == "fp16" else model, source.spec)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_right_graph_passes_and_the_figures_are_those_of_a_slow_loop(
    source, images, compare, precision
):
    import onnxruntime

    data = _graph(source, precision)
    found = compare(source.answers(images), data, precision)
    assert found.verdict == "pass" and found.flips == 0 and found.films == 6
    session = onnxruntime.InferenceSession(data)
    worst = 0.0
    for image in images:
        with torch.inference_mode():
            reference = source.module(torch.from_numpy(image[None]))["logits"].numpy()
        logits = session.run(["logits"], {"image": image[None]})[0]
        worst = max(worst, float(np.abs(logits - reference).max()))
    of = found.outputs["logits"]
    assert of.max == pytest.approx(worst, abs=1e-6)
    assert of.p99 <= of.max and of.cosine > 0.999
    parity.require_pass(found, precision)


def _weight(model, name):
    return next(w for w in model.graph.initializer if w.name == name)


def _add(name, amount, at=0):
    def change(model):
        weight = _weight(model, name)
        values = numpy_helper.to_array(weight).copy()
        values.ravel()[at] += amount
        weight.CopyFrom(numpy_helper.from_array(values, name))

    return change


def _swap_classes(model):
    for name in ("classifier.3.weight", "classifier.3.bias"):
        weight = _weight(model, name)
        values = numpy_helper.to_array(weight)[[1, 0, 2]].copy()
        weight.CopyFrom(numpy_helper.from_array(values, name))


WRONG = {
    "a wrong weight": (_add("classifier.3.bias", 0.2), "fail"),
    "swapped classes": (_swap_classes, "fail"),
    "a wrong map": (_add("saliency.3.weight", 2.0), "fail"),
    "NaN": (_add("classifier.3.bias", np.nan), "not_finite"),
    "infinity": (_add("saliency.3.weight", np.inf), "not_finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_graph_fails(source, images, compare, name):
    change, verdict = WRONG[name]
    data = _graph(source, change=change)
    found = compare(source.answers(images), data, "fp32")
    assert found.verdict == verdict
    with pytest.raises(ParityError) as caught:
        parity.require_pass(found, "fp32")
    assert caught.value.exit_code == ExitCode.PARITY


def test_a_flip_is_another_decision_of_what_is_served(source, images):
    answers, data = source.answers(images), _graph(source, change=_swap_classes)
    before = answers.outputs["logits"].argmax(axis=1)
    of_two = int((before < 2).sum())
    assert of_two

    def flips(served):
        found = parity.compare(answers, data, "fp32", "test", served)
        assert found.verdict == "fail" and set(found.outputs) == {"logits", "log_density"}
        return found.flips

    served, logits = served_of(source), answers.outputs["logits"]
    plain = replace(served, decision=Decision())
    assert flips(plain) == of_two
    normal, failure, pneumonia = logits.T
    others = ((failure > pneumonia) != (normal > pneumonia)).sum()
    assert flips(replace(plain, untaught=("normal",))) == others
    points, temperature = served.decision.operating_points, served.decision.temperature
    swapped = logits[:, [1, 0, 2]]
    for names in (source.spec.class_names, source.spec.class_names[1:]):
        first, thresholds = 3 - len(names), [points[name] for name in names]
        one, other = (softmax(x[:, first:] / temperature, axis=1) for x in (logits, swapped))
        changed = ((one >= thresholds) != (other >= thresholds)).any(axis=1)
        changed |= one.argmax(axis=1) != other.argmax(axis=1)
        untaught = source.spec.class_names[:first]
        assert flips(replace(served, untaught=untaught)) == changed.sum() > 0
    assert changed.sum() > others  # a flag alone is a flip too
    for nothing in ({"untrained": ("logits",)}, {"untaught": ("normal", "heart_failure")}):
        assert flips(replace(served, **nothing)) is None
    spec = source.spec.model_copy(update={"class_kind": "findings"})
    points = {"operating_points": {"normal": 0.5}}
    first = answers.outputs["logits"][:, :2] >= 0
    expected = int((first[:, 0] != first[:, 1]).sum())
    assert flips(Served(spec, Decision(**points))) == expected > 0
    assert flips(Served(spec)) == 0  # none decides


def _scaled(source, factor):
    """The same function with one activation `factor` times as large inside."""
    network = copy.deepcopy(source.module)
    with torch.no_grad():
        network.classifier[0].weight.mul_(factor)
        network.classifier[0].bias.mul_(factor)
        network.classifier[3].weight.div_(factor)
    return replace(source, module=network)


@pytest.mark.long
def test_an_activation_beyond_half_fails_fp16_although_onnx_runtime_does_not_see_it(
    source, images, compare
):
    """Only the float32 range tells: docs/graphs.md#witness."""
    changed = _scaled(source, 3e4)
    found = compare(changed.answers(images), _graph(changed, "fp16"), "fp16")
    assert found.peak_activation > 65504 and found.verdict != "pass"
    with pytest.raises(ParityError):
        parity.require_pass(found, "fp16")
    as_float = compare(changed.answers(images), _graph(changed), "fp32")
    assert as_float.verdict == "pass"


def test_a_network_with_nan_inside_is_not_finite(source, images, compare):
    network = copy.deepcopy(source.module)
    with torch.no_grad():
        network.saliency[3].weight.fill_(float("nan"))
    changed = replace(source, module=network)
    found = compare(changed.answers(images), _graph(changed), "fp32")
    assert found.verdict == "not_finite"


@pytest.fixture(scope="module")
def said(source, images):
    """A graph, and its own answers in place of the network's: nothing differs but by a test."""
    data = _graph(source)
    infer = witness(data)
    films = [infer(image[None]) for image in images]
    outputs = {head: np.concatenate([of[head] for of in films]) for head in source.spec.heads}
    return data, Answers(images, outputs, 1.0)


def _with_map(answers, log_density):
    return replace(answers, outputs={**answers.outputs, "log_density": log_density})


def _border(log_density):
    """Just above 1 % of the peak of each film."""
    return log_density.max(axis=(2, 3), keepdims=True) + np.float32(np.log(0.01) + 1e-5)


def test_maps_are_compared_from_one_percent_of_the_peak_on(said, compare):
    """The network's map of one film changes in one pixel, far off from the graph's."""
    data, answers = said
    log_density = answers.outputs["log_density"]
    lowest = np.unravel_index(log_density.argmin(), log_density.shape)
    for nats, verdict in ((0.0, "fail"), (-1e-4, "pass")):
        changed = log_density.copy()
        changed[lowest] = _border(changed)[lowest[0], 0, 0, 0] + np.float32(nats)
        found = compare(_with_map(answers, changed), data, "fp32")
        assert found.verdict == verdict
        assert found.agreement_cc_min >= parity.AGREEMENT["fp32"]
        assert found.outputs["logits"].max == 0


def _as_far_as_it_may(log_density, limit):
    """Left and right change places within the limit; what is not compared rises to the border."""
    within = np.float32(0.99 * limit)
    moved = np.clip(log_density[..., ::-1], log_density - within, log_density + within)
    return np.maximum(moved, _border(moved) - np.float32(1e-4))


@pytest.mark.parametrize("precision", parity.AGREEMENT)
def test_maps_that_agree_too_little_fail_although_no_compared_pixel_does(said, compare, precision):
    data, answers = said
    limits = parity.LIMITS[precision]
    moved = _as_far_as_it_may(answers.outputs["log_density"], limits["log_density"])
    found = compare(_with_map(answers, moved), data, precision)
    assert all(of.max <= limits[head] for head, of in found.outputs.items())
    assert set(found.outputs) == set(found.limits) == set(limits)
    assert found.agreement_cc_min < parity.AGREEMENT[precision] and found.verdict == "fail"
    with pytest.raises(ParityError, match="agreement CC"):
        parity.require_pass(found, precision)


@pytest.mark.long
def test_a_graph_that_fails_parity_is_never_written(source, tmp_path, monkeypatch):
    from cxrgaze.command import Steps

    strict = {p: {**limits, "logits": 1e-12} for p, limits in parity.LIMITS.items()}
    monkeypatch.setattr(parity, "LIMITS", strict)
    options = ExportOptions("fp16", "tensorrt", tmp_path / "new")
    with pytest.raises(ParityError, match="nothing was written"):
        pipeline.export(source, options, Steps())
    assert not list(tmp_path.iterdir())


def test_onnx_of_a_checked_graph_is_deterministic(source):
    assert (
        onnx.load_from_string(_graph(source)).graph == onnx.load_from_string(_graph(source)).graph
    )


def test_parity_films_that_cannot_be_read_are_left_out_and_counted(films, tmp_path, capsys):
    good = next(films.glob("*.png"))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:900])
    spec = checkpoint.load(checkpoint.demo_path())[1].spec
    images, what = parity_canvases(spec, [tmp_path / "cut.png", good])
    assert images.shape == (1, 1, spec.height, spec.width)
    assert what == "1 films given by --films; 1 of 2 films were left out"
    assert "left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="none of the 1 films"):
        parity_canvases(spec, [tmp_path / "cut.png"])


def test_a_network_with_weights_that_are_no_numbers_is_refused_by_the_tensors_name():
    """B11, for anybody's network."""
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["x", "stem.bias"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", 1, [1])],
            [helper.make_tensor_value_info("y", 1, [1])],
            [numpy_helper.from_array(np.array([np.nan], np.float32), "stem.bias")],
        )
    )
    with pytest.raises(IntegrityError, match="weights stem.bias .* NaN"):
        graph.require_servable(model)
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones(1, np.float32), "stem.bias")
    )
    graph.require_servable(model)
    model.graph.node[0].op_type = "Loop"
    with pytest.raises(UsageError, match="cannot be served: its operator Loop"):
        graph.require_servable(model)
