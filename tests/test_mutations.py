"""A small mutation run: where a check is taken away, a test must fail.

Each `raise X(...)` of the modules in `PAIRS` becomes `pass`, one at a time, in a copy of the
package, and the tests beside its module run on that copy in a process of their own. Not covered:
a bare `raise`, checks of another kind, and modules whose tests take long, as with torch.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import queue
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "train", "export", "engines", "runtime", "benchmarks")
BUNDLE = "tests/bundles/test_bundle.py"
FILM = "tests/films/test_film.py tests/films/test_images.py"
CODESTREAM = "tests/films/test_codestream.py tests/films/test_decoders.py"
DICOM = f"{CODESTREAM} tests/films/test_borders.py tests/films/test_dicom.py"
BACKENDS = "tests/runtime/test_own_backend.py tests/runtime/test_trt.py"

PAIRS = {
    "src/cxrgaze/files.py": "tests/ground_floor/test_files.py",
    "src/cxrgaze/records.py": BUNDLE,
    "src/cxrgaze/spec.py": "tests/ground_floor/test_spec.py",
    "src/cxrgaze/bundles/bundle.py": BUNDLE,
    "src/cxrgaze/bundles/manifest.py": BUNDLE,
    "src/cxrgaze/bundles/served.py": "tests/bundles/test_served.py",
    "src/cxrgaze/evidence/bounds.py": "tests/evidence/test_compare.py -k must",
    "src/cxrgaze/evidence/class_presets.py": "tests/evidence/test_labelled_set.py",
    "src/cxrgaze/evidence/compare.py": "tests/evidence/test_compare.py -k must",
    "src/cxrgaze/evidence/heatmaps.py": "tests/evidence/test_heatmaps.py",
    "src/cxrgaze/evidence/intervals.py": "tests/evidence/test_intervals.py -k must",
    "src/cxrgaze/evidence/labelled_set.py": "tests/evidence/test_labelled_set.py",
    "src/cxrgaze/evidence/metrics.py": "tests/evidence/test_metrics.py -k 'not torchmetrics'",
    "src/cxrgaze/evidence/phantom.py": "tests/evidence/test_phantom.py",
    "src/cxrgaze/evidence/power.py": "tests/evidence/test_compare.py -k 149",
    "src/cxrgaze/films/canvas.py": "tests/films/test_canvas.py -k beyond",
    "src/cxrgaze/films/codestream.py": CODESTREAM,
    "src/cxrgaze/films/decode.py": f"{FILM} tests/films/test_borders.py -k 'not isolated'",
    "src/cxrgaze/films/dicom.py": f"{DICOM} -k '(refused or said or cut or without or last) "
    "and not once'",
    "src/cxrgaze/films/film.py": FILM,
    "src/cxrgaze/films/find.py": FILM,
    "src/cxrgaze/films/isolate.py": "tests/films/test_isolate.py -k 'not 300 and not predict'",
    "src/cxrgaze/films/images.py": FILM,
    "runtime/backends.py": f"{BACKENDS} -k 'own_backend or without_a_gpu'",
    "runtime/device.py": "tests/runtime/test_device.py",
    "runtime/ort.py": "tests/runtime/test_ort.py",
    "runtime/plans.py": "tests/engines/test_plans.py",
    "runtime/reader.py": "tests/runtime/test_reader.py",
    "runtime/reading.py": "tests/runtime/test_reader.py -k left_out",
    "runtime/trt.py": "tests/runtime/test_trt.py -k 'not gated'",
    "train/map_files.py": "tests/train/test_saliency.py "
    "-k 'refused or too_little or tell_them or is_named'",
}
"""Tests by the module whose checks they are for: arguments of pytest."""

UNREACHED = {
    ("runtime/plans.py", "is the record of another build"): "`read_record` refuses a record that "
    "is not of its name, and the name is the key of the inputs",
    ("src/cxrgaze/films/dicom.py", "there is always one decoder"): "says so itself",
    ("src/cxrgaze/films/dicom.py", "decoded to"): "what is compressed was held against the header "
    "before, and what is not has its size from it",
}
"""Why no test fails without it, by module and a part of its text."""

PLUGIN = '''
import resource
from pathlib import Path

import pytest

HARD = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, HARD))  # without its guard a bomb goes off


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """The bundles of the run outside; to export them takes longer than most tests."""
    if fixturedef.argname == "bundles":
        made = Path({bundles!r})
        fixturedef.cached_result = (made, fixturedef.cache_key(request), None)
        return made
'''


class Mutant(NamedTuple):
    raised: str
    """The statement that is gone."""
    source: str
    """The module without it."""


def mutants(source: str) -> list[Mutant]:
    """The module without each of its `raise X(...)`, in their order."""
    data = source.encode()
    lines = data.splitlines(keepends=True)
    before = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
    made = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            start = before[node.lineno - 1] + node.col_offset
            end = before[node.end_lineno - 1] + node.end_col_offset
            without = data[:start] + b"pass" + data[end:]
            made.append((start, Mutant(ast.unparse(node), without.decode())))
    return [mutant for _, mutant in sorted(made)]


def test_each_raise_is_taken_away_alone():
    source = (
        "def positive(value):\n"
        "    if value != value: raise ValueError('ä is no number')  # one\n"
        "    try:\n"
        "        return 1 / value\n"
        "    except ZeroDivisionError as error:\n"
        "        raise ValueError(\n"
        "            'zero'\n"
        "        ) from error\n"
        "    except TypeError:\n"
        "        raise\n"
    )
    one, two = mutants(source)
    assert one.source == source.replace("raise ValueError('ä is no number')", "pass")
    assert two.source == source[: source.index("raise ValueError(\n")] + (
        "pass\n    except TypeError:\n        raise\n"
    )
    assert [m.raised for m in (one, two)] == [
        "raise ValueError('ä is no number')",
        "raise ValueError('zero') from error",
    ]
    assert mutants("def nothing():\n    raise NotImplementedError\n") == []


class Copy:
    """A copy of the package, to run tests on."""

    def __init__(self, folder: Path, plugins: Path) -> None:
        self._folder = folder
        self._path = f"{folder / 'src'}{os.pathsep}{plugins}"
        for name in FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)

    def outcome(self, module: str, source: str) -> str:
        """Of the module's tests where this is its source: "passed", "failed" or what went wrong."""
        path = self._folder / module
        original = path.read_text(encoding="utf-8")
        self._write(path, source)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=no",
            "-m",
            "not slow and not long",
        ]
        for plugin in ("mutation_child", "no:cacheprovider", "no:hypothesispytest", "no:xdist"):
            command += ["-p", plugin]  # what is left out takes longer to import than most tests
        command += shlex.split(PAIRS[module])
        environment = {**os.environ, "PYTHONPATH": self._path, "OMP_NUM_THREADS": "1"}
        try:
            run = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
            )
        except subprocess.TimeoutExpired:
            return "failed"
        finally:
            self._write(path, original)
        if run.returncode not in (0, 1):
            return f"exit code {run.returncode}: {run.stdout[-1000:]} {run.stderr[-1000:]}"
        return "failed" if run.returncode else "passed"

    @staticmethod
    def _write(path: Path, source: str) -> None:
        """Compiled code goes: it is known by its size and by the second that it was made in."""
        path.write_text(source, encoding="utf-8")
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


CHOSEN = os.environ.get("CXRGAZE_MUTATE", "")
"""What the paths of the modules must begin with; all of them where it is empty."""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="some checks are of Linux alone")
def test_every_check_has_a_test_in_which_it_fails(bundles, tmp_path):
    (tmp_path / "mutation_child.py").write_text(PLUGIN.format(bundles=str(bundles)))
    cores = len(os.sched_getaffinity(0))
    copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for index in range(cores):
        copies.put(Copy(tmp_path / str(index), tmp_path))

    def outcome(job):
        copy = copies.get()
        try:
            return copy.outcome(*job)
        finally:
            copies.put(copy)

    sources = {
        module: (ROOT / module).read_text(encoding="utf-8")
        for module in PAIRS
        if module.startswith(CHOSEN)
    }
    planted = [(module, m) for module, source in sources.items() for m in mutants(source)]
    with ThreadPoolExecutor(cores) as pool:
        untouched = dict(zip(sources, pool.map(outcome, sources.items()), strict=True))
        broken = {module: found for module, found in untouched.items() if found != "passed"}
        assert not broken
        found = list(pool.map(outcome, ((module, m.source) for module, m in planted)))
    survivors = []
    reasons = {key: why for key, why in UNREACHED.items() if key[0] in sources}
    for (module, mutant), came_of_it in zip(planted, found, strict=True):
        known = [key for key in UNREACHED if key[0] == module and key[1] in mutant.raised]
        if came_of_it != "failed" and known:
            reasons.pop(known[0], None)
        elif came_of_it != "failed":
            survivors.append(f"{module}: {mutant.raised}: {came_of_it}")
    assert not survivors, f"of {len(planted)} checks:\n" + "\n".join(survivors)
    assert not reasons, f"no longer needed in UNREACHED: {reasons}"
