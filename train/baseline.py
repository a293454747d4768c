"""What one can say without looking at the film: a logistic regression on view and age."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from cxrgaze.evidence.labelled_set import FilmRow


def view_and_age(
    training: Sequence[FilmRow], films: Sequence[FilmRow], classes: Sequence[str]
) -> NDArray[np.float64] | str:
    """Class probabilities of `films` `(N, C)` from view and age alone, fitted on `training`.

    View is one column a value; age is centred, its absence a column of its own. A class that no
    training film has gets probability zero. A text says why there is no baseline.
    """
    labelled = [row for row in training if row.label]
    if len({row.label for row in labelled}) < 2:
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

    regression = LogisticRegression(max_iter=1000)
    regression.fit(columns(labelled), [row.label for row in labelled])
    probabilities = np.zeros((len(films), len(classes)))
    for column, name in enumerate(regression.classes_):
        probabilities[:, classes.index(name)] = regression.predict_proba(columns(films))[:, column]
    return probabilities
