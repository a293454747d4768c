"""A checkpoint: weights as safetensors, and beside them a JSON card that says what they are.

`NAME.safetensors` holds the state dict of `Network`; `NAME.json` the card with the ModelSpec, the
SHA-256 of the weights, how they were trained and what was measured. Nothing is ever unpickled.
"""

from __future__ import annotations

import pickle
import platform
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import model_validator
from safetensors import SafetensorError
from torch import nn

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.environment import versions
from cxrgaze.errors import CxrgazeError, IntegrityError, UsageError
from cxrgaze.evidence.seen import Seen
from cxrgaze.files import read_regular, read_verified, sha256, write_atomic
from cxrgaze.records import Record, parse_record
from cxrgaze.spec import NOTICE, Head, ModelSpec
from cxrgaze.train.model import VARIANTS, Network, network_of
from cxrgaze.train.origin import Origin
from cxrgaze.train.shipped import networks

_WEIGHTS_LIMIT = 4 << 30
_CARD_LIMIT = 16 << 20
SEEN_SUFFIX = ".seen"
UNREADABLE = (
    SafetensorError,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    IndexError,
    KeyError,
    ValueError,
    struct.error,
)
"""What reading a file of tensors raises when it is none."""


class Card(Record):
    """What the weights are, how they were made and what was measured."""

    VERSION = 1
    WHAT = "checkpoint card"
    REMEDY = "train again or use the version that wrote it"

    schema_version: int = VERSION
    notice: str = NOTICE
    name: str
    spec: ModelSpec
    weights_sha256: str
    parameters: int
    trained_on: str
    """Origin of the training films, in a sentence."""
    lineage: tuple[Origin, ...]
    """All sets that these weights descend from: initial weights, teachers, the run's own films."""
    untrained: tuple[Head, ...] = ()
    """Heads that nothing has taught; they are not served."""
    untaught: tuple[str, ...] = ()
    """Classes that nothing has taught; they are not served."""
    centre_prior: bool = False
    """Whether the network has the learnable centre prior."""
    decision: Decision = Decision()
    """Fitted on validation films."""
    seen_sha256: str = ""
    """Of the file `NAME.seen` (`cxrgaze.evidence.seen`); "" where there is none."""
    command: str
    """The one command that makes this checkpoint again."""
    config: dict[str, Any]
    results: dict[str, Any]
    """Figures on held-out films, each with its centre-prior CC; says synthetic where it is."""
    environment: dict[str, str]

    @model_validator(mode="after")
    def _all_of_it_is_of_this_network(self) -> Card:
        _ = self.served
        return self

    @property
    def served(self) -> Served:
        """What is served of the network."""
        return Served(self.spec, self.decision, self.untrained, self.untaught)

    @property
    def descent(self) -> tuple[Origin, ...]:
        """The lineage as one that goes on from these weights has to record it."""
        return tuple(
            o.model_copy(update={"weights_sha256": o.weights_sha256 or self.weights_sha256})
            for o in self.lineage
        )


def seen_by(path: Path, card: Card) -> Seen | None:
    """The films and patients that the weights `path` were trained on; None where not recorded.

    Raises:
        IntegrityError: the file beside the card is missing or altered.
    """
    if not card.seen_sha256:
        return None
    listed = path.with_suffix(SEEN_SUFFIX)
    data = read_verified(
        listed,
        listed.stat().st_size if listed.is_file() else 0,
        card.seen_sha256,
        source=path.with_suffix(".json").name,
        remedy="take the checkpoint with all its files",
    )
    return Seen.parse(data, str(listed))


def save(path: Path, network: Network, *, seen: Seen | None = None, **card: Any) -> Card:
    """Write weights to `path` and the card beside it.

    Weights that are float16 numbers (`round_to_half`) are stored as such.

    Args:
        seen: films and patients that they were trained on.
        card: fields of `Card`; schema version, hash, parameters and environment are filled in.
    """
    weights = weights_bytes(network)
    listed = seen.rendered() if seen else b""
    saved = Card(
        seen_sha256=sha256(listed) if seen else "",
        weights_sha256=sha256(weights),
        parameters=sum(p.numel() for p in network.parameters()),
        environment={
            **versions("cxrgaze", "python", "torch"),
            "machine": platform.machine(),
            "threads": str(torch.get_num_threads()),
        },
        **card,
    )
    write_atomic(path, weights)
    if seen:
        write_atomic(path.with_suffix(SEEN_SUFFIX), listed)
    write_card(path, saved)
    return saved


def write_card(path: Path, card: Card) -> None:
    """Write the card beside the weights `path`."""
    write_atomic(path.with_suffix(".json"), card.rendered())


def weights_bytes(network: nn.Module) -> bytes:
    """The state dict as safetensors, in float16 where that loses nothing."""
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    floats = {k: v for k, v in state.items() if v.is_floating_point()}
    if all(torch.equal(v.half().float(), v) for v in floats.values()):
        state |= {k: v.half() for k, v in floats.items()}
    return safetensors.torch.save(state)


def round_to_half(network: nn.Module) -> None:
    """Round every weight to the nearest float16 number, in place.

    Raises:
        CxrgazeError: a weight beyond float16's range.
    """
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
                if not torch.isfinite(tensor).all():
                    raise CxrgazeError(f"{name} is beyond float16; store float32 weights")


def load(path: Path) -> tuple[Network, Card]:
    """The network of a checkpoint, in evaluation mode, and its card.

    Raises:
        UsageError: no such file.
        IntegrityError: weights or card malformed, altered, of another schema or another variant.
    """
    card_path = path.with_suffix(".json")
    for needed in (path, card_path):
        if not needed.is_file():
            raise UsageError(
                f"{needed} does not exist; a checkpoint is NAME.safetensors + NAME.json"
            )
    card = parse_record(Card, read_regular(card_path, _CARD_LIMIT), str(card_path))
    data = read_regular(path, _WEIGHTS_LIMIT)
    if sha256(data) != card.weights_sha256:
        raise IntegrityError(f"{path}: SHA-256 differs from {card_path.name}: altered or cut short")
    try:
        weights = safetensors.torch.load(data)
    except SafetensorError as error:
        raise IntegrityError(f"{path} is not a safetensors file: {error}") from error
    if card.spec.variant not in VARIANTS:
        raise IntegrityError(
            f"{card_path}: variant {card.spec.variant!r}, this cxrgaze has {sorted(VARIANTS)}"
        )
    network = network_of(card.spec, centre_prior=card.centre_prior)
    load_weights(network, weights, str(path))
    return network.eval(), card


def load_weights(network: nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Load every tensor or none.

    Raises:
        IntegrityError: naming every tensor that is missing, foreign, of another shape, or has
            values that are no finite numbers.
    """
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    stored = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = [f"{k} is missing" for k in wanted if k not in stored]
    wrong += [f"{k} is not expected" for k in stored if k not in wanted]
    wrong += [
        f"{k} has shape {stored[k]}, expected {wanted[k]}"
        for k in wanted
        if k in stored and stored[k] != wanted[k]
    ]
    wrong += [
        f"{k} has NaN or infinite values"
        for k, value in weights.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if wrong:
        raise IntegrityError(f"{name} does not fit the network: " + "; ".join(wrong))
    network.load_state_dict(weights)


def demo_path() -> Path:
    """The demo checkpoint that ships with the package: `tiny`, trained on phantoms."""
    return networks()["demo"]
