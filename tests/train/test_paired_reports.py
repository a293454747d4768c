"""`cxrgaze-train compare`: the paired difference against a bootstrap written out."""

import csv

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cxrgaze.errors import DataError, ExitCode, UsageError
from cxrgaze.evidence import phantom
from cxrgaze.train import checkpoint, cli
from cxrgaze.train.evaluation import EvaluationOptions, evaluate_model
from cxrgaze.train.evaluation_record import FILE, read_evaluation
from cxrgaze.train.paired_reports import compare_reports, read_films

NAMES = ("normal", "pneumonia")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Some evaluation's record, to stand beside the tables that are written here."""
    folder = tmp_path_factory.mktemp("record")
    made = phantom.write_phantom_set(folder / "set", {"test": 12}, first_seed=770_000)
    model, output = checkpoint.demo_path(), folder / "e"
    evaluate_model(EvaluationOptions(model, made.folder, "test", output, resamples=200, threads=1))
    return read_evaluation(output / FILE)


def _report(folder, record, p, label, patients, cc=None):
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(record.rendered())
    with (folder / "films.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["film", "patient", "label", "predicted", "p_normal", "p_pneumonia", "cc"])
        for i, value in enumerate(p):
            found = "" if cc is None or np.isnan(cc[i]) else cc[i]
            writer.writerow([f"f{i}", patients[i], NAMES[label[i]], "", 1 - value, value, found])
    return folder


@pytest.fixture
def drawn(tmp_path, record):
    """Two seeds of a base and of a new model on 60 films of 40 patients."""
    rng = np.random.default_rng(0)
    patients = [f"p{i * 2 // 3}" for i in range(60)]
    label = rng.integers(0, 2, 60)
    folders = {}
    for name, skill in (("base", 0.5), ("new", 1.2)):
        for seed in range(2):
            z = rng.normal(size=60) + skill * label
            cc = np.where(np.arange(60) % 5, rng.uniform(0, 1, 60) * skill / 2, np.nan)
            p = 1 / (1 + np.exp(-z))
            folders[name, seed] = _report(
                tmp_path / f"{name}{seed}", record, p, label, patients, cc
            )
    return folders, patients, label


def test_the_difference_is_the_mean_over_pairs(drawn):
    folders, patients, label = drawn
    base, new = ([folders[name, seed] for seed in range(2)] for name in ("base", "new"))
    found = compare_reports(base, new, resamples=400, seed=3)
    assert (found.films, found.patients, found.pairs) == (60, len(set(patients)), 2)
    tables = [[read_films(f) for f in side] for side in (base, new)]

    def slow(index):
        each = [
            [roc_auc_score(label[index], t.probabilities[index, 1]) for t in side]
            for side in tables
        ]
        return np.mean(each[1]) - np.mean(each[0])

    assert found.macro_auc.value == pytest.approx(slow(np.arange(60)))
    who, rng, draws = np.array(patients), np.random.default_rng(7), []
    for _ in range(400):
        chosen = rng.choice(sorted(set(patients)), len(set(patients)))
        draws.append(slow(np.concatenate([np.flatnonzero(who == p) for p in chosen])))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.macro_auc.low == pytest.approx(low, abs=0.02)
    assert found.macro_auc.high == pytest.approx(high, abs=0.02)
    mean_cc = [np.mean([np.nanmean(t.cc) for t in side]) for side in tables]
    assert found.cc.value == pytest.approx(mean_cc[1] - mean_cc[0])
    assert compare_reports(base, base, resamples=200).macro_auc.value == 0


def test_the_command_says_it_in_lines(drawn, capsys):
    folders, _, _ = drawn
    arguments = ["--base", str(folders["base", 0]), "--new", str(folders["new", 0])]
    assert cli.main(["compare", *arguments, "--resamples", "200"]) == 0
    out = capsys.readouterr().out
    assert "60 films, 40 patients, pairs: 1" in out and "macro AUC, new minus base: " in out


def test_few_patients_with_gaze_give_no_interval(tmp_path, record):
    patients, label = [f"p{i}" for i in range(60)], np.arange(60) % 2
    cc = np.where(np.arange(60) < 3, 0.5, np.nan)
    one, other = (
        _report(tmp_path / name, record, np.linspace(0, 1, 60), label, patients, cc + more)
        for name, more in (("a", 0), ("b", np.arange(60) / 100))
    )
    found = compare_reports([one], [other], resamples=200)
    assert found.cc.value == pytest.approx(0.01) and found.cc.low is None


def test_maps_of_another_blur_are_refused(tmp_path, record):
    saliency = record.saliency.model_copy(update={"heatmap": "paper"})
    blurred = record.model_copy(update={"saliency": saliency})
    patients, label = [f"p{i}" for i in range(60)], np.arange(60) % 2
    one, other = (
        _report(tmp_path / name, of, np.linspace(0, 1, 60), label, patients)
        for name, of in (("a", record), ("b", blurred))
    )
    with pytest.raises(DataError, match="at the same blur"):
        compare_reports([one], [other])


def test_other_films_or_labels_are_refused(drawn, record, tmp_path, capsys):
    folders, patients, label = drawn
    base = [folders["base", 0]]
    with pytest.raises(UsageError, match="1 of --base and 2 of --new"):
        compare_reports(base, base * 2)
    with pytest.raises(UsageError, match=r"films\.csv and report"):
        compare_reports(base, [tmp_path])
    other = _report(tmp_path / "x", record, np.full(60, 0.5), 1 - label, patients)
    with pytest.raises(DataError, match="other films, labels or classes"):
        compare_reports(base, [other])
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / FILE).write_bytes(record.rendered())
    (tmp_path / "y" / "films.csv").write_text("film,patient,label,p_normal\nf,p,normal,much\n")
    with pytest.raises(DataError, match="is no table of"):
        compare_reports([tmp_path / "y"], base)
    arguments = ["--base", str(base[0]), "--new", str(other)]
    assert cli.main(["compare", *arguments]) == ExitCode.DATA
    assert "other films" in capsys.readouterr().err


def test_a_film_of_a_class_that_is_not_served_has_none_of_the_others(tmp_path, record):
    (tmp_path / FILE).write_bytes(record.rendered())
    rows = "f1,p1,a,0.2,0.8\nf2,p2,,0.4,0.6\nf3,p3,unserved,0.4,0.6\n"
    (tmp_path / "films.csv").write_text(f"film,patient,label,p_a,p_b\n{rows}")
    assert read_films(tmp_path).truth.tolist() == [[1, 0], [-1, -1], [0, 0]]


def test_findings_are_read_with_what_is_unknown(tmp_path, record):
    (tmp_path / FILE).write_bytes(record.rendered())
    tmp_path.joinpath("films.csv").write_text(
        "film,patient,has_a,has_b,p_a,p_b\nf1,p1,1,,0.2,0.3\nf2,p2,0,1,0.4,0.5\n"
    )
    found = read_films(tmp_path)
    assert found.truth.tolist() == [[1, -1], [0, 1]]
    assert found.probabilities.tolist() == [[0.2, 0.3], [0.4, 0.5]] and np.isnan(found.cc).all()
