"""No module names a class of the paper's in code: classes are data, like any other's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cxrgaze.evidence.class_presets import PRESETS

ROOT = Path(__file__).parents[1]
MAY = {"class_presets.py", "phantom.py", "egd.py", "reflacx.py"}
"""Presets, the phantom and the converters of data that have these classes."""
NAMES = {one.name for one in PRESETS["paper"].classes}
_WORDS = re.compile(r"\b(heart[ _]failure|chf|pneumonia)\b", re.IGNORECASE)


def _modules():
    folders = ("src/cxrgaze", "train", "export", "engines", "runtime", "benchmarks")
    return sorted({p.resolve() for f in folders for p in (ROOT / f).rglob("*.py")})


def named_in(source: str) -> list[str]:
    """String literals of a module, docstrings apart, that name a class of the paper's."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    # What stands below a field is its documentation.
    docs |= {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    strings = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    )
    return [text for text in strings if text.lower() in NAMES or _WORDS.search(text)]


def test_no_module_names_a_class_of_the_papers():
    assert len(_modules()) > 100
    found = {str(p): named_in(p.read_text()) for p in _modules() if p.name not in MAY}
    assert {path: texts for path, texts in found.items() if texts} == {}


def test_those_that_may_do():
    """The modules that are excused are there, and have a reason to be."""
    excused = [p for p in _modules() if p.name in MAY]
    assert {p.name for p in excused} == MAY
    assert all(named_in(p.read_text()) for p in excused if p.name not in ("reflacx.py",))


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""Of pneumonia."""\nx = 1\n"""A field: normal."""', 0),
        ('x = "smallest normal"', 0),
        ('x = "normal"', 1),
        ('def f():\n    "normal"\n    return f"one of heart_failure, {1}"', 1),
        ('x = {"CHF": 2}', 1),
    ],
)
def test_what_is_found(source, count):
    assert len(named_in(source)) == count
