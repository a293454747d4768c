"""What can be said of a film without the network: from view and age, grey levels, patient number.

A network is worth what it adds to these. Each is a logistic regression on a few columns, fitted on
training films; the first two are kept with the checkpoint, so that a set without training films
of its own has them. A patient's number means something within its own set alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from cxrgaze.evidence.arrays import Arrays
from cxrgaze.evidence.labelled_set import FilmRow
from cxrgaze.records import Frozen

Array = NDArray[np.float64]
Name = Literal["view_and_age", "grey_levels", "patient_number"]
SHOWN: Final[dict[Name, str]] = {
    "view_and_age": "view and age",
    "grey_levels": "grey levels",
    "patient_number": "patient number",
}
KEPT: Final[tuple[Name, ...]] = ("view_and_age", "grey_levels")
"""Those that are kept with a checkpoint."""
_QUANTILES = np.arange(1, 20) / 20


@dataclass(frozen=True)
class Described:
    """What the baselines know of some films."""

    rows: Sequence[FilmRow]
    grey: Array | None
    """`(n, 23)` (`grey_statistics`); None where it was not looked at."""


class Regression(Frozen):
    """A logistic regression: of two outcomes, or softmax over several."""

    outcomes: tuple[str, ...]
    """Names of classes; "" is none of them."""
    coefficients: tuple[tuple[float, ...], ...]
    """`(k, d)`; k is 1 for two outcomes, of which it is for the second."""
    intercepts: tuple[float, ...]

    def probabilities(self, columns: Array) -> Array:
        """Of standardised columns `(n, d)`, `(n, outcomes)`."""
        linear = columns @ np.array(self.coefficients).T + np.array(self.intercepts)
        if len(self.outcomes) == 2:
            linear = np.column_stack([np.zeros(len(linear)), linear])
        odds = np.exp(linear - linear.max(axis=1, keepdims=True))
        return np.asarray(odds / odds.sum(axis=1, keepdims=True))


class Recipe(Frozen):
    """How the columns of a baseline are made of films."""

    name: Name
    views: tuple[str, ...] = ()
    """That a column each stands for."""
    edges: tuple[float, ...] = ()
    """Numbers that a column each lies between."""
    typical_age: float = 0.0
    """Of the films that it was fitted on; taken where an age is not known."""

    def columns(self, films: Described) -> Array | str:
        """The raw columns `(n, d)`, or why there are none."""
        rows = films.rows
        if self.name == "grey_levels":
            return "no film was looked at" if films.grey is None else films.grey
        if self.name == "patient_number":
            numbers = _numbers(films)
            if isinstance(numbers, str):
                return numbers
            bins = np.searchsorted(np.asarray(self.edges), numbers, side="right")
            return np.eye(len(self.edges) + 1)[bins]
        return np.array(
            [
                [
                    *((row.view or "") == view for view in self.views),
                    self.typical_age if row.age is None else row.age,
                    row.age is None,
                ]
                for row in rows
            ],
            dtype=np.float64,
        )


class Baseline(Recipe):
    """A fitted baseline: how its columns are made, and what it makes of them."""

    centre: tuple[float, ...]
    spread: tuple[float, ...]
    """Of the columns, on the films that it was fitted on."""
    regressions: tuple[Regression, ...]
    """One of all exclusive classes, or one a finding."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Baseline:
        width = len(self.centre)
        if len(self.spread) != width or min(self.spread, default=1.0) <= 0:
            raise ValueError("centre and spread of a baseline do not fit each other")
        for one in self.regressions:
            rows = 1 if len(one.outcomes) == 2 else len(one.outcomes)
            if len(one.coefficients) != rows or len(one.intercepts) != rows:
                raise ValueError("coefficients of a baseline do not fit its outcomes")
            if any(len(row) != width for row in one.coefficients):
                raise ValueError("coefficients of a baseline do not fit its columns")
        return self

    @property
    def classes(self) -> frozenset[str]:
        """Names of the classes that it was fitted on."""
        return frozenset(name for one in self.regressions for name in one.outcomes if name)

    def scores(self, films: Described, classes: Sequence[str]) -> Array | str:
        """A score of each film for each class, `(n, C)`; a text says why there is none.

        A class that no film had which it was fitted on gets probability zero.
        """
        raw = self.columns(films)
        if isinstance(raw, str):
            return raw
        if raw.shape[1] != len(self.centre):
            return "it was fitted on other columns"
        if len(raw) > 1 and not np.ptp(raw, axis=0).any():
            return f"{SHOWN[self.name]} are the same in all films here or not known"
        columns = (raw - np.array(self.centre)) / np.array(self.spread)
        scores: Array = np.zeros((len(films.rows), len(classes)))
        for regression in self.regressions:
            found = regression.probabilities(columns)
            for column, name in enumerate(regression.outcomes):
                if name in classes:
                    scores[:, classes.index(name)] = found[:, column]
        return scores


def fitted(
    name: Name,
    films: Described,
    known: Sequence[Mapping[str, bool]],
    classes: Sequence[str],
) -> Baseline | str:
    """The baseline of that name, fitted on films; a text says why there is none.

    Args:
        known: of each film whether it has a class, by name, where that is known.
    """
    from sklearn.linear_model import LogisticRegression

    targets = _targets(known, classes)
    if not targets:
        return "the training films have fewer than two classes"
    recipe = _recipe(name, films)
    raw = recipe.columns(films)
    if isinstance(raw, str):
        return raw
    used = np.array(sorted({i for index, _ in targets for i in index}))
    varies = np.ptp(raw[used], axis=0) > 0
    if not varies.any():
        return f"{SHOWN[name]} are the same in all training films or not there"
    centre, spread = raw[used].mean(axis=0), np.where(varies, raw[used].std(axis=0), 1.0)
    columns = (raw - centre) / spread
    regressions = []
    for index, answers in targets:
        regression = LogisticRegression(max_iter=1000).fit(columns[index], answers)
        regressions.append(
            Regression(
                outcomes=tuple(map(str, regression.classes_)),
                coefficients=tuple(map(tuple, regression.coef_.tolist())),
                intercepts=tuple(regression.intercept_.tolist()),
            )
        )
    return Baseline(
        **recipe.model_dump(),
        centre=tuple(centre.tolist()),
        spread=tuple(spread.tolist()),
        regressions=tuple(regressions),
    )


def grey_statistics(arrays: Arrays) -> Array:
    """Of each film over its own area: mean, standard deviation, skewness, kurtosis, 19 quantiles.

    Returns:
        `(n, 23)`.
    """
    found = []
    for image, geometry in zip(arrays.images[:, 0], arrays.geometries, strict=True):
        values = geometry.crop(image).astype(np.float64).ravel()
        mean, deviation = values.mean(), values.std() + 1e-9
        standard = (values - mean) / deviation
        moments = [mean, deviation, (standard**3).mean(), (standard**4).mean()]
        found.append([*moments, *np.quantile(values, _QUANTILES)])
    return np.array(found)


def _recipe(name: Name, films: Described) -> Recipe:
    """That of the films that a baseline is fitted on."""
    if name == "view_and_age":
        ages = [row.age for row in films.rows if row.age is not None]
        return Recipe(
            name=name,
            views=tuple(sorted({row.view or "" for row in films.rows})),
            typical_age=float(np.mean(ages)) if ages else 0.0,
        )
    if name == "patient_number" and not isinstance(numbers := _numbers(films), str):
        return Recipe(name=name, edges=tuple(np.quantile(numbers, _QUANTILES).tolist()))
    return Recipe(name=name)


def _numbers(films: Described) -> Array | str:
    """The patients' numbers `(n,)`."""
    if not all(row.patient.isascii() and row.patient.isdigit() for row in films.rows):
        return "the patients have no numbers"
    return np.array([float(row.patient) for row in films.rows])


def _targets(
    known: Sequence[Mapping[str, bool]], classes: Sequence[str]
) -> list[tuple[list[int], list[str]]]:
    """Films and their answers of each regression: one of all classes, or one a finding."""
    having = [[name for name, has in one.items() if has] for one in known]
    labelled = [i for i, one in enumerate(known) if one]
    if labelled and all(len(having[i]) == 1 and len(known[i]) > 1 for i in labelled):
        regressions = [(labelled, [having[i][0] for i in labelled])]
    else:
        regressions = []
        for name in classes:
            index = [i for i, one in enumerate(known) if name in one]
            regressions.append((index, [name if known[i][name] else "" for i in index]))
    return [(index, answers) for index, answers in regressions if len(set(answers)) > 1]
