"""A stream of outcomes: an error about one film is a value, and nothing is kept."""

from __future__ import annotations

import gc
import json
import weakref

import pytest

import cxrgaze
from cxrgaze.errors import FilmError
from cxrgaze.films.decode import load_film
from cxrgaze.films.isolate import IsolatedLoader
from cxrgaze.runtime.outcomes import outcomes


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
    import cv2
    import numpy as np

    return cv2.imencode(".png", np.arange(100, dtype=np.uint8).reshape(10, 10))[1].tobytes()


@pytest.mark.parametrize("isolated", [False, True])
def test_every_film_has_its_outcome_in_order(reader, three, isolated):
    with IsolatedLoader() as loader:
        stream = list(outcomes(reader, three, loader.load if isolated else load_film))
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
