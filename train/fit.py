"""A training run: stages in their order, hand-over by name, resumable after every epoch."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from cxrgaze.bundles.manifest import Decision
from cxrgaze.command import say
from cxrgaze.errors import DataError, UsageError
from cxrgaze.evidence import heatmaps
from cxrgaze.evidence.arrays import UNLABELLED, Arrays, load_arrays
from cxrgaze.evidence.labelled_set import LabelledSet, Split
from cxrgaze.spec import ModelSpec
from cxrgaze.train import checkpoint, initial
from cxrgaze.train.config import Stage, TrainConfig
from cxrgaze.train.decision import fit_decision
from cxrgaze.train.distill import taught
from cxrgaze.train.figures import point_figures, predict
from cxrgaze.train.losses import (
    CONTRASTIVE,
    NEED_GAZE,
    NEED_LABELS,
    TEACH_DIAGNOSIS,
    TEACH_SALIENCY,
)
from cxrgaze.train.model import Network, network_of, spec_of
from cxrgaze.train.origin import Origin, check_leakage
from cxrgaze.train.run_folder import RunRecord, Start, open_run, set_hash
from cxrgaze.train.stage_module import Films
from cxrgaze.train.stage_run import Machine, run_stage


def fit(
    labelled: LabelledSet,
    config: TrainConfig,
    run: Path,
    *,
    start: Start = Start(),  # noqa: B008 - frozen
    machine: Machine = Machine(),  # noqa: B008 - frozen
    resume: bool = False,
    command: str = "",
) -> checkpoint.Card | None:
    """Train on the set's split `train`, choose on `val`; `test` is not opened.

    Args:
        run: its folder (`cxrgaze.train.run_folder`); new, or with `resume` that of the same run.
        command: to make this checkpoint again, for the card.

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
    spec = _spec(labelled, config)
    torch.manual_seed(config.seed)
    network = network_of(spec, centre_prior=config.centre_prior)
    before = initial.start(network, spec, start.init, start.origin)
    teacher = _teacher(config, start)
    origins = before.origins + (teacher[1].descent if teacher else ())
    check_leakage(labelled.info, origins, allow=start.allow_leakage)
    preset = heatmaps.PRESETS[config.heatmap]
    train, val = (
        _arrays(labelled, name, spec, preset, machine.cache, teacher) for name in ("train", "val")
    )
    reasons = {name: _nothing_to_learn(stage, train, val) for name, stage in config.stages.items()}
    if all(reasons.values()):
        raise DataError(f"{labelled.folder}: no stage has anything to learn from: {reasons}")
    first = _is_first_process()
    if first:
        record = RunRecord(
            config=config,
            start=start,
            set_origin=labelled.info.origin,
            set_sha256=set_hash(labelled),
            weights_sha256=tuple(o.weights_sha256 for o in origins),
            command=command,
        )
        command = open_run(run, record, resume).command
        _announce(config, reasons, train, labelled)
    gazed = train.densities[train.has_gaze, 0]
    prior = heatmaps.centre_prior(gazed) if len(gazed) else None
    if network.prior and prior is not None:
        network.prior.start_from(torch.from_numpy(prior))
    done, taught_heads = {}, before.trained_heads
    for number, (name, stage) in enumerate(config.stages.items(), 1):
        if reasons[name]:
            done[name] = {"left_out": reasons[name]}
            continue
        done[name] = run_stage(
            network, stage, Films(train, val), run, number, name, config, machine
        )
        taught_heads |= _heads(stage, train)
    if not first:
        return None
    if config.store == "float16":
        checkpoint.round_to_half(network)
    untrained = tuple(head for head in ("logits", "log_density") if head not in taught_heads)
    for head in untrained:
        say(f"note: nothing taught the output {head}; every reading of this network will say so")
    return checkpoint.save(
        run / f"{config.name}.safetensors",
        network,
        name=config.name,
        spec=spec,
        trained_on=labelled.info.origin,
        lineage=(*origins, Origin.of_set(labelled.info)),
        centre_prior=config.centre_prior,
        untrained=untrained,
        decision=_decision(network, val, spec, config),
        command=command,
        config=config.model_dump(mode="json"),
        results={
            "stages": done,
            "validation": point_figures(network, val, prior, preset, spec.class_names),
            "not_evaluated_on_gaze_data": list(config.not_evaluated),
        },
    )


def _arrays(
    labelled: LabelledSet,
    split: Split,
    spec: ModelSpec,
    preset: heatmaps.HeatmapPreset,
    cache: Path | None,
    teacher: tuple[Network, checkpoint.Card] | None,
) -> Arrays:
    """The films of one split, with the teacher's answers where there is one."""
    part = labelled.split(split)
    if not part.rows:
        raise DataError(f"{labelled.folder}: no films in split {split}; prepare makes one")
    arrays = load_arrays(part, spec, preset, cache)
    return taught(arrays, part, teacher[0], teacher[1].spec) if teacher else arrays


def _decision(network: Network, val: Arrays, spec: ModelSpec, config: TrainConfig) -> Decision:
    """Temperature and operating points from the labelled validation films."""
    logits, _ = predict(network, val.images)
    has_label = val.labels != UNLABELLED
    return fit_decision(
        logits[has_label], val.labels[has_label], spec.class_names, config.operating_sensitivity
    )


def _is_first_process() -> bool:
    """Whether this is process 0 of all, as Lightning reads it from the environment."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def _spec(labelled: LabelledSet, config: TrainConfig) -> ModelSpec:
    sources = [row.pixel_source for row in labelled.rows if row.split == "train"] or ["array"]
    return spec_of(
        config.variant,
        model_version=f"{config.name}-{config.seed}",
        pixel_source=max(sorted(set(sources)), key=sources.count),
        domain=labelled.info.domain,
        canvas=config.canvas,
    )


def _teacher(config: TrainConfig, start: Start) -> tuple[Network, checkpoint.Card] | None:
    if config.needs_teacher and not start.teacher:
        raise UsageError("this config learns from a teacher; give --teacher CHECKPOINT")
    if start.teacher and not config.needs_teacher:
        raise UsageError("--teacher was given, but no stage of this config learns from a teacher")
    return checkpoint.load(start.teacher) if start.teacher else None


def _announce(
    config: TrainConfig, reasons: dict[str, str | None], train: Arrays, labelled: LabelledSet
) -> None:
    """What the run should know before it waits for hours."""
    for text in config.not_evaluated:
        say(f"note: {text} was not evaluated on gaze data")
    sources = sorted({row.pixel_source for row in labelled.rows if row.split == "train"})
    if len(sources) > 1:
        say(f"note: training films have mixed pixel sources: {', '.join(sources)}")
    for name, stage in config.stages.items():
        if reasons[name]:
            say(f"stage {name} left out: {reasons[name]}")
            continue
        for loss in stage.loss:
            if _missing(loss, train):
                say(f"note: loss {loss} of stage {name} has no target: {_missing(loss, train)}")


def _missing(loss: str, arrays: Arrays) -> str | None:
    """What films lack for a loss, or None."""
    labels = arrays.labels[arrays.labels != UNLABELLED]
    if loss in NEED_LABELS and not len(labels):
        return "film has a label"
    if loss in CONTRASTIVE:
        counts = [int((labels == c).sum()) for c in set(labels.tolist())]
        if len(counts) < 2 or max(counts) < 2:
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


def _heads(stage: Stage, train: Arrays) -> frozenset[str]:
    """Outputs of the network that a stage with targets has taught."""
    losses = {loss for loss in stage.loss if not _missing(loss, train)}
    heads = set()
    if losses & TEACH_DIAGNOSIS and "classifier" in stage.train:
        heads.add("logits")
    if losses & TEACH_SALIENCY and "saliency" in stage.train:
        heads.add("log_density")
    return frozenset(heads)
