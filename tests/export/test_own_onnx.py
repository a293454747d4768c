"""Networks that people bring, as ONNX or as torch modules: into a bundle, or refused."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

import cxrgaze
from cxrgaze.benchmarks import cli as bench
from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.command import Steps
from cxrgaze.engines import cli as build
from cxrgaze.errors import CxrgazeError, ExitCode, IntegrityError, UsageError
from cxrgaze.evidence import phantom
from cxrgaze.export import cli, graph, own_graph, own_module, own_open, own_source, pipeline
from cxrgaze.export.options import ExportOptions
from cxrgaze.export.own_source import CARD, source_from_module, source_from_onnx
from cxrgaze.runtime import trt_library
from cxrgaze.runtime.ort import open_session, witness

SIZE = (64, 48)


class Two(nn.Module):
    """Three layers, two heads: logits of two classes and a map of a quarter of the size.

    Args:
        channels: of the image. ends: what is done to the two.
    """

    def __init__(self, channels=1, ends=lambda logits, heat: (logits, heat)):
        super().__init__()
        self.ends = ends
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
        )
        self.heat = nn.Conv2d(8, 2, 3, 2, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, image):
        features = self.body(image)
        return self.ends(self.head(features.mean(dim=(2, 3))), self.heat(features))


class Classifier(nn.Module):
    """Convolutions, global pooling, a linear layer: what has a class activation map."""

    def __init__(self, classes=3):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, 1))
        self.classifier = nn.Linear(5, classes)

    def forward(self, image):
        return self.classifier(functional.relu(self.features(image)).mean((2, 3)))


class Attention(nn.Module):
    """Most of its work is matrix products."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 16, 16, 16)
        self.mix = nn.Sequential(*[nn.Linear(16, 16) for _ in range(40)])
        self.head = nn.Linear(16, 2)

    def forward(self, image):
        tokens = self.patch(image).flatten(2).transpose(1, 2)
        return self.head(self.mix(tokens).mean(1))


def _random(kind, *arguments, **named):
    torch.manual_seed(0)
    return kind(*arguments, **named).eval()


def _onnx(module, path, channels=1, names=("out", "heat"), size=SIZE, opset=17, batch="N"):
    axes = {name: {0: batch} for name in ("x", *names)} if batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own age
        torch.onnx.export(
            module,
            (torch.zeros(1, channels, *size),),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["x"],
            output_names=list(names),
            dynamic_axes=axes,
        )
    return path


def _card(path, *, logits="", map_="", more="", domain="none"):
    """A card with given tables; each table is its lines."""
    classes = '[{name = "clear", display = "Clear"}, {name = "sick", display = "Sick"}]'
    text = f"""
[network]
name = "stranger"
version = "1"
trained_on = "nothing: random weights"
domain = "{domain}"
pixel_source = "image-8bit"
{more}
"""
    default = {
        "logits": f'output = "out"\nclasses = {classes}',
        "map": 'output = "heat"\nkind = "logits"',
    }
    for table, lines in (("logits", logits), ("map", map_)):
        if lines is not None:
            text += f"[{table}]\n{lines or default[table]}\n"
    path.write_text(text)
    return path


IN_A_CHILD = ("time_limit", "all_memory", "mutated", "by_the_command", "both_doors")


@pytest.fixture(autouse=True)
def without_a_child(request, monkeypatch):
    """A child takes its seconds to start: what is not about it opens a file right here."""
    if any(part in request.node.name for part in IN_A_CHILD):
        return

    def opened(data, what, size=None):
        try:
            return own_open._opened(data, size)
        except CxrgazeError as error:
            raise type(error)(f"{what}: {error}") from error

    monkeypatch.setattr(own_source, "opened", opened)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The three layers as ONNX and the card."""
    folder = tmp_path_factory.mktemp("own")
    return _onnx(_random(Two), folder / "two.onnx"), _card(folder / "card.toml")


FORMS = [
    ("fp32", "tensorrt"),
    ("fp16", "tensorrt"),
    ("int8", "tensorrt"),
    ("int8", "cpu"),
    ("int8", "openvino"),
]


@pytest.mark.parametrize(("precision", "target"), FORMS)
def test_an_onnx_file_becomes_a_bundle_that_reads_films(two, films, tmp_path, precision, target):
    source = source_from_onnx(*two)
    bundle = pipeline.export(source, ExportOptions(precision, target, tmp_path), Steps())
    manifest = bundle.manifest
    assert manifest.parity.verdict == "pass" and manifest.gate.verdict == "not_gated"
    assert manifest.provenance.checkpoint == "two.onnx"
    assert bundle.read(CARD) == two[1].read_bytes()
    if precision == "int8":
        assert manifest.convolution_macs["int8"] > 0
    if (precision, target) not in (("int8", "tensorrt"), ("int8", "openvino")):
        with cxrgaze.load(bundle.path, "onnxruntime") as reader:
            reading = reader.read(next(iter(sorted(films.glob("*.png")))))
        assert set(reading.probabilities) == {"clear", "sick"}
        assert reading.heatmap().sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("door", ["onnx", "module"])
def test_through_both_doors_the_same_network_says_the_same(two, tmp_path, door):
    module = _random(Two)
    if door == "module":
        card = _card(tmp_path / "card.toml", more=f"[input]\nsize = {list(SIZE)}")
        text = card.read_text().replace('"out"', '"output0"').replace('"heat"', '"output1"')
        card.write_text(text)
        source = source_from_module(module, "w.safetensors", "0" * 64, card)
    else:
        source = source_from_onnx(*two)
    images = np.random.default_rng(0).random((2, 1, *SIZE), dtype=np.float32)
    with torch.inference_mode():
        logits, heat = module(torch.from_numpy(images))
        large = functional.interpolate(heat[:, :1], SIZE, mode="bilinear")
        density = functional.log_softmax(large.flatten(1), 1).reshape(large.shape)
    infer = witness(graph.finished(source.graph(), source.spec))
    for found in (infer(images), source.answers(images).outputs):
        assert np.abs(found["logits"] - logits.numpy()).max() < 1e-5
        assert np.abs(found["log_density"] - density.numpy()).max() < 1e-4


def test_a_network_may_call_its_tensors_as_we_do(tmp_path):
    module = _random(Two)
    path = tmp_path / "m.onnx"
    _onnx(module, path, names=("log_density", "logits"))  # and the other way round

    def renamed(model):
        model.graph.input[0].name = "image"
        for node in model.graph.node:
            node.input[:] = ["image" if name == "x" else name for name in node.input]

    _edited(path, path, renamed)
    card = _card(tmp_path / "c.toml", more='[input]\nname = "image"')
    text = card.read_text().replace('"out"', '"log_density"').replace('"heat"', '"logits"')
    card.write_text(text)
    source = source_from_onnx(path, card)
    image = np.random.default_rng(7).random((1, 1, *SIZE), dtype=np.float32)
    with torch.inference_mode():
        logits = module(torch.from_numpy(image))[0].numpy()
    for found in (
        witness(graph.finished(source.graph(), source.spec))(image),
        source.answers(image).outputs,
    ):
        assert np.abs(found["logits"] - logits).max() < 1e-5
        assert found["log_density"].shape == (1, 1, *SIZE)


SCALES = {
    "range": ("range = [-1024, 1024]", 1, lambda x: x * 2048 - 1024),
    "inverted": ("range = [1, 0]", 1, lambda x: 1 - x),
    "three": ("", 3, lambda x: x.expand(-1, 3, -1, -1)),
    "imagenet": (
        "mean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]",
        3,
        lambda x: (
            (x - torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1))
            / torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
        ),
    ),
    "one number": (
        "mean = [0.5]\nstd = [0.25]",
        3,
        lambda x: ((x - 0.5) / 0.25).expand(-1, 3, -1, -1),
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_grey_levels_and_channels_go_into_the_graph(tmp_path, name):
    lines, channels, slow = SCALES[name]
    module = _random(Two, channels)
    path = _onnx(module, tmp_path / "m.onnx", channels)
    source = source_from_onnx(path, _card(tmp_path / "c.toml", more=f"[input]\n{lines}"))
    image = np.random.default_rng(1).random((1, 1, *SIZE), dtype=np.float32)
    with torch.inference_mode():
        logits = module(slow(torch.from_numpy(image)))[0].numpy()
    found = witness(graph.finished(source.graph(), source.spec))(image)
    scale = max(np.abs(logits).max(), 1)
    assert np.abs(found["logits"] - logits).max() < 1e-4 * scale
    assert np.abs(source.answers(image).outputs["logits"] - logits).max() < 1e-4 * scale


def _softmax_of_pixels(heat):
    return functional.softmax(heat.flatten(1), 1).reshape(heat.shape)


MAPS = {
    "log-density": (lambda heat: _softmax_of_pixels(heat[:, :1]).log(), 0, lambda m: m.exp()),
    "probability": (lambda heat: torch.sigmoid(heat), 1, lambda m: m),
    "activation": (lambda heat: heat, 1, lambda m: m.clamp(min=0)),
    "logits": (lambda heat: heat * 3, 1, lambda m: m.exp()),
}


@pytest.mark.parametrize("kind", MAPS)
def test_a_map_of_any_kind_becomes_a_log_density(tmp_path, kind):
    ends, channel, mass = MAPS[kind]
    full = kind == "log-density"  # which sums to 1 at its own size alone

    def gives(logits, heat):
        heat = functional.interpolate(heat, SIZE, mode="bilinear") if full else heat
        return logits, ends(heat)

    module = _random(Two, ends=gives)
    path = _onnx(module, tmp_path / "m.onnx")
    card = _card(tmp_path / "c.toml", map_=f'output = "heat"\nkind = "{kind}"\nchannel = {channel}')
    source = source_from_onnx(path, card)
    image = np.random.default_rng(2).random((1, 1, *SIZE), dtype=np.float32)
    with torch.inference_mode():
        heat = module(torch.from_numpy(image))[1][:, channel : channel + 1]
        if kind == "logits":
            wanted = functional.interpolate(heat, SIZE, mode="bilinear").exp()
        else:
            large = heat if full else functional.interpolate(heat, SIZE, mode="bilinear")
            wanted = mass(large)
        wanted = (wanted / wanted.sum()).numpy()
    for found in (
        witness(graph.finished(source.graph(), source.spec))(image),
        source.answers(image).outputs,
    ):
        density = np.exp(found["log_density"].astype(np.float64))
        assert density.sum() == pytest.approx(1, abs=1e-4)
        assert np.abs(density - wanted).max() < 1e-5


@pytest.mark.parametrize("cam", ["b", "all"])
def test_a_class_activation_map_is_the_slow_definition(tmp_path, cam):
    module = _random(Classifier)
    path = _onnx(module, tmp_path / "m.onnx", names=("out",))
    classes = ", ".join(f'{{name = "{n}", display = "{n.upper()}"}}' for n in "abc")
    card = _card(tmp_path / "c.toml", logits=f'output = "out"\nclasses = [{classes}]', map_=None)
    source = source_from_onnx(path, card, cam)
    image = np.random.default_rng(3).random((1, 1, *SIZE), dtype=np.float32)
    with torch.inference_mode():
        features = functional.relu(module.features(torch.from_numpy(image)))[0].numpy()
    weights = module.classifier.weight.detach().numpy()
    slow = np.zeros((3, *features.shape[1:]))
    for c in range(3):
        for k in range(5):
            slow[c] += weights[c, k] * features[k]
    means = slow.mean((1, 2)) + module.classifier.bias.detach().numpy()
    infer = witness(graph.finished(source.graph(), source.spec))
    found = infer(image)
    assert np.abs(found["logits"][0] - means).max() < 1e-5  # its mean is the logit
    chosen = torch.from_numpy(slow[1] if cam == "b" else slow.max(0))[None, None]
    large = functional.interpolate(chosen, SIZE, mode="bilinear").clamp(min=0)
    wanted = (large / large.sum()).numpy()
    assert np.abs(np.exp(found["log_density"]) - wanted).max() < 1e-5


def test_a_network_without_pooling_has_no_class_activation_map(two, tmp_path):
    path = _onnx(_random(Attention), tmp_path / "m.onnx", names=("out",))
    card = _card(tmp_path / "c.toml", map_=None)
    with pytest.raises(
        UsageError, match="expected a global average pooling|expected a linear layer"
    ):
        source_from_onnx(path, card, "all")
    with pytest.raises(UsageError, match=r"with \[logits\] and without \[map\]"):
        source_from_onnx(*two, "all")
    good = _onnx(_random(Classifier, 2), tmp_path / "g.onnx", names=("out",))
    with pytest.raises(UsageError, match="--cam ill is no class; there are clear, sick"):
        source_from_onnx(good, card, "ill")


def test_int8_of_matrix_products_is_refused_with_their_share(tmp_path):
    path = _onnx(_random(Attention), tmp_path / "m.onnx", names=("out",))
    source = source_from_onnx(path, _card(tmp_path / "c.toml", map_=None))
    options = ExportOptions("int8", "tensorrt", tmp_path / "o")
    with pytest.raises(UsageError, match=r"\d+ % of this network's work .*Gemm.*--precision fp16"):
        pipeline.export(source, options, Steps())
    bundle = pipeline.export(source, ExportOptions("fp16", "tensorrt", tmp_path / "o"), Steps())
    assert bundle.manifest.parity.verdict == "pass"
    assert _built_ahead_of_time(bundle, tmp_path) in (ExitCode.OK, None)


def _built_ahead_of_time(bundle, folder):
    """The exit code of TensorRT-RTX's builder; None where it is not installed."""
    if "tensorrt_rtx" not in trt_library.versions():
        return None
    asked = [str(bundle.path), "--library", "tensorrt_rtx", "--cpu-only", "--sm", "86"]
    return build.main([*asked, "--cache", str(folder / "plans")])


def test_what_stays_in_higher_precision_is_by_rule_or_by_name(two, tmp_path):
    rule = source_from_onnx(*two).layout
    assert rule.kept == ("/body/body.0/Conv", "/heat/Conv")  # the first, and what makes the map
    named = _card(
        tmp_path / "c.toml", more='[quantization]\nkeep = ["/body/body.2/"]\nblocks = "^/(body)"'
    )
    layout = source_from_onnx(two[0], named).layout
    assert layout.kept == ("/body/body.2/",)
    assert (
        layout.block_of("/body/body.0/Conv") == "body" and layout.block_of("/heat/Conv") == "else"
    )
    nothing = _card(tmp_path / "d.toml", more='[quantization]\nblocks = "^/no"')
    with pytest.raises(UsageError, match="no node has a name"):
        source_from_onnx(two[0], nothing)


def test_blocks_are_by_path_where_that_makes_a_good_number_else_by_work(tmp_path):
    model = onnx.load(_onnx(_random(Two), tmp_path / "m.onnx"))
    assert len({own_graph._by_work(model)(n.name) for n in model.graph.node}) <= 8
    deep = nn.Sequential(
        *[nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU()) for _ in range(6)]
    )
    path = _onnx(deep, tmp_path / "deep.onnx", names=("heat",))
    source = source_from_onnx(path, _card(tmp_path / "c.toml", logits=None))
    convolutions = [n.name for n in source.model.graph.node if n.op_type == "Conv"]
    assert len(set(map(source.layout.block_of, convolutions))) == 6


EINSUMS = {
    "bhxd,bhyd->bhxy": "MatMul",
    "bhxy,bhyd->bhxd": "MatMul",
    "bxhd,byhd->bhxy": "Einsum",  # turns more than the last two
    "bhxd,bhyd->bhyx": "Einsum",
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_an_einsum_that_is_a_product_of_matrices_becomes_one(equation):
    sides, rng = equation.split("->")[0].split(","), np.random.default_rng(5)
    length = {"b": 2, "h": 3, "x": 4, "y": 5, "d": 6}
    arrays = [rng.random([length[c] for c in side]).astype(np.float32) for side in sides]
    node = helper.make_node("Einsum", ["a", "b"], ["c"], equation=equation, name="e")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in zip("ab", arrays, strict=True)
    ]
    wanted = np.einsum(equation, *arrays)
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, wanted.shape)
    made = helper.make_graph([node], "g", values, [out])
    own_open._multiply_what_is_summed(made)
    assert made.node[-1].op_type == EINSUMS[equation]
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = graph.IR_VERSION
    found = open_session(model.SerializeToString()).run(None, dict(zip("ab", arrays, strict=True)))
    assert np.abs(found[0] - wanted).max() < 1e-5


@pytest.mark.parametrize("place", [0, 2, -1])
def test_what_is_picked_is_sliced(place):
    index = numpy_helper.from_array(np.array(place), "i")
    node = helper.make_node("Gather", ["a", "i"], ["c"], axis=1, name="g")
    values = helper.make_tensor_value_info("a", TensorProto.FLOAT, [2, 3, 4])
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, [2, 4])
    made = helper.make_graph([node], "g", [values], [out], [index])
    own_open._slice_what_is_picked(made)
    assert [one.op_type for one in made.node] == ["Slice", "Squeeze"]
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = graph.IR_VERSION
    array = np.random.default_rng(6).random((2, 3, 4)).astype(np.float32)
    found = open_session(model.SerializeToString()).run(None, {"a": array})
    assert np.array_equal(found[0], array[:, place])


def _edited(path, to, edit):
    model = onnx.load(path)
    edit(model)
    onnx.save(model, to)
    return to


def _two_inputs(model):
    model.graph.input.append(helper.make_tensor_value_info("age", TensorProto.FLOAT, ["N", 1]))


def _dynamic_sides(model):
    for place, name in ((2, "H"), (3, "W")):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_param = name


def _custom(model):
    model.graph.node[0].domain = "my.ops"
    model.opset_import.append(helper.make_opsetid("my.ops", 1))


def _nan(model):
    weight = model.graph.initializer[0]
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))


def _external(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    tensor.ClearField("raw_data")


def _no_text(model):
    model.graph.node[0].name = "odd_name"


def _five_channels(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5


def _half_input(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


FILES = {
    "two inputs": (_two_inputs, UsageError, "2 inputs .*expected one: the image"),
    "dynamic sides": (_dynamic_sides, UsageError, r"dynamic; .*size = \[H, W\]"),
    "custom operator": (_custom, UsageError, "operators of the domain my.ops .*own operators"),
    "NaN": (_nan, IntegrityError, "weights .* have NaN"),
    "external data": (_external, IntegrityError, "data outside of itself"),
    "no text": (_no_text, IntegrityError, r"no text \(UTF-8\)"),
    "channels": (_five_channels, UsageError, r"expected \(N, 1, H, W\) or \(N, 3, H, W\)"),
    "float16 input": (_half_input, UsageError, "is FLOAT16, expected FLOAT"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_served_is_refused_with_what_to_do(two, tmp_path, name):
    edit, error, said = FILES[name]
    model = onnx.load(two[0])
    edit(model)
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.SerializeToString().replace(b"odd_name", b"od\xff\xfename"))
    with pytest.raises(error, match=said):
        source_from_onnx(path, two[1])


def test_a_graph_of_any_size_takes_that_of_the_card(two, tmp_path):
    path = _edited(two[0], tmp_path / "any.onnx", _dynamic_sides)
    card = _card(tmp_path / "c.toml", more="[input]\nsize = [96, 64]")
    spec = source_from_onnx(path, card).spec
    assert (spec.height, spec.width) == (96, 64)
    with pytest.raises(UsageError, match="is 64x48, the card says 96x64"):
        source_from_onnx(two[0], card)


def test_a_batch_that_is_fixed_inside_is_refused(tmp_path):
    class Fixed(Two):
        def forward(self, image):
            return super().forward(image.reshape(1, 1, *SIZE))

    path = _onnx(_random(Fixed), tmp_path / "m.onnx", batch="")
    with pytest.raises((UsageError, IntegrityError), match="batch is fixed|one row a film|shape"):
        source_from_onnx(path, _card(tmp_path / "c.toml"))


def test_old_opsets_are_converted(tmp_path):
    path = _onnx(_random(Two), tmp_path / "m.onnx", opset=11)
    assert source_from_onnx(path, _card(tmp_path / "c.toml")).graph().opset_import[0].version == 18


def _probabilities(logits, heat):
    return logits.softmax(1), heat


CARDS = {
    "no head": ({"logits": None, "map_": None}, r"expected \[logits\], \[map\] or both"),
    "unknown key": ({"more": "[input]\ncolour = 1"}, "input.colour.*docs/own-networks.md"),
    "both scales": (
        {"more": "[input]\nrange = [0, 255]\nmean = [0.5]\nstd = [0.5]"},
        "range, or mean and std",
    ),
    "another output": ({"map_": 'output = "cam"\nkind = "logits"'}, "no tensor cam .*out, heat"),
    "three classes": (
        {
            "logits": 'output = "out"\nclasses = [{name="a",display="A"},{name="b",display="B"},'
            '{name="c",display="C"}]'
        },
        r"expected \(N, 3\)",
    ),
    "no log-density": (
        {"map_": 'output = "heat"\nkind = "log-density"'},
        'kind = "logits" normalises',
    ),
    "channel": ({"map_": 'output = "heat"\nkind = "logits"\nchannel = 7'}, "2 channels.*channel 7"),
    "another input": ({"more": '[input]\nname = "y"'}, "input is x, the card says y"),
    "flat map": ({"map_": 'output = "out"\nkind = "logits"'}, r"expected \(N, C, h, w\)"),
    "pattern": ({"more": '[quantization]\nblocks = "("'}, "no regular expression"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_does_not_fit_is_refused_with_what_to_do(two, tmp_path, name):
    tables, said = CARDS[name]
    with pytest.raises(UsageError, match=said):
        source_from_onnx(two[0], _card(tmp_path / "c.toml", **tables))


def test_what_is_below_zero_is_no_probability(tmp_path):
    path = _onnx(_random(Two, ends=lambda logits, heat: (logits, heat - 5)), tmp_path / "m.onnx")
    card = _card(tmp_path / "c.toml", map_='output = "heat"\nkind = "probability"')
    with pytest.raises(UsageError, match="no probability; kind = "):
        source_from_onnx(path, card)


def test_probabilities_are_no_logits_and_the_tensor_before_them_is_named(tmp_path):
    path = _onnx(_random(Two, ends=_probabilities), tmp_path / "m.onnx")
    card = _card(tmp_path / "c.toml")
    with pytest.raises(UsageError, match='comes from a Softmax.*output = "') as error:
        source_from_onnx(path, card)
    inner = str(error.value).rsplit('output = "', 1)[1].rstrip('"')
    card.write_text(card.read_text().replace('output = "out"', f'output = "{inner}"'))
    source = source_from_onnx(path, card)
    image = np.random.default_rng(4).random((1, 1, *SIZE), dtype=np.float32)
    with torch.inference_mode():
        wanted = _random(Two)(torch.from_numpy(image))[0].numpy()
    assert np.abs(source.answers(image).outputs["logits"] - wanted).max() < 1e-5


def test_opening_has_a_time_limit(two):
    with pytest.raises(IntegrityError, match="took more than 0 s"):
        own_open.opened(two[0].read_bytes(), "slow.onnx", seconds=0.01)


def test_a_graph_that_folds_into_all_memory_is_refused_and_nothing_dies(two, tmp_path):
    node = helper.make_node("ConstantOfShape", ["size"], ["huge"])
    size = numpy_helper.from_array(np.array([1 << 20, 1 << 17], np.int64), "size")

    def bomb(model):
        model.graph.initializer.append(size)
        model.graph.node.insert(0, node)
        model.graph.node.append(helper.make_node("ReduceSum", ["huge"], ["one"], keepdims=0))
        model.graph.node.append(helper.make_node("Add", ["out", "one"], ["more"]))
        model.graph.output[0].name = "more"

    path = _edited(two[0], tmp_path / "bomb.onnx", bomb)
    with pytest.raises(CxrgazeError, match="bomb.onnx"):
        source_from_onnx(path, two[1])


def _mutations(data, count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 8))):
            changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
        end = int(rng.integers(1, len(changed) + 1)) if rng.random() < 0.2 else len(changed)
        yield bytes(changed[:end])


@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.long)])
def test_mutated_files_and_cards_are_an_error_of_ours_or_a_source(two, tmp_path, count):
    """Seed 19. Half of them are files, half cards."""
    path, card = tmp_path / "m.onnx", tmp_path / "c.toml"
    for number, data in enumerate(_mutations(two[0].read_bytes(), count // 2, 19)):
        path.write_bytes(data)
        try:
            source_from_onnx(path, two[1])
        except CxrgazeError as error:
            assert str(error), number
    for number, data in enumerate(_mutations(two[1].read_bytes(), count // 2, 20)):
        card.write_bytes(data)
        try:
            source_from_onnx(two[0], card)
        except CxrgazeError as error:
            assert str(error), number


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Somebody's code in the working folder, with weights."""
    source = Path(__file__).read_text()
    wanted = source[source.index("class Classifier") : source.index("class Attention")]
    head = "import torch\nfrom torch import nn\nfrom torch.nn import functional\n\n"
    tail = "\ndef make():\n    return Classifier(2)\n"
    (tmp_path / "strangers_code.py").write_text(head + wanted + tail)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "strangers_code", raising=False)
    module = _random(Classifier, 2)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "w.safetensors")
    torch.save(module.state_dict(), tmp_path / "w.pt")
    torch.save({"state_dict": module.state_dict()}, tmp_path / "lightning.ckpt")
    torch.save(module, tmp_path / "whole.pt")
    return tmp_path


def test_a_module_by_its_code_becomes_a_bundle_by_the_command(code, capsys):
    card = _card(
        code / "c.toml",
        logits='output = "output"\nclasses = [{name="a",display="A"},{name="b",display="B"}]',
        map_=None,
        more='[input]\nsize = [64, 48]\ncanvas = "stretch"',
    )
    for weights in ("w.pt", "lightning.ckpt"):
        assert own_module.made("strangers_code:make", Path(weights))[0].training is False
    asked = ["--model", "strangers_code:make", "--weights", "w.safetensors", "--card", str(card)]
    assert cli.main([*asked, "--cam", "b", "--output", "out", "--precision", "fp16"]) == 0
    assert "runs the code of strangers_code, which is not ours" in capsys.readouterr().err
    manifest = Bundle.open(Path("out/stranger-fp16.cxrgaze")).manifest
    assert manifest.spec.heads == ("logits", "log_density") and manifest.spec.canvas == "stretch"
    said = "w.safetensors, its map the class activation map of b"
    assert manifest.provenance.checkpoint == said
    with cxrgaze.load("out/stranger-fp16.cxrgaze", "onnxruntime") as reader:
        reading = reader.read(phantom.draw(1, shape=(200, 120)).pixels)
    assert reading.heatmap().shape == (200, 120)


def test_weights_that_are_none_or_another_networks_are_refused(code, monkeypatch):
    def made(named="strangers_code:make", weights="w.pt"):
        return own_module.made(named, Path(weights))

    with pytest.raises(IntegrityError, match="no tensors that can be read"):
        made(weights="whole.pt")
    Path("evil.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(IntegrityError, match="no tensors that can be read|expected a state dict"):
        made(weights="evil.pt")
    torch.save({"features.0.weight": torch.zeros(6, 1, 3, 3)}, "part.pt")
    with pytest.raises(UsageError, match="lacks features.0.bias"):
        made(weights="part.pt")
    torch.save({**_random(Classifier, 2).state_dict(), "more": torch.zeros(1)}, "more.pt")
    with pytest.raises(UsageError, match="has, and the module not, more"):
        made(weights="more.pt")
    torch.save(_random(Classifier, 5).state_dict(), "other.pt")
    with pytest.raises(UsageError, match="does not fit the module"):
        made(weights="other.pt")
    for named, said in {
        "strangers_code": "expected package.module:factory",
        "no_such_code:make": "ModuleNotFoundError",
        "strangers_code:none": "AttributeError",
        "math:pi": "TypeError",
        "builtins:dict": "expected a torch module",
    }.items():
        with pytest.raises(UsageError, match=said):
            made(named)
    with pytest.raises(UsageError, match="is no file"):
        made(weights="nowhere.pt")


USES = {
    "no card": (["--onnx", "m.onnx"], "--card"),
    "two doors": (["--onnx", "m.onnx", "--model", "a:b", "--card", "c.toml"], "not both"),
    "card alone": (["--card", "c.toml"], "go together"),
    "cam alone": (["--cam", "all"], "--cam is for"),
    "no weights": (["--model", "a:b", "--card", "c.toml"], "--weights"),
    "no file": (["--onnx", "nowhere.onnx", "--card", "CARD"], "is no file"),
}


@pytest.mark.parametrize("name", USES)
def test_the_command_refuses_what_does_not_go_together(two, capsys, name):
    arguments, said = USES[name]
    arguments = [str(two[1]) if one == "CARD" else one for one in arguments]
    assert cli.main(arguments) == ExitCode.USAGE
    assert said in capsys.readouterr().err


def test_a_clinical_network_of_ones_own_needs_a_gate(two, tmp_path):
    source = source_from_onnx(two[0], _card(tmp_path / "c.toml", domain="clinical"))
    with pytest.raises(UsageError, match="needs a gate: give --gate"):
        pipeline.export(source, ExportOptions("fp16", "tensorrt", tmp_path), Steps())


@pytest.mark.long
def test_a_classifier_of_findings_by_monai_becomes_int8(tmp_path):
    """MONAI's DenseNet121, 18 findings at 224, an input in [-1024, 1024]."""
    from monai.networks.nets import DenseNet121

    torch.manual_seed(0)
    module = DenseNet121(spatial_dims=2, in_channels=1, out_channels=18).eval()
    path = _onnx(module, tmp_path / "m.onnx", names=("out",), size=(224, 224))
    names = ", ".join(f'{{name = "f{n}", display = "F{n}"}}' for n in range(18))
    card = _card(
        tmp_path / "c.toml",
        logits=f'output = "out"\nkind = "findings"\nclasses = [{names}]',
        map_=None,
        more='[input]\nrange = [-1024, 1024]\ncanvas = "crop"',
    )
    source = source_from_onnx(path, card, "f3")
    assert source.layout.block_of("/features/denseblock2/x/Conv") == "features/denseblock2"
    bundle = pipeline.export(source, ExportOptions("int8", "tensorrt", tmp_path), Steps())
    work = bundle.manifest.convolution_macs
    assert work["int8"] > 0.95 * sum(work.values())
    golden = json.loads((bundle.path / "manifest.json").read_text())
    assert golden["spec"]["canvas"] == "crop" and GRAPH in bundle


def _resnet():
    from monai.networks.nets import resnet18

    return resnet18(spatial_dims=2, n_input_channels=3, num_classes=2)


def _unet():
    from monai.networks.nets import UNet

    return UNet(2, 1, 1, channels=(8, 16, 32), strides=(2, 2))


def _vit():
    pytest.importorskip("einops", reason="einops is not installed here")
    from monai.networks.nets import ViT

    vit = ViT(1, (64, 64), (16, 16), 64, 128, 4, 4, spatial_dims=2)  # without a class token
    return nn.Sequential(vit, _MeanOfTokens(), nn.Linear(64, 2))


class _MeanOfTokens(nn.Module):
    def forward(self, outputs):
        return outputs[0].mean(1)


STRANGERS = {
    # Network, channels, tables of its card, precisions and targets.
    "ResNet": (_resnet, 3, {"map_": None}, [("fp16", "tensorrt"), ("int8", "openvino")]),
    "UNet": (
        _unet,
        1,
        {"logits": None, "map_": 'output = "heat"\nkind = "activation"'},
        [("fp16", "tensorrt"), ("int8", "tensorrt"), ("int8", "cpu")],
    ),
    "ViT": (_vit, 1, {"map_": None}, [("fp32", "tensorrt"), ("fp16", "tensorrt")]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_goes_the_whole_way(tmp_path, name):
    """Random weights: to bundles, through TensorRT-RTX's builder where it is, and a bench."""
    make, channels, tables, forms = STRANGERS[name]
    names = ("heat",) if tables.get("logits", "") is None else ("out",)
    path = _onnx(_random(make), tmp_path / "m.onnx", channels, names, (64, 64))
    card = _card(tmp_path / "c.toml", **tables)
    for precision, target in forms:
        source = source_from_onnx(path, card)
        bundle = pipeline.export(source, ExportOptions(precision, target, tmp_path), Steps())
        assert bundle.manifest.parity.verdict == "pass"
        if target == "tensorrt":
            assert _built_ahead_of_time(bundle, tmp_path) in (ExitCode.OK, None)
    asked = [str(tmp_path / f"stranger-{forms[0][0]}.cxrgaze"), "--output", str(tmp_path / "b")]
    asked += ["--device", "onnxruntime", "--samples", "20", "--cold-starts", "1", "--seconds", "5"]
    code = bench.main(["run", *asked, "--after-idle", "1", "--warmup", "2", "--threads", "1"])
    assert code in (ExitCode.OK, ExitCode.INCONCLUSIVE)  # a busy machine never settles
    assert (tmp_path / "b" / "report.html").is_file()
