"""cxrgaze-export at low precision: verdicts, exit codes, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import types
from dataclasses import replace

import numpy as np
import onnx
import pytest

import cxrgaze
from cxrgaze.bundles.bundle import GRAPH, REFERENCE, Bundle
from cxrgaze.bundles.verdicts import HEAD_OF
from cxrgaze.errors import ExitCode, GateError, IncompatibleError, ParityError
from cxrgaze.evidence import gate
from cxrgaze.evidence.phantom import write_phantom_set
from cxrgaze.export import audit, cli, fp16, int8, network_source, search
from cxrgaze.train import checkpoint


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """demo-int8.cxrgaze, for TensorRT, gated on all its phantoms."""
    folder = tmp_path_factory.mktemp("int8")
    assert cli.main(["--precision", "int8", "--output", str(folder)]) == 0
    return folder / "demo-int8.cxrgaze"


@pytest.fixture(scope="module")
def demo_spec():
    return checkpoint.load(checkpoint.demo_path())[1].spec


@pytest.fixture
def fewer_phantoms(monkeypatch):
    """300 phantoms in the gate: what is wrong shows in them too, sooner."""
    real = gate.phantom_set

    def fewer(spec, films=300, first_seed=gate.PHANTOM_SEED):
        return real(spec, min(films, 300), first_seed)

    monkeypatch.setattr(gate, "phantom_set", fewer)


def test_fp16_and_int8_pass_the_gate(bundles, quantized):
    half = Bundle.open(bundles / "demo-fp16.cxrgaze").manifest
    assert half.gate.verdict == "pass" and half.gate.level == "graph"
    assert half.audit is not None and half.audit.rounding_finite and not half.audit.overflowing
    manifest = Bundle.open(quantized).manifest
    assert manifest.gate.verdict == "pass", manifest.gate.reason
    assert manifest.convolution_macs["int8"] >= 0.5 * sum(manifest.convolution_macs.values())
    assert manifest.calibration is not None and len(manifest.calibration.films) == 64
    assert [tried.form[-14:] for tried in manifest.forms_tried] == [
        "float32 scales",
        "float16 scales",
    ]


@pytest.mark.slow
def test_int8_for_the_cpu_passes_by_fallback(tmp_path, films):
    """By itself it flips too many decisions; the blocks that do it go back."""
    arguments = ["--precision", "int8", "--target", "cpu", "--output", str(tmp_path)]
    assert cli.main([*arguments, "--fallback"]) == 0
    assert os.listdir(tmp_path) == ["demo-int8-cpu.cxrgaze"]  # the search's log is gone
    bundle = tmp_path / "demo-int8-cpu.cxrgaze"
    manifest = Bundle.open(bundle).manifest
    assert manifest.gate.verdict == "pass" and manifest.forms_tried[0].gate != "pass"
    assert manifest.forms_tried[-1].kept and manifest.forms_tried[-1].gate == "pass"
    assert manifest.convolution_macs["int8"] >= 0.5 * sum(manifest.convolution_macs.values())
    assert "went back" in (bundle / "report/parity.html").read_text()
    assert (bundle / "report/fallback.png").is_file()
    with cxrgaze.load(bundle, require="pass") as reader:
        assert reader.read(films / "nih_00001507_002_512.png").model["gate"] == "pass"


def test_serving_refuses_the_graph_of_another_target(quantized):
    with pytest.raises(IncompatibleError, match="does not serve int8 graphs for target tensorrt"):
        cxrgaze.load(quantized)


def test_tensorrt_rtx_accepts_and_builds_the_int8_graph(quantized, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    from cxrgaze.engines import cli as build_cli

    arguments = ["--cpu-only", "--sm", "86", "--cache", str(tmp_path / "plans")]
    assert build_cli.main([str(quantized), *arguments]) == 0


def test_the_report_has_tables_maps_and_json(quantized):
    folder = quantized / "report"
    page = (folder / "parity.md").read_text()
    for text in ("Calibration", "Gate", "ynthetic", "not a medical device", "maps.png"):
        assert text in page
    assert {"maps.png", "activations.svg", "differences.svg"} <= set(os.listdir(folder))
    content = json.loads((folder / "parity.json").read_text())
    assert sum(content["gate"]["agreement_loss"]["counts"]) == gate.PHANTOMS
    assert sum(content["gate"]["probability_change"]["counts"]) == gate.PHANTOMS
    assert content["gate"]["verdict"] == "pass" and content["calibration"]["films"]


class _Fake:
    """Forms that are names of kept blocks; the gate passes once all of `needed` are kept."""

    def __init__(self, needed, effect, blocks=("a", "b", "c")):
        self.needed, self.effect, self.tried, self.measured = needed, effect, [], []
        self._blocks = blocks

    def blocks(self):
        return self._blocks

    def with_kept(self, kept):
        return [types.SimpleNamespace(name="form", kept=tuple(sorted(kept)))]

    def distance(self, form):
        self.measured.append(form.kept)
        return sum(effect for block, effect in self.effect.items() if block not in form.kept)

    def __call__(self, form):
        self.tried.append(form.kept)
        verdict = "pass" if set(self.needed) <= set(form.kept) else "fail"
        return types.SimpleNamespace(
            form=form,
            gate=types.SimpleNamespace(verdict=verdict, reason=""),
            parity=types.SimpleNamespace(verdict="pass"),
        )


def _search(fake, tmp_path, budget=10):
    log = search.Log(tmp_path / "log.json", "key")
    return search.fallback(fake, fake, fake.distance, log, budget)


def test_the_search_ranks_blocks_and_keeps_the_fewest_that_pass(tmp_path):
    fake = _Fake({"b", "c"}, {"a": 0.001, "b": 0.01, "c": 0.02})
    made = _search(fake, tmp_path)
    assert fake.measured == [("b", "c"), ("a", "c"), ("a", "b")]  # each alone in low precision
    assert fake.tried == [("c",), ("b", "c")] == [m.form.kept for m in made]
    assert search.best(made).gate.verdict == "pass"


def test_an_interrupted_search_goes_on_where_it_was(tmp_path):
    fake = _Fake({"b"}, {"b": 0.01})
    _search(fake, tmp_path)
    again = _Fake({"b"}, {"b": 0.01})
    _search(again, tmp_path)
    assert again.tried == [("b",)] and not again.measured  # the ranking was known
    log = search.Log(tmp_path / "log.json", "another network")
    assert log.distance(["a"], lambda: 0.5) == 0.5
    assert log.distance(["b"], lambda: float("inf")) == 1e9


def test_the_search_keeps_to_its_budget(tmp_path):
    fake = _Fake({"z"}, {})
    made = _search(fake, tmp_path, budget=5)
    assert len(fake.tried) == 2 and search.best(made).gate.verdict == "fail"
    with pytest.raises(ParityError, match="takes 3 trials"):
        _search(fake, tmp_path, budget=2)


@pytest.mark.parametrize(
    ("losses", "head"),
    [
        ({"macro AUC": 0.001, "CC": 0.02, "flips": 0.01}, "log_density"),
        ({"macro AUC": 0.001, "CC": 0.02, "flips": 0.05}, "logits"),
        ({"macro AUC": 0.02, "CC": None, "flips": 0.01}, "logits"),
        ({"CC": 0.001}, "log_density"),
        ({}, "logits"),
    ],
)
def test_what_ranks_is_the_output_that_fails(demo_spec, losses, head):
    limits = {"macro AUC": 0.005, "CC": 0.01, "flips": 0.02}
    quantities = [
        types.SimpleNamespace(head=HEAD_OF[name], loss=loss, limit=limits[name])
        for name, loss in losses.items()
    ]
    comparison = types.SimpleNamespace(quantities=quantities)
    judged = types.SimpleNamespace(gate=types.SimpleNamespace(comparison=comparison))
    assert search.weakest_head(judged, demo_spec) == head


def test_what_ranks_of_a_network_that_was_not_gated_is_its_first_head(demo_spec):
    judged = types.SimpleNamespace(gate=types.SimpleNamespace(comparison=None))
    assert search.weakest_head(judged, demo_spec) == "logits"
    alone = demo_spec.model_copy(update={"heads": ("log_density",), "classes": ()})
    assert search.weakest_head(judged, alone) == "log_density"


def _export(tmp_path, *arguments):
    return cli.main([*arguments, "--output", str(tmp_path / "out")])


def _left(tmp_path):
    return sorted(os.listdir(tmp_path / "out")) if (tmp_path / "out").is_dir() else []


BREAKS = {
    "one wrong scale": lambda m: _scaled(m, 40.0),
    "an int8 collapse": lambda m: _scaled(m, 4000.0, every=True),
}


def _scaled(model, factor, every=False):
    """Wrong scales behind the back of the exporter."""
    for weight in model.graph.initializer:
        if weight.name.endswith("/scale"):
            values = onnx.numpy_helper.to_array(weight) * np.float32(factor)
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), weight.name))
            if not every:
                break
    return model


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.usefixtures("fewer_phantoms")
def test_wrong_scales_are_caught_and_nothing_is_left(tmp_path, monkeypatch, capsys, name):
    real = int8.for_tensorrt
    monkeypatch.setattr(int8, "for_tensorrt", lambda *a: BREAKS[name](real(*a)))
    code = _export(tmp_path, "--precision", "int8")
    assert code in (ExitCode.GATE, ExitCode.PARITY)
    assert "nothing was written" in capsys.readouterr().err.lower()
    assert _left(tmp_path) == []


def _after_typing(monkeypatch, change):
    real = fp16.to_fp16

    def changed(*arguments, **options):
        model = real(*arguments, **options)
        change(model)
        return model

    monkeypatch.setattr(fp16, "to_fp16", changed)


def _nan_in_a_channel(model):
    weight = next(w for w in model.graph.initializer if w.name.startswith("saliency.3.bias"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


def _classes_swapped(model):
    for weight in model.graph.initializer:
        if weight.name.startswith("classifier.3."):
            values = onnx.numpy_helper.to_array(weight)
            flipped = np.ascontiguousarray(values[::-1])
            weight.CopyFrom(onnx.numpy_helper.from_array(flipped, weight.name))


@pytest.mark.parametrize("change", [_nan_in_a_channel, _classes_swapped])
@pytest.mark.usefixtures("fewer_phantoms")
def test_a_broken_half_graph_is_a_parity_error(tmp_path, monkeypatch, change):
    _after_typing(monkeypatch, change)
    assert _export(tmp_path, "--precision", "fp16") == ExitCode.PARITY
    assert _left(tmp_path) == []


@pytest.mark.usefixtures("fewer_phantoms")
def test_a_half_overflow_is_named_with_its_tensor(tmp_path, monkeypatch, capsys):
    """BatchNorm of one layer scaled up and the next convolution down: the same function."""
    network, card = checkpoint.load(checkpoint.demo_path())
    up = network.decoder[3].fuse
    up[1].weight.data *= 3e5
    up[1].bias.data *= 3e5
    up[3].weight.data /= 3e5
    checkpoint_folder = tmp_path / "in"
    checkpoint_folder.mkdir()
    real = network_source.source_from_checkpoint
    monkeypatch.setattr(
        network_source, "source_from_checkpoint", lambda path: replace(real(path), module=network)
    )
    assert _export(tmp_path, "--precision", "fp16") == ExitCode.PARITY
    assert "float16 overflow: /decoder.3/fuse" in capsys.readouterr().err
    assert _export(tmp_path, "--precision", "fp32") == 0


@pytest.mark.usefixtures("fewer_phantoms")
def test_an_accuracy_loss_is_exit_5_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "limits.toml").write_text("flips = 0.0001\ncc = 0.000001\n")
    code = _export(tmp_path, "--precision", "int8", "--limits", str(tmp_path / "limits.toml"))
    assert code == ExitCode.GATE and _left(tmp_path) == []
    assert "--fallback" in capsys.readouterr().err


def test_a_set_that_cannot_tell_is_exit_9_and_the_bundle_says_so(tmp_path):
    write_phantom_set(tmp_path / "set", {"test": 30}, difficulty=0.5, first_seed=77_000)
    code = _export(tmp_path, "--precision", "fp16", "--gate", str(tmp_path / "set"))
    assert code == ExitCode.INCONCLUSIVE
    bundle = tmp_path / "out" / "demo-fp16.cxrgaze"
    assert Bundle.open(bundle).manifest.gate.verdict == "inconclusive"
    with cxrgaze.load(bundle) as reader:
        assert any("gate: inconclusive" in warning for warning in reader.standing_warnings)
    with pytest.raises(GateError, match="pass is required"):
        cxrgaze.load(bundle, require="pass")


def test_calibration_patients_in_the_gates_set_are_refused(tmp_path, capsys):
    write_phantom_set(tmp_path / "set", {"test": 40}, first_seed=88_000)
    sets = ["--gate", str(tmp_path / "set"), "--calibration", str(tmp_path / "set")]
    sets += ["--calibration-split", "test"]
    assert _export(tmp_path, "--precision", "int8", *sets) == ExitCode.DATA
    assert "40 patients and 40 films" in capsys.readouterr().err and _left(tmp_path) == []


@pytest.mark.usefixtures("fewer_phantoms")
def test_few_calibration_films_are_warned_of(tmp_path, capsys):
    arguments = ["--precision", "int8", "--calibration-films", "8", "--no-gate"]
    assert _export(tmp_path, *arguments) == 0
    assert "8 calibration films are few" in capsys.readouterr().err
    manifest = Bundle.open(tmp_path / "out" / "demo-int8.cxrgaze").manifest
    assert manifest.gate.verdict == "not_gated" and manifest.calibration.warnings
    assert REFERENCE not in {record.path for record in manifest.files}


def test_random_weights_have_parity_only(tmp_path):
    arguments = ["--variant", "tiny", "--random-weights", "--precision", "int8"]
    assert _export(tmp_path, *arguments) == 0
    manifest = Bundle.open(tmp_path / "out" / "tiny-random-int8.cxrgaze").manifest
    assert manifest.gate.verdict == "not_gated" and manifest.parity.verdict == "pass"


@pytest.fixture
def clinical(tmp_path, monkeypatch):
    """The demo network as if it had been trained on films."""
    real = network_source.source_from_checkpoint

    def source(path):
        found = real(path)
        spec = found.spec.model_copy(update={"domain": "clinical"})
        return replace(found, spec=spec)

    monkeypatch.setattr(network_source, "source_from_checkpoint", source)


NEEDS = {
    "fp16 without a gate": (["--precision", "fp16"], "--gate"),
    "int8 without calibration": (["--precision", "int8", "--no-gate"], "--calibration"),
    "both": (["--precision", "int8", "--gate", "x", "--no-gate"], "not both"),
    "limits that are none": (["--limits", "limits.toml"], "does not exist|No such file"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_a_clinical_network_needs_is_asked_before_any_work(clinical, tmp_path, capsys, name):
    arguments, message = NEEDS[name]
    assert _export(tmp_path, *arguments) == ExitCode.USAGE
    assert re.search(message, capsys.readouterr().err) and _left(tmp_path) == []


def test_rounding_is_seen_where_onnx_runtime_shows_none(bundles):
    model = onnx.load_from_string(Bundle.open(bundles / "demo-fp32.cxrgaze").read(GRAPH))
    spec = Bundle.open(bundles / "demo-fp32.cxrgaze").manifest.spec
    images = list(gate.phantom_set(spec, 4).arrays.images)
    found = audit.audit(model, images, "4 phantoms")
    assert found.rounding_finite and 0 < found.rounding["logits"] < 0.1
    assert 0 < found.rounding["log_density"] < 0.3 and not found.overflowing
    assert 0 <= found.subnormal_share < found.worst_subnormal_share < 1
