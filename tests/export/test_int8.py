"""INT8 graphs: what the quantizer writes, what the lint refuses, what the layers keep."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.errors import ParityError
from cxrgaze.evidence import gate, metrics
from cxrgaze.export import graph, int8
from cxrgaze.export.forms import Forms
from cxrgaze.export.source import Layout
from cxrgaze.export.targets import TARGETS
from cxrgaze.runtime.ort import witness
from cxrgaze.train import checkpoint
from cxrgaze.train.model import block_of, kept_in

LAYOUT = Layout(kept_in(checkpoint.load(checkpoint.demo_path())[1].spec), block_of)


@pytest.fixture(scope="module")
def bundle(bundles):
    return Bundle.open(bundles / "demo-fp32.cxrgaze")


@pytest.fixture(scope="module")
def model(bundle):
    return onnx.load_from_string(bundle.read(GRAPH))


@pytest.fixture(scope="module")
def images(bundle):
    return gate.phantom_set(bundle.manifest.spec, 24, 2_000_000).arrays.images


@pytest.fixture(scope="module")
def ranges(model, images):
    return {
        target: int8.calibrate(model, list(images), row.ranged(model, LAYOUT), "minmax")
        for target, row in TARGETS.items()
    }


@pytest.fixture(scope="module")
def typed(model, ranges):
    """All int8 forms by name."""
    made = [f for t in TARGETS for f in Forms(model, "int8", t, LAYOUT, ranges[t]).with_kept()]
    return {form.name: form.model for form in made}


def _agreement(model, other, images):
    witnesses = [witness(m.SerializeToString()) for m in (model, other)]
    found = []
    for image in images:
        one, two = (infer(image[None])["log_density"] for infer in witnesses)
        found.append(metrics.cc(np.exp(one[0, 0]), np.exp(two[0, 0])))
    return found


def test_there_are_two_forms_for_tensorrt_and_one_for_each_library_of_processors(typed):
    assert list(typed) == [
        "int8, float16 else, float32 scales",
        "int8, float16 else, float16 scales",
        "int8 for the CPU, float32 else",
        "int8 for OpenVINO, float32 else",
    ]


def test_every_form_agrees_with_float32_and_has_its_work_in_int8(typed, model, images):
    total = sum(graph.convolution_macs(model).values())
    for name, form in typed.items():
        onnx.checker.check_model(form, full_check=True)
        assert min(_agreement(model, form, images[:8])) > 0.99, name
        macs = graph.convolution_macs(form)
        assert sum(macs.values()) == total and macs["int8"] > 0.75 * total


def test_both_scale_forms_have_the_same_levels(typed):
    def levels(model):
        return {
            w.name.split("/half")[0]: numpy_helper.to_array(w)
            for w in model.graph.initializer
            if w.data_type == TensorProto.INT8
        }

    half, full = (levels(typed[f"int8, float16 else, float{n} scales"]) for n in (16, 32))
    assert set(half) == set(full) and all(np.array_equal(half[n], full[n]) for n in half)


def _one_convolution(weight, bias=0.5):
    """image -> a 3x3 convolution -> logits, without a network around it."""
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["y"], name="/c/Conv", pads=[1, 1, 1, 1])
    ]
    floats = TensorProto.FLOAT
    made = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("image", floats, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("y", floats, ["N", len(weight), 8, 8])],
        [
            numpy_helper.from_array(weight.astype(np.float32), "w"),
            numpy_helper.from_array(np.full(len(weight), bias, np.float32), "b"),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def test_a_quantized_convolution_is_the_textbook_sum():
    """Against integers computed by hand: round(x / s_x) * round(w / s_w) * s_x * s_w + b."""
    rng = np.random.default_rng(2)
    weight = rng.normal(0, [[[[0.01]]], [[[1.0]]]], (2, 1, 3, 3))
    image = rng.uniform(-1, 1, (1, 1, 8, 8)).astype(np.float32)
    made = int8.for_tensorrt(_one_convolution(weight), {"image": (-1.0, 0.9)})
    assert int8.lint(made) == 3
    session = onnxruntime.InferenceSession(made.SerializeToString())
    (found,) = session.run(None, {"image": image})

    def half(value):
        return float(np.float16(value))

    s_x = half(1 / 127)
    x = np.clip(np.rint(image[0, 0] / s_x), -128, 127) * s_x
    padded = np.pad(x, 1)
    for channel in range(2):
        s_w = half(np.float32(np.abs(weight[channel]).max()) / 127)
        w = np.clip(np.rint(weight[channel, 0] / s_w), -127, 127) * s_w
        by_hand = sum(padded[i : i + 8, j : j + 8] * w[i, j] for i in range(3) for j in range(3))
        np.testing.assert_allclose(found[0, channel], by_hand + 0.5, atol=1e-4)


@pytest.mark.parametrize("low", [0.0, -0.5], ids=["unsigned", "signed"])
def test_for_openvino_it_is_the_textbook_sum_of_narrow_weights(low):
    """round(x / s_x) of 255 levels where nothing is negative, of 127 a side else; weights of 64."""
    rng = np.random.default_rng(3)
    weight = rng.normal(0, [[[[0.01]]], [[[1.0]]]], (2, 1, 3, 3))
    image = rng.uniform(low, 1, (1, 1, 8, 8)).astype(np.float32)
    made = int8.for_openvino(_one_convolution(weight), {"image": (low, 1.0)})
    assert int8.lint(made, unsigned=True) == 3
    int8.require_narrow(made)
    levels = (0, 255) if low == 0 else (-128, 127)
    s_x = 1 / levels[1]
    x = np.pad(np.clip(np.rint(image[0, 0] / s_x), *levels) * s_x, 1)
    (found,) = onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"image": image})
    for channel in range(2):
        s_w = np.abs(weight[channel]).max() / 64
        w = np.rint(weight[channel, 0] / s_w) * s_w
        by_hand = sum(x[i : i + 8, j : j + 8] * w[i, j] for i in range(3) for j in range(3))
        np.testing.assert_allclose(found[0, channel], by_hand + 0.5, atol=1e-4)


def _saturating(levels):
    """The largest input on the largest weights, quantized before and after: all in integers."""
    channels = 16
    weight = np.full((8, channels, 3, 3), levels, np.int8)
    stored = {
        "s": np.float32(1 / 255),
        "z": np.uint8(0),
        "w": weight,
        "ws": np.full(8, 1 / levels, np.float32),
        "wz": np.zeros(8, np.int8),
        "os": np.float32(channels * 9 / 255),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["x", "wd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "os", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "os", "z"], ["y"]),
    ]
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "saturating",
        [helper.make_tensor_value_info("image", floats, [1, channels, 8, 8])],
        [helper.make_tensor_value_info("y", floats, [1, 8, 6, 6])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    made.ir_version = 10
    return made, np.ones((1, channels, 8, 8), np.float32), channels * 9.0


def test_narrow_weights_do_not_saturate_on_any_processor():
    """With 127 levels a processor without VNNI makes 72 of 144, in both libraries, silently."""
    model, image, expected = _saturating(int8.NARROW)
    int8.require_narrow(model)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    openvino = pytest.importorskip("openvino", reason="needs the extra 'openvino'")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU")
    np.testing.assert_allclose(compiled(image)["y"], expected, rtol=1e-3)


def test_wide_weights_are_refused_for_processors(typed):
    with pytest.raises(ParityError, match="w has 127 levels, expected 64 at most"):
        int8.require_narrow(_saturating(int8.WIDE)[0])
    with pytest.raises(ParityError, match="has 127 levels"):
        int8.require_narrow(typed["int8, float16 else, float32 scales"])
    for name in ("int8 for the CPU, float32 else", "int8 for OpenVINO, float32 else"):
        int8.require_narrow(typed[name])


def test_a_channel_of_zeros_has_a_scale():
    weight = np.zeros((2, 1, 3, 3))
    weight[1] = 0.3
    made = int8.for_tensorrt(_one_convolution(weight), {"image": (0.0, 0.0)})
    assert int8.lint(made) == 3


def test_what_stays_float_stays_float(model, typed):
    keep = int8.kept_convolutions(model, LAYOUT)
    assert {"/dense/conv0/Conv", "/saliency/saliency.3/Conv"} <= keep
    quantized = typed["int8, float16 else, float32 scales"]
    producer = {n: node.op_type for node in quantized.graph.node for n in node.output}
    for node in int8.convolutions(quantized):
        is_quantized = producer.get(node.input[1]) == "Cast" or "/dq" in node.input[1]
        assert is_quantized == (node.name not in keep), node.name


def test_a_renamed_layer_is_an_error_and_not_an_accident(model):
    renamed = onnx.ModelProto.FromString(model.SerializeToString())
    for node in renamed.graph.node:
        node.name = node.name.replace("/saliency/", "/head/")
    with pytest.raises(ParityError, match="/saliency/"):
        int8.kept_convolutions(renamed, LAYOUT)
    with pytest.raises(ParityError, match="no convolution belongs to"):
        int8.kept_convolutions(model, LAYOUT, ["decoder.9"])


def _change(model, change):
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    change(changed)
    return changed


def _weight(model, ending):
    return next(w for w in model.graph.initializer if w.name.endswith(ending))


def _set(weight, values):
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


def _zero_point(model):
    weight = _weight(model, "/zeros")
    _set(weight, np.full_like(numpy_helper.to_array(weight), 3))


def _unsigned(model):
    weight = _weight(model, "int8/zero")
    _set(weight, np.zeros((), np.uint8))


def _scale(value):
    def change(model):
        weight = _weight(model, "/scales")
        values = numpy_helper.to_array(weight).copy()
        values[0] = value
        _set(weight, values)

    return change


def _int32_bias(model):
    zero = numpy_helper.from_array(np.zeros((), np.int32), "zero32")
    bias = numpy_helper.from_array(np.zeros(1, np.int32), "bias32")
    model.graph.initializer.extend([zero, bias])
    scale = next(w.name for w in model.graph.initializer if w.name.endswith("/scale"))
    model.graph.node.insert(
        0, helper.make_node("DequantizeLinear", ["bias32", scale, "zero32"], ["b32"], name="bias")
    )


def _per_tensor(model):
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.attribute)
    del node.attribute[:]


BROKEN = {
    "a zero point": (_zero_point, "zero point of 0"),
    "unsigned": (_unsigned, "int8 zero point"),
    "a scale of zero": (_scale(0.0), "positive and finite"),
    "a negative scale": (_scale(-0.1), "positive and finite"),
    "a scale that is no number": (_scale(np.nan), "positive and finite"),
    "a quantized bias": (_int32_bias, "int8 zero point"),
    "one scale for a whole weight": (_per_tensor, "per output channel"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_tensorrt_refuses_the_lint_refuses(typed, name):
    change, message = BROKEN[name]
    with pytest.raises(ParityError, match=message):
        int8.lint(_change(typed["int8, float16 else, float32 scales"], change))


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_lint_refuses_the_form_for_the_cpu(typed, unsigned):
    """It crashes OpenVINO."""
    with pytest.raises(ParityError):
        int8.lint(typed["int8 for the CPU, float32 else"], unsigned=unsigned)


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "unsigned"])
def test_what_openvino_is_not_to_have_the_lint_refuses(typed, name):
    change, message = BROKEN[name]
    good = typed["int8 for OpenVINO, float32 else"]
    assert int8.lint(good, unsigned=True)
    with pytest.raises(ParityError, match="int8 zero point|uint8"):
        int8.lint(good)
    with pytest.raises(ParityError, match=message):
        int8.lint(_change(good, change), unsigned=True)


def test_nan_in_calibration_is_an_error(model):
    images = [np.full((1, 64, 64), np.nan, np.float32)]
    with pytest.raises(ParityError, match="NaN or infinity"):
        int8.calibrate(model, images, ["image"], "minmax")


def test_a_tensor_without_a_range_is_an_error(model):
    with pytest.raises(ParityError, match="no calibrated range"):
        int8.for_tensorrt(model, {}, ())
