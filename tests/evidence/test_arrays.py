"""A labelled set as arrays: whole, or an error that names every film that cannot be used.

And its labels as the truth of a network's classes, or an error where they say nothing of them.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from cxrgaze.errors import DataError, ExitCode
from cxrgaze.evidence.arrays import load_arrays, require_classes
from cxrgaze.evidence.class_presets import class_named
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.labelled_set import write_set
from cxrgaze.evidence.phantom import write_phantom_set
from cxrgaze.evidence.truth import (
    any_known,
    class_index,
    columns,
    one_of,
    present_classes,
    truth_of,
)
from cxrgaze.export import cli
from cxrgaze.files import sha256
from cxrgaze.train.model import spec_of

SPEC = spec_of("tiny", model_version="t", pixel_source="image-8bit", domain="phantom")


@pytest.fixture
def spoiled(tmp_path):
    """Eight films, of which two are damaged and one is not applicable."""
    whole = write_phantom_set(tmp_path / "whole", {"test": 8}, first_seed=760_000)
    films = {row.film: whole.film_bytes(row) for row in whole.rows}
    bad = [whole.rows[i].film for i in (1, 4, 6)]
    films[bad[0]] = films[bad[0]][:300]
    films[bad[1]] = b"nothing"
    import cv2

    films[bad[2]] = cv2.imencode(".png", np.zeros((90, 90), np.uint8))[1].tobytes()
    rows = [row.model_copy(update={"sha256": sha256(films[row.film])}) for row in whole.rows]
    return write_set(tmp_path / "set", whole.info, rows, whole.gaze, films.items()), bad


@pytest.mark.parametrize("cached", [False, True])
def test_every_film_that_cannot_be_used_is_named_and_nothing_stays(spoiled, tmp_path, cached):
    labelled, bad = spoiled
    cache = tmp_path / "cache" if cached else None
    with pytest.raises(DataError, match="3 of 8 films cannot be used") as error:
        load_arrays(labelled, SPEC, PRESETS["phantom"], cache)
    assert all(name in str(error.value) for name in bad)
    assert not cached or not any((tmp_path / "cache").glob("*"))
    good = tuple(row for row in labelled.rows if row.film not in bad)
    arrays = load_arrays(replace(labelled, rows=good), SPEC, PRESETS["phantom"], cache)
    assert len(arrays.films) == 5


def test_a_gate_over_such_a_set_ends_before_any_verdict(spoiled, tmp_path, capsys):
    labelled, bad = spoiled
    arguments = ["--precision", "fp16", "--gate", str(labelled.folder)]
    code = cli.main([*arguments, "--output", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert code == ExitCode.DATA and all(re.search(re.escape(name), message) for name in bad)
    assert not (tmp_path / "out").exists()


def _spec(names="", kind="exclusive"):
    classes = tuple(map(class_named, names.split()))
    return SPEC.model_copy(
        update={
            "classes": classes,
            "class_kind": kind,
            "heads": ("logits", "log_density") if classes else ("log_density",),
        }
    )


def _relabelled(folder, names, kind, labels):
    """Phantoms with other labels: a class's name, or what is known of findings."""
    whole = write_phantom_set(folder / "phantoms", {"test": len(labels)})
    plain = [row.model_copy(update={"label": None}) for row in whole.rows]
    what = "findings" if kind == "findings" else "label"
    rows = [row.model_copy(update={what: one}) for row, one in zip(plain, labels, strict=True)]
    info = whole.info.model_copy(
        update={"classes": tuple(map(class_named, names.split())), "class_kind": kind}
    )
    films = ((row.film, whole.film_bytes(row)) for row in rows)
    return write_set(folder / "set", info, rows, whole.gaze, films)


SEEN_BY = [
    ("dog cat", "exclusive", [[0, 1], [1, 0], [-1, -1]]),
    ("owl dog cat", "exclusive", [[0, 0, 1], [0, 1, 0], [-1, -1, -1]]),  # no film has the third
    ("owl cat", "findings", [[-1, 1], [-1, 0], [-1, -1]]),  # the set says nothing of that finding
    ("", "exclusive", [[], [], []]),
]


def test_a_class_of_the_network_finds_its_column_by_name(tmp_path):
    labelled = _relabelled(tmp_path, "cat dog", "exclusive", ["cat", "dog", None])
    for names, kind, expected in SEEN_BY:
        truth = load_arrays(labelled, _spec(names, kind), PRESETS["phantom"]).truth
        assert truth.dtype == np.int8 and truth.tolist() == expected, names


def test_findings_that_are_not_known_stay_so(tmp_path):
    statements = [{"cat": True, "dog": True}, {"dog": False}, {}, {"cat": False, "owl": True}]
    labelled = _relabelled(tmp_path, "cat dog owl", "findings", statements)
    arrays = load_arrays(labelled, _spec("emu dog cat", "findings"), PRESETS["phantom"])
    assert arrays.truth.tolist() == [[-1, 1, 1], [-1, 0, -1], [-1, -1, -1], [-1, -1, 0]]


def test_without_a_map_no_gaze_is_read(tmp_path):
    labelled = _relabelled(tmp_path, "cat dog", "exclusive", ["cat", "dog"])
    whole = load_arrays(labelled, _spec("dog cat"), PRESETS["phantom"], tmp_path / "cache")
    # A preset that needs raw samples, which phantoms do not have, is not asked then.
    spec = _spec("dog cat").model_copy(update={"heads": ("logits",)})
    plain = load_arrays(labelled, spec, PRESETS["paper"], tmp_path / "cache")
    assert whole.has_gaze.all() and not plain.has_gaze.any() and plain.gaze == (None, None)
    assert np.array_equal(plain.images, whole.images)
    assert np.array_equal(plain.truth, whole.truth)


FITTING = [
    ("cat dog", "exclusive", "cat dog", "exclusive", True),
    ("cat dog", "exclusive", "owl dog cat", "exclusive", True),
    ("cat dog owl", "exclusive", "cat dog", "exclusive", False),
    ("cat dog", "exclusive", "emu owl", "exclusive", False),
    ("cat dog", "findings", "owl dog", "findings", True),
    ("cat dog", "findings", "emu owl", "findings", False),
    ("cat dog", "exclusive", "owl dog", "findings", True),
    ("cat dog", "exclusive", "emu owl", "findings", False),
    ("cat dog", "findings", "cat dog", "exclusive", False),
    ("", "exclusive", "cat dog", "exclusive", True),  # films without labels are legal
    ("", "exclusive", "cat dog", "findings", True),
    ("cat dog", "findings", "", "exclusive", True),  # and so is a network of the map alone
]


@pytest.mark.parametrize("names,kind,network,of_kind,fits", FITTING)
def test_a_set_must_say_something_of_the_networks_classes(
    tmp_path, names, kind, network, of_kind, fits
):
    whole = write_phantom_set(tmp_path / "set", {"test": 1})
    classes = tuple(map(class_named, names.split()))
    info = whole.info.model_copy(update={"classes": classes, "class_kind": kind})
    labelled = replace(whole, info=info)
    if fits:
        require_classes(labelled, _spec(network, of_kind))
        return
    message = rf"{kind} classes \('cat'.*, the network's are {of_kind}: \('{network.split()[0]}'"
    with pytest.raises(DataError, match=message):
        load_arrays(labelled, _spec(network, of_kind), PRESETS["phantom"])


def test_a_film_of_a_class_beyond_the_networks_is_not_known_to_be_none_of_them():
    """Exclusive classes: what it is not says less than what it is."""
    spec = _spec("dog cat")
    statements = [{"cat": False, "owl": True}, {"cat": True, "owl": False}, {"cat": True}, {}]
    assert truth_of(statements, spec).tolist() == [[-1, -1], [0, 1], [0, 1], [-1, -1]]
    assert truth_of([{"cat": True, "dog": True}], spec).tolist() == [[-1, -1]]
    findings = _spec("dog cat", "findings")
    assert truth_of(statements, findings).tolist() == [[-1, 0], [-1, 1], [-1, 1], [-1, -1]]


def test_exclusive_truth_is_the_class_index_and_back():
    index = np.array([2, -1, 0, 1, 2])
    truth = one_of(index, 3)
    assert truth.dtype == np.int8 and set(truth[0].tolist()) == {0, 1}
    assert class_index(truth).tolist() == index.tolist()
    assert any_known(truth).tolist() == [True, False, True, True, True]
    # Not one class: none of these, two, or one that is not known.
    assert class_index(np.array([[0, 0], [1, 1], [0, -1]])).tolist() == [-1, -1, -1]


def test_a_class_is_present_where_enough_films_have_it_and_enough_have_not():
    truth = np.array([[1, 1, 0, -1], [1, 0, 0, 1], [0, -1, 0, -1], [0, -1, 0, -1]])
    assert present_classes(truth) == [0, 1]
    assert present_classes(truth, fewest=2) == [0]
    assert [has.tolist() for _, has in columns(truth)][1] == [True, False]
    assert [known.tolist() for known, _ in columns(truth)][1] == [True, True, False, False]
