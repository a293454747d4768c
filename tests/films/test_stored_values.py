"""A bundle whose canvases are made of stored values (`cxrgazelearn`), from film to reading."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

import cxrgaze
from cxrgaze.command import Steps
from cxrgaze.errors import DataError, NotApplicableError
from cxrgaze.evidence import phantom
from cxrgaze.export import canvases, pipeline
from cxrgaze.export.network_source import source_from_checkpoint
from cxrgaze.export.options import ExportOptions
from cxrgaze.films.canvas import load_for, to_canvas
from cxrgaze.films.decode import load_film
from cxrgaze.films.film import film_from_array
from cxrgaze.runtime import cli
from cxrgaze.runtime.outcomes import outcome_of
from cxrgaze.train import checkpoint
from cxrgaze.train.model import network_of, spec_of

SPEC = spec_of(
    "tiny",
    model_version="t",
    pixel_source="stored-values",
    domain="clinical",
    canvas=(160, 128),
    rule="cxrgazelearn",
)
DEEP = phantom.draw(5, shape=(1500, 1300)).pixels.astype(np.uint16) * 200


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    path = folder / "theirs.safetensors"
    network = network_of(SPEC).eval()
    said = dict(name="theirs", spec=SPEC, trained_on="a test", lineage=(), command="")
    checkpoint.save(path, network, config={}, results={}, **said)
    source = source_from_checkpoint(path)
    return pipeline.export(source, ExportOptions("fp32", "tensorrt", folder), Steps()).path


@pytest.fixture
def film(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), DEEP)
    return tmp_path / "deep.png"


def test_paths_arrays_films_and_isolated_films_are_read_alike(bundle, film):
    given = [film, DEEP, load_for(SPEC, film), film_from_array(DEEP, keep_stored=True)]
    with cxrgaze.load(bundle, threads=1) as reader:
        readings = reader.read_batch(given)
        image, _ = to_canvas(given[-1], SPEC)
        assert np.allclose(
            readings[0].log_density,
            reader.backend.infer(image[None, None])["log_density"][0, 0],
            atol=1e-4,
        )
    with cxrgaze.load(bundle, threads=1, isolate=True) as reader:
        readings.append(reader.read(film))
    for reading in readings:
        assert np.allclose(reading.log_density, readings[0].log_density, atol=1e-5)
        assert reading.pixel_source == "stored-values"
        assert any("preprocessing cxrgazelearn" in said for said in reading.warnings)
        assert not any("pixel source is" in said for said in reading.warnings)
        assert reading.heatmap().shape == DEEP.shape
        assert reading.heatmap().sum() == pytest.approx(1, abs=1e-4)


def test_polarity_is_said_and_not_changed(bundle, made, tmp_path):
    values = DEEP[:200, :300]
    with cxrgaze.load(bundle, threads=1) as reader:
        readings = []
        for kind in ("MONOCHROME1", "MONOCHROME2"):
            path = tmp_path / f"{kind}.dcm"
            tags = dict(PhotometricInterpretation=kind, **made.WINDOW)
            path.write_bytes(made.file(values, bits=16, **tags))
            readings.append(reader.read(path))
    assert np.array_equal(readings[0].log_density, readings[1].log_density)
    inverted = [any("not inverted" in said for said in r.warnings) for r in readings]
    assert inverted == [True, False]


def test_a_film_of_8_bits_is_not_applicable_even_by_force(bundle, films):
    path = films / "nih_00001507_002_512.png"
    with cxrgaze.load(bundle, threads=1) as reader:
        for given in (path, phantom.draw(1).pixels, load_film(path), DEEP / 65535):
            for force in (False, True):
                with pytest.raises(NotApplicableError, match="16 bits"):
                    reader.read(given, force=force)
        outcome = outcome_of(reader, path, load_film)
        assert outcome.status == "not_applicable" and "16 bits" in outcome.reason


@pytest.mark.parametrize("isolate", [False, True])
def test_predict_reads_what_it_can_and_says_why_not(bundle, film, capsys, isolate):
    cv2.imwrite(str(film.with_name("flat.png")), phantom.draw(1).pixels)
    cv2.imwrite(str(film.with_name("large.png")), np.tile(DEEP, (3, 1)))
    paths = [str(film.with_name(f"{name}.png")) for name in ("deep", "flat", "large")]
    options = ["--json", "--threads", "1", *(["--isolate"] if isolate else [])]
    assert cli.main([str(bundle), *paths, *options]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["status"] for r in records] == ["read", "not_applicable", "not_applicable"]
    assert "16 bits" in records[1]["reason"]
    assert "1300 x 4500 pixels" in records[2]["reason"]


def test_films_that_the_network_does_not_take_are_left_out_of_parity(film, films):
    other = films / "nih_00001507_002_512.png"
    images, what = canvases.parity_canvases(SPEC, [film, other])
    assert images.shape == (1, 1, 160, 128) and "1 of 2 films were left out" in what
    assert np.array_equal(images[0, 0], to_canvas(film_from_array(DEEP, keep_stored=True), SPEC)[0])
    with pytest.raises(DataError, match="none of the 1 films"):
        canvases.parity_canvases(SPEC, [other])
