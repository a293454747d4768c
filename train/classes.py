"""The classes of the paper's network."""

from __future__ import annotations

from cxrgaze.spec import DiseaseClass

CLASSES = (
    DiseaseClass(name="normal", display="Normal", snomed="17621005"),
    DiseaseClass(name="heart_failure", display="Heart failure", snomed="42343007"),
    DiseaseClass(name="pneumonia", display="Pneumonia", snomed="233604007"),
)
"""The paper's three classes in the paper's order (docs/method.md#classifier)."""
