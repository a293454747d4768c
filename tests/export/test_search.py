"""The search for the least precise form that passes: its order, its looks, and what ships."""

from __future__ import annotations

import types
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cxrgaze.bundles.served import Decision
from cxrgaze.bundles.verdicts import Gate, Limits
from cxrgaze.command import Steps
from cxrgaze.errors import GateError, ParityError
from cxrgaze.evidence import gate, phantom
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.evidence.phantom import write_phantom_set
from cxrgaze.export import judge, pipeline, search
from cxrgaze.export.options import ExportOptions, GateOptions, Int8Options, ValidationOptions
from cxrgaze.export.source import Facts, TorchSource
from cxrgaze.spec import ModelSpec

SPEC = ModelSpec(
    variant="few",
    model_version="1",
    classes=phantom.CLASSES,
    height=32,
    width=32,
    pixel_source="image-8bit",
    domain="phantom",
)
WIDE = Limits(macro_auc=1, cc=2, flips=1, sensitivity=1, specificity=1, brier=2)
"""What no form of these networks is beyond."""


def _form(name, kept=()):
    return types.SimpleNamespace(name=name, kept=tuple(sorted(kept)))


def _judged(form, verdict, parity="pass"):
    gate, agreement = (types.SimpleNamespace(verdict=v, reason="") for v in (verdict, parity))
    return search.JudgedForm(form, b"", agreement, gate, None, Decision(), "")


class _Fake:
    """Forms that are names of kept blocks; the gate passes while all of `needed` are kept."""

    def __init__(self, needed, effect, blocks=("a", "b", "c"), shares=None):
        self.needed, self.effect, self.tried, self.measured = needed, effect, [], []
        self._blocks, self._shares = blocks, shares or dict.fromkeys(blocks, 0.1)

    def blocks(self):
        return self._blocks

    def shares(self):
        return self._shares

    def with_kept(self, kept=()):
        return [_form("form", kept)]

    def distance(self, form):
        self.measured.append(form.kept)
        return sum(effect for block, effect in self.effect.items() if block not in form.kept)

    def __call__(self, form):
        self.tried.append(form.kept)
        return _judged(form, "pass" if set(self.needed) <= set(form.kept) else "fail")


def _search(fake, tmp_path, budget=10):
    log = search.Log(tmp_path / "log.json", "key")
    sequence = search.with_fewer_kept(fake, fake.distance, log, budget)
    return search.in_turn(sequence, fake)


def test_the_search_ranks_blocks_and_keeps_the_fewest_that_pass(tmp_path):
    fake = _Fake({"c"}, {"a": 0.001, "b": 0.01, "c": 0.02})
    made = _search(fake, tmp_path)
    assert fake.measured == [("b", "c"), ("a", "c"), ("a", "b")]  # each alone in low precision
    assert fake.tried == [("b", "c"), ("c",), ()] == [m.form.kept for m in made]
    assert search.best(made) is made[1] and made[1].passes


def test_the_search_stops_at_the_first_form_that_does_not_pass(tmp_path):
    fake = _Fake({"b", "c"}, {"a": 0.001, "b": 0.01, "c": 0.02})
    made = _search(fake, tmp_path)
    assert fake.tried == [("b", "c"), ("c",)] and search.best(made) is made[0]
    needs_all = _Fake({"a", "b", "c"}, fake.effect)
    made = _search(needs_all, tmp_path)
    assert needs_all.tried == [("b", "c")] and search.best(made) is made[0]
    assert not made[0].passes
    nothing_needed = _Fake((), fake.effect)
    made = _search(nothing_needed, tmp_path)
    assert nothing_needed.tried == [("b", "c"), ("c",), ()] and search.best(made) is made[-1]


def test_blocks_without_much_work_leave_together(tmp_path):
    """A look at 1,000 films for a thousandth of the work is none."""
    effect = {"a": 0.001, "b": 0.002, "c": 0.003, "d": 0.01, "e": 0.02}
    shares = {"a": 0.01, "b": 0.02, "c": 0.011, "d": 0.5, "e": 0.01}
    fake = _Fake((), effect, blocks=tuple(effect), shares=shares)
    _search(fake, tmp_path)
    assert fake.tried == [("d", "e"), ("e",), ()]
    light = _Fake((), effect, blocks=tuple(effect), shares=dict.fromkeys(effect, 0.001))
    _search(light, tmp_path)
    assert light.tried == [()]


STOPS = {
    "fail": ("fail", "pass"),
    "inconclusive": ("inconclusive", "pass"),
    "not gated": ("not_gated", "pass"),
    "another graph": ("pass", "fail"),
    "not finite": ("pass", "not_finite"),
}


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("passing", [0, 1, 3])
def test_what_comes_after_a_form_that_does_not_pass_is_never_looked_at(name, passing):
    """Although it would pass: that a bad one ships has the probability of one look."""
    verdicts = [("pass", "pass")] * passing + [STOPS[name]] + [("pass", "pass")] * 2
    looked_at = []

    def look(form):
        looked_at.append(form.name)
        return _judged(form, *verdicts[form.name])

    made = search.in_turn((_form(number) for number in range(len(verdicts))), look)
    assert looked_at == list(range(passing + 1)) == [one.form.name for one in made]
    chosen = search.best(made)
    assert chosen.form.name == max(passing - 1, 0) and chosen.passes == (passing > 0)


def test_no_form_after_it_is_even_made():
    made = []

    def forms():
        for number in range(5):
            made.append(number)
            yield _form(number)

    search.in_turn(forms(), lambda form: _judged(form, "pass" if form.name < 2 else "fail"))
    assert made == [0, 1, 2]


def test_where_none_passed_the_best_verdict_is_the_first_and_broken_graphs_are_last():
    def best(*verdicts):
        judged = [_judged(_form(n), *verdict) for n, verdict in enumerate(verdicts)]
        return search.best(judged).form.name

    assert best(("fail", "pass")) == 0
    assert best(("fail", "pass"), ("inconclusive", "pass"), ("inconclusive", "pass")) == 1
    assert best(("inconclusive", "pass"), ("not_gated", "pass"), ("fail", "pass")) == 1
    assert best(("pass", "fail"), ("fail", "pass")) == 1
    assert best(("pass", "pass"), ("pass", "pass"), ("pass", "fail")) == 1


def test_an_interrupted_search_goes_on_where_it_was(tmp_path):
    fake = _Fake({"b"}, {"b": 0.01})
    _search(fake, tmp_path)
    again = _Fake({"b"}, {"b": 0.01})
    _search(again, tmp_path)
    assert again.tried == fake.tried == [("a", "b"), ("b",), ()]
    assert fake.measured and not again.measured  # the ranking was known
    log = search.Log(tmp_path / "log.json", "another network")
    assert log.distance(["a"], lambda: 0.5) == 0.5
    assert log.distance(["b"], lambda: float("inf")) == 1e9


def test_the_search_keeps_to_its_budget(tmp_path):
    effect = {"a": 0.001, "b": 0.01, "c": 0.02}
    for budget in (1, 2, 3, 10):
        fake = _Fake((), effect)
        made = _search(fake, tmp_path, budget)
        assert fake.tried == [("b", "c"), ("c",), ()][:budget]  # the first of the sequence
        assert search.best(made) is made[-1]
    with pytest.raises(ParityError, match="one look at least"):
        _search(fake, tmp_path, budget=0)


@pytest.mark.parametrize("blocks", [(), ("a",)])
def test_with_one_block_or_none_there_is_one_form(tmp_path, blocks):
    fake = _Fake((), {}, blocks)
    made = _search(fake, tmp_path)
    assert fake.tried == [()] and search.best(made).passes


class Few(nn.Module):
    """Three blocks with a convolution each, a diagnosis and a map."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.map = nn.Conv2d(8, 1, 3, padding=1)
        self.diagnosis = nn.Linear(8, 3)

    def forward(self, image):
        features = self.two(self.one(image))
        saliency = self.map(features)
        log_density = saliency.flatten(1).log_softmax(dim=1).reshape(saliency.shape)
        return self.diagnosis(features.mean(dim=(2, 3))), log_density


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    facts = Facts("few", "a test", "0" * 64, "nothing: random weights", heatmap="phantom")
    return TorchSource(Few(), SPEC, facts)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets to gate on, and one to validate and calibrate on; no film is in two of them."""
    folder = tmp_path_factory.mktemp("sets")
    for seed, name in ((50_000, "gate"), (60_000, "another gate")):
        write_phantom_set(folder / name, {"test": 60}, difficulty=0.4, first_seed=seed)
    write_phantom_set(folder / "own", {"train": 32, "val": 40}, first_seed=70_000)
    return folder


def _part(folder, split):
    return gate.named_set(LabelledSet.open(folder), SPEC, "phantom", split)


def _options(output, sets, name="gate", trials=40, validated=True, precision="int8"):
    return ExportOptions(
        precision,
        "cpu",
        output,
        gate=GateOptions(sets / name, "test", limits=WIDE),
        int8=Int8Options(sets / "own", "train"),
        validation=ValidationOptions(sets / "own" if validated else None, "val"),
        fallback_trials=trials,
    )


def _stub(monkeypatch, passing):
    """A gate that the first so many forms pass; how often it was asked."""
    asked = []

    def stub(films, reference, candidate, limits, level, served, decision=None):
        asked.append(decision)
        verdict = "pass" if len(asked) <= passing else "fail"
        return Gate(verdict=verdict, reason=f"look {len(asked)}")

    monkeypatch.setattr(gate, "judge", stub)
    return asked


def test_an_export_ships_the_last_form_that_passed(source, sets, tmp_path, monkeypatch):
    asked = _stub(monkeypatch, passing=2)
    found = pipeline.export(source, _options(tmp_path, sets), Steps()).manifest
    assert len(asked) == len(found.forms_tried) == 3 and found.form_shipped == 1
    assert [form.gate for form in found.forms_tried] == ["pass", "pass", "fail"]
    assert [len(form.kept) for form in found.forms_tried] == [2, 1, 0]
    assert found.gate.reason == "look 2" == found.forms_tried[1].gate_reason
    assert found.convolution_macs == found.forms_tried[1].macs
    assert found.decision == asked[1]  # it is served with what it was judged with
    assert asked[0] == asked[1] != asked[2]  # each form has its own; "map" alone decides nothing
    assert found.decision_from.startswith("fitted on 40 films of this graph")


def test_an_export_of_which_the_first_form_fails_ships_none(source, sets, tmp_path, monkeypatch):
    asked = _stub(monkeypatch, passing=0)
    with pytest.raises(GateError, match="look 1"):
        pipeline.export(source, _options(tmp_path, sets), Steps())
    assert len(asked) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]  # the ranking, to go on


def test_a_budget_is_the_number_of_looks(source, sets, tmp_path, monkeypatch):
    asked = _stub(monkeypatch, passing=9)
    found = pipeline.export(source, _options(tmp_path, sets, trials=2), Steps()).manifest
    assert len(asked) == 2 and found.form_shipped == 1 == len(found.forms_tried[1].kept)


@pytest.mark.parametrize("validated", [True, False])
def test_the_ranking_never_sees_a_film_of_the_gate(source, sets, tmp_path, monkeypatch, validated):
    """Neither on validation films, nor where there are none on those of the calibration."""
    ranked_on, seen, ranking = [], [], []
    predicted, real = gate.predicted, judge.FormJudge.ranking

    @contextmanager
    def watched():
        ranking.append(True)
        yield
        ranking.pop()

    def recorded(infer, images):
        if ranking:
            seen.extend(image.tobytes() for image in images)
        return predicted(infer, images)

    def watched_ranking(self, films, model):
        ranked_on.append(films)
        with watched():
            distance = real(self, films, model)

        def measured(form):
            with watched():
                return distance(form)

        return measured

    monkeypatch.setattr(gate, "predicted", recorded)
    monkeypatch.setattr(judge.FormJudge, "ranking", watched_ranking)
    options = _options(tmp_path, sets, validated=validated)
    if not validated:  # nor has the calibration's set such a split
        options = replace(options, validation=ValidationOptions(None, "test"))
    found = pipeline.export(source, options, Steps()).manifest
    (films,) = ranked_on
    own = _part(sets / "own", "val" if validated else "train")
    assert films.keys == own.keys and len(films.keys) == (40 if validated else 32)
    gates = _part(sets / "gate", "test")
    assert set(seen) == {image.tobytes() for image in own.arrays.images}
    assert not set(seen) & {image.tobytes() for image in gates.arrays.images}
    assert len(seen) == (3 + 1) * len(films.keys)  # each block alone, and the reference
    assert found.decision_from.startswith("fitted on 40" if validated else "the float32 network's")


@pytest.mark.long
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_order_is_none_of_the_gates(source, sets, tmp_path, precision):
    """Another gate looks at the same forms in the same order."""
    orders = []
    for name in ("gate", "another gate"):
        options = _options(tmp_path / name, sets, name, precision=precision)
        found = pipeline.export(source, options, Steps()).manifest
        assert all(form.gate == "pass" for form in found.forms_tried), found.forms_tried
        assert found.form_shipped == 2
        orders.append([form.kept for form in found.forms_tried])
    assert orders[0] == orders[1] and [len(kept) for kept in orders[0]] == [2, 1, 0]


def test_what_ranks_is_the_head_that_is_furthest_off(source, sets, monkeypatch):
    """The largest of both, whichever it is, on at most `RANKING_FILMS` films."""
    films = _part(sets / "own", "val")
    of = judge.FormJudge(source, _options(sets, sets), None, "", None)
    model = source.graph()
    distances = {"logits": 0.2, "log_density": 0.1}
    counts = []

    def distance(some, reference, found, head, served):
        counts.append(len(some.keys))
        assert {len(p["logits"]) for p in (reference, found)} == {len(some.keys)}
        return distances[head]

    monkeypatch.setattr(gate, "distance", distance)
    monkeypatch.setattr(judge, "RANKING_FILMS", 6)
    measured = of.ranking(films, model)
    form = types.SimpleNamespace(model=model)
    assert measured(form) == 0.2
    distances["log_density"] = 0.3
    assert measured(form) == 0.3 and set(counts) == {6}
    muted = replace(source, facts=replace(source.facts, untrained=("log_density",)))
    assert replace(of, source=muted).ranking(films, model)(form) == 0.2  # not what is not served


def test_the_reference_itself_is_at_no_distance(source, sets):
    films = _part(sets / "own", "val")
    of = judge.FormJudge(source, _options(sets, sets), None, "", None)
    model = source.graph()
    measured = of.ranking(films, model)
    assert np.isclose(measured(types.SimpleNamespace(model=model)), 0, atol=1e-9)
