"""From a folder in EGD-CXR's shape to a report: prepare, fit, evaluate, export, by the commands.

Rows are synthetic, films are phantoms as DICOM. The network is small and the run short: it shows
that the way is whole, not that it learns.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from cxrgaze.bundles.bundle import Bundle
from cxrgaze.evidence import phantom
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.export import cli as export_cli
from cxrgaze.train import checkpoint, cli
from cxrgaze.train.egd import screen_to_image

FILMS, HEIGHT, WIDTH = 60, 366, 305
PADS = (0, 0, 534, 534)  # of the portrait picture on the screen, top, bottom, left, right
COLUMN = {"normal": "Normal", "heart_failure": "CHF", "pneumonia": "pneumonia"}
SAMPLE_S = 1 / 60


def _dicom(pixels):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "2.25.1"
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, "2.25.1"
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "DX", "CHEST", "PA"
    ds.PhotometricInterpretation, ds.SamplesPerPixel = "MONOCHROME1", 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth = 2048, 4095
    ds.PixelData = (4095 - pixels.astype(np.uint16) * 16).tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds)
    return buffer.getvalue()


def _on_screen(points):
    """Film pixels as fractions of the screen, the inverse of `screen_to_image`."""
    low, high = np.array([PADS[2], PADS[0]]), np.array([PADS[3], PADS[1]])
    even = np.array([WIDTH + WIDTH % 2, HEIGHT + HEIGHT % 2])
    screen = np.array([1920, 1080])
    return ((points + 0.5) * (screen - low - high) / even + low) / screen


@pytest.fixture(scope="module")
def egd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "egd").mkdir()
    master, fixations, samples = [], [], []
    for seed in range(FILMS):
        drawn = phantom.draw(seed, shape=(HEIGHT, WIDTH))
        digest = hashlib.sha256(str(seed).encode()).hexdigest()
        dicom_id = "-".join(digest[i : i + 8] for i in range(0, 40, 8))
        patient = str(10_000_000 + seed // 2)
        path = f"files/p10/p{patient}/s{seed}/{dicom_id}.dcm"
        (folder / "mimic" / path).parent.mkdir(parents=True)
        (folder / "mimic" / path).write_bytes(_dicom(drawn.pixels))
        row = {"dicom_id": dicom_id, "path": path, "patient_id": patient, "gender": "M"}
        row |= {"anchor_age": "60 - 70", "Normal": "0", "CHF": "0", "pneumonia": "0"}
        row |= {COLUMN[drawn.label]: "1", "cxr_exam_indication": 'cough,\n"fever"'}
        row |= {"image_top_pad": "0", "image_bottom_pad": "0"}
        master.append(row | {"image_left_pad": "534", "image_right_pad": "534"})
        gaze = drawn.gaze.select(reader=phantom.READERS[0])
        inside = ((gaze.points > 1) & (gaze.points < (WIDTH - 2, HEIGHT - 2))).all(axis=1)
        screen = _on_screen(gaze.points[inside])
        mapped = screen_to_image(screen, PADS, WIDTH, HEIGHT)
        for (fx, fy), (x, y), ms in zip(screen, mapped, gaze.values[inside, 2], strict=True):
            seen = {"DICOM_ID": dicom_id.upper(), "FPOGX": fx, "FPOGY": fy, "FPOGD": ms / 1000}
            seen |= {"X_ORIGINAL": x, "Y_ORIGINAL": y}
            fixations.append(seen)
            samples += [seen] * max(round(ms / 1000 / SAMPLE_S), 1)
    columns = ("DICOM_ID", "FPOGX", "FPOGY", "FPOGD", "X_ORIGINAL", "Y_ORIGINAL")
    for name, rows, header in (
        ("master_sheet.csv", master, master[0]),
        ("fixations.csv", fixations, columns),
        ("eye_gaze.csv", samples, columns),
    ):
        with (folder / "egd" / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header)
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.mark.long
def test_from_egd_to_a_report_and_a_bundle(egd, capsys):
    films, made, run = egd / "mimic", egd / "set", egd / "run"
    arguments = ["prepare", "--egd", str(egd / "egd"), "--films", str(films), "--output", str(made)]
    assert cli.main([*arguments, "--synthetic"]) == 0
    labelled = LabelledSet.open(made)
    assert len(labelled.rows) == FILMS and len(labelled.gaze) == FILMS
    assert labelled.info.domain == "phantom"
    for name in ("train", "val", "test"):
        assert {row.label for row in labelled.split(name).rows} == set(COLUMN)

    arguments = ["fit", str(made), "--config", "paper", "--threads", "1", "--output", str(run)]
    changes = ["variant=tiny", "stages.contrastive.shrink=1", "stages.contrastive.batch=16"]
    changes += [f"stages.{s}.epochs=2" for s in ("contrastive", "encoder", "saliency", "fusion")]
    changes += [f"stages.{s}.learning_rate=1e-3" for s in ("encoder", "saliency", "fusion")]
    changes += ["heatmap=paper"]
    assert cli.main([*arguments, *(p for c in changes for p in ("--set", c))]) == 0
    card = checkpoint.load(run / "paper.safetensors")[1]
    assert [*card.results["stages"]] == ["contrastive", "encoder", "saliency", "fusion"]
    assert card.spec.pixel_source == "dicom-window"
    assert "EGD-CXR" in card.trained_on

    arguments = ["evaluate", str(run / "paper.safetensors"), str(made)]
    more = ["--output", str(egd / "report"), "--resamples", "200"]
    assert cli.main([*arguments, *more]) == 0
    report = json.loads((egd / "report" / "report.json").read_text())
    assert 0 <= report["diagnosis"]["auc"]["macro"]["bootstrap"]["value"] <= 1
    assert report["saliency"]["prediction"]["cc"] and report["saliency"]["centre_prior"]["cc"]
    assert report["synthetic"] and report["look"]["number"] == 1

    # Two epochs: what float16 does to its flags is not asked.
    arguments = [str(run / "paper.safetensors"), "--precision", "fp16", "--no-gate"]
    assert export_cli.main([*arguments, "--output", str(egd / "bundle")]) == 0
    manifest = Bundle.open(egd / "bundle" / "paper-fp16.cxrgaze").manifest
    assert manifest.decision == card.decision and manifest.decision.operating_points

    log = capsys.readouterr()
    assert not any(patient in log.out + log.err for patient in ("10000000", "10000001"))
