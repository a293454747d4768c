"""Child processes of ours import nothing that lies in the working folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cxrgaze import children

PROBE = "import json, sys, os; print(json.dumps([sys.argv, sys.path]))"


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A module `probe` on the path, and a working folder with a module of each name."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "probe.py").write_text(PROBE)
    films = tmp_path / "films"
    films.mkdir()
    for name in ("json", "numpy", "probe", "runpy", "sitecustomize", "usercustomize"):
        (films / f"{name}.py").write_text("print('hostile')\nraise SystemExit(3)")
    monkeypatch.chdir(films)
    monkeypatch.syspath_prepend(str(home))
    return films


@pytest.mark.parametrize("entries", [[], [""], ["."], None])
def test_it_runs_the_module_with_its_arguments_and_nothing_of_the_folder(
    probe, monkeypatch, entries
):
    """D1: `python -m` puts the folder first."""
    entries = [str(probe)] if entries is None else entries
    monkeypatch.setattr(sys, "path", [*entries, *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(probe))
    done = subprocess.run(children.python("probe", "a", "b c"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    arguments, path = json.loads(done.stdout)
    assert arguments[1:] == ["a", "b c"] and str(probe) not in path and "" not in path


def test_minus_m_would_run_it(probe):
    done = subprocess.run([sys.executable, "-m", "probe"], capture_output=True, text=True)
    assert "hostile" in done.stdout
