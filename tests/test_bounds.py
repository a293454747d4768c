"""The bounds that pyproject.toml declares: a device's install at the lowest, and at the newest.

`make test-lowest` and `make test-newest` run the slow tests here.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cxrgaze.export import cli as export_cli
from cxrgaze.runtime import cli as predict_cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("sign", "bench", "openvino")


def floors(requirements: list[str]) -> list[str]:
    """Each requirement pinned to its lower bound, its marker kept; without a bound a ValueError."""
    pins = []
    for requirement in requirements:
        specifier, semicolon, marker = requirement.partition(";")
        found = re.fullmatch(r"([\w-]+)>=([\w.]+)(,.*)?", specifier.strip())
        if found is None:
            raise ValueError(f"{requirement!r} has no lower bound")
        pins.append(f"{found[1]}=={found[2]}{semicolon}{marker}")
    return pins


def test_a_floor_is_the_lower_bound_with_its_marker():
    assert floors(["a-b>=1.2,<3", "c>=4; python_version < '3.11'"]) == [
        "a-b==1.2",
        "c==4; python_version < '3.11'",
    ]
    with pytest.raises(ValueError, match="no lower bound"):
        floors(["a<3"])


def test_every_lower_bound_is_below_what_ci_installs():
    """Else the constraints of CI could not be installed."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for pin in floors(_requirements()):
        name, version = pin.partition(";")[0].split("==")
        if name in pinned:  # tomli is not, on the Python of CI
            assert _numbers(version) <= _numbers(pinned[name]), name


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _requirements() -> list[str]:
    extras = PROJECT["optional-dependencies"]
    return [*PROJECT["dependencies"], *(r for extra in EXTRAS for r in extras[extra])]


def _lowest_python() -> str:
    """The lowest Python of `requires-python` where there is one, else the one here."""
    version = PROJECT["requires-python"].removeprefix(">=")
    found = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    for python in (f"python{version}", *map(str, found)):
        try:
            done = subprocess.run([python, "--version"], capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if done.stdout.startswith(f"Python {version}."):
            return python
    return sys.executable


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _readings(folder: Path) -> dict[str, list[float]]:
    """Probabilities by film."""
    with (folder / "readings.csv").open() as file:
        return {
            row["film"]: [float(v) for k, v in row.items() if k.startswith("p_")]
            for row in csv.DictReader(file)
            if row["status"] == "read"
        }


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["lowest", "newest"])
def test_a_device_reads_and_measures_at(bound, films, tmp_path, package_index):
    """A wheel in a bare environment reads a signed bundle of this one as this one does."""
    python = _lowest_python() if bound == "lowest" else sys.executable
    _run(python, "-m", "venv", tmp_path / "venv")
    commands = tmp_path / "venv/bin"
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    pins = floors(_requirements()) if bound == "lowest" else []
    (tmp_path / "pins.txt").write_text("\n".join(pins))
    _run(
        *(commands / "python", "-m", "pip", "install", "--only-binary=:all:"),
        *("--constraint", tmp_path / "pins.txt", f"{wheel}[{','.join(EXTRAS)}]"),
    )
    print(python, _run(commands / "python", "-m", "pip", "freeze").stdout)

    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    _run("openssl", "genpkey", "-algorithm", "ed25519", "-out", key)
    _run("openssl", "pkey", "-in", key, "-pubout", "-out", public)
    arguments = ["--precision", "fp16", "--no-gate", "--sign", str(key), "--output", str(tmp_path)]
    assert export_cli.main(arguments) == 0
    bundle = tmp_path / "demo-fp16.cxrgaze"

    read = [str(bundle), str(films), "--public-key", str(public), "--output"]
    assert predict_cli.main([*read, str(tmp_path / "here")]) == 0
    _run(commands / "cxrgaze-predict", *read, tmp_path / "there")
    _run(commands / "cxrgaze-build", bundle, "--device", "openvino", "--cache", tmp_path / "proofs")
    _run(commands / "cxrgaze-predict", *read, tmp_path / "openvino", "--device", "openvino")
    here = _readings(tmp_path / "here")
    for folder in ("there", "openvino"):
        there = _readings(tmp_path / folder)
        assert len(here) == 8 and there.keys() == here.keys()
        for film, expected in here.items():
            assert there[film] == pytest.approx(expected, abs=1e-3), film

    short = ["--samples", "3", "--warmup", "1", "--after-idle", "1", "--cold-starts", "1"]
    _run(
        *("sh", "-c", '"$@" || test $? -eq 9', "sh"),  # a busy machine may not settle
        *(commands / "cxrgaze-bench", "run", bundle, "--films", films, *short),
        *("--output", tmp_path / "bench"),
    )
    assert "data:image/svg" in (tmp_path / "bench/report.html").read_text()
