"""A proof at engine level on a processor: what was built, what it loses, and what is then said."""

from __future__ import annotations

import io

import numpy as np
import pytest

import cxrgaze
from cxrgaze.bundles.bundle import GRAPH, REFERENCE, Bundle, fill_bundle
from cxrgaze.engines import cli
from cxrgaze.errors import ExitCode, IncompatibleError
from cxrgaze.runtime import plans, proofs

pytest.importorskip("openvino", reason="needs the extra 'openvino'")
FILM = "nih_00001507_002_512.png"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CXRGAZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _build(bundle, *options):
    return cli.main([str(bundle), "--device", "openvino", *options])


def _proofs(cache):
    return sorted(cache.glob(f"*{proofs.SUFFIX}"))


def test_a_proof_is_made_kept_and_said_in_every_reading(bundles, films, cache, capsys):
    path = bundles / "demo-fp16.cxrgaze"
    assert _build(path) == ExitCode.OK
    said = capsys.readouterr().out
    assert "built    proven" in said and "gate     not measured here" in said
    with cxrgaze.load(path, "openvino") as reader:
        assert reader.read(films / FILM).model["gate"] == "not_gated"

    assert _build(path, "--gate", "phantom") == ExitCode.OK
    said = capsys.readouterr().out
    assert "no plan" in said and "gate     pass at engine level" in said
    (kept,) = _proofs(cache)
    assert oct(cache.stat().st_mode)[-3:] == "700"
    with cxrgaze.load(path) as reader:
        reading = reader.read(films / FILM)
    assert reading.model["backend"] == "openvino"
    assert (reading.model["gate"], reading.model["gate_level"]) == ("pass", "engine")
    assert reading.model["proof"] == kept.stem
    assert not any("gate" in warning or "proven" in warning for warning in reading.warnings)

    assert _build(path) == ExitCode.OK  # without films the verdict of before is kept
    assert "gate     pass" in capsys.readouterr().out
    bundle = Bundle.open(path)
    record = proofs.find(
        plans.Cache(cache),
        proofs.inputs_here(bundle.sha256, "openvino", reading.model["library"].split()[1], "CPU"),
    )
    assert record.gate.comparison.patients == 1000 and "synthetic" in record.gate.set_name


def _changed(folder, bundle, files, **changes):
    folder.mkdir()
    every = {record.path: bundle.read(record.path) for record in bundle.manifest.files}
    return fill_bundle(folder, bundle.manifest.model_copy(update=changes), every | files)


@pytest.mark.long
def test_a_loss_is_exit_5_and_nothing_is_served_by_it_from_then_on(
    bundles, films, cache, tmp_path, capsys
):
    """The stored reference says the opposite of every film."""
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    stored = dict(np.load(io.BytesIO(bundle.read(REFERENCE))))
    data = io.BytesIO()
    np.savez(data, **{**stored, "logits": np.ascontiguousarray(stored["logits"][:, ::-1])})
    other = _changed(tmp_path / "other", bundle, {REFERENCE: data.getvalue()})
    assert _build(other.path, "--gate", "phantom") == ExitCode.GATE
    assert "will not be served by it here" in capsys.readouterr().err
    (kept,) = _proofs(cache)
    assert b'"fail"' in kept.read_bytes()
    with pytest.raises(IncompatibleError, match="fail"):
        cxrgaze.load(other.path, "openvino")
    with cxrgaze.load(other.path) as reader:
        assert reader.backend.name == "onnxruntime"


def test_another_precision_than_the_graph_promises_is_exit_3_and_no_proof(
    bundles, cache, tmp_path, capsys
):
    """A float32 graph in a bundle that promises int8."""
    bundle = Bundle.open(bundles / "demo-fp32.cxrgaze")
    work = sum(bundle.manifest.convolution_macs.values())
    manifest = {
        "precision": "int8",
        "target": "openvino",
        "convolution_macs": {"int8": work},
        "self_test": {"int8": bundle.manifest.self_test["float32"]},
    }
    other = _changed(tmp_path / "other", bundle, {GRAPH: bundle.read(GRAPH)}, **manifest)
    assert _build(other.path) == ExitCode.BUILD
    assert "another precision than the graph has" in capsys.readouterr().err
    assert not _proofs(cache)


@pytest.mark.parametrize(
    "options", [["--rebuild"], ["--sm", "86"], ["--batch", "4"], ["--tf32"], ["--gpu", "0"]]
)
def test_options_of_plans_are_refused(bundles, cache, options, capsys):
    assert _build(bundles / "demo-fp32.cxrgaze", *options) == ExitCode.USAGE
    assert f"{options[0]}: openvino has no plan" in capsys.readouterr().err
    assert not cache.exists()
