"""A DICOM film without what identifies its patient: only what its pixels need is kept.

A list of what stays, not of what goes: private attributes, texts and whatever a later edition adds
are gone too. What stays is as it was written: a body part, a view and the meaning of a code are
words of a device, and what is burned into the pixels is there still (`BurnedInAnnotation` stays,
and makes such a film not applicable).
"""

from __future__ import annotations

import io

import pydicom
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import (
    PYDICOM_IMPLEMENTATION_UID,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from cxrgaze.errors import FilmError
from cxrgaze.files import sha256
from cxrgaze.films.header import transfer_syntax
from cxrgaze.films.quiet import quiet

_KEPT = frozenset(
    "SOPClassUID Modality PresentationIntentType BodyPartExamined ViewPosition ViewCodeSequence "
    "PatientOrientation ImagerPixelSpacing PixelSpacing PixelAspectRatio BurnedInAnnotation "
    "ConversionType ImageType PresentationLUTShape ModalityLUTSequence VOILUTSequence "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence ShutterShape "
    "ShutterLeftVerticalEdge ShutterRightVerticalEdge ShutterUpperHorizontalEdge "
    "ShutterLowerHorizontalEdge CenterOfCircularShutter RadiusOfCircularShutter "
    "VerticesOfThePolygonalShutter AnatomicRegionSequence".split()
)
"""Attributes beside those of groups 0028 and 7FE0 (image pixels) that stay at the top."""
_INNER = frozenset(
    "CodeValue CodingSchemeDesignator CodeMeaning LUTDescriptor LUTData ModalityLUTType "
    "FrameVOILUTSequence PixelValueTransformationSequence PixelMeasuresSequence WindowCenter "
    "WindowWidth VOILUTFunction RescaleSlope RescaleIntercept RescaleType PixelSpacing "
    "ViewModifierCodeSequence".split()
)
"""And within sequences."""
_TEXTS = frozenset("LO LT PN SH ST UC UI UN UR UT".split())
"""Kinds of value in which anything may be written, or that name something elsewhere."""


def stripped(data: bytes, name: str) -> bytes:
    """The bytes of a DICOM file of the same pixels, without its patient, the same every time.

    Raises:
        FilmError: not a DICOM file that can be written again.
    """
    try:
        with quiet():
            return _stripped(data)
    except Exception as error:
        kind = type(error).__name__  # its message may quote header values
        raise FilmError(f"{name}: its header cannot be stripped ({kind})") from None


def _stripped(data: bytes) -> bytes:
    full = pydicom.dcmread(io.BytesIO(data), force=True)
    syntax = transfer_syntax(full)
    if syntax == DeflatedExplicitVRLittleEndian:  # what is written here is not deflated
        syntax = ExplicitVRLittleEndian
    kept = _only(full, _KEPT, of_pixels=True)
    kept.SOPInstanceUID = UID(f"2.25.{int(sha256(data)[:30], 16)}")
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = full.get("SOPClassUID") or UID("1.2.840.10008.5.1.4.1.1.7")
    meta.MediaStorageSOPInstanceUID = kept.SOPInstanceUID
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    meta.FileMetaInformationVersion = b"\0\1"
    meta.FileMetaInformationGroupLength = 0  # filled in by the writer
    file = pydicom.filebase.DicomBytesIO()
    file.write(b"\0" * 128 + b"DICM")
    file.is_little_endian, file.is_implicit_VR = True, False
    write_file_meta_info(file, meta)
    file.is_little_endian = syntax != ExplicitVRBigEndian
    file.is_implicit_VR = syntax == ImplicitVRLittleEndian
    write_dataset(file, kept)
    return bytes(file.getvalue())


def _only(dataset: Dataset, keywords: frozenset[str], *, of_pixels: bool = False) -> Dataset:
    kept = Dataset()
    for tag in dataset.keys():
        is_wanted = keyword_for_tag(tag) in keywords
        if not is_wanted and not (of_pixels and tag.group in (0x0028, 0x7FE0)):
            continue
        try:
            element = dataset[tag]
        except Exception:  # a malformed one is a missing one, as in `header.attribute`
            continue
        if element.VR == "SQ":
            kept.add_new(tag, "SQ", [_only(item, _INNER) for item in element.value])
        elif is_wanted or element.VR not in _TEXTS:
            kept.add(element)
    return kept
