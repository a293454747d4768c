"""Real builds with TensorRT-RTX, ahead of time and without a GPU: accepted and built, not run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from cxrgaze.bundles.bundle import GRAPH, MANIFEST, Bundle
from cxrgaze.command import Deferred
from cxrgaze.engines import build as engine
from cxrgaze.engines import cli, inspect_cli
from cxrgaze.errors import BuildError, ExitCode, IncompatibleError, UsageError
from cxrgaze.export import cli as export_cli
from cxrgaze.runtime import plans, trt_library
from cxrgaze.runtime.device import Gpu
from cxrgaze.train import checkpoint

EDGE = checkpoint.demo_path().with_name("edge.safetensors")

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")


@pytest.fixture
def cache(tmp_path):
    return plans.Cache(tmp_path / "plans")


def _build(bundle, tmp_path, *more):
    arguments = [str(bundle), "--cpu-only", "--sm", "86,89", "--cache", str(tmp_path / "plans")]
    return cli.main([*arguments, *more])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_is_built_recorded_and_cached(bundles, tmp_path, precision, capsys):
    bundle = bundles / f"demo-{precision}.cxrgaze"
    assert _build(bundle, tmp_path) == 0
    first = capsys.readouterr()
    assert "built in" in first.out and "opaque" in first.out
    assert "Building engine" in first.err  # a line a phase without a terminal
    (record_path,) = (tmp_path / "plans").glob("*.json")
    record = plans.read_record(record_path)
    assert record.inputs.bundle_sha256 == Bundle.open(bundle).sha256
    assert record.inputs.architecture == ("86", "89") and record.inputs.library == "tensorrt_rtx"
    plan = record_path.with_suffix(".plan")
    before = plan.stat().st_mtime_ns
    assert _build(bundle, tmp_path) == 0
    assert "cached: the same bundle" in capsys.readouterr().out
    assert plan.stat().st_mtime_ns == before
    assert _build(bundle, tmp_path, "--rebuild") == 0
    assert "built in" in capsys.readouterr().out
    assert len(list((tmp_path / "plans").iterdir())) == 2


def test_fp16_makes_a_smaller_plan(bundles, cache):
    library = trt_library.find("tensorrt_rtx")
    sizes = {}
    for precision in ("fp32", "fp16"):
        bundle = Bundle.open(bundles / f"demo-{precision}.cxrgaze")
        made = engine.build(bundle, library, engine.BuildOptions(capabilities=("86",)), cache)
        sizes[precision] = made.record.plan_bytes
    assert sizes["fp16"] < sizes["fp32"]


def test_a_profile_is_another_plan(bundles, tmp_path):
    assert _build(bundles / "demo-fp16.cxrgaze", tmp_path, "--batch", "1:4:16") == 0
    assert _build(bundles / "demo-fp16.cxrgaze", tmp_path) == 0
    records = [plans.read_record(p) for p in (tmp_path / "plans").glob("*.json")]
    assert {r.inputs.batch for r in records} == {(1, 4, 16), (1, 1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.01), ("fp16", 0.51), ("int8", 0.35)])
def test_the_paper_network_is_built(tmp_path, precision, share):
    arguments = ["--variant", "paper", "--random-weights", "--precision", precision]
    arguments += ["--calibration-films", "2", "--output", str(tmp_path)]
    assert export_cli.main(arguments) == 0
    bundle = tmp_path / f"paper-random-{precision}.cxrgaze"
    assert (bundle / GRAPH).stat().st_size <= share * 4 * 66_637_380
    assert Bundle.open(bundle).manifest.gate.verdict == "not_gated" or precision == "fp32"
    assert _build(bundle, tmp_path) == 0


REFUSED = {
    "no GPU and no --sm": ([], ExitCode.INCOMPATIBLE, "--cpu-only --sm"),
    "an Orin": (["--cpu-only", "--sm", "87"], ExitCode.INCOMPATIBLE, "75, 80, 86"),
    "a Hopper": (["--cpu-only", "--sm", "86,90"], ExitCode.INCOMPATIBLE, "capability 90"),
    "--cpu-only alone": (["--cpu-only"], ExitCode.USAGE, "go together"),
    "no such library": (["--library", "tensorrt"], ExitCode.INCOMPATIBLE, "no TensorRT here"),
    "a workspace": (
        ["--cpu-only", "--sm", "86", "--workspace", "1G"],
        ExitCode.USAGE,
        "has no --workspace",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_built_is_refused(bundles, tmp_path, capsys, name):
    arguments, code, message = REFUSED[name]
    bundle = str(bundles / "demo-fp16.cxrgaze")
    assert cli.main([bundle, "--cache", str(tmp_path / "plans"), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "plans").glob("*"))


@pytest.mark.parametrize("text", ["0M", "1", "1T", "-1G", "1.5G"])
def test_a_bad_size_is_a_usage_error(bundles, tmp_path, text):
    with pytest.raises(SystemExit) as caught:
        _build(bundles / "demo-fp16.cxrgaze", tmp_path, f"--workspace={text}")
    assert caught.value.code == ExitCode.USAGE


@pytest.mark.parametrize("text", ["0", "1:2", "4:2:8", "x", "1:1:5000"])
def test_a_bad_batch_is_a_usage_error(bundles, tmp_path, text):
    with pytest.raises(SystemExit) as caught:
        _build(bundles / "demo-fp16.cxrgaze", tmp_path, "--batch", text)
    assert caught.value.code == ExitCode.USAGE


def test_an_altered_bundle_is_not_built(bundles, tmp_path):
    bundle = shutil.copytree(bundles / "demo-fp16.cxrgaze", tmp_path / "b.cxrgaze")
    data = bytearray((bundle / GRAPH).read_bytes())
    data[1000] ^= 1
    (bundle / GRAPH).write_bytes(data)
    assert _build(bundle, tmp_path) == ExitCode.INTEGRITY
    assert not list((tmp_path / "plans").glob("*"))


def test_an_altered_plan_is_not_taken_from_the_cache(bundles, tmp_path, capsys):
    bundle = bundles / "demo-fp16.cxrgaze"
    assert _build(bundle, tmp_path) == 0
    (plan,) = (tmp_path / "plans").glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    assert _build(bundle, tmp_path) == ExitCode.INTEGRITY
    assert "--rebuild" in capsys.readouterr().err
    assert _build(bundle, tmp_path, "--rebuild") == 0


def test_a_cache_that_others_can_write_is_refused(bundles, tmp_path):
    (tmp_path / "plans").mkdir(mode=0o777)
    (tmp_path / "plans").chmod(0o777)
    assert _build(bundles / "demo-fp16.cxrgaze", tmp_path) == ExitCode.INTEGRITY


class _Fake:
    """A bundle whose graph is given; the library and its builder are real."""

    def __init__(self, bundle, graph):
        self.path, self.manifest, self.sha256 = bundle.path, bundle.manifest, bundle.sha256
        self._graph = graph

    def verify(self, leave=()):
        pass

    def read(self, name):
        return self._graph


def _graph(bundle, change):
    model = onnx.load_from_string(bundle.read(GRAPH))
    change(model)
    return model.SerializeToString()


def _unknown_operator(model):
    next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Rleu"


def _renamed_output(model):
    model.graph.output[0].name = "other"
    for node in model.graph.node:
        node.output[:] = ["other" if o == "logits" else o for o in node.output]


GRAPHS = {
    "an operator that it does not know": (_unknown_operator, "does not accept the graph"),
    "another output": (_renamed_output, "expected image"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_the_library_refuses_is_a_build_error_with_its_words(bundles, cache, name):
    change, message = GRAPHS[name]
    bundle = Bundle.open(bundles / "demo-fp32.cxrgaze")
    fake = _Fake(bundle, _graph(bundle, change))
    library = trt_library.find("tensorrt_rtx")
    with pytest.raises(BuildError, match=message) as caught:
        engine.build(fake, library, engine.BuildOptions(capabilities=("86",)), cache)
    assert caught.value.exit_code == ExitCode.BUILD
    assert not list(cache.folder.iterdir())


def test_a_cached_build_of_an_altered_graph_is_refused(bundles, tmp_path, capsys):
    """B12: it said "cached", exit 0."""
    path = shutil.copytree(bundles / "demo-fp16.cxrgaze", tmp_path / "b.cxrgaze")
    arguments = [str(path), "--cpu-only", "--sm", "86", "--cache", str(tmp_path / "plans")]
    assert cli.main(arguments) == 0
    graph = path / GRAPH
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    assert cli.main(arguments) == ExitCode.INTEGRITY
    assert "was altered" in capsys.readouterr().err


def test_an_altered_plan_is_not_listed_as_whole(bundles, tmp_path, capsys):
    """D4."""
    bundle, folder = str(bundles / "demo-fp16.cxrgaze"), tmp_path / "plans"
    assert cli.main([bundle, "--cpu-only", "--sm", "86", "--cache", str(folder)]) == 0
    (plan,) = folder.glob("*.plan")
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert inspect_cli.main([bundle, "--cache", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "refused" in out and "was altered" in out


@pytest.mark.parametrize("moment", [1, 20])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_build_and_leaves_nothing(bundles, cache, monkeypatch, number, moment):
    """B3: the real builder swallows what is raised in its callbacks; so nothing is."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as every command does
    seen = []

    def interrupting(total, shown):
        def update():
            seen.append(1)
            if len(seen) == moment:
                os.kill(os.getpid(), number)

        return types.SimpleNamespace(
            update=update, close=lambda: None, set_description=lambda name: None
        )

    monkeypatch.setattr(engine, "steps", interrupting)
    bundle = Bundle.open(bundles / "demo-fp32.cxrgaze")
    library = trt_library.find("tensorrt_rtx")
    with pytest.raises(KeyboardInterrupt):
        engine.build(bundle, library, engine.BuildOptions(capabilities=("86",)), cache)
    assert not list(cache.folder.iterdir()) and len(seen) < moment + 20
    assert signal.getsignal(number) is signal.default_int_handler


def test_progress_advances(bundles, cache, monkeypatch):
    made = []
    real = engine._monitor

    def kept(trt, interrupts):
        made.append(real(trt, interrupts))
        return made[-1]

    monkeypatch.setattr(engine, "_monitor", kept)
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    library = trt_library.find("tensorrt_rtx")
    engine.build(bundle, library, engine.BuildOptions(capabilities=("86",)), cache)
    assert made[0].steps > 100


AHEAD = engine.Site(None, "no driver", 16 << 30, None)


def test_options_that_a_library_lacks_are_refused(bundles):
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    rtx = trt_library.find("tensorrt_rtx")
    for options in (
        engine.BuildOptions(capabilities=("86",), workspace_bytes=1 << 30),
        engine.BuildOptions(capabilities=("86",), version_compatible=True, allow_host_code=True),
        engine.BuildOptions(capabilities=("86",), hardware_compatible=True),
    ):
        with pytest.raises(UsageError, match="has no --"):
            engine.plan_inputs(bundle, rtx, options, AHEAD)
    real = trt_library.Library("tensorrt", "10.3.0", rtx.module)
    with pytest.raises(UsageError, match="has no --cpu-only"):
        engine.plan_inputs(bundle, real, engine.BuildOptions(capabilities=("86",)), AHEAD)


def test_host_code_needs_leave_to_be_built(bundles):
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    real = trt_library.Library("tensorrt", "10.3.0", None)
    options = engine.BuildOptions(version_compatible=True)
    with pytest.raises(UsageError, match="--allow-host-code"):
        engine.plan_inputs(bundle, real, options, ORIN)
    allowed = replace(options, allow_host_code=True)
    inputs = engine.plan_inputs(bundle, real, allowed, ORIN)
    assert inputs.version_compatible and inputs.architecture == ("87",)


# Recorded facts of a machine that is not here: an Orin Nano with 8 GB.
ORIN = engine.Site(Gpu("Orin", "87", 7_989_280_768, True, "12.6"), "", 3_186_622_464, "36.4.3")


def test_a_plan_for_every_discrete_gpu_is_not_for_a_jetson(bundles):
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    real = trt_library.Library("tensorrt", "10.3.0", None)
    with pytest.raises(IncompatibleError, match="here is a Jetson"):
        engine.plan_inputs(bundle, real, engine.BuildOptions(hardware_compatible=True), ORIN)


def test_workspace_on_shared_memory_is_at_most_half_of_what_is_left():
    graph = 134_000_000  # the paper network in fp16
    itself = int(engine.BASE_BYTES + engine.BYTES_PER_GRAPH_BYTE * graph)
    most = (3_186_622_464 - itself) // 2
    assert engine.workspace_to_give(None, graph, ORIN) == most
    assert engine.workspace_to_give(4 << 30, graph, ORIN) == most
    assert engine.workspace_to_give(300 << 20, graph, ORIN) == 300 << 20
    discrete = replace(ORIN, gpu=replace(ORIN.gpu, integrated=False))
    for site in (discrete, AHEAD, replace(ORIN, available_bytes=None)):
        assert engine.workspace_to_give(None, graph, site) is None
        assert engine.workspace_to_give(4 << 30, graph, site) == 4 << 30


def test_too_little_memory_is_said_before_the_build_begins(bundles, tmp_path, monkeypatch, capsys):
    """A Jetson with 600 MB free, from recorded facts; the library is never called."""
    monkeypatch.setattr(engine, "this_site", lambda: replace(ORIN, available_bytes=600_000_000))
    library = trt_library.Library("tensorrt", "10.3.0", None)
    monkeypatch.setattr(trt_library, "find", lambda name: library)
    bundle = str(bundles / "demo-fp16.cxrgaze")
    assert cli.main([bundle, "--cache", str(tmp_path / "plans")]) == ExitCode.OUT_OF_MEMORY
    said = capsys.readouterr().err
    assert "needs about 690 MB, 600 MB are free" in said
    assert not list((tmp_path / "plans").iterdir())


@pytest.mark.slow
def test_the_estimate_of_memory_is_not_below_a_real_build(tmp_path):
    """A build of the largest graph that ships, in a process of its own: TensorRT-RTX, x86_64."""
    arguments = [str(EDGE), "--precision", "fp16", "--no-gate", "--output", str(tmp_path)]
    assert export_cli.main(arguments) == 0
    bundle = tmp_path / "edge-fp16.cxrgaze"
    code = """
import pathlib, re, sys
from cxrgaze.engines import build, cli
from cxrgaze.runtime import plans
import tensorrt_rtx
status = pathlib.Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024
before = peak()
assert cli.main([*sys.argv[1:], "--cpu-only", "--sm", "86"]) == 0
print(peak() - before)
"""
    arguments = [sys.executable, "-c", code, str(bundle), "--cache", str(tmp_path / "plans")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    taken = int(done.stdout.split()[-1])
    estimate = engine.BASE_BYTES + engine.BYTES_PER_GRAPH_BYTE * (bundle / GRAPH).stat().st_size
    assert 0.3 * estimate < taken < 1.2 * estimate


@pytest.fixture
def recorded_device(bundles, monkeypatch):
    """A card that is not here: real plan bytes, with facts and inspector output as recorded.

    What it stands for only a device can cause; the builder, the cache and the verdict are real.
    """
    rtx = trt_library.find("tensorrt_rtx")
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    options = engine.BuildOptions(capabilities=("86",))
    plan = engine._serialized(
        bundle.read(GRAPH), rtx, options, None, Path("unused"), bundle, Deferred()
    )
    card = Gpu("NVIDIA A100-SXM4-40GB", "86", 40 << 30, False, "13.0")
    monkeypatch.setattr(engine, "this_site", lambda: engine.Site(card, "", 16 << 30, None))
    monkeypatch.setattr(engine, "_serialized", lambda *arguments: plan)

    def shows(**macs):
        built = plans.BuiltEngine(
            layers=1,
            layers_by_type={},
            weight_bytes_by_type={},
            convolution_macs_by_type=macs,
            device_memory_bytes=1,
        )
        monkeypatch.setattr(engine, "inspected", lambda *_, **__: built)

    return bundle, shows


def test_a_contradicted_precision_is_exit_3_and_its_plan_is_deleted(
    recorded_device, tmp_path, capsys
):
    bundle, shows = recorded_device
    arguments = [str(bundle.path), "--cache", str(tmp_path / "plans")]
    work = bundle.manifest.convolution_macs["fp16"]
    shows(fp16=work)
    assert cli.main(arguments) == 0
    assert "proven: the inspector shows 100.0 %" in capsys.readouterr().out
    (record,) = plans.Cache(tmp_path / "plans").records(bundle.sha256)
    assert record.built_on["gpu"] == "NVIDIA A100-SXM4-40GB" and record.engine is not None
    shows(fp32=work)
    assert cli.main([*arguments, "--rebuild"]) == ExitCode.BUILD
    assert "built another precision than the graph has" in capsys.readouterr().err
    assert not list((tmp_path / "plans").iterdir())
    shows()
    assert cli.main(arguments) == 0 and "opaque" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["9.9.0", "10.2.0", "12.0.0"])
def test_an_unsupported_version_is_refused(monkeypatch, version):
    module = types.SimpleNamespace(__version__=version)
    monkeypatch.setattr(trt_library.importlib, "import_module", lambda name: module)
    with pytest.raises(IncompatibleError, match=f"tensorrt {version} is not supported"):
        trt_library.find("tensorrt")


def test_tensorrt_11_has_no_flag_for_what_is_always_so():
    enumeration = types.SimpleNamespace()
    module = types.SimpleNamespace(NetworkDefinitionCreationFlag=enumeration)
    assert trt_library.Library("tensorrt", "11.4.1", module).network_flags == 0
    enumeration.STRONGLY_TYPED = 1
    assert trt_library.Library("tensorrt", "10.3.0", module).network_flags == 2


def test_inspect_lists_plans_without_loading_them(bundles, tmp_path, capsys):
    bundle, cache = str(bundles / "demo-fp16.cxrgaze"), str(tmp_path / "plans")
    assert _build(bundle, tmp_path) == 0
    capsys.readouterr()
    assert inspect_cli.main([bundle, "--device", "--cache", cache, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"]["parity"] == "pass" and "onnxruntime" in found["device"]["libraries"]
    assert found["bundle"]["heads"] == "logits, log_density"
    assert found["bundle"]["classes"] == "normal, heart_failure, pneumonia (exclusive)"
    assert "nothing taught" not in found["bundle"]
    (plan,) = found["plans"]
    assert plan["precision"].startswith("opaque: no engine was loaded") and "86, 89" in plan["for"]
    assert plan["host code"] == "no" and "cannot be loaded here: no GPU" in plan["here"]
    assert (
        len(found["support matrix"]) == 7 and "no GPU here" in found["device"]["tensorrt here"][0]
    )
    (tmp_path / "plans" / f"{plan['plan']}.json").write_text("{}")
    assert inspect_cli.main([bundle, "--cache", cache]) == 0
    assert "refused" in capsys.readouterr().out


def test_inspect_names_what_nothing_taught(bundles, tmp_path, capsys):
    bundle = shutil.copytree(bundles / "demo-fp16.cxrgaze", tmp_path / "b.cxrgaze")
    changes = {"untrained": ("log_density",), "untaught": ("normal",)}
    manifest = Bundle.open(bundle).manifest.model_copy(update=changes)
    (bundle / MANIFEST).write_bytes(manifest.rendered())
    assert inspect_cli.main([str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"]["nothing taught"] == "log_density, normal"


def test_inspect_needs_something_to_inspect(capsys):
    assert inspect_cli.main([]) == ExitCode.USAGE
    assert inspect_cli.main(["nowhere.cxrgaze"]) == ExitCode.USAGE
