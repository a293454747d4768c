"""ONNX Runtime as a backend: what it runs and what it refuses, on a graph of three nodes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from cxrgaze.bundles.bundle import GRAPH, fill_bundle
from cxrgaze.bundles.manifest import Manifest, Provenance
from cxrgaze.bundles.verdicts import Gate, OutputParity, Parity
from cxrgaze.errors import (
    CxrgazeError,
    ExitCode,
    IncompatibleError,
    IntegrityError,
    OutOfMemoryError,
)
from cxrgaze.runtime import ort
from cxrgaze.runtime.backend import BackendOptions
from cxrgaze.runtime.backends import choose
from cxrgaze.spec import HEADS, SPEC_KEY, DiseaseClass, ModelSpec

SPEC = ModelSpec(
    variant="tiny",
    model_version="1",
    classes=(DiseaseClass(name="bright", display="Bright"),),
    class_kind="findings",
    height=32,
    width=64,
    pixel_source="image-8bit",
    domain="none",
)
STORED = SPEC.model_dump_json()
LIMITS = dict.fromkeys(SPEC.heads, 1.0)
SAME = OutputParity(max=0, p99=0, cosine=1)
MANIFEST = Manifest(
    name="tiny",
    spec=SPEC,
    precision="fp32",
    target="cpu",
    opset=18,
    ir_version=10,
    float32_nodes=3,
    self_test={"float32": LIMITS},
    parity=Parity(
        verdict="pass",
        films=0,
        domain="",
        limits=LIMITS,
        outputs=dict.fromkeys(SPEC.heads, SAME),
        agreement_cc_min=1,
        agreement_cc_mean=1,
        worst_film=0,
        flips=0,
        peak_activation=1,
        witness="",
    ),
    gate=Gate(verdict="not_gated", reason="a stand-in"),
    provenance=Provenance(
        checkpoint="",
        checkpoint_sha256="0" * 64,
        trained_on="nothing",
        created_utc="",
        versions={},
    ),
)
PIXELS = np.random.default_rng(0).random((3, 1, 32, 64), dtype=np.float32)


def _graph(
    *,
    name="image",
    canvas=(1, 32, 64),
    stored=STORED,
    pooling="GlobalAveragePool",
    kind=TensorProto.FLOAT,
    ir_version=10,
    heads=SPEC.heads,
):
    """The logit is the mean of the canvas, the log-density is the canvas itself."""
    shapes = {name: canvas, "logits": canvas[:1], "log_density": canvas, "mean": (canvas[0], 1, 1)}
    ends = [helper.make_tensor_value_info(n, kind, ["N", *shapes[n]]) for n in (name, *heads)]
    nodes = [
        helper.make_node(pooling, [name], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
        helper.make_node("Identity", [name], ["log_density"]),
    ]
    opset = helper.make_opsetid("", 18)
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[opset], ir_version=ir_version)
    if stored is not None:
        onnx.helper.set_model_props(model, {SPEC_KEY: stored})
    return model.SerializeToString()


def _bundle(folder, graph=None, spec=SPEC):
    of = {head: SAME for head in spec.heads}
    limits = dict.fromkeys(spec.heads, 1.0)
    parity = MANIFEST.parity.model_copy(update={"outputs": of, "limits": limits})
    update = {"spec": spec, "parity": parity, "self_test": {"float32": limits}}
    manifest = MANIFEST.model_copy(update=update)
    return fill_bundle(folder, manifest, {GRAPH: _graph() if graph is None else graph})


def _other(**changes):
    return ModelSpec(
        **{**{name: getattr(SPEC, name) for name in ModelSpec.model_fields}, **changes}
    )


def test_both_heads_of_any_number_of_films_come_in_their_order(tmp_path):
    backend = ort.OnnxRuntime()
    backend.activate(_bundle(tmp_path))
    for n in (1, 3):
        outputs = backend.infer(PIXELS[:n])
        assert list(outputs) == ["logits", "log_density"]
        assert np.allclose(outputs["logits"], PIXELS[:n].mean(axis=(2, 3)), atol=1e-6)
        assert np.array_equal(outputs["log_density"], PIXELS[:n])


@pytest.mark.parametrize("change", [{"heads": ("logits",)}, {"heads": HEADS[1:], "classes": ()}])
def test_one_head_comes_alone(tmp_path, change):
    spec, whole = _other(**change), ort.witness(_graph())(PIXELS)
    graph = _graph(heads=spec.heads, stored=spec.model_dump_json())
    backend = ort.OnnxRuntime()
    backend.activate(_bundle(tmp_path, graph, spec))
    (head,) = spec.heads
    outputs = backend.infer(PIXELS)
    assert list(outputs) == [head] and np.array_equal(outputs[head], whole[head])


@pytest.mark.parametrize(
    "heads",
    [("logits",), ("log_density",), ("logits", "mean"), ("logits", "log_density", "mean")],
)
def test_a_graph_that_gives_other_outputs_than_its_spec_says_is_refused(tmp_path, heads):
    with pytest.raises(IntegrityError, match=r"gives .* expected .*'log_density': \[1, 32, 64\]"):
        ort.OnnxRuntime().activate(_bundle(tmp_path, _graph(heads=heads)))


def test_a_graph_with_another_number_of_classes_than_its_spec_says_is_refused(tmp_path):
    spec = _other(classes=(*SPEC.classes, DiseaseClass(name="dark", display="Dark")))
    graph = _graph(stored=spec.model_dump_json())
    with pytest.raises(IntegrityError, match=r"'logits': \[1\].* expected .*'logits': \[2\]"):
        ort.OnnxRuntime().activate(_bundle(tmp_path, graph, spec))


def test_there_is_nothing_to_infer_with_before_activate_and_after_deactivate(tmp_path):
    backend = ort.OnnxRuntime()
    with pytest.raises(RuntimeError, match="infer before activate"):
        backend.infer(PIXELS)
    backend.activate(_bundle(tmp_path))
    backend.deactivate()
    backend.deactivate()
    with pytest.raises(RuntimeError, match="infer before activate"):
        backend.infer(PIXELS)


@pytest.mark.parametrize(
    "stored", [None, SPEC.model_copy(update={"model_version": "2"}).model_dump_json()]
)
def test_a_graph_of_another_model_spec_is_refused(tmp_path, stored):
    with pytest.raises(IntegrityError, match="its ModelSpec is not the manifest's"):
        ort.OnnxRuntime().activate(_bundle(tmp_path, _graph(stored=stored)))


@pytest.mark.parametrize(
    "other",
    [
        {"name": "picture"},
        {"canvas": (3, 32, 64)},
        {"canvas": (1, 64, 32)},
        {"canvas": (1, 32, "W")},
        {"canvas": (1, 32, 64, 1)},
    ],
)
def test_a_graph_that_takes_another_image_than_its_spec_says_is_refused(tmp_path, other):
    with pytest.raises(IntegrityError, match=r"takes .* expected image \(N, 1, 32, 64\)"):
        ort.OnnxRuntime().activate(_bundle(tmp_path, _graph(**other)))


@pytest.mark.parametrize(
    ("graph", "wrong"),
    [
        (b"no graph", "not an ONNX graph"),
        (b"", "not an ONNX graph"),
        (_graph(pooling="NoSuchOperator"), "its operator NoSuchOperator is not one"),
    ],
)
def test_what_is_no_graph_is_an_integrity_error(tmp_path, graph, wrong):
    with pytest.raises(IntegrityError, match=wrong):
        ort.OnnxRuntime().activate(_bundle(tmp_path, graph))


@pytest.mark.parametrize(
    "beyond",
    [{"ir_version": 99}, {"kind": TensorProto.BFLOAT16, "pooling": "Erf"}],
    ids=["a format of the future", "an operator without an implementation"],
)
def test_a_graph_beyond_this_onnx_runtime_is_incompatible(tmp_path, beyond):
    with pytest.raises(IncompatibleError, match=f"ONNX Runtime {ort.onnxruntime.__version__}"):
        ort.OnnxRuntime().activate(_bundle(tmp_path, _graph(**beyond)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_threads_that_load_asks_for_are_those_that_run(tmp_path, threads):
    """The caller's own is one of them."""
    bundle = _bundle(tmp_path)
    backend = choose(bundle, "onnxruntime", BackendOptions(threads=threads)).backend
    before = len(list(Path("/proc/self/task").iterdir()))
    backend.activate(bundle)
    assert len(list(Path("/proc/self/task").iterdir())) - before == threads - 1


def test_a_session_has_the_options_that_it_was_asked_for():
    key = "session.intra_op.allow_spinning"
    plain = ort.open_session(_graph(), 3).get_session_options()
    assert plain.intra_op_num_threads == 3
    with pytest.raises(RuntimeError, match="does not have"):
        plain.get_session_config_entry(key)
    asked = ort.open_session(_graph(), spinning=False, optimized=False).get_session_options()
    assert asked.intra_op_num_threads == 0 and asked.get_session_config_entry(key) == "0"
    assert asked.graph_optimization_level != plain.graph_optimization_level


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_float16_graphs_are_computed_in_float32(precision):
    manifest = MANIFEST.model_copy(update={"precision": precision})
    expected = "int8" if precision == "int8" else "float32"
    assert ort.OnnxRuntime().arithmetic(manifest) == expected


NAMES = [
    name
    for name, kind in vars(onnxruntime.capi.onnxruntime_pybind11_state).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("when", ["load", "infer"])
def test_every_error_of_onnx_runtime_is_one_of_ours(monkeypatch, tmp_path, name, when):
    """B8: 4 of its 15 classes were mapped, and in one place."""
    kind = getattr(onnxruntime.capi.onnxruntime_pybind11_state, name)

    class Failing:
        def __init__(self, *anything, **more):
            if when == "load":
                raise kind("a fault")

        def get_outputs(self):
            return []

        def run(self, *anything):
            raise kind("a fault")

    monkeypatch.setattr(ort.onnxruntime, "InferenceSession", Failing)
    with pytest.raises(CxrgazeError, match="a fault") as caught:
        session = ort.open_session(_graph())
        ort.heads_of(session)(np.zeros((1, 1, 32, 64), np.float32))
    malformed = name in ("InvalidProtobuf", "InvalidGraph", "NoModel")
    assert isinstance(caught.value, IntegrityError if malformed else IncompatibleError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException("std::bad_alloc"),
        onnxruntime.capi.onnxruntime_pybind11_state.Fail("Failed to allocate memory for 9 GB"),
    ],
)
def test_no_room_is_exit_code_10(error):
    class Full:
        def get_outputs(self):
            return []

        def run(self, *anything):
            raise error

    with pytest.raises(OutOfMemoryError) as caught:
        ort.heads_of(Full())(np.zeros((1, 1, 32, 64), np.float32))
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY


def test_threads_are_those_of_the_container(monkeypatch):
    """B9: ONNX Runtime knows no quota."""
    for confined, expected in ((True, 3), (False, 0)):
        monkeypatch.setattr(ort, "is_confined", lambda confined=confined: confined)
        monkeypatch.setattr(ort, "cpu_count", lambda: 3)
        session = ort.open_session(_graph())
        assert session.get_session_options().intra_op_num_threads == expected
