"""ModelSpec: what it refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cxrgaze.spec import DiseaseClass, ModelSpec


def _spec(*names, **changes):
    classes = tuple(DiseaseClass(name=name, display=name, snomed="0") for name in names)
    other = {"variant": "tiny", "model_version": "1", "height": 32, "width": 64}
    other |= {"pixel_source": "image-8bit", "domain": "none", **changes}
    return ModelSpec(classes=classes, **other)


def test_classes_are_two_or_more_with_a_name_each():
    assert _spec("normal", "pneumonia").class_names == ("normal", "pneumonia")
    for names in ((), ("normal",), ("normal", "normal")):
        with pytest.raises(ValidationError, match="two or more distinct names"):
            _spec(*names)


@pytest.mark.parametrize("side", [0, -32, 48])
def test_sides_of_the_canvas_are_multiples_of_the_stride(side):
    for name in ("height", "width"):
        with pytest.raises(ValidationError, match=name):
            _spec("normal", "pneumonia", **{name: side})


def test_every_domain_but_the_clinical_one_has_a_caution():
    cautions = {d: _spec("a", "b", domain=d).caution for d in ("clinical", "phantom", "none")}
    assert cautions["clinical"] is None and "drawings" in cautions["phantom"]
    assert "Untrained" in cautions["none"]
