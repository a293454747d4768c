"""The DICOM identity of a film, sealed: what a result must refer to, and nobody else sees."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator

import pydicom
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

REFERENCES = (
    # SOP Common, General Study, General Series and General Image (PS3.3 C.12.1, C.7.2.1, C.7.3.1,
    # C.7.6.1): what is referred to.
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
    "Modality",
    "SeriesNumber",
    "InstanceNumber",
    # Patient and Patient Study (C.7.1.1, C.7.2.2).
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    # General Acquisition and DX Positioning (C.7.10.1, C.8.11.5).
    "AcquisitionDate",
    "AcquisitionTime",
    "AcquisitionNumber",
    "BodyPartExamined",
    "ViewPosition",
    "PatientOrientation",
)
"""Attributes of an identity, by keyword; everything else of a header is forgotten."""


class DicomIdentity:
    """The `REFERENCES` of one film.

    Sealed: it shows nothing of itself in messages, logs, JSON or a debugger's line. `reveal` is the
    one way in.

    Args:
        encoded: the attributes as a data set in explicit VR little endian (PS3.5 A.2).
    """

    __slots__ = ("encoded",)

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded

    @classmethod
    def of(cls, header: Dataset) -> DicomIdentity:
        """The identity that a header holds; what is missing or malformed is left out."""
        sound = [keyword for keyword in REFERENCES if keyword in header]
        try:
            return cls(_encoded(header, sound))
        except Exception:  # whatever pydicom raises on malformed bytes
            sound = [keyword for keyword in sound if _is_sound(header, keyword)]
            return cls(_encoded(header, sound))

    def reveal(self) -> Dataset:
        """The attributes. They identify a patient: keep them where the film may be."""
        with _quiet():
            return read_dataset(io.BytesIO(self.encoded), False, True)

    def __repr__(self) -> str:
        return "DicomIdentity(sealed)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DicomIdentity) and self.encoded == other.encoded

    def __hash__(self) -> int:
        return hash(self.encoded)


def _encoded(header: Dataset, keywords: Iterable[str]) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    copied = Dataset()
    with _quiet():
        for keyword in keywords:
            copied[keyword] = header[keyword]
        write_dataset(buffer, copied)
    return bytes(buffer.getvalue())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without pydicom's warnings, which quote header values."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _is_sound(header: Dataset, keyword: str) -> bool:
    """Whether an attribute can be read and written, with the character set of the header."""
    try:
        _encoded(header, {"SpecificCharacterSet", keyword} & set(header.dir()))
    except Exception:  # whatever pydicom raises on malformed bytes
        return False
    return True
