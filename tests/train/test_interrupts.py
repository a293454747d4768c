"""Ctrl-C and SIGTERM in prepare and fit, at moments by what is written and not by the clock."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from cxrgaze.errors import ExitCode
from cxrgaze.evidence import phantom

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def _interrupted(command, reached, number):
    """Start a command, interrupt it once `reached()`, and give its exit code and its words."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cxrgaze.train.cli", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not reached():
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupts")
    (folder / "films").mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "patient", "label"])
        for seed in range(400):
            drawn = phantom.draw(seed)
            Image.fromarray(drawn.pixels).save(folder / "films" / f"f{seed}.png")
            table.writerow([f"f{seed}.png", f"p{seed}", drawn.label])
    return folder


@pytest.mark.slow
@SIGNALS
@pytest.mark.parametrize("written", [1, 50, 150, 300, 390])
def test_an_interrupted_prepare_leaves_nothing(films, tmp_path, number, written):
    command = ["prepare", "--films", films / "films", "--labels", films / "labels.csv"]
    command += ["--output", tmp_path / "set"]

    def reached():
        return sum(len(names) for _, _, names in os.walk(tmp_path)) >= written

    code, said = _interrupted(command, reached, number)
    assert code == ExitCode.INTERRUPTED, said
    assert not os.listdir(tmp_path)


@pytest.mark.slow
@SIGNALS
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_an_interrupted_fit_can_be_resumed(tmp_path, number, epochs):
    made = phantom.write_phantom_set(tmp_path / "set", {"train": 40, "val": 13, "test": 8})
    short = ["stages.contrastive=false", "stages.encoder.epochs=4", "stages.saliency=false"]
    command = ["fit", made.folder, "--config", "demo", "--output", tmp_path / "run"]
    command += ["--allow-untaught"]  # an encoder alone
    for override in (*short, "stages.fusion=false"):
        command += ["--set", override]
    table = tmp_path / "run" / "epochs.csv"

    def reached():
        return table.is_file() and len(table.read_text().splitlines()) > epochs

    code, said = _interrupted(command, reached, number)
    assert code == ExitCode.INTERRUPTED, said
    assert not [path for path in (tmp_path / "run").rglob("*.part")]
    resumed = [sys.executable, "-m", "cxrgaze.train.cli", "fit", made.folder]
    resumed += ["--output", tmp_path / "run", "--resume"]
    done = subprocess.run(resumed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
