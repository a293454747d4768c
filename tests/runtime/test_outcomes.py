"""Outcomes of films: an error about one film is a value, and nothing is kept."""

from __future__ import annotations

import gc
import json
import weakref

import cv2
import numpy as np
import pytest

import cxrgaze
from cxrgaze.errors import DeviceError, FilmError
from cxrgaze.films.decode import load_film
from cxrgaze.films.isolate import IsolatedLoader
from cxrgaze.runtime.outcomes import outcomes
from cxrgaze.runtime.reader import Reader


@pytest.fixture(scope="module")
def reader(bundles):
    with cxrgaze.load(bundles / "demo-fp16.cxrgaze") as reader:
        yield reader


@pytest.fixture
def three(films, tmp_path):
    """A film, one that is not applicable, and one that is damaged."""
    good = films / "nih_00001507_002_512.png"
    (tmp_path / "small.png").write_bytes(_small())
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:3000])
    return [good, tmp_path / "small.png", tmp_path / "cut.png", good]


def _small():
    return cv2.imencode(".png", np.arange(100, dtype=np.uint8).reshape(10, 10))[1].tobytes()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("isolated", [False, True])
def test_every_film_has_its_outcome_in_order(reader, three, isolated, workers):
    with IsolatedLoader() as loader:
        decode = loader.load if isolated else load_film
        stream = list(outcomes(reader, three, decode, workers=workers))
    assert [o.status for o in stream] == ["read", "not_applicable", "failed", "read"]
    assert [o.path for o in stream] == three
    assert "expected 32 a side" in stream[1].reason and stream[1].film and not stream[1].reading
    assert "damaged" in stream[2].reason and stream[2].film is None
    for outcome in (stream[0], stream[3]):
        assert outcome.reading.film_sha256 == outcome.film.sha256
    content = [json.loads(json.dumps(o.to_json())) for o in stream]
    assert content[0]["label"] == stream[0].reading.label and content[0]["status"] == "read"
    assert set(content[2]) == {"film", "status", "reason", "notice"}


def test_force_reads_what_is_not_applicable(reader, three):
    forced = list(outcomes(reader, three, load_film, force=True))
    assert [o.status for o in forced] == ["read", "read", "failed", "read"]
    assert forced[1].reading.forced


def test_the_stream_keeps_no_film(reader, three):
    stream = outcomes(reader, three, load_film)
    first = weakref.ref(next(stream).film)
    next(stream)
    gc.collect()
    assert first() is None
    stream.close()


def test_a_stream_that_is_closed_decodes_no_further(reader, three):
    decoded = []

    def decode(path):
        decoded.append(path)
        raise FilmError("x")

    stream = outcomes(reader, three * 100, decode)
    assert next(stream).status == "failed"
    stream.close()
    assert len(decoded) < 10


class Odd(Exception):
    """Nobody foresaw it."""


def _stumbles(at):
    """A decoder that raises an unforeseen error at one film."""

    def decode(path):
        film = load_film(path)
        if path == at:
            raise Odd("a header value")
        return film

    return decode


def test_an_unforeseen_error_about_one_film_does_not_cost_the_others(reader, three, monkeypatch):
    stream = list(outcomes(reader, three, _stumbles(three[1])))
    assert [o.status for o in stream] == ["read", "failed", "failed", "read"]
    assert "not read (Odd)" in stream[1].reason and "header value" not in stream[1].reason

    small = load_film(three[1])

    def stumbling(film, *, force=False):
        if film.sha256 == small.sha256:
            raise Odd("a header value")
        return Reader.read(reader, film, force=force)

    monkeypatch.setattr(reader, "read", stumbling)
    stream = list(outcomes(reader, three, load_film, force=True))
    assert [o.status for o in stream] == ["read", "failed", "failed", "read"]
    assert "not read (Odd)" in stream[1].reason and stream[1].film is not None


def test_an_error_of_the_device_ends_them_all(reader, three, monkeypatch):
    def failing(film, *, force=False):
        raise DeviceError("the card fell off the bus")

    monkeypatch.setattr(reader, "read", failing)
    with pytest.raises(DeviceError):
        list(outcomes(reader, three, load_film))


@pytest.mark.parametrize("size", [(2828, 2320), (2991, 2992)])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_saturated_films_of_real_sizes_are_read(reader, size, depth):
    pixels = np.full(size, np.iinfo(depth).max, depth)
    pixels[:700] = 0
    reading = reader.read(pixels)
    assert reading.probabilities and 0 <= reading.pad_mass <= 1


def test_gaze_outside_the_film_is_warned_of(reader):
    strip = np.tile(np.arange(900, dtype=np.uint8) % 251, (60, 1))
    reading = reader.read(strip, force=True)
    assert "no chest has this shape" in reading.forced[0] and reading.pad_mass > 0.2
    assert any("of the predicted gaze lies outside" in warning for warning in reading.warnings)
    square = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    assert not any("lies outside" in warning for warning in reader.read(square).warnings)
