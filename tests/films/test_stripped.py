"""Stripped DICOM: the same film, and nothing of the patient."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from cxrgaze.errors import FilmError
from cxrgaze.films.decode import film_from_bytes
from cxrgaze.films.find import looks_like_dicom
from cxrgaze.films.stripped import stripped

SECRETS = {
    "PatientName": "Secret^Name",
    "PatientID": "secret-id",
    "PatientBirthDate": "19010203",
    "InstitutionName": "secret hospital",
    "StudyDescription": "secret study",
    "ImageComments": "secret comment",
    "OperatorsName": "Secret^Operator",
    "StudyInstanceUID": "1.2.3.4.5.6.7.8.9",
    "SOPInstanceUID": "1.2.3.4.5.6.7.8.10",
    "WindowCenterWidthExplanation": "secret window",
    "ImagePresentationComments": "secret presentation",
}


def _with_secrets(data: bytes) -> bytes:
    header = pydicom.dcmread(io.BytesIO(data))
    for keyword, value in SECRETS.items():
        setattr(header, keyword, value)
    block = header.private_block(0x0029, "Secret Creator", create=True)
    block.add_new(1, "LO", "secret private")
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "R-10214", "SRT", "PA"
    code.PatientName = "Secret^Nested"
    header.ViewCodeSequence = Sequence([code])
    buffer = io.BytesIO()
    header.save_as(buffer)
    return buffer.getvalue()


def _same(data: bytes, again: bytes) -> None:
    one, two = film_from_bytes(data, "f.dcm"), film_from_bytes(again, "f.dcm")
    assert np.array_equal(one.pixels, two.pixels)
    for name in ("pixel_source", "spacing_mm", "reasons", "notes"):
        assert getattr(one, name) == getattr(two, name)


def test_the_real_films_are_the_same(films):
    paths = sorted(films.glob("*.dcm"))
    assert paths
    for path in paths:
        data = _with_secrets(path.read_bytes())
        again = stripped(data, path.name)
        _same(data, again)
        assert again == stripped(data, path.name)
        lower = again.lower()
        assert b"secret" not in lower and b"19010203" not in lower and b"1.2.3.4.5" not in lower


def test_every_film_that_is_read_can_be_stripped(shared):
    """Deflated ones, a delimiter out of its place, odd headers of every kind."""
    compared = 0
    for folder in ("cxr", "field_films"):
        for path in sorted((shared / folder).glob("*.dcm")):
            data = path.read_bytes()
            if not looks_like_dicom(data):
                continue
            try:
                film_from_bytes(data, path.name)
            except FilmError:
                continue
            _same(data, stripped(data, path.name))
            compared += 1
    assert compared >= 20


def test_what_names_something_elsewhere_goes(made):
    """A table's UID leads back to the study that it was made for."""
    data = made.file(PaletteColorLookupTableUID="1.2.3.4.5.6", **made.WINDOW)
    assert b"1.2.3.4.5.6" in data and b"1.2.3.4.5.6" not in stripped(data, "f.dcm")


@pytest.mark.parametrize("syntax", [0, 1, 2])
def test_every_encoding_and_every_table_survives(made, syntax):
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [3361, 0, 12], np.arange(3361, dtype=np.uint16).tobytes()
    item = Sequence([lut])
    for tags in ({**made.WINDOW}, {"VOILUTSequence": item}, {"PixelSpacing": ["0.2", "0.2"]}):
        data = made.file(syntax=made.SYNTAXES[syntax], PatientName="Secret^Name", **tags)
        again = stripped(data, "f.dcm")
        _same(data, again)
        assert b"Secret" not in again


def test_what_cannot_be_stripped_is_said_without_what_it_holds(monkeypatch):
    def raises(*anything, **more):
        raise ValueError("Secret^Name")

    monkeypatch.setattr(pydicom, "dcmread", raises)
    with pytest.raises(FilmError, match="x.dcm: its header cannot be stripped .ValueError") as told:
        stripped(b"x", "x.dcm")
    assert "Secret" not in str(told.value)
