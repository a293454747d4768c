"""Cost as work grows: batch, threads, canvas, precision; with the floor that arithmetic sets.

Graphs are made from the bundle's checkpoint and run in ONNX Runtime on the CPU: canvas and
precision need graphs that the bundle does not have. What they find on a film is not looked at. The
floor is the time that the convolutions' multiply-accumulates take at the rate of a large float32
matrix product on the same threads: no float32 graph comes below it, an int8 one may.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cxrgaze.benchmarks.peers import Weights
from cxrgaze.benchmarks.plain import plain_session
from cxrgaze.benchmarks.record import Point, Sweep
from cxrgaze.benchmarks.timing import latency
from cxrgaze.bundles.manifest import Precision
from cxrgaze.command import say
from cxrgaze.errors import UsageError
from cxrgaze.export import graph, int8
from cxrgaze.export.canvases import is_large
from cxrgaze.export.forms import Forms
from cxrgaze.export.targets import TARGETS
from cxrgaze.runtime.ort import heads_of
from cxrgaze.spec import STRIDE, Infer, ModelSpec

Name = Literal["batch", "threads", "canvas", "precision"]
CALLS = 30
"""Calls of a point, fewer where its seconds are over, never below 3."""
_FEWEST = 3
_PRODUCT = 1536  # side of the matrices whose product sets the floor


def asked(texts: Sequence[str], spec: ModelSpec, threads: int) -> dict[Name, tuple[str, ...]]:
    """Sweeps by name with their values, from `NAME` or `NAME=VALUE,VALUE`.

    Raises:
        UsageError: no such sweep, or values that are none.
    """
    defaults = _defaults(spec, threads)
    sweeps: dict[Name, tuple[str, ...]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in defaults:
            raise UsageError(f"--sweep {text}: expected one of {', '.join(defaults)}")
        chosen = tuple(filter(None, values.split(","))) or defaults[name]
        for value in chosen:
            _checked(name, value, spec)
        sweeps[cast(Name, name)] = chosen
    return sweeps


def _defaults(spec: ModelSpec, threads: int) -> Mapping[str, tuple[str, ...]]:
    sides = [
        tuple(max(round(side * scale / STRIDE), 1) * STRIDE for side in (spec.height, spec.width))
        for scale in ((0.5, 1, 2, 3) if not is_large(spec) else (0.25, 0.5, 0.75, 1))
    ]
    return {
        "batch": ("1", "2", "4", "8"),
        "threads": tuple(str(2**i) for i in range(threads.bit_length()) if 2**i <= threads),
        "canvas": tuple(dict.fromkeys(f"{h}x{w}" for h, w in sides)),
        "precision": get_args(Precision),
    }


def _checked(name: str, value: str, spec: ModelSpec) -> None:
    """Refuse a value that is none of its sweep."""
    try:
        if name == "precision":
            good = value in get_args(Precision)
        elif name == "canvas":
            good = all(side > 0 and side % STRIDE == 0 for side in _sides(value))
        else:
            good = int(value) > 0
    except ValueError:
        good = False
    if not good:
        expected = {
            "precision": ", ".join(get_args(Precision)),
            "canvas": f"HEIGHTxWIDTH in multiples of {STRIDE}",
        }.get(name, "a positive number")
        raise UsageError(f"--sweep {name}={value}: expected {expected}")


def _sides(value: str) -> tuple[int, int]:
    height, width = value.split("x")
    return int(height), int(width)


def measure(
    weights: Weights, wanted: Mapping[Name, Sequence[str]], seconds: float
) -> tuple[Sweep, ...]:
    """The sweeps, a graph a point.

    Args:
        seconds: a point stops after this time.
    """
    sweeps = []
    for name, values in wanted.items():
        points = []
        for value in values:
            say(f"  {name} {value}")
            points.append(_point(weights, name, value, seconds))
        sweeps.append(Sweep(name=name, points=tuple(points)))
    return tuple(sweeps)


def _point(weights: Weights, name: Name, value: str, seconds: float) -> Point:
    spec = weights.source.spec
    batch = int(value) if name == "batch" else 1
    threads = int(value) if name == "threads" else weights.threads
    if name == "canvas":
        height, width = _sides(value)
        spec = spec.model_copy(update={"height": height, "width": width})
    precision = cast(Precision, value) if name == "precision" else "fp32"
    model, macs = _graph(weights, spec, precision)
    infer = heads_of(plain_session(model, threads))
    shape = (batch, 1, spec.height, spec.width)
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    times = list(_calls(infer, image, seconds))
    per_call = batch * macs
    middle = float(np.median(times))
    return Point(
        at=value,
        cost=per_call / 1e9,
        latency=latency(times),
        films_per_s=batch * 1e3 / middle,
        floor_ms=per_call / _macs_per_ms(threads),
    )


def _graph(weights: Weights, spec: ModelSpec, precision: Precision) -> tuple[bytes, int]:
    """A graph for the CPU and its multiply-accumulates for one film."""
    row, layout = TARGETS["cpu"], weights.source.layout
    model = weights.exported(row.rewrites, spec)
    ranges = None
    if precision == "int8":
        names = row.ranged(model, layout)
        ranges = int8.calibrate(model, list(weights.calibration[:4]), names, "minmax")
    (form,) = Forms(model, precision, "cpu", layout, ranges).with_kept()
    macs = sum(graph.convolution_macs(form.model).values())
    return graph.finished(form.model, spec), macs


def _calls(infer: Infer, image: NDArray[np.float32], seconds: float) -> Iterator[float]:
    infer(image)
    deadline = time.perf_counter() + seconds
    for number in range(CALLS):
        start = time.perf_counter()
        infer(image)
        yield (time.perf_counter() - start) * 1e3
        if number + 1 >= _FEWEST and time.perf_counter() > deadline:
            return


def _macs_per_ms(threads: int) -> float:
    """Multiply-accumulates a millisecond of a large float32 matrix product, the best of five."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.rand(_PRODUCT, _PRODUCT)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, a)
            times.append((time.perf_counter() - start) * 1e3)
        return float(_PRODUCT**3 / min(times))
    finally:
        torch.set_num_threads(before)
