"""A checkpoint: weights as safetensors, and beside them a JSON card that says what they are.

`NAME.safetensors` holds the state dict of `Network`; `NAME.json` the card with the ModelSpec, the
SHA-256 of the weights, how they were trained and what was measured, `NAME.card.md` and
`NAME.card.html` the same to read; `NAME.seen` and `NAME.prior` what of the training films is kept.
Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import pickle
import platform
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from cxrgaze.bundles import npz
from cxrgaze.environment import versions
from cxrgaze.errors import CxrgazeError, IntegrityError, UsageError
from cxrgaze.evidence.seen import Seen
from cxrgaze.files import read_regular, read_verified, sha256, write_atomic
from cxrgaze.records import parse_record
from cxrgaze.spec import ModelSpec
from cxrgaze.train import card_page
from cxrgaze.train.card import Card
from cxrgaze.train.model import VARIANTS, AnyNetwork, network_of, require_stride
from cxrgaze.train.shipped import networks

_WEIGHTS_LIMIT = 4 << 30
_CARD_LIMIT = 16 << 20
SEEN_SUFFIX = ".seen"
PRIOR_SUFFIX = ".prior"
_PRIOR = "centre_prior"
UNREADABLE = (
    SafetensorError,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    IndexError,
    KeyError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)
"""What reading a file of tensors raises when it is none."""


def seen_by(path: Path, card: Card) -> Seen | None:
    """The films and patients that the weights `path` were trained on; None where not recorded.

    Raises:
        IntegrityError: the file beside the card is missing or altered.
    """
    data = _beside(path, SEEN_SUFFIX, card.seen_sha256)
    return Seen.parse(data, str(path.with_suffix(SEEN_SUFFIX))) if data else None


def prior_of(path: Path, card: Card) -> NDArray[np.float32] | None:
    """The centre prior `(H, W)` of the films that the weights were trained on; None without gaze.

    Raises:
        IntegrityError: the file beside the card is missing or altered.
    """
    data = prior_bytes(path, card)
    return read_prior(data, card.spec, str(path.with_suffix(PRIOR_SUFFIX))) if data else None


def prior_bytes(path: Path, card: Card) -> bytes:
    """The file of `prior_of`, verified; empty where there is none."""
    return _beside(path, PRIOR_SUFFIX, card.prior_sha256)


def read_prior(data: bytes, spec: ModelSpec, where: str) -> NDArray[np.float32]:
    """The centre prior in the bytes of its file.

    Raises:
        IntegrityError: it is none on the network's canvas.
    """
    shape = (spec.height, spec.width)
    return npz.read(data, {_PRIOR: (np.dtype(np.float32), shape)}, where)[_PRIOR]


def _beside(path: Path, suffix: str, expected: str) -> bytes:
    """A verified file beside a card, empty where there is none."""
    if not expected:
        return b""
    listed = path.with_suffix(suffix)
    return read_verified(
        listed,
        listed.stat().st_size if listed.is_file() else 0,
        expected,
        source=path.with_suffix(".json").name,
        remedy="take the checkpoint with all its files",
    )


def save(
    path: Path,
    network: AnyNetwork,
    *,
    seen: Seen | None = None,
    prior: NDArray[np.float32] | None = None,
    **card: Any,
) -> Card:
    """Write weights to `path` and the card beside it.

    Weights that are float16 numbers (`round_to_half`) are stored as such.

    Args:
        seen: films and patients that they were trained on.
        prior: centre prior `(H, W)` of the films that they were trained on.
        card: fields of `Card`; schema version, hash, parameters and environment are filled in.
    """
    weights = weights_bytes(network)
    beside = {SEEN_SUFFIX: seen.rendered()} if seen else {}
    if prior is not None:
        beside[PRIOR_SUFFIX] = npz.written({_PRIOR: prior})
    hashes = {suffix: sha256(data) for suffix, data in beside.items()}
    saved = Card(
        seen_sha256=hashes.get(SEEN_SUFFIX, ""),
        prior_sha256=hashes.get(PRIOR_SUFFIX, ""),
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
    for suffix, data in beside.items():
        write_atomic(path.with_suffix(suffix), data)
    write_card(path, saved)
    return saved


def write_card(path: Path, card: Card) -> None:
    """Write the card and its pages beside the weights `path`."""
    write_atomic(path.with_suffix(".json"), card.rendered())
    for name, page in card_page.pages(card, f"{path.stem}.card").items():
        write_atomic(path.with_name(name), page)


def read_card(path: Path) -> Card:
    """The card beside the weights `path`.

    Raises:
        UsageError: no such file. IntegrityError: malformed, or of another schema version.
    """
    card_path = path.with_suffix(".json")
    for needed in (path, card_path):
        if not needed.is_file():
            raise UsageError(
                f"{needed} does not exist; a checkpoint is NAME.safetensors + NAME.json"
            )
    return parse_record(Card, read_regular(card_path, _CARD_LIMIT), str(card_path))


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


def load(path: Path) -> tuple[AnyNetwork, Card]:
    """The network of a checkpoint, in evaluation mode, and its card.

    Raises:
        UsageError: no such file.
        IntegrityError: weights or card malformed, altered, of another schema or another variant.
    """
    card, card_path = read_card(path), path.with_suffix(".json")
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
    try:
        require_stride(card.spec.height, card.spec.width)
    except ValueError as error:
        raise IntegrityError(f"{card_path}: {error}") from error
    network = network_of(card.spec, centre_prior=card.centre_prior)
    load_weights(network, weights, str(path))
    return network.eval(), card


def read_tensors(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors or a torch file, or those in it called "state_dict".

    Nothing is unpickled but tensors.

    Raises:
        IntegrityError: neither, or something else than plain tensors by name.
    """
    try:
        if data.startswith(b"PK"):
            _require_not_packed(data)
        if not data.startswith((b"PK", b"\x80")):
            return safetensors.torch.load(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats: what counts is the content
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise IntegrityError(f"{name} holds no tensors that can be read: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # as trainers keep it, beside their own state
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(t, torch.Tensor) and _is_plain(t)
        for k, t in content.items()
    ):
        raise IntegrityError(f"{name}: expected a state dict, plain tensors by name")
    return content


def _require_not_packed(data: bytes) -> None:
    """Refuse an archive of packed records: torch writes none, and they may be of any size."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > len(data):
        raise ValueError(f"{len(data)} bytes that unpack to {unpacked}, which torch does not write")


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its numbers at hand, and real ones."""
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized
    return is_dense and tensor.device.type == "cpu" and not tensor.is_complex()


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
