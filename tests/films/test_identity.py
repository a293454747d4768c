"""The sealed identity of a DICOM film: it has what a result must refer to, and shows none of it."""

from __future__ import annotations

import io
import json
import logging
import pickle
from dataclasses import replace

import cv2
import numpy as np
import pydicom
import pytest

import cxrgaze
from cxrgaze.films.decode import film_from_bytes, load_film
from cxrgaze.films.identity import REFERENCES
from cxrgaze.films.isolate import IsolatedLoader
from cxrgaze.runtime import cli, overlay

MARK = "Zzmarke"
REAL = "dcm_rg1q_12b_mono2_j2klossless.dcm"


@pytest.fixture
def marked(films, tmp_path):
    """A real film whose patient and study attributes all carry a mark."""
    header = pydicom.dcmread(films / REAL)
    header.SpecificCharacterSet = "ISO_IR 100"
    header.PatientName = f"{MARK}^Jürgen"
    header.PatientID = header.AccessionNumber = header.StudyID = MARK
    header.StudyDescription = header.ReferringPhysicianName = MARK
    header.InstitutionName = "not copied"
    path = tmp_path / "film.dcm"
    header.save_as(path)
    return path


def _as(header, syntax):
    """The same header in another encoding, uncompressed."""
    header = pydicom.dcmread(io.BytesIO(header))
    header.decompress(generate_instance_uid=False)
    header.file_meta.TransferSyntaxUID = syntax
    if syntax == pydicom.uid.ExplicitVRBigEndian:
        header.PixelData = np.frombuffer(header.PixelData, "<u2").astype(">u2").tobytes()
    data = io.BytesIO()
    little = syntax != pydicom.uid.ExplicitVRBigEndian
    pydicom.dcmwrite(
        data,
        header,
        implicit_vr=syntax == pydicom.uid.ImplicitVRLittleEndian,
        little_endian=little,
        force_encoding=True,
    )
    return data.getvalue()


def test_it_has_the_references_and_nothing_else(marked):
    identity = load_film(marked).identity.reveal()
    header = pydicom.dcmread(marked)
    assert str(identity.PatientName) == f"{MARK}^Jürgen"
    for keyword in identity.dir():
        assert keyword in REFERENCES and identity[keyword].value == header[keyword].value
    assert "InstitutionName" not in identity and "PixelData" not in identity
    assert {"SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"} <= set(identity.dir())


@pytest.mark.parametrize(
    "syntax",
    [
        pydicom.uid.ImplicitVRLittleEndian,
        pydicom.uid.ExplicitVRLittleEndian,
        pydicom.uid.ExplicitVRBigEndian,
    ],
)
def test_it_is_the_same_in_every_encoding(marked, syntax):
    same = film_from_bytes(_as(marked.read_bytes(), syntax), "x.dcm")
    assert same.identity == load_film(marked).identity


def test_it_comes_through_isolation(marked):
    film = load_film(marked)
    with IsolatedLoader() as loader:
        for isolated in (loader.load(marked), loader.load_bytes(marked.read_bytes(), "x")):
            assert isolated.identity == film.identity and isolated.identity.encoded


def test_other_films_have_none(films):
    assert load_film(films / "nih_00001507_002_512.png").identity is None


def test_it_shows_itself_nowhere(marked, bundles, tmp_path, capsys, caplog):
    """Not in messages, logs, JSON, tables or files; and the overlay is the same without it."""
    film = load_film(marked)
    with caplog.at_level(logging.DEBUG):
        shown = f"{film} {film!r} {film.identity} {[film.identity]}"
        output = tmp_path / "out"
        bundle = bundles / "demo-fp16.cxrgaze"
        assert cli.main([str(bundle), str(marked), "--output", str(output), "--json"]) == 0
    captured = capsys.readouterr()
    shown += captured.out + captured.err + caplog.text
    for path in output.iterdir():
        shown += path.read_bytes().decode("latin-1")
    assert MARK not in shown
    with cxrgaze.load(bundle) as reader:
        reading = reader.read(film)
        assert MARK not in json.dumps(reading.to_json()) and MARK not in repr(reading)
        with_it, without = (
            overlay.render(reading, f.pixels) for f in (film, replace(film, identity=None))
        )
    assert np.array_equal(with_it, without) and cv2.imencode(".png", with_it)[0]
    with pytest.raises(TypeError):
        json.dumps(film.identity)


def test_it_survives_pickling_for_other_processes(marked):
    film = load_film(marked)
    assert pickle.loads(pickle.dumps(film)).identity == film.identity


def test_malformed_attributes_are_left_out_and_the_rest_stays(marked):
    """A name, a character set and a UID that are none."""
    data, header = marked.read_bytes(), pydicom.dcmread(marked)
    name = b"Zzmarke^J\xfcrgen"
    for sound, malformed in (
        (name, b"Zzmarke^J\x1brgen"),
        (b"ISO_IR 100", b"nonsense  "),
        (str(header.StudyInstanceUID).encode(), b"?" * len(str(header.StudyInstanceUID))),
    ):
        assert data.count(sound) == 1
        film = film_from_bytes(data.replace(sound, malformed), "x.dcm")
        assert film.identity.reveal().SOPInstanceUID == header.SOPInstanceUID
