"""Every call of ours exists in TensorRT 10.3 and 11.4: names looked up in their bindings.

The bindings' wheels download, their libraries do not; nothing is imported and nothing is run. What
is shown is that a name is there, not what it does.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "engines" / "build.py", ROOT / "runtime" / "trt_library.py"]
OBJECTS = {"trt", "builder", "network", "parser", "config", "profile", "error", "t"}
"""Names of our variables that hold objects of the library."""
WHEELS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
RTX_ONLY = {"num_compute_capabilities", "set_compute_capability"}
OURS = {"name", "shape", "args"}  # attributes of plain values under one of those variables


def _calls() -> set[str]:
    """Attributes that our code takes of objects of the library."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            chain = []
            while isinstance(node, ast.Attribute):
                chain.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id in OBJECTS:
                found.update(chain)
    return found - OURS


@pytest.fixture(scope="module")
def bindings(package_index, tmp_path_factory):
    """Bytes of each version's compiled bindings."""
    folder, found = tmp_path_factory.mktemp("wheels"), {}
    for version, requirement in WHEELS.items():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", "3.10"]
        for tag in ("manylinux_2_17_x86_64", "manylinux_2_28_x86_64"):
            command += ["--platform", tag]
        target = folder / version
        done = subprocess.run([*command, "--dest", str(target), requirement], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
            names = [n for n in wheel.namelist() if n.endswith(".so")]
            found[version] = b"".join(wheel.read(name) for name in names)
    return found


def _has(binary: bytes, name: str) -> bool:
    return name.encode() + b"\0" in binary  # linkers let a name share the tail of a longer one


def test_the_table_of_calls_is_not_empty():
    calls = _calls()
    assert {"create_network", "parse", "set_shape", "build_serialized_network", "TF32"} <= calls


@pytest.mark.parametrize("version", WHEELS)
def test_every_call_is_there(bindings, version):
    missing = {name for name in _calls() - RTX_ONLY if not _has(bindings[version], name)}
    # TensorRT 11 has no flag for what is always so; `Library.network_flags` allows for that.
    allowed = {"STRONGLY_TYPED"} if version == "11.4" else set()
    assert missing <= allowed


@pytest.mark.parametrize("name", ["int8_calibrator", "platform_has_fast_int8"])
def test_the_look_up_sees_what_11_removed(bindings, name):
    assert _has(bindings["10.3"], name) and not _has(bindings["11.4"], name)
