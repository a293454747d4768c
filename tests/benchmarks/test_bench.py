from __future__ import annotations

import json

import numpy as np
import pytest

from cxrgaze.benchmarks import cli
from cxrgaze.benchmarks.measure import STAGES, Report
from cxrgaze.benchmarks.report import to_markdown
from cxrgaze.benchmarks.timing import latency
from cxrgaze.errors import ExitCode


def test_percentiles_are_latencies_that_occurred():
    samples = np.random.default_rng(0).lognormal(size=1000)
    found = latency(list(samples))
    ordered = np.sort(samples)
    # Nearest rank: the smallest sample that at least the share p does not exceed.
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        slow = next(s for i, s in enumerate(ordered, 1) if i >= share * 1000 - 1e-9)
        assert getattr(found, name) == slow
    assert found.max == ordered[-1] and found.count == 1000


def test_one_slow_reading_is_not_clipped():
    assert latency([1.0] * 99 + [500.0]).max == 500


def test_too_few_samples_have_no_tail():
    assert latency([1.0] * 99).p99 is None and latency([1.0] * 100).p99 == 1
    assert latency([1.0]).p90 is None
    with pytest.raises(ValueError):
        latency([])


@pytest.fixture(scope="module")
def ran(bundles, films, tmp_path_factory):
    output = tmp_path_factory.mktemp("bench")
    arguments = ["run", str(bundles / "demo-fp16.cxrgaze"), "--films", str(films)]
    arguments += ["--output", str(output), "--samples", "24", "--warmup", "8", "--threads", "1"]
    assert cli.main(arguments) == 0
    return output


def test_the_report_is_complete_and_renders_from_its_json(ran):
    report = Report.model_validate(json.loads((ran / "report.json").read_text()))
    assert set(report.steady) == set(report.boundaries) == set(STAGES)
    assert {found.count for found in report.steady.values()} == {24}
    assert report.steady["end_to_end"].p99 is None  # 24 samples have no p99
    assert report.cold.count == 3 and report.cold.peak_memory_bytes > 20e6
    assert report.cold.process_ms > report.cold.import_ms + report.cold.load_ms
    assert "energy" in report.not_measured
    text = (ran / "report.md").read_text()
    assert text == to_markdown(report)
    assert "not a medical device" in text and "drawings" in text and "too few" in text


def test_the_stages_are_inside_the_whole(ran):
    report = Report.model_validate(json.loads((ran / "report.json").read_text()))
    slowest_stage = max(
        found.max for stage, found in report.steady.items() if stage != "end_to_end"
    )
    assert report.steady["end_to_end"].max >= slowest_stage


def test_time_is_limited(bundles, tmp_path):
    arguments = ["run", str(bundles / "demo-fp16.cxrgaze"), "--seconds", "0.01"]
    assert cli.main([*arguments, "--cold-starts", "1", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert 1 <= report["steady"]["infer"]["count"] < 200


def test_a_film_that_shows_nothing_is_refused(bundles, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(np.zeros((80, 80), np.uint8)).save(tmp_path / "black.png")
    arguments = ["run", str(bundles / "demo-fp16.cxrgaze"), "--films", str(tmp_path / "black.png")]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == ExitCode.USAGE
    assert "leave it out" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_numbers_and_bundles(bundles, tmp_path):
    bundle = str(bundles / "demo-fp16.cxrgaze")
    assert cli.main(["run", bundle, "--samples", "0"]) == ExitCode.USAGE
    assert cli.main(["run", str(tmp_path)]) == ExitCode.USAGE
