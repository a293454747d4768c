"""Decoding in a child: the same film, and nothing that a file can do takes the reader down."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from cxrgaze.errors import CxrgazeError, FilmError, NotApplicableError, UsageError
from cxrgaze.films import isolate
from cxrgaze.films.ahead import decode_ahead, in_order
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


def test_stored_values_come_with_it_where_they_are_asked_for(films):
    with IsolatedLoader(keep_stored=True) as loader:
        for path in _real(films):
            here, there = load_film(path, keep_stored=True).stored, loader.load(path).stored
            assert np.array_equal(here.values, there.values)
            assert here.values.dtype == there.values.dtype
            assert (here.bits, here.larger_is_darker) == (there.bits, there.larger_is_darker)
            assert load_film(path).stored is None


def test_errors_come_back_as_film_errors_and_the_child_lives_on(films, tmp_path):
    (tmp_path / "cut.png").write_bytes(_real(films)[-1].read_bytes()[:5000])
    with IsolatedLoader() as loader:
        loader.load(_real(films)[-1])
        pid = loader._nursery.worker
        with pytest.raises(FilmError, match=r"cut\.png: damaged"):
            loader.load(tmp_path / "cut.png")
        assert loader.load(_real(films)[-1]).shape == (512, 512)
        assert loader._nursery.worker == pid


def test_a_decoder_that_hangs_is_killed_in_time_and_the_next_film_is_read(films):
    with IsolatedLoader(time_limit_s=1.0) as loader:
        loader.load(_real(films)[-1])
        os.kill(loader._nursery.worker, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(FilmError, match="longer than 1 s"):
            loader.load(_real(films)[-1])
        assert time.monotonic() - start < 10
        assert loader.load(_real(films)[-1]).shape == (512, 512)


def test_a_decoder_that_dies_is_named_and_replaced(films):
    with IsolatedLoader() as loader:
        loader.load(_real(films)[-1])
        os.kill(loader._nursery.worker, signal.SIGSEGV)
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


def test_threads_share_a_loader_and_no_film_is_taken_for_another(films):
    """B2: without the lock a film came back under another's name."""
    paths = _real(films)
    wanted = {path: load_film(path).sha256 for path in paths}
    with IsolatedLoader() as loader, ThreadPoolExecutor(4) as pool:
        for path, film in pool.map(lambda p: (p, loader.load(p)), paths * 8):
            assert film.sha256 == wanted[path] and film.name == str(path)


def test_closing_while_a_film_is_read_is_said(films):
    loader = IsolatedLoader()
    loader.load(_real(films)[-1])
    os.kill(loader._nursery.worker, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(loader.load, _real(films)[-1])
        time.sleep(0.2)
        loader.close()
        with pytest.raises(UsageError, match="closed while"):
            reading.result(10)
    with pytest.raises(UsageError, match="the loader is closed"):
        loader.load(_real(films)[-1])


def test_nothing_is_left_running(films):
    loader = IsolatedLoader()
    loader.load(_real(films)[-1])
    worker, nursery = loader._nursery.worker, loader._nursery._process.pid
    os.kill(worker, signal.SIGSTOP)  # as one that hangs
    loader.close()
    for process in (worker, nursery):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_nursery_that_is_killed_is_replaced(films):
    with IsolatedLoader() as loader:
        loader.load(_real(films)[-1])
        os.kill(loader._nursery.worker, signal.SIGKILL)
        os.kill(loader._nursery._process.pid, signal.SIGKILL)
        with pytest.raises(FilmError, match="died"):
            loader.load(_real(films)[-1])
        assert loader.load(_real(films)[-1]).shape == (512, 512)


def test_a_film_may_take_no_more_than_its_header_justifies(films):
    data = _real(films)[-1].read_bytes()
    allowed = isolate._allowed(data, 1 << 40)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    assert allowed - used < isolate._BASE + 2 * len(data) + 40 * 512 * 512
    assert isolate._allowed(data, 1 << 20) == 1 << 20


def test_what_lies_among_the_films_is_not_run(bundles, films, tmp_path):
    """D1: the child would import a module of the working folder."""
    shutil.copy(_real(films)[-1], tmp_path / "film.png")
    for name in ("cv2", "json", "numpy", "pydicom", "cxrgaze"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    command = Path(sys.executable).with_name("cxrgaze-predict")
    run = subprocess.run(
        [command, bundles / "demo-fp16.cxrgaze", "film.png", "--isolate"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "ran").exists()


NONSENSE = {
    "a huge header": struct.pack("<IIII", 1 << 30, 0, 0, 0),
    "a huge film": struct.pack("<IIII", 2, (1 << 32) - 1, 0, 0) + b"{}",
    "a huge identity": struct.pack("<IIII", 2, 0, 0, 1 << 30) + b"{}",
    "no JSON": struct.pack("<IIII", 4, 0, 0, 0) + b"\x80\x04N.",
    "another size": struct.pack("<IIII", 12, 4, 0, 0) + b'{"number":1}' + bytes(4),
    "stored values of no film": struct.pack("<IIII", 12, 0, 1 << 30, 0) + b'{"number":1}',
    "another's answer": struct.pack("<IIII", 12, 0, 0, 0) + b'{"number":2}',
}


@pytest.mark.parametrize("answer", NONSENSE)
def test_nonsense_from_a_worker_is_refused(monkeypatch, tmp_path, answer):
    """A worker that a hostile file took over can say what it likes."""
    ours, theirs = socket.socketpair()
    theirs.sendall(NONSENSE[answer])
    with theirs, IsolatedLoader(time_limit_s=5) as loader:
        monkeypatch.setattr(loader, "_started", lambda: ours)
        with pytest.raises(FilmError, match="nonsense"):
            loader.load(tmp_path / "x.png")


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip bytes in header, frame or pixels, overwrite a stretch, cut the end, repeat a piece."""
    kind = rng.choice(("header", "frame", "anywhere", "stretch", "cut", "repeat"))
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
    start, reach = {
        "header": (0, min(2000, len(out))),
        "frame": _frame(data),
        "anywhere": (0, len(out)),
    }[kind]
    for _ in range(rng.choice((1, 2, 8, 32))):
        out[rng.randrange(start, reach)] = rng.randrange(256)
    return bytes(out)


def _frame(data: bytes) -> tuple[int, int]:
    """Where the headers of frame and codestream lie: behind the tag of the pixel data."""
    start = max(data.rfind(b"\xe0\x7f\x10\0"), 0)
    return start, min(start + 250, len(data))


def _mutations(paths: list[Path], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    originals = [(path.suffix, path.read_bytes()) for path in paths]
    for number in range(count):
        suffix, data = originals[number % len(originals)]
        yield f"m{number}{suffix}", _mutated(data, rng)


LIMIT_S = 20.0


def _storm(paths: list[Path], count: int, seed: int) -> dict[str, int]:
    """Load `count` mutations in a child; a film or a CxrgazeError each, within time and memory."""
    outcomes = {"film": 0, "not applicable": 0, "refused": 0, "died": 0, "slow": 0}
    latest = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with IsolatedLoader(time_limit_s=LIMIT_S) as loader:
        for name, data in _mutations(paths, count, seed):
            start = time.monotonic()
            try:
                film = loader.load_bytes(data, name)
            except NotApplicableError:
                outcomes["not applicable"] += 1
            except CxrgazeError as error:
                text = str(error)
                kind = "died" if "died" in text else "slow" if "longer than" in text else "refused"
                outcomes[kind] += 1
            else:
                assert np.isfinite(film.pixels).all()
                assert film.pixels.min() >= 0 and film.pixels.max() <= 1
                outcomes["film"] += 1
            latest = max(latest, time.monotonic() - start)
    assert latest < LIMIT_S + 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20  # kilobytes: the parent never grew by a gigabyte
    print(f"{outcomes}, the latest after {latest:.1f} s")
    return outcomes


def test_300_mutations_of_real_files(films):
    outcomes = _storm(_real(films), 300, seed=1)
    assert outcomes["film"] > 30 and outcomes["refused"] > 30  # the storm does both


@pytest.mark.slow
def test_many_mutations_of_all_real_files(shared):
    """1,000, or as many as CXRGAZE_MUTATIONS says."""
    paths = _real(shared / "cxr")
    dicoms = [p for p in paths if p.suffix == ".dcm"]
    count = int(os.environ.get("CXRGAZE_MUTATIONS", 1000))
    outcomes = _storm(dicoms * 4 + paths[-12:], count, seed=2)
    assert sum(outcomes.values()) == count


CHILD = """
import sys
from cxrgaze.errors import CxrgazeError
from cxrgaze.films.decode import load_film
for path in sys.stdin.read().split():
    try:
        load_film(path)
        print(path, "film", flush=True)
    except CxrgazeError:
        print(path, "refused", flush=True)
"""


def test_300_mutations_without_isolation(films, tmp_path):
    """No exception but ours; a child that dies or hangs is listed: isolation is for that."""
    for name, data in _mutations(_real(films), 300, seed=1):
        (tmp_path / name).write_bytes(data)
    left, lost = sorted(map(str, tmp_path.iterdir())), []
    count = len(left)
    counts = {"film": 0, "refused": 0}
    while left:
        with subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            try:
                out, err = child.communicate("\n".join(left), timeout=120)
            except subprocess.TimeoutExpired as late:
                child.kill()
                out, err = (late.stdout or b"").decode(), ""
        done = [line.rsplit(" ", 1) for line in out.splitlines()]
        for _, outcome in done:
            counts[outcome] += 1
        assert "Traceback" not in err, err[-2000:]
        left = left[len(done) :]
        if left:
            lost.append((left.pop(0), child.returncode))
    print(counts, "lost to isolation:", lost)
    assert sum(counts.values()) + len(lost) == count
    assert counts["film"] > 30 and counts["refused"] > 30


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


@pytest.mark.parametrize("workers", [1, 3])
def test_work_in_threads_keeps_order_and_is_bounded(workers):
    """Each waits for a slower one before it; no more are begun than may wait."""
    begun: list[int] = []
    together, most, lock = 0, 0, threading.Lock()

    def work(number):
        nonlocal together, most
        with lock:
            begun.append(number)
            together += 1
            most = max(most, together)
        time.sleep(0.02 if number % 3 == 0 else 0.001)
        with lock:
            together -= 1
        return number * number

    done = []
    for number, square in enumerate(in_order(range(20), work, workers=workers, waiting=3)):
        assert max(begun) <= number + 4
        done.append(square)
    assert done == [n * n for n in range(20)] and most == workers


def test_an_error_of_the_work_ends_it_once_what_is_begun_is_done():
    ended: list[int] = []

    def work(number):
        if number == 2:
            raise ValueError("the disk is full")
        time.sleep(0.01)
        ended.append(number)

    with pytest.raises(ValueError, match="disk"):
        list(in_order(range(1000), work, workers=3, waiting=3))
    count = len(ended)
    time.sleep(0.05)
    assert len(ended) == count <= 6


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
