"""What one can say without looking at the film: a logistic regression on view and age."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from cxrgaze.evidence.labelled_set import FilmRow


def view_and_age(
    training: Sequence[tuple[FilmRow, Mapping[str, bool]]],
    films: Sequence[FilmRow],
    classes: Sequence[str],
) -> NDArray[np.float64] | str:
    """Scores of `films` `(N, C)` for each class from view and age alone, fitted on `training`.

    View is one column a value; age is centred, its absence a column of its own. Exclusive classes
    share one regression, findings have one each. A class that no training film has gets
    probability zero. A text says why there is no baseline.

    Args:
        training: films, and of each whether it has a class, by name, where that is known.
    """
    labelled = [row for row, known in training if known]
    targets = _targets([known for _, known in training if known], classes)
    if not targets:
        return "the training films have fewer than two classes"
    views = sorted({row.view or "" for row in labelled})
    ages = [row.age for row in labelled if row.age is not None]
    if len(views) < 2 and len(set(ages)) < 2:
        return "view and age do not vary or are not there"
    mean, spread = (np.mean(ages), np.std(ages) + 1e-9) if ages else (0.0, 1.0)

    def columns(rows: Sequence[FilmRow]) -> NDArray[np.float64]:
        return np.array(
            [
                [
                    *((row.view or "") == view for view in views),
                    0.0 if row.age is None else (row.age - mean) / spread,
                    row.age is None,
                ]
                for row in rows
            ],
            dtype=np.float64,
        )

    probabilities = np.zeros((len(films), len(classes)))
    for index, answers in targets:
        regression = LogisticRegression(max_iter=1000)
        regression.fit(columns([labelled[i] for i in index]), answers)
        found = regression.predict_proba(columns(films))
        for column, name in enumerate(regression.classes_):
            if name in classes:
                probabilities[:, classes.index(name)] = found[:, column]
    return probabilities


def _targets(
    known: Sequence[Mapping[str, bool]], classes: Sequence[str]
) -> list[tuple[list[int], list[str]]]:
    """Films and their answers of each regression: one of all classes, or one a finding."""
    having = [[name for name, has in one.items() if has] for one in known]
    if all(len(names) == 1 and len(one) > 1 for names, one in zip(having, known, strict=True)):
        regressions = [(list(range(len(known))), [names[0] for names in having])]
    else:
        regressions = []
        for name in classes:
            index = [i for i, one in enumerate(known) if name in one]
            regressions.append((index, [name if known[i][name] else "" for i in index]))
    return [(index, answers) for index, answers in regressions if len(set(answers)) > 1]
