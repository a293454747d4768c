from __future__ import annotations

import doctest
import importlib

import pytest

import cxrgaze


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


@pytest.mark.parametrize(
    "module", ["cxrgaze", "cxrgaze.metrics", "cxrgaze.benchmarks.timing", "cxrgaze.runtime.reader"]
)
def test_examples_in_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0
