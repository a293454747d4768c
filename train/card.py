"""The card of a checkpoint: what the weights are, how they were made, what was measured.

What a card should answer is after CLAIM 2024 (Tejani et al., Radiol. Artif. Intell. 6, 2024,
e240300) and TRIPOD+AI (Collins et al., BMJ 385, 2024, e078378). What the training run knows it
writes itself (`Population`, figures, seeds, hashes); what only people know they state in a TOML
file (`Statements`); what nobody stated is counted and shown as not stated.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError, field_validator, model_validator

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.errors import DataError, UsageError
from cxrgaze.evidence.labelled_set import LabelledSet, Split
from cxrgaze.files import read_toml
from cxrgaze.records import Frozen, Record, complaint
from cxrgaze.spec import NOTICE, Head, ModelSpec
from cxrgaze.train.baseline import Baseline
from cxrgaze.train.evaluation_record import Evaluation
from cxrgaze.train.origin import Origin


class Statements(Frozen):
    """What only people know of a network; None where nobody stated it."""

    intended_use: str | None = None
    """What it is for, in whose hands."""
    out_of_scope: str | None = None
    """What it must not be used for."""
    sites_and_dates: str | None = None
    """Where and when the films were taken."""
    how_films_were_chosen: str | None = None
    """What put a film into the set, and what kept it out."""
    labelled_by: str | None = None
    """Who or what gave the labels, from what."""
    gaze_by: str | None = None
    """Whose gaze it is, with which tracker."""
    known_failures: str | None = None
    """Where it is known to be wrong."""
    ethics: str | None = None
    """Approval and consent."""
    licence_of_weights: str | None = None
    licence_of_films: str | None = None
    funding: str | None = None
    contact: str | None = None


_QUARTERS = (0, 0.25, 0.5, 0.75, 1)


class Population(Frozen):
    """The films of one split."""

    films: int
    patients: int
    classes: dict[str, int]
    """Films that have each class."""
    unlabelled: int
    """Films of which no class is known."""
    with_gaze: int
    known_ages: int
    """Films with an age."""
    ages: tuple[float, float, float, float, float] | None
    """In years: least, quartiles, greatest; above 90 as 90, as greater ages point to persons."""
    sexes: dict[str, int]
    """Films by F, M, O; "" is not known, as in `views`."""
    views: dict[str, int]
    """Films by DICOM ViewPosition."""
    pixel_sources: dict[str, int]

    @classmethod
    def of(cls, labelled: LabelledSet) -> Population:
        """The films of a set, or of one split of it."""
        rows, names = labelled.rows, labelled.info.class_names
        known = [labelled.known(row) for row in rows]
        ages = [min(row.age, 90.0) for row in rows if row.age is not None]
        return cls(
            films=len(rows),
            patients=len({row.patient for row in rows}),
            classes={name: sum(one.get(name, False) for one in known) for name in names},
            unlabelled=sum(not one for one in known),
            with_gaze=sum(row.film in labelled.gaze for row in rows),
            known_ages=len(ages),
            ages=tuple(np.quantile(ages, _QUARTERS).tolist()) if ages else None,
            sexes=dict(sorted(Counter(row.sex or "" for row in rows).items())),
            views=dict(sorted(Counter(row.view or "" for row in rows).items())),
            pixel_sources=dict(sorted(Counter(row.pixel_source for row in rows).items())),
        )


class Card(Record):
    """What `NAME.json` beside the weights holds."""

    VERSION = 1
    WHAT = "checkpoint card"
    REMEDY = "train again or use the version that wrote it"

    schema_version: int = VERSION
    notice: str = NOTICE
    name: str
    spec: ModelSpec
    weights_sha256: str
    parameters: int
    trained_on: str
    """Origin of the training films, in a sentence."""
    lineage: tuple[Origin, ...]
    """All sets that these weights descend from: initial weights, teachers, the run's own films."""
    untrained: tuple[Head, ...] = ()
    """Heads that nothing has taught; they are not served."""
    untaught: tuple[str, ...] = ()
    """Classes that nothing has taught; they are not served."""
    centre_prior: bool = False
    """Whether the network has the learnable centre prior."""
    decision: Decision = Decision()
    """Fitted on validation films."""
    seen_sha256: str = ""
    """Of the file `NAME.seen` (`cxrgaze.evidence.seen`); "" where there is none."""
    prior_sha256: str = ""
    """Of the file `NAME.prior`, the training films' centre prior; "" where there is none."""
    baselines: tuple[Baseline, ...] = ()
    """Fitted on the training films."""
    population: dict[Split, Population] = {}
    """Films of training and validation."""
    statements: Statements = Statements()
    command: str
    """The one command that makes this checkpoint again."""
    config: dict[str, Any]
    results: dict[str, Any]
    """Figures on held-out films, each with its centre-prior CC; says synthetic where it is."""
    evaluations: tuple[Evaluation, ...] = ()
    """Evaluations of these weights, figures with intervals and baselines."""
    environment: dict[str, str]

    @field_validator("evaluations", mode="before")
    @classmethod
    def _those_of_this_version(cls, value: Any) -> Any:
        """Evaluations of another version cannot be read; they can be made again."""
        if not isinstance(value, list):
            return value
        return [one for one in value if one.get("schema_version") == Evaluation.VERSION]

    @model_validator(mode="after")
    def _all_of_it_is_of_this_network(self) -> Card:
        _ = self.served
        for evaluation in self.evaluations:
            if evaluation.model.sha256 != self.weights_sha256:
                raise ValueError("an evaluation of other weights")
            if not evaluation.is_intact:
                raise ValueError("an evaluation that was altered")
        return self

    @property
    def served(self) -> Served:
        """What is served of the network."""
        return Served(self.spec, self.decision, self.untrained, self.untaught)

    @property
    def descent(self) -> tuple[Origin, ...]:
        """The lineage as one that goes on from these weights has to record it."""
        return tuple(
            o.model_copy(update={"weights_sha256": o.weights_sha256 or self.weights_sha256})
            for o in self.lineage
        )


def with_evaluation(card: Card, evaluation: Evaluation, where: str) -> Card:
    """The card with one more evaluation, in place of one on the same films.

    Raises:
        DataError: it is of other weights, or of a bundle.
    """
    if evaluation.model.sha256 != card.weights_sha256:
        raise DataError(
            f"{where}: an evaluation of {evaluation.model.name} "
            f"({evaluation.model.sha256[:12]}), expected one of these weights "
            f"({card.weights_sha256[:12]})"
        )

    def films(one: Evaluation) -> tuple[str, str]:
        return one.set.split_sha256, one.set.split

    kept = [one for one in card.evaluations if films(one) != films(evaluation)]
    return card.model_copy(update={"evaluations": (*kept, evaluation)})


def read_statements(path: Path | None) -> Statements:
    """Statements from the table `[statements]` of a TOML file; none without one.

    Raises:
        UsageError: no such file, no TOML, or a key that is none.
    """
    if path is None:
        return Statements()
    content = read_toml(path)
    known = ", ".join(Statements.model_fields)
    if set(content) != {"statements"} or not isinstance(content["statements"], dict):
        raise UsageError(f"{path}: expected one table [statements] with some of {known}")
    try:
        return Statements.model_validate(content["statements"])
    except ValidationError as error:
        raise UsageError(f"{path}: {complaint(error)}; there are {known}") from error
