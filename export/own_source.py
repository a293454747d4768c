"""Somebody's own network as the source of an export: an ONNX file or a torch module, and a card."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from cxrgaze.errors import UsageError
from cxrgaze.export import graph as graphs
from cxrgaze.export import own_graph, own_module
from cxrgaze.export.own_card import Map, OwnCard, read_card
from cxrgaze.export.own_open import SIZE_LIMIT, opened
from cxrgaze.export.ranges import collect
from cxrgaze.export.source import Answers, Facts, Layout
from cxrgaze.files import read_regular, sha256
from cxrgaze.runtime.ort import open_session
from cxrgaze.spec import Head, ModelSpec

CARD = "card.toml"
"""The card in the bundle, as it was given."""
_PEAK_FILMS = 4


Given = Callable[[NDArray[np.float32]], Sequence[NDArray[np.float32]]]
"""What a network gives of its own input, the card's outputs in the order logits, map."""


@dataclass(frozen=True)
class OwnSource:
    """Somebody's network as a `Source` (`cxrgaze.export.source`)."""

    model: onnx.ModelProto
    """With our input and heads."""
    given: Given
    """The network as it was given: the reference."""
    card: OwnCard
    channels: int
    spec: ModelSpec
    facts: Facts
    layout: Layout
    rewrites: tuple[str, ...] = ()

    def graph(self, rewrites: Collection[str] = ()) -> onnx.ModelProto:
        """See `Source`."""
        model: onnx.ModelProto = onnx.ModelProto.FromString(self.model.SerializeToString())
        return model

    def answers(self, images: NDArray[np.float32]) -> Answers:
        """See `Source`: the network's own answers, what stands around it done by hand."""
        parts: dict[Head, list[NDArray[np.float32]]] = {head: [] for head in self.spec.heads}
        for image in images:
            found = own_graph.by_hand(self.given, image[None], self.card, self.channels)
            for head, array in found.items():
                parts[head].append(array)
        tensors = {output for node in self.model.graph.node for output in node.output}
        known = {value.name for value in graphs.for_one_film(self.model).value_info}
        tallies = collect(self.model, tensors & known, list(images[:_PEAK_FILMS]))
        peak = max(tally.largest for tally in tallies.values())
        return Answers(images, {h: np.concatenate(p) for h, p in parts.items()}, peak)


def source_from_onnx(path: Path, card_path: Path, cam: str | None = None) -> OwnSource:
    """The network in an ONNX file, by its card; the file is its own reference.

    Args:
        cam: a class, or `own_graph.EVERY_CLASS`: the map is its class activation map.

    Raises:
        UsageError, IntegrityError: as `own_card.read_card`, `own_open.opened` and
            `own_graph.adapted`; an activation or a map that is not what the card says.
    """
    card = read_card(card_path)
    if not path.is_file():
        raise UsageError(f"{path} is no file; expected an ONNX model")
    data = read_regular(path, SIZE_LIMIT)
    opened_graph = opened(data, path.name, card.input.size)
    facts = _facts(card, card_path, path.name, sha256(data), cam)
    return _source(opened_graph, card, facts, cam, f"{path.name} and {card_path.name}")


def source_from_module(
    module: nn.Module, origin: str, digest: str, card_path: Path, cam: str | None = None
) -> OwnSource:
    """A torch module by its card; the module is the reference of its graph.

    Its outputs are called by their keys, "output" where it gives one tensor, else "output0",
    "output1" and so on.

    Args:
        origin: file name of its weights. digest: SHA-256 of them.
        cam: as `source_from_onnx`.

    Raises:
        UsageError: a card without a size; it does not take such an image, or gives no tensors;
            else as `source_from_onnx`.
    """
    card = read_card(card_path)
    if card.input.size is None:
        raise UsageError(f"{card_path}: a module takes any size: write [input] size = [H, W]")
    shape = (card.input.channels or 1, *card.input.size)
    data, names = own_module.exported(module, shape)
    where = f"{origin} and {card_path.name}"
    facts = _facts(card, card_path, origin, digest, cam)
    source = _source(opened(data, origin), card, facts, cam, where)
    if cam:
        return source  # the map is none of the module's
    wanted = [one.output for one in (card.logits, card.map) if one]
    if missing := [name for name in wanted if name not in names]:
        raise UsageError(f"{where}: the module gives {', '.join(names)}, and no {missing[0]}")
    return replace(source, given=own_module.forward(module, wanted))


def _facts(card: OwnCard, card_path: Path, origin: str, digest: str, cam: str | None) -> Facts:
    of_cam = f", its map the class activation map of {cam}" if cam else ""
    return Facts(
        card.network.name,
        origin + of_cam,
        digest,
        card.network.trained_on,
        decision=card.decision,
        beside={CARD: card_path.read_bytes()},
    )


def _source(
    given: onnx.ModelProto, card: OwnCard, facts: Facts, cam: str | None, where: str
) -> OwnSource:
    try:
        if cam:
            given, card = _with_cam(given, card, cam)
        spec = own_graph.spec_of(card, given)
        model = own_graph.adapted(given, card, spec)
        infer, channels = _session(_with_outputs(given, card))
        _require_its_map(infer, card, (channels, spec.height, spec.width))
        layout = own_graph.layout_of(model, card)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return OwnSource(model, infer, card, channels, spec, facts, layout)


def _with_cam(given: onnx.ModelProto, card: OwnCard, cam: str) -> tuple[onnx.ModelProto, OwnCard]:
    if card.logits is None or card.map is not None:
        raise UsageError("a class activation map is for a card with [logits] and without [map]")
    names = [one.name for one in card.logits.classes]
    if cam != own_graph.EVERY_CLASS and cam not in names:
        raise UsageError(f"--cam {cam} is no class; there are {', '.join(names)}")
    channel = None if cam == own_graph.EVERY_CLASS else names.index(cam)
    given = own_graph.with_cam(given, card.logits.output, channel)
    return given, card.model_copy(update={"map": Map(output=own_graph.CAM, kind="activation")})


def _session(model: onnx.ModelProto) -> tuple[Given, int]:
    """What a graph gives, as it is written, and the channels that it takes."""
    session = open_session(model.SerializeToString(), optimized=False)
    (image,), names = session.get_inputs(), [output.name for output in session.get_outputs()]
    return lambda given: session.run(names, {image.name: given}), int(image.shape[1])


def _with_outputs(model: onnx.ModelProto, card: OwnCard) -> onnx.ModelProto:
    """The graph with the tensors that the card names as its outputs."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = {v.name: v for v in (*inferred.output, *inferred.value_info)}
    del model.graph.output[:]
    model.graph.output.extend(values[one.output] for one in (card.logits, card.map) if one)
    return model


def _require_its_map(infer: Given, card: OwnCard, shape: tuple[int, int, int]) -> None:
    """Refuse a map that is not of its kind, on noise."""
    if card.map is None:
        return
    factor, offset = own_graph.scale_of(card.input, shape[0])
    noise = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    noise = (noise * factor[:, None, None] + offset[:, None, None]).astype(np.float32)
    found = infer(noise)[-1]
    if card.map.channel >= found.shape[1]:
        raise UsageError(
            f"the map {card.map.output} has {found.shape[1]} channels, the card says channel "
            f"{card.map.channel}"
        )
    own_graph.require_the_kind(found[0], card.map)
