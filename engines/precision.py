"""What precision was really built: the engine inspector's answer against the graph's promise.

A TensorRT asked for float16 has been seen to build float32 and exit with 0
(docs/graphs.md#built-precision). In
a strongly typed network the graph decides, and this is where that is checked: multiply-accumulates
of convolutions by the type of their input, as the inspector shows them, against those that
`cxrgaze-export` counted in the graph.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from cxrgaze.bundles.manifest import DataType, Precision
from cxrgaze.errors import BuildError
from cxrgaze.runtime.plans import BuiltEngine, BuiltPrecision

SLACK = 0.05
"""Share of the convolution work that may be in another type than the graph says."""

_NAMES: tuple[tuple[str, DataType], ...] = (
    (r"int8", "int8"),
    (r"fp8|e4m3", "fp8"),
    (r"bf16|bfloat16", "bf16"),
    (r"fp16|half|float16", "fp16"),
    (r"fp32|float|float32", "fp32"),
)


class Judgement(NamedTuple):
    """A verdict on the built precision, and why."""

    verdict: BuiltPrecision
    why: str


def built_engine(information: str, device_memory_bytes: int) -> BuiltEngine:
    """The figures of an engine from its inspector's JSON (detailed profiling verbosity).

    Layers that the library fused into blocks of its own show neither kernel nor weights; they count
    as layers and nothing else.

    Raises:
        BuildError: it is not the JSON of an inspector.
    """
    try:
        layers = json.loads(information)["Layers"]
        named = [layer if isinstance(layer, dict) else {"Name": str(layer)} for layer in layers]
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"the engine inspector's answer is not understood: {error!r}") from error
    by_type: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for layer in named:
        by_type[_input_type(layer)] += 1
        if isinstance(stored := _parameter(layer, "Weights"), dict) and "Count" in stored:
            held = _data_type(str(stored.get("Type", "")))
            weights[held] += int(stored["Count"]) * _BYTES.get(held, 4)
        if work := _convolution_macs(layer):
            macs[_arithmetic(layer)] += work
    return BuiltEngine(
        layers=len(named),
        layers_by_type=dict(by_type),
        weight_bytes_by_type=dict(weights),
        convolution_macs_by_type=dict(macs),
        device_memory_bytes=device_memory_bytes,
    )


def judge(
    precision: Precision,
    promised: Mapping[DataType, int],
    engine: BuiltEngine,
    *,
    tf32: bool = False,
) -> Judgement:
    """Whether an engine has the precision that its graph promised.

    With T the graph's convolution work and P its part in the asked type, both counted by the
    exporter: *proven* if the inspector shows at least P - 5 % of T in that type, *contradicted* if
    it shows more than T - P + 5 % of T in others, so that what it hides cannot make up for it,
    *opaque* else.

    Args:
        tf32: TensorFloat-32 was allowed and counts as float32.
    """
    total = sum(promised.values())
    wanted = promised.get(precision, 0)
    shown = Counter(engine.convolution_macs_by_type)
    if tf32:
        shown["fp32"] += shown.pop("tf32", 0)
    right = shown.get(precision, 0)
    other = sum(shown.values()) - right
    share = (
        f"the inspector shows {_percent(right, total)} of the graph's convolution work with "
        f"{precision} input and {_percent(other, total)} with another type; the graph has "
        f"{_percent(wanted, total)}"
    )
    if total and other > total - wanted + SLACK * total:
        return Judgement("contradicted", share)
    if total and right >= wanted - SLACK * total:
        return Judgement("proven", share)
    return Judgement("opaque", f"{share}; what it hides, inside fused blocks, may be either")


_BYTES = {"int8": 1, "fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}


def _input_type(layer: Mapping[str, Any]) -> str:
    inputs = layer.get("Inputs")
    if not isinstance(inputs, list) or not inputs or not isinstance(inputs[0], dict):
        return "unknown"
    # One key in TensorRT 8 to 10, two in 11 and TensorRT-RTX.
    return _data_type(str(inputs[0].get("Datatype") or inputs[0].get("Format/Datatype", "")))


def _arithmetic(layer: Mapping[str, Any]) -> str:
    """Type of a convolution: its input's, but TensorFloat-32 where the kernel's name has it."""
    kind = _input_type(layer)
    is_tf32 = kind == "fp32" and "tf32" in str(layer.get("TacticName", "")).lower()
    return "tf32" if is_tf32 else kind


def _data_type(text: str) -> str:
    for pattern, name in _NAMES:
        if re.search(rf"(?<![a-z0-9])({pattern})(?![a-z0-9])", text.lower()):
            return name
    return "unknown"


def _parameter(layer: Mapping[str, Any], name: str) -> Any:
    """A parameter of a convolution, which one fused with a pooling has under another name."""
    return layer.get(name, layer.get(f"Conv{name}"))


def _convolution_macs(layer: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one film, 0 for what is or shows no convolution.

    Of a convolution fused with a pooling the inspector shows the pooled output only: its work comes
    out too small by the pooling's factor, which errs towards *opaque*.
    """
    kernel, maps = _parameter(layer, "Kernel"), _parameter(layer, "OutMaps")
    inputs, outputs = layer.get("Inputs"), layer.get("Outputs")
    if not (kernel and maps and inputs and outputs):
        return 0
    channels, out = inputs[0].get("Dimensions", []), outputs[0].get("Dimensions", [])
    if len(channels) < 2 or len(out) < 3 or min(*kernel, maps, channels[1], *out[2:]) < 1:
        return 0  # -1: a dynamic shape
    groups = max(int(_parameter(layer, "Groups") or 1), 1)
    work: int = maps * math.prod(out[2:]) * math.prod(kernel) * channels[1] // groups
    return work


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total:.1f} %" if total else "none"
