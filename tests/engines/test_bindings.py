"""Every call of ours exists in TensorRT 10.3, TensorRT 11.4 and TensorRT-RTX, class by class.

The bindings of TensorRT download, its libraries do not. Compiled against nine empty functions in
their stead, the real bindings of each version load in a process of their own, and say which
classes, methods and enumerators they have. Nothing of TensorRT is run: what is shown is that a call
is there, not what it does. TensorRT-RTX is asked itself.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "engines" / "build.py", ROOT / "runtime" / "trt.py"]
SOURCES += [ROOT / "runtime" / "trt_library.py"]
DOCUMENT = ROOT / "docs" / "tensorrt.md"
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "t": "ITensor",
    "timings": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "inspector": "EngineInspector",
}
"""Class by the name that a variable or attribute of ours has for an object of it."""
MODULES = {"trt", "module"}
WHEELS = {
    "10.3": ("tensorrt-cu12-bindings==10.3.0", "10"),
    "11.4": ("tensorrt-cu13-bindings==11.4.0.106", "11"),
}
ALLOWED = {
    # Guarded in `Library`: ahead of time and preflight, of TensorRT-RTX alone.
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ComputeCapability",
    "ComputeCapability.CURRENT",
    "EngineInvalidityDiagnostics",
    "EngineInvalidityDiagnostics.__members__",
    "EngineValidity",
    "EngineValidity.INVALID",
    "EngineValidity.SUBOPTIMAL",
    "Runtime.get_engine_validity",
}
EMPTY = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry "
    "getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins"
).split()
DUMP = """
import importlib.util, json, sys
if sys.argv[1].endswith(".so"):
    spec = importlib.util.spec_from_file_location("tensorrt", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    module = importlib.import_module(sys.argv[1])
print(json.dumps({name: dir(getattr(module, name)) for name in dir(module)}))
"""


def _calls() -> set[str]:
    """Our calls as "Class.member", "Enumeration" and "Enumeration.member"."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            chain = _chain(node)
            for place, name in enumerate(chain[:-1]):
                if name in MODULES:
                    found.add(".".join(chain[place + 1 : place + 3]))
                elif name in CLASSES and (place == 0 or chain[0] in ("self", "loaded")):
                    found.add(f"{CLASSES[name]}.{chain[place + 1]}")
    return {call for call in found if not call.endswith(".__version__") and call != "__version__"}


def _chain(node: ast.expr) -> list[str]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else ["?", *names]


def _has(members: dict[str, list[str]], call: str) -> bool:
    name, _, member = call.partition(".")
    return name in members and (not member or member in members[name])


def _dump(what: str, libraries: str = "") -> dict[str, list[str]]:
    command = [sys.executable, "-c", DUMP, what]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"LD_LIBRARY_PATH": libraries}
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def bindings(package_index, tmp_path_factory):
    """Members by class, by version."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler (cc) here, which makes what TensorRT's bindings link against")
    folder, found = tmp_path_factory.mktemp("wheels"), {}
    source = folder / "empty.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in EMPTY))
    for version, (requirement, major) in WHEELS.items():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(folder / version), requirement]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        with zipfile.ZipFile(next((folder / version).glob("*.whl"))) as wheel:
            wheel.extractall(folder / version)
        for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
            library = folder / version / f"lib{name}.so.{major}"
            flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
            subprocess.run([compiler, *flags, str(source)], check=True)
        (binding,) = (folder / version).glob("tensorrt_bindings/tensorrt.so")
        found[version] = _dump(str(binding), str(folder / version))
    return found


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    return _dump("tensorrt_rtx")


def test_the_table_of_calls_has_what_build_and_run_need():
    assert _calls() >= {
        "Builder.create_network",
        "OnnxParser.parse",
        "IOptimizationProfile.set_shape",
        "BuilderFlag.TF32",
        "Runtime.deserialize_cuda_engine",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_tensor_address",
        "ICudaEngine.get_tensor_profile_shape",
        "EngineInspector.get_engine_information",
        "IBuilderConfig.set_timing_cache",
        "ITimingCache.serialize",
    }


@pytest.mark.parametrize("version", WHEELS)
def test_every_call_is_there(bindings, version):
    missing = {call for call in _calls() if not _has(bindings[version], call)}
    assert missing <= ALLOWED
    assert "ComputeCapability" in missing  # what is allowed for is really not there


def test_every_call_is_there_in_tensorrt_rtx(rtx):
    assert not {call for call in _calls() if not _has(rtx, call)}


@pytest.mark.parametrize(
    "call", ["IBuilderConfig.int8_calibrator", "BuilderFlag.FP16", "ICudaEngine.device_memory_size"]
)
def test_the_look_up_sees_what_11_removed(bindings, call):
    assert _has(bindings["10.3"], call) and not _has(bindings["11.4"], call)


def test_the_documented_table_is_what_was_found(bindings, rtx):
    """docs/tensorrt.md; where this fails, the message has the table that belongs there."""
    columns = [bindings["10.3"], bindings["11.4"], rtx]
    lines = ["| call | 10.3 | 11.4 | RTX 1.7 |", "| --- | --- | --- | --- |"]
    for call in sorted(call for call in _calls() if "." in call):
        marks = ("yes" if _has(members, call) else "no" for members in columns)
        lines.append(f"| `{call}` | {' | '.join(marks)} |")
    table = "\n".join(lines)
    assert table in DOCUMENT.read_text(), f"put this into {DOCUMENT}:\n{table}"
