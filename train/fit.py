"""A training run: stages in their order, hand-over by name, resumable after every epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.command import say
from cxrgaze.errors import DataError, UsageError
from cxrgaze.evidence import heatmaps
from cxrgaze.evidence.arrays import Arrays, load_arrays
from cxrgaze.evidence.class_presets import Classes
from cxrgaze.evidence.labelled_set import LabelledSet, Split
from cxrgaze.evidence.seen import Seen, require_unseen
from cxrgaze.evidence.truth import UNKNOWN, any_known, present_classes
from cxrgaze.files import sha256
from cxrgaze.spec import LOG_DENSITY, LOGITS, Head, ModelSpec
from cxrgaze.train import checkpoint, initial
from cxrgaze.train.baseline import KEPT, Baseline, Described, fitted, grey_statistics
from cxrgaze.train.card import Card, Population, Statements
from cxrgaze.train.config import Stage, TrainConfig
from cxrgaze.train.decision import fit_decision
from cxrgaze.train.distill import taught
from cxrgaze.train.evaluation_record import Evaluation
from cxrgaze.train.figures import point_figures, predict
from cxrgaze.train.losses import (
    CONTRASTIVE,
    NEED_GAZE,
    NEED_LABELS,
    NEED_TEACHER,
    TEACH_DIAGNOSIS,
    TEACH_SALIENCY,
)
from cxrgaze.train.model import AnyNetwork, network_of, spec_of
from cxrgaze.train.origin import Origin, check_leakage
from cxrgaze.train.run_folder import RunRecord, Start, open_run, set_hash
from cxrgaze.train.stage_module import Films
from cxrgaze.train.stage_run import Machine, run_stage

_OPENED: tuple[Split, ...] = ("train", "val")


def fit(
    labelled: LabelledSet,
    config: TrainConfig,
    run: Path,
    *,
    start: Start = Start(),  # noqa: B008 - frozen
    machine: Machine = Machine(),  # noqa: B008 - frozen
    resume: bool = False,
    command: str = "",
    identity_key: bytes | None = None,
    statements: Statements = Statements(),  # noqa: B008 - frozen
) -> Card | None:
    """Train on the set's split `train`, choose on `val`; `test` is not opened.

    Args:
        run: its folder (`cxrgaze.train.run_folder`); new, or with `resume` that of the same run.
        command: to make this checkpoint again, for the card.
        identity_key: under which patients are recorded (`cxrgaze.evidence.seen`); None records
            films alone.
        statements: what people say of the network, for the card.

    Returns:
        The card of the checkpoint `RUN/NAME.safetensors`; None in all processes but the first.

    Raises:
        UsageError: a folder that holds another run, a missing teacher.
        DataError: no training or validation films, possible leakage, nothing to learn from.
        IncompatibleError: a GPU that is not there.
        IntegrityError: a stage in the folder that was altered.
        CxrgazeError: a loss that is not finite.
    """
    machine.check(config)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    spec = spec_for(labelled, config)
    torch.manual_seed(config.seed)
    network = network_of(spec, centre_prior=config.centre_prior)
    before = initial.start(network, spec, start.init, start.origin)
    teacher = _teacher(config, start)
    origins = before.origins + (teacher[1].descent if teacher else ())
    check_leakage(labelled.info, origins, allow=start.allow_leakage)
    taught_before = [before.seen]
    if teacher and start.teacher:
        taught_before.append(checkpoint.seen_by(start.teacher, teacher[1]))
    own = Seen.of((row for row in labelled.rows if row.split in _OPENED), identity_key)
    test = Seen.of((row for row in labelled.rows if row.split == "test"), identity_key)
    for seen in filter(None, taught_before):
        if not start.allow_leakage:
            require_unseen(seen, test, f"{labelled.folder}, split test")
        own = own.joined(seen)
    preset = heatmaps.PRESETS[config.heatmap]
    train, val = (_arrays(labelled, name, spec, preset, machine.cache, teacher) for name in _OPENED)
    asked = {name: stage.of_heads(spec.heads) for name, stage in config.stages.items()}
    reasons = {
        name: _nothing_to_learn(stage, train, val) if stage else f"for heads {spec.heads} alone"
        for name, stage in asked.items()
    }
    stages = {name: stage for name, stage in asked.items() if stage and not reasons[name]}
    if not stages:
        raise DataError(f"{labelled.folder}: no stage has anything to learn from: {reasons}")
    taught_heads = before.heads.union(*(_heads(s, train, teacher) for s in stages.values()))
    taught_classes = before.classes | _classes(stages.values(), train, spec, teacher)
    untaught = _untaught(taught_classes, spec, start)
    first = _is_first_process()
    if first:
        record = RunRecord(
            config=config,
            start=start,
            set_origin=labelled.info.origin,
            set_sha256=set_hash(labelled),
            weights_sha256=tuple(o.weights_sha256 for o in origins),
            command=command,
            statements=statements,
        )
        begun = open_run(run, record, resume)
        command = begun.command
        statements = statements if statements != Statements() else begun.statements
        _announce(config, stages, reasons, train, labelled)
    gazed = train.densities[train.has_gaze, 0]
    prior = heatmaps.centre_prior(gazed) if len(gazed) else None
    if network.prior and prior is not None:
        network.prior.start_from(torch.from_numpy(prior))
    done = {}
    for number, name in enumerate(config.stages, 1):
        if reasons[name]:
            done[name] = {"left_out": reasons[name]}
            continue
        films = Films(train, val, spec)
        done[name] = run_stage(network, stages[name], films, run, number, name, config, machine)
    if not first:
        return None
    if config.store == "float16":
        checkpoint.round_to_half(network)
    if not Served(spec, untaught=untaught).classes:
        taught_heads -= {LOGITS}
    untrained = tuple(head for head in spec.heads if head not in taught_heads)
    named = [f"output {head}" for head in untrained]
    named += [f"class {name}" for name in untaught if LOGITS not in untrained]
    for what in named:
        say(f"note: nothing taught the {what}; it is not served, and every reading will say so")
    served = Served(spec, untrained=untrained, untaught=untaught)
    decision = _decision(network, val, served, config)
    path = run / f"{config.name}.safetensors"
    return checkpoint.save(
        path,
        network,
        name=config.name,
        seen=own,
        prior=prior,
        baselines=_baselines(labelled, train, served),
        population={name: Population.of(labelled.split(name)) for name in _OPENED},
        statements=statements,
        evaluations=_evaluated(path, network),
        spec=spec,
        trained_on=labelled.info.origin,
        lineage=(*origins, Origin.of_set(labelled.info)),
        centre_prior=config.centre_prior,
        untrained=untrained,
        untaught=untaught,
        decision=decision,
        command=command,
        config=config.model_dump(mode="json"),
        results={
            "stages": done,
            "validation": point_figures(network, val, prior, preset, served),
            "not_evaluated_on_gaze_data": list(config.not_evaluated),
        },
    )


def _evaluated(path: Path, network: AnyNetwork) -> tuple[Evaluation, ...]:
    """Evaluations of these very weights, where the run had ended before."""
    if not path.with_suffix(".json").is_file() or not path.is_file():
        return ()
    card = checkpoint.read_card(path)
    same = card.weights_sha256 == sha256(checkpoint.weights_bytes(network))
    return card.evaluations if same else ()


def _baselines(labelled: LabelledSet, train: Arrays, served: Served) -> tuple[Baseline, ...]:
    """What is said without the network, fitted on the training films; of classes that it serves."""
    part = labelled.split("train")
    films = Described(part.rows, grey_statistics(train))
    known = [labelled.known(row) for row in part.rows]
    found = (fitted(name, films, known, served.classes) for name in KEPT)
    return tuple(one for one in found if not isinstance(one, str))


def _arrays(
    labelled: LabelledSet,
    split: Split,
    spec: ModelSpec,
    preset: heatmaps.HeatmapPreset,
    cache: Path | None,
    teacher: tuple[AnyNetwork, Card] | None,
) -> Arrays:
    """The films of one split, with the teacher's answers where there is one."""
    part = labelled.split(split)
    if not part.rows:
        raise DataError(f"{labelled.folder}: no films in split {split}; prepare makes one")
    arrays = load_arrays(part, spec, preset, cache)
    return taught(arrays, part, spec, teacher[0], teacher[1].spec) if teacher else arrays


def _decision(network: AnyNetwork, val: Arrays, served: Served, config: TrainConfig) -> Decision:
    """Temperature and operating points from the labelled validation films."""
    if not served.classes:
        return Decision()
    logits = predict(network, val.images)[LOGITS]
    return fit_decision(logits, val.truth, served, config.operating_sensitivity)


def _classes(
    stages: Iterable[Stage],
    train: Arrays,
    spec: ModelSpec,
    teacher: tuple[AnyNetwork, Card] | None,
) -> frozenset[str]:
    """Classes that the stages teach: those that some training films have and some have not."""
    losses = {loss for stage in stages for loss in stage.loss if "classifier" in stage.train}
    taught: set[str] = set()
    if losses & TEACH_DIAGNOSIS & NEED_LABELS:
        taught |= {spec.class_names[column] for column in present_classes(train.truth)}
    if teacher and losses & TEACH_DIAGNOSIS & NEED_TEACHER:
        taught |= set(teacher[1].served.classes)
    return frozenset(taught)


def _untaught(taught: frozenset[str], spec: ModelSpec, start: Start) -> tuple[str, ...]:
    """Classes that nothing teaches.

    Raises:
        DataError: there are such, and they were not asked for.
    """
    untaught = tuple(name for name in spec.class_names if name not in taught)
    if untaught and not start.allow_untaught:
        raise DataError(
            f"nothing would teach {', '.join(untaught)}: a class needs training films that have it "
            "and training films that have it not, with a loss on labels; prepare the set with "
            "--classes for those that it has, train with --set heads=log_density for the map "
            "alone, or give --allow-untaught: such classes are recorded and never served"
        )
    return untaught


def _is_first_process() -> bool:
    """Whether this is process 0 of all, as Lightning reads it from the environment."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def spec_for(labelled: LabelledSet, config: TrainConfig) -> ModelSpec:
    """The interface of a network of this config for this set's classes and pixel source."""
    sources = [row.pixel_source for row in labelled.rows if row.split == "train"] or ["array"]
    info, heads = labelled.info, config.heads
    if LOGITS in heads and not info.classes:
        if heads == (LOGITS,):
            raise DataError(f"{labelled.folder} has no classes: no film has a label")
        say("note: the set has no classes; the network gives the map alone")
        heads = (LOG_DENSITY,)
    source = max(sorted(set(sources)), key=sources.count)
    if config.canvas_rule == "cxrgazelearn":
        source = "stored-values"
    return spec_of(
        config.variant,
        model_version=f"{config.name}-{config.seed}",
        pixel_source=source,
        domain=info.domain,
        canvas=config.canvas,
        rule=config.canvas_rule,
        heads=heads,
        classes=Classes(info.classes, info.class_kind),
    )


def _teacher(config: TrainConfig, start: Start) -> tuple[AnyNetwork, Card] | None:
    if config.needs_teacher and not start.teacher:
        raise UsageError("this config learns from a teacher; give --teacher CHECKPOINT")
    if start.teacher and not config.needs_teacher:
        raise UsageError("--teacher was given, but no stage of this config learns from a teacher")
    return checkpoint.load(start.teacher) if start.teacher else None


def _announce(
    config: TrainConfig,
    stages: Mapping[str, Stage],
    reasons: Mapping[str, str | None],
    train: Arrays,
    labelled: LabelledSet,
) -> None:
    """What the run should know before it waits for hours."""
    for text in config.not_evaluated:
        say(f"note: {text} was not evaluated on gaze data")
    sources = sorted({row.pixel_source for row in labelled.rows if row.split == "train"})
    if len(sources) > 1:
        say(f"note: training films have mixed pixel sources: {', '.join(sources)}")
    for name, reason in reasons.items():
        if reason:
            say(f"stage {name} left out: {reason}")
            continue
        for loss in stages[name].loss:
            if _missing(loss, train):
                say(f"note: loss {loss} of stage {name} has no target: {_missing(loss, train)}")


def _missing(loss: str, arrays: Arrays) -> str | None:
    """What films lack for a loss, or None."""
    if loss in NEED_LABELS and not any_known(arrays.truth).any():
        return "film has a label"
    if loss in CONTRASTIVE:
        complete = arrays.truth[(arrays.truth != UNKNOWN).all(axis=1)]
        counts = np.unique(complete, axis=0, return_counts=True)[1]
        if len(counts) < 2 or counts.max() < 2:
            return "two films share a class that others do not have"
    if loss in NEED_GAZE and not arrays.has_gaze.any():
        return "film has gaze"
    return None


def _nothing_to_learn(stage: Stage, train: Arrays, val: Arrays) -> str | None:
    """Why a stage cannot run on these films, or None."""
    for arrays, split in ((train, "training"), (val, "validation")):
        missing = [_missing(loss, arrays) for loss in stage.loss]
        if all(missing):
            return f"no {split} {missing[0]}"
    return None


def _heads(stage: Stage, train: Arrays, teacher: tuple[AnyNetwork, Card] | None) -> frozenset[Head]:
    """Outputs of the network that a stage with targets teaches; a teacher's own must be taught."""
    losses = {loss for loss in stage.loss if not _missing(loss, train)}
    taught: set[Head] = set()
    sources_of: dict[Head, tuple[str, set[str]]] = {
        LOGITS: ("classifier", TEACH_DIAGNOSIS),
        LOG_DENSITY: ("saliency", TEACH_SALIENCY),
    }
    for head, (part, teach) in sources_of.items():
        knows = teacher is not None and head in teacher[1].served.heads
        sources = losses & teach if knows else losses & teach - NEED_TEACHER
        if sources and part in stage.train:
            taught.add(head)
    return frozenset(taught)
