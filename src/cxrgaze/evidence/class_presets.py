"""Classes by name of a preset: what `prepare --classes NAME` takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cxrgaze.spec import ClassKind, DiseaseClass


@dataclass(frozen=True)
class Classes:
    """Classes in the order of the logits, and whether they exclude each other."""

    classes: tuple[DiseaseClass, ...]
    kind: ClassKind


PRESETS = {
    # The paper's, in its order (docs/method.md#classifier).
    "paper": Classes(
        (
            DiseaseClass(name="normal", display="Normal", snomed="17621005"),
            DiseaseClass(name="heart_failure", display="Heart failure", snomed="42343007"),
            DiseaseClass(name="pneumonia", display="Pneumonia", snomed="233604007"),
        ),
        "exclusive",
    ),
}

_KNOWN = {one.name: one for preset in PRESETS.values() for one in preset.classes}


def in_order_of_presets(classes: Iterable[DiseaseClass]) -> tuple[DiseaseClass, ...]:
    """Classes of a preset in its order, then all others as they are given."""
    place = {name: number for number, name in enumerate(_KNOWN)}
    return tuple(sorted(classes, key=lambda one: place.get(one.name, len(place))))


def class_named(text: str) -> DiseaseClass:
    """The class that a label of a table names: that of a preset, or a new one.

    Its name is `text` in lower case with underscores ("Pleural Effusion": pleural_effusion).

    Raises:
        ValueError: nothing in it makes a name.
    """
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    name = "_".join(words)
    if not name or not name[0].isalpha():
        raise ValueError(f"{text!r} makes no class name: expected a letter first")
    if name in _KNOWN:
        return _KNOWN[name]
    shown = " ".join(text.replace("_", " ").split())
    return DiseaseClass(name=name, display=shown[0].upper() + shown[1:])
