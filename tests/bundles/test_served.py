"""Served: probabilities, decisions, flags and a label, of what something taught alone."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.special import expit, softmax

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.spec import DiseaseClass, ModelSpec

NAMES = ("a", "b", "c", "d")
LOGITS = np.random.default_rng(0).normal(0, 4, (50, 4)).astype(np.float32)
FINDINGS = {"temperatures": {"b": 0.5, "d": 3.0}}


def _spec(kind, heads=("logits", "log_density")):
    classes = tuple(DiseaseClass(name=n, display=n) for n in NAMES if "logits" in heads)
    return ModelSpec(
        variant="tiny",
        model_version="1",
        heads=heads,
        classes=classes,
        class_kind=kind,
        height=32,
        width=32,
        pixel_source="image-8bit",
        domain="none",
    )


def _served(kind, untaught=(), untrained=(), **decision):
    return Served(_spec(kind), Decision(**decision), untrained, untaught)


def test_exclusive_classes_are_the_softmax_over_the_temperature():
    wide = LOGITS.astype(np.float64)
    for temperature in (1.0, 0.3, 7.0):
        found = _served("exclusive", temperature=temperature).probabilities(LOGITS)
        assert np.allclose(found, softmax(wide / temperature, axis=1), rtol=1e-12)
    one = _served("exclusive").probabilities(LOGITS[3])
    assert one.shape == (4,) and np.allclose(one, softmax(wide[3]), rtol=1e-12)


def test_findings_are_sigmoids_over_a_temperature_each():
    found = _served("findings", **FINDINGS).probabilities(LOGITS)
    assert np.allclose(found, expit(LOGITS / np.array([1, 0.5, 1, 3])), rtol=1e-12)


@pytest.mark.parametrize("kind", ["exclusive", "findings"])
def test_large_logits_overflow_nowhere(kind):
    large = np.array([[1e4, -1e4, 1e4, -1e4], [3e38, -3e38, 0, 0]], np.float32)
    first, second = _served(kind).probabilities(large)
    share = 0.5 if kind == "exclusive" else 1
    assert first.tolist() == [share, 0, share, 0] and second[:2].tolist() == [1, 0]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_is_nan(broken):
    logits = LOGITS[:2].copy()
    logits[0, 1] = broken
    exclusive, findings = (_served(k).probabilities(logits) for k in ("exclusive", "findings"))
    assert np.isnan(exclusive[0]).all() and np.isfinite(exclusive[1]).all()
    assert np.isnan(findings).tolist() == [[False, True, False, False], [False] * 4]


def test_a_finding_of_minus_infinity_is_nan():
    logits = np.array([[-np.inf, 0, 0, 0]])
    assert np.isnan(_served("findings").probabilities(logits)[0]).tolist() == [True] + [False] * 3


@pytest.mark.parametrize("kind", ["exclusive", "findings"])
def test_what_nothing_taught_is_left_out(kind):
    decision = {"operating_points": {"d": 0.5, "b": 0.1, "a": 0.2}}
    served = _served(kind, untaught=("b",), **decision)
    assert served.classes == ("a", "c", "d") and served.columns == [0, 2, 3]
    assert served.decided == ("a", "d") and served.heads == ("logits", "log_density")
    found = served.probabilities(LOGITS)
    rest = LOGITS[:, [0, 2, 3]].astype(np.float64)
    assert np.allclose(found, expit(rest) if kind == "findings" else softmax(rest, axis=1))
    if kind == "exclusive":
        assert np.allclose(found.sum(axis=1), 1)
    other = LOGITS.copy()
    other[:, 1] = np.nan  # whatever an untaught column says
    assert np.array_equal(served.probabilities(other), found)


def test_temperatures_stay_with_their_findings_where_others_are_left_out():
    found = _served("findings", untaught=("a",), **FINDINGS).probabilities(LOGITS)
    assert np.allclose(found, expit(LOGITS[:, 1:] / np.array([0.5, 1, 3])), rtol=1e-12)


def test_an_untrained_head_serves_nothing():
    served = _served("exclusive", untrained=("logits",), operating_points={"a": 0.5})
    assert served.heads == ("log_density",)
    assert served.classes == served.decided == () and served.columns == []
    assert served.label({}) is None and served.flags({}) == {}
    other = _served("findings", untrained=("log_density",))
    assert other.heads == ("logits",) and other.classes == NAMES
    map_alone = Served(_spec("exclusive", heads=("log_density",)))
    assert map_alone.heads == ("log_density",) and map_alone.classes == ()


def test_one_exclusive_class_alone_is_not_served_and_one_finding_is():
    """As if the head were untrained: alone it would always be certain."""
    for untaught in (NAMES[1:], NAMES):
        served = _served("exclusive", untaught=untaught, operating_points={"a": 0.5})
        assert served.heads == ("log_density",) and served.classes == served.decided == ()
    assert _served("exclusive", untaught=NAMES[2:]).classes == ("a", "b")
    one = _served("findings", untaught=NAMES[1:])
    assert one.heads == ("logits", "log_density") and one.classes == ("a",)
    assert _served("findings", untaught=NAMES).heads == ("log_density",)


POINTS = {"operating_points": {"d": 0.3, "b": 0.6}}  # not in the order of the classes
SHARES = {"a": 0.5, "b": 0.2, "c": 0.0, "d": 0.3}


def test_exclusive_classes_decide_by_the_most_probable():
    served = _served("exclusive", **POINTS)
    assert served.label(SHARES) == "a"
    assert served.flags(SHARES) == {"b": False, "d": True}  # which is not the label
    films = np.array([[0.5, 0.2, 0, 0.3], [0.1, 0.2, 0.3, 0.4], [0.05, 0.6, 0.35, 0]])
    labels = [[True, False, False, False], [False, False, False, True], [False, True, False, False]]
    assert served.labelled(films).tolist() == labels and served.decides.tolist() == [True] * 4
    # Of b and d whether they reach their point, of a and c whether they are the label.
    flags = [[True, False, False, True], [False, False, False, True], [False, True, False, False]]
    assert served.flagged(films).tolist() == flags
    assert served.decisions(films).tolist() == [
        one + two for one, two in zip(labels, flags, strict=True)
    ]


def test_a_point_decides_without_the_label_and_the_label_without_the_point():
    """Both are served, so a decision is another where either is."""
    served = _served("exclusive", **POINTS)
    one, below, other = np.array([[0.5, 0.2, 0, 0.3], [0.5, 0.21, 0, 0.29], [0.4, 0.1, 0.5, 0.3]])
    changed = served.decisions(np.array([one])) != served.decisions(np.array([below, other]))
    assert np.flatnonzero(changed[0]).tolist() == [7]  # the flag of d alone
    assert np.flatnonzero(changed[1]).tolist() == [0, 2, 4, 6]  # a to c, as label and as flag


def test_findings_decide_by_their_operating_points_and_have_no_label():
    served = _served("findings", **POINTS)
    assert served.label(SHARES) is None and served.flags(SHARES) == {"b": False, "d": True}
    assert list(served.flags(SHARES)) == list(served.decided) == ["b", "d"]
    films = np.array([[1, 0.2, 1, 0.3], [0, 0.6, 0, 0.29]])
    flags = [[False, False, False, True], [False, True, False, False]]
    assert served.flagged(films).tolist() == flags and not served.labelled(films).any()
    assert served.decisions(films).tolist() == [[False] * 4 + row for row in flags]
    assert served.decides.tolist() == [False, True, False, True]
    without = _served("findings")
    assert not without.decisions(films).any() and not without.decides.any()


def test_findings_decide_by_the_right_column_where_others_are_left_out():
    served = _served("findings", untaught=("a", "b"), **POINTS)
    assert served.decided == ("d",)
    assert served.decides.tolist() == [False, True]
    films = np.array([[0.9, 0.3], [0.9, 0.1]])
    assert served.flagged(films).tolist() == [[False, True], [False, False]]
    assert served.decisions(films)[:, 3].tolist() == [True, False]


def test_exclusive_classes_decide_by_the_right_columns_where_others_are_left_out():
    served = _served("exclusive", untaught=("a",), **POINTS)  # b, c and d are left
    assert served.decides.tolist() == [True] * 3
    films = np.array([[0.6, 0.4, 0.0], [0.2, 0.5, 0.3]])
    assert served.labelled(films).tolist() == [[True, False, False], [False, True, False]]
    assert served.flagged(films).tolist() == [[True, False, False], [False, True, True]]


FOREIGN = {
    "an operating point": (
        "exclusive",
        {"operating_points": {"a": 0.5, "z": 0.5}},
        "operating point of 'z'",
    ),
    "a temperature": ("findings", {"temperatures": {"z": 2.0}}, "temperature of 'z'"),
    "an untaught class": ("findings", {"untaught": ("a", "z")}, "untaught class of 'z'"),
    "temperatures of exclusive classes": (
        "exclusive",
        {"temperatures": {"a": 2.0}},
        "exclusive classes have one temperature",
    ),
    "one temperature of findings": (
        "findings",
        {"temperature": 2.0},
        "findings have a temperature each",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_parameters_of_another_network_are_refused(what):
    kind, parameters, said = FOREIGN[what]
    with pytest.raises(ValueError, match=said):
        _served(kind, **parameters)


def test_a_head_that_the_network_does_not_have_cannot_be_untrained():
    with pytest.raises(ValueError, match="untrained logits, which is no head"):
        Served(_spec("exclusive", heads=("log_density",)), untrained=("logits",))


@pytest.mark.parametrize("wrong", [0, -1.0])
def test_temperatures_are_above_zero(wrong):
    for decision in ({"temperature": wrong}, {"temperatures": {"a": wrong}}):
        with pytest.raises(ValidationError, match="greater than 0"):
            Decision(**decision)
