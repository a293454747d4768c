"""A labelled set as arrays: whole, or an error that names every film that cannot be used."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cxrgaze.errors import DataError, ExitCode
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.labelled_set import write_set
from cxrgaze.evidence.phantom import write_phantom_set
from cxrgaze.export import cli
from cxrgaze.files import sha256
from cxrgaze.train.model import spec_of

SPEC = spec_of("tiny", model_version="t", pixel_source="image-8bit", domain="phantom")


@pytest.fixture
def spoiled(tmp_path):
    """Eight films, of which two are damaged and one is not applicable."""
    whole = write_phantom_set(tmp_path / "whole", {"test": 8})
    films = {row.film: whole.film_bytes(row) for row in whole.rows}
    bad = [whole.rows[i].film for i in (1, 4, 6)]
    films[bad[0]] = films[bad[0]][:300]
    films[bad[1]] = b"nothing"
    import cv2
    import numpy as np

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
