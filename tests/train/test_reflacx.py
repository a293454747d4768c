"""REFLACX to a labelled set, on small synthetic files in the published schema."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from cxrgaze.errors import DataError, ExitCode
from cxrgaze.evidence import phantom
from cxrgaze.evidence.arrays import canvas_density, load_arrays
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.train import cli
from cxrgaze.train.model import spec_of
from cxrgaze.train.reflacx import read_reflacx

IDENTITY = (
    "id,split,eye_tracking_data_discarded,image,dicom_id,subject_id,image_size_x,image_size_y"
).split(",")
# docs/method.md#reflacx: labels of phase 1 and of phases 2 and 3, alphabetical.
PHASE_1 = [
    *IDENTITY,
    *(
        "Airway wall thickening,Atelectasis,Consolidation,Emphysema,Enlarged cardiac silhouette,"
        "Fibrosis,Fracture,Groundglass opacity,Mass,Nodule,Other,Pleural effusion,"
        "Pleural thickening,Pneumothorax,Pulmonary edema,Quality issue,Support devices,"
        "Wide mediastinum"
    ).split(","),
]
PHASE_3 = [
    *IDENTITY,
    *(
        "Abnormal mediastinal contour,Acute fracture,Atelectasis,Consolidation,"
        "Enlarged cardiac silhouette,Enlarged hilum,Groundglass opacity,Hiatal hernia,"
        "High lung volume / emphysema,Interstitial lung disease,Lung nodule or mass,Other,"
        "Pleural abnormality,Pneumothorax,Pulmonary edema,Support devices"
    ).split(","),
]
FIXATIONS = (
    "timestamp_start_fixation,timestamp_end_fixation,x_position,y_position,pupil_area_normalized,"
    "angular_resolution_x_pixels_per_degree,angular_resolution_y_pixels_per_degree,window_width,"
    "window_level,xmin_shown_from_image,ymin_shown_from_image,xmax_shown_from_image,"
    "ymax_shown_from_image,xmin_in_screen_coordinates,ymin_in_screen_coordinates,"
    "xmax_in_screen_coordinates,ymax_in_screen_coordinates"
).split(",")
MAP = {
    "Pulmonary edema": "heart_failure",
    "Consolidation": "pneumonia",
    "No finding": "normal",
}


def _write(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\r\n")  # files may be CRLF
        writer.writeheader()
        writer.writerows({**dict.fromkeys(columns, "0"), **row} for row in rows)


def _edit(path, change):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0])
    change(rows)
    _write(path, columns, rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Phase 1: one film read by three; phase 3: five films read once, one discarded reading."""
    root = tmp_path_factory.mktemp("reflacx")
    phase_1, phase_3 = [], []
    rng = np.random.default_rng(0)

    def reading(identity, seed, **more):
        path = f"files/p1{seed}/p1000000{seed}/s{seed}/d{seed}.dcm"
        film = (root / "mimic" / path).with_suffix(".jpg")
        if not film.is_file():
            film.parent.mkdir(parents=True)
            Image.fromarray(phantom.draw(seed, shape=(120, 100)).pixels).save(film, quality=95)
        if more.get("eye_tracking_data_discarded") != "True":
            starts = np.cumsum(rng.uniform(0.2, 0.6, 15))
            rows = [
                {
                    "timestamp_start_fixation": start,
                    "timestamp_end_fixation": start + 0.25,
                    "x_position": rng.uniform(-5, 105),
                    "y_position": rng.uniform(0, 119),
                    "angular_resolution_x_pixels_per_degree": 8.0,
                    "angular_resolution_y_pixels_per_degree": 6.0,
                    "xmax_shown_from_image": 100,
                    "ymax_shown_from_image": 120,
                }
                for start in starts
            ]
            _write(root / "data" / "main_data" / identity / "fixations.csv", FIXATIONS, rows)
        return {
            "id": identity,
            "split": "train",
            "eye_tracking_data_discarded": "False",
            "image": f"physionet.org/{path}",
            "dicom_id": f"d{seed}",
            "subject_id": f"1000000{seed}",
            "image_size_x": 100,
            "image_size_y": 120,
            "Support devices": "True",
            **more,
        }

    phase_1 += [reading("P101R000001", 0, **{"Pulmonary edema": "4"})]
    phase_1 += [reading("P102R000002", 0, **{"Pulmonary edema": "3"})]
    phase_1 += [reading("P103R000003", 0, **{"Pulmonary edema": "2", "Consolidation": "5"})]
    phase_3 += [reading("P300R000004", 1, Consolidation="3", Other="something|else")]
    phase_3 += [reading("P300R000005", 2)]
    phase_3 += [reading("P300R000006", 3, Consolidation="5", **{"Pulmonary edema": "5"})]
    phase_3 += [reading("P300R000007", 4, Consolidation="2")]
    phase_3 += [reading("P300R000008", 5, eye_tracking_data_discarded="True")]
    _write(root / "data" / "main_data" / "metadata_phase_1.csv", PHASE_1, phase_1)
    _write(root / "data" / "main_data" / "metadata_phase_3.csv", PHASE_3, phase_3)
    return root


@pytest.fixture
def reflacx(made, tmp_path):
    return shutil.copytree(made, tmp_path / "reflacx")


def _prepare(root, *more):
    return cli.main(
        [
            "prepare",
            "--films",
            str(root / "mimic"),
            "--reflacx",
            str(root / "data"),
            "--output",
            str(root / "set"),
            *more,
        ]
    )


def test_gaze_only_unless_findings_are_mapped(reflacx, capsys):
    assert _prepare(reflacx) == 0
    made = LabelledSet.open(reflacx / "set")
    assert len(made.rows) == 5 and all(row.label is None for row in made.rows)
    assert made.gaze["films/d0.jpg"].readers[::15] == ("P101R000001", "P102R000002", "P103R000003")
    assert "1 readings dropped: their eye tracking was discarded" in capsys.readouterr().err


def test_findings_of_certainty_3_in_half_of_the_readings_become_classes(reflacx, capsys):
    arguments = [part for key, value in MAP.items() for part in ("--map", f"{key}={value}")]
    assert _prepare(reflacx, *arguments) == 0
    labels = {row.film: row.label for row in LabelledSet.open(reflacx / "set").rows}
    assert labels == {
        "films/d0.jpg": "heart_failure",  # two of three readers; consolidation only one of three
        "films/d1.jpg": "pneumonia",
        "films/d2.jpg": "normal",
        "films/d3.jpg": None,  # both classes
        "films/d4.jpg": "normal",  # certainty 2 is not present
    }
    assert (
        "1 films unlabelled: their findings map to more than one class" in capsys.readouterr().err
    )


def test_duration_degrees_and_rectangle_arrive_and_make_the_density(reflacx):
    assert _prepare(reflacx) == 0
    labelled = LabelledSet.open(reflacx / "set")
    gaze = labelled.gaze["films/d1.jpg"]
    assert np.allclose(gaze.values[:, 2], 250) and np.allclose(gaze.values[:, 3:5], (8, 6))
    assert np.allclose(gaze.values[:, 5:], (0, 0, 100, 120))
    spec = spec_of("tiny", model_version="t", pixel_source="image-8bit", domain="clinical")
    arrays = load_arrays(labelled, spec, PRESETS["reflacx"])
    index = arrays.films.index("films/d1.jpg")
    geometry = arrays.geometries[index]
    slow = np.zeros((geometry.height, geometry.width))
    for (x, y), duration in zip(gaze.points, gaze.values[:, 2], strict=True):
        for row in range(geometry.height):
            for column in range(geometry.width):
                place = np.array([[column + geometry.left, row + geometry.top]])
                fx, fy = geometry.to_film(place)[0]
                slow[row, column] += duration * np.exp(
                    -(((fx - x) / 8) ** 2) / 2 - ((fy - y) / 6) ** 2 / 2
                )
    expected = slow / slow.sum()
    found = geometry.crop(canvas_density(gaze, geometry, PRESETS["reflacx"]))
    assert np.abs(found - expected).max() < 1e-6


BROKEN = {
    "a missing film": (
        "metadata_phase_3.csv",
        lambda r: r[1].update(image="files/no.dcm"),
        "no.dcm",
    ),
    "a certainty in words": (
        "metadata_phase_3.csv",
        lambda r: r[1].update(Atelectasis="very 5"),
        "row 3: certainty of",
    ),
    "a size in words": ("metadata_phase_3.csv", lambda r: r[0].update(image_size_x="x"), "row 2"),
    "a reading's file": ("metadata_phase_3.csv", lambda r: r[1].update(id="P300R1"), "P300R1"),
    "NaN": ("P300R000005/fixations.csv", lambda r: r[2].update(x_position="nan"), "row 4: times"),
    "times the wrong way round": (
        "P300R000005/fixations.csv",
        lambda r: r[2].update(timestamp_end_fixation="0"),
        "row 4",
    ),
    "words": ("P300R000005/fixations.csv", lambda r: r[2].update(y_position="up"), "row 4"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_file_and_row(reflacx, name):
    file, change, message = BROKEN[name]
    _edit(reflacx / "data" / "main_data" / file, change)
    with pytest.raises(DataError, match=message):
        read_reflacx(reflacx / "data", reflacx / "mimic", {})


def test_a_reading_without_fixations_is_refused(reflacx):
    path = reflacx / "data" / "main_data" / "P300R000005" / "fixations.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="P300R000005/fixations.csv: a reading without fixations"):
        read_reflacx(reflacx / "data", reflacx / "mimic", {})


def test_a_film_of_another_size_and_an_unknown_finding_are_refused(reflacx, capsys):
    with pytest.raises(DataError, match="no metadata file has the finding 'Sadness'"):
        read_reflacx(reflacx / "data", reflacx / "mimic", {"Sadness": "normal"})
    path = next((reflacx / "mimic").rglob("d2.jpg"))
    Image.open(path).resize((50, 60)).save(path)
    assert _prepare(reflacx) == ExitCode.DATA
    assert "50 x 60 pixels, the metadata says 100 x 120" in capsys.readouterr().err
    with pytest.raises(DataError, match="no metadata_phase_1"):
        read_reflacx(reflacx / "mimic", reflacx / "mimic", {})
