"""The packaging holds together, and what ships to the device stays light."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cxrgaze.benchmarks import cli as bench_cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = PROJECT["tool"]["setuptools"]
COMMANDS = PROJECT["project"]["scripts"]

# Everything but what the base install has. None in sys.modules makes an import fail.
HEAVY = (
    "torch",
    "torchvision",
    "monai",
    "lightning",
    "matplotlib",
    "safetensors",
    "onnx",
    "onnxsim",
    "polygraphy",
    "sklearn",
    "scipy",
    "tensorrt",
    "pycuda",
)


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_every_package_is_listed():
    packages = set()
    for root, _, files in os.walk(ROOT / "src/cxrgaze", followlinks=True):
        if "__init__.py" in files:
            packages.add(".".join(Path(root).relative_to(ROOT / "src").parts))
    assert packages == set(SETUP["packages"])


def test_every_link_points_at_its_folder():
    links = [path for path in (ROOT / "src/cxrgaze").iterdir() if path.is_symlink()]
    assert len(links) == 5
    for link in links:
        assert link.resolve() == ROOT / link.name


def _import_beside(clone: Path, *options: str) -> str:
    """What `import cxrgaze` is in the folder that holds `clone`: its file, or None."""
    code = "import cxrgaze; print(cxrgaze.__file__)"
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=clone.parent, capture_output=True, text=True).stdout.strip()


def test_beside_a_clone_named_cxrgaze_the_import_is_the_package(tmp_path):
    """The folder of that name is a namespace package to whoever stands beside it."""
    (tmp_path / "cxrgaze").symlink_to(ROOT)
    found = _import_beside(tmp_path / "cxrgaze")
    assert found.endswith("cxrgaze/__init__.py") and not found.startswith(str(tmp_path))
    assert _import_beside(tmp_path / "cxrgaze", "-S") == "None"  # as if nothing were installed


def test_a_prediction_runs_with_the_base_install_only(bundles, films, tmp_path):
    code = f"""
import sys
import zipfile
for name in {HEAVY!r}:
    sys.modules[name] = None
from cxrgaze.runtime.cli import main
sys.exit(main(sys.argv[1:]))
"""
    bundle, film = bundles / "demo-fp16.cxrgaze", films / "nih_00001507_002_512.png"
    done = _python(code, str(bundle), str(film), "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "nih_00001507_002_512.overlay.png").is_file()


def test_the_blocked_imports_of_that_test_do_block():
    assert (
        "ModuleNotFoundError"
        in _python("import sys; sys.modules['torch'] = None; import torch").stderr
    )


@pytest.mark.long
def test_the_bench_runs_with_the_base_install_only(bundles, films, tmp_path):
    code = f"""
import sys
import zipfile
for name in {HEAVY!r}:
    sys.modules[name] = None
from cxrgaze.benchmarks.cli import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["run", str(bundles / "demo-fp16.cxrgaze"), "--samples", "3", "--warmup", "1"]
    arguments += ["--after-idle", "1", "--films", str(films / "nih_00001507_002_512.png")]
    done = _python(code, *arguments, "--cold-starts", "1", "--output", str(tmp_path))
    assert done.returncode in (0, 9), done.stderr  # a busy machine may not settle in a second
    page = (tmp_path / "report.html").read_text()
    assert "matplotlib, which draws it, is not installed" in page and "data:image" not in page
    # A machine that has it draws the figures of the same report.
    assert bench_cli.main(["render", str(tmp_path / "report.json")]) == 0
    assert "data:image/svg" in (tmp_path / "report.html").read_text()


def test_bench_with_peers_without_their_extra_says_what_to_install(bundles):
    code = """
import sys
import zipfile
sys.modules['torch'] = None
from cxrgaze.benchmarks.cli import main
sys.exit(main(sys.argv[1:]))
"""
    done = _python(code, "run", str(bundles / "demo-fp16.cxrgaze"), "--peers")
    assert done.returncode == 6 and "its extra 'peers' (README, Installing)" in done.stderr


def test_export_without_its_extra_says_what_to_install():
    code = """
import sys
import zipfile
sys.modules['torch'] = None
from cxrgaze.export.cli import main
sys.exit(main([]))
"""
    done = _python(code)
    assert done.returncode == 6 and "its extra 'export' (README, Installing)" in done.stderr


def test_importing_cxrgaze_touches_nothing_heavy():
    code = (
        "import sys, cxrgaze; print([m for m in ('numpy', 'cv2', 'pydantic') if m in sys.modules])"
    )
    assert _python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_instant_and_imports_no_torch(command):
    """CPU time of a child, best of three: under 0.5 s, and no torch among its modules."""
    import resource

    module = COMMANDS[command].split(":")[0]
    code = f"""
import sys
import zipfile
from {module} import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = _python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "exit codes" in done.stdout and "not a medical device" in done.stdout
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


def test_import_contracts_hold():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def _storeys(page):
    """The picture of the storeys: a set of rooms a line, from the top."""
    picture = page.split("## The storeys")[1].split("```")[1]
    return [set(re.split(r" \| |, ", line)) for line in picture.strip().splitlines()]


def _layers(contracts):
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    rooms = (re.split(r" [|:] ", layer) for layer in layers)
    return [{room.removeprefix("cxrgaze.") for room in layer} for layer in rooms]


def test_the_picture_of_the_storeys_is_what_the_contracts_hold():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    assert _storeys(page) == _layers(contracts)
    assert _storeys(page.replace("runtime | evidence", "runtime")) != _layers(contracts)
    packages = {name.split(".")[1] for name in SETUP["packages"] if "." in name}
    modules = {path.stem for path in (ROOT / "src/cxrgaze").glob("*.py")} - {"__init__"}
    assert set().union(*_layers(contracts)) == packages | modules
    (no_circles,) = (c for c in contracts if c["type"] == "acyclic_siblings")
    assert no_circles["ancestors"] == ["cxrgaze.**"]


def test_the_version_is_written_once():
    import cxrgaze

    assert cxrgaze.__version__ == PROJECT["project"]["version"]


def test_what_dockerignore_lets_through_is_enough_for_the_whole_wheel(tmp_path):
    """As the first stage of the Dockerfile builds it; Docker itself is not run."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line.removeprefix("**/") for line in lines if not line.startswith(("#", "!"))]
    for name in (line[1:] for line in lines if line.startswith("!")):
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns(*(i.split("/")[-1] for i in ignored if i != "*"))
            shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package in SETUP["packages"]
        for path in (ROOT / "src" / package.replace(".", "/")).glob("*.py")
    }
    data = SETUP["package-data"]
    for package, patterns in data.items():
        folder = ROOT / "src" / package.replace(".", "/")
        expected |= {
            str(path.relative_to(ROOT / "src")) for p in patterns for path in folder.glob(p)
        }
    assert found == expected


_FROM_AN_INDEX = re.compile(r"pip install [^\n#]*(?<![\w/.*-])cxrgaze\b")
_FENCE = re.compile(r"^```sh$.*?^```$", re.MULTILINE | re.DOTALL)


def test_no_page_has_a_command_that_installs_cxrgaze_from_an_index():
    """There it is not: from a clone or a wheel."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for commands in _FENCE.findall(page.read_text()):
            assert not _FROM_AN_INDEX.search(commands), page
    for wrong in ("pip install cxrgaze", "pip install --upgrade 'cxrgaze[cuda12]'"):
        assert _FROM_AN_INDEX.search(wrong)
    for right in ("pip install wheelhouse/cxrgaze-0.1.0-py3-none-any.whl", "pip install '.[sign]'"):
        assert not _FROM_AN_INDEX.search(right)
