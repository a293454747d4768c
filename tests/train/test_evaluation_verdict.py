"""The first screen of an evaluation: which sentence comes from which intervals."""

import pytest

from cxrgaze.evidence import phantom
from cxrgaze.evidence.intervals import Interval
from cxrgaze.report import Verdict
from cxrgaze.train import checkpoint
from cxrgaze.train.evaluation import EvaluationOptions, evaluate_model
from cxrgaze.train.evaluation_verdict import differences, first_screen, verdict


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdict")
    sizes = {"train": 30, "test": 40}
    made = phantom.write_phantom_set(folder / "set", sizes, first_seed=710_000)
    model = checkpoint.demo_path()
    options = EvaluationOptions(model, made.folder, "test", folder / "o", resamples=200, threads=1)
    return evaluate_model(options)


def _with(evaluation, added, cc=(0.2, 0.1, 0.3), leakage=None):
    """The evaluation with these differences to its baselines."""
    baselines = {
        name: figures.model_copy(update={"added": _interval(*added)})
        for name, figures in evaluation.diagnosis.baselines.items()
    }
    parts = {
        "diagnosis": evaluation.diagnosis.model_copy(update={"baselines": baselines}),
        "saliency": evaluation.saliency.model_copy(update={"added_cc": _interval(*cc)}),
    }
    return evaluation.model_copy(update={**parts, "leakage": leakage})


def _interval(value, low=None, high=None):
    return Interval(value=value, low=low, high=high)


CASES = {
    "better": ((0.3, 0.2, 0.4), (0.2, 0.1, 0.3), "good", "Better than its baselines"),
    "worse": ((-0.1, -0.2, -0.05), (0.2, 0.1, 0.3), "bad", "Worse than grey levels alone"),
    "a worse map": (
        (0.3, 0.2, 0.4),
        (-0.2, -0.3, -0.1),
        "bad",
        "Worse than the centre prior alone",
    ),
    "open": ((0.1, -0.1, 0.3), (0.2, 0.1, 0.3), "open", "Not shown to be better than grey levels"),
    "none found": ((-0.1, -0.2, 0.1), (0.2, 0.1, 0.3), "open", "Not shown to be better than grey"),
    "no interval": ((0.3,), (0.2, 0.1, 0.3), "open", "Not shown to be better than grey levels"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_worst_difference_decides(evaluated, case):
    added, cc, tone, word = CASES[case]
    found = verdict(_with(evaluated, added, cc))
    assert found.tone == tone and found.word.startswith(word)
    assert "on 40 films of 40 patients (synthetic: drawings)" in found.text
    assert differences(_with(evaluated, added, cc))[0].tone == tone


def test_leakage_comes_before_any_figure(evaluated):
    found = verdict(_with(evaluated, (0.3, 0.2, 0.4), leakage="Seen before."))
    assert found == Verdict(
        "Not to be trusted",
        "Seen before. On 40 films of 40 patients (synthetic: drawings).",
        "bad",
    )


def test_without_any_baseline_nothing_is_called_better(evaluated):
    bare = evaluated.model_copy(
        update={
            "diagnosis": evaluated.diagnosis.model_copy(update={"baselines": {}}),
            "saliency": evaluated.saliency.model_copy(update={"added_cc": None}),
        }
    )
    assert verdict(bare).tone == "open" and "Nothing to compare with" in verdict(bare).word


@pytest.mark.parametrize("missing,word", [("diagnosis", "Map better"), ("map", "Diagnosis better")])
def test_what_has_no_baseline_is_not_called_better(evaluated, missing, word):
    found = _with(evaluated, (0.3, 0.2, 0.4))
    if missing == "diagnosis":
        bare = {"diagnosis": found.diagnosis.model_copy(update={"baselines": {}})}
    else:
        bare = {"saliency": found.saliency.model_copy(update={"added_cc": None})}
    said = verdict(found.model_copy(update=bare))
    assert said.tone == "open" and said.word.startswith(word)
    assert said.text.endswith(f"Its {missing} has none.")


def test_what_to_do_next_follows_from_the_interval(evaluated):
    def lines(*added):
        return first_screen(_with(evaluated, added))[1].lines

    # Half as wide takes four times the patients (0.1 to either side of 0.05), for power of 0.8
    # another 2.04 times: 40 * 4 * 2.04.
    assert any("some 330 patients show it" in line for line in lines(0.05, -0.05, 0.15))
    assert any("more patients will not make one" in line for line in lines(-0.05, -0.15, 0.05))
    assert any("these give no interval" in line for line in lines(0.3))
    assert not any(line.startswith("next:") for line in lines(0.3, 0.2, 0.4))
    assert any("macro AUC" in line and "grey levels" in line for line in lines(0.3, 0.2, 0.4))
    assert any("centre prior" in line for line in lines(0.3, 0.2, 0.4))
