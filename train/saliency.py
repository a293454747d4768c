"""`cxrgaze-train saliency`: heatmaps of any tool against the gaze of a labelled set.

Nothing is chosen here and nothing is changed but the log of looks. Imports no torch.
"""

from __future__ import annotations

import csv
import io
import itertools
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cxrgaze.command import counted, say
from cxrgaze.environment import now_utc, versions
from cxrgaze.errors import DataError, UsageError
from cxrgaze.evidence import heatmaps, metrics
from cxrgaze.evidence.arrays import Arrays, load_arrays
from cxrgaze.evidence.intervals import Interval, PatientBootstrap
from cxrgaze.evidence.labelled_set import FilmRow, LabelledSet, log_look, split_named
from cxrgaze.files import make_output_folder, sha256, write_atomic
from cxrgaze.spec import LOG_DENSITY, NOTICE, ModelSpec
from cxrgaze.train.film_saliency import (
    agreement,
    cc_between,
    cc_with_single,
    fixations_on_film,
    reader_maps,
)
from cxrgaze.train.map_files import (
    MapFiles,
    MapKind,
    find_maps,
    first_names,
    map_bytes,
    read_map,
)
from cxrgaze.train.saliency_record import FILE, METRICS, Beside, SaliencyReport
from cxrgaze.train.saliency_report import pages

Array = NDArray[np.floating]
_PRIOR = "_centre_prior"
_SINGLE = "cc_single_reader"
_UNSEEN = "fixations_at_zero"
_NAMED = 100  # maps that an error names


@dataclass(frozen=True)
class SaliencyOptions:
    """What `cxrgaze-train saliency` was asked for."""

    maps: Path
    """Folder of the maps."""
    labelled: Path
    """Folder of the labelled set."""
    output: Path
    heatmap: str
    """Preset that makes densities of the gaze."""
    split: Literal["train", "val", "test", "all"] = "test"
    kind: MapKind = "activation"
    canvas: tuple[int, int] = (320, 320)
    """`(H, W)` that film, gaze and map are brought to."""
    allow_missing: bool = False
    """Judge the films that have a map although others with gaze have none."""
    resamples: int = 2000
    """Of the bootstrap over patients."""
    seed: int = 0


@dataclass(frozen=True)
class _Compared:
    """The films that were compared, in the order of the set's rows."""

    rows: Sequence[FilmRow]
    figures: Sequence[Mapping[str, float]]
    """Of each film: `METRICS` of map and centre prior, and CC with and between single readers."""
    maps_sha256: str

    def over_films(self, key: str) -> NDArray[np.float64]:
        """Of each film, NaN where not measured, `(N,)`."""
        return np.array([of_film.get(key, np.nan) for of_film in self.figures])

    def bounded(self) -> list[str]:
        """Where information gain says less than it seems."""
        count = {
            name: int(np.nansum(self.over_films(key)))
            for name, key in (("map", _UNSEEN), ("centre prior", f"{_UNSEEN}{_PRIOR}"))
        }
        return [
            f"a meaning of information gain at {n} fixations: the {name} is zero there (below "
            f"{metrics.MIT_EPSILON}), and what it loses depends on that bound"
            for name, n in count.items()
            if n
        ]

    def table(self) -> bytes:
        """A row a film as CSV."""
        keys = list(dict.fromkeys(key for of_film in self.figures for key in of_film))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["film", "patient", *keys, "notice"])
        for row, of_film in zip(self.rows, self.figures, strict=True):
            values = [of_film.get(key, np.nan) for key in keys]
            cells = (f"{v:.6f}" if np.isfinite(v) else "" for v in values)
            writer.writerow([row.film, row.patient, *cells, NOTICE])
        return text.getvalue().encode()


def compare_with_gaze(options: SaliencyOptions) -> SaliencyReport:
    """Compare; write saliency.json, saliency.csv, saliency.md and saliency.html.

    Raises:
        UsageError: a heatmap preset that is unknown, an output folder that cannot be written.
        DataError: a set that breaks a rule, a split without gaze; maps that are missing, that may
            be of several films, or that do not hold what their kind says: by name.
    """
    if options.heatmap not in heatmaps.PRESETS:
        expected = ", ".join(heatmaps.PRESETS)
        raise UsageError(f"--heatmap {options.heatmap}: expected one of {expected}")
    labelled = LabelledSet.open(options.labelled)
    asked = [row for row in _part(labelled, options.split).rows if row.film in labelled.gaze]
    if not asked:
        raise DataError(f"{labelled.folder}: no film of split {options.split} has gaze")
    files = find_maps(options.maps, [row.film for row in labelled.rows])
    rows, notes = _with_map(asked, files, options)
    notes += _not_asked(labelled, files, options)
    output = make_output_folder(options.output)
    compared, prior = _compare(labelled, rows, files, options)
    report = _report(labelled, len(asked), compared, prior, notes, options)
    contents = {FILE: report.rendered(), "saliency.csv": compared.table(), **pages(report)}
    for name, data in contents.items():
        write_atomic(output / name, data)
    say(f"report  {output / 'saliency.html'} (also .md, .json; saliency.csv has a row a film)")
    return report


def _part(labelled: LabelledSet, split: str) -> LabelledSet:
    return labelled.split(split_named(split))


def _with_map(
    asked: Sequence[FilmRow], files: MapFiles, options: SaliencyOptions
) -> tuple[tuple[FilmRow, ...], list[str]]:
    """The films that have a map, and what is said of the others.

    Raises:
        DataError: none has one, or some have none and that is not allowed.
    """
    rows = tuple(row for row in asked if row.film in files.of_film)
    missing = [row.film for row in asked if row.film not in files.of_film]
    if not missing:
        return rows, []
    said = f"{len(missing)} of {len(asked)} films with gaze have no map ({first_names(missing)})"
    if not rows or not options.allow_missing:
        remedy = "" if not rows else "; --allow-missing judges the others alone"
        raise DataError(f"{options.maps}, split {options.split}: {said}{remedy}")
    return rows, [f"{said}: figures are of the others alone"]


def _not_asked(labelled: LabelledSet, files: MapFiles, options: SaliencyOptions) -> list[str]:
    """What is said of films without gaze and of maps of no film."""
    part = _part(labelled, options.split)
    notes = []
    if some := sum(row.film not in labelled.gaze for row in part.rows):
        notes.append(f"{some} of {len(part.rows)} films of split {options.split} have no gaze")
    if files.foreign:
        notes.append(f"maps of no film of the set: {first_names(files.foreign)}")
    return notes


def _compare(
    labelled: LabelledSet, rows: tuple[FilmRow, ...], files: MapFiles, options: SaliencyOptions
) -> tuple[_Compared, str]:
    """Figures of every film, and what the centre prior is the mean of.

    Raises:
        DataError: maps that do not hold what their kind says: all of them.
    """
    arrays = _arrays(labelled, rows, options)
    priors, prior = _priors(labelled, rows, arrays, options)
    looked = _looked(arrays, heatmaps.PRESETS[options.heatmap])
    figures, digests, problems = [], [], []
    films = zip(rows, arrays.geometries, looked, priors, strict=True)
    for row, geometry, gaze, centre in counted(films, len(rows), "film"):
        path = files.of_film[row.film]
        try:
            data = map_bytes(path)
            heat = read_map(path, data, options.kind, geometry)
        except DataError as error:
            problems.append(str(error))
            continue
        digests.append(f"{row.film} {sha256(data)}")
        figures.append(gaze.figures(heat, None if centre is None else geometry.crop(centre)))
    if problems:
        named = "; ".join(problems[:_NAMED]) + ("; ..." if len(problems) > _NAMED else "")
        raise DataError(
            f"{options.maps}: {len(problems)} of {len(rows)} maps cannot be used, and no figure is "
            f"given of the rest: {named}"
        )
    return _Compared(rows, figures, sha256("\n".join(digests).encode())), prior


@dataclass(frozen=True)
class _Looked:
    """Where readers looked on one film, over its area of the canvas."""

    truth: Array
    """`(H, W)`, the density of all readers."""
    readers: Sequence[Array]
    """`(H, W)` each, of one reader."""
    fixations: NDArray[np.int64]
    """`(n, 2)`, of all readers."""
    elsewhere: NDArray[np.int64]
    """`(m, 2)`, fixations of all other films, scaled into this one's area."""

    def figures(self, heat: Array, prior: Array | None) -> dict[str, float]:
        """`METRICS` of a map and of the centre prior, with and between single readers."""
        found = self._of(heat, prior)
        if prior is not None:
            found |= {f"{key}{_PRIOR}": value for key, value in self._of(prior, prior).items()}
        return {**found, "cc_between_readers": cc_between(self.readers)}

    def _of(self, shown: Array, prior: Array | None) -> dict[str, float]:
        """NaN where there is nothing to compare with."""
        at, elsewhere = self.fixations, self.elsewhere
        shuffled = gain = float("nan")
        if len(at) and len(elsewhere):
            shuffled = metrics.shuffled_auc(shown, at, elsewhere)
        if len(at) and prior is not None:
            gain = metrics.information_gain(shown, prior, at)
        return {
            **agreement(shown, self.truth, at),
            "shuffled_auc": shuffled,
            "information_gain": gain,
            _SINGLE: cc_with_single(shown, self.readers),
            _UNSEEN: float((shown[at[:, 1], at[:, 0]] < metrics.MIT_EPSILON).sum()),
        }


def _looked(arrays: Arrays, preset: heatmaps.HeatmapPreset) -> Iterator[_Looked]:
    """Each film's gaze. Fixations of other films are scaled by the sides of the areas."""
    gazes = list(zip(arrays.gaze, arrays.geometries, strict=True))
    fixations = [fixations_on_film(gaze, geometry) for gaze, geometry in gazes if gaze]
    sides = np.array([(geometry.width, geometry.height) for geometry in arrays.geometries])
    of_film = np.repeat(np.arange(len(fixations)), [len(points) for points in fixations])
    everywhere = np.concatenate(fixations)
    for index, (gaze, geometry) in enumerate(gazes):
        assert gaze is not None
        other = of_film != index
        scaled = everywhere[other] * (sides[index] / sides[of_film[other]])
        yield _Looked(
            truth=geometry.crop(arrays.densities[index, 0]),
            readers=reader_maps(gaze, geometry, preset),
            fixations=fixations[index],
            elsewhere=scaled.astype(np.int64),
        )


def _arrays(labelled: LabelledSet, rows: tuple[FilmRow, ...], options: SaliencyOptions) -> Arrays:
    """Gaze of films on the canvas, as a network would see it that gives maps alone."""
    height, width = options.canvas
    spec = ModelSpec(
        variant="maps",
        model_version="",
        heads=(LOG_DENSITY,),
        height=height,
        width=width,
        pixel_source=rows[0].pixel_source,
        domain=labelled.info.domain,
    )
    return load_arrays(replace(labelled, rows=rows), spec, heatmaps.PRESETS[options.heatmap])


def _priors(
    labelled: LabelledSet, rows: Sequence[FilmRow], arrays: Arrays, options: SaliencyOptions
) -> tuple[Iterator[Array | None], str]:
    """The centre prior `(H, W)` of each film, None where there is none; and of what it is the mean.

    Of the set's training films, where those are others; else of the compared films of all other
    patients.
    """
    training = tuple(row for row in labelled.split("train").rows if row.film in labelled.gaze)
    if training and options.split in ("val", "test"):
        densities = _arrays(labelled, training, options).densities[:, 0]
        said = f"mean of the set's {len(training)} training films with gaze"
        return itertools.repeat(heatmaps.centre_prior(densities), len(rows)), said
    patients = [row.patient for row in rows]
    said = "mean of the compared films of all other patients (leave one patient out)"
    return priors_of_others(arrays.densities[:, 0], patients), said


def priors_of_others(
    densities: NDArray[np.float32], patients: Sequence[str]
) -> Iterator[NDArray[np.float64] | None]:
    """Of each film the mean density of other patients' films, sum 1; None where there are none.

    Args:
        densities: `(N, H, W)`. patients: of each film, `(N,)`.
    """
    who = np.asarray(patients)
    total = densities.sum(axis=0, dtype=np.float64)
    for patient in patients:
        own = densities[who == patient].sum(axis=0, dtype=np.float64)
        rest = np.maximum(total - own, 0)  # which rounding may leave below 0
        yield rest / rest.sum() if (who != patient).any() else None


def _report(
    labelled: LabelledSet,
    asked: int,
    compared: _Compared,
    prior: str,
    notes: Sequence[str],
    options: SaliencyOptions,
) -> SaliencyReport:
    """All figures as a record; the last thing done is to log the look."""
    info, rows = labelled.info, compared.rows
    bootstrap = PatientBootstrap([row.patient for row in rows], options.resamples, options.seed)

    def mean(values: NDArray[np.float64]) -> Interval | None:
        return None if np.isnan(values).all() else bootstrap.mean(values)

    def beside(key: str) -> Beside:
        of_map, of_prior = compared.over_films(key), compared.over_films(f"{key}{_PRIOR}")
        return Beside(map=mean(of_map), centre_prior=mean(of_prior), added=mean(of_map - of_prior))

    between = mean(compared.over_films("cc_between_readers"))
    left_out = [*notes, *compared.bounded()]
    if between is None:
        left_out.append("CC between readers: no film has two readers")
    name = options.maps.resolve().name
    opened = any(row.split == "test" for row in rows)
    return SaliencyReport(
        synthetic=info.domain == "phantom",
        maps=name,
        maps_sha256=compared.maps_sha256,
        kind=options.kind,
        set=info.name,
        origin=info.origin,
        split=options.split,
        split_sha256=info.split_sha256,
        films=len(rows),
        patients=len(set(bootstrap.patients)),
        asked=asked,
        heatmap=options.heatmap,
        canvas=options.canvas,
        prior=prior,
        figures={key: beside(key) for key in METRICS},
        between_readers=between,
        single_reader=beside(_SINGLE),
        intervals=f"95 %; bootstrap: {options.resamples} resamples of patients, percentile, seed "
        f"{options.seed}",
        left_out=tuple(left_out),
        created_utc=now_utc(),
        environment={**versions("cxrgaze", "python"), "machine": platform.machine()},
        look=log_look(labelled, name, compared.maps_sha256, "saliency maps") if opened else None,
    )
