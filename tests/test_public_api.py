"""The public names, and the examples of every docstring."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import shutil
import types
from pathlib import Path

import cv2
import pytest

import cxrgaze
from cxrgaze.evidence import phantom

MODULES = ["cxrgaze", *(m.name for m in pkgutil.walk_packages(cxrgaze.__path__, "cxrgaze."))]


def test_the_public_names_are_these():
    assert sorted(cxrgaze.__all__) == [
        "CxrgazeError",
        "Film",
        "Reader",
        "Reading",
        "__version__",
        "load",
    ]
    for name in cxrgaze.__all__:
        assert getattr(cxrgaze, name)
    with pytest.raises(AttributeError):
        cxrgaze.nothing  # noqa: B018 the attribute access is the test


def _imported(name):
    """The module, or a skip that says which package is not installed here."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "cxrgaze").split(".")[0] == "cxrgaze":
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")


def _run_examples(module):
    """Run them; each docstring that shows some must run one. Says how many docstrings did."""
    shown = doctest.DocTestFinder().find(module)
    shown = [test for test in shown if test.examples]
    for test in shown:
        assert not all(example.options.get(doctest.SKIP) for example in test.examples), test.name
        assert doctest.DocTestRunner().run(test).failed == 0, test.name
    return len(shown)


@pytest.fixture(scope="session")
def folder_of_the_examples(bundles, tmp_path_factory):
    """What the docstrings read: `demo-fp16.cxrgaze`, and a phantom of pneumonia as `film.png`."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(bundles / "demo-fp16.cxrgaze", folder / "demo-fp16.cxrgaze")
    drawn = phantom.draw(6, shape=(1024, 1024))
    assert drawn.label == "pneumonia" and cv2.imwrite(str(folder / "film.png"), drawn.pixels)
    return folder


def test_all_modules_are_found():
    found = {"cxrgaze.files", "cxrgaze.evidence.metrics", "cxrgaze.runtime.reader"}
    assert found < set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, request, monkeypatch):
    module = _imported(name)
    if ">>>" in Path(module.__file__).read_text(encoding="utf-8"):
        monkeypatch.chdir(request.getfixturevalue("folder_of_the_examples"))
        assert _run_examples(module) > 0


@pytest.mark.parametrize(
    "text", [">>> 1 + 1  # doctest: +SKIP\n2", ">>> 1 + 1\n3"], ids=["skipped", "wrong"]
)
def test_examples_that_are_skipped_or_wrong_are_caught(text):
    right = types.ModuleType("right", ">>> 1 + 1\n2")
    assert _run_examples(right) == 1
    with pytest.raises(AssertionError):
        _run_examples(types.ModuleType("module", text))
