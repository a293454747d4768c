"""EGD-CXR to a labelled set, on small synthetic files in the exact published schema."""

from __future__ import annotations

import csv
import hashlib
import shutil

import numpy as np
import pytest
from PIL import Image

from cxrgaze.errors import DataError, ExitCode
from cxrgaze.evidence import phantom
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.train import cli
from cxrgaze.train.egd import SAMPLE_MS, read_egd, screen_to_image
from cxrgaze.train.model import spec_of

# docs/method.md#egd-cxr: 59 and 37 columns, in the published order.
MASTER = (
    "dicom_id path study_id patient_id stay_id gender anchor_age image_top_pad image_bottom_pad "
    "image_left_pad image_right_pad "
    + " ".join(f"dx{i} dx{i}_icd" for i in range(1, 10))
    + " normal_reports Normal CHF pneumonia consolidation enlarged_cardiac_silhouette "
    "linear__patchy_atelectasis lobar__segmental_collapse "
    "not_otherwise_specified_opacity___pleural__parenchymal_opacity__ "
    "pleural_effusion_or_thickening pulmonary_edema__hazy_opacity normal_anatomically "
    "elevated_hemidiaphragm hyperaeration vascular_redistribution atelectasis__chx "
    "cardiomegaly__chx consolidation__chx edema__chx enlarged_cardiomediastinum__chx fracture__chx "
    "lung_lesion__chx lung_opacity__chx no_finding__chx pleural_effusion__chx pleural_other__chx "
    "pneumonia__chx pneumothorax__chx support_devices__chx cxr_exam_indication"
).split(" ")
GAZE = [
    *"SESSION_ID MEDIA_ID DICOM_ID CNT".split(),
    "Time (in secs)",
    "TIMETICK(f=10000000)",
    *(
        "FPOGX FPOGY FPOGS FPOGD FPOGID FPOGV BPOGX BPOGY BPOGV LPCX LPCY LPD LPS LPV RPCX RPCY "
        "RPD RPS RPV BKID BKDUR BKPMIN LPMM LPMMV RPMM RPMMV SACCADE_MAG SACCADE_DIR VID_FRAME "
        "X_ORIGINAL Y_ORIGINAL"
    ).split(),
]
COLUMN = {"normal": "Normal", "heart_failure": "CHF", "pneumonia": "pneumonia"}
HEIGHT, WIDTH = 1222, 1016  # large enough for the outside marker, int(-scale), to be negative
PADS = (0, 0, 534, 534)


def test_the_published_schema_is_complete():
    assert len(MASTER) == 59 and len(set(MASTER)) == 59
    assert len(GAZE) == 37 and len(set(GAZE)) == 37


def _write(path, columns, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**dict.fromkeys(columns, ""), **row} for row in rows)


def _read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _edit(path, change):
    rows = _read(path)
    columns = list(rows[0])
    change(rows)
    _write(path, columns, rows)


@pytest.fixture
def egd(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve phantoms as EGD-CXR and MIMIC-CXR would hold them."""
    tmp_path = tmp_path_factory.mktemp("egd")
    master, fixations, samples = [], [], []
    rng = np.random.default_rng(0)
    (tmp_path / "egd").mkdir()
    for seed in range(12):
        drawn = phantom.draw(seed, shape=(HEIGHT, WIDTH))
        digest = hashlib.sha256(str(seed).encode()).hexdigest()
        dicom_id = "-".join(digest[i : i + 8] for i in range(0, 40, 8))
        patient = str(10000000 + seed // 2)
        path = f"files/p10/p{patient}/s{seed}/{dicom_id}.dcm"
        (tmp_path / "mimic" / path).parent.mkdir(parents=True)
        Image.fromarray(drawn.pixels).save(
            (tmp_path / "mimic" / path).with_suffix(".png"), compress_level=1
        )
        row = {"dicom_id": dicom_id, "path": path, "patient_id": patient, "gender": "F"}
        row |= {"anchor_age": "20 - 30", "Normal": "0", "CHF": "0", "pneumonia": "0"}
        row |= {COLUMN[drawn.label]: "1", "cxr_exam_indication": 'cough,\n"fever"\nfor 2 days'}
        names = ("image_top_pad", "image_bottom_pad", "image_left_pad", "image_right_pad")
        master.append(row | dict(zip(names, map(str, PADS), strict=True)))
        for rows, count in ((fixations, 20), (samples, 60)):
            fpog = rng.uniform((0.25, -0.05), (0.75, 1.05), (count, 2))
            pixels = screen_to_image(fpog, PADS, WIDTH, HEIGHT)
            for (fx, fy), (x, y) in zip(fpog, pixels, strict=True):
                rows.append(
                    {
                        "DICOM_ID": dicom_id.upper(),
                        "FPOGX": fx,
                        "FPOGY": fy,
                        "FPOGD": 0.3,
                        "X_ORIGINAL": x,
                        "Y_ORIGINAL": y,
                    }
                )
        fixations.append({"DICOM_ID": dicom_id.upper()[:-5], "FPOGX": 0.5})  # calibration screen
    _write(tmp_path / "egd" / "master_sheet.csv", MASTER, master)
    _write(tmp_path / "egd" / "fixations.csv", GAZE, fixations)
    _write(tmp_path / "egd" / "eye_gaze.csv", GAZE, samples)
    return tmp_path


def _prepare(egd, *more):
    return cli.main(
        [
            "prepare",
            "--films",
            str(egd / "mimic"),
            "--egd",
            str(egd / "egd"),
            "--output",
            str(egd / "set"),
            *more,
        ]
    )


def test_the_check_vector_of_the_screen_mapping():
    """docs/method.md#screen-mapping, and a point outside as int(-scale)."""
    found = screen_to_image(np.array([[0.5, 0.5], [0.1, 0.5]]), PADS, 2544, 3056)
    assert found[0].tolist() == [1272, 1528]
    assert found[1].tolist() == [int(-2544 / 852), int(-3056 / 1080)] == [-2, -2]
    odd = screen_to_image(np.array([[0.5, 0.5]]), PADS, 2543, 3055)
    assert odd[0].tolist() == [1272, 1528]  # odd sizes count as one more
    landscape = screen_to_image(np.array([[0.5, 0.5]]), (86, 86, 448, 448), 3056, 2544)
    assert landscape[0].tolist() == [int(3056 / 1024 * 512), int(2544 / 908 * 454)]


def test_films_labels_and_gaze_arrive(egd, capsys):
    assert _prepare(egd) == 0
    made = LabelledSet.open(egd / "set")
    assert len(made.rows) == 12 and made.info.origin.startswith("EGD-CXR")
    for seed, row in enumerate(made.rows):
        drawn = phantom.draw(seed, shape=(HEIGHT, WIDTH))
        assert row.label == drawn.label and row.patient == str(10000000 + seed // 2)
        assert (row.view, row.sex, row.age) == ("PA", "F", 25)
        gaze = made.gaze[row.film]
        source = [
            r
            for r in _read(egd / "egd" / "fixations.csv")
            if r["DICOM_ID"].lower() in row.film
            and len(r["DICOM_ID"]) == 44
            and int(r["X_ORIGINAL"]) >= 0
            and int(r["Y_ORIGINAL"]) >= 0
        ]
        fixations = gaze.select(kind="fixation")
        expected = [[int(r["X_ORIGINAL"]), int(r["Y_ORIGINAL"])] for r in source]
        assert fixations.points.tolist() == expected
        assert np.allclose(fixations.values[:, 2], 300)
        samples = gaze.select(kind="sample")
        assert np.allclose(samples.values[:, 2], SAMPLE_MS, atol=1e-3) and len(samples.points) > 20
        assert (gaze.points >= 0).all()
    out = capsys.readouterr()
    assert "gaze of egd-radiologist: 12 films" in out.out
    assert "12 gaze rows dropped: calibration screen" in out.err
    assert "outside the film" in out.err


@pytest.mark.parametrize("preset", ["paper", "egd-authors"])
def test_training_reads_it_with_both_presets(egd, preset):
    assert _prepare(egd) == 0
    spec = spec_of("tiny", model_version="t", pixel_source="image-8bit", domain="clinical")
    arrays = load_arrays(LabelledSet.open(egd / "set").split("train"), spec, PRESETS[preset])
    assert arrays.has_gaze.all()
    assert arrays.densities.sum((1, 2, 3)) == pytest.approx(1, abs=1e-4)


BROKEN = {
    "two classes in one row": (
        "master_sheet.csv",
        lambda r: r[2].update(Normal="1", CHF="1", pneumonia="0"),
        r"master_sheet.csv, row \d+: 2 of .* expected exactly one",
    ),
    "no class": (
        "master_sheet.csv",
        lambda r: r[2].update(Normal="", CHF="", pneumonia=""),
        "0 of .* expected exactly one",
    ),
    "a missing film": (
        "master_sheet.csv",
        lambda r: r[2].update(path="files/p10/p1/s1/gone.dcm"),
        r"row \d+: .*gone\.dcm does not exist",
    ),
    "a path outside": ("master_sheet.csv", lambda r: r[2].update(path="../x.dcm"), "leaves"),
    "pads in words": ("master_sheet.csv", lambda r: r[2].update(image_left_pad="x"), "pads"),
    "NaN coordinates": (
        "eye_gaze.csv",
        lambda r: r[4].update(X_ORIGINAL="nan"),
        "eye_gaze.csv, row 6: coordinates",
    ),
    "coordinates in words": (
        "fixations.csv",
        lambda r: r[4].update(FPOGX="left"),
        "fixations.csv, row 6",
    ),
    "an unknown film": (
        "fixations.csv",
        lambda r: r[4].update(DICOM_ID="A" * 44),
        "fixations.csv, row 6: DICOM_ID is not in master_sheet.csv",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_file_and_row(egd, name):
    file, change, message = BROKEN[name]
    _edit(egd / "egd" / file, change)
    with pytest.raises(DataError, match=message):
        read_egd(egd / "egd", egd / "mimic")


def test_other_columns_are_refused(egd):
    path = egd / "egd" / "fixations.csv"
    path.write_text(path.read_text().replace("X_ORIGINAL", "X_ORIG"))
    with pytest.raises(DataError, match=r"columns missing \['X_ORIGINAL'\]"):
        read_egd(egd / "egd", egd / "mimic")


def test_no_gaze_file_at_all_is_refused_and_one_is_enough(egd):
    (egd / "egd" / "eye_gaze.csv").unlink()
    assert len(read_egd(egd / "egd", egd / "mimic").gaze) == 12
    (egd / "egd" / "fixations.csv").unlink()
    with pytest.raises(DataError, match=r"neither fixations\.csv nor eye_gaze\.csv"):
        read_egd(egd / "egd", egd / "mimic")


def test_films_of_another_size_are_refused(egd, capsys):
    """A resized film would put every fixation elsewhere."""
    path = next((egd / "mimic").rglob("*.png"))
    Image.open(path).resize((508, 611)).save(path)
    assert _prepare(egd) == ExitCode.DATA
    assert "gaze does not belong to this film of 508 x 611 pixels" in capsys.readouterr().err
    assert not (egd / "set").exists()


def test_a_film_without_gaze_is_kept_and_counted(egd, capsys):
    first = _read(egd / "egd" / "master_sheet.csv")[0]["dicom_id"].upper()
    for file in ("fixations.csv", "eye_gaze.csv"):
        _edit(
            egd / "egd" / file,
            lambda rows: rows.__setitem__(slice(None), [r for r in rows if r["DICOM_ID"] != first]),
        )
    assert _prepare(egd) == 0
    assert "1 films have no gaze" in capsys.readouterr().err
    assert len(LabelledSet.open(egd / "set").gaze) == 11


def test_older_names_of_the_pads_are_read(egd):
    path = egd / "egd" / "master_sheet.csv"
    path.write_text(path.read_text().replace("_pad", ""))
    assert _prepare(egd) == 0


def test_labels_and_egd_exclude_each_other(egd):
    with pytest.raises(SystemExit):
        _prepare(egd, "--labels", "x.csv")
