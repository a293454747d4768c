"""Tables of labels in the published styles, as small files of the same form."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from cxrgaze.errors import ExitCode
from cxrgaze.evidence import phantom
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.train import cli
from cxrgaze.train.label_tables import Statement, _majority


@pytest.fixture
def source(tmp_path):
    """Writes films and a table, prepares them, and gives the set."""

    def make(table, files, *more, code=0):
        films = tmp_path / "films"
        for number, name in enumerate(files):
            (films / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(films / name), phantom.draw(number).pixels)
        (tmp_path / "labels.csv").write_text(table)
        arguments = ["prepare", "--films", films, "--labels", tmp_path / "labels.csv"]
        arguments += ["--output", tmp_path / "set", "--split", "train=1", "--synthetic", *more]
        assert cli.main([*map(str, arguments)]) == code
        return None if code else LabelledSet.open(tmp_path / "set")

    return make


def _known(labelled):
    return {row.film.removeprefix("films/"): labelled.known(row) for row in labelled.rows}


NIH = """Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position
1_000.png,Effusion|Mass,0,1,058Y,M,PA
1_001.png,No Finding,1,1,58,M,AP
2_000.png,Mass,0,2,411,F,PA
3_000.png,,0,3,20,F,PA
"""


def test_nih(source, capsys):
    """What is not listed is absent; of an empty list nothing is known; ages are cleaned."""
    files = ["images_001/1_000.png", "images_001/1_001.png", "images_002/2_000.png", "3_000.png"]
    labelled = source(NIH, files)
    assert labelled.info.class_kind == "findings"
    assert [(c.name, c.display) for c in labelled.info.classes] == [
        ("effusion", "Effusion"),
        ("mass", "Mass"),
    ]
    assert _known(labelled) == {
        "images_001/1_000.png": {"effusion": True, "mass": True},
        "images_001/1_001.png": {"effusion": False, "mass": False},
        "images_002/2_000.png": {"effusion": False, "mass": True},
        "3_000.png": {},
    }
    first, _, third, _ = labelled.rows
    assert (first.patient, first.age, first.sex, first.view) == ("1", 58, "M", "PA")
    assert third.age is None and "1 ages beyond 130 years" in capsys.readouterr().err


def test_classes_that_are_asked_for_are_those_of_the_set(source):
    files = ["1_000.png", "1_001.png", "2_000.png", "3_000.png"]
    labelled = source(NIH, files, "--classes", "Mass,No Finding,Hernia", "--map", "Effusion=")
    assert labelled.info.class_names == ("mass", "no_finding", "hernia")
    assert _known(labelled)["1_001.png"] == {"mass": False, "no_finding": True, "hernia": False}
    assert _known(labelled)["1_000.png"] == {"mass": True, "no_finding": False, "hernia": False}


CHEXPERT = """Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema,Pleural Effusion,Support Devices
CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,1.0
CheXpert-v1.0-small/train/patient00002/study1/view1_frontal.jpg,Male,87,Frontal,PA,,-1.0,0.0,
CheXpert-v1.0-small/train/patient00002/study1/view2_lateral.jpg,Male,87,Lateral,,,-1.0,0.0,
CheXpert-v1.0-small/train/patient00003/study1/view1_frontal.jpg,Unknown,0,Frontal,AP,,1.0,1.0,0.0
"""
FRONTAL = [f"train/patient0000{n}/study1/view1_frontal.jpg" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("more", "second"),
    [
        ([], {"pleural_effusion": False}),
        (["--uncertain", "present"], {"edema": True, "pleural_effusion": False}),
        (
            ["--uncertain", "absent", "--blank", "absent"],
            {"edema": False, "pleural_effusion": False, "support_devices": False},
        ),
    ],
)
def test_chexpert(source, capsys, more, second):
    """Films of one name in many folders; lateral ones out; No Finding says nothing of a tube."""
    labelled = source(CHEXPERT, FRONTAL, *more)
    assert labelled.info.class_names == ("edema", "pleural_effusion", "support_devices")
    known = _known(labelled)
    assert known[FRONTAL[0]] == {"edema": False, "pleural_effusion": False, "support_devices": True}
    assert known[FRONTAL[1]] == second
    assert known[FRONTAL[2]] == {"edema": True, "pleural_effusion": True, "support_devices": False}
    rows = labelled.rows
    assert [r.patient for r in rows] == ["patient00001", "patient00002", "patient00003"]
    assert [(r.view, r.sex, r.age) for r in rows] == [
        ("AP", "F", 68),
        ("PA", "M", 87),
        ("AP", None, 0),
    ]
    assert "1 rows of lateral films left out" in capsys.readouterr().err


def test_a_cell_that_says_nothing_known_is_named(source, capsys):
    table = CHEXPERT.replace("-1.0,0.0,\n", "maybe,0.0,\n", 1)
    source(table, FRONTAL, "--classes", "Edema", code=ExitCode.DATA)
    assert "row 3: Edema is 'maybe', expected 1, 0, -1 or nothing" in capsys.readouterr().err


VINDR_WIDE = """image_id,rad_id,Aortic enlargement,Cardiomegaly,No finding
a,R1,1,0,0
a,R2,1,1,0
a,R3,0,0,1
b,R1,0,0,1
b,R2,0,1,0
"""
VINDR_LONG = """image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
a,Aortic enlargement,0,R1,1,1,5,5
a,Aortic enlargement,0,R2,1,1,5,5
a,Cardiomegaly,3,R2,1,1,5,5
a,No finding,14,R3,,,,
b,No finding,14,R1,,,,
b,Cardiomegaly,3,R2,1,1,5,5
"""


@pytest.mark.parametrize("table", [VINDR_WIDE, VINDR_LONG], ids=["wide", "long"])
def test_vindr_takes_the_majority_of_its_readers(source, table):
    """Two of three saw it; where one of two did, it is not known."""
    labelled = source(table, ["a.png", "b.png"], "--patient-per-film")
    assert _known(labelled) == {
        "a.png": {"aortic_enlargement": True, "cardiomegaly": False},
        "b.png": {"aortic_enlargement": False},
    }


OWN = """file,patient,Effusion,mass,note
a.png,1,1,0,x
b.png,2,,-1,y
"""


def test_an_own_table_of_findings(source, capsys):
    labelled = source(OWN, ["a.png", "b.png"], "--findings")
    assert _known(labelled) == {"a.png": {"effusion": True, "mass": False}, "b.png": {}}
    assert "findings (own style): Effusion, mass" in capsys.readouterr().err


def test_an_own_table_with_several_labels_a_cell(source, capsys):
    table = "file,patient,label\na.png,1,effusion|mass\nb.png,2,no finding\nc.png,3,\n"
    files = ["a.png", "b.png", "c.png"]
    source(table, files, code=ExitCode.DATA)
    assert "row 2: 'effusion|mass' are several labels; give --findings" in capsys.readouterr().err
    labelled = source(table, files, "--findings")
    assert _known(labelled) == {
        "a.png": {"effusion": True, "mass": True},
        "b.png": {"effusion": False, "mass": False},
        "c.png": {},
    }


def test_two_names_of_one_finding(source):
    """Any of them will do; both must be absent for it to be absent."""
    table = "file,patient,edema,chf\na.png,1,1,0\nb.png,2,0,\nc.png,3,0,0\nd.png,4,,1\n"
    labelled = source(
        table, [f"{n}.png" for n in "abcd"], "--findings", "--map", "edema=wet", "--map", "chf=wet"
    )
    assert [labelled.known(row) for row in labelled.rows] == [
        {"wet": True},
        {},
        {"wet": False},
        {"wet": True},
    ]


def test_exclusive_classes_come_from_the_labels_or_from_what_is_asked(source, tmp_path, capsys):
    table = "file,patient,label\na.png,1,Pleural effusion\nb.png,2,clear\nc.png,3,pneumonia\n"
    files = ["a.png", "b.png", "c.png"]
    labelled = source(table, files)
    assert labelled.info.class_names == ("pneumonia", "clear", "pleural_effusion")
    assert [c.snomed for c in labelled.info.classes] == ["233604007", None, None]
    assert [row.label for row in labelled.rows] == ["pleural_effusion", "clear", "pneumonia"]
    (tmp_path / "c.toml").write_text(
        '[[classes]]\nname = "clear"\ndisplay = "Nothing seen"\nsnomed = "17621005"\n'
        '[[classes]]\nname = "wet"\ndisplay = "Fluid"\n'
    )
    maps = ["--map", "Pleural effusion=wet", "--map", "pneumonia="]
    labelled = source(table, files, "--classes", tmp_path / "c.toml", *maps)
    assert [(c.name, c.display, c.snomed) for c in labelled.info.classes] == [
        ("clear", "Nothing seen", "17621005"),
        ("wet", "Fluid", None),
    ]
    assert [row.label for row in labelled.rows] == ["wet", "clear", None]
    source(table, files, "--classes", "paper", code=ExitCode.DATA)
    assert "label 'Pleural effusion' is not one of ['normal'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("file,patient,label\na.png,1,x\nb.png,2,x\n", "a diagnosis needs two classes or more"),
        ("film,patient,label\na.png,1,x\n", "no column of films; expected one of 'file'"),
        ("image_id,rad_id,Mass\nzz,R1,1\n", "row 2: zz does not exist below"),
        ("Image Index,Finding Labels,Patient ID\nd.png,Mass,1\n", "may be any of 2 files"),
    ],
)
def test_what_cannot_be_read_is_named(source, capsys, table, words):
    source(
        table,
        ["a.png", "b.png", "one/d.png", "two/d.png"],
        "--patient-per-film",
        code=ExitCode.DATA,
    )
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("classes", ["a,a", "a,,b", "1,2", "gone.toml"])
def test_classes_that_make_no_diagnosis_are_refused(source, classes):
    table = "file,patient,label\na.png,1,a\nb.png,2,b\n"
    source(table, ["a.png", "b.png"], "--classes", classes, code=ExitCode.USAGE)


def test_the_majority_by_counting():
    """Against a slow form, on drawn votes."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        votes = rng.choice([True, False, None], (rng.integers(1, 6), 4))
        said = [
            Statement({n: bool(v) for n, v in zip("abcd", row, strict=True) if v is not None})
            for row in votes
        ]
        for name, column in zip("abcd", votes.T, strict=True):
            yes, no = (sum(v is which for v in column.tolist()) for which in (True, False))
            expected = None if yes == no else yes > no
            assert _majority(said).says(name) == expected
