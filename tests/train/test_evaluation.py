"""`cxrgaze-train evaluate`: its figures, what it leaves out, what it refuses, what it logs."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from cxrgaze.bundles.served import Decision
from cxrgaze.errors import ExitCode, IntegrityError
from cxrgaze.evidence import heatmaps, metrics, phantom
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.gaze import Gaze
from cxrgaze.evidence.intervals import PatientBootstrap
from cxrgaze.evidence.labelled_set import LOOKS, LabelledSet, Look, SetInfo, write_set
from cxrgaze.evidence.truth import one_of
from cxrgaze.files import render_json
from cxrgaze.train import baseline, checkpoint, cli, diagnosis_figures, evaluation
from cxrgaze.train.diagnosis_figures import exact_share
from cxrgaze.train.evaluated_films import Scored
from cxrgaze.train.evaluated_model import open_model
from cxrgaze.train.evaluation import EvaluationOptions, evaluate_model
from cxrgaze.train.evaluation_record import Evaluation, SaliencyMeans, read_evaluation
from cxrgaze.train.film_saliency import saliency_by_film
from cxrgaze.train.origin import Origin


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "set"
    sizes = {"train": 40, "val": 10, "test": 60}
    return phantom.write_phantom_set(folder, sizes, difficulty=0.6, first_seed=700_000)


def _evaluate(folder, output, *more, model=None):
    model = model or checkpoint.demo_path()
    arguments = ["evaluate", str(model), str(folder), "--output", str(output)]
    return cli.main([*arguments, "--resamples", "200", "--threads", "1", *more])


@pytest.fixture(scope="module")
def evaluated(labelled, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation") / "out"
    assert _evaluate(labelled.folder, output) == 0
    return output, json.loads((output / "report.json").read_text())


def test_the_files_are_there_and_labelled_synthetic(evaluated):
    output, report = evaluated
    assert {p.name for p in output.iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "films.csv",
        "differences.svg",
        "roc.svg",
        "reliability.svg",
        "maps.png",
    }
    for name in ("report.md", "report.html"):
        text = (output / name).read_text()
        assert "Synthetic" in text and "not a medical device" in text
    assert report["synthetic"] is True
    assert 'src="http' not in (output / "report.html").read_text()


def test_the_figures_are_those_of_the_film_table(evaluated):
    output, report = evaluated
    with (output / "films.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    names = ("normal", "heart_failure", "pneumonia")
    truth = np.array([names.index(row["label"]) for row in rows])
    p = np.array([[float(row[f"p_{name}"]) for name in names] for row in rows])
    auc = report["diagnosis"]["auc"]
    for c, name in enumerate(names):
        slow = roc_auc_score(truth == c, p[:, c])
        for way in ("delong", "bootstrap"):
            assert auc[name][way]["value"] == pytest.approx(slow, abs=1e-4)
            assert auc[name][way]["low"] < slow < auc[name][way]["high"]
    assert auc["macro"]["bootstrap"]["value"] == pytest.approx(
        roc_auc_score(truth, p, multi_class="ovr"), abs=1e-4
    )
    assert auc["micro"]["delong"]["value"] == pytest.approx(
        roc_auc_score(np.eye(3)[truth].ravel(), p.ravel()), abs=1e-4
    )
    for key in ("cc", "nss", "auc_judd"):
        mean = np.mean([float(row[key]) for row in rows])
        assert report["saliency"]["prediction"][key]["value"] == pytest.approx(mean, abs=1e-5)
    assert report["saliency"]["centre_prior"]["cc"]["value"] == pytest.approx(
        np.mean([float(row["cc_centre_prior"]) for row in rows]), abs=1e-5
    )
    assert report["saliency"]["between_readers"]["cc"]["value"] > 0.5
    for name, point in report["diagnosis"]["operating_points"].items():
        flag = p[:, names.index(name)] >= point["threshold"]
        positive = truth == names.index(name)
        assert point["sensitivity"]["value"] == pytest.approx(flag[positive].mean())
        assert point["specificity"]["value"] == pytest.approx((~flag)[~positive].mean())


def test_a_bundle_and_its_checkpoint_agree(labelled, evaluated, bundles, tmp_path):
    assert _evaluate(labelled.folder, tmp_path / "o", model=bundles / "demo-fp32.cxrgaze") == 0
    found = json.loads((tmp_path / "o" / "report.json").read_text())
    for key in ("auc", "calibration"):
        text = json.dumps(found["diagnosis"][key]), json.dumps(evaluated[1]["diagnosis"][key])
        numbers = [np.array(_numbers(json.loads(t))) for t in text]
        np.testing.assert_allclose(*numbers, atol=2e-3)
    assert found["model"]["kind"] == "bundle"
    assert found["diagnosis"]["temperature"] == evaluated[1]["diagnosis"]["temperature"]


def _numbers(value):
    if isinstance(value, dict):
        return [n for v in value.values() for n in _numbers(v)]
    return [value]


@pytest.mark.long
def test_nothing_is_changed_but_the_log_of_looks(labelled, tmp_path):
    folder = shutil.copytree(labelled.folder, tmp_path / "set")
    (folder / LOOKS).unlink(missing_ok=True)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    weights = checkpoint.demo_path().read_bytes()
    for split in ("test", "val", "test"):
        assert _evaluate(folder, tmp_path / "out", "--split", split) == 0
    assert {p: p.read_bytes() for p in before} == before
    assert checkpoint.demo_path().read_bytes() == weights
    looks = [json.loads(line) for line in (folder / LOOKS).read_text().splitlines()]
    assert len(looks) == 2 and {look["model"] for look in looks} == {"demo"}
    assert {look["what"] for look in looks} == {"evaluation"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["look"] == {"number": 2, "logged": True}
    assert "look number 2" in (tmp_path / "out" / "report.md").read_text()


def _changed(labelled, folder, change, gaze=None):
    rows = [change(row) for row in labelled.rows]
    films = [(row.film, labelled.film_bytes(row)) for row in labelled.rows]
    return write_set(folder, labelled.info, rows, labelled.gaze if gaze is None else gaze, films)


def _with_view_and_age(row):
    number = int(row.sha256[:4], 16)
    return row.model_copy(update={"view": "PA" if number % 4 else "AP", "age": 30.0 + number % 50})


def _unlabelled(row):
    return row.model_copy(update={"label": None})


def _two_classes(row):
    label = "pneumonia" if row.label == "heart_failure" else row.label
    return row.model_copy(update={"label": label})


def test_a_look_that_cannot_be_logged_is_said_to_be_none(labelled, tmp_path, capsys):
    folder = shutil.copytree(labelled.folder, tmp_path / "set")
    (folder / LOOKS).unlink(missing_ok=True)
    (folder / LOOKS).mkdir()
    assert _evaluate(folder, tmp_path / "out") == 0
    assert "is not logged" in capsys.readouterr().err
    stored = read_evaluation(tmp_path / "out" / "report.json")
    assert stored.look == Look(number=None, logged=False)
    assert "a look that was not logged" in (tmp_path / "out" / "report.md").read_text()


def test_without_gaze_the_diagnosis_alone_is_reported_and_it_says_so(labelled, tmp_path):
    made = _changed(labelled, tmp_path / "set", lambda row: row, gaze={})
    assert _evaluate(made.folder, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["saliency"] is None and report["diagnosis"]["auc"]
    assert "60 of 60 films have no gaze" in report["left_out"]
    assert not (tmp_path / "out" / "maps.png").exists()


def test_without_labels_the_saliency_alone_is_reported(labelled, tmp_path):
    made = _changed(labelled, tmp_path / "set", _unlabelled)
    assert _evaluate(made.folder, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["diagnosis"] is None and report["saliency"]["films"] == 60
    assert "60 of 60 films have no label" in report["left_out"]


def test_without_either_it_is_an_error(labelled, tmp_path, capsys):
    made = _changed(labelled, tmp_path / "set", _unlabelled, gaze={})
    assert _evaluate(made.folder, tmp_path / "out") == ExitCode.DATA
    assert "has a label or gaze" in capsys.readouterr().err


def test_a_missing_class_is_left_out_and_named(labelled, tmp_path):
    made = _changed(labelled, tmp_path / "set", _two_classes, gaze={})
    assert _evaluate(made.folder, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["diagnosis"]["auc"]) == {"normal", "pneumonia", "macro", "micro"}
    assert "AUC of heart_failure: 0 of 60 films have it" in report["left_out"]
    assert report["diagnosis"]["operating_points"]["heart_failure"]["sensitivity"] is None


def _model(path, **update):
    """The demo network under another card."""
    shutil.copy(checkpoint.demo_path(), path)
    _, card = checkpoint.load(checkpoint.demo_path())
    spec = card.spec.model_copy(update=update.pop("spec", {}))
    bare = {"seen_sha256": "", "prior_sha256": "", "baselines": (), "evaluations": ()}
    checkpoint.write_card(path, card.model_copy(update={**bare, "spec": spec, **update}))
    return path


def test_what_nothing_taught_is_left_out_and_named(labelled, tmp_path):
    points = {"normal": 0.5, "pneumonia": 0.5}
    model = _model(
        tmp_path / "m.safetensors",
        untrained=("log_density",),
        untaught=("heart_failure",),
        decision=Decision(temperature=1.5, operating_points=points),
    )
    assert _evaluate(labelled.folder, tmp_path / "out", model=model) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["saliency"] is None
    assert "a meaning of log_density: nothing taught this output" in report["left_out"]
    assert "the class heart_failure: nothing taught it" in report["left_out"]
    diagnosis = report["diagnosis"]
    assert set(diagnosis["auc"]) == {"normal", "pneumonia", "macro", "micro"}
    assert set(diagnosis["operating_points"]) == set(points)
    with (tmp_path / "out" / "films.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and "p_heart_failure" not in rows[0] and "cc" not in rows[0]
    shares = np.array([[float(row[f"p_{name}"]) for name in points] for row in rows])
    assert shares.sum(axis=1) == pytest.approx(1, abs=1e-5)
    right = np.mean([row["predicted"] == row["label"] for row in rows])  # its films are wrong
    assert diagnosis["accuracy"]["value"] == pytest.approx(right)
    other = _model(tmp_path / "n.safetensors", untrained=("logits",), decision=Decision())
    assert _evaluate(labelled.folder, tmp_path / "o", model=other) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["diagnosis"] is None and report["saliency"]["films"] == 60
    with (tmp_path / "o" / "films.csv").open() as file:
        assert not any(name.startswith(("p_", "label")) for name in next(csv.reader(file)))


def test_each_finding_is_judged_by_the_films_of_which_it_is_known(labelled, tmp_path):
    names = labelled.info.class_names
    temperatures = {"normal": 2.0, "pneumonia": 0.5}
    points = {"normal": 0.4, "heart_failure": 0.5}
    model = _model(
        tmp_path / "m.safetensors",
        spec={"class_kind": "findings"},
        decision=Decision(temperatures=temperatures, operating_points=points),
    )
    rows = []
    for number, row in enumerate(labelled.rows):
        known = labelled.known(row).items() if number % 6 else ()  # of some films nothing is known
        found = {n: has for n, has in known if n != "pneumonia" or number % 4}
        rows.append(row.model_copy(update={"label": None, "findings": found}))
    info = SetInfo.model_validate({**labelled.info.model_dump(), "class_kind": "findings"})
    films = [(row.film, labelled.film_bytes(row)) for row in rows]
    write_set(tmp_path / "set", info, rows, labelled.gaze, films)
    assert _evaluate(tmp_path / "set", tmp_path / "out", model=model) == 0
    stored = read_evaluation(tmp_path / "out" / "report.json")
    found = stored.diagnosis
    assert (found.accuracy, found.temperature) == (None, None)
    assert found.temperatures == temperatures
    with (tmp_path / "out" / "films.csv").open() as file:
        table = list(csv.DictReader(file))
    flat_truth, flat_p = [], []
    for name in names:
        said = [(row[f"has_{name}"], float(row[f"p_{name}"])) for row in table]
        truth = np.array([cell == "1" for cell, _ in said if cell])
        p = np.array([value for cell, value in said if cell])
        assert found.known[name] == len(truth) < 60 and found.films[name] == truth.sum()
        slow = roc_auc_score(truth, p)
        for interval in (found.auc[name].delong, found.auc[name].bootstrap):
            assert interval.value == pytest.approx(slow, abs=1e-4)
            assert interval.low < slow < interval.high
        brier = found.calibration_by_class[name].brier
        assert brier.value == pytest.approx(brier_score_loss(truth, p), abs=1e-5)
        assert brier.low < brier.value < brier.high
        if name in points:
            flag = p >= points[name]
            point = found.operating_points[name]
            assert point.sensitivity.value == pytest.approx(flag[truth].mean())
            assert point.specificity.value == pytest.approx((~flag)[~truth].mean())
        flat_truth, flat_p = [*flat_truth, *truth], [*flat_p, *p]
    bins, errors = np.ceil(15 * np.array(flat_p)), np.array(flat_truth) - flat_p
    by_hand = sum(abs(errors[bins == b].sum()) for b in set(bins)) / len(flat_p)
    assert found.calibration.ece == pytest.approx(by_hand, abs=2e-3)
    slow = roc_auc_score(flat_truth, flat_p)
    assert found.auc["micro"].bootstrap.value == pytest.approx(slow, abs=1e-4)
    assert set(found.operating_points) == set(points)
    assert "operating point of pneumonia: the model has none" in stored.left_out
    assert f"{sum(not row['has_normal'] for row in table)} of 60 films have no label" in (
        stored.left_out
    )


def test_the_view_and_age_baseline_finds_what_the_view_gives_away(labelled, tmp_path):
    def with_view(row):
        view = "AP" if row.label == "pneumonia" else "PA"
        return row.model_copy(update={"view": view, "age": 50.0})

    made = _changed(labelled, tmp_path / "set", with_view, gaze={})
    assert _evaluate(made.folder, tmp_path / "out") == 0
    found = read_evaluation(tmp_path / "out" / "report.json").diagnosis
    beside = found.baselines["view_and_age"]
    assert beside.auc["pneumonia"].bootstrap.value == 1.0
    difference = found.auc["macro"].bootstrap.value - beside.auc["macro"].bootstrap.value
    assert beside.added.value == pytest.approx(difference)
    # All AP films are pneumonia: no AUC there. All films are of one age.
    assert found.subgroups.keys() == {"view PA", "age 40 to 64"}


def _fitted(name, rows, known, names, grey=None):
    return baseline.fitted(name, baseline.Described(rows, grey), known, names)


def test_a_baseline_is_blind_where_what_it_knows_says_nothing(labelled):
    rows = [
        row.model_copy(
            update={
                "view": ("PA", "AP")[i % 2],
                "age": float(30 + i % 7),
                "patient": str(i * 37 % 101),
            }
        )
        for i, row in enumerate(labelled.rows)
    ]
    names = labelled.info.class_names
    known = [labelled.known(row) for row in rows]
    truth = one_of([names.index(row.label) for row in rows[50:]], 3)
    asked = baseline.Described(rows[50:], None)
    for name in ("view_and_age", "patient_number"):
        found = _fitted(name, rows[:40], known[:40], names)
        p = found.scores(asked, names)
        assert p.sum(axis=1) == pytest.approx(1)
        assert 0.3 < metrics.macro_auc(p, truth) < 0.7
        again = baseline.Baseline.model_validate_json(found.model_dump_json())
        np.testing.assert_array_equal(again.scores(asked, names), p)
    same = [row.model_copy(update={"view": "PA", "age": None}) for row in rows]
    assert "are the same" in _fitted("view_and_age", same[:40], known[:40], names)
    assert "no numbers" in _fitted("patient_number", labelled.rows, known, names)
    assert "no film was looked at" in _fitted("grey_levels", rows, known, names)
    assert "fewer than two classes" in _fitted("view_and_age", rows, [{}] * len(rows), names)


def test_patient_numbers_of_a_collection_give_its_classes_away(labelled):
    """Normals from one range within those of the others, as in a part of NIH ChestX-ray14."""
    rng = np.random.default_rng(1)

    def numbered(row):
        low, high = (1280, 3970) if row.label == "normal" else (1, 30_000)
        return row.model_copy(update={"patient": str(rng.integers(low, high))})

    rows, names = [numbered(row) for row in labelled.rows], labelled.info.class_names
    known = [labelled.known(row) for row in rows]
    found = _fitted("patient_number", rows[:50], known[:50], names)
    p = found.scores(baseline.Described(rows[50:], None), names)
    assert metrics.auc(p[:, 0], np.array([row.label == "normal" for row in rows[50:]])) > 0.8


@pytest.mark.parametrize("findings", [False, True])
def test_a_baseline_scores_as_scikit_learns_regression(labelled, findings):
    rng = np.random.default_rng(0)
    rows, names = labelled.rows[:60], labelled.info.class_names
    grey = rng.normal(size=(60, 23)) * np.arange(1, 24)
    if findings:
        known = [{n: bool(rng.random() < 0.4) for n in names if rng.random() < 0.8} for _ in rows]
    else:
        known = [labelled.known(row) for row in rows]
    found = _fitted("grey_levels", rows, known, names, grey).scores(
        baseline.Described(rows, grey), names
    )
    for column, name in enumerate(names):
        index = [i for i, one in enumerate(known) if name in one] if findings else range(60)
        scale = StandardScaler().fit(grey[[i for i, one in enumerate(known) if one]])
        oracle = LogisticRegression(max_iter=1000)
        if findings:
            oracle.fit(scale.transform(grey[index]), [known[i][name] for i in index])
            expected = oracle.predict_proba(scale.transform(grey))[:, 1]
        else:
            oracle.fit(scale.transform(grey), [row.label for row in rows])
            expected = oracle.predict_proba(scale.transform(grey))[:, oracle.classes_ == name][:, 0]
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-6)


def test_grey_statistics_are_of_the_film_without_its_pad(labelled):
    arrays = load_arrays(
        labelled.split("val"),
        open_model(checkpoint.demo_path(), 1).spec,
        heatmaps.PRESETS["phantom"],
    )
    found = baseline.grey_statistics(arrays)
    assert found.shape == (10, 23)
    for row, image, geometry in zip(found, arrays.images[:, 0], arrays.geometries, strict=True):
        values = geometry.crop(image).ravel().astype(float)
        expected = [values.mean(), values.std(), stats.skew(values), stats.kurtosis(values) + 3]
        np.testing.assert_allclose(row[:4], expected, rtol=1e-5)
        np.testing.assert_allclose(row[4:], np.quantile(values, np.arange(5, 100, 5) / 100))


def test_a_difference_without_a_width_has_no_interval():
    """S9: a network that is always right against a baseline that never is, on twenty patients."""
    index = np.arange(20) % 2
    right = np.eye(2)[index]
    bootstrap = PatientBootstrap([str(i) for i in range(20)], 200, 0)
    truth = diagnosis_figures._Truth(one_of(index, 2), ("a", "b"), bootstrap)
    wrong = Scored(1 - right, "nothing", frozenset({0, 1}))
    added = truth.beside(right, truth.drawn(right, [0, 1]), wrong, [0, 1]).added
    assert (added.value, added.low, added.high) == (1, None, None)


def test_a_command_in_a_card_holds_no_path_of_this_machine():
    arguments = argparse.Namespace(
        config="/home/x/mine.toml",
        overrides=["seed=1"],
        init="/data/x/first.safetensors",
        init_origin="scans of x/y",
        teacher=Path("runs/teacher.safetensors"),
        allow_leakage=True,
    )
    said = cli._command_of(arguments, "fit", cli._portable("/data/hospital/SET"))
    assert said == (
        "cxrgaze-train fit SET --config mine.toml --set seed=1 --init first.safetensors "
        "--init-origin 'scans of x/y' --teacher runs/teacher.safetensors --allow-leakage"
    )


WRONG = {
    "no model": (["nowhere.safetensors"], ExitCode.USAGE, "does not exist"),
    "no such kind": (["README.md"], ExitCode.USAGE, "neither a checkpoint"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_is_refused(labelled, tmp_path, capsys, name):
    (model,), code, message = WRONG[name]
    assert _evaluate(labelled.folder, tmp_path / "out", model=model) == code
    assert message in capsys.readouterr().err


def test_no_films_in_the_split_is_an_error(labelled, tmp_path, capsys):
    made = _changed(labelled, tmp_path / "set", lambda r: r.model_copy(update={"split": "train"}))
    assert _evaluate(made.folder, tmp_path / "out") == ExitCode.DATA
    assert "no films in split test" in capsys.readouterr().err


def test_an_unknown_heatmap_is_refused(labelled, tmp_path, capsys):
    code = _evaluate(labelled.folder, tmp_path / "out", "--heatmap", "rainbow")
    assert code == ExitCode.USAGE and "egd-authors" in capsys.readouterr().err


def test_a_model_that_does_not_say_its_heatmap_must_be_told(
    labelled, tmp_path, monkeypatch, capsys
):
    """As a bundle of clinical films does not."""
    model = replace(open_model(checkpoint.demo_path(), 1), heatmap=None)
    monkeypatch.setattr(evaluation, "open_model", lambda path, threads: model)
    assert _evaluate(labelled.folder, tmp_path / "out") == ExitCode.USAGE
    assert "give --heatmap" in capsys.readouterr().err
    assert _evaluate(labelled.folder, tmp_path / "out", "--heatmap", "phantom") == 0


def test_a_gaze_set_without_training_films_says_that_the_prior_is_missing(labelled, tmp_path):
    kept = {row.film: labelled.gaze[row.film] for row in labelled.rows if row.split == "test"}
    made = _changed(labelled, tmp_path / "set", lambda row: row, gaze=kept)
    model = _model(tmp_path / "m.safetensors")
    assert _evaluate(made.folder, tmp_path / "out", model=model) == 0
    stored = read_evaluation(tmp_path / "out" / "report.json")
    assert stored.saliency.centre_prior == SaliencyMeans() and stored.saliency.added_cc is None
    assert any("neither network nor set has one" in text for text in stored.left_out)
    assert "not measured" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.long
def test_a_set_without_training_films_takes_the_networks_own_baselines(labelled, tmp_path, bundles):
    """As an external set does, of a checkpoint and of its bundle."""
    kept = {row.film: labelled.gaze[row.film] for row in labelled.rows if row.split == "test"}
    rows = [row for row in labelled.rows if row.split == "test"]
    films = [(row.film, labelled.film_bytes(row)) for row in rows]
    made = write_set(tmp_path / "set", labelled.info, rows, kept, films)
    for name, model in (("a", None), ("b", bundles / "demo-fp32.cxrgaze")):
        assert _evaluate(made.folder, tmp_path / name, model=model) == 0
        stored = read_evaluation(tmp_path / name / "report.json")
        grey = stored.diagnosis.baselines["grey_levels"]
        assert grey.fitted_on == "the network's training films"
        assert (
            0.6 < grey.auc["macro"].bootstrap.value < stored.diagnosis.auc["macro"].bootstrap.value
        )
        assert 0.5 < stored.saliency.centre_prior.cc.value < stored.saliency.prediction.cc.value
        assert any("patient number: neither the network nor" in text for text in stored.left_out)


def test_the_phantom_command_draws_the_same_set_twice(tmp_path):
    for name in ("a", "b"):
        arguments = ["phantom", "--output", str(tmp_path / name), "--train", "3", "--val", "2"]
        assert cli.main([*arguments, "--test", "0", "--first-seed", "9"]) == 0
    one, two = (LabelledSet.open(tmp_path / name) for name in ("a", "b"))
    assert one.rows == two.rows and len(one.rows) == 5
    assert cli.main(["phantom", "--output", str(tmp_path / "c"), "--difficulty", "2"]) == 2


def test_films_that_the_model_may_have_been_trained_on_are_pointed_out(tmp_path, capsys):
    """Phantoms from number 0 are the demo's own training films."""
    own = phantom.write_phantom_set(tmp_path / "set", {"train": 5, "val": 2, "test": 12})
    assert _evaluate(own.folder, tmp_path / "out") == 0
    said = "Its training had 12 films of split test (12 films), by the hashes that the model keeps"
    assert f"Not to be trusted: {said}" in capsys.readouterr().out
    first = (tmp_path / "out" / "report.md").read_text().splitlines()[2]
    assert first.startswith(f"**✗ Not to be trusted.** {said}")
    stored = read_evaluation(tmp_path / "out" / "report.json")
    assert stored.leakage.startswith(said)


def test_films_of_the_same_split_are_not(labelled, tmp_path, monkeypatch):
    origin = Origin(trained_on=labelled.info.origin, split_sha256=labelled.info.split_sha256)
    model = replace(open_model(checkpoint.demo_path(), 1), origins=(origin,))
    monkeypatch.setattr(evaluation, "open_model", lambda path, threads: model)
    assert _evaluate(labelled.folder, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["leakage"] is None


def test_nan_weights_are_a_parity_error_in_one_line(labelled, tmp_path, monkeypatch, capsys):
    model = open_model(checkpoint.demo_path(), 1)

    def broken(images):
        outputs = model.predict(images)
        outputs["logits"][0, 0] = np.nan
        return outputs

    damaged = replace(model, predict=broken)
    monkeypatch.setattr(evaluation, "open_model", lambda path, threads: damaged)
    assert _evaluate(labelled.folder, tmp_path / "out") == ExitCode.PARITY
    assert "NaN or infinity" in capsys.readouterr().err


def test_samples_beside_fixations_do_not_change_nss(labelled):
    model = open_model(checkpoint.demo_path(), 1)
    preset = heatmaps.PRESETS["phantom"]
    arrays = load_arrays(labelled.split("val"), model.spec, preset)
    log_density = model.predict(arrays.images)["log_density"]

    def with_samples(gaze):
        corner = np.full((500, 9), np.nan)
        corner[:, :3] = (1.0, 1.0, 16.0)
        return Gaze(
            (*gaze.readers, *["reader-1"] * 500),
            (*gaze.kinds, *["sample"] * 500),
            np.concatenate([gaze.values, corner]),
        )

    mixed = replace(arrays, gaze=tuple(with_samples(g) for g in arrays.gaze))
    plain, other = (saliency_by_film(a, log_density[:, 0], None, preset) for a in (arrays, mixed))
    assert all(plain[i]["nss"] == other[i]["nss"] for i in plain)


@pytest.mark.parametrize("patients", [1, 7, 300])
def test_a_share_of_one_has_its_exact_interval(patients):
    from scipy.stats import beta

    found = exact_share(1, patients)
    assert found.low == pytest.approx(beta.ppf(0.025, patients, 1)) and found.high == 1
    none = exact_share(0, patients)
    assert none.high == pytest.approx(beta.ppf(0.975, 1, patients)) and none.low == 0


def test_a_set_made_again_keeps_its_log_of_looks(tmp_path):
    sizes = {"train": 3, "val": 2, "test": 12}
    made = phantom.write_phantom_set(tmp_path / "set", sizes, first_seed=800_000)
    assert _evaluate(made.folder, tmp_path / "out") == 0
    phantom.write_phantom_set(tmp_path / "set", sizes, first_seed=800_000)
    assert len((made.folder / LOOKS).read_text().splitlines()) == 1


OF_FINDINGS = {"diagnosis.known", "diagnosis.temperatures"}
RECORDED = {
    "all": ("test", _with_view_and_age, True, {"leakage", *OF_FINDINGS}),
    "no gaze": ("test", _with_view_and_age, False, {"leakage", "saliency", *OF_FINDINGS}),
    "no labels": ("test", _unlabelled, True, {"leakage", "diagnosis"}),
    "two classes, one view": (
        "test",
        _two_classes,
        False,
        {
            "leakage",
            "saliency",
            *OF_FINDINGS,
            "diagnosis.operating_points.heart_failure.sensitivity",
            "diagnosis.subgroups.view PA.view_and_age",
        },
    ),
    "training films": ("train", _unlabelled, True, {"leakage", "diagnosis", "look"}),
}
"""Split, change to the set, whether it keeps its gaze, and the fields that hold nothing."""


def _nulls(content, path=()):
    if isinstance(content, dict):
        return {name for key, value in content.items() for name in _nulls(value, (*path, key))}
    return {".".join(path)} if content is None else set()


@pytest.mark.parametrize("name", RECORDED)
def test_every_field_of_the_record_comes_back(labelled, tmp_path, name):
    split, change, has_gaze, nulls = RECORDED[name]
    made = _changed(labelled, tmp_path / "set", change, gaze=None if has_gaze else {})
    evaluation = evaluate_model(
        EvaluationOptions(
            checkpoint.demo_path(), made.folder, split, tmp_path / "out", resamples=200, threads=1
        )
    )
    path = tmp_path / "out" / "report.json"
    stored = read_evaluation(path)
    assert stored.rendered() == path.read_bytes()
    assert stored.digest and stored.schema_version == 4
    for field in Evaluation.model_fields.keys() - {"digest"}:
        assert getattr(stored, field) == getattr(evaluation, field), field
    content = json.loads(path.read_bytes())
    assert content == stored.model_dump(mode="json")
    assert list(content) == list(Evaluation.model_fields)
    assert _nulls(content) == nulls


def _edited(content):
    content["diagnosis"]["accuracy"]["value"] += 1e-6
    return content


def _without(content, *path):
    *parents, last = path
    part = content
    for key in parents:
        part = part[key]
    del part[last]
    return content


ALTERED = {
    "an edited number": (_edited, "was altered: it does not match its own digest; evaluate again"),
    "another digest": (lambda c: {**c, "digest": "0" * 64}, "was altered"),
    "no digest": (lambda c: _without(c, "digest"), "was altered"),
    "version 1": (
        lambda c: {**c, "schema_version": 1},
        "evaluation schema version 1, this cxrgaze reads 4; evaluate again",
    ),
    "a later version": (lambda c: {**c, "schema_version": 5}, "evaluation schema version 5"),
    "an unknown key": (lambda c: {**c, "more": 1}, "more: Extra inputs are not permitted"),
    "a missing key": (lambda c: _without(c, "set", "films"), "set.films: Field required"),
    "foreign": (lambda c: {"films": 3}, "evaluation schema version None"),
    "foreign, of the same version": (lambda c: {"schema_version": 4}, "synthetic: Field required"),
    "a list": (lambda c: [c], "holds a JSON list, expected an object"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_record_that_was_not_written_so_is_refused(evaluated, tmp_path, name):
    change, message = ALTERED[name]
    content = change(json.loads((evaluated[0] / "report.json").read_bytes()))
    _is_refused(tmp_path / "report.json", render_json(content), message)


def test_a_truncated_record_is_refused(evaluated, tmp_path):
    data = (evaluated[0] / "report.json").read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 3):
        _is_refused(tmp_path / "report.json", data[:length], "is not valid JSON")
    _is_refused(tmp_path / "report.json", data[:-1], "was altered")  # the final newline
    _is_refused(tmp_path / "report.json", b"\x89PNG\r\n", "is not valid JSON")


def _is_refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as refusal:
        read_evaluation(path)
    assert message in str(refusal.value) and str(path) in str(refusal.value)
    assert refusal.value.exit_code == ExitCode.INTEGRITY == 7
