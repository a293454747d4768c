"""What an evaluation comes to: is the network better than what is said without it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cxrgaze.evidence.intervals import Interval
from cxrgaze.evidence.power import rounded_up
from cxrgaze.report import Block, Bullets, Tone, Verdict
from cxrgaze.train.baseline import SHOWN
from cxrgaze.train.evaluation_record import Evaluation

_POWER = (1.96 + 0.84) / 1.96


@dataclass(frozen=True)
class Difference:
    """What the network adds to one baseline."""

    quantity: str
    over: str
    """The baseline's name."""
    network: Interval
    baseline: Interval
    added: Interval
    """Paired, over patients."""
    patients: int
    """Who have what it is measured on."""

    @property
    def name(self) -> str:
        """What is added to what."""
        return f"{self.quantity} over {self.over}"

    @property
    def tone(self) -> Tone:
        """Whether it is shown to be better, shown to be worse, or neither."""
        low, high = self.added.low, self.added.high
        if low is not None and low > 0:
            return "good"
        return "bad" if high is not None and high < 0 else "open"


def differences(evaluation: Evaluation) -> list[Difference]:
    """What the network adds to each baseline, the worst first."""
    found = []
    diagnosis, saliency = evaluation.diagnosis, evaluation.saliency
    if diagnosis and diagnosis.auc:
        for name, baseline in diagnosis.baselines.items():
            alone, own = baseline.auc["macro"].bootstrap, diagnosis.auc["macro"].bootstrap
            who, added = diagnosis.patients, baseline.added
            found.append(Difference("macro AUC", SHOWN[name], own, alone, added, who))
    if saliency and saliency.added_cc and saliency.prediction.cc and saliency.centre_prior.cc:
        own, alone = saliency.prediction.cc, saliency.centre_prior.cc
        who, added = saliency.patients, saliency.added_cc
        found.append(Difference("CC", "the centre prior", own, alone, added, who))
    order = ("bad", "open", "good")
    return sorted(found, key=lambda d: (order.index(d.tone), d.added.value))


def verdict(evaluation: Evaluation) -> Verdict:
    """In a word and a sentence; the worst of all differences decides."""
    where = evaluation.set
    kind = " (synthetic: drawings)" if evaluation.synthetic else ""
    on = f"on {where.films} films of {where.patients} patients{kind}"
    if evaluation.leakage:
        return Verdict("Not to be trusted", f"{evaluation.leakage} {on.capitalize()}.", "bad")
    found = differences(evaluation)
    if not found:
        return Verdict("Nothing to compare with", f"No baseline could be made {on}.", "open")
    worst = found[0]
    baseline = worst.over
    figures = f"{worst.quantity} {worst.network} against {worst.baseline}"
    said = f"{figures}, difference {worst.added}, {on}."
    if worst.tone == "bad":
        return Verdict(f"Worse than {baseline} alone", said, "bad")
    if worst.tone == "open":
        return Verdict(f"Not shown to be better than {baseline} alone", said, "open")
    missing = _not_compared(evaluation, found)
    if missing:
        word = f"{'Map' if missing == 'diagnosis' else 'Diagnosis'} better than its baselines"
        return Verdict(word, f"The nearest is {baseline}: {said} Its {missing} has none.", "open")
    return Verdict("Better than its baselines", f"The nearest is {baseline}: {said}", "good")


def _not_compared(evaluation: Evaluation, found: Sequence[Difference]) -> str:
    """What was evaluated and has no baseline, "" where all has one."""
    quantities = {one.quantity for one in found}
    if evaluation.diagnosis and "macro AUC" not in quantities:
        return "diagnosis"
    return "map" if evaluation.saliency and "CC" not in quantities else ""


def first_screen(evaluation: Evaluation) -> list[Block]:
    """The verdict, what it rests on, what was not shown, and what to do next."""
    diagnosis, saliency = evaluation.diagnosis, evaluation.saliency
    lines = []
    if diagnosis and diagnosis.auc:
        beside = [
            f"{SHOWN[name]} {b.auc['macro'].bootstrap.value:.3f}"
            for name, b in diagnosis.baselines.items()
        ]
        alone = f" (alone: {', '.join(beside)})" if beside else ""
        lines.append(f"macro AUC {diagnosis.auc['macro'].bootstrap}{alone}")
        calibration = diagnosis.calibration
        lines.append(f"Brier score {calibration.brier}")
        if calibration.ece > calibration.ece_null_high:
            lines.append(
                f"its probabilities are not what they say here: ECE {calibration.ece:.3f}, where "
                f"right ones stay below {calibration.ece_null_high:.3f}"
            )
    if saliency and saliency.prediction.cc:
        prior = saliency.centre_prior.cc
        beside_cc = f"centre prior {prior}" if prior else "no centre prior"
        lines.append(f"CC {saliency.prediction.cc} ({beside_cc})")
    if evaluation.left_out:
        lines.append(f"not shown: {len(evaluation.left_out)} figures, listed at the end")
    lines += _next(evaluation)
    return [verdict(evaluation), Bullets(lines)]


def _next(evaluation: Evaluation) -> list[str]:
    """What to do where a difference is not shown."""
    if evaluation.leakage:
        return ["next: films that the network was not trained on"]
    return [step for one in differences(evaluation) if (step := next_step(one))]


def next_step(one: Difference) -> str:
    """What to do where a difference is not shown, "" where it is."""
    low, high, value = one.added.low, one.added.high, one.added.value
    if one.tone != "open":
        return ""
    if low is None or high is None:
        return f"next: {one.name}: more patients, these give no interval"
    if value <= 0:
        return f"next: {one.name}: none was found; more patients will not make one"
    # An interval narrows as the root of the patients; 0.84 more for 8 of 10.
    many = one.patients * (_POWER * (value - low) / value) ** 2
    return (
        f"next: {one.name}: if the difference is as found, some {rounded_up(many)} "
        "patients show it in 8 of 10 cases"
    )
