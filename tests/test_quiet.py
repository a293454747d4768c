"""A fresh home and no network: commands write where they are told to, and talk to nobody."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def traced():
    """What a command is run under: no network, and every socket seen."""
    trace = ["unshare", "-n", "strace", "-f", "-qq", "-e", "trace=socket,connect,sendto"]
    if not (shutil.which("strace") and shutil.which("unshare")):
        pytest.skip("needs strace and unshare (apt-get install strace util-linux)")
    if subprocess.run([*trace, "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no network namespaces, or nobody may be traced")
    return trace


def _run(command, place, trace=(), **environment):
    """Run a command of ours in a fresh home; what it left there, and the sockets it opened."""
    home, temporary, work = (place / name for name in ("home", "tmp", "work"))
    for folder in (home, temporary, work):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
    fresh = {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
    }
    seen = place / "trace"
    done = subprocess.run(
        [*trace, *(("-o", str(seen)) if trace else ()), *map(str, command)],
        cwd=work,
        env={key: value for key, value in (fresh | environment).items() if value is not None},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 9), done.stderr[-2000:]
    left = [str(p.relative_to(place)) for f in (home, temporary, work) for p in f.rglob("*")]
    sockets = seen.read_text().splitlines() if trace else []
    return left, [line for line in sockets if "AF_INET" in line], done


def _commands(bundles, films, place):
    bundle, film = bundles / "demo-fp16.cxrgaze", films / "nih_00001507_002_512.png"
    out = place / "out"
    yield "predict", [BIN / "cxrgaze-predict", bundle, film, "--output", out / "readings"]
    yield "isolate", [BIN / "cxrgaze-predict", bundle, film, "--isolate"]
    yield "inspect", [BIN / "cxrgaze-inspect", bundle, "--device"]
    if importlib.util.find_spec("openvino"):
        asked = ["--device", "openvino"]
        yield "openvino", [BIN / "cxrgaze-predict", bundle, film, *asked]
        yield "prove", [BIN / "cxrgaze-build", bundle, *asked, "--cache", out / "proofs"]
    if importlib.util.find_spec("tensorrt_rtx"):
        plan = ["--cpu-only", "--sm", "86", "--cache", out / "plans"]
        yield "build", [BIN / "cxrgaze-build", bundle, *plan]


def _slow_commands(bundles, films, place):
    bundle, film = bundles / "demo-fp16.cxrgaze", films / "nih_00001507_002_512.png"
    out = place / "out"
    yield "export", [BIN / "cxrgaze-export", "--precision", "fp16", "--output", out]
    few = ["--samples", "3", "--cold-starts", "1", "--after-idle", "1", "--seconds", "3"]
    few += ["--warmup", "1", "--peers", "OpenVINO int8 by NNCF"]
    yield "bench", [BIN / "cxrgaze-bench", "run", bundle, "--films", film, "--output", out, *few]
    stages = "stages.contrastive=false stages.saliency=false stages.fusion=false"
    short = [
        part for text in (*stages.split(), "stages.encoder.epochs=1") for part in ("--set", text)
    ]
    demo = ["demo", "--films", "64", "--output", out / "run"]
    yield "train", [BIN / "cxrgaze-train", *demo, *short]


OF_TORCH = "tmp/torchinductor_"
"""Torch's cache of compiled code, in the temporary folder; training makes it."""


def _check(commands, tmp_path, trace):
    for name, command in commands:
        left, sockets, _ = _run(command, tmp_path / name, trace)
        if name == "train":
            left = [path for path in left if not path.startswith(OF_TORCH)]
        assert not left, (name, left)
        assert not sockets, (name, sockets[:5])


HOSTILE = """
import pathlib, socket
pathlib.Path.home().joinpath("device-id").write_text("1")
socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
"""


def test_what_is_left_and_what_is_opened_is_seen(tmp_path, traced):
    left, sockets, _ = _run([sys.executable, "-c", HOSTILE], tmp_path / "run", traced)
    assert left == ["home/device-id"] and sockets


def test_reading_and_building_leave_nothing_and_phone_nobody(bundles, films, tmp_path, traced):
    """B1: ONNX Runtime left a device id and a queue of uploads in the home folder."""
    _check(_commands(bundles, films, tmp_path), tmp_path, traced)


@pytest.mark.slow
def test_export_bench_and_training_leave_nothing_and_phone_nobody(bundles, films, tmp_path, traced):
    _check(_slow_commands(bundles, films, tmp_path), tmp_path, traced)


@pytest.mark.parametrize("home", [None, "/dev/null"], ids=["none", "one that cannot be written"])
def test_reading_needs_no_home(bundles, films, tmp_path, home):
    """B4."""
    film = films / "nih_00001507_002_512.png"
    command = [BIN / "cxrgaze-predict", bundles / "demo-fp16.cxrgaze", film]
    left, _, done = _run(command, tmp_path / "run", HOME=home)
    assert "1 read" in done.stderr and not left


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)")
def test_reading_needs_no_entry_of_its_user(bundles, films):
    """B4: a container's user is often a number alone."""
    nobody = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
    probe = [*nobody, sys.executable, "-c", "import cxrgaze.runtime.cli"]
    if (tried := subprocess.run(probe, capture_output=True, text=True)).returncode:
        why = (tried.stderr.splitlines() or ["no reason given"])[-1]
        pytest.skip(f"another user cannot run this Python: {why}")
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which is its user's alone
        place = Path(folder)
        place.chmod(0o755)
        bundle = shutil.copytree(bundles / "demo-fp16.cxrgaze", place / "demo.cxrgaze")
        film = shutil.copy(films / "nih_00001507_002_512.png", place)
        command = [*nobody, BIN / "cxrgaze-predict", bundle, film]
        left, _, done = _run(command, place / "run", HOME=None)
    assert "1 read" in done.stderr and not left
