"""Attributes of a DICOM header as they are asked for: a malformed one is a missing one."""

from __future__ import annotations

import math
import re
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian


def attribute(header: Dataset, keyword: str) -> Any:
    """An attribute, None where missing or malformed: pydicom parses it when it is asked for."""
    try:
        return header.get(keyword)
    except Exception:  # whatever pydicom raises on malformed bytes
        return None


def text(header: Dataset, keyword: str) -> str:
    """The first of one or several texts, upper case, empty where missing."""
    value = attribute(header, keyword)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return str(value or "").strip().upper()


def number(header: Dataset, keyword: str) -> float | None:
    """The first of one or several numbers, None where missing or not finite.

    A decimal comma is read as a point: PS3.5 has none, and some files do.
    """
    value = attribute(header, keyword)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    if has_decimal_comma(header, keyword):
        value = _raw(header, keyword).replace(",", ".")
    try:
        parsed = float(value) if value is not None else math.nan
    except (TypeError, ValueError):
        return None
    return parsed if math.isfinite(parsed) else None


def has_decimal_comma(header: Dataset, *keywords: str) -> bool:
    """Whether the first number of one of these attributes is written with a comma."""
    return any(re.fullmatch(r"[+-]?\d+,\d*", _raw(header, keyword)) for keyword in keywords)


def _raw(header: Dataset, keyword: str) -> str:
    """The first value of an attribute as it is written, "" where it is not text."""
    try:
        value = header.get_item(keyword).value
    except Exception:  # whatever pydicom raises on malformed bytes
        return ""
    if isinstance(value, MultiValue | list) and value:
        value = value[0]
    written = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    return written.split("\\")[0].strip()


def items(header: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence, none where it is missing or malformed."""
    return [item for item in attribute(header, keyword) or () if isinstance(item, Dataset)]


def transfer_syntax(header: Dataset) -> UID:
    """The transfer syntax; of a file without group 2 the one that it is written in."""
    said = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    if said:
        return UID(said)
    _, is_little_endian = header.original_encoding
    return ExplicitVRLittleEndian if is_little_endian is not False else ExplicitVRBigEndian
