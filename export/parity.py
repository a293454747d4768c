"""Parity: the graph that ships, in ONNX Runtime, against the network in torch float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.manifest import Arithmetic, Precision
from cxrgaze.bundles.verdicts import OutputParity, Parity, Tolerance, compared_pixels
from cxrgaze.errors import ParityError
from cxrgaze.evidence import metrics
from cxrgaze.export.fp16 import HALF_MAX
from cxrgaze.export.source import Answers
from cxrgaze.runtime.ort import witness

LIMITS: dict[Precision, Tolerance] = {
    "fp32": Tolerance(logits=1e-3, log_density=1e-3),
    "fp16": Tolerance(logits=0.05, log_density=0.15),
    "int8": Tolerance(logits=5.0, log_density=10.0),
}
"""Largest differences that pass.

The largest over all pixels of all films is an extreme: with the shipped `edge` network one pixel of
330,000 is off by 0.075 nats where the 99th percentile is 0.018 and maps agree to 0.99997. Rounding
of every convolution's output does it, no single layer. A wrong graph is off by whole nats.
int8's are a check for a broken graph; what it may lose is the gate's to say.
"""

BY_ARITHMETIC: dict[Arithmetic, Tolerance] = {
    "float32": Tolerance(logits=5e-3, log_density=5e-3),
    "tf32": Tolerance(logits=0.1, log_density=0.3),
    "float16": Tolerance(logits=0.1, log_density=0.3),
    "bfloat16": Tolerance(logits=0.8, log_density=2.4),
}
"""The self-test's tolerances of a float32 graph, by what a backend computes it in.

float32 allows another order of summation and Winograd; TensorFloat-32 has float16's ten bits of
mantissa, bfloat16 three fewer, so eight times as much. By choice and not by measurement: nothing
but ONNX Runtime has run. A wrong network is off by whole units.
"""

AGREEMENT: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.6}
"""Smallest agreement CC of any film that passes."""

_WITNESS: dict[Precision, str] = {
    "fp32": "ONNX Runtime on the CPU computes this graph in float32.",
    "fp16": "ONNX Runtime on the CPU computes float16 graphs in float32 with casts: this shows the "
    "rounding of weights and tensors, not a GPU's float16 arithmetic. Overflow is judged by the "
    "largest float32 activation.",
    "int8": "ONNX Runtime on the CPU computes int8 exactly and all else in float32 with casts: "
    "this shows the quantization, not a GPU's float16 arithmetic nor its choice of kernels.",
}


def compare(wanted: Answers, graph: bytes, precision: Precision, domain: str) -> Parity:
    """Differences of both outputs to the network's answers, film by film, and a verdict.

    Args:
        domain: what the films are, for the record.
    """
    infer = witness(graph)
    logit_diffs, density_diffs, logit_cosines, density_cosines, agreements = [], [], [], [], []
    flips, finite = 0, True
    for image, want_logits, want_density in zip(
        wanted.images, wanted.logits, wanted.log_density, strict=True
    ):
        outputs = infer(image[None])
        logits, density = outputs.logits[0], outputs.log_density[0, 0]
        if not (np.isfinite(logits).all() and np.isfinite(density).all()):
            finite = False
            continue
        compared = compared_pixels(want_density)
        logit_diffs.append(np.abs(logits - want_logits))
        density_diffs.append(np.abs(density - want_density)[compared])
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


def self_test_tolerances(precision: Precision, parity: Parity) -> dict[Arithmetic, Tolerance]:
    """Tolerances of the golden input, by what a backend computes in (`Backend.arithmetic`).

    What a graph's own types round stands in every arithmetic. An int8 graph is compared with
    float32 too, so its tolerance follows what its own parity found: three times the largest
    difference over all films, and never less than float16's.
    """
    if precision == "fp32":
        return dict(BY_ARITHMETIC)
    if precision == "fp16":
        half = LIMITS["fp16"]
        return {name: _larger(tolerance, half) for name, tolerance in BY_ARITHMETIC.items()}
    own = Tolerance(logits=3 * parity.logits.max, log_density=3 * parity.log_density.max)
    floor = _larger(own, BY_ARITHMETIC["float16"])
    float_part = {name: _larger(tolerance, floor) for name, tolerance in BY_ARITHMETIC.items()}
    return {"int8": floor, **float_part}


def _larger(one: Tolerance, other: Tolerance) -> Tolerance:
    return Tolerance(
        logits=max(one.logits, other.logits), log_density=max(one.log_density, other.log_density)
    )


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
