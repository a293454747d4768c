"""Networks with other heads and classes than the paper's, the whole way: a row of the table each.

All films are drawings; what is shown is that every step asks the spec, not that anything is learnt
(`test_a_findings_network_learns`, for one, shows that).
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import cxrgaze
from cxrgaze.benchmarks import cli as bench_cli
from cxrgaze.benchmarks import measure, scenarios
from cxrgaze.benchmarks.record import read_report
from cxrgaze.bundles.bundle import Bundle
from cxrgaze.errors import ExitCode
from cxrgaze.evidence import phantom
from cxrgaze.evidence.csv_table import write_csv
from cxrgaze.evidence.gaze import GAZE_COLUMNS
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.export import cli as export_cli
from cxrgaze.runtime import cli as predict_cli
from cxrgaze.spec import HEADS, LOG_DENSITY, LOGITS
from cxrgaze.train import checkpoint
from cxrgaze.train import cli as train_cli
from cxrgaze.train.evaluation_record import read_evaluation

SPLITS = {"train": 0.5, "val": 0.75, "test": 1.0}
SMALL = ["--config", "joint", "--set", "variant=tiny", "--set", "heatmap=phantom"]
SMALL += ["--set", "stages.joint.epochs=1"]
FORMS = (("fp32",), ("fp16",), ("int8",), ("int8", "--target", "cpu"))


@dataclass(frozen=True)
class Row:
    """A network of the table."""

    classes: int
    findings: bool = False
    heads: tuple[str, ...] = HEADS

    @property
    def films(self) -> int:
        return max(40, 4 * self.classes)


TABLE = {
    "2 classes": Row(2),
    "5 classes": Row(5),
    "14 classes": Row(14),
    "18 findings": Row(18, findings=True),
    "map alone": Row(0, heads=(LOG_DENSITY,)),
    "diagnosis alone": Row(3, heads=(LOGITS,)),
    "4 findings alone": Row(4, findings=True, heads=(LOGITS,)),
}
MARKS = {"4 findings alone": [], "18 findings": [pytest.mark.long]}


def _write_set(folder: Path, row: Row) -> Path:
    """Drawings with labels and gaze as `prepare` takes them; of findings a fifth is unknown."""
    rng = np.random.default_rng(row.classes)
    films, names = folder / "films", [f"Class {number:02d}" for number in range(row.classes)]
    films.mkdir(parents=True)
    labels, looks = [], []
    for number in range(row.films):
        drawn = phantom.draw(number)
        cv2.imwrite(str(films / f"{number}.png"), drawn.pixels)
        split = next(name for name, to in SPLITS.items() if number < to * row.films)
        label = {"file": f"{number}.png", "patient": f"p{number}", "split": split}
        if row.findings:
            has = (np.arange(row.classes) + number) % 3 == 0
            known = rng.random(row.classes) < 0.8
            label |= {n: int(h) if k else "" for n, h, k in zip(names, has, known, strict=True)}
        elif names:
            label["label"] = names[number % len(names)]
        labels.append(label)
        for (x, y), ms in zip(drawn.gaze.points, drawn.gaze.values[:, 2], strict=True):
            cells = (label["file"], "r", "fixation", x, y, ms)
            looks.append(dict(zip(GAZE_COLUMNS, cells, strict=True)))
    write_csv(folder / "labels.csv", list(labels[0]), labels)
    write_csv(folder / "gaze.csv", GAZE_COLUMNS, looks)
    return folder


def _prepared(folder: Path, *more: str) -> Path:
    arguments = ["prepare", "--films", folder / "films", "--labels", folder / "labels.csv"]
    arguments += ["--gaze", folder / "gaze.csv", "--output", folder / "set", "--synthetic", *more]
    assert train_cli.main([*map(str, arguments)]) == 0
    return folder / "set"


@pytest.fixture
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(measure, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(scenarios, "LOADGEN_SECONDS", 0.1)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=MARKS.get(n, [pytest.mark.slow])) for n in TABLE]
)
def test_the_whole_way(name, tmp_path, in_a_hurry):
    row = TABLE[name]
    names = tuple(f"class_{number:02d}" for number in range(row.classes))
    drawn = _write_set(tmp_path / "drawn", row)
    made = _prepared(drawn, *(["--findings"] if row.findings else []))
    info = LabelledSet.open(made).info
    assert info.class_names == names
    assert info.class_kind == ("findings" if row.findings else "exclusive")

    fit = ["fit", str(made), "--output", str(tmp_path / "run"), *SMALL]
    assert train_cli.main([*fit, "--set", f"heads={','.join(row.heads)}"]) == 0
    weights = tmp_path / "run" / "joint.safetensors"
    _, card = checkpoint.load(weights)
    assert card.spec.heads == row.heads and card.spec.class_names == names
    assert card.served.heads == row.heads and card.served.classes == names
    assert set(card.served.decided) == set(names)

    evaluate = ["evaluate", str(weights), str(made), "--output", str(tmp_path / "evaluation")]
    assert train_cli.main([*evaluate, "--resamples", "200"]) == 0
    _check_evaluation(read_evaluation(tmp_path / "evaluation" / "report.json"), row, names)

    films = [str(drawn / "films" / f"{number}.png") for number in range(2)]
    limits = tmp_path / "limits.toml"  # what int8 does to a network of one epoch is not asked
    most = {"macro_auc": 1, "cc": 2, "flips": 1, "sensitivity": 1, "specificity": 1, "brier": 2}
    tables = (f'[{name}]\nlimit = {limit}\nreason = "not asked"\n' for name, limit in most.items())
    limits.write_text("".join(tables))
    for precision, *more in FORMS:
        bundle = tmp_path / f"{precision}{'-cpu' if more else ''}.cxrgaze"
        export = [str(weights), "--output", str(bundle), "--precision", precision, *more]
        export += ["--gate", str(made), "--limits", str(limits), "--films", *films]
        export += ["--calibration", str(made)] if precision == "int8" else []
        assert export_cli.main([*export, "--no-build"]) in (ExitCode.OK, ExitCode.INCONCLUSIVE)
        manifest = Bundle.open(bundle).manifest
        assert tuple(manifest.parity.outputs) == row.heads
        if manifest.gate.comparison:
            by_class = ["sensitivity", "specificity"]
            asked = {"macro AUC": LOGITS, "CC": LOG_DENSITY, "flips": LOGITS, "Brier": LOGITS}
            found = [q.kind for q in manifest.gate.comparison.quantities if q.kind not in by_class]
            assert found == [q for q, head in asked.items() if head in row.heads]
            each = [q.of for q in manifest.gate.comparison.quantities if q.kind in by_class]
            assert each == [*names, *names]
        if (precision, *more) != ("int8",):  # which a TensorRT alone runs
            readings = tmp_path / bundle.stem
            assert predict_cli.main([str(bundle), *films, "--output", str(readings)]) == 0
            _check_readings(readings, row, names)
    bench = ["run", str(bundle), "--films", films[0], "--samples", "3", "--warmup", "1"]
    bench += ["--threads", "1", "--after-idle", "1", "--cold-starts", "1", "--seconds", "1"]
    assert bench_cli.main([*bench, "--output", str(tmp_path / "bench")]) in (
        ExitCode.OK,
        ExitCode.INCONCLUSIVE,
    )
    report = read_report(tmp_path / "bench" / "report.json")
    assert ("heatmap" in report.steady) == (LOG_DENSITY in row.heads)


def _table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def _check_evaluation(evaluation, row, names):
    assert (evaluation.diagnosis is not None) == (LOGITS in row.heads)
    assert (evaluation.saliency is not None) == (LOG_DENSITY in row.heads)
    if diagnosis := evaluation.diagnosis:
        assert set(diagnosis.auc) == {*names, "macro", "micro"}
        absent = [diagnosis.accuracy, diagnosis.temperature]
        assert [figure is None for figure in absent] == [row.findings] * 2
        assert (diagnosis.known is not None) == row.findings


def _check_readings(folder, row, names):
    """Each film's JSON and overlay, and the table: what is absent is absent."""
    table = _table(folder / "readings.csv")
    for film, line in enumerate(table):
        reading = json.loads((folder / f"{film}.json").read_text())
        assert (folder / f"{film}.overlay.png").stat().st_size > 1000
        assert ("peak_px" in reading) == ("peak_x_px" in line) == (LOG_DENSITY in row.heads)
        assert ("probabilities" in reading) == ("flags" in reading) == (LOGITS in row.heads)
        assert [c[2:] for c in line if c.startswith("p_")] == list(names)
        assert [c[5:] for c in line if c.startswith("flag_")] == list(names)
        if LOGITS not in row.heads:
            assert "label" not in reading and "label" not in line
            continue
        p, points = reading["probabilities"], reading["operating_points"]
        assert list(p) == list(names) and set(points) == set(names)
        for name in names:  # probabilities are rounded to six digits in the file
            raised = reading["flags"][name]
            assert line[f"flag_{name}"] == str(int(raised))
            assert raised == (p[name] >= points[name]) or abs(p[name] - points[name]) < 1e-6
        if row.findings:
            assert reading["label"] is None and "label" not in line
            assert abs(sum(p.values()) - 1) > 1e-3
        else:
            assert reading["label"] == line["label"] == max(p, key=p.get)
            assert sum(p.values()) == pytest.approx(1, abs=1e-5 * len(names))


PLACES = {"upper_left": (20, 20), "upper_right": (20, 44), "lower": (46, 32)}


def _write_spots(folder: Path, films: int) -> dict[str, dict[str, bool]]:
    """Grey noise with a spot for each finding; a third of all labels is unknown, one finding no
    film has. The truth of every film, what is unknown included."""
    rng = np.random.default_rng(5)
    (folder / "films").mkdir(parents=True)
    y, x = np.mgrid[:64, :64]
    rows, truth = [], {}
    for number in range(films):
        name = f"{number}.png"
        truth[name] = {place: bool(rng.random() < 0.4) for place in PLACES}
        picture = rng.normal(90, 12, (64, 64))
        for place, (row, column) in PLACES.items():
            spot = np.exp(-((y - row) ** 2 + (x - column) ** 2) / 40)
            picture += 30 * rng.uniform(0, 1) * spot * truth[name][place]
        cv2.imwrite(str(folder / "films" / name), np.clip(picture, 0, 255).astype(np.uint8))
        split = next(split for split, to in SPLITS.items() if number < to * films)
        row = {"file": name, "patient": name, "split": split, "nobody": 0}
        for place, has in truth[name].items():
            row[place] = rng.choice([int(has), ""], p=[2 / 3, 1 / 3])
        rows.append(row)
    write_csv(folder / "labels.csv", list(rows[0]), rows)
    return truth


@pytest.mark.slow
def test_a_findings_network_learns(tmp_path, capsys):
    """Its AUCs are scikit-learn's over what is known; what is unknown does not count, and a finding
    that nobody has is refused, recorded when asked for, and in no reading."""
    truth = _write_spots(tmp_path, 480)
    prepare = ["prepare", "--films", tmp_path / "films", "--labels", tmp_path / "labels.csv"]
    made = tmp_path / "set"
    assert (
        train_cli.main([*map(str, [*prepare, "--output", made]), "--findings", "--synthetic"]) == 0
    )
    fit = ["fit", str(made), "--output", str(tmp_path / "run"), *SMALL, "--set", "heads=logits"]
    fit += ["--set", "stages.joint.epochs=10", "--set", "stages.joint.learning_rate=3e-3"]
    assert train_cli.main(fit) == ExitCode.DATA
    assert "nothing would teach nobody" in capsys.readouterr().err
    assert train_cli.main([*fit, "--allow-untaught"]) == 0
    assert "nothing taught the class nobody" in capsys.readouterr().err
    weights = tmp_path / "run" / "joint.safetensors"
    _, card = checkpoint.load(weights)
    assert card.untaught == ("nobody",) and card.served.classes == tuple(PLACES)

    evaluate = ["evaluate", str(weights), str(made), "--output", str(tmp_path / "evaluation")]
    assert train_cli.main([*evaluate, "--resamples", "200"]) == 0
    found = read_evaluation(tmp_path / "evaluation" / "report.json").diagnosis
    table = _table(tmp_path / "evaluation" / "films.csv")
    assert set(found.auc) == {*PLACES, "macro", "micro"}
    for place in PLACES:
        known = [line for line in table if line[f"has_{place}"]]
        assert 0.5 * len(table) < len(known) == found.known[place] < 0.8 * len(table)
        has = [line[f"has_{place}"] == "1" for line in known]
        assert has == [truth[Path(line["film"]).name][place] for line in known]
        p = [float(line[f"p_{place}"]) for line in known]
        # films.csv has six digits
        assert found.auc[place].delong.value == pytest.approx(roc_auc_score(has, p), abs=2e-3)
        # It learnt the finding, not what is recorded of it: films that count nowhere are right too.
        others = [line for line in table if not line[f"has_{place}"]]
        hidden = [truth[Path(line["film"]).name][place] for line in others]
        assert roc_auc_score(hidden, [float(line[f"p_{place}"]) for line in others]) > 0.8

    bundle = tmp_path / "spots.cxrgaze"
    export = [
        str(weights),
        "--output",
        str(bundle),
        "--no-build",
        "--precision",
        "fp16",
        "--no-gate",
    ]
    assert export_cli.main(export) == 0
    with cxrgaze.load(bundle) as reader:
        reading = reader.read(tmp_path / "films" / "479.png")
    assert set(reading.probabilities) == set(reading.flags) == set(PLACES)
    assert reading.label is None and reading.log_density is None
    assert any("nothing taught the class nobody" in warning for warning in reading.warnings)
