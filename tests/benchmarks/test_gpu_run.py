"""The run of a pack: what is left out is named, what fails stops nothing, the runner's part runs.

The plan's part runs on the stand-in of `tests/runtime/test_trt.py`, which computes with ONNX
Runtime on host memory: it says nothing of TensorRT, which was not run here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cxrgaze.benchmarks import gpu_pack, gpu_run, gpu_steps
from cxrgaze.benchmarks.gpu_steps import Found, Run, Step
from cxrgaze.bundles.bundle import GRAPH, REFERENCE, Bundle
from cxrgaze.bundles.verdicts import Limits
from cxrgaze.command import Steps
from cxrgaze.engines.build import Built
from cxrgaze.errors import BuildError, CxrgazeError, IntegrityError, UsageError
from cxrgaze.evidence import gate
from cxrgaze.runtime import device, plans
from cxrgaze.runtime.ort import witness

FILMS, HALF_FILMS = 6, 3
SHAPES = {"logits": (1, 3), "log_density": (1, 1, 4, 4)}


def _stand_in():
    path = Path(__file__).parents[1] / "runtime" / "test_trt.py"
    spec = importlib.util.spec_from_file_location("stand_in_of_tensorrt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stand_in = _stand_in()
beside_a_gpu = stand_in.beside_a_gpu


@pytest.fixture(scope="module")
def pack(tmp_path_factory, bundles):
    """A pack of `tiny` with few films, of the bundles that the tests share."""
    folder = tmp_path_factory.mktemp("pack") / "gpu-pack"
    asked = {"tiny": gpu_pack.Contents("demo.safetensors", FILMS, HALF_FILMS)}

    def exported(source, options, step):
        # The int8 form is the export's own to test: fp16 stands for it here.
        precision = "fp32" if options.precision == "fp32" else "fp16"
        return Bundle.open(bundles / f"demo-{precision}.cxrgaze")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cxrgaze.export.pipeline.export", exported)
        return gpu_pack.make(folder, asked, Steps(), wheels=False)


@pytest.fixture
def run(pack, tmp_path):
    output, work = tmp_path / "out", tmp_path / "work"
    output.mkdir()
    work.mkdir()
    return Run(pack, output, work)


def _step(name, act, *needs, seconds=60.0):
    return Step(name, f"what {name} shows", needs, act, seconds)


def _fine(run):
    return Found(("all is well",), {"figure": 1.5})


def _written(run):
    return [json.loads(path.read_text()) for path in sorted(run.output.glob("*.json"))]


def test_a_pack_holds_its_reference_once_and_gives_whole_bundles(pack, tmp_path):
    assert len(list(pack.folder.rglob("reference.npz.xz"))) == 1
    assert not list(pack.folder.rglob(Path(REFERENCE).name))
    for precision in gpu_pack.PRECISIONS:
        bundle = pack.bundle("tiny", precision, tmp_path)
        keys, reference = gate.read_reference(bundle)
        assert keys == pack.films("tiny", bundle).keys and len(reference["logits"]) == FILMS
    half = pack.half("tiny")
    assert half["logits"].shape == (HALF_FILMS, 3) and half["log_density"].dtype == np.float32
    assert pack.record.wheels == () and pack.record.versions["onnxruntime"]


def test_the_graphs_verdict_in_a_pack_is_that_of_what_both_serve(pack, bundles, tmp_path):
    """The reference at the network's own temperature and points, the graph at its own."""
    bundle = pack.bundle("tiny", "fp16", tmp_path)
    manifest, films = bundle.manifest, pack.films("tiny", bundle)
    assert manifest.decision != manifest.reference_decision
    _, reference = gate.read_reference(bundle)
    graph = Bundle.open(bundles / "demo-fp16.cxrgaze").read(GRAPH)
    candidate = gate.predicted(witness(graph), films.arrays.images)
    served = replace(manifest.served, decision=manifest.reference_decision)
    expected = gate.judge(films, reference, candidate, Limits(), "graph", served, manifest.decision)
    assert manifest.gate.comparison.quantities == expected.comparison.quantities


def test_an_altered_pack_is_refused(pack, tmp_path):
    with pytest.raises(UsageError, match="make gpu-pack"):
        gpu_pack.Pack(tmp_path)
    path = pack.folder / "tiny" / "half.npz.xz"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + b"x")
        with pytest.raises(IntegrityError, match="altered"):
            pack.half("tiny")
    finally:
        path.write_bytes(whole)


def test_a_pack_over_its_limit_is_not_written(bundles, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "_packed", lambda folder, asked, step: None)
    monkeypatch.setattr(gpu_pack, "_size", lambda folder: gpu_pack.LIMIT_BYTES + 1)
    with pytest.raises(UsageError, match="take fewer films"):
        gpu_pack.make(tmp_path / "p", {"tiny": None}, Steps(), wheels=False)
    assert not list(tmp_path.iterdir())


def test_a_step_that_raises_does_not_stop_the_others(run):
    def broken(run):
        raise BuildError("Error Code 9: Target GPU SM 90 is not supported | by this")

    steps = [_step("one", _fine), _step("two", broken), _step("three", _fine)]
    records = gpu_run.run_all(run, steps, gpu_run.in_process)
    assert [one.outcome for one in records] == ["done", "failed", "done"]
    assert records[1].reason.startswith("BuildError: Error Code 9: Target GPU SM 90")
    assert [one["step"] for one in _written(run)] == ["one", "two", "three"]
    page = (run.output / "summary.md").read_text()
    assert "SM 90 is not supported \\| by this" in page and "Not run here" not in page


def test_what_is_not_here_is_left_out_by_name(run, monkeypatch):
    monkeypatch.setattr(device, "gpus", lambda: "cuda-bindings: no driver")
    steps = [
        _step("plan", _fine, "a card"),
        _step("witness", _fine, "no_such_package", "a card"),
        _step("rest", _fine),
    ]
    records = gpu_run.run_all(run, steps, gpu_run.in_process)
    assert [one.outcome for one in records] == ["left_out", "left_out", "done"]
    assert records[0].reason == "no card here"
    assert records[1].reason == "the package no_such_package is not installed; no card here"
    assert "Not run here: plan, witness." in (run.output / "summary.md").read_text()


def test_after_the_budget_steps_are_left_out_by_name(run):
    def slow(run):
        time.sleep(0.3)
        return _fine(run)

    run.budget_s = run.budget_s - run.left_s + 0.2
    steps = [_step("slow", slow), _step("late", _fine), _step("later", _fine)]
    records = gpu_run.run_all(run, steps, gpu_run.in_process)
    assert [one.outcome for one in records] == ["done", "left_out", "left_out"]
    assert "time budget" in records[2].reason
    assert "Not run here: late, later." in (run.output / "summary.md").read_text()


def test_figures_that_are_no_numbers_fail_their_step_alone(run):
    nan = _step("nan", lambda run: Found((), {"figure": float("nan")}))
    records = gpu_run.run_all(run, [nan, _step("fine", _fine)], gpu_run.in_process)
    assert [one.outcome for one in records] == ["failed", "done"]


def test_a_record_names_no_place_of_this_machine(run):
    """It may be committed: errors and pip's last words hold paths."""

    def broken(run):
        places = (run.work / "plans", run.pack.folder, Path.home() / ".cache", gpu_steps._ROOT)
        raise BuildError(f"not found: {', '.join(map(str, places))}")

    (record,) = gpu_run.run_all(run, [_step("one", broken)], gpu_run.in_process)
    assert record.reason == "BuildError: not found: WORK/plans, PACK, HOME/.cache, ROOT"
    for path in run.output.iterdir():
        assert str(run.work) not in path.read_text() and str(Path.home()) not in path.read_text()


DIES = {
    "dies": ("import os; os.abort()", 60.0, "its process ended with -6"),
    "says why": ("raise SystemExit('no room')", 60.0, "ended with 1: no room"),
    "hangs": ("import time; time.sleep(60)", 0.5, "stopped after 0 s|stopped after 1 s"),
}


@pytest.mark.parametrize("how", DIES)
def test_a_step_whose_process_dies_or_hangs_is_a_record(run, monkeypatch, how):
    code, seconds, reason = DIES[how]
    monkeypatch.setattr(
        gpu_run.children, "python", lambda *arguments: [os.sys.executable, "-c", code]
    )
    steps = [_step("first", _fine, seconds=seconds), _step("second", _fine, seconds=seconds)]
    records = gpu_run.run_all(run, steps)
    assert [one.outcome for one in records] == ["failed", "failed"]
    assert any(part in records[0].reason for part in reason.split("|"))
    assert len(_written(run)) == 2


def test_the_table_names_each_step_once_and_the_stand_ins_last():
    names = [step.name for step in gpu_steps.STEPS]
    assert len(set(names)) == len(names) and names[0] == "machine"
    assert all(name.startswith("stand-in") for name in names[-2:])


def test_without_a_card_the_command_writes_every_record(pack, tmp_path):
    """Each in a process of its own, but for those that run tests, and the slow ones."""
    if not isinstance(device.gpus(), str):
        pytest.skip("there is a GPU here, on which these steps would run")
    output = tmp_path / "out"
    wanted = ["machine", "contract-cuda-bindings", "tensorrt-tiny-fp16", "drawn-again"]
    assert gpu_run.main([str(pack.folder), "--output", str(output), "--only", *wanted]) == 0
    records = [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]
    assert [one["step"] for one in records] == wanted
    outcomes = {one["step"]: one["outcome"] for one in records}
    assert outcomes["machine"] == outcomes["drawn-again"] == "done"
    assert outcomes["contract-cuda-bindings"] == outcomes["tensorrt-tiny-fp16"] == "left_out"
    again = records[-1]["figures"]["tiny"]
    assert again["same_films"] == FILMS and again["fp32_logits_max"] < 1e-3
    page = (output / "summary.md").read_text()
    assert "# A pack, without a card" in page
    assert "Not run here: contract-cuda-bindings, tensorrt-tiny-fp16." in page


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gpu_steps, "PART_S", 0.1)
    monkeypatch.setattr(gpu_steps, "SAMPLES", 30)


def test_the_runners_part_runs_on_the_stand_in(run, beside_a_gpu, monkeypatch, quick):
    """All but the build: proof, self-test, parity, stages, throughput, memory, gate."""
    beside_a_gpu.batch = (1, 1, gpu_steps.LARGEST_BATCH)

    def build(bundle, library, options, cache):
        assert options.batch == beside_a_gpu.batch
        return Built(stand_in._stored(cache, bundle, options.batch), was_cached=False)

    monkeypatch.setattr(gpu_steps, "build", build)
    step = next(step for step in gpu_steps.STEPS if step.name == "tensorrt-tiny-fp16")
    step = step._replace(needs=("a card",))
    (record,) = gpu_run.run_all(run, [step], gpu_run.in_process)
    assert record.outcome == "done", record.reason
    times = record.figures["timed"]
    assert list(times["stages_ms"]) == ["h2d", "compute", "d2h"]
    assert times["latency_ms"]["count"] >= 1 and times["films_per_s"] > 0
    assert times["batch"] == FILMS and FILMS in beside_a_gpu.sizes
    assert record.figures["memory_bytes"]["plan"] == record.figures["plan"]["plan_bytes"]
    assert record.figures["to_onnxruntime"]["logits_max"] < 1e-3
    assert record.figures["gate"]["level"] == "engine"
    said = " ".join(record.says)
    assert "gate at engine level inconclusive" in said and "built precision opaque" in said
    assert not stand_in.HostDevice.open_now


def test_a_plan_that_fails_its_gate_still_has_its_figures(run, beside_a_gpu, monkeypatch, quick):
    beside_a_gpu.batch = (1, 1, gpu_steps.LARGEST_BATCH)

    def stored(bundle, library, options, cache):
        return Built(stand_in._stored(cache, bundle, options.batch), was_cached=False)

    def lost(*arguments):
        raise gpu_steps.GateError("gate of the plan on Stand-in: lost. The plan was deleted")

    monkeypatch.setattr(gpu_steps, "build", stored)
    monkeypatch.setattr(gpu_steps, "gated", lost)
    found = gpu_steps.plan_of("tiny", "fp16", "tensorrt", run)
    assert found.figures["timed"]["films_per_s"] > 0
    assert found.says[-1].startswith("gate of the plan")


def test_half_arithmetic_is_compared_with_the_graphs_answers(run):
    """On the CPU here, which says nothing of a card's arithmetic."""
    found = gpu_steps.half_of("tiny", run, on="cpu", films=2)
    apart = found.figures["differences"]
    assert apart["cpu float32 from host float32"]["logits_max"] == 0
    assert 0 < apart["fp16 graph from host float32"]["logits_max"] < 0.1
    assert 0 < apart["cpu half from host float32"]["log_density_max"] < 1
    assert set(apart) >= {"cpu half from fp16 graph", "cpu autocast from fp16 graph"}
    assert found.figures["films"] == 2


def test_a_provider_for_a_card_is_judged_as_an_engine(run, monkeypatch, quick):
    """The host's session stands for it here, which says nothing of a card."""
    monkeypatch.setattr(gpu_steps, "card_session", lambda graph: (witness(graph), "its Resize"))
    found = gpu_steps.by_cuda_provider("tiny", run)
    assert list(found.figures) == list(gpu_pack.PRECISIONS)
    assert found.figures["fp16"]["to_host"]["logits_max"] == 0
    assert found.figures["fp16"]["gate"]["level"] == "engine"
    assert "fp32: not all of it on the card: its Resize" in found.says


def test_without_a_provider_for_a_card_no_session_stands_for_it(run, bundles):
    if not gpu_steps.missing("ONNX Runtime's CUDA provider", run):
        pytest.skip("this ONNX Runtime has one")
    graph = Bundle.open(bundles / "demo-fp16.cxrgaze").read(GRAPH)
    with pytest.warns(UserWarning), pytest.raises(CxrgazeError, match="not by CUDAExecution"):
        gpu_steps.card_session(graph)


def test_polygraphy_is_another_witness(run, monkeypatch):
    pytest.importorskip("polygraphy", reason="polygraphy is not installed here")
    monkeypatch.setattr(gpu_steps, "_pairs", lambda names: [("tiny", "fp16"), ("tiny", "fp32")])
    found = gpu_steps.polygraphy_on_graphs(run)
    half, single = (found.figures[name] for name in ("tiny-fp16", "tiny-fp32"))
    assert half["differences"]["logits_max"] == single["differences"]["logits_max"] == 0
    assert list(single["convolutions"]) == ["float32"] and list(half["convolutions"]) == ["float16"]


def test_differences_see_what_is_not_finite():
    one = {head: np.zeros(shape, np.float32) for head, shape in SHAPES.items()}
    for head in one:
        broken = {**one, head: np.full_like(one[head], np.nan)}
        assert gpu_steps.differences(broken, one) == {"not_finite": 1.0}


def test_plans_of_a_run_lie_in_its_work_folder(run):
    assert isinstance(run.cache, plans.Cache) and run.cache.folder.parent == run.work
