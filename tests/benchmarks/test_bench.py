"""cxrgaze-bench as one runs it: the report, what it renders to, its exit codes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
import types

import cv2
import numpy as np
import pytest

import cxrgaze
from cxrgaze.benchmarks import cli, measure, plain, scenarios
from cxrgaze.benchmarks.record import STAGES, read_report
from cxrgaze.benchmarks.report import pages
from cxrgaze.bundles.bundle import GRAPH
from cxrgaze.errors import ExitCode, IntegrityError, UsageError
from cxrgaze.films.decode import load_film
from cxrgaze.runtime import reader as runtime_reader

SMALL = ["--samples", "24", "--warmup", "1", "--threads", "1", "--after-idle", "1"]
PAGES = {"report.json", "report.md", "report.html", "report.csv", "samples.svg"}


@pytest.fixture(scope="module", autouse=True)
def _in_a_hurry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "IDLE_SECONDS", 0.05)
        patch.setattr(scenarios, "LOADGEN_SECONDS", 0.2)
        yield


@pytest.fixture(scope="module")
def ran(bundles, films, tmp_path_factory):
    output = tmp_path_factory.mktemp("bench")
    arguments = ["run", str(bundles / "demo-fp16.cxrgaze"), "--films", str(films / "*.png")]
    arguments += [*SMALL, "--output", str(output), "--slo", "p95=100s", "--slo", "p99=1s"]
    assert cli.main(arguments) == ExitCode.INCONCLUSIVE  # 24 samples have no p99
    return output


def test_the_report_is_complete(ran, films):
    report = read_report(ran / "report.json")
    on_a_gpu = {"h2d", "compute", "d2h"}
    assert set(report.steady) == set(report.samples) == set(STAGES) - on_a_gpu
    assert {found.count for found in report.steady.values()} == {24}
    assert report.steady["end_to_end"].p99 is None  # 24 samples have no p99
    assert report.cold.count == 3 and 20e6 < report.cold.peak_memory_bytes < 1e9
    assert report.cold.process_ms > report.cold.import_ms + report.cold.load_ms
    assert report.energy.startswith("not measured") or report.energy.joules_per_film > 0
    assert report.memory.plan is None and report.memory.graph > 1e5
    assert set(report.overhead.ours_us) == {"preprocess", "infer", "postprocess", "rest"}
    assert [o.verdict for o in report.objectives] == ["met", "inconclusive"]
    assert report.films == len(report.per_film) == len(list(films.glob("*.png")))


def test_the_script_by_hand_says_what_the_reader_says(bundles, films):
    film = load_film(films / "nih_00001507_002_512.png")
    with cxrgaze.load(bundles / "demo-fp32.cxrgaze", threads=1) as reader:
        reading, decision = reader.read(film), reader.served.decision
        graph = reader.bundle.read(GRAPH)
    said = plain.Plain(graph, (64, 64), decision.temperature, 1)(film.pixels)
    assert list(said) == ["logits", "log_density"]
    assert said["logits"] == pytest.approx(list(reading.probabilities.values()), abs=1e-5)
    assert np.abs(said["log_density"] - reading.log_density).max() < 1e-4
    each = np.array([1.0, 0.5, 2.0])
    findings = plain.Plain(graph, (64, 64), each, 1, exclusive=False)(film.pixels)
    logits = decision.temperature * np.log(said["logits"])  # up to a constant
    steps = np.diff(each * np.log(findings["logits"] / (1 - findings["logits"])))
    assert steps == pytest.approx(np.diff(logits), abs=1e-3)


def test_the_stages_are_inside_the_whole(ran):
    samples = read_report(ran / "report.json").samples
    whole = np.array(samples["end_to_end"])
    parts = sum(np.array(values) for name, values in samples.items() if name != "end_to_end")
    assert (parts <= whole + 1e-3).all() and (parts > 0.8 * whole).all()


def test_the_pages_say_what_they_must(ran):
    assert set(os.listdir(ran)) == PAGES
    text, page = (ran / "report.md").read_text(), (ran / "report.html").read_text()
    for said in ("not a medical device", "drawings", "not measured", "script by hand", "95 %"):
        assert said in text and said in page
    assert "objective p99 <= 1000 ms" in text
    assert not re.search(r'(src|href)="(?!data:)', page)  # needs nothing else
    assert "prefers-color-scheme" in page or "color-scheme: light dark" in page
    assert "@page" in page
    rows = list(csv.DictReader((ran / "report.csv").read_text().splitlines()))
    report = read_report(ran / "report.json")
    (p50,) = (row for row in rows if (row["name"], row["quantity"]) == ("infer", "p50 ms"))
    assert float(p50["value"]) == report.steady["infer"].p50.value and p50["n"] == "24"


@pytest.mark.parametrize(
    "settled,limit,word",
    [
        (True, None, "**✓ Measured.** A film to its reading in "),
        (True, "met", "**✓ Objective met.** "),
        (True, "missed", "**✗ Objective missed.** "),
        (True, "inconclusive", "**? Inconclusive.** "),
        (False, None, "**? Inconclusive.** "),
    ],
)
def test_the_first_sentence_is_the_verdict(ran, settled, limit, word):
    report = read_report(ran / "report.json")
    objective = report.objectives[0].model_copy(update={"verdict": limit})
    report = report.model_copy(
        update={
            "objectives": (objective,) if limit else (),
            "warm_up": report.warm_up.model_copy(update={"settled": settled}),
        }
    )
    lines = pages(report)["report.md"].decode().splitlines()
    assert lines[2].startswith(word)
    assert ("next: an idle machine" in "".join(lines[:12])) != settled


def test_no_name_of_a_film_is_in_the_report(ran, films):
    names = [path.stem for path in films.iterdir() if path.suffix in (".png", ".dcm")]
    for page in PAGES:
        content = (ran / page).read_text()
        assert not [name for name in names if name in content]


def test_a_stored_report_renders_to_the_same_bytes(ran, tmp_path):
    for folder in ("one", "two"):
        out = str(tmp_path / folder)
        assert cli.main(["render", str(ran / "report.json"), "--output", out]) == 0
    for page in PAGES:
        first = (ran / page).read_bytes()
        assert first == (tmp_path / "one" / page).read_bytes(), page
        assert first == (tmp_path / "two" / page).read_bytes(), page


@pytest.mark.parametrize("what", ["truncated", "edited", "spaced", "of another version", "no JSON"])
def test_a_report_that_is_not_as_it_was_measured_is_refused(ran, tmp_path, capsys, what):
    data = (ran / "report.json").read_bytes()
    content = json.loads(data)
    content["cold"]["process_ms"] /= 2
    broken = {
        "truncated": data[: len(data) // 2],
        "edited": (json.dumps(content, indent=2) + "\n").encode(),
        "spaced": data + b"\n",
        "of another version": data.replace(b'"schema_version": 2', b'"schema_version": 3', 1),
        "no JSON": b"\x00\x01",
    }[what]
    (tmp_path / "report.json").write_bytes(broken)
    code = cli.main(["render", str(tmp_path / "report.json"), "--output", str(tmp_path / "out")])
    assert code == ExitCode.INTEGRITY and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    reasons = {"edited": "was altered", "spaced": "was altered", "of another version": "version 3"}
    assert reasons.get(what, "not valid JSON") in message
    with pytest.raises(IntegrityError):
        read_report(tmp_path / "report.json")


SAMPLES = list(np.random.default_rng(0).lognormal(3, 0.1, 400))


@pytest.mark.parametrize(
    ("percentile", "limit", "samples", "verdict"),
    [
        ("p99", 100, SAMPLES, "met"),
        ("p99", 15, SAMPLES, "missed"),
        ("p50", float(np.median(SAMPLES)), SAMPLES, "inconclusive"),
        ("p99", 100, SAMPLES[:99], "inconclusive"),
        ("p50", 1000, SAMPLES[:5], "inconclusive"),
    ],
)
def test_objectives(percentile, limit, samples, verdict):
    found = measure.objective(percentile, limit, samples)
    assert found.verdict == verdict
    assert found.missed_share == np.mean([s > limit for s in samples])


def test_a_missed_objective_is_exit_code_8(bundles, films, tmp_path, capsys):
    films = [str(films / "nih_00001507_002_512.png")]
    arguments = ["run", str(bundles / "demo-fp16.cxrgaze"), "--films", *films, *SMALL]
    arguments += ["--cold-starts", "1", "--slo", "p50=0.001ms", "--output", str(tmp_path)]
    assert cli.main(arguments) == ExitCode.OBJECTIVE_MISSED
    assert "missed" in capsys.readouterr().out and (tmp_path / "report.html").is_file()


def test_a_machine_that_never_settles_is_inconclusive(bundles, films, tmp_path, monkeypatch):
    settled = measure.warm_up

    def never(reading, seconds):
        return settled(reading, seconds).model_copy(update={"settled": False})

    monkeypatch.setattr(measure, "warm_up", never)
    arguments = ["run", str(bundles / "demo-fp16.cxrgaze"), *SMALL, "--seconds", "0.01"]
    arguments += ["--cold-starts", "1", "--output", str(tmp_path), "--films"]
    assert cli.main([*arguments, str(films / "nih_00001507_002_512.png")]) == ExitCode.INCONCLUSIVE
    report = read_report(tmp_path / "report.json")
    assert report.verdict == "inconclusive"
    assert 1 <= report.steady["infer"].count < 24  # time is limited


def test_a_film_that_shows_nothing_is_refused(bundles, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(np.zeros((80, 80), np.uint8)).save(tmp_path / "black.png")
    arguments = ["run", str(bundles / "demo-fp16.cxrgaze"), "--films", str(tmp_path / "black.png")]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert "left out" in told and "no content" in told and "none of 1 films" in told
    assert not (tmp_path / "out").exists()


def test_films_that_cannot_be_read_are_left_out_and_counted(films, tmp_path, capsys):
    good = next(films.glob("*.png"))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:900])
    (tmp_path / "black.png").write_bytes(cv2.imencode(".png", np.zeros((80, 80), np.uint8))[1])
    paths = [tmp_path / "cut.png", good, tmp_path / "black.png"]
    given = measure.usable_films(paths)
    assert [path for path, _ in given.films] == [good]
    assert given.share == "2 of 3 films were left out"
    told = capsys.readouterr().err
    assert "cut.png: damaged" in told and "black.png: not applicable: no content" in told
    with pytest.raises(UsageError, match="none of 2 films"):
        measure.usable_films([paths[0], paths[2]])


REFUSED = {
    "--slo p98=5ms": "expected one of p50, p90",
    "--slo p99=soon": "as p99=50ms",
    "--slo p99=0ms": "as p99=50ms",
    "--seconds 0": "more than 0",
    "--seconds nan": "more than 0",
    "--beside other.cxrgaze": "goes with --peers",
    "--sweep size": "one of batch, threads, canvas, precision",
    "--sweep canvas=100x100": "multiples of 32",
    "--sweep batch=0": "a positive number",
    "--sweep precision=int4": "fp32, fp16, int8",
    "--peers --checkpoint EDGE": "is not the checkpoint of",
    "--peers nosuch": "none is called so",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_run_is_refused(bundles, tmp_path, capsys, arguments):
    from cxrgaze.train.checkpoint import demo_path

    given = arguments.replace("EDGE", str(demo_path().with_name("edge.safetensors"))).split()
    output = ["--output", str(tmp_path / "out")]
    command = ["run", str(bundles / "demo-fp16.cxrgaze"), *given, *output, *SMALL]
    assert cli.main(command) == ExitCode.USAGE
    assert REFUSED[arguments] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_bundle_that_is_none(tmp_path):
    assert cli.main(["run", str(tmp_path)]) == ExitCode.USAGE
    assert cli.main(["compare", str(tmp_path), str(tmp_path)]) == ExitCode.USAGE


class _Slow:
    """A reader that takes its time."""

    spec = types.SimpleNamespace(needs_stored=False)
    bundle = types.SimpleNamespace(manifest=types.SimpleNamespace(spec=spec))
    backend = types.SimpleNamespace(name="stand-in")

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def read(self, film):
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass


@pytest.mark.parametrize(
    ("base", "new", "code", "verdict"),
    [
        (0.001, 0.003, ExitCode.OBJECTIVE_MISSED, "slower"),
        (0.003, 0.001, ExitCode.OK, "faster"),
    ],
)
def test_compare_says_which_is_faster(monkeypatch, films, capsys, base, new, code, verdict):
    seconds = {"BASE": base, "NEW": new}
    monkeypatch.setattr(runtime_reader, "load", lambda path, *a, **k: _Slow(seconds[str(path)]))
    film = ["--films", str(films / "nih_00001507_002_512.png")]
    assert cli.main(["compare", "BASE", "NEW", *film, "--rounds", "12", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == verdict and found["rounds"] == 12
    assert cli.main(["compare", "BASE", "NEW", *film, "--rounds", "3"]) == ExitCode.INCONCLUSIVE
    assert "too few" in capsys.readouterr().out


def test_two_real_bundles_are_compared(bundles, capsys):
    paths = [str(bundles / f"demo-{precision}.cxrgaze") for precision in ("fp32", "fp16")]
    code = cli.main(["compare", *paths, "--rounds", "12", "--threads", "1"])
    said = capsys.readouterr().out
    verdict = re.match(r"verdict  (\w+)", said)[1]
    codes = {"faster": 0, "no": 0, "slower": 8, "inconclusive": 9}
    assert code == codes[verdict] and "60 readings each" in said


def test_reports_of_two_runs_are_not_compared(ran, capsys):
    report = str(ran / "report.json")
    assert cli.main(["compare", report, report]) == ExitCode.USAGE
    assert "two runs are not compared" in capsys.readouterr().err


def test_loadgen_counts_and_times_every_query():
    pytest.importorskip("mlperf_loadgen", reason="LoadGen is not installed here")
    calls = []

    def infer(image):
        calls.append(image.shape)
        time.sleep(0.002)
        return {"logits": np.zeros((1, 3), np.float32), "log_density": image}

    found = scenarios.loadgen(
        types.SimpleNamespace(infer=infer), np.zeros((3, 1, 1, 4, 4), np.float32)
    )
    assert set(calls) == {(1, 1, 4, 4)} and found.queries == len(calls) - 3
    assert 2 <= found.single_stream_p90_ms < 200 and 5 < found.offline_films_per_s <= 500


def test_without_loadgen_the_report_says_so(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    said = scenarios.loadgen(types.SimpleNamespace(), np.zeros((1, 1, 1, 4, 4), np.float32))
    assert "not installed" in said


MOMENTS = (
    "cold starts",
    "warm up",
    "steady state",
    "after idle",
    "one by one",
    "energy",
    "overhead",
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_bench_leaves_nothing(bundles, tmp_path, interrupted, number, moment):
    """Moments by progress, not by the clock."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = ["run", bundles / "demo-fp16.cxrgaze", "--output", tmp_path / "out", "--seconds", "4"]
    code, said = interrupted(
        "cxrgaze.benchmarks.cli", command, moment, number, TMPDIR=str(temporary)
    )
    assert code == ExitCode.INTERRUPTED, said
    assert not (tmp_path / "out").exists() and not os.listdir(tmp_path / "tmp")
