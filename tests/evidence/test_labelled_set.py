from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from cxrgaze.errors import DataError, UsageError
from cxrgaze.evidence import labelled_set, phantom
from cxrgaze.evidence.class_presets import class_named, in_order_of_presets
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.spec import DiseaseClass


@pytest.fixture
def labelled(tmp_path):
    return phantom.write_phantom_set(tmp_path / "set", {"train": 4, "test": 2})


FINDINGS = ("opacity", "effusion", "pneumonia")
KNOWN = [
    {"opacity": True, "effusion": True},
    {"effusion": False},
    {},
    {"opacity": False, "effusion": False, "pneumonia": False},
    {"pneumonia": True},
    {"opacity": False},
]


@pytest.fixture
def findings(labelled, tmp_path):
    """The same films with findings, some of them not known."""
    info = labelled.info.model_copy(
        update={"classes": tuple(map(class_named, FINDINGS)), "class_kind": "findings"}
    )
    rows = [
        row.model_copy(update={"label": None, "findings": known})
        for row, known in zip(labelled.rows, KNOWN, strict=True)
    ]
    films = ((row.film, labelled.film_bytes(row)) for row in rows)
    return labelled_set.write_set(tmp_path / "findings", info, rows, labelled.gaze, films)


def _edit(path, change):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _refused_after(made, table, change, message):
    """A set with another table is refused in these words."""
    _edit(made.folder / table, change)
    with pytest.raises(DataError, match=message):
        labelled_set.LabelledSet.open(made.folder)


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


def test_findings_written_and_opened_again(findings):
    again = labelled_set.LabelledSet.open(findings.folder)
    assert again.rows == findings.rows and again.info == findings.info
    assert [again.known(row) for row in again.rows] == KNOWN
    with (findings.folder / "films.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cells = [[row[f"finding_{name}"] for name in FINDINGS] for row in rows]
    assert cells[:3] == [["1", "1", ""], ["", "0", ""], ["", "", ""]]


def test_a_look_is_a_line_of_the_log_and_its_number(labelled):
    rows = labelled.rows
    for number, what in enumerate(("evaluation", "gate of fp16", "gate of int8"), start=1):
        look = labelled_set.log_look(labelled, "net", 64 * str(number), what)
        assert look == labelled_set.Look(number=number, logged=True)
    lines = (labelled.folder / labelled_set.LOOKS).read_bytes().splitlines()
    looks = [json.loads(line) for line in lines]
    assert [look["what"] for look in looks] == ["evaluation", "gate of fp16", "gate of int8"]
    assert [look["model_sha256"] for look in looks] == [64 * c for c in "123"]
    assert {look["model"] for look in looks} == {"net"}
    assert {look["split_sha256"] for look in looks} == {labelled.info.split_sha256}
    assert all(look["utc"].startswith("20") for look in looks)
    assert labelled_set.LabelledSet.open(labelled.folder).rows == rows


def test_a_look_that_cannot_be_logged_says_so(labelled, capsys):
    (labelled.folder / labelled_set.LOOKS).mkdir()
    look = labelled_set.log_look(labelled, "net", 64 * "0", "evaluation")
    assert look == labelled_set.Look(number=None, logged=False)
    assert f"is not logged: {labelled.folder / labelled_set.LOOKS}" in capsys.readouterr().err


def test_what_is_known_of_a_film_with_one_class(labelled):
    first = labelled.rows[0]
    known = labelled.known(first)
    assert list(known) == list(labelled.info.class_names) == list(phantom.LABELS)
    assert [name for name, has in known.items() if has] == [first.label]
    assert labelled.known(first.model_copy(update={"label": None})) == {}


BROKEN_FINDINGS = {
    "yes": (lambda r: r[1].update(finding_opacity="yes"), "row 3: finding opacity: expected 1, 0"),
    "-1": (lambda r: r[4].update(finding_pneumonia="-1"), "row 6: finding pneumonia: expected 1"),
    "label": (lambda r: r[1].update(label="opacity"), "row 3: label 'opacity'"),
    "no column": (lambda r: [row.pop("finding_effusion") for row in r], "finding_effusion"),
    "a column more": (lambda r: [row.update(finding_cat="1") for row in r], "finding_cat"),
}


@pytest.mark.parametrize("name", BROKEN_FINDINGS)
def test_a_broken_findings_table_names_the_row_or_the_column(findings, name):
    _refused_after(findings, "films.csv", *BROKEN_FINDINGS[name])


def test_findings_are_no_columns_of_exclusive_classes(labelled):
    _refused_after(
        labelled,
        "films.csv",
        lambda r: [row.update(finding_normal="1") for row in r],
        r"not expected \['finding_normal'\]",
    )


def _info(labelled, **change):
    """What is left of `set.json` with other content, or why it is refused."""
    content = {**json.loads((labelled.folder / "set.json").read_text()), **change}
    (labelled.folder / "set.json").write_text(json.dumps(content))
    return labelled_set.LabelledSet.open(labelled.folder).info


def test_a_set_that_names_its_classes_alone_is_read(labelled):
    """As sets before findings did."""
    names = list(labelled.info.class_names)
    content = json.loads((labelled.folder / "set.json").read_text())
    del content["class_kind"]
    (labelled.folder / "set.json").write_text(json.dumps(content))
    assert _info(labelled, classes=names) == labelled.info
    assert [one.snomed for one in labelled.info.classes] == ["17621005", "42343007", "233604007"]


@pytest.mark.parametrize(
    "classes,kind,message",
    [
        (["cat", "cat"], "exclusive", "distinct"),
        (["cat", "cat"], "findings", "distinct"),
        (["cat"], "exclusive", "two or more"),
        (["cat", "12"], "findings", "letter first"),
        (["cat", "dog"], "either", "class_kind"),
    ],
)
def test_classes_that_make_no_diagnosis_are_refused(labelled, classes, kind, message):
    with pytest.raises(DataError, match=message):
        _info(labelled, classes=classes, class_kind=kind)


def test_a_label_names_a_class_of_a_preset_or_a_new_one():
    assert class_named("Heart Failure") == phantom.CLASSES[1]
    assert class_named("  Pleural-Effusion (left)") == DiseaseClass(
        name="pleural_effusion_left", display="Pleural-Effusion (left)"
    )
    for text in ("", "  ", "7 days", "_", "лёгкое"):
        with pytest.raises(ValueError, match="makes no class name"):
            class_named(text)
    mixed = [class_named(name) for name in ("owl", "pneumonia", "cat", "normal")]
    ordered = [one.name for one in in_order_of_presets(mixed)]
    assert ordered == ["normal", "pneumonia", "owl", "cat"]


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
    _refused_after(labelled, "films.csv", *BROKEN[name])


BROKEN_GAZE = {
    "nan": (lambda r: r[0].update(x_px="nan"), "row 2: coordinates"),
    "text": (lambda r: r[0].update(x_px="left"), "row 2"),
    "film": (lambda r: r[0].update(film="films/other.png"), "row 2: .* not in films.csv"),
    "kind": (lambda r: r[0].update(kind="blink"), "row 2: kind 'blink'"),
    "duration": (lambda r: r[0].update(duration_ms="-1"), "row 2"),
}


@pytest.mark.parametrize("name", BROKEN_GAZE)
def test_a_broken_fixations_table_names_the_row(labelled, name):
    _refused_after(labelled, "fixations.csv", *BROKEN_GAZE[name])


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


def _many_with_findings():
    """Patients with one to three films, each with findings of its own; `rare` in few patients."""
    rng = np.random.default_rng(5)
    rows = []
    for row in _many(patients=400):
        known = {"common": bool(rng.random() < 0.5), "rare": bool(rng.random() < 0.06)}
        kept = {name: has for name, has in known.items() if rng.random() < 0.8}
        rows.append(row.model_copy(update={"label": None, "findings": kept}))
    return rows


def test_splits_of_findings_are_by_patient_and_stratified_by_the_rarest():
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    rows = labelled_set.assign_splits(_many_with_findings(), shares, seed=1)
    splits, found = defaultdict(set), defaultdict(set)
    for row in rows:
        splits[row.patient].add(row.split)
        found[row.patient] |= {name for name, has in row.findings.items() if has}
    assert len(splits) == 400 and all(len(of) == 1 for of in splits.values())
    strata = defaultdict(Counter)
    for row in rows:
        has = found[row.patient]
        strata["rare" if "rare" in has else "common" if has else "none"][row.split] += 1
    assert len(strata) == 3 and 20 < strata["rare"].total() < strata["none"].total()
    for stratum in strata.values():
        for split, share in shares.items():
            assert abs(stratum[split] - share * stratum.total()) <= 4, strata
    assert labelled_set.assign_splits(_many_with_findings(), shares, seed=1) == rows
    assert labelled_set.assign_splits(_many_with_findings(), shares, seed=2) != rows


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


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"findings": {"nobody": True}}, "finding 'nobody' is not one of"),
        ({"label": "opacity"}, "label 'opacity', but films of this set have findings"),
    ],
)
def test_a_set_of_findings_is_not_written_with_others(findings, tmp_path, update, words):
    rows = [findings.rows[0].model_copy(update=update), *findings.rows[1:]]
    with pytest.raises(DataError, match=words):
        labelled_set.write_set(tmp_path / "new", findings.info, rows, {}, [])
    assert not (tmp_path / "new").exists()
