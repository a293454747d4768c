"""Parity: the graph that ships, in ONNX Runtime, against the network in torch float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cxrgaze import metrics
from cxrgaze.bundle import OutputParity, Parity, Precision, Tolerance
from cxrgaze.errors import ParityError
from cxrgaze.export.fp16 import HALF_MAX
from cxrgaze.export.session import host_session
from cxrgaze.spec import IMAGE, LOG_DENSITY, LOGITS
from cxrgaze.train.model import Network

LIMITS: dict[Precision, Tolerance] = {
    "fp32": Tolerance(logits=1e-3, log_density=1e-3),
    "fp16": Tolerance(logits=0.05, log_density=0.15),
    "int8": Tolerance(logits=5.0, log_density=10.0),
}
"""Largest differences that pass; also the self-test's tolerances.

The largest over all pixels of all films is an extreme: with the shipped `edge` network one pixel of
330,000 is off by 0.075 nats where the 99th percentile is 0.018 and maps agree to 0.99997. Rounding
of every convolution's output does it, no single layer. A wrong graph is off by whole nats.
int8's are a check for a broken graph; what it may lose is the gate's to say.
"""

DEVICE_LIMITS: dict[Precision, Tolerance] = {
    "fp32": Tolerance(logits=5e-3, log_density=5e-3),
    "fp16": Tolerance(logits=0.1, log_density=0.3),
    "int8": Tolerance(logits=5.0, log_density=10.0),
}
"""The self-test's tolerances on a GPU: another order of summation, Winograd, float16 arithmetic.

Wider than ONNX Runtime's by choice and not by measurement: no plan was run yet. A wrong network is
off by whole units.
"""

AGREEMENT: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.6}
"""Smallest agreement CC of any film that passes."""

LOOKED_AT = 0.01
"""Log-densities are compared where the reference density is at least this share of its peak."""

_WITNESS: dict[Precision, str] = {
    "fp32": "ONNX Runtime on the CPU computes this graph in float32.",
    "fp16": "ONNX Runtime on the CPU computes float16 graphs in float32 with casts: this shows the "
    "rounding of weights and tensors, not a GPU's float16 arithmetic. Overflow is judged by the "
    "largest float32 activation.",
    "int8": "ONNX Runtime on the CPU computes int8 exactly and all else in float32 with casts: "
    "this shows the quantization, not a GPU's float16 arithmetic nor its choice of kernels.",
}


@dataclass(frozen=True)
class Answers:
    """What the network says of the parity films in torch float32."""

    images: NDArray[np.float32]
    """`(n, 1, H, W)`."""
    logits: NDArray[np.float32]
    """`(n, C)`."""
    log_density: NDArray[np.float32]
    """`(n, H, W)`."""
    peak: float
    """Largest absolute value that any layer takes or gives."""


def answers(network: Network, images: NDArray[np.float32]) -> Answers:
    """The network's answers, film by film: once for all forms of its graph."""
    logits, log_density = [], []
    with _peak_of(network) as peak, torch.inference_mode():
        for image in images:
            outputs = network(torch.from_numpy(image[None]))
            logits.append(outputs.logits[0].numpy())
            log_density.append(outputs.log_density[0, 0].numpy())
    return Answers(images, np.stack(logits), np.stack(log_density), peak[0])


def compare(wanted: Answers, graph: bytes, precision: Precision, domain: str) -> Parity:
    """Differences of both outputs to the network's answers, film by film, and a verdict.

    Args:
        domain: what the films are, for the record.
    """
    session = host_session(graph)
    logit_diffs, density_diffs, logit_cosines, density_cosines, agreements = [], [], [], [], []
    flips, finite = 0, True
    for image, want_logits, want_density in zip(
        wanted.images, wanted.logits, wanted.log_density, strict=True
    ):
        logits, density = session.run([LOGITS, LOG_DENSITY], {IMAGE: image[None]})
        logits, density = logits[0], density[0, 0]
        if not (np.isfinite(logits).all() and np.isfinite(density).all()):
            finite = False
            continue
        looked = looked_at(want_density)
        logit_diffs.append(np.abs(logits - want_logits))
        density_diffs.append(np.abs(density - want_density)[looked])
        logit_cosines.append(_cosine(logits, want_logits))
        density_cosines.append(_cosine(density, want_density))
        agreements.append(metrics.cc(np.exp(density), np.exp(want_density)))
        flips += int(logits.argmax() != want_logits.argmax())
    limits = LIMITS[precision]
    of_logits = _summary(logit_diffs, logit_cosines)
    of_density = _summary(density_diffs, density_cosines)
    # The network itself may be broken: a peak of NaN or infinity is no number to compare with.
    finite = finite and bool(np.isfinite(wanted.peak))
    within = (
        of_logits.max <= limits.logits
        and of_density.max <= limits.log_density
        and min(agreements, default=0.0) >= AGREEMENT[precision]
        and (precision == "fp32" or wanted.peak <= HALF_MAX)
    )
    return Parity(
        verdict="not_finite" if not finite else "pass" if within else "fail",
        films=len(wanted.images),
        domain=domain,
        limits=limits,
        logits=of_logits,
        log_density=of_density,
        agreement_cc_min=min(agreements, default=0.0),
        worst_film=int(np.argmin(agreements)) if agreements else 0,
        agreement_cc_mean=float(np.mean(agreements)) if agreements else 0.0,
        label_flips=flips,
        peak_activation=wanted.peak if np.isfinite(wanted.peak) else -1.0,
        witness=_WITNESS[precision],
    )


def looked_at(log_density: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Where a density is at least `LOOKED_AT` of its peak: the pixels that are compared."""
    return np.asarray(log_density >= log_density.max() + np.log(LOOKED_AT))


def self_test_tolerances(precision: Precision, found: Parity) -> dict[str, Tolerance]:
    """Tolerances of the golden input by backend (`Backend.tolerance`).

    An int8 graph is compared with float32 too, so its tolerance follows what its own parity found:
    three times the largest difference over all films, and never less than fp16's.
    """
    host, device = LIMITS[precision], DEVICE_LIMITS[precision]
    if precision == "int8":
        host = device = Tolerance(
            logits=max(3 * found.logits.max, DEVICE_LIMITS["fp16"].logits),
            log_density=max(3 * found.log_density.max, DEVICE_LIMITS["fp16"].log_density),
        )
    tolerances = {"onnxruntime": host}
    for library in ("tensorrt", "tensorrt_rtx"):
        tolerances[library] = device
        # TensorFloat-32 has float16's ten bits of mantissa.
        tolerances[f"{library}-tf32"] = DEVICE_LIMITS["int8" if precision == "int8" else "fp16"]
    return tolerances


def require_pass(parity: Parity, precision: Precision) -> None:
    """Stop an export whose parity did not pass.

    Raises:
        ParityError: saying what was found and what was expected.
    """
    if parity.verdict == "pass":
        return
    if parity.verdict == "not_finite":
        raise ParityError(
            "NaN or infinity in the outputs or inside the network; nothing was written"
        )
    raise ParityError(
        f"{precision} graph and network disagree over {parity.films} films: logits off by "
        f"{parity.logits.max:.3g} (limit {parity.limits.logits:g}), log-density by "
        f"{parity.log_density.max:.3g} (limit {parity.limits.log_density:g}), agreement CC "
        f"{parity.agreement_cc_min:.6f} (limit {AGREEMENT[precision]}), largest activation "
        f"{parity.peak_activation:.4g} (float16 ends at {HALF_MAX:.0f}); nothing was written"
    )


@contextmanager
def _peak_of(network: nn.Module) -> Iterator[list[float]]:
    """The largest absolute value that any layer takes or gives, in a list of one number."""
    peak = [0.0]

    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        for tensor in (*inputs, output):
            largest = float(tensor.abs().max())
            peak[0] = largest if largest > peak[0] or largest != largest else peak[0]

    leaves = [module for module in network.modules() if not any(module.children())]
    handles = [leaf.register_forward_hook(watch) for leaf in leaves]
    try:
        yield peak
    finally:
        for handle in handles:
            handle.remove()


def _summary(diffs: list[NDArray[np.floating]], cosines: list[float]) -> OutputParity:
    if not diffs:
        return OutputParity(max=0.0, p99=0.0, cosine=0.0)
    every = np.concatenate(diffs)
    return OutputParity(
        max=float(every.max()), p99=float(np.quantile(every, 0.99)), cosine=min(cosines)
    )


def _cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), np.finfo(np.float64).tiny))
