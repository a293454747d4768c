from __future__ import annotations

import csv
from collections import Counter

import numpy as np
import pytest

from cxrgaze.errors import DataError, UsageError
from cxrgaze.evidence import labelled_set, phantom
from cxrgaze.evidence.heatmaps import PRESETS


@pytest.fixture
def labelled(tmp_path):
    return phantom.write_phantom_set(tmp_path / "set", {"train": 4, "test": 2})


def _edit(path, change):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_written_and_opened_again(labelled):
    again = labelled_set.LabelledSet.open(labelled.folder)
    assert again.rows == labelled.rows and again.info == labelled.info
    assert [row.split for row in again.rows] == ["train"] * 4 + ["test"] * 2
    assert again.split("test").rows == again.rows[4:]
    first = again.rows[0].film
    drawn = phantom.draw(0).gaze
    assert again.gaze[first].readers == drawn.readers
    assert np.allclose(again.gaze[first].points, drawn.points, atol=1e-3)
    assert again.film_bytes(again.rows[0]).startswith(b"\x89PNG")


def test_an_altered_film_is_seen(labelled):
    (labelled.folder / labelled.rows[0].film).write_bytes(b"x")
    with pytest.raises(DataError, match="SHA-256 differs"):
        labelled.film_bytes(labelled.rows[0])


BROKEN = {
    "label": (lambda r: r[1].update(label="cat"), "row 3: label 'cat'"),
    "patient on two sides": (lambda r: r[5].update(patient=r[0]["patient"]), "phantom-000000"),
    "twice": (lambda r: r[1].update(film=r[0]["film"]), "row 3: .* listed twice"),
    "hash": (lambda r: r[1].update(sha256="abc"), "row 3: sha256"),
    "path": (lambda r: r[1].update(film="../x.png"), "row 3: film"),
    "missing film": (lambda r: r[1].update(film="films/no.png"), "films/no.png"),
    "split changed": (lambda r: r[0].update(split="test"), "split_sha256"),
    "age": (lambda r: r[1].update(age="nan"), "row 3: age"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_films_table_names_the_row(labelled, name):
    change, message = BROKEN[name]
    _edit(labelled.folder / "films.csv", change)
    with pytest.raises(DataError, match=message):
        labelled_set.LabelledSet.open(labelled.folder)


BROKEN_GAZE = {
    "nan": (lambda r: r[0].update(x_px="nan"), "row 2: coordinates"),
    "text": (lambda r: r[0].update(x_px="left"), "row 2"),
    "film": (lambda r: r[0].update(film="films/other.png"), "row 2: .* not in films.csv"),
    "kind": (lambda r: r[0].update(kind="blink"), "row 2: kind 'blink'"),
    "duration": (lambda r: r[0].update(duration_ms="-1"), "row 2"),
}


@pytest.mark.parametrize("name", BROKEN_GAZE)
def test_a_broken_fixations_table_names_the_row(labelled, name):
    change, message = BROKEN_GAZE[name]
    _edit(labelled.folder / "fixations.csv", change)
    with pytest.raises(DataError, match=message):
        labelled_set.LabelledSet.open(labelled.folder)


BROKEN_FILE = {
    "no rows": (lambda data: data.splitlines(keepends=True)[0], "no films"),
    "a cell too few": (lambda data: data.rstrip().rsplit(b",", 1)[0], "row 7: .* cells expected"),
    "a cell too many": (lambda data: data.rstrip() + b",x", "row 7: .* cells expected"),
    "another encoding": (lambda data: data.replace(b"PA", b"P\xc4"), "not a CSV file in UTF-8"),
    "no file": (lambda data: None, "films.csv is missing"),
}


@pytest.mark.parametrize("name", BROKEN_FILE)
def test_what_is_no_films_table_is_refused(labelled, name):
    change, message = BROKEN_FILE[name]
    path = labelled.folder / "films.csv"
    data = change(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        labelled_set.LabelledSet.open(labelled.folder)


def test_other_columns_are_refused(labelled):
    path = labelled.folder / "films.csv"
    path.write_text(path.read_text().replace("patient", "person", 1))
    with pytest.raises(DataError, match=r"missing \['patient'\], not expected \['person'\]"):
        labelled_set.LabelledSet.open(labelled.folder)


def test_another_schema_version_is_refused(labelled):
    path = labelled.folder / "set.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(DataError, match="schema version 9, this cxrgaze reads 1"):
        labelled_set.LabelledSet.open(labelled.folder)


def test_no_set_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no set\.json"):
        labelled_set.LabelledSet.open(tmp_path)


def test_a_failed_write_leaves_nothing_and_a_foreign_folder_is_not_replaced(labelled, tmp_path):
    target = tmp_path / "new"
    rows = [labelled.rows[0], labelled.rows[0]]
    with pytest.raises(DataError, match="listed twice"):
        films = {rows[0].film: labelled.film_bytes(rows[0])}
        labelled_set.write_set(target, labelled.info, rows, {}, films.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match=r"has no set\.json"):
        labelled_set.write_set(tmp_path / "mine", labelled.info, labelled.rows, {}, [])


def _many(patients=200, films_each=3):
    rng = np.random.default_rng(3)
    rows = []
    for p in range(patients):
        label = ("normal", "pneumonia")[int(rng.random() < 0.3)]
        view = ("PA", "AP")[int(rng.random() < 0.4)]
        for f in range(int(rng.integers(1, films_each + 1))):
            rows.append(
                labelled_set.FilmRow(
                    film=f"{p}-{f}.png",
                    sha256="0" * 64,
                    patient=f"p{p}",
                    label=label,
                    view=view,
                    pixel_source="image-8bit",
                )
            )
    return rows


def test_splits_are_by_patient_stratified_and_seeded():
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    rows = labelled_set.assign_splits(_many(), shares, seed=1)
    labelled_set.check_split(rows)
    counts = Counter(row.split for row in rows)
    for split, share in shares.items():
        assert counts[split] / len(rows) == pytest.approx(share, abs=0.02)
        stratum = [row for row in rows if row.split == split]
        pneumonia = np.mean([row.label == "pneumonia" for row in stratum])
        assert pneumonia == pytest.approx(0.3, abs=0.08)
    assert labelled_set.assign_splits(_many(), shares, seed=1) == rows
    assert labelled_set.assign_splits(_many(), shares, seed=2) != rows


def test_shares_of_a_split_are_positive():
    for shares in ({}, {"train": 1.0, "test": 0.0}, {"train": 1.2, "test": -0.2}):
        with pytest.raises(DataError, match="must be positive"):
            labelled_set.assign_splits(_many(5), shares, seed=1)


def test_a_preset_that_needs_a_sigma_says_so(labelled):
    gaze = labelled.gaze[labelled.rows[0].film]
    with pytest.raises(DataError, match="sigma_x_px"):
        gaze.weighted(PRESETS["reflacx"], 96)
    _, weights, sigmas = gaze.weighted(PRESETS["phantom"], 96)
    assert np.allclose(sigmas, 4.8) and weights.max() > 200  # milliseconds
    assert not len(gaze.weighted(PRESETS["paper"], 96)[1])  # no raw samples in a phantom
