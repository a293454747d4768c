"""A checkpoint's card: what a run writes by itself, what people state, what evaluations add."""

import json
import shutil

import numpy as np
import pytest

from cxrgaze.bundles.bundle import CARD, PRIOR, Bundle
from cxrgaze.errors import ExitCode, IntegrityError
from cxrgaze.evidence import heatmaps, phantom
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.labelled_set import LabelledSet, write_set
from cxrgaze.files import parse_toml
from cxrgaze.records import parse_record
from cxrgaze.train import card_page, checkpoint, cli
from cxrgaze.train.card import Card, Population, Statements
from cxrgaze.train.evaluation import EvaluationOptions, evaluate_model
from cxrgaze.train.evaluation_record import read_evaluation

SUFFIXES = (".safetensors", ".json", ".seen", ".prior")


@pytest.fixture
def copied(tmp_path):
    """The demo checkpoint under another name, without statements and evaluations."""
    for suffix in SUFFIXES:
        shutil.copy(checkpoint.demo_path().with_suffix(suffix), tmp_path / f"c{suffix}")
    path = tmp_path / "c.safetensors"
    bare = {"statements": Statements(), "evaluations": ()}
    checkpoint.write_card(path, checkpoint.load(path)[1].model_copy(update=bare))
    return path


def _pages(path):
    return [path.with_suffix(f".card.{kind}").read_text() for kind in ("md", "html")]


def test_what_nobody_stated_is_counted_and_shown(copied):
    card = checkpoint.load(copied)[1]
    missing, questions = card_page.not_stated(card)
    assert questions == len(Statements.model_fields) + 6
    assert {"intended use", "contact", "ages", "figures with intervals"} <= set(missing)
    assert "films, patients and classes of training" not in missing
    for page in _pages(copied):
        assert f"{len(missing)} of {questions} questions" in page
        assert page.count("not stated") >= len(Statements.model_fields)
        assert "not a medical device" in page


def test_statements_and_evaluations_go_into_card_and_pages(copied, tmp_path, capsys):
    stated = tmp_path / "card.toml"
    stated.write_text('[statements]\ncontact = "a|b <c@example.org>"\nfunding = "none"\n')
    made = phantom.write_phantom_set(tmp_path / "set", {"test": 30}, first_seed=720_000)
    output = tmp_path / "e"
    evaluate_model(EvaluationOptions(copied, made.folder, "test", output, resamples=200, threads=1))
    evaluation = read_evaluation(output / "report.json")
    before = card_page.not_stated(checkpoint.load(copied)[1])[0]
    arguments = ["card", str(copied), "--card", str(stated), "--evaluation", str(tmp_path / "e")]
    assert cli.main([*arguments, "--evaluation", str(tmp_path / "e" / "report.json")]) == 0
    card = checkpoint.load(copied)[1]
    assert card.statements.contact == "a|b <c@example.org>" and card.evaluations == (evaluation,)
    missing = card_page.not_stated(card)[0]
    assert set(before) - set(missing) == {"contact", "funding", "figures with intervals"}
    assert f"{len(missing)} of" in capsys.readouterr().out
    markdown, page = _pages(copied)
    assert "a\\|b &lt;c@example.org>" in markdown and "a|b &lt;c@example.org&gt;" in page
    macro = str(evaluation.diagnosis.auc["macro"].bootstrap)
    assert macro in markdown and macro in page
    # Without --card what was stated before stays; an evaluation of the same films is replaced.
    assert cli.main(["card", str(copied)]) == 0
    assert checkpoint.load(copied)[1] == card


def test_an_evaluation_of_other_weights_is_refused(copied, bundles, tmp_path, capsys):
    made = phantom.write_phantom_set(tmp_path / "set", {"test": 12}, first_seed=730_000)
    model = bundles / "demo-fp32.cxrgaze"
    evaluate_model(EvaluationOptions(model, made.folder, "test", tmp_path / "e", resamples=200))
    before = copied.with_suffix(".json").read_bytes()
    assert cli.main(["card", str(copied), "--evaluation", str(tmp_path / "e")]) == ExitCode.DATA
    assert "expected one of these weights" in capsys.readouterr().err
    assert copied.with_suffix(".json").read_bytes() == before
    content = json.loads(before)
    content["evaluations"] = [json.loads((tmp_path / "e" / "report.json").read_bytes())]
    with pytest.raises(IntegrityError, match="an evaluation of other weights"):
        parse_record(Card, json.dumps(content).encode(), "card")


def _stored(path):
    return json.loads(path.with_suffix(".json").read_bytes())


def test_an_evaluation_in_a_card_cannot_be_edited_and_one_of_another_version_is_left_out():
    content = _stored(checkpoint.demo_path())
    (evaluation,) = content["evaluations"]
    parse_record(Card, json.dumps(content).encode(), "card")
    evaluation["diagnosis"]["auc"]["macro"]["bootstrap"]["value"] = 1.0
    with pytest.raises(IntegrityError, match="an evaluation that was altered"):
        parse_record(Card, json.dumps(content).encode(), "card")
    content["evaluations"] = [{"schema_version": 3, "what": "nobody knows"}]
    assert parse_record(Card, json.dumps(content).encode(), "card").evaluations == ()


WRONG = {
    "no TOML": ("[statements", "is not valid TOML"),
    "another table": ("[words]\ncontact = 'x'", "expected one table [statements]"),
    "an unknown question": ("[statements]\ncontct = 'x'", "contct"),
    "no text": ("[statements]\ncontact = 3", "contact"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_statements_are_refused_and_the_card_stays(copied, tmp_path, capsys, case):
    text, message = WRONG[case]
    (tmp_path / "card.toml").write_text(text)
    before = copied.with_suffix(".json").read_bytes()
    code = cli.main(["card", str(copied), "--card", str(tmp_path / "card.toml")])
    assert code == ExitCode.USAGE and message in capsys.readouterr().err
    assert copied.with_suffix(".json").read_bytes() == before


def test_the_example_asks_every_question(films):
    example = films.parent / "card.toml"
    stated = parse_toml(example.read_text(), str(example))["statements"]
    assert stated.keys() == Statements.model_fields.keys()


def test_a_population_is_counted_by_hand(tmp_path):
    drawn = phantom.write_phantom_set(tmp_path / "a", {"train": 6}, first_seed=740_000)
    changes = [
        {"age": 30.0, "sex": "F", "view": "AP"},
        {"age": 50.0, "sex": "F", "view": None, "label": None},
        {"age": None, "sex": "M", "patient": drawn.rows[0].patient},
        {"age": 40.0},
        {"age": 90.0},
        {"age": 60.0},
    ]
    rows = [row.model_copy(update=c) for row, c in zip(drawn.rows, changes, strict=True)]
    gaze = {drawn.rows[3].film: drawn.gaze[drawn.rows[3].film]}
    films = [(row.film, drawn.film_bytes(row)) for row in rows]
    made = write_set(tmp_path / "b", drawn.info, rows, gaze, films)
    found = Population.of(LabelledSet.open(made.folder))
    labels = [row.label for row in rows]
    assert (found.films, found.patients, found.unlabelled, found.with_gaze) == (6, 5, 1, 1)
    assert found.classes == {n: labels.count(n) for n in drawn.info.class_names}
    assert (found.known_ages, found.ages) == (5, (30, 40, 50, 60, 90))
    assert found.sexes == {"": 3, "F": 2, "M": 1}
    assert found.views == {"": 1, "AP": 1, "PA": 4}


def test_the_shipped_networks_say_what_they_were_trained_on():
    """And keep what an evaluation elsewhere compares with: made again from the phantoms."""
    for name in ("demo", "edge"):
        path = checkpoint.demo_path().with_name(f"{name}.safetensors")
        card = checkpoint.load(path)[1]
        assert (card.population["train"].films, card.population["val"].films) == (900, 150)
        assert {b.name for b in card.baselines} == {"grey_levels"}
        assert card.evaluations and card.evaluations[0].synthetic
        assert card.evaluations[0].leakage is None
        assert len(checkpoint.seen_by(path, card).films) == 1050
        for page, data in card_page.pages(card, f"{name}.card").items():
            assert path.with_name(page).read_bytes() == data, "write_card"
        prior = checkpoint.prior_of(path, card)
        assert prior.shape == (card.spec.height, card.spec.width)
        assert prior.sum() == pytest.approx(1, abs=1e-4)


def test_a_runs_prior_is_the_mean_of_its_training_maps(tmp_path):
    sizes = {"train": 24, "val": 12}
    labelled = phantom.write_phantom_set(tmp_path / "set", sizes, first_seed=750_000)
    changes = ["stages.contrastive=false", "stages.encoder=false", "stages.saliency.epochs=1"]
    changes += ["stages.fusion.epochs=1"]
    (tmp_path / "card.toml").write_text('[statements]\nfunding = "none"\n')
    arguments = ["fit", str(labelled.folder), "--config", "demo", "--output", str(tmp_path / "run")]
    arguments += ["--threads", "1", "--card", str(tmp_path / "card.toml")]
    assert cli.main([*arguments, *(w for c in changes for w in ("--set", c))]) == 0
    path = tmp_path / "run" / "demo.safetensors"
    card = checkpoint.load(path)[1]
    assert card.statements == Statements(funding="none")
    again = ["fit", str(labelled.folder), "--output", str(tmp_path / "run"), "--resume"]
    assert cli.main([*again, "--threads", "1"]) == 0
    assert checkpoint.load(path)[1].statements == card.statements
    arrays = load_arrays(labelled.split("train"), card.spec, heatmaps.PRESETS["phantom"])
    mean = arrays.densities[:, 0].mean(axis=0)
    np.testing.assert_allclose(checkpoint.prior_of(path, card), mean / mean.sum(), rtol=1e-5)
    path.with_suffix(".prior").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"demo\.prior"):
        checkpoint.prior_of(path, card)


def test_a_bundle_carries_the_card_to_read_and_the_prior(bundles):
    bundle = Bundle.open(bundles / "demo-fp16.cxrgaze")
    card = parse_record(Card, bundle.read(CARD), CARD)
    assert card == checkpoint.load(checkpoint.demo_path())[1]
    for kind in ("md", "html"):
        assert b"Card of demo" in bundle.read(f"report/card.{kind}")
    shape = (card.spec.height, card.spec.width)
    assert checkpoint.read_prior(bundle.read(PRIOR), card.spec, "p").shape == shape


def test_what_a_card_cannot_be_added_to_is_named(tmp_path, capsys):
    assert cli.main(["card", str(tmp_path / "no.safetensors")]) == ExitCode.USAGE
    assert "does not exist" in capsys.readouterr().err
