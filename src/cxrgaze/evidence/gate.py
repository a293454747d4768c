"""The accuracy gate: a low-precision network against its float32 reference, on a labelled set.

Two levels that are never mixed: `graph`, where ONNX Runtime runs the typed graph on the host, and
`engine`, where the plan runs on its device. The reference is the same at both: the float32 graph's
outputs, computed when the bundle was made and stored in it. Statistics are in
`cxrgaze.evidence.compare`.

Levels and rule: docs/graphs.md#gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles import npz
from cxrgaze.bundles.bundle import REFERENCE, SEEN, Bundle
from cxrgaze.bundles.served import Decision, Served
from cxrgaze.bundles.verdicts import Gate, GateLevel, Histogram, Limits
from cxrgaze.command import counted
from cxrgaze.errors import DataError, UsageError
from cxrgaze.evidence import metrics, phantom
from cxrgaze.evidence.arrays import Arrays, canvas_density, load_arrays
from cxrgaze.evidence.compare import Diagnoses, Maps, Paired, Says, compare
from cxrgaze.evidence.heatmaps import PRESETS, HeatmapPreset
from cxrgaze.evidence.labelled_set import LabelledSet, Split, log_look
from cxrgaze.evidence.seen import Seen
from cxrgaze.evidence.truth import truth_of
from cxrgaze.files import sha256
from cxrgaze.films.canvas import drawn_canvases
from cxrgaze.films.film import film_from_array
from cxrgaze.spec import LOG_DENSITY, LOGITS, Domain, Head, Infer, ModelSpec, Outputs

PHANTOMS = 1000
"""Phantoms of the gate of a network that was trained on phantoms."""
PHANTOM_SEED = 3_000_000
"""Of the gate's first phantom, apart from every seed that training, calibration or parity uses."""

REFERENCE_LIMIT = 64_000_000
"""Bytes of log-densities that a bundle stores; films are chosen by seed beyond."""


@dataclass(frozen=True)
class GateSet:
    """Films with label, gaze and patient on the canvas of a network."""

    name: str
    domain: Domain
    patients: tuple[str, ...]
    keys: tuple[str, ...]
    """SHA-256 of each film."""
    arrays: Arrays

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all that a verdict depends on: films, patients, labels, gaze densities."""
        parts = zip(self.keys, self.patients, self.arrays.truth.tolist(), strict=True)
        lines = "\n".join(" ".join(map(str, part)) for part in parts).encode()
        return sha256(lines + sha256(self.arrays.densities.tobytes()).encode())

    @cached_property
    def centre_prior_cc(self) -> float | None:
        """Mean CC of the centre prior to the human maps; None where fewer than two films have one.

        The prior of a film is the mean of the other films' human maps: training films are not at
        hand where a network is gated.
        """
        index = np.flatnonzero(self.arrays.has_gaze)
        if len(index) < 2:
            return None
        total = self.arrays.densities[index, 0].sum(axis=0, dtype=np.float64)
        found = []
        for i in index.tolist():
            crop, own = self.arrays.geometries[i].crop, self.arrays.densities[i, 0]
            found.append(metrics.cc(crop(total - own), crop(own)))
        return float(np.mean(found))

    def chosen(self, indices: Sequence[int]) -> GateSet:
        """Some of the films."""
        index = np.asarray(indices, dtype=int)
        arrays = self.arrays
        return GateSet(
            self.name,
            self.domain,
            tuple(self.patients[i] for i in index),
            tuple(self.keys[i] for i in index),
            Arrays(
                tuple(arrays.films[i] for i in index),
                arrays.images[index],
                arrays.truth[index],
                arrays.densities[index],
                tuple(arrays.geometries[i] for i in index),
                tuple(arrays.gaze[i] for i in index),
            ),
        )


VALIDATION_PHANTOMS = (900, 150)
"""First seed and number of the plain phantoms that the networks that ship were validated on."""


@lru_cache(maxsize=6)
def phantom_set(
    spec: ModelSpec,
    films: int = PHANTOMS,
    first_seed: int = PHANTOM_SEED,
    difficulty: float = phantom.HARD,
) -> GateSet:
    """Phantoms, by default where the demo network's AUC is near 0.90; one patient each.

    Drawn anew wherever they are needed: a device needs no set to gate a demo bundle. Their labels
    are known as far as the network has the phantom's classes.
    """
    seeds = range(first_seed, first_seed + films)
    drawn = [phantom.draw(seed, difficulty=difficulty) for seed in counted(seeds, films, "phantom")]
    read = [film_from_array(one.pixels) for one in drawn]
    images, geometries = drawn_canvases(read, spec)
    preset = PRESETS["phantom"]
    if LOG_DENSITY in spec.heads:
        densities = np.stack(
            [
                canvas_density(one.gaze, geometry, preset)
                for one, geometry in zip(drawn, geometries, strict=True)
            ]
        )[:, None]
    else:
        densities = np.zeros_like(images)
    names = tuple(f"phantom-{seed}" for seed in seeds)
    known = [{name: name == one.label for name in phantom.LABELS} for one in drawn]
    return GateSet(
        f"{films} phantoms at difficulty {difficulty}, from seed {first_seed} (synthetic)",
        "phantom",
        names,
        tuple(film.sha256 for film in read),
        Arrays(
            names,
            images,
            truth_of(known, spec),
            densities,
            geometries,
            tuple(one.gaze for one in drawn),
        ),
    )


def labelled_set(
    labelled: LabelledSet, spec: ModelSpec, preset: HeatmapPreset, split: Split | None
) -> GateSet:
    """One split of a labelled set, or all of it.

    Raises:
        DataError: as `load_arrays`; no films in the split.
    """
    part = labelled.split(split)
    if not part.rows:
        raise DataError(f"{labelled.folder}: no films in split {split}")
    name = f"{part.info.name}, {f'split {split}' if split else 'all films'}"
    return GateSet(
        name,
        part.info.domain,
        tuple(row.patient for row in part.rows),
        tuple(row.sha256 for row in part.rows),
        load_arrays(part, spec, preset),
    )


def named_set(
    labelled: LabelledSet, spec: ModelSpec, heatmap: str | None, split: Split | None
) -> GateSet:
    """`labelled_set` by the name of the preset that makes its human maps.

    Raises:
        UsageError: no preset of that name.
        DataError: as `labelled_set`.
    """
    if LOG_DENSITY not in spec.heads:
        heatmap = next(iter(PRESETS))  # there is no map to compare with a human one
    if heatmap not in PRESETS:
        raise UsageError(
            f"{labelled.folder}: say how its human maps are made with --heatmap, one of "
            f"{', '.join(PRESETS)}; found {heatmap!r}"
        )
    return labelled_set(labelled, spec, PRESETS[heatmap], split)


def looked_at(
    labelled: LabelledSet,
    spec: ModelSpec,
    heatmap: str | None,
    split: Split | None,
    *,
    model: str,
    model_sha256: str,
    what: str,
) -> GateSet:
    """`named_set` for a verdict: a look at the test split is logged in the set's folder.

    Args:
        model, model_sha256, what: as `log_look` takes them.
    """
    films = named_set(labelled, spec, heatmap, split)
    if split in (None, "test"):
        log_look(labelled, model, model_sha256, what)
    return films


Predicted = Mapping[Head, NDArray[Any]]
"""Heads of the films of a set: logits `(n, C)` float32, log-densities `(n, H, W)` float16.

Both sides of a comparison are rounded alike.
"""


def some_of(predicted: Predicted, indices: Sequence[int]) -> Predicted:
    """What was predicted of some of the films."""
    index = np.asarray(indices, dtype=int)
    return {head: array[index] for head, array in predicted.items()}


def predicted(infer: Infer, images: NDArray[np.float32]) -> Predicted:
    """The heads of `images` `(n, 1, H, W)`, in batches of a few films where they are small."""
    size = max(_BATCH_PIXELS // int(np.prod(images.shape[1:])), 1)
    starts = range(0, len(images), size)
    batches = [
        stored(infer(np.ascontiguousarray(images[start : start + size])))
        for start in counted(starts, len(starts), "batch")
    ]
    return {head: np.concatenate([one[head] for one in batches]) for head in batches[0]}


def stored(outputs: Outputs) -> Predicted:
    """Heads as a bundle stores them."""
    kept: dict[Head, NDArray[Any]] = dict(outputs)
    if LOG_DENSITY in kept:
        with np.errstate(over="ignore"):  # what float16 cannot hold is not finite, and said so
            kept[LOG_DENSITY] = kept[LOG_DENSITY][:, 0].astype(np.float16)
    return kept


_BATCH_PIXELS = 1 << 17


def judge(
    films: GateSet,
    reference: Predicted,
    candidate: Predicted,
    limits: Limits,
    level: GateLevel,
    served: Served,
    decision: Decision | None = None,
) -> Gate:
    """The verdict on a candidate, on what is served of it.

    Args:
        reference, candidate: maps may be those of the first films alone.
        served: what is served of the reference; what nothing taught cannot lose anything.
        decision: temperatures and operating points of the candidate; None for the reference's.
    """
    diagnoses = maps = agreement = changes = None
    if LOGITS in served.heads:
        own = served if decision is None else replace(served, decision=decision)
        one, other = Says.of(served, reference[LOGITS]), Says.of(own, candidate[LOGITS])
        truth = films.arrays.truth[:, served.columns]
        exclusive = served.spec.exclusive
        diagnoses = Diagnoses(truth, one, other, served.decides | own.decides, exclusive)
        changes = np.abs(other.probabilities - one.probabilities).max(axis=1)
    if LOG_DENSITY in served.heads:
        agreement = _agreement(films, candidate, reference)
        maps = Maps(_human_cc(films, reference), _human_cc(films, candidate))
    comparison = compare(Paired(films.patients, diagnoses, maps), limits, classes=served.classes)
    worst = None
    if agreement is not None:
        worst = films.keys[int(np.nanargmin(agreement)) if np.isfinite(agreement).any() else 0]
    return Gate(
        level=level,
        verdict=comparison.verdict,
        reason=comparison.reason,
        set_name=films.name,
        set_sha256=films.identity,
        domain=films.domain,
        comparison=comparison,
        centre_prior_cc=films.centre_prior_cc if maps else None,
        agreement_cc_min=None if agreement is None else _number(np.nanmin, agreement),
        agreement_cc_mean=None if agreement is None else _number(np.nanmean, agreement),
        worst_film_sha256=worst,
        agreement_loss=None if agreement is None else Histogram.by_decade(1 - agreement, -8),
        probability_change=None if changes is None else Histogram.by_decade(changes, -8),
    )


def distance(
    films: GateSet, reference: Predicted, candidate: Predicted, head: Head, served: Served
) -> float:
    """How far one output is from the reference's, mean over films, 0 where it is the same.

    The largest change of a class's probability, or 1 - agreement CC. Infinity where something is
    not finite.
    """
    if head == LOG_DENSITY:
        changes = 1 - _agreement(films, candidate, reference)
    else:
        plain = replace(served, decision=Decision())
        before, after = (plain.probabilities(p[LOGITS]) for p in (reference, candidate))
        changes = np.abs(after - before).max(axis=1)
    return float(changes.mean()) if np.isfinite(changes).all() else float("inf")


def _number(
    function: Callable[[NDArray[np.float64]], np.floating], values: NDArray[np.float64]
) -> float:
    """A figure of the films that have one; -1 where none has."""
    return float(function(values)) if np.isfinite(values).any() else -1.0


def _human_cc(films: GateSet, found: Predicted) -> NDArray[np.float64]:
    """CC to the human map over each film's area; NaN where a film has no gaze.

    A map that is not finite has CC -1: it must not pass for a film without gaze.
    """
    human = np.full(len(films.keys), np.nan)
    mapped = len(found[LOG_DENSITY])
    for index in np.flatnonzero(films.arrays.has_gaze[:mapped]).tolist():
        inside = _inside(films, found, index)
        truth = films.arrays.geometries[index].crop(films.arrays.densities[index, 0])
        human[index] = metrics.cc(np.exp(inside), truth) if np.isfinite(inside).all() else -1.0
    return human


def _agreement(films: GateSet, found: Predicted, reference: Predicted) -> NDArray[np.float64]:
    """CC to the reference's map over each film's area; -1 for a map that is not finite."""
    agreement = np.full(len(found[LOG_DENSITY]), -1.0)
    for index in range(len(agreement)):
        one, other = (_inside(films, p, index) for p in (found, reference))
        if np.isfinite(one).all():
            agreement[index] = metrics.cc(np.exp(one), np.exp(other))
    return agreement


def _inside(films: GateSet, found: Predicted, index: int) -> NDArray[np.float64]:
    """The log-density over a film's area of the canvas."""
    inside = films.arrays.geometries[index].crop(found[LOG_DENSITY][index])
    return inside.astype(np.float64)


def stored_reference(films: GateSet, reference: Predicted, seed: int = 0) -> bytes:
    """The reference's outputs as a bundle stores them: at most `REFERENCE_LIMIT` bytes of maps.

    Beyond, films are chosen by seed that have their map stored; they come first. Logits, which take
    no room, are of all films.
    """
    count = len(films.keys)
    parts = dict(reference)
    index = np.arange(count)
    if LOG_DENSITY in reference:
        most = max(REFERENCE_LIMIT // reference[LOG_DENSITY][0].nbytes, 1)
        order = np.random.default_rng(seed).permutation(count)
        mapped = np.sort(order[:most])
        index = np.concatenate([mapped, np.sort(order[most:])])
        if LOGITS not in reference:
            index = mapped
        parts[LOG_DENSITY] = reference[LOG_DENSITY][mapped]
    if LOGITS in reference:
        parts[LOGITS] = reference[LOGITS][index]
    keys = np.array([films.keys[i] for i in index], dtype="S64")
    return npz.written({"keys": keys, **parts})


def read_reference(bundle: Bundle) -> tuple[tuple[str, ...], Predicted]:
    """Film hashes and float32 outputs that the bundle stores; maps may be of the first films alone.

    Raises:
        DataError: the bundle was made without a gate.
        IntegrityError: altered, or not the arrays of this network.
    """
    if REFERENCE not in bundle:
        raise DataError(
            f"{bundle.path} holds no reference outputs: it was exported without a gate set; export "
            "again with --gate SET"
        )
    spec = bundle.manifest.spec
    shapes: dict[Head, tuple[Any, tuple[int | None, ...]]] = {
        LOGITS: (np.dtype(np.float32), (None, len(spec.classes))),
        LOG_DENSITY: (np.dtype(np.float16), (npz.AT_MOST, spec.height, spec.width)),
    }
    found = bundle.read_arrays(
        REFERENCE,
        {"keys": (np.dtype("S64"), (None,)), **{head: shapes[head] for head in spec.heads}},
    )
    keys = tuple(key.decode("ascii", "replace") for key in found["keys"])
    return keys, {head: found[head] for head in spec.heads}


def read_seen(bundle: Bundle) -> Seen | None:
    """What the bundle's network was trained on; None where it is not recorded.

    Raises:
        IntegrityError: altered.
    """
    if SEEN not in bundle:
        return None
    return Seen.parse(bundle.read(SEEN), str(bundle.path / SEEN))


def judge_engine(bundle: Bundle, films: GateSet, infer: Infer) -> Gate:
    """The verdict on what runs on this device, against the reference that the bundle stores.

    By the limits that its graph was judged by. Films of the set that the bundle has no reference of
    are left out; maps are compared where it has one.

    Raises:
        DataError: none of the films has one.
    """
    keys, reference = read_reference(bundle)
    place = {key: index for index, key in enumerate(keys)}
    with_reference = [index for index, key in enumerate(films.keys) if key in place]
    if not with_reference:
        raise DataError(
            f"none of the {len(films.keys)} films of {films.name} is among the {len(keys)} that "
            f"{bundle.path} has reference outputs of; use the set that it was exported with: "
            f"{bundle.manifest.gate.set_name or 'not recorded'}"
        )
    maps = len(reference.get(LOG_DENSITY, ()))
    # Those with a map first.
    with_reference.sort(key=lambda index: place[films.keys[index]] >= maps)
    part = films.chosen(with_reference)
    at = [place[key] for key in part.keys]
    mapped = [number for number in at if number < maps]
    matching = {
        head: array[mapped if head == LOG_DENSITY else at] for head, array in reference.items()
    }
    candidate = _answers(infer, part.arrays.images, len(mapped))
    manifest = bundle.manifest
    limits = manifest.gate.comparison.limits if manifest.gate.comparison else Limits()
    served, decision = manifest.reference_served, manifest.decision
    return judge(part, matching, candidate, limits, "engine", served, decision)


def _answers(infer: Infer, images: NDArray[np.float32], mapped: int) -> Predicted:
    """The heads of films, maps of the first `mapped` alone: they take the room."""

    def unmapped(image: NDArray[np.float32]) -> Outputs:
        return {head: array for head, array in infer(image).items() if head != LOG_DENSITY}

    parts = [predicted(infer, images[:mapped])] if mapped else []
    if mapped < len(images):
        parts.append(predicted(unmapped, images[mapped:]))
    return {h: np.concatenate([part[h] for part in parts if h in part]) for h in parts[0]}


def require_apart(
    films: GateSet, patients_there: Sequence[str], keys: Sequence[str], what: str = "calibration"
) -> None:
    """Refuse a gate set that shares patients or films with what a graph was made by.

    Args:
        patients_there: its patients. keys: SHA-256 of its films.
        what: it is, for the message.

    Raises:
        DataError: naming how many are shared; names of patients are not told.
    """
    patients, shared = set(films.patients) & set(patients_there), set(films.keys) & set(keys)
    if patients or shared:
        raise DataError(
            f"{len(patients)} patients and {len(shared)} films of the {what} are also in the "
            f"gate's set ({films.name}): its verdict would flatter; take another split for one"
        )
