"""One stage under Lightning's Trainer: from its state or from the start to its best epoch."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import safetensors.torch
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from cxrgaze.command import say, steps
from cxrgaze.errors import CxrgazeError, IncompatibleError, IntegrityError
from cxrgaze.files import parse_json, render_json, sha256, write_atomic
from cxrgaze.train import checkpoint
from cxrgaze.train.config import Stage, TrainConfig
from cxrgaze.train.model import AnyNetwork
from cxrgaze.train.stage_module import Films, StageModule

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
class Machine:
    """What the run may use; no part of the method."""

    accelerator: str = "auto"
    """`cpu`, `gpu`, or `auto`: a GPU where there is one."""
    devices: int = 1
    nodes: int = 1
    threads: int | None = 1
    """Torch threads of each process; none leaves torch's choice."""
    cache: Path | None = None
    """Folder for canvases, see `load_arrays`."""

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.devices * self.nodes

    @property
    def on_gpu(self) -> bool:
        """Whether training happens on a GPU."""
        return self.accelerator != "cpu" and torch.cuda.is_available()

    def check(self, config: TrainConfig) -> None:
        """Refuse what cannot be done here, before anything is written.

        Raises:
            IncompatibleError: a GPU that is not there, float16 training on a CPU.
        """
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise IncompatibleError("--accelerator gpu: torch sees no CUDA GPU here; use cpu")
        if config.precision == "16-mixed" and not self.on_gpu:
            raise IncompatibleError(
                "precision 16-mixed is for GPUs; on a CPU choose bf16-mixed or 32"
            )


def run_stage(
    network: AnyNetwork,
    stage: Stage,
    films: Films,
    run: Path,
    number: int,
    name: str,
    config: TrainConfig,
    machine: Machine,
) -> dict[str, Any]:
    """Train one stage, or take its weights from the folder; the best epoch's weights stay.

    Raises:
        CxrgazeError: a loss that is not finite, a process that was lost.
        IntegrityError: stage weights in the folder that were altered.
    """
    finished = run / "stages" / f"{number}-{name}.safetensors"
    record, state_folder = finished.with_suffix(".json"), run / "stages" / f"{number}-{name}"
    if record.is_file():
        shutil.rmtree(state_folder, ignore_errors=True)
        return _finished(network, finished, record)
    state = _State(state_folder / "last.ckpt", stage)
    rows = EpochRows(run / "epochs.csv", name, stage.epochs, state.epochs)
    module = StageModule(network, stage, films, number=number, seed=config.seed, aug=config.augment)
    best = state.best
    world: lightning.Trainer | None = None
    if not state.is_over:
        keep_best = _checkpoints(state_folder, "best", monitor="val_loss")
        callbacks: list[Callback] = [rows, keep_best, _checkpoints(state_folder, "last")]
        if stage.patience:
            callbacks.append(EarlyStopping("val_loss", patience=stage.patience))
        with _quiet():
            world = _trainer(stage, config, machine, run, f"{number}-{name}", callbacks)
            module.train()
            _fit(world, module, state.path if state.epochs else None, run, name)
        score = keep_best.best_model_score
        if score is None or not math.isfinite(float(score)):
            raise CxrgazeError(
                f"stage {name}: the loss is not finite; a lower learning_rate, clip = 1.0 or "
                "precision 32 may help"
            )
        best = Path(keep_best.best_model_path)
    kept = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "network."
    weights = {k[len(prefix) :]: v for k, v in kept.items() if k.startswith(prefix)}
    network.cpu()
    checkpoint.load_weights(network, weights, f"the best epoch of stage {name}")
    network.requires_grad_(True)
    stage_record: dict[str, Any] = {"epochs": rows.epochs, **rows.at_best}
    if world:
        world.strategy.barrier()
    if world is None or world.is_global_zero:
        data = safetensors.torch.save({k: v.contiguous() for k, v in weights.items()})
        stage_record["sha256"] = sha256(data)
        write_atomic(finished, data)
        write_atomic(record, render_json(stage_record))
        shutil.rmtree(state_folder)
    return stage_record


def _finished(network: AnyNetwork, weights: Path, record: Path) -> dict[str, Any]:
    stored = parse_json(record.read_bytes(), str(record))
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{weights}: {error.strerror}; start the run again") from error
    if sha256(data) != stored.get("sha256"):
        raise IntegrityError(f"{weights} was altered; start the run again")
    checkpoint.load_weights(network, safetensors.torch.load(data), str(weights))
    return stored


class _State:
    """What the state of an unfinished stage says, if there is one."""

    def __init__(self, path: Path, stage: Stage) -> None:
        self.path = path
        self.epochs = 0
        """Epochs that are done."""
        self.is_over = False
        """Whether no epoch is left: all are done, or the stage stopped early."""
        self.best = path.with_name("best.ckpt")
        if not path.is_file():
            return
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            self.epochs = int(content["epoch"]) + 1
            waited = [
                int(state["wait_count"])
                for key, state in content["callbacks"].items()
                if key.startswith("EarlyStopping")
            ]
        except checkpoint.UNREADABLE as error:
            raise IntegrityError(
                f"{path} cannot be read ({type(error).__name__}); delete the folder "
                f"{path.parent} to start this stage again"
            ) from error
        stopped = bool(stage.patience) and any(w >= stage.patience for w in waited)
        self.is_over = self.epochs >= stage.epochs or stopped


class _AtomicIO(TorchCheckpointIO):
    """Checkpoints written whole or not at all, on the run's own disk."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to `path`."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), buffer.getvalue())


def _checkpoints(folder: Path, filename: str, monitor: str | None = None) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=folder,
        filename=filename,
        monitor=monitor,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _trainer(
    stage: Stage,
    config: TrainConfig,
    machine: Machine,
    run: Path,
    name: str,
    callbacks: list[Callback],
) -> lightning.Trainer:
    strategy = "auto"
    if machine.processes > 1:
        # norm5 lies behind the bottleneck: no gradient reaches it from the saliency map alone.
        blind = "dense" in stage.train and not stage.on_encoder and not stage.teaches_diagnosis
        strategy = "ddp_find_unused_parameters_true" if blind else "ddp"
    try:
        return lightning.Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.nodes,
            strategy=strategy,
            plugins=[_AtomicIO()],
            sync_batchnorm=machine.on_gpu and machine.processes > 1,
            precision=config.precision,
            deterministic=config.deterministic,
            max_epochs=stage.epochs,
            gradient_clip_val=stage.clip,
            logger=TensorBoardLogger(run, name="tensorboard", version=name),
            callbacks=callbacks,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise IncompatibleError(f"Lightning: {str(error).splitlines()[0]}") from error


def _fit(
    trainer: lightning.Trainer, module: StageModule, state: Path | None, run: Path, name: str
) -> None:
    try:
        trainer.fit(module, ckpt_path=state, weights_only=True)
    except SystemExit:  # Lightning's answer to an interrupt
        say(f"interrupted in stage {name}; go on: cxrgaze-train fit SET --output {run} --resume")
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if trainer.world_size > 1 and "peer" in str(error):
            raise CxrgazeError(
                f"stage {name}: another process ended; its own message stands above. Go on with "
                "--resume"
            ) from error
        raise


class EpochRows(Callback):
    """A row an epoch in a CSV file, a line an epoch and a bar within it on standard error.

    Args:
        done: epochs of this stage that are done; later rows are of a state that was lost.
    """

    def __init__(self, path: Path, stage: str, epochs: int, done: int) -> None:
        self._path = path
        self._stage = stage
        self._of = epochs
        self._started = 0.0
        self._rows: list[dict[str, Any]] = []
        if path.is_file():
            with path.open(newline="") as file:
                before = list(csv.DictReader(file))
            self._rows = [r for r in before if r["stage"] != stage or int(r["epoch"]) <= done]

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
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        row: dict[str, Any] = {
            "stage": self._stage,
            "epoch": trainer.current_epoch + 1,
            **{key: metrics.get(key, "") for key in _COLUMNS[2:6]},
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        self._rows.append(row)
        if not trainer.is_global_zero:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomic(self._path, text.getvalue().encode())
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
