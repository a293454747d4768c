"""The reports that are committed: unaltered, and their pages are what they render to."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxrgaze.benchmarks.record import read_report
from cxrgaze.benchmarks.report import pages

RESULTS = sorted(Path(__file__).parents[2].joinpath("benchmarks", "results").glob("*/report.json"))


def test_there_are_some():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_a_committed_report_is_unaltered_and_so_are_its_pages(path):
    made = pages(read_report(path))
    for name in ("report.json", "report.md", "report.csv"):
        assert path.with_name(name).read_bytes() == made[name], name
    committed = {file.name for file in path.parent.iterdir()}
    assert committed == set(made) - {"report.html"}  # cxrgaze-bench render makes it
