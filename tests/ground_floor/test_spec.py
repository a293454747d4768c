"""ModelSpec: what it refuses, and what it makes of older files."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from cxrgaze.spec import DiseaseClass, ModelSpec, same_diagnosis


def _spec(*names, **changes):
    classes = tuple(DiseaseClass(name=name, display=name) for name in names)
    other = {"variant": "tiny", "model_version": "1", "height": 32, "width": 64}
    other |= {"pixel_source": "image-8bit", "domain": "none", **changes}
    return ModelSpec(classes=classes, **other)


def test_exclusive_classes_are_two_or_more_with_a_name_each():
    assert _spec("normal", "pneumonia").class_names == ("normal", "pneumonia")
    for names, said in (
        ((), "with 0 classes do not fit"),
        (("normal",), "two or more, found normal alone"),
        (("normal", "normal"), "must be distinct"),
    ):
        with pytest.raises(ValidationError, match=said):
            _spec(*names)


def test_findings_are_one_or_more_with_a_name_each():
    assert _spec("effusion", class_kind="findings").class_names == ("effusion",)
    for names, said in (((), "with 0 classes"), (("effusion", "effusion"), "must be distinct")):
        with pytest.raises(ValidationError, match=said):
            _spec(*names, class_kind="findings")


@pytest.mark.parametrize(
    "heads",
    [(), ("log_density", "logits"), ("logits", "logits"), ("logits", "other")],
)
def test_heads_are_one_or_both_in_the_order_of_the_graph(heads):
    with pytest.raises(ValidationError, match="heads"):
        _spec("a", "b", heads=heads)


def test_classes_are_there_exactly_with_the_head_logits():
    map_alone = _spec(heads=("log_density",))
    assert map_alone.classes == () and map_alone.shapes(5) == {"log_density": (5, 1, 32, 64)}
    assert _spec("a", "b", heads=("logits",)).shapes(5) == {"logits": (5, 2)}
    both = _spec("a", "b")
    assert both.heads == ("logits", "log_density") == tuple(both.shapes(1))
    for names, heads in ((("a", "b"), ("log_density",)), ((), ("logits",))):
        with pytest.raises(ValidationError, match=f"with {len(names)} classes do not fit"):
            _spec(*names, heads=heads)


@pytest.mark.parametrize("change", [{"name": "Normal"}, {"name": ""}, {"display": ""}])
def test_a_class_has_a_plain_name_and_words(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        DiseaseClass(**{"name": "normal", "display": "Normal", **change})


def test_a_snomed_code_is_digits_or_unknown():
    assert DiseaseClass(name="a", display="A").snomed is None
    assert DiseaseClass(name="a", display="A", snomed="17621005").snomed == "17621005"
    for code in ("", "J18.9", "123 "):
        with pytest.raises(ValidationError, match="snomed"):
            DiseaseClass(name="a", display="A", snomed=code)


def test_a_diagnosis_is_the_same_with_the_same_classes_in_order_and_of_one_kind():
    one = _spec("a", "b")
    assert same_diagnosis(one, _spec("a", "b", heads=("logits",), domain="clinical"))
    for other in (_spec("b", "a"), _spec("a", "b", "c"), _spec("a", "b", class_kind="findings")):
        assert not same_diagnosis(one, other)


def test_older_json_with_tensors_is_read_and_other_tensors_are_not():
    spec = _spec("a", "b")
    content = json.loads(spec.model_dump_json(exclude={"heads", "class_kind"}))
    content["tensors"] = ["image", "logits", "log_density"]
    assert ModelSpec.model_validate_json(json.dumps(content)) == spec
    assert ModelSpec.model_validate(content) == spec and "tensors" in content
    for tensors in (["image", "log_density", "logits"], ["image", "logits"], [], None):
        with pytest.raises(ValidationError, match="tensors"):
            ModelSpec.model_validate_json(json.dumps({**content, "tensors": tensors}))


def test_a_spec_comes_back_from_its_json():
    for spec in (_spec("a", class_kind="findings"), _spec(heads=("log_density",))):
        assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("side", [0, -32])
def test_sides_of_the_canvas_are_lengths(side):
    for name in ("height", "width"):
        with pytest.raises(ValidationError, match=name):
            _spec("normal", "pneumonia", **{name: side})


def test_every_domain_but_the_clinical_one_has_a_caution():
    cautions = {d: _spec("a", "b", domain=d).caution for d in ("clinical", "phantom", "none")}
    assert cautions["clinical"] is None and "drawings" in cautions["phantom"]
    assert "Untrained" in cautions["none"]
