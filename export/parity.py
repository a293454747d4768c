"""Parity: the graph that ships, in ONNX Runtime, against the network in torch float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.manifest import Arithmetic, Precision
from cxrgaze.bundles.served import Served
from cxrgaze.bundles.verdicts import HEAD_WORDS, OutputParity, Parity, Tolerance, differences
from cxrgaze.errors import ParityError
from cxrgaze.evidence import metrics
from cxrgaze.export.fp16 import HALF_MAX
from cxrgaze.export.source import Answers
from cxrgaze.runtime.ort import witness
from cxrgaze.spec import LOG_DENSITY, LOGITS, Head

LIMITS: dict[Precision, Tolerance] = {
    "fp32": {LOGITS: 1e-3, LOG_DENSITY: 1e-3},
    "fp16": {LOGITS: 0.05, LOG_DENSITY: 0.15},
    "int8": {LOGITS: 5.0, LOG_DENSITY: 10.0},
}
"""Largest differences that pass; of logits whose root mean square is more than 1, in its units.

The largest over all pixels of all films is an extreme: with the shipped `edge` network one pixel of
330,000 is off by 0.075 nats where the 99th percentile is 0.018 and maps agree to 0.99997. Rounding
of every convolution's output does it, no single layer. A wrong graph is off by whole nats.
int8's are a check for a broken graph; what it may lose is the gate's to say.
"""

BY_ARITHMETIC: dict[Arithmetic, Tolerance] = {
    "float32": {LOGITS: 5e-3, LOG_DENSITY: 5e-3},
    "tf32": {LOGITS: 0.1, LOG_DENSITY: 0.3},
    "float16": {LOGITS: 0.1, LOG_DENSITY: 0.3},
    "bfloat16": {LOGITS: 0.8, LOG_DENSITY: 2.4},
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


def compare(
    wanted: Answers, graph: bytes, precision: Precision, domain: str, served: Served
) -> Parity:
    """Differences of each head to the network's answers, film by film, and a verdict.

    Args:
        domain: what the films are, for the record.
        served: what is served of the network; its decisions are compared too.
    """
    infer = witness(graph)
    heads = served.spec.heads
    off: dict[Head, list[NDArray[np.floating]]] = {head: [] for head in heads}
    cosines: dict[Head, list[float]] = {head: [] for head in heads}
    agreements: list[float] = []
    flips, finite = 0, True
    for index, image in enumerate(wanted.images):
        found = {head: array[0] for head, array in infer(image[None]).items()}
        want = {head: wanted.outputs[head][index] for head in heads}
        if not all(np.isfinite(array).all() for array in found.values()):
            finite = False
            continue
        for head in heads:
            off[head].append(differences(head, found[head], want[head]))
            cosines[head].append(_cosine(found[head], want[head]))
        if LOG_DENSITY in heads:
            agreements.append(
                metrics.cc(np.exp(found[LOG_DENSITY][0]), np.exp(want[LOG_DENSITY][0]))
            )
        if served.classes:
            one, other = (served.probabilities(said[LOGITS][None]) for said in (found, want))
            flips += bool((served.decisions(one) != served.decisions(other)).any())
    limits = {head: LIMITS[precision][head] * _unit(head, wanted) for head in heads}
    outputs = {head: _summary(off[head], cosines[head]) for head in heads}
    # The network itself may be broken: a peak of NaN or infinity is no number to compare with.
    finite = finite and bool(np.isfinite(wanted.peak))
    agreement = min(agreements, default=0.0) if LOG_DENSITY in heads else None
    within = (
        all(outputs[head].max <= limits[head] for head in heads)
        and (agreement is None or agreement >= AGREEMENT[precision])
        and (precision == "fp32" or wanted.peak <= HALF_MAX)
    )
    return Parity(
        verdict="not_finite" if not finite else "pass" if within else "fail",
        films=len(wanted.images),
        domain=domain,
        limits=limits,
        outputs=outputs,
        agreement_cc_min=agreement,
        agreement_cc_mean=float(np.mean(agreements)) if agreements else agreement,
        worst_film=int(np.argmin(agreements)) if agreements else None,
        flips=flips if served.classes else None,
        peak_activation=wanted.peak if np.isfinite(wanted.peak) else -1.0,
        witness=_WITNESS[precision],
    )


def _unit(head: Head, wanted: Answers) -> float:
    """What a difference of a head is measured in: others' logits may be in the hundreds."""
    if head != LOGITS:
        return 1.0
    size = float(np.sqrt(np.mean(np.square(wanted.outputs[head], dtype=np.float64))))
    return size if size > 1 else 1.0  # NaN is seen elsewhere


def self_test_tolerances(precision: Precision, parity: Parity) -> dict[Arithmetic, Tolerance]:
    """Tolerances of the golden input, by what a backend computes in (`Backend.arithmetic`).

    What a graph's own types round stands in every arithmetic. An int8 graph is compared with
    float32 too, so its tolerance follows what its own parity found: three times the largest
    difference over all films, and never less than float16's.
    """
    units = {head: parity.limits[head] / LIMITS[precision][head] for head in parity.outputs}
    own: dict[Precision, Tolerance] = {
        "fp32": dict.fromkeys(parity.outputs, 0.0),
        "fp16": parity.limits,
        "int8": {
            head: max(3 * found.max, BY_ARITHMETIC["float16"][head] * units[head])
            for head, found in parity.outputs.items()
        },
    }
    tolerances: dict[Arithmetic, Tolerance] = {
        name: {head: max(of[head] * units[head], own[precision][head]) for head in parity.outputs}
        for name, of in BY_ARITHMETIC.items()
    }
    if precision == "int8":
        tolerances = {"int8": own["int8"], **tolerances}
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
    found = [
        f"{HEAD_WORDS[head]} off by {of.max:.3g} (limit {parity.limits[head]:g})"
        for head, of in parity.outputs.items()
    ]
    if parity.agreement_cc_min is not None:
        limit = AGREEMENT[precision]
        found.append(f"agreement CC {parity.agreement_cc_min:.6f} (limit {limit})")
    raise ParityError(
        f"{precision} graph and network disagree over {parity.films} films: {', '.join(found)}, "
        f"largest activation {parity.peak_activation:.4g} (float16 ends at {HALF_MAX:.0f}); "
        "nothing was written"
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
