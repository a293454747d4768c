"""Checkpoint to bundle, step by step; nothing is written unless every step passed."""

from __future__ import annotations

import datetime
import io
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from cxrgaze import bundle, phantom, signature
from cxrgaze.command import Steps
from cxrgaze.errors import DataError
from cxrgaze.export import fp16, graph, parity
from cxrgaze.export.report import parity_report
from cxrgaze.files import new_folder, sha256
from cxrgaze.runtime.canvas import to_canvas
from cxrgaze.runtime.film import Film, film_from_array, load_film
from cxrgaze.spec import ModelSpec
from cxrgaze.train import checkpoint
from cxrgaze.train.model import Network, random_network, spec_of

GOLDEN_SEED = 2_403_169
PARITY_SEED = 1_000_000  # apart from every seed that training uses
CALIBRATION_SEED = 2_000_000


@dataclass(frozen=True)
class Source:
    """A network to export and what is known of it."""

    network: Network
    spec: ModelSpec
    name: str
    origin: str
    """File name of the checkpoint, or how random weights were made."""
    sha256: str
    trained_on: str
    decision: bundle.Decision = bundle.Decision()
    untrained: tuple[bundle.Head, ...] = ()
    training_split_sha256: str = ""


@dataclass(frozen=True)
class Options:
    """What `cxrgaze-export` was asked for."""

    precision: bundle.Precision
    target: bundle.Target
    output: Path
    films: Sequence[Path] = ()
    """Films for parity; none: phantoms."""
    sign: Path | None = None
    """Private key to sign the bundle with."""


def source_from_checkpoint(path: Path) -> Source:
    """The network of a checkpoint (`checkpoint.load` says what can be wrong)."""
    network, card = checkpoint.load(path)
    return Source(
        network,
        card.spec,
        card.name,
        path.name,
        card.weights_sha256,
        card.trained_on,
        card.decision,
        card.untrained,
        card.lineage[-1].split_sha256 if card.lineage else "",
    )


def source_from_random(variant: str, seed: int) -> Source:
    """An untrained network for latency work."""
    spec = spec_of(
        variant, model_version=f"random-{seed}", pixel_source="image-8bit", domain="none"
    )
    network = random_network(variant, torch.from_numpy(_phantoms(spec, 2, CALIBRATION_SEED)), seed)
    weights = b"".join(v.numpy().tobytes() for v in network.state_dict().values())
    return Source(
        network,
        spec,
        f"{variant}-random",
        f"random weights (seed {seed}, Kaiming, BatchNorm calibrated on two phantoms)",
        sha256(weights),
        "nothing: untrained",
    )


def export(source: Source, options: Options, step: Steps) -> bundle.Bundle:
    """Write the bundle of a network.

    Raises:
        UsageError: the output cannot be written or is something else; no key to sign with.
        ParityError: the graph does not compute what the network computes; nothing is left.
    """
    precision, spec = options.precision, source.spec
    key = signature.read_private_key(options.sign) if options.sign else None
    name = f"{source.name}-{precision}"
    target = bundle.bundle_path(options.output, name)
    with new_folder(target, bundle.MANIFEST) as folder:
        with step("read parity films"):
            images, domain = _parity_images(spec, options.films)
        with step(f"export to ONNX, opset {graph.OPSET}"):
            model = graph.onnx_from_network(source.network, spec)
        with step("simplify"):
            model = graph.simplified(model)
        with step(f"type the graph as {precision}"):
            model, kept = _typed(model, precision)
            data = graph.finished(model, spec)
        with step(f"parity on {len(images)} films"):
            found = parity.compare(source.network, data, images, precision, domain)
            parity.require_pass(found, precision)
        with step("write and verify the bundle"):
            manifest = _manifest(source, options, name, model, kept, found)
            files = {
                bundle.GRAPH: data,
                bundle.GOLDEN: _golden(source.network, spec),
                "report/parity.md": parity_report(manifest).encode(),
            }
            bundle.fill_bundle(folder, manifest, files)
            if key:
                signature.sign(folder, key)
    return bundle.Bundle.open(target)


def _typed(model: onnx.ModelProto, precision: bundle.Precision) -> tuple[onnx.ModelProto, int]:
    if precision == "fp32":
        return model, 0
    typed = fp16.to_fp16(model)
    return typed, fp16.check_kept(typed)


def _manifest(
    source: Source,
    options: Options,
    name: str,
    model: onnx.ModelProto,
    kept: int,
    found: bundle.Parity,
) -> bundle.Manifest:
    return bundle.Manifest(
        name=name,
        spec=source.spec,
        precision=options.precision,
        target=options.target,
        opset=model.opset_import[0].version,
        ir_version=model.ir_version,
        float32_nodes=kept,
        convolution_macs=graph.convolution_macs(model),
        decision=source.decision,
        untrained=source.untrained,
        self_test=parity.self_test_tolerances(options.precision),
        parity=found,
        gate=_gate(source.spec, options.precision),
        provenance=bundle.Provenance(
            checkpoint=source.origin,
            checkpoint_sha256=source.sha256,
            trained_on=source.trained_on,
            training_split_sha256=source.training_split_sha256,
            created_utc=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            versions={
                "cxrgaze": version("cxrgaze"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                "numpy": np.__version__,
            },
        ),
    )


def _gate(spec: ModelSpec, precision: bundle.Precision) -> bundle.Gate:
    if spec.domain == "none":
        return bundle.Gate(verdict="not_gated", reason="random weights have no accuracy to lose")
    if precision == "fp32":
        return bundle.Gate(
            verdict="pass", reason="an fp32 graph is its own reference: parity is its gate"
        )
    return bundle.Gate(
        verdict="not_gated",
        reason="accuracy against fp32 on a labelled set was not measured; parity only",
    )


def _parity_images(spec: ModelSpec, films: Sequence[Path]) -> tuple[NDArray[np.float32], str]:
    if not films:
        count = 32 if spec.height * spec.width <= 256 * 256 else 4
        return _phantoms(spec, count, PARITY_SEED), f"{count} phantoms (synthetic drawings)"
    loaded = [load_film(path) for path in films]
    for film in loaded:
        if film.reasons:
            raise DataError(f"{film.name} is no parity film: {'; '.join(film.reasons)}")
    return _canvases(loaded, spec), f"{len(loaded)} films given by --films"


def _phantoms(spec: ModelSpec, count: int, first_seed: int) -> NDArray[np.float32]:
    shape = (max(spec.height, 96), max(spec.width, 96))
    drawn = [phantom.draw(first_seed + i, shape=shape).pixels for i in range(count)]
    return _canvases([film_from_array(pixels) for pixels in drawn], spec)


def _canvases(films: Sequence[Film], spec: ModelSpec) -> NDArray[np.float32]:
    return np.stack([to_canvas(film.pixels, spec)[0] for film in films])[:, None]


def _golden(network: Network, spec: ModelSpec) -> bytes:
    """The golden input and its float32 outputs, as `cxrgaze.runtime.reader.read_golden` reads."""
    image = _phantoms(spec, 1, GOLDEN_SEED)
    with torch.inference_mode():
        reference = network(torch.from_numpy(image))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        image=image,
        logits=reference.logits.numpy(),
        log_density=reference.log_density.numpy(),
    )
    return buffer.getvalue()
