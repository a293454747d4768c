"""A fresh home and no network: commands write where they are told to, and talk to nobody."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
HAS_TRACE = bool(shutil.which("strace") and shutil.which("unshare"))


def _has_namespaces() -> bool:
    tried = subprocess.run(["unshare", "-n", "true"], capture_output=True)
    return tried.returncode == 0


def _run(command, place, *, without=()):
    """Run a command of ours in a fresh home; what it left there, and the sockets it opened."""
    home, temporary, work = (place / name for name in ("home", "tmp", "work"))
    for folder in (home, temporary, work):
        folder.mkdir(exist_ok=True)
    environment = {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
    }
    trace = place / "trace"
    before = []
    if HAS_TRACE and _has_namespaces():
        calls = "trace=socket,connect,sendto"
        before = ["unshare", "-n", "strace", "-f", "-qq", "-e", calls, "-o", str(trace)]
    done = subprocess.run(
        [*before, *map(str, command)],
        cwd=work,
        env={key: value for key, value in environment.items() if key not in without},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 9), done.stderr[-2000:]
    left = [str(p.relative_to(place)) for f in (home, temporary, work) for p in f.rglob("*")]
    sockets = trace.read_text().splitlines() if before else []
    return left, [line for line in sockets if "AF_INET" in line], done


def _commands(bundles, films, place):
    bundle, film = bundles / "demo-fp16.cxrgaze", films / "nih_00001507_002_512.png"
    out = place / "out"
    yield "predict", [BIN / "cxrgaze-predict", bundle, film, "--output", out / "readings"]
    yield "isolate", [BIN / "cxrgaze-predict", bundle, film, "--isolate"]
    yield "inspect", [BIN / "cxrgaze-inspect", bundle, "--device"]
    if importlib.util.find_spec("tensorrt_rtx"):
        plan = ["--cpu-only", "--sm", "86", "--cache", out / "plans"]
        yield "build", [BIN / "cxrgaze-build", bundle, *plan]


def _slow_commands(bundles, films, place):
    bundle, film = bundles / "demo-fp16.cxrgaze", films / "nih_00001507_002_512.png"
    out = place / "out"
    yield "export", [BIN / "cxrgaze-export", "--precision", "fp16", "--output", out]
    few = ["--samples", "3", "--cold-starts", "1", "--after-idle", "1", "--seconds", "3"]
    few += ["--warmup", "1", "--peers", "onnxruntime"]
    yield "bench", [BIN / "cxrgaze-bench", "run", bundle, "--films", film, "--output", out, *few]
    stages = "stages.contrastive=false stages.saliency=false stages.fusion=false"
    short = [
        part for text in (*stages.split(), "stages.encoder.epochs=1") for part in ("--set", text)
    ]
    demo = ["demo", "--films", "32", "--output", out / "run"]
    yield "train", [BIN / "cxrgaze-train", *demo, *short]


def _check(commands, tmp_path):
    for name, command in commands:
        place = tmp_path / name
        place.mkdir()
        left, sockets, _ = _run(command, place)
        assert not left, (name, left)
        assert not sockets, (name, sockets[:5])


def test_reading_and_building_leave_nothing_and_phone_nobody(bundles, films, tmp_path):
    """B1: ONNX Runtime left a device id and a queue of uploads in the home folder."""
    _check(_commands(bundles, films, tmp_path), tmp_path)


@pytest.mark.slow
def test_export_bench_and_training_leave_nothing_and_phone_nobody(bundles, films, tmp_path):
    _check(_slow_commands(bundles, films, tmp_path), tmp_path)


@pytest.mark.parametrize("home", ["none", "read-only", "of nobody"])
def test_reading_needs_no_home(bundles, films, tmp_path, home):
    """B4: no HOME, one that cannot be written, a user without an entry."""
    command = [BIN / "cxrgaze-predict", bundles / "demo-fp16.cxrgaze"]
    command.append(films / "nih_00001507_002_512.png")
    if home == "of nobody":
        if os.getuid() or not shutil.which("setpriv"):
            pytest.skip("needs root and setpriv")
        os.chmod(tmp_path, 0o777)
        command = ["setpriv", "--reuid", "54321", "--clear-groups", *command]
        probe = subprocess.run([*command[:4], "test", "-r", str(bundles)], capture_output=True)
        if probe.returncode:
            pytest.skip("the folder of the tests is not open to others")
    place = tmp_path / "place"
    place.mkdir(mode=0o777)
    (place / "home").mkdir(mode=0o555)
    left, _, done = _run(command, place, without=("HOME",) if home != "read-only" else ())
    assert "1 read" in done.stderr and not left
