"""OpenVINO as a backend: the graph itself, compiled for a named device when it is loaded.

It computes in float32 what the graph has not in int8, on any processor: bfloat16, its own default
where a processor has it, was never asked for and is refused. No cache: a compiled model that lies
on a disk is loaded by its path, and nobody would have verified it.
"""

from __future__ import annotations

import math
import queue
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.bundles.manifest import Arithmetic, DataType, Manifest, Precision, Target
from cxrgaze.bundles.verdicts import Gate
from cxrgaze.errors import IncompatibleError, IntegrityError, OutOfMemoryError
from cxrgaze.processors import cpu_count
from cxrgaze.runtime import graph_look
from cxrgaze.runtime.backend import ANY_TARGET, Backend
from cxrgaze.runtime.plans import BuiltEngine
from cxrgaze.runtime.proofs import ProofInputs, ProofRecord
from cxrgaze.spec import IMAGE, ModelSpec, Outputs

INSTALL = "install cxrgaze with its extra 'openvino' (README, Installing)"

PRECISION: DataType = "fp32"
"""What it computes in where the graph is not int8."""

_ASKED = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": ""}
_TYPES: Mapping[str, DataType] = {
    "u8": "int8",
    "i8": "int8",
    "f32": "fp32",
    "f16": "fp16",
    "bf16": "bf16",
}
_BYTES: Mapping[DataType, int] = {"int8": 1, "fp16": 2, "bf16": 2, "fp32": 4}


class OpenVINO(Backend):
    """Compiles `model.onnx` for one device and runs it a film at a time.

    Args:
        inputs: what a proof of it depends on: bundle, version, device, processor.
        record: the proof that was made of just that; None where there is none.
        threads: None takes a core each.
        at_once: threads that may infer at once; each has a stream of its own.
    """

    name = "openvino"
    serves: Mapping[Precision, frozenset[Target]] = {
        "fp32": ANY_TARGET,
        "fp16": ANY_TARGET,
        "int8": frozenset({"openvino"}),  # it crashes on the form for ONNX Runtime
    }

    def __init__(
        self,
        inputs: ProofInputs,
        record: ProofRecord | None = None,
        threads: int | None = None,
        at_once: int = 1,
    ) -> None:
        self.at_once = at_once
        self._inputs = inputs
        self._threads = threads or cpu_count()
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._spec: ModelSpec | None = None
        self.built: BuiltEngine | None = None
        """What was built, once it is active."""
        # Its own verdict: what the graph passed in another library says nothing of this one.
        self.gate = (record and record.gate) or Gate(
            level="engine",
            verdict="not_gated",
            reason="not proven here: its accuracy on this processor was not measured; run: "
            f"cxrgaze-build --device {inputs.asked} --gate SET",
        )
        self.identity = {
            "library": f"openvino {inputs.library_version}",
            "proof": inputs.key if record else "none",
        }

    def arithmetic(self, manifest: Manifest) -> Arithmetic:
        """float32 for float16 graphs too."""
        return "int8" if manifest.precision == "int8" else "float32"

    def activate(self, bundle: Bundle) -> None:
        """Compile the graph from the bundle's verified bytes.

        Raises:
            IntegrityError: not an ONNX graph, or not the graph that the manifest describes.
            IncompatibleError: OpenVINO cannot run it, runs it on another device than was asked for,
                or in another precision.
            OutOfMemoryError: no room for it.
        """
        openvino = _library()
        graph = bundle.read(GRAPH)
        try:
            graph_look.require_own_data(graph)
            graph_look.require_known(graph)
        except IntegrityError as error:
            raise IntegrityError(f"{bundle.path / GRAPH}: {error}") from error
        spec = bundle.manifest.spec
        with _errors_are_ours(self._inputs.library_version):
            core = openvino.Core()
            model = core.read_model(graph)
            _require_interface(model, bundle)
            model.reshape({IMAGE: [1, 1, spec.height, spec.width]})
            share = {"NUM_STREAMS": self.at_once}
            if self._inputs.device == "CPU":  # no other knows it
                share["INFERENCE_NUM_THREADS"] = self._threads
            compiled = core.compile_model(model, self._inputs.device, {**_ASKED, **share})
            facts = {
                "devices": list(compiled.get_property("EXECUTION_DEVICES")),
                "precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
            }
            built = built_engine(compiled.get_runtime_model())
            requests = [compiled.create_infer_request() for _ in range(self.at_once)]
        require_asked(self._inputs.device, facts["devices"], facts["precision"], built)
        self.device = ", ".join(facts["devices"]).lower()
        self.built, self._spec = built, spec
        for request in requests:
            self._requests.put(request)

    def infer(self, image: NDArray[np.float32]) -> Outputs:
        """The heads of `image` `(N, 1, H, W)`; the outputs belong to the caller."""
        if self._spec is None:
            raise RuntimeError("infer before activate")
        heads = self._spec.heads
        request = self._requests.get()
        try:
            with _errors_are_ours(self._inputs.library_version):
                found = [_one(request, film[None], heads) for film in image]
        finally:
            self._requests.put(request)
        return {head: np.concatenate([one[head] for one in found]) for head in heads}

    def deactivate(self) -> None:
        """Free the compiled model."""
        self._spec = None
        self._requests = queue.SimpleQueue()


def _one(request: Any, image: NDArray[np.float32], heads: Sequence[str]) -> dict[str, Any]:
    given = request.infer({IMAGE: image})
    return {head: np.array(given[head]) for head in heads}


def require_asked(device: str, devices: Sequence[str], precision: str, built: BuiltEngine) -> None:
    """Refuse a compiled model that runs elsewhere or otherwise than was asked for.

    Args:
        device: that was asked for. devices: that it says it runs on.
        precision: OpenVINO's own name of that of what is not int8.
        built: what its layers are.

    Raises:
        IncompatibleError: saying what was asked for and what was found.
    """
    if [name.split(".")[0] for name in devices] != [device]:
        raise IncompatibleError(f"OpenVINO was asked for {device} and runs on {devices}")
    other = {kind for kind in built.convolution_macs_by_type if kind not in ("int8", PRECISION)}
    if precision not in ("f32", "float32") or other:
        raise IncompatibleError(
            f"OpenVINO was asked for float32 beside int8 and says {precision}, its convolutions "
            f"are in {', '.join(sorted(built.convolution_macs_by_type))}: other numbers than those "
            "that anything was proven of"
        )


def built_engine(runtime_model: Any) -> BuiltEngine:
    """What OpenVINO made of a graph, from its runtime model (`CompiledModel.get_runtime_model`)."""
    layers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for layer in runtime_model.get_ops():
        facts = layer.get_rt_info()
        said = facts["runtimePrecision"].astype(str)
        kind = _TYPES.get(said, said)
        layers[kind] += 1
        if facts["layerType"].astype(str) != "Convolution":
            continue
        weight = list(layer.input(1).get_source_output().get_shape())
        output = list(layer.output(0).get_shape())
        # (O, I, h, w) and of groups (G, O / G, I / G, h, w): the last three make one output value.
        macs[kind] += math.prod(output) * math.prod(weight[-3:])
        weights[kind] += math.prod(weight) * _BYTES.get(kind, 4)
    return BuiltEngine(
        layers=sum(layers.values()),
        layers_by_type=dict(layers),
        weight_bytes_by_type=dict(weights),
        convolution_macs_by_type=dict(macs),
        device_memory_bytes=0,
    )


def _library() -> Any:
    try:
        import openvino
    except (ImportError, OSError) as error:
        raise IncompatibleError(f"OpenVINO cannot be imported ({error}); {INSTALL}") from error
    return openvino


def _require_interface(model: Any, bundle: Bundle) -> None:
    spec = bundle.manifest.spec
    takes = {
        tensor.get_any_name(): [size.get_length() if size.is_static else None for size in shape][1:]
        for tensor in model.inputs
        for shape in [tensor.partial_shape]
    }
    gives = {tensor.get_any_name() for tensor in model.outputs}
    if takes != {IMAGE: [1, spec.height, spec.width]} or gives != set(spec.heads):
        raise IntegrityError(
            f"{bundle.path / GRAPH} takes {takes} and gives {sorted(gives)}, expected {IMAGE} "
            f"(N, 1, {spec.height}, {spec.width}) and {', '.join(spec.heads)}"
        )


@contextmanager
def _errors_are_ours(version: str) -> Iterator[None]:
    """What OpenVINO raises becomes an error of ours: to it all is a RuntimeError."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError("OpenVINO: out of memory") from error
    except RuntimeError as error:
        said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        if "Unable to read the model" in said:
            raise IntegrityError(f"not a valid graph: {said}") from error
        if "bad_alloc" in said or "out of memory" in said.lower():
            raise OutOfMemoryError(f"OpenVINO: out of memory: {said}") from error
        raise IncompatibleError(f"OpenVINO {version} cannot run this graph: {said}") from error
