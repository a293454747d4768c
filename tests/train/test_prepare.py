"""cxrgaze-train prepare: a labelled set from a folder of films."""

from __future__ import annotations

import csv

import numpy as np
import pydicom
import pytest
from PIL import Image

from cxrgaze.errors import DataError, ExitCode
from cxrgaze.evidence import phantom
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.class_presets import PRESETS as CLASSES
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.films.decode import film_from_bytes, load_film
from cxrgaze.train import cli
from cxrgaze.train.model import spec_of


@pytest.fixture
def folder(tmp_path):
    films = tmp_path / "films"
    (films / "sub").mkdir(parents=True)
    rows = []
    for seed in range(30):
        drawn = phantom.draw(seed)
        name = f"sub/f{seed}.png" if seed % 2 else f"f{seed}.png"
        Image.fromarray(drawn.pixels).save(films / name)
        rows.append(
            {
                "file": name,
                "patient": f"p{seed // 2}",
                "label": drawn.label,
                "view": "PA",
                "age": "61",
                "sex": "F",
                "findings": "not used",
            }
        )
    _write(tmp_path / "labels.csv", rows)
    return tmp_path


def _write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _prepare(folder, *more):
    return cli.main(
        [
            "prepare",
            "--films",
            str(folder / "films"),
            "--labels",
            str(folder / "labels.csv"),
            "--output",
            str(folder / "set"),
            *more,
        ]
    )


def test_a_set_that_training_reads(folder, capsys):
    assert _prepare(folder) == 0
    made = LabelledSet.open(folder / "set")
    assert len(made.rows) == 30 and made.info.domain == "clinical" and not made.gaze
    assert {row.split for row in made.rows} == {"train", "val", "test"}
    first = made.rows[0]
    assert (first.view, first.age, first.sex, first.pixel_source) == ("PA", 61, "F", "image-8bit")
    assert made.film_bytes(first) == (folder / "films" / "f0.png").read_bytes()
    spec = spec_of("tiny", model_version="t", pixel_source="image-8bit", domain="clinical")
    arrays = load_arrays(made.split("train"), spec, PRESETS["phantom"])
    assert arrays.images.shape[1:] == (1, 64, 64) and not arrays.has_gaze.any()
    out = capsys.readouterr().out
    assert "patients" in out and made.info.split_sha256[:12] in out


def test_the_split_is_seeded_and_a_split_of_the_csv_is_kept(folder):
    hashes = []
    for seed in ("1", "1", "2"):
        assert _prepare(folder, "--seed", seed) == 0
        hashes.append(LabelledSet.open(folder / "set").info.split_sha256)
    assert hashes[0] == hashes[1] != hashes[2]
    rows = [row | {"split": "test"} for row in _rows(folder / "labels.csv")]
    _write(folder / "labels.csv", rows)
    assert _prepare(folder) == 0
    assert {row.split for row in LabelledSet.open(folder / "set").rows} == {"test"}


def test_films_that_cannot_or_must_not_be_read_are_left_out_and_said_so(folder, capsys):
    (folder / "films" / "f0.png").write_bytes(b"torn")
    Image.fromarray(np.zeros((60, 60), np.uint8)).save(folder / "films" / "f2.png")
    assert _prepare(folder) == 0
    assert len(LabelledSet.open(folder / "set").rows) == 28
    err = capsys.readouterr().err
    assert "left out: f0.png" in err and "left out: f2.png: no content" in err


def test_labels_are_mapped_or_refused(folder, capsys):
    rows = _rows(folder / "labels.csv")
    rows[0]["label"], rows[1]["label"] = "effusion", "other"
    _write(folder / "labels.csv", rows)
    assert _prepare(folder, "--classes", "paper") == ExitCode.DATA
    assert "row 2: label 'effusion'" in capsys.readouterr().err
    assert not (folder / "set").exists()
    for more in ([], ["--classes", "paper"]):
        mapped = ["--map", "effusion=heart_failure", "--map", "other="]
        assert _prepare(folder, *mapped, *more) == 0
        made = LabelledSet.open(folder / "set")
        labels = {row.film: row.label for row in made.rows}
        assert labels["films/f0.png"] == "heart_failure" and labels["films/sub/f1.png"] is None
        assert made.info.classes == CLASSES["paper"].classes


def test_the_classes_of_a_set_are_those_of_its_labels(folder, capsys):
    rows = _rows(folder / "labels.csv")
    rows[0]["label"], rows[1]["label"] = "Pleural Effusion", ""
    _write(folder / "labels.csv", rows)
    assert _prepare(folder) == 0
    made = LabelledSet.open(folder / "set")
    names = ("normal", "heart_failure", "pneumonia", "pleural_effusion")
    assert (made.info.class_names, made.info.class_kind) == (names, "exclusive")
    assert [row.label for row in made.rows[:2]] == ["pleural_effusion", None]
    assert made.known(made.rows[0]) == {n: n == "pleural_effusion" for n in names}
    out = capsys.readouterr().out
    assert "pleural_effusion" in out and "unlabelled" in out
    _write(folder / "labels.csv", [row | {"label": "normal"} for row in rows])
    assert _prepare(folder) == ExitCode.DATA
    assert "all labelled films are 'normal'" in capsys.readouterr().err
    assert _prepare(folder, "--classes", "normal,tuberculosis") == 0
    assert LabelledSet.open(folder / "set").info.class_names == ("normal", "tuberculosis")


def test_findings_of_an_own_table(folder, capsys):
    said = ["Nodule|Pleural Effusion", "Nodule", "No Finding", ""]
    rows = [row | {"label": said[i % 4]} for i, row in enumerate(_rows(folder / "labels.csv"))]
    _write(folder / "labels.csv", rows)
    assert _prepare(folder) == ExitCode.DATA
    assert "give --findings" in capsys.readouterr().err
    assert _prepare(folder, "--findings") == 0
    made = LabelledSet.open(folder / "set")
    names = ("nodule", "pleural_effusion")
    assert (made.info.class_names, made.info.class_kind) == (names, "findings")
    both = [dict(zip(names, has, strict=True)) for has in ((True, True), (True, False))]
    expected = [*both, dict.fromkeys(names, False), {}]
    assert [made.known(row) for row in made.rows[:4]] == expected
    assert all(row.label is None for row in made.rows)


BROKEN = {
    "a missing film": (lambda r: r[3].update(file="no.png"), "row 5: .*no.png does not exist"),
    "no patient": (lambda r: r[3].update(patient=""), "row 5: patient: .*--patient-per-film"),
    "an age in words": (lambda r: r[3].update(age="old"), "row 5: age"),
    "a path outside": (lambda r: r[3].update(file="../labels.csv"), "row 5"),
    "two splits": (
        lambda r: [row.update(split=("train", "test")[i % 2]) for i, row in enumerate(r)],
        "more than one split: p0",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_refused_with_its_row_and_leaves_nothing(folder, name):
    from cxrgaze.train.label_tables import read_exclusive
    from cxrgaze.train.prepare import PrepareOptions, prepare, source_of

    change, message = BROKEN[name]
    rows = [row | {"split": ""} for row in _rows(folder / "labels.csv")]
    change(rows)
    _write(folder / "labels.csv", rows)
    with pytest.raises(DataError, match=message):
        table = read_exclusive(folder / "films", folder / "labels.csv")
        prepare(source_of(folder / "films", table), PrepareOptions(folder / "set", "test"))
    assert not (folder / "set").exists()


def test_gaze_of_any_eye_tracker(folder, capsys):
    rows = [
        {
            "film": "f0.png",
            "reader": "me",
            "kind": "fixation",
            "x_px": x,
            "y_px": 20,
            "duration_ms": 200,
        }
        for x in (10, 30)
    ]
    _write(folder / "gaze.csv", rows)
    assert _prepare(folder, "--gaze", str(folder / "gaze.csv")) == 0
    made = LabelledSet.open(folder / "set")
    assert made.gaze["films/f0.png"].points.tolist() == [[10, 20], [30, 20]]
    assert "gaze of me: 1 films" in capsys.readouterr().out
    _write(folder / "gaze.csv", [rows[0] | {"film": "other.png"}])
    assert _prepare(folder, "--gaze", str(folder / "gaze.csv")) == ExitCode.DATA
    assert "row 2: other.png is not in films.csv" in capsys.readouterr().err


def test_usage(folder, tmp_path, capsys):
    for more in (["--map", "x"], ["--split", "train"], ["--split", "dev=1"], ["--gaze", "no.csv"]):
        assert _prepare(folder, *more) == ExitCode.USAGE
    arguments = ["prepare", "--films", str(tmp_path / "no"), "--labels", "x", "--output", "y"]
    assert cli.main(arguments) == ExitCode.USAGE


def test_the_real_training_films(shared, tmp_path):
    source = shared / "nih_train"
    arguments = ["prepare", "--films", str(source), "--labels", str(source / "labels.csv")]
    assert cli.main([*arguments, "--output", str(tmp_path / "set")]) == 0
    made = LabelledSet.open(tmp_path / "set")
    assert len(made.rows) == 682 and len({row.patient for row in made.rows}) == 472
    assert sum(row.label == "normal" for row in made.rows) == 367


def test_a_set_says_its_folder_and_not_the_place(folder):
    """D8: the absolute folder of the films went into card, manifest and pages."""
    assert _prepare(folder) == 0
    origin = LabelledSet.open(folder / "set").info.origin
    assert origin.startswith("films [") and str(folder) not in origin
    for path in (folder / "set").rglob("*"):
        if path.is_file() and path.suffix in (".json", ".csv"):
            assert str(folder).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("strip", [False, True])
def test_headers_of_dicom_films_are_said_or_stripped(folder, films, capsys, strip):
    """D8: patient data was copied without a word."""
    source = films / "dcm_rg1q_12b_mono2_j2klossless.dcm"
    header = pydicom.dcmread(source)
    header.PatientName = "Secret^Name"
    header.save_as(folder / "films" / "f0.dcm")
    rows = _rows(folder / "labels.csv")
    rows[0]["file"] = "f0.dcm"
    _write(folder / "labels.csv", rows)
    assert _prepare(folder, *(["--strip"] if strip else [])) == 0
    told = capsys.readouterr().err
    (copied,) = (folder / "set").rglob("*.dcm")
    assert (b"Secret" in copied.read_bytes()) is not strip
    assert ("1 films are DICOM files" in told and "--strip" in told) is not strip
    made = LabelledSet.open(folder / "set")
    row = next(row for row in made.rows if row.film.endswith(".dcm"))
    film = film_from_bytes(made.film_bytes(row), "x.dcm")
    assert np.array_equal(film.pixels, load_film(source).pixels)
