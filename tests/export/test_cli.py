"""cxrgaze-export as a user runs it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import cxrgaze
from cxrgaze.bundles.bundle import Bundle
from cxrgaze.errors import ExitCode
from cxrgaze.export import cli
from cxrgaze.train import checkpoint, shipped


def test_the_manifest_records_what_was_made(bundles):
    half, full = (Bundle.open(bundles / f"demo-{p}.cxrgaze").manifest for p in ("fp16", "fp32"))
    assert (half.precision, half.target, half.opset) == ("fp16", "tensorrt", 18)
    assert half.ir_version <= 10 and half.float32_nodes == 8 and full.float32_nodes == 0
    assert half.parity.verdict == "pass" and half.parity.films == 32
    assert half.gate.verdict == "pass" and full.gate.verdict == "pass"
    assert (
        half.provenance.checkpoint_sha256
        == checkpoint.load(checkpoint.demo_path())[1].weights_sha256
    )
    assert "phantom" in half.provenance.trained_on
    report = (bundles / "demo-fp16.cxrgaze/report/parity.md").read_text()
    assert "not a medical device" in report and "drawings" in report


@pytest.mark.long
def test_an_own_checkpoint_films_and_target(tmp_path, films, capsys):
    for suffix in (".safetensors", ".json", ".seen", ".prior"):
        source = checkpoint.demo_path().with_suffix(suffix)
        (tmp_path / f"mine{suffix}").write_bytes(source.read_bytes())
    arguments = [str(tmp_path / "mine.safetensors"), "--precision", "fp16", "--target", "cpu"]
    arguments += ["--output", str(tmp_path / "my.cxrgaze"), "--films", str(films)]
    assert cli.main(arguments) == 0
    manifest = Bundle.open(tmp_path / "my.cxrgaze").manifest
    assert manifest.target == "cpu" and manifest.parity.films == 8
    assert manifest.provenance.checkpoint == "mine.safetensors"
    out = capsys.readouterr()
    assert f"cxrgaze-predict {tmp_path / 'my.cxrgaze'}" in out.out
    assert "[8] write and verify the bundle" in out.err and "not a medical device" in out.err


@pytest.mark.long
def test_random_weights_are_marked_in_every_reading(tmp_path, films):
    arguments = ["--variant", "tiny", "--random-weights", "--precision", "fp16"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    with cxrgaze.load(tmp_path / "tiny-random-fp16.cxrgaze") as reader:
        reading = reader.read(films / "nih_00001507_002_512.png")
    assert reading.model["gate"] == "not_gated"
    assert any("Untrained" in warning for warning in reading.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_paper_exports_and_reads_a_film(tmp_path, films, precision):
    arguments = ["--variant", "paper", "--random-weights", "--precision", precision]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    with cxrgaze.load(tmp_path / f"paper-random-{precision}.cxrgaze") as reader:
        reading = reader.read(films / "dcm_RG1_J2KI_mono1_15bit.dcm")
    assert reading.heatmap().shape == (1955, 1841)


def test_export_replaces_an_older_bundle_and_nothing_else(tmp_path):
    target = tmp_path / "demo-fp32.cxrgaze"
    assert cli.main(["--output", str(tmp_path)]) == 0
    first = Bundle.open(target).sha256
    time.sleep(1.1)  # the manifest's time stamp has seconds
    assert cli.main(["--output", str(tmp_path)]) == 0
    assert Bundle.open(target).sha256 != first and os.listdir(tmp_path) == [target.name]
    (tmp_path / "mine.cxrgaze").mkdir()
    (tmp_path / "mine.cxrgaze" / "thesis.txt").write_text("years of work")
    assert cli.main(["--output", str(tmp_path / "mine.cxrgaze")]) == ExitCode.USAGE
    assert (tmp_path / "mine.cxrgaze" / "thesis.txt").read_text() == "years of work"


def _broken(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 64)
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "file").write_text("")
    black = np.zeros((64, 64), np.uint8)
    Image.fromarray(black).save(tmp_path / "black.png")


REFUSED = {
    "a name that does not ship": (["edgy"], 2, "demo and edge are"),
    "the paper's network by name": (["paper"], 2, "--variant paper --random-weights"),
    "a path without that file": (["./edge"], 2, "does not exist"),
    "no such checkpoint": (["no.safetensors"], 2, "does not exist"),
    "a broken checkpoint": (["bad.safetensors"], 7, "schema version None"),
    "an unwritable output": (["--output", "file/below"], 2, "cannot write"),
    "variant alone": (["--variant", "paper"], 2, "go together"),
    "random weights alone": (["--random-weights"], 2, "go together"),
    "both sources": (["bad.safetensors", "--variant", "tiny", "--random-weights"], 2, "not both"),
    "no such films": (["--films", "none"], 2, "does not exist"),
    "a film that shows nothing": (["--films", "black.png"], 11, "no content"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_its_code_and_leaves_nothing(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    _broken(tmp_path)
    before = sorted(os.listdir(tmp_path))
    arguments, code, message = REFUSED[name]
    assert cli.main(arguments) == code
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "arguments", [["--threads", "0"], ["--seed", "99999999999999999999"], ["--seed", "-1"]]
)
def test_numbers_are_bounded(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == ExitCode.USAGE and "expected" in capsys.readouterr().err


def test_a_name_is_what_ships_and_a_path_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edge").write_text("a file of that name")
    assert cli._checkpoint("edge") == checkpoint.demo_path().with_name("edge.safetensors")
    assert cli._checkpoint("./edge").samefile(tmp_path / "edge")
    assert cli._checkpoint(None) == cli._checkpoint("demo") == checkpoint.demo_path()


@pytest.mark.slow
def test_a_network_that_ships_is_exported_by_name(tmp_path):
    arguments = ["edge", "--precision", "fp16", "--no-gate", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    manifest = Bundle.open(tmp_path / "edge-fp16.cxrgaze").manifest
    card = checkpoint.load(shipped.networks()["edge"])[1]
    assert manifest.provenance.checkpoint_sha256 == card.weights_sha256
    assert manifest.spec.variant == "edge"


def test_the_list_agrees_with_the_cards_and_needs_no_torch():
    code = """
import sys
for name in ("torch", "safetensors", "onnx", "numpy"):
    sys.modules[name] = None
from cxrgaze.export.cli import main
sys.exit(main(["--list"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == "name variant canvas checkpoint trained on export".split()
    assert len(lines) == 2 + len(shipped.networks())
    for line, (name, path) in zip(lines[1:], shipped.networks().items(), strict=False):
        card = checkpoint.load(path)[1]
        canvas, size = f"{card.spec.height}x{card.spec.width}", path.stat().st_size / 1e6
        assert line.split()[:5] == [name, card.spec.variant, canvas, f"{size:.2f}", "MB"]
        assert card.name == name and card.trained_on in line
        assert line.endswith(f"cxrgaze-export {name} --precision fp16")


def test_an_unknown_variant_points_to_the_trained_network(capsys):
    for text, hint in (("edge", "cxrgaze-export edge"), ("huge", "--list")):
        with pytest.raises(SystemExit) as caught:
            cli.main(["--variant", text, "--random-weights"])
        assert caught.value.code == ExitCode.USAGE
        assert "paper or tiny" in (err := capsys.readouterr().err) and hint in err


def test_an_unknown_precision_lists_those_that_exist(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--precision", "fp8"])
    assert caught.value.code == ExitCode.USAGE
    assert "fp32" in (err := capsys.readouterr().err) and "fp16" in err


MOMENTS = (
    "load torch",
    "load the checkpoint",
    "read parity films",
    "export to ONNX",
    "the gate's films",
    "audit",
    "typ",
    "parity and gate",
)
QUICK = (("parity and gate", signal.SIGTERM),)


@pytest.mark.parametrize(
    "moment,number",
    [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in itertools.product(MOMENTS, (signal.SIGINT, signal.SIGTERM))
    ],
)
def test_an_interrupted_export_leaves_nothing_and_the_old_bundle_untouched(
    bundles, tmp_path, interrupted, number, moment
):
    import shutil

    old = shutil.copytree(bundles / "demo-fp16.cxrgaze", tmp_path / "demo-fp16.cxrgaze")
    before = Bundle.open(old).sha256
    command = ["--precision", "fp16", "--output", tmp_path]
    code, said = interrupted("cxrgaze.export.cli", command, moment, number)
    assert code == ExitCode.INTERRUPTED, said
    assert os.listdir(tmp_path) == [old.name]
    Bundle.open(old).verify()
    assert Bundle.open(old).sha256 == before


@pytest.mark.long
def test_the_golden_input_is_a_phantom_and_nothing_of_a_film_is_stored(bundles, films, tmp_path):
    arguments = ["--output", str(tmp_path), "--films", str(films)]
    assert cli.main(arguments) == 0
    from cxrgaze.runtime.reader import read_golden

    ours, plain = (
        read_golden(Bundle.open(folder / "demo-fp32.cxrgaze")) for folder in (tmp_path, bundles)
    )
    assert np.array_equal(ours["image"], plain["image"])
    text = json.dumps(Bundle.open(tmp_path / "demo-fp32.cxrgaze").manifest.model_dump(mode="json"))
    assert "nih_" not in text
