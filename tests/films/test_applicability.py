"""Views, body parts, modalities and orientation: what speaks against a film, and what is a note."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr._snomed_dict import mapping
from pydicom.sr.codedict import codes

from cxrgaze.films.applicability import FRONTAL_CODES, judge_header

QUICK = settings(derandomize=True, max_examples=60, deadline=None)


def _header(**tags) -> Dataset:
    header = Dataset()
    header.Modality, header.BodyPartExamined, header.ViewPosition = "DX", "CHEST", "PA"
    for name, value in tags.items():
        if isinstance(value, str):  # a value of whatever text, as pydicom reads them
            tag = pydicom.datadict.tag_for_keyword(name)
            element = pydicom.DataElement(tag, "LO", "")
            element._value = value
            header[tag] = element
        else:
            setattr(header, name, value)
    return header


def _code(value, scheme="SCT", meaning="") -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _views(*items, **tags):
    return judge_header(_header(ViewCodeSequence=Sequence(items), **{"ViewPosition": ""} | tags))


def test_a_plain_frontal_chest_says_nothing():
    assert judge_header(_header()) == ((), ())


# --- views by words -----------------------------------------------------------------------------

FRONTAL = (
    *(
        "PA",
        "AP",
        "pa",
        " ap ",
        "P.A.",
        "A.P.",
        "p. a.",
        "P/A",
        "P-A",
        "P A",
        "PA CHEST",
        "Chest AP",
    ),
    *("CHEST PA", "AP PORTABLE", "AP SUPINE", "AP ERECT", "PA UPRIGHT", "PA_GRID", "AP SEMI-ERECT"),
    *("POSTERO-ANTERIOR", "Postero Anterior", "ANTEROPOSTERIOR", "antero-posterior", "FRONTAL"),
    *("FACE", "de face", "Frontale", "THORAX PA", "Tórax PA", "TÓRAX AP", "PA INSP", "PA 1"),
    *("AP BEDSIDE", "PA VIEW", "1 VIEW PA", "POSTERIOR TO ANTERIOR"),
)
LATERAL = (
    *("LAT", "LATERAL", "lat", "LL", "RL", "LLD", "RLD", "LAT CHEST", "CHEST LAT", "LEFT LATERAL"),
    *("Right Lateral", "L LAT", "R-LAT", "LATERALE", "LAT.", "PA LAT", "PA/LAT", "LATERAL PA"),
    *("LAT DECUB", "Latéral", "LLAT"),
)
OTHER = (
    *("OBL", "OBLIQUE", "RAO", "LAO", "RPO", "LPO", "PA OBLIQUE", "AP OBL", "SWIMMERS", "AXIAL"),
    *("Swimmer's", "LORDOTIC", "AP LORDOTIC", "DECUBITUS", "TANGENTIAL", "PROFIL", "PERFIL"),
    *("SEITLICH", "schräg", "CC", "MLO", "SAGITTAL", "STRYKER", "侧位", "側面", "Боковая"),
)


@pytest.mark.parametrize("label", FRONTAL)
def test_a_frontal_view_says_nothing(label):
    assert judge_header(_header(ViewPosition=label)) == ((), ())


@pytest.mark.parametrize("label", (*LATERAL, *OTHER))
def test_another_view_is_a_reason(label):
    reasons, notes = judge_header(_header(ViewPosition=label))
    assert len(reasons) == 1 and "view" in reasons[0] and not notes
    if label in LATERAL and label != "LLAT":
        assert "lateral view" in reasons[0]


@pytest.mark.parametrize(
    "label", ["", "   ", "-", "--", "CHEST", "UNKNOWN", "PORTABLE", "N/A", "NONE"]
)
def test_no_view_is_a_note(label):
    reasons, (note,) = judge_header(_header(ViewPosition=label))
    assert not reasons and "no view" in note


def test_a_header_without_a_view_is_noted():
    header = _header()
    del header.ViewPosition
    reasons, (note,) = judge_header(header)
    assert not reasons and "no view" in note


@QUICK
@given(
    side=st.sampled_from(["", "LEFT ", "RIGHT ", "L-", "R "]),
    word=st.sampled_from(["LAT", "LATERAL", "Lateral", "LATERALE", "lat"]),
    more=st.sampled_from(["", " CHEST", " PA", " ERECT", ".", " (portable)", "/AP"]),
    before=st.sampled_from(["", "CHEST ", "PA ", "thorax, "]),
)
def test_lateral_in_any_words_around_it(side, word, more, before):
    reasons, _ = judge_header(_header(ViewPosition=before + side + word + more))
    assert reasons == ("lateral view, expected a frontal one (PA or AP)",)


# --- views by codes -----------------------------------------------------------------------------

CID_4010 = {
    code.value: code.meaning for code in (getattr(codes.cid4010, n) for n in codes.cid4010.dir())
}
FRONTAL_MEANINGS = {"antero-posterior", "postero-anterior", "frontal"}


def test_the_frontal_codes_are_those_of_the_standard():
    of_snomed_ct = {value for scheme, value in FRONTAL_CODES if scheme == "SCT"}
    assert {CID_4010[value] for value in of_snomed_ct} == FRONTAL_MEANINGS
    assert len(of_snomed_ct) == 3 and len(CID_4010) > 40


def test_what_snomed_rt_called_them_is_known():
    """pydicom's table (PS3.16 annex O); R-10214 stands in older editions, dcm4che among them."""
    expected = {mapping["SCT"][value] for scheme, value in FRONTAL_CODES if scheme == "SCT"}
    assert expected <= {value for scheme, value in FRONTAL_CODES if scheme == "SRT"}


def test_no_snomed_rt_code_is_that_of_another_view():
    others = {mapping["SCT"].get(v) for v, m in CID_4010.items() if m not in FRONTAL_MEANINGS}
    assert not others & {value for _, value in FRONTAL_CODES}


@pytest.mark.parametrize("value", CID_4010)
@pytest.mark.parametrize("meaning", ["Ansicht", "frontal"])
def test_a_code_decides_whatever_its_meaning_says(value, meaning):
    reasons, notes = _views(_code(value, meaning=meaning))
    assert not notes
    assert bool(reasons) == (CID_4010[value] not in FRONTAL_MEANINGS)


@pytest.mark.parametrize("scheme", ["SRT", "SNM3", "99SDM"])
@pytest.mark.parametrize("value", CID_4010)
def test_snomed_rt_by_its_three_names(scheme, value):
    code = mapping["SCT"].get(value)
    if code is None or code == "R-40888":
        return  # the fault above
    reasons, notes = _views(_code(code, scheme, "irgendwas"))
    assert not notes and bool(reasons) == (CID_4010[value] not in FRONTAL_MEANINGS)


@pytest.mark.parametrize(
    ("meaning", "is_frontal"),
    [("PA", True), ("Postero-anterior", True), ("left lateral", False), ("oblique", False)],
)
def test_a_private_code_is_judged_by_its_meaning(meaning, is_frontal):
    reasons, notes = _views(_code("X1", "99ACME", meaning))
    assert bool(reasons) != is_frontal and not notes
    nameless, (note,) = _views(_code("X1", "99ACME", ""))
    assert not nameless and "no view" in note


def test_every_code_and_the_label_count():
    frontal, lateral = _code("272479007"), _code("399173006", meaning="Seitaufnahme")
    assert _views(frontal, frontal) == ((), ())
    assert _views(frontal, lateral).reasons and _views(lateral, frontal).reasons
    assert _views(frontal, ViewPosition="LAT").reasons
    assert _views(lateral, ViewPosition="PA").reasons
    assert _views(frontal, ViewPosition="PA") == ((), ())


# --- body parts ---------------------------------------------------------------------------------

CHEST = (
    *(
        "CHEST",
        "chest",
        "Chest PA",
        "CHEST_PORTABLE",
        "THORAX",
        "Thorax",
        "TÓRAX",
        "TORAX",
        "tórax",
    ),
    *("T?RAX", "T*RAX", "T\N{REPLACEMENT CHARACTER}RAX", "TO\u0301RAX", "LUNG", "LUNGS", "LUNGE"),
    *("PULMÓN", "PULMÃO", "POUMONS", "Poitrine", "Brustkorb", "TORACE", "POLMONI", "BORST"),
    *("BRÖSTKORG", "GÖĞÜS", "KLATKA PIERSIOWA", "HRUDNÍK", "ГРУДНАЯ КЛЕТКА", "грудь", "ΘΩΡΑΚΑΣ"),
    *("胸部", "胸片", "흉부", "PECHO", "PEITO", "TÜDŐ", "MELLKAS", "KEUHKOT", "akciğer", "PŁUCA"),
    *("CHEST/ABDOMEN", "RIBS CHEST", "Thorax a.p.", "LONGEN"),
)
OTHER_PART = (
    *("HAND", "hand", "ABDOMEN", "PELVIS", "SKULL", "KNEE", "L HAND", "HAND PA", "CSPINE", "FOOT"),
    *("SHOULDER", "HIP", "BREAST", "LEG", "C-SPINE", "L SPINE", "WRIST LEFT"),
)
DOUBTFUL = ("XYZ", "?", "???", "*", "T?", "TÃ\x93RAX", "OTHER THING", "RX", "心", "TORSO", "RIB")


@pytest.mark.parametrize("part", CHEST)
def test_the_chest_in_any_language_says_nothing(part):
    assert judge_header(_header(BodyPartExamined=part)) == ((), ())


@pytest.mark.parametrize("part", OTHER_PART)
def test_a_clear_other_part_is_a_reason(part):
    assert judge_header(_header(BodyPartExamined=part)) == (("body part is not the chest",), ())


@pytest.mark.parametrize("part", DOUBTFUL)
def test_a_doubtful_part_is_a_note(part):
    reasons, (note,) = judge_header(_header(BodyPartExamined=part))
    assert not reasons and "body part" in note


@pytest.mark.parametrize("charset", ["ISO_IR 100", "ISO_IR 192", None])
@pytest.mark.parametrize("written", ["latin-1", "utf-8"])
def test_a_chest_with_an_accent_in_a_file_is_read(made, charset, written):
    """CS has no accents (PS3.5 6.2): readers take the bytes in one set or another."""
    raw = "TÓRAX".encode(written)
    raw += b" " * (len(raw) % 2)
    marker = b"ABCDEFGH"[: len(raw)]
    tags = {} if charset is None else {"SpecificCharacterSet": charset}
    data = made.file(BodyPartExamined=marker.decode(), **tags, **made.WINDOW)
    film = made.film(data.replace(marker, raw))
    assert not film.reasons
    if written == "latin-1":
        assert not film.notes


# --- modality and orientation -------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["", "CR", "DX", "DR", "RG", "OT", "dx", " CR"])
def test_modalities_of_radiographs(modality):
    assert judge_header(_header(Modality=modality)) == ((), ())


@pytest.mark.parametrize("modality", ["CT", "MR", "US", "MG", "PX", "IO", "NM", "SR", "ECG"])
def test_other_modalities_are_a_reason(modality):
    assert judge_header(_header(Modality=modality)).reasons == ("modality is not CR or DX",)


ROWS_AND_COLUMNS = [(r, c) for r in "LRAPHF" for c in "LRAPHF" if r != c]


@pytest.mark.parametrize("ends", [*ROWS_AND_COLUMNS, ("LF", "FP"), ("", ""), ("RA", "FL")])
def test_patient_orientation(ends):
    """C.7.6.1.1.1: the directions of a row and of a column; upright and facing us is L\\F."""
    reasons, notes = judge_header(_header(PatientOrientation=list(ends)))
    row, column = (end[:1] for end in ends)
    if row in ("A", "P"):
        assert "lateral" in reasons[0]
    elif (row, column) in (("L", "F"), ("", "")):
        assert not reasons and not notes
    else:
        assert reasons or "was not turned" in notes[0]


@pytest.mark.parametrize("ends", [("L", "A"), ("H", "P"), ("F", "A"), ("R", "P")])
def test_no_frontal_film_has_columns_from_front_to_back(ends):
    reasons, notes = judge_header(_header(PatientOrientation=list(ends)))
    assert reasons or notes


@pytest.mark.parametrize("value", [None, "", "L", ["L"], ["X", "Y"], ["L", ""]])
def test_an_odd_orientation_is_survived(value):
    header = _header()
    header.PatientOrientation = value
    assert not judge_header(header).reasons


def test_a_film_is_never_turned_by_its_header(made):
    plain = made.film(made.file(**made.WINDOW)).pixels
    for ends in (["R", "F"], ["L", "H"], ["F", "R"]):
        film = made.film(made.file(PatientOrientation=ends, **made.WINDOW))
        assert np.array_equal(film.pixels, plain) and "not turned" in film.notes[0]


TEXT = st.text("PAL T.?*/-_1\\^=\0\n\u0301ÄŁßЖ胸\ufffd\U0001f4a5", max_size=12)


# --- anything -----------------------------------------------------------------------------------


@QUICK
@given(label=TEXT, part=TEXT, modality=TEXT)
def test_whatever_stands_in_a_header_is_survived_and_never_quoted(label, part, modality):
    header = _header(ViewPosition=label, BodyPartExamined=part, Modality=modality)
    other = judge_header(header)
    fixed = judge_header(_header(ViewPosition="QQQ", BodyPartExamined="QQQ", Modality="QQQ"))
    known = {*fixed.reasons, *fixed.notes, "body part is not the chest"}
    known |= set(judge_header(_header(ViewPosition="LAT")).reasons)
    known |= set(judge_header(_header(ViewPosition="")).notes)
    assert {*other.reasons, *other.notes} <= known


@pytest.mark.parametrize("name", ["ViewPosition", "BodyPartExamined", "Modality"])
def test_the_first_of_several_values_counts(made, name):
    right = {"ViewPosition": "PA", "BodyPartExamined": "CHEST", "Modality": "CR"}[name]
    data = made.file(**{name: [right, "XX"]}, **made.WINDOW)
    film = made.film(data)
    assert not film.reasons and not film.notes
    assert len(pydicom.dcmread(io.BytesIO(data))[name].value) == 2
