"""cxrgaze-export at low precision: verdicts, exit codes, and what is left behind."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

import cxrgaze
from cxrgaze.bundles.bundle import GRAPH, REFERENCE, Bundle
from cxrgaze.bundles.verdicts import Limits
from cxrgaze.errors import ExitCode, GateError, IncompatibleError, UsageError
from cxrgaze.evidence import gate, phantom
from cxrgaze.evidence.labelled_set import LOOKS, LabelledSet
from cxrgaze.evidence.phantom import write_phantom_set
from cxrgaze.export import audit, cli, fp16, int8, network_source
from cxrgaze.export.options import read_limits
from cxrgaze.runtime.ort import witness
from cxrgaze.train import checkpoint
from cxrgaze.train.decision import fit_decision

WIDER = """[flips]
limit = 0.06
reason = "a test: by itself the demo's int8 flips more than the default of 2 %"

[brier]
limit = 0.03
reason = "a test: it loses about the default of 0.01"
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """demo-int8.cxrgaze, for TensorRT, gated on all its phantoms by a wider limit."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "limits.toml").write_text(WIDER)
    arguments = ["--precision", "int8", "--limits", str(folder / "limits.toml")]
    assert cli.main([*arguments, "--output", str(folder)]) == 0
    return folder / "demo-int8.cxrgaze"


@pytest.fixture(scope="module")
def card():
    return checkpoint.load(checkpoint.demo_path())[1]


@pytest.fixture
def fewer_phantoms(monkeypatch):
    """300 phantoms in the gate: what is wrong shows in them too, sooner."""
    real = gate.phantom_set

    def fewer(spec, films=300, first_seed=gate.PHANTOM_SEED, difficulty=phantom.HARD):
        return real(spec, min(films, 300), first_seed, difficulty)

    monkeypatch.setattr(gate, "phantom_set", fewer)


def test_fp16_passes_the_gate_and_int8_a_wider_one(bundles, quantized):
    half = Bundle.open(bundles / "demo-fp16.cxrgaze").manifest
    assert half.gate.verdict == "pass" and half.gate.level == "graph"
    assert half.gate.comparison.limits == Limits() and half.form_shipped == 0
    assert half.audit is not None and half.audit.rounding_finite and not half.audit.overflowing
    manifest = Bundle.open(quantized).manifest
    assert manifest.gate.verdict == "pass", manifest.gate.reason
    limits = manifest.gate.comparison.limits
    assert limits == Limits(flips=0.06, brier=0.03, reasons=limits.reasons)
    assert list(limits.reasons) == ["flips", "brier"] and "a test" in limits.reasons["flips"]
    assert 0.02 < manifest.gate.comparison.quantities[2].difference < 0.06
    assert manifest.convolution_macs["int8"] >= 0.5 * sum(manifest.convolution_macs.values())
    assert manifest.calibration is not None and len(manifest.calibration.films) == 64
    assert [(tried.form[-14:], tried.gate) for tried in manifest.forms_tried] == [
        ("float32 scales", "pass"),  # the more precise one is looked at first
        ("float16 scales", "pass"),
    ]
    assert manifest.form_shipped == 1  # the last that passed


def _refitted(bundle, served, films):
    """Temperature and points from what a bundle's graph says of films."""
    logits = gate.predicted(witness(bundle.read(GRAPH)), films.arrays.images)["logits"]
    return fit_decision(logits, films.arrays.truth, served)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_temperature_and_points_are_those_of_this_graph_on_validation_films(
    bundles, quantized, card, precision
):
    """Those that the networks that ship were validated on."""
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze" if precision == "fp16" else quantized)
    manifest = bundle.manifest
    films = gate.phantom_set(card.spec, 150, 900, phantom.EASY)
    assert manifest.decision == _refitted(bundle, manifest.served, films)
    assert manifest.reference_decision == card.decision != manifest.decision
    assert manifest.decision_from == f"fitted on 150 films of this graph: {films.name}"
    assert manifest.decision_from in (bundle.path / "report/parity.md").read_text()


def test_a_float32_graph_has_the_networks_own_decision(bundles, card):
    manifest = Bundle.open(bundles / "demo-fp32.cxrgaze").manifest
    assert manifest.decision == manifest.reference_decision == card.decision
    assert manifest.decision_from == "the float32 network's"


@pytest.mark.slow
def test_int8_for_the_cpu_passes_by_fallback(tmp_path, films):
    """By itself it flips too many decisions; the blocks that do it stay in higher precision."""
    arguments = ["--precision", "int8", "--target", "cpu", "--output", str(tmp_path)]
    assert cli.main([*arguments, "--fallback"]) == 0
    assert os.listdir(tmp_path) == ["demo-int8-cpu.cxrgaze"]  # the search's log is gone
    bundle = tmp_path / "demo-int8-cpu.cxrgaze"
    manifest = Bundle.open(bundle).manifest
    assert manifest.gate.verdict == "pass" and len(manifest.forms_tried[0].kept) == 15
    passed = [form.gate == "pass" for form in manifest.forms_tried]
    assert passed[:-1] == [True] * (len(passed) - 1) and not passed[-1]
    assert manifest.form_shipped == len(passed) - 2 and manifest.forms_tried[-2].kept
    kept = [set(form.kept) for form in manifest.forms_tried]
    assert all(b < a and len(a - b) == 1 for a, b in itertools.pairwise(kept))
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


@pytest.mark.long
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


@pytest.mark.long
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


def test_an_accuracy_loss_is_exit_5_and_leaves_nothing(tmp_path, capsys):
    """On all phantoms: what is served flips too often."""
    (tmp_path / "limits.toml").write_text('[flips]\nlimit = 0.005\nreason = "a test"')
    code = _export(tmp_path, "--precision", "int8", "--limits", str(tmp_path / "limits.toml"))
    assert code == ExitCode.GATE and _left(tmp_path) == []
    said = capsys.readouterr().err
    assert "--fallback" in said and "gate: flips " in said and "limit 0.5 %" in said
    assert said.count("float32 scales: fail") == 1  # and the less precise form is not looked at
    assert "float16 scales" not in said


@pytest.mark.long
@pytest.mark.usefixtures("fewer_phantoms")
def test_a_limit_of_ones_own_is_what_fails(tmp_path, capsys):
    (tmp_path / "limits.toml").write_text('[flips]\nlimit = 0.0001\nreason = "a test"')
    code = _export(tmp_path, "--precision", "int8", "--limits", str(tmp_path / "limits.toml"))
    assert code == ExitCode.GATE and _left(tmp_path) == []
    assert "--fallback" in (said := capsys.readouterr().err) and "limit 0.01 %" in said


LIMITS = {
    "a plain number": ("flips = 0.02", "flips: expected a table"),
    "a plain number beside a table": (WIDER.replace("[flips]", "cc = 1\n[flips]"), "cc: expected"),
    "no reason": ("[flips]\nlimit = 0.02", "flips: expected a table"),
    "no words": ('[flips]\nlimit = 0.02\nreason = " "', "flips: expected a table"),
    "a number for words": ("[flips]\nlimit = 0.02\nreason = 5", "flips: expected a table"),
    "no limit of that name": ('[reasons]\nlimit = 1\nreason = "a"', "reasons: expected a table"),
    "an empty reason": ('[flips]\nlimit = 0.02\nreason = ""', "why so much may be lost"),
    "no limit": ('[flips]\nreason = "why"', "flips: expected a table"),
    "more": ('[flips]\nlimit = 0.02\nreason = "a"\nseed = 1', "flips: expected a table"),
    "no such quantity": ('[auc]\nlimit = 0.02\nreason = "why"', "auc"),
    "a limit beyond its range": ('[flips]\nlimit = 2\nreason = "why"', "flips"),
    "a limit that is no number": ('[flips]\nlimit = "a"\nreason = "why"', "flips"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_without_a_reason_and_limits_that_are_none_are_refused(tmp_path, name):
    text, said = LIMITS[name]
    (tmp_path / "limits.toml").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_limits(tmp_path / "limits.toml")


def test_every_limit_can_be_given_with_its_reason(tmp_path):
    assert read_limits(None) == Limits()
    names = [name for name in Limits.model_fields if name != "reasons"]
    tables = [f'[{n}]\nlimit = 0.0{i}\nreason = "why {n}"\n' for i, n in enumerate(names, 1)]
    (tmp_path / "limits.toml").write_text("".join(tables))
    found = read_limits(tmp_path / "limits.toml")
    assert names == ["macro_auc", "cc", "flips", "sensitivity", "specificity", "brier"]
    assert [getattr(found, name) for name in names] == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    assert found.reasons == {name: f"why {name}" for name in names}


@pytest.mark.usefixtures("fewer_phantoms")
def test_limits_that_are_refused_cost_no_export(tmp_path, capsys):
    (tmp_path / "limits.toml").write_text("flips = 0.02")
    code = _export(tmp_path, "--precision", "fp16", "--limits", str(tmp_path / "limits.toml"))
    assert code == ExitCode.USAGE and "expected a table" in capsys.readouterr().err
    assert _left(tmp_path) == []


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


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A set of plain phantoms: 40 to calibrate, 35 to validate, 20 to gate."""
    folder = tmp_path_factory.mktemp("phantoms") / "set"
    write_phantom_set(folder, {"train": 40, "val": 35, "test": 20}, first_seed=99_000)
    return folder


VALIDATIONS = {
    "the set's gate is its validation": ["--gate-split", "val", "--validation", "{}"],
    "another split's": ["--validation", "{}", "--validation-split", "test"],
    "all films are the gate's": ["--gate-split", "all", "--validation", "{}"],
}


@pytest.mark.long
@pytest.mark.parametrize("name", VALIDATIONS)
def test_validation_patients_in_the_gates_set_are_refused(tmp_path, phantoms, capsys, name):
    more = [word.format(phantoms) for word in VALIDATIONS[name]]
    code = _export(tmp_path, "--precision", "fp16", "--gate", str(phantoms), *more)
    assert code == ExitCode.DATA and _left(tmp_path) == []
    count = 20 if "test" in more else 35
    said = capsys.readouterr().err
    assert f"{count} patients and {count} films of the validation are also in the gate's" in said


def test_the_calibrations_validation_split_is_held_apart_from_the_gate_too(
    tmp_path, phantoms, capsys
):
    more = ["--gate", str(phantoms), "--gate-split", "val", "--calibration", str(phantoms)]
    assert _export(tmp_path, "--precision", "int8", *more) == ExitCode.DATA
    assert "35 patients and 35 films of the validation" in capsys.readouterr().err
    assert _left(tmp_path) == []


@pytest.mark.long
@pytest.mark.usefixtures("fewer_phantoms")
def test_few_calibration_films_are_warned_of(tmp_path, capsys):
    arguments = ["--precision", "int8", "--calibration-films", "8", "--no-gate"]
    assert _export(tmp_path, *arguments) == 0
    assert "8 calibration films are few" in capsys.readouterr().err
    manifest = Bundle.open(tmp_path / "out" / "demo-int8.cxrgaze").manifest
    assert manifest.gate.verdict == "not_gated" and manifest.calibration.warnings
    assert REFERENCE not in {record.path for record in manifest.files}


@pytest.mark.slow
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
        facts = replace(found.facts, validated_on_phantoms=False)
        return replace(found, spec=spec, facts=facts)

    monkeypatch.setattr(network_source, "source_from_checkpoint", source)


def _manifest_of(tmp_path, *arguments):
    assert _export(tmp_path, "--no-gate", *arguments) == 0
    (name,) = _left(tmp_path)
    return Bundle.open(tmp_path / "out" / name)


@pytest.mark.usefixtures("clinical")
def test_without_validation_films_the_networks_own_decision_stays_and_is_said_so(tmp_path, card):
    manifest = _manifest_of(tmp_path, "--precision", "fp16").manifest
    assert manifest.decision == manifest.reference_decision == card.decision
    assert manifest.decision_from == "the float32 network's"


@pytest.mark.usefixtures("clinical")
def test_a_set_with_too_few_validation_films_is_said(tmp_path, phantoms, card):
    more = ["--validation", str(phantoms), "--validation-split", "test"]
    manifest = _manifest_of(tmp_path, "--precision", "fp16", *more).manifest
    assert manifest.decision == manifest.reference_decision == card.decision
    assert manifest.decision_from == "the float32 network's: 20 validation films are too few"


@pytest.mark.long
@pytest.mark.usefixtures("clinical")
def test_the_calibrations_validation_split_is_what_int8_is_fitted_on(tmp_path, phantoms, card):
    more = ["--calibration", str(phantoms), "--target", "cpu", "--precision", "int8"]
    bundle = _manifest_of(tmp_path, *more)
    found = bundle.manifest
    films = gate.named_set(LabelledSet.open(phantoms), found.spec, "phantom", "val")
    assert found.decision == _refitted(bundle, found.served, films) != card.decision
    assert found.decision_from == f"fitted on 35 films of this graph: {films.name}"
    assert found.reference_decision == card.decision


@pytest.mark.long
@pytest.mark.usefixtures("clinical")
def test_a_calibration_set_without_validation_films_leaves_the_decision(tmp_path, card):
    write_phantom_set(tmp_path / "set", {"train": 40}, first_seed=99_500)
    more = ["--calibration", str(tmp_path / "set"), "--target", "cpu", "--precision", "int8"]
    manifest = _manifest_of(tmp_path, *more).manifest
    assert manifest.decision == card.decision
    assert manifest.decision_from == "the float32 network's"


def _looks(folder):
    path = folder / LOOKS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.long
def test_a_gate_on_films_of_a_sets_test_is_a_line_in_its_log(tmp_path, phantoms, card):
    folder = shutil.copytree(phantoms, tmp_path / "set", ignore=shutil.ignore_patterns(LOOKS))
    apart = ["--gate", str(folder), "--precision", "fp16"]
    for count, split in enumerate(("test", "all"), start=1):
        code = _export(tmp_path, *apart, "--gate-split", split)
        assert code == ExitCode.INCONCLUSIVE
        assert len(_looks(folder)) == count
    assert _export(tmp_path, *apart, "--gate-split", "val") == ExitCode.INCONCLUSIVE
    looks = _looks(folder)
    assert len(looks) == 2  # that of validation films is none
    for look in looks:
        assert look["what"] == "gate of fp16, target tensorrt" and look["model"] == "demo"
        assert look["model_sha256"] == card.weights_sha256
        assert look["split_sha256"] == LabelledSet.open(folder).info.split_sha256


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
