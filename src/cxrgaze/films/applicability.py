"""Why the network must not be applied to a DICOM film, and what its header leaves in doubt.

What speaks is data: words of views and body parts in the languages that headers come in, and codes
of views. A clear other thing is a reason, a doubtful or missing label a note. Header values are
never quoted. The rules stand in docs/films.md.
"""

from __future__ import annotations

import fnmatch
import re
import unicodedata
from typing import NamedTuple

from pydicom.dataset import Dataset
from pydicom.uid import DigitalXRayImageStorageForProcessing, SecondaryCaptureImageStorage

from cxrgaze.films.header import items, number, text

MODALITIES = frozenset({"", "CR", "DX", "DR", "RG", "OT"})
"""Modality (0008,0060); DR stands in many files, and in no list of defined terms any more."""

FRONTAL_WORDS = frozenset(
    {
        "PA",
        "AP",
        "FRONTAL",
        "POSTEROANTERIOR",
        "ANTEROPOSTERIOR",
        "POSTERO",
        "ANTERO",
        "POSTERIOR",
        "ANTERIOR",
        "FACE",  # French
        "FRONTALE",
    }
)
"""Words of a frontal view, in View Position (0018,5101) or in the meaning of a code."""

NEUTRAL_WORDS = frozenset(
    {
        *("CHEST", "THORAX", "TORAX", "LUNG", "LUNGS", "CXR"),
        *("PORTABLE", "MOBILE", "BEDSIDE", "BED", "ERECT", "UPRIGHT", "STANDING", "SITTING"),
        *("SUPINE", "SEMIERECT", "SEMI", "INSPIRATION", "EXPIRATION", "INSP", "EXP", "VIEW"),
        *("VIEWS", "PROJECTION", "GRID", "SINGLE", "ONE", "DE", "TO", "AND", "ICU", "ER"),
        *("UNKNOWN", "OTHER", "NA", "NONE"),
        *("LIEGEND", "STEHEND", "SITZEND", "BETT"),  # German
        *("DEBOUT", "COUCHE", "ASSIS", "LIT"),  # French
        *("PIE", "SENTADO", "CAMA", "ORTOSTATISMO", "LEITO", "LETTO"),  # Romance
    }
)
"""Words beside a view that name none."""

FRONTAL_CODES = frozenset(
    {
        ("SCT", "399348003"),  # antero-posterior
        ("SCT", "272479007"),  # postero-anterior
        ("SCT", "399033003"),  # frontal
        ("SRT", "R-10206"),
        ("SRT", "R-10214"),
        ("SRT", "R-40888"),
        ("SRT", "R-10202"),
    }
)
"""Frontal views of CID 4010, DX View (PS3.16), by coding scheme and value."""
_SCHEMES = {"SCT": "SCT", "SRT": "SRT", "SNM3": "SRT", "99SDM": "SRT"}
"""Coding schemes of CID 4010's codes: SNOMED CT, and what SNOMED RT was written as before."""

CHEST_WORDS = (
    *("CHEST", "THORAX", "LUNG"),
    *("TORAX", "PECHO", "PULMON", "PULMAO", "PEITO"),  # Spanish, Portuguese
    *("POITRINE", "POUMON"),  # French
    *("BRUSTKORB", "LUNGE", "BRUST"),  # German
    *("TORACE", "POLMON", "PETTO"),  # Italian
    *("BORST", "LONGEN"),  # Dutch
    *("BROSTKORG", "BRYST", "RINTAKEHA", "KEUHKOT"),  # Swedish, Danish, Finnish
    *("TORAKS", "GOGUS", "AKCIGER"),  # Turkish
    *("KLATKA", "PLUCA", "HRUDNIK", "PLICE", "MELLKAS", "TUDO"),  # Polish, Czech, Hungarian
    *("ГРУД", "ΘΩΡΑ", "胸", "흉부"),  # Russian, Greek, Japanese and Chinese, Korean
)
"""Body parts (0018,0015) that are the chest, without accents."""

OTHER_PARTS = frozenset(
    {
        *("ABDOMEN", "PELVIS", "HIP", "SKULL", "HEAD", "NECK", "BRAIN", "SINUS", "JAW", "MAXILLA"),
        *("MANDIBLE", "TOOTH", "TEETH", "SPINE", "CSPINE", "TSPINE", "LSPINE", "SSPINE", "COCCYX"),
        *("SACRUM", "SHOULDER", "CLAVICLE", "SCAPULA", "HUMERUS", "ARM", "ELBOW", "FOREARM"),
        *("WRIST", "HAND", "FINGER", "THUMB", "FEMUR", "THIGH", "KNEE", "PATELLA", "LEG", "TIBIA"),
        *("FIBULA", "ANKLE", "FOOT", "HEEL", "CALCANEUS", "TOE", "EXTREMITY", "BREAST", "KIDNEY"),
        *("BLADDER", "LIVER", "ZYGOMA", "ORBIT", "WHOLEBODY"),
    }
)
"""Body parts of PS3.16 annex L that are clearly another."""


class Judged(NamedTuple):
    """What a header says against a film, and what it leaves in doubt."""

    reasons: tuple[str, ...]
    notes: tuple[str, ...]


def judge_header(header: Dataset) -> Judged:
    """Why the network must not be applied to this image, by its header."""
    reasons, notes = [], []
    frames = number(header, "NumberOfFrames") or 1
    if frames > 1:
        reasons.append(f"multi-frame: {frames:.0f} frames, expected one")
    if text(header, "Modality") not in MODALITIES:
        reasons.append("modality is not CR or DX")
    for kind, sentence in (_body(header), _view(header), _orientation(header)):
        if kind == "reason":
            reasons.append(sentence)
        elif kind == "note":
            notes.append(sentence)
    sop_class = header.get("SOPClassUID")
    if sop_class == DigitalXRayImageStorageForProcessing:
        reasons.append("raw detector values (DX For Processing), expected For Presentation")
    burned = text(header, "BurnedInAnnotation") == "YES"
    if sop_class == SecondaryCaptureImageStorage and burned:
        reasons.append("secondary capture with burned-in text")
    return Judged(tuple(dict.fromkeys(reasons)), tuple(notes))


def words(label: str) -> list[str]:
    """A label's words in capitals without accents; letters that stand alone are joined (P.A.).

    A letter that a wrong character set lost is a `?`.
    """
    plain = _plain(label.replace("\N{REPLACEMENT CHARACTER}", "?"))
    plain = re.sub(r"(?<![A-Z])([A-Z])\W+([A-Z])(?![A-Z])", r"\1\2", plain)
    return [word for word in re.split(r"[^\w?*]+|[\d_]+", plain) if word]


def _plain(label: str) -> str:
    decomposed = unicodedata.normalize("NFKD", label.upper()).translate(_STROKES)
    return "".join(c for c in decomposed if not unicodedata.combining(c))


_STROKES = str.maketrans("ŁØĐ", "LOD")  # which no normal form takes apart

_LATERAL = "lateral view, expected a frontal one (PA or AP)"
_OTHER_VIEW = "another view than a frontal one (PA or AP)"
_NO_VIEW = "the header names no view; a frontal one was assumed"


def _view(header: Dataset) -> tuple[str, str]:
    labels = [words(text(header, "ViewPosition"))]
    is_frontal = False
    for item in items(header, "ViewCodeSequence"):
        scheme = _SCHEMES.get(text(item, "CodingSchemeDesignator"))
        if scheme is None:
            labels.append(words(text(item, "CodeMeaning")))
        elif (scheme, text(item, "CodeValue")) in FRONTAL_CODES:
            is_frontal = True
        else:
            return "reason", _OTHER_VIEW if "LATERAL" not in text(item, "CodeMeaning") else _LATERAL
    said = {word for label in labels for word in label} - NEUTRAL_WORDS
    others = said - FRONTAL_WORDS
    if any(_names_lateral(word) for word in others):
        return "reason", _LATERAL
    if others:
        return "reason", _OTHER_VIEW
    return ("", "") if said or is_frontal else ("note", _NO_VIEW)


def _names_lateral(word: str) -> bool:
    return word in ("LL", "RL", "LLD", "RLD") or word.startswith(("LAT", "LEFTLAT", "RIGHTLAT"))


def _body(header: Dataset) -> tuple[str, str]:
    parts = words(text(header, "BodyPartExamined"))
    if not parts:
        return "", ""
    if any(map(_is_chest, parts)):
        return "", ""
    if any(part in OTHER_PARTS for part in parts):
        return "reason", "body part is not the chest"
    return "note", "the body part in the header is not one that is known; the chest was assumed"


def _is_chest(word: str) -> bool:
    if "?" in word or "*" in word:
        letters = sum(c.isalpha() for c in word)
        return letters > 2 and any(fnmatch.fnmatchcase(part, word) for part in _CHEST)
    return word.startswith(_CHEST)


_CHEST = tuple(map(_plain, CHEST_WORDS))


def _orientation(header: Dataset) -> tuple[str, str]:
    """Patient Orientation (0020,0020): of a row and of a column (PS3.3 C.7.6.1.1.1)."""
    value = header.get("PatientOrientation") or ()
    if isinstance(value, str) or len(value) < 2:
        return "", ""
    row, column = (str(end).strip().upper()[:1] for end in value[:2])
    if row in ("A", "P"):
        return "reason", _LATERAL
    if (row, column) in (("L", "F"), ("", "")):
        return "", ""
    return "note", (
        "the header says that the film does not stand upright with the patient's left on the "
        "right; it was not turned"
    )
