"""cxrgaze-predict as a user runs it: outputs, mixed input, exit codes."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import onnx
import pydicom
import pytest
from PIL import Image

import cxrgaze
from cxrgaze.bundles.bundle import GRAPH, MANIFEST, Bundle
from cxrgaze.bundles.manifest import FileRecord
from cxrgaze.bundles.served import Decision
from cxrgaze.errors import ExitCode
from cxrgaze.files import sha256
from cxrgaze.runtime import predict as predict_module
from cxrgaze.runtime.cli import main
from cxrgaze.spec import SPEC_KEY


@pytest.fixture
def bundle(bundles):
    return str(bundles / "demo-fp16.cxrgaze")


def test_files_per_film_and_a_table(bundle, films, tmp_path, capsys):
    assert main([bundle, str(films), "--output", str(tmp_path), "--heatmap", "npy"]) == 0
    with (tmp_path / "readings.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    read = [row for row in table if row["status"] == "read"]
    others = {os.path.basename(r["film"]): r["reason"] for r in table if r["status"] != "read"}
    assert len(read) == 8 and set(others) == {"ATTRIBUTION.md", "labels.csv"}
    assert all("neither DICOM nor PNG" in reason for reason in others.values())
    names = ("normal", "heart_failure", "pneumonia")
    columns = ["film", "status", "label", *(f"p_{n}" for n in names), *(f"flag_{n}" for n in names)]
    assert list(table[0])[: len(columns) + 2] == [*columns, "peak_x_px", "peak_y_px"]
    assert all(not row[f"flag_{n}"] for row in table if row not in read for n in names)
    for row in read:
        stem = os.path.splitext(os.path.basename(row["film"]))[0]
        record = json.loads((tmp_path / f"{stem}.json").read_text())
        assert record["label"] == row["label"]
        assert set(record["flags"]) == set(record["operating_points"]) == set(names)
        for name, raised in record["flags"].items():
            assert row[f"flag_{name}"] == str(int(raised))
            assert raised == (record["probabilities"][name] >= record["operating_points"][name])
        size = record["film_px"]
        heatmap = np.load(tmp_path / f"{stem}.heatmap.npy", allow_pickle=False)
        assert heatmap.shape == (size["height"], size["width"])
        assert heatmap.sum() == pytest.approx(1, abs=1e-3)
        assert cv2.imread(str(tmp_path / f"{stem}.overlay.png")) is not None
    out = capsys.readouterr()
    assert len(out.out.splitlines()) == 10
    assert "8 read, 0 not applicable, 0 failed, 2 skipped" in out.err
    assert "not a medical device" in out.err and "drawings" in out.err


def _changed(bundle, folder, **changes):
    """A copy of the bundle with another manifest, and its spec in the graph too."""
    copy = Path(shutil.copytree(bundle, folder / "changed.cxrgaze"))
    manifest = Bundle.open(copy).manifest.model_copy(update=changes)
    graph = onnx.load(copy / GRAPH)
    onnx.helper.set_model_props(graph, {SPEC_KEY: manifest.spec.model_dump_json()})
    data = graph.SerializeToString()
    (copy / GRAPH).write_bytes(data)
    made = FileRecord(path=GRAPH, size=len(data), sha256=sha256(data))
    records = tuple(made if record.path == GRAPH else record for record in manifest.files)
    manifest = manifest.model_copy(update={"files": records})
    (copy / MANIFEST).write_bytes(manifest.rendered())
    return str(copy)


def _columns(folder):
    with (folder / "readings.csv").open(newline="") as file:
        columns = next(csv.reader(file))
    return columns[2 : columns.index("reason")]


@pytest.mark.parametrize("kind", ["npy", "png16"])
def test_a_heatmap_of_a_network_without_a_map_is_refused(bundle, films, tmp_path, capsys, kind):
    film, out = str(films / "nih_00001507_002_512.png"), tmp_path / "out"
    without = _changed(bundle, tmp_path, untrained=("log_density",))
    assert main([without, film, "--output", str(out), "--heatmap", kind]) == ExitCode.USAGE
    assert f"--heatmap {kind}: demo-fp16 gives no map" in capsys.readouterr().err
    assert not out.exists()


def test_what_nothing_taught_has_no_column(bundle, films, tmp_path, capsys):
    film, out = str(films / "nih_00001507_002_512.png"), tmp_path / "out"
    changes = {"untaught": ("normal",), "untrained": ("log_density",)}
    without = _changed(bundle, tmp_path, **changes)
    assert main([without, film, "--output", str(out)]) == 0
    told = capsys.readouterr()
    assert "nothing taught the class normal: it is left out" in told.err
    assert "nothing taught the output log_density: it is left out" in told.err
    assert "peak" not in told.out and len(told.out.split("\t")) == 3
    names = ("heart_failure", "pneumonia")
    assert _columns(out) == ["label", *(f"p_{n}" for n in names), *(f"flag_{n}" for n in names)]


def test_findings_have_flags_and_no_label(bundle, films, tmp_path, capsys):
    film, out = str(films / "nih_00001507_002_512.png"), tmp_path / "out"
    spec = Bundle.open(Path(bundle)).manifest.spec.model_copy(update={"class_kind": "findings"})
    for raised, said in (({"normal": 0.0}, "normal"), ({"normal": 1.0}, "no flag")):
        decision = Decision(operating_points={"pneumonia": 1.0, **raised})
        folder = tmp_path / said
        folder.mkdir()
        decisions = {"decision": decision, "reference_decision": decision}
        changed = _changed(bundle, folder, spec=spec, **decisions)
        assert main([changed, film, "--output", str(out)]) == 0
        assert capsys.readouterr().out.split("\t")[1] == said
        record = json.loads((out / "nih_00001507_002_512.json").read_text())
        assert record["label"] is None and record["flags"]["normal"] == (said == "normal")
        names = ("normal", "heart_failure", "pneumonia")
        columns = [*(f"p_{n}" for n in names), "flag_normal", "flag_pneumonia"]
        assert _columns(out) == [*columns, "peak_x_px", "peak_y_px"]


def test_png16_and_json_lines(bundle, films, tmp_path, capsys):
    film = str(films / "nih_00001507_002_512.png")
    arguments = [bundle, film, "--output", str(tmp_path), "--heatmap", "png16", "--json"]
    assert main(arguments) == 0
    heatmap = cv2.imread(str(tmp_path / "nih_00001507_002_512.heatmap.png"), cv2.IMREAD_UNCHANGED)
    assert heatmap.dtype == np.uint16 and heatmap.max() == 65535 and heatmap.shape == (512, 512)
    assert json.loads(capsys.readouterr().out)["film"] == film


def test_one_bad_film_does_not_stop_the_rest(bundle, films, tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    good = films / "nih_00001507_002_512.png"
    shutil.copy(good, source / "b-good.png")
    (source / "a-cut.png").write_bytes(good.read_bytes()[:20_000])
    (source / "c-empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((90, 90), np.uint8)).save(source / "d-black.png")
    photo = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(photo).save(source / "e-photo.png")
    out = tmp_path / "out"
    assert main([bundle, str(source), "--output", str(out)]) == ExitCode.FAILURE
    with (out / "readings.csv").open(newline="") as file:
        status = {os.path.basename(row["film"]): row["status"] for row in csv.DictReader(file)}
    assert status == {
        "a-cut.png": "failed",
        "b-good.png": "read",
        "c-empty.png": "failed",
        "d-black.png": "not_applicable",
        "e-photo.png": "not_applicable",
    }
    assert sorted(p.name for p in out.glob("*.overlay.png")) == ["b-good.overlay.png"]
    assert json.loads((out / "e-photo.json").read_text())["reason"].startswith("colour image")
    assert "1 read, 2 not applicable, 2 failed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["black", "photo"])
def test_a_film_that_is_not_applicable_is_a_result(bundle, tmp_path, capsys, kind):
    rng = np.random.default_rng(0)
    pixels = np.zeros((90, 90), np.uint8) if kind == "black" else rng.integers(0, 255, (90, 90, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "f.png")
    assert main([bundle, str(tmp_path / "f.png"), "--output", str(tmp_path / "out")]) == 0
    assert "not_applicable" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["f.json", "readings.csv"]


def test_names_that_clash_are_told_apart(bundle, films, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shutil.copy(films / "nih_00001507_002_512.png", tmp_path / folder / "f.png")
    shutil.copy(films / "dcm_rg1q_12b_mono1_jpegll.dcm", tmp_path / "x" / "f.dcm")
    given = [str(tmp_path / "x"), str(tmp_path / "y" / "f.png")]
    assert main([bundle, *given, "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.overlay.png"))) == 3
    assert main([bundle, str(tmp_path), "--output", str(tmp_path / "tree")]) == 0
    assert (tmp_path / "tree" / "y" / "f.json").is_file()


def test_without_output_nothing_is_written(bundle, films, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([bundle, str(films / "nih_00001507_002_512.png")]) == 0
    assert not list(tmp_path.iterdir())


USAGE = {
    "no such film": (["BUNDLE", "no.png"], "does not exist"),
    "a folder without films": (["BUNDLE", "EMPTY"], "no films"),
    "no such bundle": (["no.cxrgaze", "FILM"], "does not exist"),
    "no bundle": (["EMPTY", "FILM"], "not a bundle"),
    "an unknown backend": (["BUNDLE", "FILM", "--device", "abacus"], "abacus"),
    "heatmap without output": (["BUNDLE", "FILM", "--heatmap", "npy"], "--output"),
    "an empty path": (["BUNDLE", "*nothing*"], "no file matches"),
    "a bad pattern": (["BUNDLE", "FILM**.png"], "cannot be searched"),
    "a path that is too long": (["BUNDLE", "x" * 5000], "cannot be searched"),
    "an unwritable output": (["BUNDLE", "FILM", "--output", "FILM/x"], "cannot write"),
}


@pytest.mark.parametrize("name", USAGE)
def test_what_cannot_be_carried_out_is_code_2_and_leaves_nothing(
    bundle, films, tmp_path, capsys, name, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    shutil.copy(films / "nih_00001507_002_512.png", tmp_path / "FILM")
    arguments, message = USAGE[name]
    assert main([bundle if a == "BUNDLE" else a for a in arguments]) == ExitCode.USAGE
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["EMPTY", "FILM"]


def test_an_interrupt_keeps_what_is_finished(bundle, films, tmp_path):
    """SIGINT in the middle of many films: code 130, a table of the finished ones, no torn file."""
    source = tmp_path / "in"
    source.mkdir()
    for index in range(300):
        os.link(
            shutil.copy(films / "nih_00001507_002_512.png", tmp_path / f"c{index}"),
            source / f"{index:03d}.png",
        )
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cxrgaze.runtime.cli",
            bundle,
            str(source),
            "--output",
            str(tmp_path / "out"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "002.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED, err
    with (tmp_path / "out" / "readings.csv").open(newline="") as file:
        done = list(csv.DictReader(file))
    assert 3 <= len(done) < 300
    assert not list((tmp_path / "out").glob("*.part"))
    written = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert written == {Path(row["film"]).stem for row in done}
    assert {p.name.split(".")[0] for p in (tmp_path / "out").glob("*.overlay.png")} == written


def _without_times(folder):
    """What was written of a folder's films, but for how long it took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            content.pop("timings_ms", None)
            found[path.name] = content
        elif path.is_file():
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_threads_change_no_reading_and_no_order(bundles, films, tmp_path, capsys, precision):
    """One film at a time on one thread, and four in as many: the same bytes, the same lines."""
    bundle = str(bundles / f"demo-{precision}.cxrgaze")
    source = tmp_path / "in"
    source.mkdir()
    for index in range(3):
        for film in sorted(films.glob("*.png")):
            shutil.copy(film, source / f"{index}-{film.name}")
    (source / "0-damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    said = []
    for threads in ("1", "4"):
        out = tmp_path / threads
        command = [bundle, str(source), "--device", "onnxruntime", "--output", str(out)]
        assert main([*command, "--threads", threads]) == ExitCode.FAILURE
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].count("\n") == 13
    assert _without_times(tmp_path / "1") == _without_times(tmp_path / "4")


def test_without_overlays_all_else_is_there(bundle, films, tmp_path):
    for name, more in (("with", []), ("without", ["--no-overlay"])):
        command = [bundle, str(films), "--output", str(tmp_path / name), "--heatmap", "npy"]
        assert main([*command, *more]) == ExitCode.OK
    full, less = (_without_times(tmp_path / name) for name in ("with", "without"))
    overlays = {name for name in full if name.endswith(".overlay.png")}
    assert len(overlays) == 8 and less == {n: v for n, v in full.items() if n not in overlays}


def test_a_full_disk_ends_the_run_with_a_table_of_what_was_written(
    bundle, films, tmp_path, monkeypatch, capsys
):
    written = []
    ours = predict_module.write_atomic

    def filling(path, data):
        if path.suffix == ".json" and len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.extend([path] if path.suffix == ".json" else [])
        ours(path, data)

    monkeypatch.setattr(predict_module, "write_atomic", filling)
    assert main([bundle, str(films), "--output", str(tmp_path / "out")]) != ExitCode.OK
    assert "No space left" in capsys.readouterr().err
    with (tmp_path / "out" / "readings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and len(list((tmp_path / "out").glob("*.json"))) == 3


@pytest.mark.parametrize("threads", ["0", "-1", "two", "99999999999"])
def test_threads_are_bounded(bundle, films, capsys, threads):
    with pytest.raises(SystemExit) as caught:
        main([bundle, str(films), "--threads", threads])
    assert caught.value.code == ExitCode.USAGE and "expected 1 to 1024" in capsys.readouterr().err


def test_an_input_is_never_written_over(bundle, films, tmp_path, capsys):
    shutil.copy(films / "nih_00001507_002_512.png", tmp_path / "a.png")
    shutil.copy(films / "nih_00005638_000_512.png", tmp_path / "a.overlay.png")
    before = (tmp_path / "a.overlay.png").read_bytes()
    assert main([bundle, str(tmp_path), "--output", str(tmp_path)]) == ExitCode.USAGE
    assert "is one of the films" in capsys.readouterr().err
    assert (tmp_path / "a.overlay.png").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.overlay.png", "a.png"]


def test_odd_names_do_not_stop_the_others(bundle, films, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    good = films / "nih_00001507_002_512.png"
    for name in ("a" * 245 + ".png", "ok.png", "bad\udcff.png", "n\u00e4me with space.png"):
        shutil.copy(good, source / name)
    out = tmp_path / "out"
    assert main([bundle, str(source), "--output", str(out)]) == ExitCode.FAILURE
    with (out / "readings.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["status"] for row in table] == ["failed", "read", "read", "read"]
    assert "File name too long" in table[0]["reason"] and "\\udcff" in table[1]["film"]
    assert len(list(out.glob("*.overlay.png"))) == 3


def test_a_film_of_nan_is_a_failure_among_others(bundle, films, tmp_path):
    """A window that makes NaN must not end the run."""
    import struct

    shutil.copy(films / "nih_00001507_002_512.png", tmp_path / "ok.png")
    pixels = np.full((64, 64), np.nan, "<f4")
    tags = [(256, 64), (257, 64), (258, 32), (259, 1), (262, 1), (273, 8 + 2 + 120 + 4), (277, 1)]
    tags += [(278, 64), (279, pixels.nbytes), (339, 3)]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    (tmp_path / "nan.tif").write_bytes(head + body + bytes(4) + pixels.tobytes())
    assert main([bundle, str(tmp_path), "--output", str(tmp_path / "out")]) == ExitCode.FAILURE
    assert (tmp_path / "out" / "ok.overlay.png").is_file()


def test_a_uid_is_not_cut_at_its_last_point():
    from pathlib import Path

    from cxrgaze.runtime.predict import _output_names

    given = [Path("1.2.840.5"), Path("a/f.PNG"), Path("a/f.dcm"), Path("g.dcm")]
    assert list(map(str, _output_names(given))) == ["1.2.840.5", "a/f.PNG", "a/f.dcm", "g"]


def test_naming_many_films_is_fast_enough_to_finish():
    """Linear: 200,000 names with clashes; the quadratic form needed hours."""
    from pathlib import Path

    from cxrgaze.runtime.predict import _output_names

    names = _output_names([Path(f"{i // 2}.{('png', 'dcm')[i % 2]}") for i in range(200_000)])
    assert len(set(names)) == 200_000
    alike = _output_names([Path("film.png")] * 50_000)  # D11: 8,000 of one name took 118 s
    assert len(set(alike)) == 50_000
    assert [str(n) for n in alike[:3]] == ["film.png", "film.png-2", "film.png-3"]


def test_what_an_earlier_run_left_of_a_film_goes(bundle, films, tmp_path):
    """D9: a film that failed this time kept the overlay of the last."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    shutil.copy(films / "nih_00001507_002_512.png", source / "f.png")
    arguments = [bundle, str(source), "--output", str(out), "--heatmap", "npy"]
    assert main(arguments) == 0
    (source / "f.png").write_bytes((source / "f.png").read_bytes()[:900])
    assert main(arguments) == ExitCode.FAILURE
    assert sorted(os.listdir(out)) == ["f.json", "readings.csv"]
    assert json.loads((out / "f.json").read_text())["status"] == "failed"


def test_a_second_run_into_the_same_folder_is_refused(bundle, films, tmp_path, capsys):
    """D9."""
    from cxrgaze.files import only_run

    film = str(films / "nih_00001507_002_512.png")
    with only_run(tmp_path):
        assert main([bundle, film, "--output", str(tmp_path)]) == ExitCode.USAGE
    assert "another run writes into" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_names_cannot_steer_the_terminal(bundle, films, tmp_path, capsys):
    """D12: escape codes and newlines forged lines."""
    name = "x\x1b[2J\nother.png\tnormal\t1.000.png"
    shutil.copy(films / "nih_00001507_002_512.png", tmp_path / name)
    (tmp_path / f"cut{name}").write_bytes(b"\x89PNG\r\n")
    assert main([bundle, str(tmp_path)]) == ExitCode.FAILURE
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "\x1b" not in out + err
    assert "\\x1b[2J\\nother" in out and "\\x1b[2J\\nother" in err


def test_load_isolates_where_it_is_asked_to(bundle, films):
    with cxrgaze.load(bundle, isolate=True) as reader, cxrgaze.load(bundle) as plain:
        film = films / "nih_00001507_002_512.png"
        assert reader._loader is not None and plain._loader is None
        assert np.array_equal(reader.read(film).log_density, plain.read(film).log_density)
        worker = reader._loader._nursery.worker
        assert worker
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def _all_of(folder, bundle, tmp_path, capsys):
    """Every file below a folder through `--isolate --force`: how many of each status."""
    arguments = [bundle, str(folder), "--isolate", "--force", "--output", str(tmp_path / "out")]
    assert main(arguments) in (0, 1)
    with (tmp_path / "out" / "readings.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert all(row["reason"] for row in table if row["status"] != "read")
    told = capsys.readouterr().err
    assert "died" not in told and "report it" not in told and "Traceback" not in told
    return len(table), Counter(row["status"] for row in table)


def test_whatever_pydicom_tests_with_is_read_or_refused_with_a_reason(bundle, tmp_path, capsys):
    folder = Path(pydicom.__file__).with_name("data") / "test_files"
    files = [path for path in folder.rglob("*") if path.is_file()]
    listed, count = _all_of(folder, bundle, tmp_path, capsys)
    assert listed == len(files) and count["read"] >= 50


@pytest.mark.slow
def test_whatever_pydicom_data_holds_is_read_or_refused_with_a_reason(bundle, tmp_path, capsys):
    data = pytest.importorskip("data_store", reason="needs: pip install pydicom-data")
    folder = Path(next(iter(data.__path__)))
    _, count = _all_of(folder, bundle, tmp_path, capsys)
    assert count["read"] >= 50  # the samples of NEMA's WG-04 among them
