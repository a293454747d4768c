"""OpenVINO as a backend: what it serves and refuses, in what precision, and when it is chosen."""

from __future__ import annotations

import os
import threading
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import onnx
import pytest

import cxrgaze
from cxrgaze.bundles.bundle import GRAPH, Bundle, fill_bundle
from cxrgaze.bundles.verdicts import Gate
from cxrgaze.engines import build, precision
from cxrgaze.engines.prove import promised
from cxrgaze.errors import (
    ExitCode,
    GateError,
    IncompatibleError,
    IntegrityError,
    UsageError,
)
from cxrgaze.evidence import gate, metrics
from cxrgaze.export import cli as export_cli
from cxrgaze.runtime import backends, cli, host, ov, plans, proofs, trt_library
from cxrgaze.runtime.backend import BackendOptions
from cxrgaze.runtime.ort import OnnxRuntime, witness
from cxrgaze.runtime.reader import Reader
from cxrgaze.runtime.trt import TensorRT

pytest.importorskip("openvino", reason="needs the extra 'openvino'")
FILM = "nih_00001507_002_512.png"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CXRGAZE_CACHE", str(folder))
    return plans.Cache(folder)


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """The demo network in int8 for OpenVINO, not gated."""
    folder = tmp_path_factory.mktemp("int8")
    command = ["--precision", "int8", "--target", "openvino", "--no-gate"]
    assert export_cli.main([*command, "--output", str(folder)]) == 0
    return folder / "demo-int8-openvino.cxrgaze"


def _path(bundles, int8, name):
    return int8 if name == "int8" else bundles / f"demo-{name}.cxrgaze"


def _inputs(bundle, **changes):
    found = proofs.inputs_here(bundle.sha256, "openvino", version("openvino"), "CPU")
    return found.model_copy(update=changes)


def _proof(bundle, verdict="pass", **changes):
    """A proof of a bundle on this machine, with a verdict of ours."""
    return proofs.ProofRecord(
        bundle_name=bundle.manifest.name,
        inputs=_inputs(bundle, **changes),
        built_precision="proven",
        built_precision_why="",
        engine=plans.BuiltEngine(
            layers=0,
            layers_by_type={},
            weight_bytes_by_type={},
            convolution_macs_by_type={},
            device_memory_bytes=0,
        ),
        gate=Gate(level="engine", verdict=verdict, reason="of a test") if verdict else None,
        created_utc="",
    )


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_it_reads_what_onnx_runtime_reads_on_the_same_file(bundles, int8, films, name):
    bundle = Bundle.open(_path(bundles, int8, name))
    images = gate.phantom_set(bundle.manifest.spec, 24, 6_000_000).arrays.images
    served, infer = bundle.manifest.served, witness(bundle.read(GRAPH))
    with cxrgaze.load(bundle.path, "openvino") as reader:
        ours = gate.predicted(reader.backend.infer, images)
        reading = reader.read(films / FILM)
    theirs = gate.predicted(infer, images)
    lowest = 0.998 if name == "int8" else 0.99999  # a map of 64 x 64 shows a level of one layer
    for one, other in zip(ours["log_density"], theirs["log_density"], strict=True):
        assert metrics.cc(np.exp(one.astype(float)), np.exp(other.astype(float))) > lowest
    decided = (served.decisions(served.probabilities(p["logits"])) for p in (ours, theirs))
    assert (next(decided) != next(decided)).any(axis=1).sum() <= 1
    assert (
        np.abs(ours["logits"] - theirs["logits"]).max()
        < {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.1}[name]
    )
    assert reading.model["backend"] == "openvino" and reading.model["device"] == "cpu"
    assert reading.model["library"] == f"openvino {version('openvino')}"
    assert (reading.model["gate"], reading.model["gate_level"]) == ("not_gated", "engine")
    assert any("not proven here" in warning for warning in reading.warnings)


def test_what_was_built_has_the_work_that_the_manifest_counts(bundles, int8):
    """u8 convolutions of the runtime model, by their multiply-accumulates, to the last one."""
    for name in ("fp32", "fp16", "int8"):
        manifest = Bundle.open(_path(bundles, int8, name)).manifest
        with cxrgaze.load(_path(bundles, int8, name), "openvino") as reader:
            built = reader.backend.built
        asked, work = promised(manifest)
        assert built.convolution_macs_by_type == {k: n for k, n in work.items() if n}
        assert precision.judge(asked, work, built).verdict == "proven"
        if name == "int8":
            as_promised = promised(manifest)
        else:
            floats = built
    assert precision.judge(*as_promised, floats).verdict == "contradicted"


def _said(**other):
    """What OpenVINO says of a compiled model, as recorded, with changes."""
    built = plans.BuiltEngine(
        layers=90,
        layers_by_type={"int8": 80, "fp32": 10},
        weight_bytes_by_type={},
        convolution_macs_by_type=other.pop("macs", {"int8": 90, "fp32": 10}),
        device_memory_bytes=0,
    )
    return {"device": "CPU", "devices": ["CPU"], "precision": "f32", "built": built, **other}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"devices": ["GPU.0"]}, r"asked for CPU and runs on \['GPU.0'\]"),
        ({"devices": ["CPU", "GPU.0"]}, "asked for CPU"),
        ({"device": "GPU"}, "asked for GPU"),
        ({"precision": "bf16"}, "says bf16"),  # its silent default with AVX512-BF16, recorded there
        ({"precision": "f16"}, "says f16"),
        ({"macs": {"int8": 90, "bf16": 10}}, "in bf16, int8"),
        ({"macs": {"fp16": 1}}, "in fp16"),
    ],
)
def test_another_device_and_another_precision_are_refused(other, said):
    with pytest.raises(IncompatibleError, match=said):
        ov.require_asked(**_said(**other))


def test_what_was_asked_for_is_not_refused():
    ov.require_asked(**_said())
    ov.require_asked(**_said(device="GPU", devices=["GPU.0"]))
    ov.require_asked(**_said(precision="float32"))


def test_a_silent_bfloat16_is_refused_where_the_processor_has_it(bundles, monkeypatch):
    import openvino

    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in able:
        pytest.skip(f"this processor has no bfloat16, it has {able}")
    monkeypatch.setitem(ov._ASKED, "INFERENCE_PRECISION_HINT", "bf16")
    with pytest.raises(IncompatibleError, match="asked for float32"):
        cxrgaze.load(bundles / "demo-fp32.cxrgaze", "openvino")


def test_int8_of_other_targets_is_refused_before_openvino_sees_it(int8, monkeypatch):
    """The form for ONNX Runtime crashes it."""
    opened = Bundle.open(int8)
    monkeypatch.setattr(ov, "_library", lambda: pytest.fail("imported"))
    for target in ("cpu", "tensorrt"):
        manifest = opened.manifest.model_copy(update={"target": target})
        other = Bundle(opened.path, manifest, opened.sha256)
        with pytest.raises(IncompatibleError, match=f"does not serve int8 graphs for .* {target}"):
            backends.choose(other, "openvino", BackendOptions())


@pytest.mark.parametrize("target", ["openvino", "cpu"])
def test_int8_for_processors_has_no_plan(int8, monkeypatch, capsys, target):
    """No export of it builds one beside a GPU, no build begins, no reading names a TensorRT."""
    opened = Bundle.open(int8)
    manifest = opened.manifest.model_copy(update={"target": target})
    bundle = Bundle(opened.path, manifest, opened.sha256)
    monkeypatch.setattr(trt_library, "beside_a_gpu", lambda: pytest.fail("looked for a GPU"))
    export_cli._build(bundle, wanted=True)
    said = capsys.readouterr().out
    assert "plan" not in said and ("--device openvino --gate SET" in said) == (target == "openvino")
    with pytest.raises(IncompatibleError, match=f"int8 for target {target}, which TensorRT does"):
        build.build(bundle, None, build.BuildOptions(), plans.Cache())
    monkeypatch.setattr(backends, "find_spec", lambda name: True)  # both TensorRTs are installed
    assert backends.choose(bundle, "auto", BackendOptions()).warnings == ()


def test_others_do_not_serve_int8_for_openvino():
    for backend in (OnnxRuntime, TensorRT):
        assert "openvino" not in backend.serves["int8"]
        assert "openvino" in backend.serves["fp16"]


def test_where_it_is_not_installed_the_extra_is_named(int8, films, monkeypatch, capsys):
    def nowhere(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(backends, "version", nowhere)
    for device in ("auto", "openvino"):
        command = [str(int8), str(films / FILM), "--device", device]
        assert cli.main(command) == ExitCode.INCOMPATIBLE
        assert "extra 'openvino'" in capsys.readouterr().err


@pytest.mark.parametrize("verdict", ["pass", "inconclusive", "fail", None])
@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_auto_takes_it_for_its_own_int8_and_else_by_a_proof_that_passed(
    bundles, int8, cache, name, verdict
):
    """That a package was installed changes no number."""
    bundle = Bundle.open(_path(bundles, int8, name))
    proofs.store(cache, _proof(bundle, verdict))
    if name == "int8" and verdict == "fail":
        with pytest.raises(IncompatibleError, match="on this processor: fail, of a test"):
            backends.choose(bundle, "auto", BackendOptions())
        return
    chosen = backends.choose(bundle, "auto", BackendOptions()).backend
    is_it = name == "int8" or verdict == "pass"
    assert chosen.name == ("openvino" if is_it else "onnxruntime")
    if is_it:
        assert chosen.gate.level == "engine" and chosen.gate.verdict == (verdict or "not_gated")
        assert chosen.identity["proof"] == _proof(bundle).inputs.key


@pytest.mark.parametrize(
    "changes",
    [
        {"library_version": "2025.0.0"},
        {"processor": "another"},
        {"features": ("avx2", "avx512_vnni")},
        {"device": "GPU"},
        {"bundle_sha256": "0" * 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_proof_of_something_else_is_none(bundles, cache, changes):
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    proofs.store(cache, _proof(bundle, **changes))
    assert backends.choose(bundle, "auto", BackendOptions()).backend.name == "onnxruntime"


def test_a_plan_that_did_not_pass_goes_first_and_the_proof_is_named(bundles, cache, monkeypatch):
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    proofs.store(cache, _proof(bundle))

    class Plan(OnnxRuntime):
        name = "tensorrt"
        gate = Gate(level="engine", verdict="not_gated", reason="")

    entry = backends.BACKENDS["tensorrt"]._replace(
        open=lambda bundle, options: Plan(), is_here=lambda bundle, options: True
    )
    monkeypatch.setitem(backends.BACKENDS, "tensorrt", entry)
    choice = backends.choose(bundle, "auto", BackendOptions())
    assert choice.backend.name == "tensorrt"
    assert choice.warnings[-1].startswith(
        "openvino passed its gate with this bundle here, tensorrt"
    )
    Plan.gate = Gate(level="engine", verdict="pass", reason="")
    assert not any(
        "openvino passed" in w for w in backends.choose(bundle, "auto", BackendOptions())[1]
    )


def test_require_pass_is_about_its_own_verdict(bundles, cache):
    path = bundles / "demo-fp16.cxrgaze"
    with pytest.raises(GateError, match="openvino: gate not_gated at engine level"):
        cxrgaze.load(path, "openvino", require="pass")
    proofs.store(cache, _proof(Bundle.open(path)))
    with cxrgaze.load(path, "openvino", require="pass") as reader:
        assert reader.backend.gate.verdict == "pass"


def test_a_proof_that_was_altered_is_refused_by_name_and_passed_over_by_auto(bundles, cache):
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    record = _proof(bundle)
    proofs.store(cache, record)
    path = cache.folder / f"{record.inputs.key}{proofs.SUFFIX}"
    for content in (b"{}", b"garbage", _proof(bundle, device="GPU").rendered()):
        path.write_bytes(content)
        with pytest.raises(IntegrityError):
            cxrgaze.load(bundle.path, "openvino")
        assert backends.choose(bundle, "auto", BackendOptions()).backend.name == "onnxruntime"
    path.unlink()
    path.symlink_to(os.devnull)
    with pytest.raises(IntegrityError, match="link"):
        cxrgaze.load(bundle.path, "openvino")


def test_a_cache_that_others_can_write_is_refused(bundles, cache):
    cache.make()
    cache.folder.chmod(0o777)
    with pytest.raises(IntegrityError, match="can be written by others"):
        cxrgaze.load(bundles / "demo-fp16.cxrgaze", "openvino")


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_batch_and_threads_get_what_one_film_gets(bundles, at_once):
    path = bundles / "demo-fp16.cxrgaze"
    with cxrgaze.load(path, "openvino", at_once=at_once, threads=2) as reader:
        spec = reader.bundle.manifest.spec
        images = gate.phantom_set(spec, 12, 6_100_000).arrays.images
        single = [reader.backend.infer(image[None]) for image in images]
        batch = reader.backend.infer(images)
        found = {}

        def work(number):
            for index in range(number, len(images), 3):
                found[index] = reader.backend.infer(images[index][None])

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for head in spec.heads:
        assert batch[head].dtype == np.float32 and len(batch[head]) == len(images)
        for index, one in enumerate(single):
            np.testing.assert_allclose(batch[head][index], one[head][0], atol=1e-5)
            np.testing.assert_allclose(found[index][head], one[head], atol=1e-5)
    with pytest.raises(RuntimeError, match="before activate"):
        reader.backend.infer(images)


def _with_graph(folder, bundle, graph, **changes):
    files = {r.path: bundle.read(r.path) for r in bundle.manifest.files} | {GRAPH: graph}
    manifest = bundle.manifest.model_copy(update=changes)
    return fill_bundle(folder, manifest, files)


def test_graphs_that_are_none_or_another_are_refused(bundles, tmp_path):
    bundle = Bundle.open(bundles / "demo-fp32.cxrgaze")
    model = onnx.load_from_string(bundle.read(GRAPH))
    model.graph.output[0].name = "something"
    for node in model.graph.node:
        node.output[:] = ["something" if o == "logits" else o for o in node.output]
    for name, graph in (("renamed", model.SerializeToString()), ("none", b"\x0a\x03abc")):
        (folder := tmp_path / name).mkdir()
        other = _with_graph(folder, bundle, graph)
        backend = ov.OpenVINO(_inputs(other))
        with pytest.raises(IntegrityError):
            Reader(other, backend)


def test_devices_are_asked_for_by_name(bundles):
    bundle = Bundle.open(bundles / "demo-fp32.cxrgaze")
    assert {"openvino", "openvino:GPU"} <= set(backends.names())
    for device in ("openvino:AUTO", "openvino:CPU", "onnxruntime:GPU", "OpenVINO"):
        with pytest.raises(UsageError, match="no backend"):
            backends.choose(bundle, device, BackendOptions())
    if "GPU" not in " ".join(_available()):
        with pytest.raises(IncompatibleError, match="OpenVINO .* cannot run this graph"):
            cxrgaze.load(bundle.path, "openvino:GPU")


def _available():
    import openvino

    return openvino.Core().available_devices


def test_features_are_those_that_choose_kernels(tmp_path):
    assert host.cpu_features(tmp_path) == ()
    info = tmp_path / "proc/cpuinfo"
    info.parent.mkdir()
    info.write_text(
        "processor : 0\nflags\t\t: fpu avx2 avx512_vnni sse2 avx512f\nbugs : avx_vnni\n"
    )
    assert host.cpu_features(tmp_path) == ("avx2", "avx512_vnni", "avx512f")
    info.write_text("Features : fp asimd asimddp crc32 i8mm\n")
    assert host.cpu_features(tmp_path) == ("asimd", "asimddp", "i8mm")
