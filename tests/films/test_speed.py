"""How long a film takes beside the bare decoder and DCMTK: printed, never asserted.

python -m pytest -s -m slow tests/films/test_speed.py
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from cxrgaze.films import dicom
from cxrgaze.films.canvas import to_canvas
from cxrgaze.films.decode import load_film
from cxrgaze.spec import ModelSpec
from cxrgaze.train import checkpoint

DCMTK = {
    "uncompressed": "dcm2pnm",
    "JPEG Lossless": "dcmj2pnm",
    "JPEG-LS": "dcml2pnm",
    "JPEG 2000": None,  # DCMTK reads none
}
ROUNDS = 7


def _median_ms(calls) -> dict[str, float]:
    """Medians over rounds in which each call has its turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _spec() -> ModelSpec:
    return checkpoint.load(checkpoint.demo_path())[1].spec


@pytest.mark.slow
def test_times_beside_the_bare_decoder_and_dcmtk(made, shared, tmp_path):
    source = pydicom.dcmread(shared / "cxr" / "dcm_RG1_J2KI_mono1_15bit.dcm")
    pixels = dicom.stored_values(source, "x")
    window = {"WindowCenter": 15000, "WindowWidth": 30000}
    kinds = {
        "uncompressed": (ExplicitVRLittleEndian, None),
        "JPEG Lossless": (
            JPEGLosslessSV1,
            imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=16),
        ),
        "JPEG-LS": (JPEGLSLossless, made.jls(pixels)),
        "JPEG 2000": (JPEG2000Lossless, made.j2k(pixels, 15)),
    }
    bare = {
        "uncompressed": lambda frame: np.frombuffer(frame, np.uint16).copy(),
        "JPEG Lossless": imagecodecs.jpeg8_decode,
        "JPEG-LS": imagecodecs.jpegls_decode,
        "JPEG 2000": imagecodecs.jpeg2k_decode,
    }
    spec = _spec()
    for name, (syntax, frame) in kinds.items():
        payload = None if frame is None else made.encapsulated(frame)
        path = tmp_path / "film.dcm"
        path.write_bytes(made.file(pixels, bits=15, syntax=syntax, payload=payload, **window))
        film = load_film(path)
        stream = pixels.tobytes() if frame is None else frame
        calls = {
            "film": lambda path=path: load_film(path),
            "bare decoder": lambda name=name, stream=stream: bare[name](stream),
            "canvas": lambda film=film: to_canvas(film, spec),
        }
        command = DCMTK[name]
        if command and shutil.which(command):
            arguments = [command, "+Wi", "1", "+ob", str(path), str(tmp_path / "out.pgm")]
            calls["DCMTK"] = lambda arguments=arguments: subprocess.run(arguments, check=True)
        times = _median_ms(calls)
        print(f"{name} {pixels.shape}", {k: f"{v:.1f} ms" for k, v in times.items()})
        assert set(times) == set(calls)
