"""What float16 does to a network's activations, before a GPU shows it.

ONNX Runtime's CPU computes float16 graphs in float32 and returns the right answer for a chain that
reaches 9e6: it is no witness (docs/graphs.md#witness). Two things are: the range of every
activation in the float32 graph, and a float32 run in which the output of every operation is rounded
to float16 and back, as the typed graph would have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cxrgaze.bundles.verdicts import Audit, Histogram, differences
from cxrgaze.errors import ParityError
from cxrgaze.export.fp16 import HALF_MAX, KEEP, float_tensors
from cxrgaze.export.ranges import Tally, collect
from cxrgaze.runtime.ort import witness
from cxrgaze.spec import Head


def audit(model: onnx.ModelProto, images: Sequence[NDArray[np.float32]], domain: str) -> Audit:
    """Ranges and rounding of a float32 graph over films.

    Args:
        images: canvases `(1, H, W)`.
        domain: what the films are, for the record.
    """
    outputs = [name for node in model.graph.node for name in node.output]
    floating = float_tensors(model)
    tallies = collect(model, [name for name in outputs if name in floating], images)
    kept = {n for node in model.graph.node if node.op_type in KEEP for n in node.output}
    largest = max(tallies, key=lambda name: tallies[name].largest)
    worst = max(tallies, key=lambda name: tallies[name].subnormal_share)
    some = {name: tally.nonzero for name, tally in tallies.items()}
    small = sum(tallies[name].subnormal_share * count for name, count in some.items())
    rounding = _rounding(model, images)
    return Audit(
        films=len(images),
        domain=domain,
        largest=min(tallies[largest].largest, float(np.finfo(np.float32).max)),
        largest_tensor=largest,
        overflowing=tuple(
            name
            for name, tally in tallies.items()
            if name not in kept and (tally.largest > HALF_MAX or not tally.finite)
        ),
        subnormal_share=small / max(sum(some.values()), 1),
        worst_subnormal_share=tallies[worst].subnormal_share,
        worst_subnormal_tensor=worst,
        rounding_finite=min(rounding.values()) >= 0,
        rounding=rounding,
        magnitudes=_magnitudes(list(tallies.values())),
    )


def _magnitudes(tallies: Sequence[Tally]) -> Histogram:
    """Absolute values of all tensors by powers of two, from the smallest to the largest there is.

    Exponent 0 of float32 (its subnormals) and 255 (infinity, NaN) stand as the next power of two.
    """
    counts = np.sum([tally.magnitudes for tally in tallies], axis=0)
    (there,) = np.nonzero(counts)
    if not len(there):
        return Histogram(edges=(1.0, 2.0), counts=(0,))
    exponents = range(int(there[0]), int(there[-1]) + 1)
    return Histogram(
        edges=tuple(2.0 ** (e - 127) for e in (*exponents, exponents[-1] + 1)),
        counts=tuple(int(counts[e]) for e in exponents),
    )


def require_no_overflow(audited: Audit) -> None:
    """Stop an export whose activations float16 cannot hold.

    Raises:
        ParityError: naming the tensor.
    """
    if audited.overflowing or not audited.rounding_finite:
        where = audited.overflowing[0] if audited.overflowing else "the rounding run"
        raise ParityError(
            f"float16 overflow: {where} (largest activation {audited.largest:.4g} in "
            f"{audited.largest_tensor}, float16 ends at {HALF_MAX:.0f}) over {audited.films} "
            "films; export with --precision fp32; nothing was written"
        )


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph in which every output is rounded to float16, but those that stay float32.

    To be run without graph optimizations, which could take the roundings for nothing.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    floating = float_tensors(model)
    results = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(node)
        for name in node.output:
            if name in floating and name not in results and node.op_type not in KEEP:
                half, back = f"{name}/rounded/half", f"{name}/rounded"
                nodes.append(helper.make_node("Cast", [name], [half], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [half], [back], to=TensorProto.FLOAT))
                renamed[name] = back
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return model


def _rounding(model: onnx.ModelProto, images: Sequence[NDArray[np.float32]]) -> dict[Head, float]:
    """The largest difference of each head to the float32 run; -1 where something is not finite."""
    plain, rough = (
        witness(m.SerializeToString(), optimized=False) for m in (model, rounded(model))
    )
    off: dict[Head, float] = {}
    for image in images:
        want, found = (infer(image[None]) for infer in (plain, rough))
        if not all(np.isfinite(array).all() for array in found.values()):
            return dict.fromkeys(found, -1.0)
        for head, array in found.items():
            largest = float(differences(head, array[0], want[head][0]).max())
            off[head] = max(off.get(head, 0.0), largest)
    return off
