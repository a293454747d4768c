"""Figures of the saliency head with their intervals, beside those of the centre prior."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxrgaze.evidence.intervals import Interval, PatientBootstrap
from cxrgaze.train.evaluated_films import EvaluatedFilms
from cxrgaze.train.evaluation_record import BetweenReaders, Saliency, SaliencyMeans


def saliency_of(
    films: EvaluatedFilms, heatmap: str, *, resamples: int, seed: int
) -> tuple[Saliency, list[str]]:
    """Means over the films with gaze, and what is left out of them with its reason.

    Args:
        heatmap: preset that made densities of the gaze.
        resamples, seed: of the bootstrap over patients.
    """
    by_film = films.saliency
    bootstrap = PatientBootstrap([films.rows[i].patient for i in by_film], resamples, seed)

    def over_films(key: str) -> NDArray[np.float64]:
        return np.array([metrics.get(key, np.nan) for metrics in by_film.values()])

    def mean(values: NDArray[np.float64]) -> Interval | None:
        return None if np.isnan(values).all() else bootstrap.mean(values)

    def measured(key: str) -> Interval | None:
        return mean(over_films(key))

    def means(suffix: str = "") -> SaliencyMeans:
        return SaliencyMeans(**{key: measured(key + suffix) for key in SaliencyMeans.model_fields})

    between_readers = BetweenReaders(
        cc=measured("cc_between_readers"), network_cc=measured("cc_single_reader")
    )
    left_out = [] if between_readers.cc else ["inter-reader CC: no film has two readers"]
    figures = Saliency(
        films=len(by_film),
        patients=len(set(bootstrap.patients)),
        heatmap=heatmap,
        prediction=means(),
        centre_prior=means("_centre_prior"),
        added_cc=mean(over_films("cc") - over_films("cc_centre_prior")),
        between_readers=between_readers,
        pad_mass=bootstrap.mean(over_films("pad_mass")),
    )
    return figures, left_out
