"""Other ways to run the same weights, side by side: canvas in host memory to both heads in it.

Each peer is opened on the network of the bundle's own checkpoint, whose hash must be the one in the
manifest. What is not installed, or does not run here, is a row that says so.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from cxrgaze.benchmarks import paired
from cxrgaze.benchmarks.plain import plain_session
from cxrgaze.benchmarks.record import Accuracy, Config, Peer
from cxrgaze.benchmarks.timing import latency
from cxrgaze.bundles.bundle import Bundle
from cxrgaze.bundles.verdicts import Limits
from cxrgaze.command import say
from cxrgaze.errors import CxrgazeError, IncompatibleError, UsageError
from cxrgaze.evidence import gate
from cxrgaze.export import graph
from cxrgaze.export.canvases import CALIBRATION_SEED, is_large
from cxrgaze.export.from_torch import heads_in_order
from cxrgaze.export.network_source import source_from_checkpoint, source_from_random
from cxrgaze.export.source import TorchSource, served_of
from cxrgaze.export.targets import TARGETS
from cxrgaze.runtime.ort import heads_of
from cxrgaze.runtime.reader import load
from cxrgaze.spec import IMAGE, LOGITS, Infer, ModelSpec, Outputs
from cxrgaze.train.checkpoint import demo_path

CALIBRATION_FILMS = 64
"""Phantoms that NNCF calibrates with, those that our own int8 takes too."""
ACCURACY_FILMS = 300
"""Phantoms for the differences to float32, the first of those of the default gate."""
ACCURACY_SECONDS = 60.0
"""Time that all peers may take for them: fewer films on a large network, never below 4."""


@dataclass(frozen=True)
class Weights:
    """What a peer is made of."""

    source: TorchSource
    threads: int

    def exported(self, names: Sequence[str], spec: ModelSpec) -> onnx.ModelProto:
        """The float32 graph on the canvas of `spec`, with the exact rewrites called `names`."""
        return replace(self.source, spec=spec).graph(names)

    @cached_property
    def plain(self) -> bytes:
        """The float32 graph without rewrites."""
        return graph.finished(self.source.graph(), self.source.spec)

    @cached_property
    def calibration(self) -> NDArray[np.float32]:
        """Canvases `(n, 1, H, W)`."""
        spec = self.source.spec
        count = 8 if is_large(spec) else CALIBRATION_FILMS
        return gate.phantom_set(spec, count, CALIBRATION_SEED).arrays.images


def weights_of(bundle: Bundle, checkpoint: Path | None, threads: int) -> Weights:
    """The network that a bundle was made of.

    Args:
        checkpoint: its file; None finds what ships with cxrgaze, and makes random weights again.

    Raises:
        UsageError: not this bundle's checkpoint, or none was given and it does not ship.
    """
    manifest = bundle.manifest
    wanted = manifest.provenance
    shipped = demo_path().with_name(wanted.checkpoint)
    if checkpoint is not None:
        source = source_from_checkpoint(checkpoint)
    elif wanted.random_seed is not None:
        source = source_from_random(manifest.spec.variant, wanted.random_seed)
    elif shipped.is_file():
        source = source_from_checkpoint(shipped)
    else:
        raise UsageError(f"peers need the bundle's checkpoint: --checkpoint {wanted.checkpoint}")
    if source.facts.sha256 != wanted.checkpoint_sha256:
        raise UsageError(
            f"{source.facts.origin} is not the checkpoint of {bundle.path}: its SHA-256 is "
            f"{source.facts.sha256[:12]}, expected {wanted.checkpoint_sha256[:12]}"
        )
    return Weights(source, threads)


def require_same(bundles: Sequence[Bundle]) -> None:
    """Refuse bundles that were not made of the same checkpoint.

    Raises:
        UsageError: naming the first that was not.
    """
    wanted = bundles[0].manifest.provenance.checkpoint_sha256
    for bundle in bundles[1:]:
        if bundle.manifest.provenance.checkpoint_sha256 != wanted:
            raise UsageError(
                f"{bundle.path} was made of {bundle.manifest.provenance.checkpoint}, "
                f"{bundles[0].path} was not; --beside takes bundles of the same weights"
            )


Opener = Callable[[], contextlib.AbstractContextManager[Infer]]


def contenders(
    weights: Weights, bundles: Sequence[Bundle], device: str, names: Sequence[str] = ()
) -> dict[str, Opener]:
    """Openers by name: the bundles first, then the peers.

    Args:
        names: only the peers whose name contains one of these; none: all.

    Raises:
        UsageError: a name that no peer contains.
    """
    threads = weights.threads
    on = "cuda" if torch.cuda.is_available() else "cpu"
    half = "float16" if on == "cuda" else "bfloat16"
    rewritten = tuple(n for n in TARGETS["cpu"].rewrites if n in weights.source.rewrites)
    peers: dict[str, Opener] = {
        "ONNX Runtime fp32, no rewrites": lambda: _onnxruntime(weights, ()),
        f"ONNX Runtime fp32, rewrites {', '.join(rewritten)}": lambda: _onnxruntime(
            weights, rewritten
        ),
        f"torch eager fp32 ({on})": lambda: _torch(weights, on, _eager),
        f"torch channels-last fp32 ({on})": lambda: _torch(weights, on, _channels_last),
        f"torch autocast {half} ({on})": lambda: _torch(weights, on, _autocast),
        f"torch.compile fp32 ({on})": lambda: _torch(weights, on, _compiled),
        "OpenVINO fp32": lambda: _openvino(weights, "f32"),
        "OpenVINO bf16 hint": lambda: _openvino(weights, "bf16"),
        "OpenVINO int8 by NNCF": lambda: _openvino(weights, "int8"),
        "TensorRT, the first bundle's plan": partial(_bundle, bundles[0], "tensorrt", threads),
        "TensorRT-RTX, its plan": partial(_bundle, bundles[0], "tensorrt_rtx", threads),
    }
    for name in names:
        if not any(name.lower() in one.lower() for one in peers):
            raise UsageError(f"--peers {name}: none is called so; there are {'; '.join(peers)}")
    ours: dict[str, Opener] = {
        f"cxrgaze {b.manifest.precision}, target {b.manifest.target} ({b.manifest.name})": partial(
            _bundle, b, device, threads
        )
        for b in bundles
    }
    wanted = [one for one in peers if not names or any(n.lower() in one.lower() for n in names)]
    return ours | {one: peers[one] for one in wanted}


@contextlib.contextmanager
def _bundle(bundle: Bundle, device: str, threads: int) -> Iterator[Infer]:
    with load(bundle.path, device, threads=threads) as reader:
        yield reader.backend.infer


@contextlib.contextmanager
def _onnxruntime(weights: Weights, names: Sequence[str]) -> Iterator[Infer]:
    spec = weights.source.spec
    model = graph.finished(weights.exported(names, spec), spec) if names else weights.plain
    yield heads_of(plain_session(model, weights.threads))


Forward = Callable[[torch.Tensor], Any]


def _eager(network: torch.nn.Module, device: str) -> Forward:
    return network


def _channels_last(network: torch.nn.Module, device: str) -> Forward:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack it
    return lambda image: network(image.contiguous(memory_format=torch.channels_last))


def _autocast(network: torch.nn.Module, device: str) -> Forward:
    kind = torch.float16 if device == "cuda" else torch.bfloat16

    def forward(image: torch.Tensor) -> Any:
        with torch.autocast(device, dtype=kind):
            return network(image)

    return forward


def _compiled(network: torch.nn.Module, device: str) -> Forward:
    forward: Forward = torch.compile(network)
    return forward


@contextlib.contextmanager
def _torch(
    weights: Weights, device: str, way: Callable[[torch.nn.Module, str], Forward]
) -> Iterator[Infer]:
    torch.set_num_threads(weights.threads)
    torch.backends.cudnn.allow_tf32 = False
    network = copy.deepcopy(weights.source.module).to(device).eval()
    forward = way(network, device)

    def infer(image: NDArray[np.float32]) -> Outputs:
        with torch.inference_mode():
            given = forward(torch.from_numpy(image).to(device))
            heads = heads_in_order(given, weights.source.spec)
            return dict(
                zip(
                    weights.source.spec.heads,
                    (tensor.float().cpu().numpy() for tensor in heads),
                    strict=True,
                )
            )

    yield infer


@contextlib.contextmanager
def _openvino(weights: Weights, precision: str) -> Iterator[Infer]:
    import openvino

    spec = weights.source.spec
    core = openvino.Core()
    model = core.read_model(weights.plain)
    model.reshape({IMAGE: [1, 1, spec.height, spec.width]})
    if precision == "int8":
        model = _nncf(model, weights.calibration)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": weights.threads,
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()

    def infer(image: NDArray[np.float32]) -> Outputs:
        heads = request.infer({IMAGE: image})
        return {head: heads[head].copy() for head in spec.heads}

    yield infer


def _nncf(model: Any, images: NDArray[np.float32]) -> Any:
    with contextlib.redirect_stdout(sys.stderr):
        import nncf

        nncf.set_log_level(logging.ERROR)
        films = nncf.Dataset([image[None] for image in images])
        return nncf.quantize(
            model, films, subset_size=len(images), target_device=nncf.TargetDevice.CPU
        )


@dataclass
class _Open:
    infer: Infer
    open_ms: float
    first_ms: float


def measure(
    weights: Weights, asked: Mapping[str, Opener], images: NDArray[np.float32], config: Config
) -> tuple[Peer, ...]:
    """A row each, compared with the first.

    Args:
        asked: of `contenders`.
        images: canvases `(n, 1, H, W)` that all read in turn.

    Raises:
        IncompatibleError: the first does not run here.
    """
    with contextlib.ExitStack() as stack:
        opened: dict[str, _Open] = {}
        missing: dict[str, str] = {}
        for name, opener in asked.items():
            say(f"  open {name}")
            contender = _opened(stack, opener, images[:1])
            if isinstance(contender, str):
                missing[name] = contender
            else:
                opened[name] = contender
        base = next(iter(asked))
        if base in missing:
            raise IncompatibleError(f"the bundle does not run here: {missing[base]}")
        turns = paired.interleave(
            {name: _turn(o.infer, images) for name, o in opened.items()},
            seconds=config.seconds,
        )
        a_film_ms = sum(float(np.median(times)) for times in turns.values())
        accuracies = _accuracies(weights, opened, a_film_ms)
    rows = []
    for name in asked:
        if name in missing:
            rows.append(Peer(name=name, not_measured=missing[name]))
            continue
        times = turns[name]
        rows.append(
            Peer(
                name=name,
                open_ms=opened[name].open_ms,
                first_ms=opened[name].first_ms,
                latency=latency(times.ravel().tolist()),
                ratio=None if name == base else paired.compare(turns[base], times),
                accuracy=accuracies[name],
            )
        )
    return tuple(rows)


def _opened(stack: contextlib.ExitStack, opener: Opener, image: NDArray[np.float32]) -> _Open | str:
    """An opened contender with its first reading, or why it is not to be had."""
    start = time.perf_counter()
    try:
        infer = stack.enter_context(opener())
        ready = time.perf_counter()
        infer(image)
    except ImportError as error:
        return f"{error.name or 'a package'} is not installed (the extra 'peers')"
    except (CxrgazeError, RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        return f"does not run here: {first[0][:300]}"
    return _Open(infer, (ready - start) * 1e3, (time.perf_counter() - ready) * 1e3)


def _turn(infer: Infer, images: NDArray[np.float32]) -> Callable[[int], object]:
    def reading(number: int) -> None:
        index = number % len(images)
        infer(images[index : index + 1])

    return reading


def _accuracies(
    weights: Weights, opened: dict[str, _Open], a_film_ms: float
) -> dict[str, Accuracy]:
    """Differences of each to the network in torch float32, on phantoms.

    Accuracy of weights that were trained on films is the gate's to measure, on films; phantoms show
    only how alike the outputs are.
    """
    source = weights.source
    affordable = int(ACCURACY_SECONDS * 1e3 / a_film_ms)
    films = gate.phantom_set(source.spec, min(max(affordable, 4), ACCURACY_FILMS))
    images = films.arrays.images
    with _torch(weights, "cpu", _eager) as infer:
        reference = _predicted(infer, images)
    accuracies = {}
    for name, contender in opened.items():
        say(f"  accuracy of {name}")
        candidate = _predicted(contender.infer, images)
        judged = gate.judge(
            films,
            reference,
            candidate,
            Limits(),
            "graph",
            served_of(source),
        )
        off = None
        if LOGITS in source.spec.heads:
            off = float(np.abs(candidate[LOGITS] - reference[LOGITS]).max())
        assert judged.comparison is not None
        loss = {q.name: q.loss for q in judged.comparison.quantities}
        trained = source.spec.domain == "phantom"
        accuracies[name] = Accuracy(
            set_name=films.name,
            films=len(images),
            logits_max=None if off is None else min(off, float(np.finfo(np.float32).max)),
            agreement_cc_min=judged.agreement_cc_min,
            agreement_cc_mean=judged.agreement_cc_mean,
            flips=judged.comparison.flipped_films,
            macro_auc_loss=loss.get("macro AUC") if trained else None,
            cc_loss=loss.get("CC") if trained else None,
            verdict=judged.verdict if trained else "not_gated",
        )
    return accuracies


def _predicted(infer: Infer, images: NDArray[np.float32]) -> gate.Predicted:
    """Film by film, as they are timed."""
    outputs = [gate.stored(infer(image[None])) for image in images]
    return {head: np.concatenate([one[head] for one in outputs]) for head in outputs[0]}
