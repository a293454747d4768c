"""One training stage as a LightningModule: what learns, on which loss, in which order of films.

Everything random in an epoch is drawn from (seed, stage, epoch), so that a resumed run is the
uninterrupted one. Losses are divided by counts that are reduced over all processes, so that two
processes with batch b take the step of one with 2b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cxrgaze.bundles.served import Served
from cxrgaze.errors import DataError
from cxrgaze.evidence import metrics
from cxrgaze.evidence.arrays import Arrays
from cxrgaze.evidence.truth import HAS, Truth, any_known, present_classes
from cxrgaze.spec import LOG_DENSITY, LOGITS, ModelSpec
from cxrgaze.train.augment import augmented
from cxrgaze.train.config import Augment, Stage
from cxrgaze.train.layers import HeadTensors
from cxrgaze.train.losses import (
    CONTRASTIVE,
    CRITERIA,
    ENCODER,
    NEED_GAZE,
    NEED_LABELS,
    Batch,
    film_loss,
)
from cxrgaze.train.model import AnyNetwork, DenseEncoder, Network

_CONTRAST_CHUNK = 64  # validation films per contrastive loss


@dataclass(frozen=True)
class Films:
    """Training and validation films of a run, on the canvas and in the classes of its spec."""

    train: Arrays
    val: Arrays
    spec: ModelSpec


class StageModule(lightning.LightningModule):
    """A network in one stage.

    Args:
        network: learns in place.
        number: of the stage in the run, from 1; part of the random stream.
        seed: of the run.

    After each epoch, the trainer's callback metrics hold `train_loss`, `val_loss` and, where the
    stage has them, `val_auc` (macro over the classes of the validation films) and `val_cc`.
    """

    def __init__(
        self,
        network: AnyNetwork,
        stage: Stage,
        films: Films,
        *,
        number: int,
        seed: int,
        aug: Augment,
    ) -> None:
        super().__init__()
        self.network = network
        self.stage = stage
        self._films = films
        self._stream = (seed, number)
        self._augment = aug
        self._seen: list[tuple[Tensor, ...]] = []
        torch.manual_seed(_seed_of(*self._stream))
        learning = [module for part in stage.train for module in network.parts()[part]]
        frozen = [m for ms in network.parts().values() for m in ms if m not in learning]
        self._still: list[nn.Module] = list(frozen)
        if stage.freeze_batch_norm:
            self._still += [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        network.requires_grad_(True)
        for module in frozen:
            module.requires_grad_(False)
        self.head: nn.Linear | None = None
        if set(stage.loss) & set(ENCODER):
            self.head = nn.Linear(self._dense.out_channels, network.classes)
        self.log_sigma = nn.Parameter(torch.zeros(())) if stage.weighting == "uncertainty" else None

    def train(self, mode: bool = True) -> StageModule:
        """Training mode for what learns; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    @property
    def _dense(self) -> DenseEncoder:
        """The part that the losses on the embedding teach; a config names it for no other."""
        assert isinstance(self.network, Network)
        return self.network.dense

    # Data ------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches of the current epoch; asked for again in every epoch."""
        order = self._order(np.random.default_rng([*self._stream, self.current_epoch]))
        together = self.stage.batch * self.trainer.world_size
        together = min(together, len(order) // self.trainer.world_size * self.trainer.world_size)
        if not together or together // self.trainer.world_size < 2:
            raise DataError(
                f"{len(order)} training films for {self.trainer.world_size} processes: expected at "
                "least two films for each"
            )
        steps = [order[i : i + together] for i in range(0, len(order), together)]
        mine = [
            step[self.trainer.global_rank :: self.trainer.world_size]
            for step in steps
            if len(step) == together  # the rest comes first or last in another epoch's order
        ]
        return DataLoader(_Batches(self._films.train, mine), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        """This process's share of the validation films, padded so that all have as many."""
        count, world = len(self._films.val.films), self.trainer.world_size
        padded = np.resize(np.arange(count), -(-count // world) * world)
        mine = padded[self.trainer.global_rank :: world]
        size = self.stage.batch
        shares = [mine[i : i + size] for i in range(0, len(mine), size)]
        return DataLoader(_Batches(self._films.val, shares), batch_size=None)

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        truth = self._films.train.truth
        useful = np.ones(len(truth), dtype=bool)
        if set(self.stage.loss) <= NEED_LABELS:
            useful = any_known(truth)
        elif set(self.stage.loss) <= NEED_GAZE:
            useful = self._films.train.has_gaze
        index = np.flatnonzero(useful)
        if not self.stage.balanced:
            return rng.permutation(index)
        return rng.choice(index, size=len(index), p=balanced_shares(truth[index]))

    # Steps -----------------------------------------------------------------------------------

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss over the films of all processes."""
        # Dropout and augmentation are drawn from the step's own seed: the state of torch's random
        # numbers is not the same after a resumption.
        where = (self.current_epoch, index, self.trainer.global_rank)
        torch.manual_seed(_seed_of(*self._stream, *where))
        if self._augment.any:
            maps = [batch.density, batch.teacher_density]
            image, (density, teacher) = augmented(batch.image, maps, self._augment)
            batch = batch._replace(image=image, density=density, teacher_density=teacher)
        batch = self._shrunk(batch)
        embedding, out = self._forward(batch)
        terms = {}
        for name in self.stage.loss:
            if name in CONTRASTIVE:
                rows = self._gathered(embedding, grad=True)
                # Every process computes the same value; the gathering adds up the gradients.
                terms[name] = CONTRASTIVE[name](rows, self._gathered(batch.truth))
            else:
                value, counts = film_loss(name, self._films.spec.class_kind)(out, batch)
                total = self._summed(counts.sum()).clamp(min=1)
                terms[name] = value.sum() * self.trainer.world_size / total
        loss = self._combined(terms)
        shown = loss.detach()
        if not set(self.stage.loss) <= set(CONTRASTIVE):
            shown = self._summed(shown) / self.trainer.world_size
        self.log("train_loss", shown, on_step=False, on_epoch=True, batch_size=len(batch.film))
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        """Collect what the end of the epoch needs of every film."""
        batch = self._shrunk(batch)
        embedding, out = self._forward(batch)
        columns: list[Tensor] = [batch.film]
        for name in self.stage.loss:
            if name not in CONTRASTIVE:
                columns += film_loss(name, self._films.spec.class_kind)(out, batch)
        columns.append(self._correlations(batch, out))
        nothing = batch.image.new_zeros(len(batch.image), 0)
        only_embedding = self.stage.on_encoder and self.head is None
        rest = embedding if only_embedding else out.get(LOGITS, nothing)
        self._seen.append((torch.stack([c.double() for c in columns], dim=1), rest.float()))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all films of all processes, each film once."""
        table, rest = (self._gathered(torch.cat(parts)) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        films, first = np.unique(table[:, 0].cpu().numpy(), return_index=True)  # in their order
        table, rest = table[first], rest[first]
        truth = self._films.val.truth[films.astype(int)]
        correlations = table[:, -1].cpu().numpy()
        terms, column = {}, 1
        for name in self.stage.loss:
            if name in CONTRASTIVE:
                known = torch.from_numpy(truth).to(rest.device)
                terms[name] = in_chunks(name, rest, known, self._stream[0])
            else:
                terms[name] = table[:, column].sum() / table[:, column + 1].sum().clamp(min=1)
                column += 2
        shown = {"val_loss": self._combined(terms)}
        if self.head is not None or self.stage.teaches_diagnosis:
            shown["val_auc"] = torch.tensor(_macro_auc(rest, truth, self._films.spec))
        if not np.isnan(correlations).all():
            shown["val_cc"] = torch.tensor(np.nanmean(correlations))
        if np.isnan(float(shown.get("val_auc", 0))):
            del shown["val_auc"]  # validation films of one class alone, or a network gone astray
        for name, value in shown.items():
            self.log(name, value.float().to(self.device), sync_dist=True)  # the same everywhere

    def _forward(self, batch: Batch) -> tuple[Tensor, HeadTensors]:
        """Embedding and outputs; a stage on the encoder alone spares the rest of the network."""
        nothing = batch.image.new_zeros(len(batch.image), 0)
        if self.stage.on_encoder:
            embedding = self._dense(batch.image).embedding
            return embedding, {LOGITS: self.head(embedding)} if self.head else {}
        return nothing, self.network(batch.image)

    def _shrunk(self, batch: Batch) -> Batch:
        if self.stage.shrink == 1:
            return batch
        side = self.stage.shrink
        # A density's mean times the square's pixels is its sum again.
        density = F.avg_pool2d(batch.density, side) * side**2
        teacher = batch.teacher_density
        teacher = F.avg_pool2d(teacher, side) * side**2 if teacher.ndim == 4 else teacher
        image = F.avg_pool2d(batch.image, side)
        return batch._replace(image=image, density=density, teacher_density=teacher)

    def _combined(self, terms: dict[str, Tensor]) -> Tensor:
        if self.log_sigma is not None:
            # docs/method.md#uncertainty-weighting: s_c = exp(a), s_s = 1.
            sigma = self.log_sigma.exp()
            diagnosis = terms["cross_entropy"] / sigma**2 + torch.log1p(sigma)
            return diagnosis + terms["saliency_kl"] / 2 + float(np.log(2))
        return torch.stack([self.stage.loss[k] * terms[k] for k in terms]).sum()

    def _correlations(self, batch: Batch, out: HeadTensors) -> Tensor:
        """CC over the film's area where there is gaze and the stage teaches the map; else NaN."""
        correlations = torch.full((len(batch.film),), torch.nan, dtype=torch.float64)
        if "saliency" in self.stage.train and self.stage.shrink == 1:
            arrays = self._films.val
            maps = out[LOG_DENSITY].float().exp().cpu().numpy()
            for row, film in enumerate(batch.film.tolist()):
                crop = arrays.geometries[film].crop
                if arrays.densities[film].any():
                    truth = crop(arrays.densities[film, 0])
                    correlations[row] = metrics.cc(crop(maps[row, 0]), truth)
        return correlations.to(batch.image.device)

    # Optimisation ----------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The stage's optimizer and schedule."""
        stage = self.stage
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[stage.optimizer]
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = kind(learning, lr=stage.learning_rate, weight_decay=stage.weight_decay)
        if stage.schedule == "one_cycle":
            cycle = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=stage.learning_rate,
                total_steps=int(self.trainer.estimated_stepping_batches),
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": cycle, "interval": "step"},
            }
        if stage.schedule == "plateau":
            self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=0.1, patience=stage.plateau_patience
            )
            scheduler = {"scheduler": self._plateau, "monitor": "val_loss", "interval": "epoch"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        return {"optimizer": optimizer}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step per-step schedules; the plateau is stepped by `on_train_epoch_end`."""
        if metric is None:
            scheduler.step()

    def on_train_epoch_end(self) -> None:
        """Step the plateau before the epoch's checkpoint is written, not after it.

        Lightning would do it after, and a resumed run would have lost that step.
        """
        if self.stage.schedule == "plateau":
            self._plateau.step(self.trainer.callback_metrics["val_loss"])

    # Processes -------------------------------------------------------------------------------

    def _gathered(self, rows: Tensor, grad: bool = False) -> Tensor:
        """Rows of all processes, those of process 0 first; gradients are summed over them."""
        if self.trainer.world_size == 1:
            return rows
        return self.all_gather(rows, sync_grads=grad).flatten(0, 1)  # type: ignore[union-attr]

    def _summed(self, value: Tensor) -> Tensor:
        return self._gathered(value[None]).sum() if self.trainer.world_size > 1 else value


class _Batches(Dataset[Batch]):
    """Batches of given films."""

    def __init__(self, arrays: Arrays, films: list[NDArray[np.int64]]) -> None:
        self._arrays = arrays
        self._films = films

    def __len__(self) -> int:
        return len(self._films)

    def __getitem__(self, number: int) -> Batch:
        arrays, films = self._arrays, self._films[number]
        nothing = np.zeros((len(films), 0), dtype=np.float32)
        logits, densities = arrays.teacher_logits, arrays.teacher_densities
        columns = (
            films,
            arrays.images[films],
            arrays.truth[films],
            arrays.densities[films],
            nothing if logits is None else logits[films],
            nothing if densities is None else densities[films],
        )
        # A copy in C order: torch takes the strides of an axis of length one at their word, and
        # picks another convolution, with other rounding, by them.
        return Batch(*(torch.from_numpy(np.array(c, order="C")) for c in columns))


def balanced_shares(truth: Truth) -> NDArray[np.float64]:
    """How often films are drawn, `(n,)`, sum 1, so that every class is as frequent as the others.

    A film counts for each class that it has; those that have none, or of which nothing is known,
    are a class of their own.
    """
    has = truth == HAS
    groups = np.column_stack([has, ~has.any(axis=1)])
    counts = groups.sum(axis=0)
    there = counts > 0
    weights = (groups[:, there] / counts[there]).sum(axis=1)
    return np.asarray(weights / there.sum())


def in_chunks(name: str, rows: Tensor, truth: Tensor, seed: int) -> Tensor:
    """Criterion of a contrastive loss over chunks of the films in one fixed shuffled order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows))).to(rows.device)
    parts = [CRITERIA[name](rows[i], truth[i]) for i in order.split(_CONTRAST_CHUNK)]
    totals, counts = zip(*parts, strict=True)
    return torch.stack(totals).sum() / torch.stack(counts).sum().clamp(min=1)


def _macro_auc(logits: Tensor, truth: Truth, spec: ModelSpec) -> float:
    """Macro AUC over the classes that have films with and without them; NaN if there is none."""
    if not torch.isfinite(logits).all() or not present_classes(truth):
        return float("nan")
    return metrics.macro_auc(Served(spec).probabilities(logits.cpu().numpy()), truth)


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
