"""Other ways to run the same weights: what they find is the network, what is missing says so."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from cxrgaze.benchmarks import peers, sweep
from cxrgaze.benchmarks.record import Config
from cxrgaze.bundles.bundle import Bundle
from cxrgaze.errors import UsageError
from cxrgaze.evidence import gate
from cxrgaze.export import cli as export_cli
from cxrgaze.export.network_source import source_from_random

CONFIG = Config(samples=1, warmup_seconds=0, seconds=1, threads=1, cold_starts=1, after_idle=1)


@pytest.fixture(scope="module")
def opened(bundles):
    return [Bundle.open(bundles / f"demo-{precision}.cxrgaze") for precision in ("fp32", "fp16")]


@pytest.fixture(scope="module")
def weights(opened):
    return peers.weights_of(opened[0], None, 1)


@pytest.fixture(scope="module")
def images(weights):
    return gate.phantom_set(weights.source.spec, 8, 5_000_000).arrays.images


def _measure(weights, opened, images, names, **patches):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "ACCURACY_FILMS", 150)
        for name, value in patches.items():
            patch.setattr(peers, name, value)
        asked = peers.contenders(weights, opened, "auto", names)
        rows = peers.measure(weights, asked, images, CONFIG)
    return {row.name: row for row in rows}


@pytest.mark.slow
def test_all_ways_compute_the_network(weights, opened, images):
    rows = _measure(weights, opened, images, ["runtime", "eager", "channels", "openvino fp32"])
    assert list(rows)[:2] == [
        "cxrgaze fp32, target tensorrt (demo-fp32)",
        "cxrgaze fp16, target tensorrt (demo-fp16)",
    ]
    first, half, *others = rows.values()
    assert first.ratio is None and half.ratio.rounds >= 1
    for row in (first, *others):
        if row.not_measured and "not installed" in row.not_measured:
            continue
        assert row.latency.count == row.ratio.rounds * 5 if row.ratio else row.latency.count
        assert row.accuracy.logits_max < 1e-3 and row.accuracy.flips == 0
        assert row.accuracy.agreement_cc_min > 0.99999
    assert 1e-4 < half.accuracy.logits_max < 0.2 and half.accuracy.agreement_cc_min > 0.995
    assert {row.accuracy.set_name.split(",")[0] for row in (first, half)} == {
        "150 phantoms at difficulty 0.57"
    }


@pytest.mark.slow
def test_every_way_runs_here_and_its_losses_are_known(weights, opened, images):
    rows = _measure(weights, opened, images, [])
    missing = {name for name, row in rows.items() if row.not_measured}
    assert len(rows) == 13 and all("TensorRT" in name for name in missing)
    least = {"int8": 0.5, "bf16": 0.9, "bfloat16": 0.9, "fp16": 0.999}
    for name, row in ((n, r) for n, r in rows.items() if n not in missing):
        floor = next((cc for part, cc in least.items() if part in name), 0.99999)
        assert row.accuracy.agreement_cc_min > floor, name


def test_what_is_not_installed_or_fails_is_a_row(weights, opened, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)

    def broken(network, device):
        raise RuntimeError("no compiler\nin 7 lines")

    rows = _measure(weights, opened[:1], images, ["openvino fp32", "compile"], _compiled=broken)
    assert "(the extra 'peers')" in rows["OpenVINO fp32"].not_measured
    compiled = rows[next(name for name in rows if "compile" in name)]
    assert compiled.not_measured == "does not run here: no compiler"
    assert compiled.latency is None and compiled.accuracy is None


def test_a_way_that_computes_something_else_is_seen(weights, opened, images):
    def swapped(network, device):
        def forward(image):
            found = network(image)
            return {**found, "logits": found["logits"].flip(1)}

        return forward

    rows = _measure(weights, opened[:1], images, ["eager"], _eager=swapped)
    (row,) = list(rows.values())[1:]
    # The reference is made by the same function: it is swapped, and so the bundle is off.
    first = next(iter(rows.values()))
    assert row.accuracy.flips == 0 and first.accuracy.flips > 10
    assert first.accuracy.verdict == "fail"


def test_weights_that_are_not_the_bundles_are_refused(opened, tmp_path):
    from cxrgaze.train.checkpoint import demo_path

    with pytest.raises(UsageError, match="is not the checkpoint of"):
        peers.weights_of(opened[0], demo_path().with_name("edge.safetensors"), 1)
    provenance = opened[0].manifest.provenance.model_copy(update={"checkpoint": "mine.safetensors"})
    manifest = opened[0].manifest.model_copy(update={"provenance": provenance})
    foreign = Bundle(opened[0].path, manifest, opened[0].sha256)
    with pytest.raises(UsageError, match="--checkpoint mine.safetensors"):
        peers.weights_of(foreign, None, 1)


@pytest.mark.long
def test_random_weights_are_made_again(tmp_path, opened):
    arguments = ["--variant", "tiny", "--random-weights", "--seed", "3", "--output", str(tmp_path)]
    assert export_cli.main(arguments) == 0
    bundle = Bundle.open(tmp_path / "tiny-random-fp32.cxrgaze")
    source = peers.weights_of(bundle, None, 1).source
    assert source.facts.sha256 == bundle.manifest.provenance.checkpoint_sha256
    with pytest.raises(UsageError, match="same weights"):
        peers.require_same([opened[0], bundle])


def test_random_weights_have_no_accuracy(tmp_path, images):
    source = source_from_random("tiny", 0)

    def infer(image):
        return {"logits": np.ones((1, 3), np.float32), "log_density": image * 0}

    one = peers._Open(infer, 0.0, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "ACCURACY_FILMS", 4)
        found = peers._accuracies(peers.Weights(source, 1), {"one": one}, 1.0)["one"]
    assert (found.verdict, found.macro_auc_loss, found.cc_loss) == ("not_gated", None, None)


@pytest.mark.slow
def test_sweeps_have_a_point_a_value_and_a_floor(weights, images):
    spec = weights.source.spec
    wanted = sweep.asked(["batch=1,2", "threads", "canvas=32x64", "precision"], spec, 2)
    assert wanted["threads"] == ("1", "2") and wanted["precision"] == ("fp32", "fp16", "int8")
    found = {s.name: s.points for s in sweep.measure(weights, wanted, 0.1)}
    one, two = found["batch"]
    assert two.cost == pytest.approx(2 * one.cost) and two.floor_ms > one.floor_ms / 2
    (half,) = found["canvas"]
    assert half.cost == pytest.approx(one.cost / 2, rel=0.1)
    assert [point.at for point in found["precision"]] == ["fp32", "fp16", "int8"]
    assert all(p.latency.count >= 3 and p.floor_ms > 0 for points in found.values() for p in points)
