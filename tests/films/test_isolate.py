"""Decoding in a child: the same film, and nothing that a file can do takes the reader down."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from cxrgaze.errors import CxrgazeError, FilmError
from cxrgaze.films import isolate
from cxrgaze.films.ahead import decode_ahead
from cxrgaze.films.decode import load_film
from cxrgaze.films.isolate import IsolatedLoader
from cxrgaze.runtime.cli import main


def _real(films: Path) -> list[Path]:
    return [p for p in sorted(films.iterdir()) if p.suffix in (".png", ".dcm")]


def test_the_child_gives_the_same_film(films):
    with IsolatedLoader() as loader:
        for path in _real(films):
            here, there = load_film(path), loader.load(path)
            sent = loader.load_bytes(path.read_bytes(), str(path))
            assert np.array_equal(here.pixels, there.pixels)
            assert np.array_equal(here.pixels, sent.pixels)
            assert here.identity == there.identity == sent.identity
            for name in ("name", "sha256", "pixel_source", "spacing_mm", "reasons", "notes"):
                assert getattr(here, name) == getattr(there, name) == getattr(sent, name)


def test_errors_come_back_as_film_errors_and_the_child_lives_on(films, tmp_path):
    (tmp_path / "cut.png").write_bytes(_real(films)[-1].read_bytes()[:5000])
    with IsolatedLoader() as loader:
        loader.load(_real(films)[-1])
        pid = loader._child.pid
        with pytest.raises(FilmError, match=r"cut\.png: damaged"):
            loader.load(tmp_path / "cut.png")
        assert loader.load(_real(films)[-1]).shape == (512, 512)
        assert loader._child.pid == pid


def test_a_decoder_that_hangs_is_killed_in_time_and_the_next_film_is_read(films):
    with IsolatedLoader(time_limit_s=1.0) as loader:
        loader.load(_real(films)[-1])
        os.kill(loader._child.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(FilmError, match="longer than 1 s"):
            loader.load(_real(films)[-1])
        assert time.monotonic() - start < 10
        assert loader.load(_real(films)[-1]).shape == (512, 512)


def test_a_decoder_that_dies_is_named_and_replaced(films):
    with IsolatedLoader() as loader:
        loader.load(_real(films)[-1])
        os.kill(loader._child.pid, signal.SIGSEGV)
        with pytest.raises(FilmError, match="died"):
            loader.load(_real(films)[-1])
        assert loader.load(_real(films)[-1]).shape == (512, 512)


def test_memory_is_bounded(films, tmp_path):
    """A film that is legal but larger than the limit allows: refused, not loaded."""
    from PIL import Image

    Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(tmp_path / "large.png")
    with IsolatedLoader(memory_limit=700 << 20) as loader:
        with pytest.raises(FilmError, match="memory|died"):
            loader.load(tmp_path / "large.png")
        assert loader.load(_real(films)[-1]).shape == (512, 512)


def test_nonsense_from_a_child_is_refused(monkeypatch, tmp_path):
    """A child that a hostile file took over can say what it likes."""
    answers = {
        "a huge header": "struct.pack('<III', 1 << 30, 0)",
        "a huge film": "struct.pack('<III', 2, (1 << 32) - 1, 0) + b'{}'",
        "no JSON": "struct.pack('<III', 4, 0, 0) + b'\\x80\\x04N.'",
        "another size": "struct.pack('<III', 2, 4, 0) + b'{}' + bytes(4)",
    }
    real = subprocess.Popen
    for answer in answers.values():
        code = (
            f"import sys, struct; o = sys.stdout.buffer; o.write(b'r'); o.flush(); "
            f"sys.stdin.readline(); o.write({answer}); o.flush(); sys.stdin.read()"
        )
        monkeypatch.setattr(
            isolate.subprocess,
            "Popen",
            lambda arguments, code=code, **more: real([sys.executable, "-c", code], **more),
        )
        with IsolatedLoader(time_limit_s=5) as loader, pytest.raises(FilmError, match="nonsense"):
            loader.load(tmp_path / "x.png")


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip bytes in header or pixels, overwrite a stretch, cut the end, or repeat a piece."""
    kind = rng.choice(("header", "anywhere", "stretch", "cut", "repeat"))
    out = bytearray(data)
    if kind == "cut":
        return bytes(out[: rng.randrange(len(out))])
    if kind == "stretch":
        start = rng.randrange(len(out))
        size = min(rng.choice((2, 4, 64, 1024)), len(out) - start)
        out[start : start + size] = rng.choice((b"\xff", b"\0", b"\x7f")) * size
        return bytes(out)
    if kind == "repeat":
        start = rng.randrange(len(out))
        piece = out[start : start + rng.randrange(1, 400)]
        out[start:start] = piece
        return bytes(out)
    reach = min(2000, len(out)) if kind == "header" else len(out)
    for _ in range(rng.choice((1, 2, 8, 32))):
        out[rng.randrange(reach)] = rng.randrange(256)
    return bytes(out)


def _storm(
    folder: Path, paths: list[Path], tmp_path: Path, count: int, seed: int
) -> dict[str, int]:
    """Load `count` mutations in a child; a film or a CxrgazeError each, within time and memory."""
    rng = random.Random(seed)
    originals = {path: path.read_bytes() for path in paths}
    outcomes = {"film": 0, "refused": 0, "died": 0, "slow": 0}
    limit = 20.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with IsolatedLoader(time_limit_s=limit) as loader:
        for number in range(count):
            path = paths[number % len(paths)]
            target = tmp_path / f"m{path.suffix}"
            target.write_bytes(_mutated(originals[path], rng))
            start = time.monotonic()
            try:
                film = loader.load(target)
            except CxrgazeError as error:
                text = str(error)
                kind = "died" if "died" in text else "slow" if "longer than" in text else "refused"
                outcomes[kind] += 1
            else:
                assert np.isfinite(film.pixels).all()
                assert film.pixels.min() >= 0 and film.pixels.max() <= 1
                outcomes["film"] += 1
            assert time.monotonic() - start < limit + 10
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20  # kilobytes: the parent never grew by a gigabyte
    return outcomes


def test_300_mutations_of_real_files(films, tmp_path):
    outcomes = _storm(films, _real(films), tmp_path, 300, seed=1)
    print(outcomes)
    assert outcomes["film"] > 30 and outcomes["refused"] > 30  # the storm does both


@pytest.mark.slow
def test_5000_mutations_of_all_real_files(shared, tmp_path):
    paths = _real(shared / "cxr")
    dicoms = [p for p in paths if p.suffix == ".dcm"]
    outcomes = _storm(shared, dicoms * 4 + paths[-12:], tmp_path, 5000, seed=2)
    print(outcomes)
    assert sum(outcomes.values()) == 5000


def test_predict_with_isolate_equals_predict(bundles, films, tmp_path):
    bundle = str(bundles / "demo-fp16.cxrgaze")
    for name, more in (("a", []), ("b", ["--isolate"])):
        assert main([bundle, str(films), "--output", str(tmp_path / name), *more]) == 0
    a, b = ((tmp_path / name / "readings.csv").read_text() for name in ("a", "b"))
    assert a == b


def test_predict_outlives_a_hostile_file_among_good_ones(bundles, films, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    good = _real(films)[-1]
    (source / "a.png").write_bytes(good.read_bytes())
    (source / "b.png").write_bytes(good.read_bytes()[:3000])
    (source / "c.png").write_bytes(good.read_bytes())
    arguments = [str(bundles / "demo-fp16.cxrgaze"), str(source), "--isolate"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert len(list((tmp_path / "out").glob("*.overlay.png"))) == 2


def test_decode_ahead_keeps_order_is_bounded_and_passes_errors_on():
    started: list[int] = []
    lock = threading.Lock()

    def decode(path: Path):
        with lock:
            started.append(int(path.name))
        if path.name == "3":
            raise FilmError("3: damaged")
        return path.name

    taken = []
    for number, outcome in enumerate(decode_ahead([Path(str(i)) for i in range(12)], decode, 2)):
        time.sleep(0.01)
        assert max(started) <= number + 3  # itself, two ahead, one being asked for
        taken.append(str(outcome))
    assert taken == [str(i) if i != 3 else "3: damaged" for i in range(12)]


def test_decode_ahead_stops_when_it_is_closed():
    started: list[str] = []

    def decode(path: Path):
        started.append(path.name)
        return path.name

    ahead = decode_ahead([Path(str(i)) for i in range(1000)], decode, 2)
    next(ahead)
    ahead.close()
    assert len(started) <= 4


def test_other_errors_of_a_decoder_are_said_and_do_not_cost_the_others():
    def decode(path: Path):
        raise RuntimeError("a bug")

    errors = list(decode_ahead([Path("x"), Path("y")], decode))
    assert [type(error) for error in errors] == [FilmError] * 2
    assert "x: not read (RuntimeError)" in str(errors[0]) and "report it" in str(errors[0])


def test_a_film_of_64_megapixels_fits_and_a_limit_that_is_too_small_is_named(tmp_path):
    pixels = np.zeros((8000, 8000), np.uint16)
    pixels[:] = np.arange(8000, dtype=np.uint16) * 7
    cv2.imwrite(str(tmp_path / "large.png"), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    with IsolatedLoader() as loader:
        assert loader.load(tmp_path / "large.png").shape == (8000, 8000)
    with IsolatedLoader(memory_limit=700 << 20) as loader:
        with pytest.raises(FilmError, match="limit of 700 MiB .--isolate-memory"):
            loader.load(tmp_path / "large.png")
