"""The borders of decoding: whatever a decoder raises about a film is a FilmError."""

from __future__ import annotations

import io
import logging
import random
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import RLELossless

from cxrgaze.errors import FilmError, NotApplicableError
from cxrgaze.evidence import phantom
from cxrgaze.films import decode
from cxrgaze.films.decode import film_from_bytes
from cxrgaze.films.isolate import IsolatedLoader


@pytest.fixture(scope="module")
def rle(films):
    """A small film in RLE, and where its frame begins."""
    header = pydicom.dcmread(films / "dcm_rg1q_12b_mono2_j2klossless.dcm")
    header.decompress()
    pixels = header.pixel_array[:64, :80]
    header.Rows, header.Columns = pixels.shape
    header.PixelData = np.ascontiguousarray(pixels).tobytes()
    header.compress(RLELossless, generate_instance_uid=False)
    data = io.BytesIO()
    header.save_as(data)
    content = data.getvalue()
    return content, content.index(header.PixelData[:24])


def _flipped(data, start, seed):
    rng, damaged = random.Random(seed), bytearray(data)
    position = rng.randrange(start, min(start + 160, len(damaged)))
    damaged[position] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def test_a_damaged_rle_film_is_a_film_or_a_film_error(rle, caplog):
    """Decoders of it raise what is no Exception, crash, or log what they were given."""
    data, start = rle
    assert film_from_bytes(data, "whole.dcm").shape == (64, 80)
    failed = 0
    for seed in range(200):
        try:
            film_from_bytes(_flipped(data, start, seed), "flipped.dcm")
        except FilmError:
            failed += 1
    assert failed and not caplog.records


def test_the_isolated_child_outlives_such_a_film(rle):
    data, start = rle
    with IsolatedLoader() as loader:
        loader.load_bytes(data, "whole.dcm")
        child = loader._nursery.worker
        failed = 0
        for seed in range(60):
            try:
                loader.load_bytes(_flipped(data, start, seed), "flipped.dcm")
            except FilmError:
                failed += 1
        assert failed and loader._nursery.worker == child


class Foreign(BaseException):
    """Of a library."""


@pytest.mark.parametrize(
    "error", [Foreign("PatientName"), ValueError("PatientName"), GeneratorExit()]
)
def test_whatever_is_raised_becomes_a_film_error_that_quotes_nothing(monkeypatch, error):
    def raises(*arguments):
        raise error

    monkeypatch.setattr(decode, "_decoded", raises)
    with pytest.raises(FilmError, match=f"x.dcm: damaged file .{type(error).__name__}") as caught:
        film_from_bytes(b"x", "x.dcm")
    assert "PatientName" not in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_none_of_them(monkeypatch, interrupt):
    def raises(*arguments):
        raise interrupt

    monkeypatch.setattr(decode, "_decoded", raises)
    with pytest.raises(interrupt):
        film_from_bytes(b"x", "x.dcm")


def test_a_phantom_is_read_as_before():
    import cv2

    pixels = phantom.draw(1).pixels
    film = film_from_bytes(cv2.imencode(".png", pixels)[1].tobytes(), "p.png")
    assert np.array_equal(film.pixels, pixels.astype(np.float32) / np.float32(255))


def _report():
    """A structured report: DICOM without an image."""
    report = pydicom.Dataset()
    report.SOPClassUID, report.SOPInstanceUID = pydicom.uid.BasicTextSRStorage, "2.25.7"
    report.Modality = "SR"
    report.file_meta = pydicom.dataset.FileMetaDataset()
    report.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = io.BytesIO()
    pydicom.dcmwrite(data, report, enforce_file_format=True)
    return data.getvalue()


def test_a_dicom_object_without_an_image_is_not_applicable():
    with pytest.raises(NotApplicableError, match="without an image"):
        film_from_bytes(_report(), "sr.dcm")
    with IsolatedLoader() as loader, pytest.raises(NotApplicableError, match="without an image"):
        loader.load_bytes(_report(), "sr.dcm")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_file_says_that_it_is_cut(films, share, compressed):
    data = (films / "dcm_rg1q_12b_mono2_j2klossless.dcm").read_bytes()
    if not compressed:
        header = pydicom.dcmread(io.BytesIO(data))
        header.decompress()
        buffer = io.BytesIO()
        header.save_as(buffer)
        data = buffer.getvalue()
    with pytest.raises(FilmError, match="cut short"):
        film_from_bytes(data[: int(share * len(data))], "cut.dcm")


def _settings():
    return (
        list(warnings.filters),
        pydicom.config.settings.reading_validation_mode,
        pydicom.config.settings.writing_validation_mode,
        logging.getLogger("pydicom").level,
    )


def test_threads_leave_nothing_of_the_process_changed(films):
    """D7: each put back what another had set; warnings and validation stayed changed for good."""
    before, paths = _settings(), [p for p in sorted(films.iterdir()) if p.suffix == ".dcm"]
    png = sorted(films.glob("*.png"))[0]
    with ThreadPoolExecutor(8) as pool:
        shapes = list(pool.map(lambda p: decode.load_film(p).shape, [*paths, png] * 12))
    assert len(set(shapes)) > 1 and _settings() == before


def test_nothing_of_a_header_is_logged_or_warned(films, caplog):
    """D15: pydicom's logger and warnings quote values."""
    header = pydicom.dcmread(films / "dcm_rg1q_12b_mono2_j2klossless.dcm")
    data = io.BytesIO()
    header.save_as(data)
    bad = data.getvalue().replace(b"CHEST ", b"\xff\xfeSECRET", 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for content in (bad, bad[:-5000], data.getvalue()[:600]):
            try:
                film_from_bytes(content, "f.dcm")
            except FilmError as error:
                assert "SECRET" not in str(error)
    assert not caught and not caplog.records


def test_a_giant_file_is_refused_before_it_is_read(tmp_path):
    """D15: a sparse one costs its maker nothing."""
    with (tmp_path / "giant.dcm").open("wb") as file:
        file.truncate(100 << 30)
    start = time.perf_counter()
    with pytest.raises(FilmError, match="larger than 1024 MiB"):
        decode.load_film(tmp_path / "giant.dcm")
    assert time.perf_counter() - start < 5


def test_a_long_chain_of_images_is_not_counted():
    """D6: TIFF directories, each a frame, in a file of some kilobytes."""
    frames = [Image.new("L", (64, 64), level) for level in range(40)]
    data = io.BytesIO()
    frames[0].save(data, "TIFF", save_all=True, append_images=frames[1:])
    film = film_from_bytes(data.getvalue(), "chain.tif")
    assert any("multi-frame" in reason for reason in film.reasons)
