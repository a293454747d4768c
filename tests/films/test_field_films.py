"""The field's films, each with its right outcome (../shared/field_films/cases.csv)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from cxrgaze.errors import FilmError
from cxrgaze.films.decode import load_film

CASES = Path(__file__).parents[3] / "shared" / "field_films" / "cases.csv"


def _rows():
    if not CASES.is_file():
        return []
    with CASES.open(newline="") as file:
        return list(csv.DictReader(file))


ROWS = _rows()


@pytest.fixture
def folder(shared):
    if not ROWS:
        pytest.skip("needs ../shared/field_films, which is not here")
    return shared / "field_films"


def _read(path):
    """A film's pixels, reasons and notes; the message for a film that is refused."""
    try:
        film = load_film(path)
    except FilmError as error:
        return None, (str(error),), ()
    return film.pixels, film.reasons, film.notes


def test_every_kind_of_outcome_is_there(folder):
    assert {row["right_outcome"] for row in ROWS} == {"px", "said", "refuse"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_a_field_film_has_its_right_outcome(folder, row):
    pixels, reasons, notes = _read(folder / row["file"])
    if row["right_outcome"] == "refuse":
        assert reasons
        return
    if row["right_outcome"] == "said":
        assert reasons or notes
    else:
        assert not reasons
    with np.load(folder / "expected.npz") as expected:
        if row["file"] in expected:
            right = expected[row["file"]].astype(np.float32)
            assert pixels is not None and pixels.shape == right.shape
            assert np.abs(pixels - right).mean() <= 0.02


def test_what_is_read_without_a_right_picture_shows_its_middle(folder):
    """Films whose percentiles a border could spoil."""
    for name in ("win_752.dcm", "b_black16.png"):
        pixels, _, _ = _read(folder / name)
        inside = pixels[pixels > 0]
        assert np.quantile(inside, 0.05) < 0.4 and np.quantile(inside, 0.95) > 0.6, name


def test_a_transfer_that_was_cut_is_called_so(folder):
    with pytest.raises(FilmError, match="cut short"):
        load_film(folder / "j2k_filecut.dcm")
