"""Factors between channels: the same function, and less lost to int8 where channels differ."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.evidence import gate
from cxrgaze.export import equalize, graph, int8
from cxrgaze.export.ranges import channel_peaks
from cxrgaze.export.source import Layout
from cxrgaze.runtime.ort import witness
from cxrgaze.train import checkpoint
from cxrgaze.train.model import block_of, kept_in

SPREAD = np.array([1.0, 0.01, 30.0, 1.0])
"""By which channels differ."""


def _two(maker="BatchNormalization", *, relu=True, twice=False, group=1):
    """image -> what makes four channels -> ReLU -> a convolution -> logits."""
    rng = np.random.default_rng(0)
    channels = len(SPREAD)
    stored = {
        "w0": rng.normal(size=(channels, 1, 3, 3)),
        "b0": np.zeros(channels),
        "scale": SPREAD,
        "bias": 0.1 * SPREAD,
        "mean": np.zeros(channels),
        "var": np.ones(channels),
        "w1": rng.normal(size=(3, channels // group, 3, 3))
        / np.resize(SPREAD, channels // group)[None, :, None, None],
    }
    nodes = [helper.make_node("Conv", ["image", "w0", "b0"], ["c"], name="first", pads=[1] * 4)]
    if maker == "BatchNormalization":
        inputs = ["c", "scale", "bias", "mean", "var"]
        nodes.append(helper.make_node(maker, inputs, ["n"], name="norm"))
    else:
        stored["w0"] = stored["w0"] * SPREAD[:, None, None, None]
        nodes[0].output[0] = "n"
    last = "n"
    if relu:
        nodes.append(helper.make_node("Relu", ["n"], ["r"], name="relu"))
        last = "r"
    nodes.append(helper.make_node("Conv", [last, "w1"], ["y"], name="second", group=group))
    outputs = {"logits": ("y", 3), **({"also": (last, len(SPREAD))} if twice else {})}
    for name, (read, _) in outputs.items():
        nodes.append(helper.make_node("GlobalAveragePool", [read], [f"{name}/mean"]))
        nodes.append(helper.make_node("Flatten", [f"{name}/mean"], [name]))
    floats = TensorProto.FLOAT
    made = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("image", floats, ["N", 1, 16, 16])],
        [helper.make_tensor_value_info(n, floats, ["N", k]) for n, (_, k) in outputs.items()],
        [
            numpy_helper.from_array(np.asarray(array, np.float32), name)
            for name, array in stored.items()
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model, last


IMAGES = [np.random.default_rng(i).normal(size=(1, 16, 16)).astype(np.float32) for i in range(4)]


def _run(model, name="y"):
    shown = onnx.ModelProto.FromString(model.SerializeToString())
    shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(shown.SerializeToString())
    return np.concatenate([session.run([name], {"image": image[None]})[0] for image in IMAGES])


def _loss(model, last):
    ranges = int8.calibrate(model, IMAGES, [last], "minmax")
    quantized = int8.for_openvino(model, ranges, {"first"})
    return np.abs(_run(quantized) - _run(model)).mean() / np.abs(_run(model)).mean()


@pytest.mark.parametrize("maker", ["BatchNormalization", "Conv"])
@pytest.mark.parametrize("relu", [True, False])
def test_the_function_stays_and_int8_loses_less(maker, relu):
    model, last = _two(maker, relu=relu)
    peaks = channel_peaks(model, [last], IMAGES)
    assert peaks[last].shape == SPREAD.shape and peaks[last].max() / peaks[last].min() > 1000
    equal = equalize.equalized(model, peaks, {"second"}, 0.5)
    np.testing.assert_allclose(_run(equal), _run(model), rtol=1e-4, atol=1e-5)
    after = channel_peaks(equal, [last], IMAGES)[last]
    assert after.max() / after.min() < 20
    assert _loss(equal, last) < _loss(model, last) / 5


def test_peaks_are_those_of_all_films():
    model, last = _two()
    (_, *shape), values = _run(model, last).shape, np.abs(_run(model, last))
    assert len(shape) == 3
    np.testing.assert_array_equal(
        channel_peaks(model, [last, "nobody"], IMAGES)[last], values.max(axis=(0, 2, 3))
    )


@pytest.mark.parametrize(
    ("options", "convolutions"),
    [({"twice": True}, {"second"}), ({"group": 2}, {"second"}), ({}, {"first"}), ({}, set())],
    ids=["another reads it", "groups", "the image", "kept"],
)
def test_what_cannot_be_moved_stays(options, convolutions):
    model, last = _two(**options)
    peaks = {last: np.abs(SPREAD), "image": np.ones(1)}
    equal = equalize.equalized(model, peaks, convolutions, 0.5)
    assert equal.SerializeToString() == model.SerializeToString()


def test_strength_zero_moves_nothing_and_a_dead_channel_has_a_factor():
    model, last = _two()
    peaks = channel_peaks(model, [last], IMAGES)
    same = equalize.equalized(model, peaks, {"second"}, 0.0)
    assert same.SerializeToString() == model.SerializeToString()
    peaks[last][1] = 0
    equal = equalize.equalized(model, peaks, {"second"}, 0.5)
    np.testing.assert_allclose(_run(equal), _run(model), rtol=1e-4, atol=1e-5)


def test_a_shift_is_added_to_the_logits_and_to_nothing_else():
    model, _ = _two(twice=True)
    moved = equalize.shifted(model, np.array([0.5, 0.0, -1.0]))
    onnx.checker.check_model(moved, full_check=True)
    np.testing.assert_array_equal(_run(moved, "also"), _run(model, "also"))
    difference = _run(moved, "logits/before") + [0.5, 0.0, -1.0]
    sessions = (onnxruntime.InferenceSession(m.SerializeToString()) for m in (model, moved))
    before, after = (s.run(["logits"], {"image": np.stack(IMAGES)})[0] for s in sessions)
    np.testing.assert_allclose(after - before, [[0.5, 0.0, -1.0]] * 4, atol=1e-6)
    np.testing.assert_allclose(after, difference, rtol=1e-6)


@pytest.mark.parametrize("strength", equalize.STRENGTHS[1:])
def test_the_demo_network_stays_the_same_network(bundles, strength):
    bundle = Bundle.open(bundles / "demo-fp32.cxrgaze")
    model = onnx.load_from_string(bundle.read(GRAPH))
    layout = Layout(kept_in(checkpoint.load(checkpoint.demo_path())[1].spec), block_of)
    images = gate.phantom_set(bundle.manifest.spec, 6, 2_000_000).arrays.images
    quantized = {n.name for n in int8.convolutions(model)} - int8.kept_convolutions(model, layout)
    peaks = channel_peaks(model, int8.ranged_inputs(model, layout), list(images))
    equal = equalize.equalized(model, peaks, quantized, strength)
    moved = sum(
        a.raw_data != b.raw_data
        for a, b in zip(model.graph.initializer, equal.graph.initializer, strict=True)
    )
    assert moved > 50
    one, other = (witness(graph.finished(m, bundle.manifest.spec))(images) for m in (model, equal))
    for head in one:
        np.testing.assert_allclose(other[head], one[head], atol=1e-4)
