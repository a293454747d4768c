"""Exact rewrites: the same function, what they save, and that a wrong one is seen."""

from __future__ import annotations

import copy
from dataclasses import replace

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cxrgaze.errors import ExitCode, UsageError
from cxrgaze.export import fp16, from_torch, graph, parity
from cxrgaze.export.canvases import phantom_canvases
from cxrgaze.export.network_source import source_from_random
from cxrgaze.export.source import served_of
from cxrgaze.export.targets import TARGETS
from cxrgaze.runtime import trt_library
from cxrgaze.spec import HEADS, IMAGE
from cxrgaze.train import rewrites
from cxrgaze.train.model import VARIANTS, Network, spec_of

EVERY = tuple(rewrites.REWRITES)
EACH_AND_ALL = [*((name,) for name in EVERY), EVERY]
EXACT = 1e-10


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _randomised(module, seed=0):
    """Float64; nothing is 0, 1 or the same twice; BatchNorm's scales have both signs."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.double().eval().modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.bias.data, part.running_mean):
                tensor.normal_(generator=generator)
            part.running_var.uniform_(0.2, 3.0, generator=generator)
            part.eps = 1e-3
        elif isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, generator=generator)
            if part.bias is not None:
                part.bias.data.normal_(generator=generator)
    return module


@pytest.fixture(scope="module")
def network():
    return _randomised(Network(VARIANTS["tiny"].model_copy(update={"centre_prior": True}), 3))


@pytest.fixture(scope="module")
def tiny():
    """As it is exported: float32, calibrated random weights."""
    return source_from_random("tiny", 0)


def _images(n, height, width):
    generator = torch.Generator().manual_seed(height * width + n)
    return torch.rand(n, 1, height, width, dtype=torch.float64, generator=generator)


def _difference(network, other, images):
    """Largest difference of an output, beside that output's largest value."""
    with torch.inference_mode():
        one, two = network(images), other(images)
    assert one.keys() == two.keys()
    return max(float((a - two[head]).abs().max() / a.abs().max()) for head, a in one.items())


@settings(max_examples=20, deadline=None)
@given(
    names=st.sampled_from(EACH_AND_ALL),
    batch=st.integers(1, 3),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
)
def test_the_function_is_the_same(network, names, batch, height, width):
    """The smallest map is 1 to 3 pixels high and wide, odd and even, square and not."""
    images = _images(batch, 32 * height, 32 * width)
    assert _difference(network, rewrites.rewritten(network, names), images) < EXACT


@pytest.mark.parametrize("seed", [1, 2])
def test_the_function_is_the_same_for_other_weights(seed):
    network = _randomised(Network(VARIANTS["tiny"], 3), seed)
    assert _difference(network, rewrites.rewritten(network, EVERY), _images(2, 96, 64)) < EXACT


@pytest.mark.parametrize("head", HEADS)
def test_a_network_of_one_head_has_the_rewrites_of_its_parts(head):
    network = _randomised(Network(VARIANTS["tiny"], 3, [head]))
    names = [*rewrites.rewrites_of(_spec("tiny", heads=[head]))]
    assert names == {"logits": ["stem"], "log_density": [*EVERY]}[head]
    assert _difference(network, rewrites.rewritten(network, names), _images(2, 96, 64)) < EXACT


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2), (5, 7)])
def test_borders_of_the_upsampled_map_are_exact(network, size):
    """Each border and each corner for itself, on a map that is large at its border."""
    other = rewrites.rewritten(network, ["upsample"])
    generator = torch.Generator().manual_seed(size[0])
    for level in range(5):
        step, changed = network.decoder[level], other.decoder[level]
        channels = step.up[1].in_channels
        x = torch.randn(2, channels, *size, dtype=torch.float64, generator=generator)
        for border in (x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]):
            border.mul_(100)
        with torch.inference_mode():
            want, got = step.up(x), changed.up(x)
        assert want.shape == got.shape == (2, step.up[1].out_channels, 2 * size[0], 2 * size[1])
        error = (want - got).abs() / want.abs().max()
        for part in (error[:, :, 0], error[:, :, -1], error[..., 0], error[..., -1]):
            assert float(part.max()) < EXACT
        assert float(error.max()) < EXACT and float(want.max()) > 1


def _up(change):
    def everywhere(network):
        for step in network.decoder:
            change(step.up)

    return everywhere


def _skip(change):
    def everywhere(network):
        for block in network.skips:
            change(block)

    return everywhere


def _zero_a_border_tap(up):
    """One of sixteen: the tap of the first row of the first phase."""
    up[0].weight.data[0, :, 0, 0] = 0


def _repeat_the_border(up):
    up[0].padding_mode = "replicate"


def _one_row_off(up):
    up.register_forward_hook(lambda *call: call[-1].roll(-1, dims=2))


def _swap_rows_and_columns(up):
    weight = up[0].weight.data
    weight.copy_(weight.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2))


def _swap_halves(block):
    block.joined.weight.data = block.joined.weight.data.roll(block.joined.out_channels // 2, 0)


def _rectify_both(block):
    block.joined.register_forward_hook(lambda *call: call[-1].relu())


def _rectify_none(block):
    block.main[0] = nn.Identity()


def _shift_twice(block):
    block.joined.bias.data[0] *= 2


def _mean_instead_of_sum(network):
    network.dense.features.conv0.weight.data /= 3


WRONG = {
    "a tap is missing": ("upsample", _up(_zero_a_border_tap)),
    "the border is repeated": ("upsample", _up(_repeat_the_border)),
    "the map is one row off": ("upsample", _up(_one_row_off)),
    "phases are transposed": ("upsample", _up(_swap_rows_and_columns)),
    "halves are swapped": ("shortcut", _skip(_swap_halves)),
    "the shortcut is rectified": ("shortcut", _skip(_rectify_both)),
    "nothing is rectified": ("shortcut", _skip(_rectify_none)),
    "BatchNorm's shift is wrong": ("shortcut", _skip(_shift_twice)),
    "channels are averaged": ("stem", _mean_instead_of_sum),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rewrite_is_seen(network, name):
    rewrite, spoil = WRONG[name]
    other = rewrites.rewritten(network, [rewrite])
    assert _difference(network, other, _images(1, 64, 96)) < EXACT
    spoil(other)
    assert _difference(network, other, _images(1, 64, 96)) > 1e6 * EXACT


def test_repeating_the_border_is_wrong_at_the_border_only(network):
    """So the test of the borders sees what no test of the interior can."""
    up, other = network.decoder[1].up, rewrites.rewritten(network, ["upsample"]).decoder[1].up
    _repeat_the_border(other)
    x = torch.randn(1, up[1].in_channels, 5, 6, dtype=torch.float64)
    with torch.inference_mode():
        error = (up(x) - other(x)).abs()
    assert float(error[:, :, 1:-1, 1:-1].max()) < EXACT
    for border in (error[:, :, 0], error[:, :, -1], error[..., 0], error[..., -1]):
        assert float(border.max()) > 1e-3


@pytest.mark.parametrize("names", EACH_AND_ALL, ids="+".join)
def test_the_original_is_not_changed(tiny, names):
    network = copy.deepcopy(tiny.module).train()
    modules = [(name, id(module), module.training) for name, module in network.named_modules()]
    values = {name: value.clone() for name, value in network.state_dict().items()}
    random_state = torch.get_rng_state()
    other = rewrites.rewritten(network, names)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(other, Network) and not any(m.training for m in other.modules())
    with torch.no_grad():
        for value in (*other.parameters(), *other.buffers()):
            value.zero_()
    assert modules == [(n, id(m), m.training) for n, m in network.named_modules()]
    now = network.state_dict()
    assert list(now) == list(values)
    assert all(torch.equal(now[name], value) for name, value in values.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_stays(network, dtype):
    other = rewrites.rewritten(copy.deepcopy(network).to(dtype), EVERY)
    assert {p.dtype for p in other.parameters()} == {dtype}


def test_an_unknown_name_is_a_usage_error(tiny):
    for call in (
        lambda: rewrites.rewritten(tiny.module, ["stem", "stern"]),
        lambda: rewrites.saved_macs(tiny.module, tiny.spec, ["stern"]),
    ):
        with pytest.raises(
            UsageError, match="no rewrite is called stern; there are stem, ups"
        ) as e:
            call()
        assert e.value.exit_code == ExitCode.USAGE


def test_what_was_rewritten_is_not_rewritten_again(network):
    other = rewrites.rewritten(network, ["shortcut"])
    with pytest.raises(TypeError, match=r"skips\.0 is a JoinedResidualSE, expected a ResidualSE"):
        rewrites.rewritten(other, ["shortcut"])


def test_targets_name_rewrites_that_exist():
    assert TARGETS["tensorrt"].rewrites == ("stem",)
    assert TARGETS["cpu"].rewrites == ("stem", "upsample")
    assert set(TARGETS["cpu"].rewrites) <= set(EVERY)


def _spec(variant, canvas=None, **more):
    return spec_of(
        variant, model_version="0", pixel_source="image-8bit", domain="none", canvas=canvas, **more
    )


@pytest.fixture(scope="module")
def exported(tiny):
    """Graphs of the rewritten network as the exporter writes them, each made once."""
    made = {}

    def export(*names, canvas=(64, 64)):
        if (names, canvas) not in made:
            network = rewrites.rewritten(tiny.module, names)
            made[names, canvas] = from_torch.onnx_from_module(network, _spec("tiny", canvas))
        return made[names, canvas]

    return export


@pytest.mark.parametrize(
    ("canvas", "sets"), [((64, 64), EACH_AND_ALL), ((32, 96), [EVERY])], ids=["own", "wide"]
)
def test_saved_macs_are_those_that_onnx_counts(tiny, exported, canvas, sets):
    before = graph.convolution_macs(exported(canvas=canvas))["fp32"]
    for names in sets:
        after = graph.convolution_macs(exported(*names, canvas=canvas))["fp32"]
        saved = rewrites.saved_macs(tiny.module, _spec("tiny", canvas), names)
        assert before - after == saved
        assert saved > 0 or names == ("shortcut",)


def _macs_by_hooks(network, height, width):
    """Multiply-accumulates of one film, from shapes without data."""
    counted = []

    def count(conv, _, output):
        counted.append(output.numel() * conv.weight[0].numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(torch.empty(1, 1, height, width, device="meta"))
    return sum(counted)


@pytest.mark.parametrize(
    ("variant", "stem", "upsample"),
    [
        ("paper", 513_802_240, 22_181_904_384),
        ("edge", 64_225_280, 318_885_888),
        ("tiny", 1_605_632, 2_387_968),
    ],
)
def test_saved_macs_of_the_variants(variant, stem, upsample):
    sizes = VARIANTS[variant]
    canvas = sizes.height, sizes.width
    with torch.device("meta"):
        network = Network(sizes, 3).eval()
    other = rewrites.rewritten(network, EVERY)
    saved = [rewrites.saved_macs(network, _spec(variant), [name]) for name in EVERY]
    assert saved == [stem, upsample, 0]
    assert _macs_by_hooks(network, *canvas) - _macs_by_hooks(other, *canvas) == sum(saved)


def _run(data, images):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return dict(zip(HEADS, session.run(list(HEADS), {IMAGE: images}), strict=True))


@pytest.mark.parametrize("names", EACH_AND_ALL, ids="+".join)
@pytest.mark.parametrize("simplify", [False, True], ids=["exported", "simplified"])
def test_the_graph_in_onnx_runtime_is_the_network_as_trained(tiny, exported, names, simplify):
    model = exported(*names)
    data = graph.finished(graph.simplified(model) if simplify else model, tiny.spec)
    for batch in (1, 3):
        images = phantom_canvases(tiny.spec, batch, 10)
        with torch.inference_mode():
            want = tiny.module(torch.from_numpy(images))
        for head, found in _run(data, images).items():
            assert abs(found - want[head].numpy()).max() < 5e-5


def test_the_simplified_graph_has_what_was_meant(exported):
    """Fixed shapes but for the batch, and names by module path, which later steps select by."""
    model = graph.simplified(exported(*EVERY)).graph
    nodes = {node.name: node for node in model.node}
    operators = {node.op_type for node in model.node}
    assert not operators & {"Shape", "Gather", "Expand", "Resize", "Pad", "ScatterND", "Identity"}
    weights = {w.name: tuple(w.dims) for w in model.initializer}
    assert weights["decoder.0.up.1.weight"] == (4 * 40, 47, 2, 2)
    assert weights["skips.4.joined.weight"] == (2 * 64, 40, 3, 3)
    assert weights["saliency.3.weight"] == (1, 8, 1, 1)
    assert weights[nodes["/dense/conv0/Conv"].input[1]] == (16, 1, 7, 7)
    for name in ("/decoder.4/up/up.1/Conv", "/skips.0/joined/Conv", "/skips.0/main/main.3/Conv"):
        assert nodes[name].op_type == "Conv"
    # ReLU right after its convolution, where runtimes fuse the two.
    assert nodes["/decoder.4/up/up.3/Relu"].input[0] == nodes["/decoder.4/up/up.1/Conv"].output[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity_hooks_the_rewritten_network_and_passes(tiny, exported, precision):
    model = graph.simplified(exported(*EVERY))
    data = graph.finished(fp16.to_fp16(model) if precision == "fp16" else model, tiny.spec)
    images = phantom_canvases(tiny.spec, 4, 10)
    for network in (tiny.module, rewrites.rewritten(tiny.module, EVERY)):
        answers = replace(tiny, module=network).answers(images)
        found = parity.compare(answers, data, precision, "test", served_of(tiny))
        assert found.verdict == "pass" and found.peak_activation > 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_builds_the_graph_ahead_of_time(tiny, exported, precision):
    """Accepted and built without a GPU, batch 1 to 4; not run."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    library = trt_library.find("tensorrt_rtx")
    model = graph.simplified(exported(*EVERY))
    data = graph.finished(fp16.to_fp16(model) if precision == "fp16" else model, tiny.spec)
    log = library.logger()
    builder = trt.Builder(log)
    network = builder.create_network(library.network_flags)
    assert trt.OnnxParser(network, log).parse(data), library.said(log)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(IMAGE, *((n, 1, 64, 64) for n in (1, 2, 4)))
    config.add_optimization_profile(profile)
    library.target(config, ("86",))
    assert builder.build_serialized_network(network, config) is not None, library.said(log)
