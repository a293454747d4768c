"""The device's install resolves to wheels: nothing is compiled on a Jetson."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
TAGS = ("manylinux2014", "manylinux_2_17", "manylinux_2_24", "manylinux_2_27", "manylinux_2_28")
DEVICES = {"JetPack 6": ("3.10", "cuda12", "12."), "JetPack 7": ("3.12", "cuda13", "13.")}


@pytest.mark.long
@pytest.mark.parametrize("device", DEVICES)
def test_the_base_install_resolves_for_aarch64(package_index, device, tmp_path):
    python, extra, cuda = DEVICES[device]
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    command += ["--target", str(tmp_path), "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python]
    for tag in TAGS:
        command += ["--platform", f"{tag}_aarch64"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    found = {entry["metadata"]["name"]: entry for entry in report["install"]}
    assert found["cuda-bindings"]["metadata"]["version"].startswith(cuda)
    assert not {"torch", "onnx", "polygraphy"} & set(found)
    urls = [entry["download_info"]["url"] for entry in report["install"]]
    assert all("aarch64" in url or "none-any" in url for url in urls)


def test_a_missing_wheel_would_be_seen(package_index, tmp_path):
    """pycuda has none, for any machine."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet"]
    command += ["--target", str(tmp_path), "--only-binary=:all:", "--python-version", "3.10"]
    command += ["--platform", "manylinux_2_28_aarch64", "pycuda"]
    assert subprocess.run(command, capture_output=True).returncode != 0
