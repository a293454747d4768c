"""A training run: stages in their order, hand-over by name, resumable after every epoch.

RUN/config.toml           the resolved config
RUN/run.json              what the run was started from; a resumed run must be the same
RUN/epochs.csv            a row an epoch: losses, validation AUC and CC, learning rate
RUN/tensorboard/          the same for TensorBoard
RUN/stages/               weights after each finished stage; the running stage's state
RUN/NAME.safetensors      the checkpoint, and NAME.json its card
"""

from __future__ import annotations

import contextlib
import csv
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import safetensors.torch
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from cxrgaze import heatmaps
from cxrgaze.command import say, steps
from cxrgaze.errors import CxrgazeError, DataError, UsageError
from cxrgaze.files import make_output_folder, parse_json, render_json, sha256, write_atomic
from cxrgaze.samples import LabelledSet
from cxrgaze.spec import ModelSpec
from cxrgaze.train import checkpoint, initial
from cxrgaze.train.calibrate import fit_decision
from cxrgaze.train.config import Stage, TrainConfig, load_config, render_config
from cxrgaze.train.dataset import UNLABELLED, load_arrays
from cxrgaze.train.distill import taught
from cxrgaze.train.evaluate import evaluate, predict
from cxrgaze.train.losses import NEED_GAZE, NEED_LABELS
from cxrgaze.train.model import Network, network_of, spec_of
from cxrgaze.train.origin import Origin, check_leakage
from cxrgaze.train.stage import Films, StageModule

_COLUMNS = (
    "stage",
    "epoch",
    "train_loss",
    "val_loss",
    "val_auc",
    "val_cc",
    "learning_rate",
    "seconds",
)


@dataclass(frozen=True)
class Start:
    """Where weights come from."""

    init: str = "random"
    """`random`, `imagenet` or a file (`cxrgaze.train.initial`)."""
    origin: str = ""
    """What a file without a card was trained on."""
    teacher: Path | None = None
    """Checkpoint of a teacher, for losses that need one."""
    allow_leakage: bool = False


@dataclass(frozen=True)
class Machine:
    """What the run may use; no part of the method."""

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    threads: int | None = 1
    """Torch threads of each process; none leaves torch's choice."""
    cache: Path | None = None
    """Folder for canvases, see `load_arrays`."""


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
        run: the run's folder; new, or with `resume` that of the same run.
        command: to make this checkpoint again, for the card.

    Returns:
        The card of the checkpoint `RUN/NAME.safetensors`; None in all processes but the first.

    Raises:
        UsageError: a folder that holds another run, a missing teacher.
        DataError: no training or validation films, possible leakage, nothing to learn from.
        CxrgazeError: a loss that is not finite.
    """
    if machine.threads:
        torch.set_num_threads(machine.threads)
    spec = _spec(labelled, config)
    torch.manual_seed(config.seed)
    network = network_of(spec, centre_prior=config.centre_prior)
    origins = initial.start(network, spec, start.init, start.origin)
    teacher = _teacher(config, start)
    if teacher:
        origins += tuple(
            o.model_copy(update={"weights_sha256": o.weights_sha256 or teacher[1].weights_sha256})
            for o in teacher[1].lineage
        )
    check_leakage(labelled.info, origins, allow=start.allow_leakage)
    identity = {
        "config": config.model_dump(mode="json"),
        "split_sha256": labelled.info.split_sha256,
        "set": labelled.info.origin,
        "init": start.init,
        "teacher_sha256": teacher[1].weights_sha256 if teacher else "",
    }
    first = _is_first_process()
    if first:
        _open_run(run, config, identity, resume)
        for text in config.not_evaluated:
            say(f"note: {text} was not evaluated on gaze data")
    preset = heatmaps.PRESETS[config.heatmap]
    splits = {name: labelled.split(name) for name in ("train", "val")}
    for name, part in splits.items():
        if not part.rows:
            raise DataError(f"{labelled.folder}: no films in split {name}; prepare makes one")
    arrays = {k: load_arrays(part, spec, preset, machine.cache) for k, part in splits.items()}
    if teacher:
        arrays = {k: taught(a, splits[k], teacher[0], teacher[1].spec) for k, a in arrays.items()}
    films = Films(arrays["train"], arrays["val"])
    gazed = films.train.densities[films.train.has_gaze, 0]
    prior = heatmaps.centre_prior(gazed) if len(gazed) else None
    if network.prior and prior is not None:
        network.prior.start_from(torch.from_numpy(prior))
    done = {}
    for number, (name, stage) in enumerate(config.stages.items(), 1):
        note = _nothing_to_learn(stage, films)
        if note:
            say(f"stage {name} left out: {note}")
            done[name] = {"left_out": note}
            continue
        done[name] = _run_stage(network, stage, films, run, number, name, config, machine)
    if all("left_out" in made for made in done.values()):
        raise DataError(f"{labelled.folder}: no stage has anything to learn from: {done}")
    if not first:
        return None
    if config.store == "float16":
        checkpoint.round_to_half(network)
    logits, _ = predict(network, films.val.images)
    known = films.val.labels != UNLABELLED
    decision = fit_decision(
        logits[known], films.val.labels[known], spec.class_names, config.operating_sensitivity
    )
    return checkpoint.save(
        run / f"{config.name}.safetensors",
        network,
        name=config.name,
        spec=spec,
        trained_on=labelled.info.origin,
        lineage=(
            *origins,
            Origin(trained_on=labelled.info.origin, split_sha256=labelled.info.split_sha256),
        ),
        centre_prior=config.centre_prior,
        decision=decision,
        command=command,
        config=config.model_dump(mode="json"),
        results={
            "stages": done,
            "validation": evaluate(network, films.val, prior, preset, spec.class_names),
            "not_evaluated_on_gaze_data": list(config.not_evaluated),
        },
    )


def _is_first_process() -> bool:
    """Whether this is process 0 of all, as Lightning reads it from the environment."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def _spec(labelled: LabelledSet, config: TrainConfig) -> ModelSpec:
    sources = [row.pixel_source for row in labelled.rows]
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


def _open_run(run: Path, config: TrainConfig, identity: Mapping[str, Any], resume: bool) -> None:
    record = run / "run.json"
    if resume:
        if not record.is_file():
            raise UsageError(f"{run} holds no run that could be resumed: it has no run.json")
        before = parse_json(record.read_bytes(), str(record))
        changed = [key for key in identity if before.get(key) != identity[key]]
        if changed:
            raise UsageError(
                f"{run} was started with another {', '.join(changed)}; resume it as it was "
                f"started (its config is {run / 'config.toml'}), or start another run"
            )
        return
    if run.exists() and any(run.iterdir()):
        raise UsageError(f"{run} is not empty; give --resume to go on, or another --output")
    make_output_folder(run)
    write_atomic(run / "config.toml", render_config(config))
    write_atomic(record, render_json(identity))


def resumed_config(run: Path) -> TrainConfig:
    """The config that a run's folder was started with.

    Raises:
        UsageError: it holds no run.
    """
    if not (run / "config.toml").is_file():
        raise UsageError(f"{run} holds no run that could be resumed: it has no config.toml")
    return load_config(str(run / "config.toml"))


def _nothing_to_learn(stage: Stage, films: Films) -> str | None:
    """Why a stage cannot run on these films, or None."""
    names = set(stage.loss)
    for arrays, split in ((films.train, "training"), (films.val, "validation")):
        if names <= NEED_LABELS and not (arrays.labels != UNLABELLED).any():
            return f"no {split} film has a label"
        if names <= NEED_GAZE and not arrays.has_gaze.any():
            return f"no {split} film has gaze"
    return None


def _run_stage(
    network: Network,
    stage: Stage,
    films: Films,
    run: Path,
    number: int,
    name: str,
    config: TrainConfig,
    machine: Machine,
) -> dict[str, Any]:
    """Train one stage, or take its weights from the folder; the best epoch's weights stay."""
    finished = run / "stages" / f"{number}-{name}.safetensors"
    record = finished.with_suffix(".json")
    if record.is_file():
        data = finished.read_bytes()
        made = parse_json(record.read_bytes(), str(record))
        if sha256(data) != made["sha256"]:
            raise DataError(f"{finished} was altered; start the run again")
        checkpoint.load_weights(network, safetensors.torch.load(data), str(finished))
        return made
    state = run / "stages" / f"{number}-{name}"
    module = StageModule(network, stage, films, number=number, seed=config.seed, aug=config.augment)
    best = ModelCheckpoint(
        dirpath=state,
        filename="best",
        monitor="val_loss",
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    rows = _EpochRows(run / "epochs.csv", name, stage.epochs)
    callbacks: list[Callback] = [rows, best]
    if stage.patience:
        callbacks.append(EarlyStopping("val_loss", patience=stage.patience))
    last = state / "last.ckpt"
    with _quiet():
        trainer = lightning.Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.nodes,
            strategy="ddp" if machine.devices * machine.nodes > 1 else "auto",
            sync_batchnorm=machine.accelerator != "cpu" and machine.devices * machine.nodes > 1,
            precision=config.precision,
            deterministic=config.deterministic,
            max_epochs=stage.epochs,
            gradient_clip_val=stage.clip,
            logger=TensorBoardLogger(run, name="tensorboard", version=f"{number}-{name}"),
            callbacks=callbacks,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module.train()
        try:
            trainer.fit(module, ckpt_path=last if last.is_file() else None, weights_only=True)
        except SystemExit:  # Lightning's answer to an interrupt
            say(f"interrupted in stage {name}; go on with: --output {run} --resume")
            raise KeyboardInterrupt from None
        trainer.strategy.barrier()
    if not best.best_model_path or not np.isfinite(float(best.best_model_score or np.nan)):
        raise CxrgazeError(
            f"stage {name}: the loss is not finite; a lower learning_rate, clip = 1.0 or "
            "precision 32 may help"
        )
    kept = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "network."
    weights = {k[len(prefix) :]: v for k, v in kept.items() if k.startswith(prefix)}
    network.cpu()
    checkpoint.load_weights(network, weights, f"the best epoch of stage {name}")
    network.requires_grad_(True)
    trainer.strategy.barrier()
    made = {"epochs": rows.epochs, **rows.at_best}
    if trainer.is_global_zero:
        data = safetensors.torch.save({k: v.contiguous() for k, v in weights.items()})
        made["sha256"] = sha256(data)
        write_atomic(finished, data)
        write_atomic(record, render_json(made))
        shutil.rmtree(state)
    return made


class _EpochRows(Callback):
    """A row an epoch in a CSV file, a line an epoch and a bar within it on standard error."""

    def __init__(self, path: Path, stage: str, epochs: int) -> None:
        self._path = path
        self._stage = stage
        self._of = epochs
        self._started = 0.0
        self._rows: list[dict[str, Any]] = []

    @property
    def epochs(self) -> int:
        """Epochs of this stage so far, those before a resumption too."""
        return sum(row["stage"] == self._stage for row in self._rows)

    @property
    def at_best(self) -> dict[str, float]:
        """Validation figures of the epoch with the lowest validation loss."""
        mine = [row for row in self._rows if row["stage"] == self._stage]
        best = min(mine, key=lambda row: float(row["val_loss"]))
        keys = ("val_loss", "val_auc", "val_cc")
        return {key: float(best[key]) for key in keys if best[key] != ""}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        """Read the rows of earlier epochs; those after the state that is resumed from go."""
        if self._path.is_file():
            with self._path.open(newline="") as file:
                before = list(csv.DictReader(file))
            first = trainer.current_epoch + 1
            self._rows = [r for r in before if r["stage"] != self._stage or int(r["epoch"]) < first]
            trainer.strategy.barrier()

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: Any) -> None:
        """Start the clock and the bar."""
        self._started = time.perf_counter()
        self._bar = steps(trainer.num_training_batches, trainer.is_global_zero)

    def on_train_batch_end(self, *anything: Any) -> None:
        """A step further."""
        self._bar.update()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Write the epoch's row."""
        self._bar.close()
        found = {k: float(v) for k, v in trainer.callback_metrics.items()}
        row: dict[str, Any] = {
            "stage": self._stage,
            "epoch": trainer.current_epoch + 1,
            **{key: found.get(key, "") for key in _COLUMNS[2:6]},
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        self._rows.append(row)
        if not trainer.is_global_zero:
            return
        with self._path.with_suffix(".part").open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)
        self._path.with_suffix(".part").replace(self._path)
        shown = [f"{key} {row[key]:.3f}" for key in _COLUMNS[2:6] if row[key] != ""]
        say(
            f"  {self._stage} {row['epoch']}/{self._of}: {', '.join(shown)} "
            f"({row['seconds']:.1f} s)"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its hints; errors pass."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", ".*lightning.*")
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", "Grad strides do not match")
            warnings.filterwarnings("ignore", ".*heckpoint directory.*exists.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
