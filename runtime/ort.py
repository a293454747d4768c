"""ONNX Runtime on the CPU: the embedded default, and the host's witness of a graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.bundles.manifest import Arithmetic, Manifest, Precision, Target
from cxrgaze.errors import IncompatibleError, IntegrityError
from cxrgaze.runtime.backend import ANY_TARGET, Backend
from cxrgaze.spec import IMAGE, LOG_DENSITY, LOGITS, SPEC_KEY, Infer, Outputs


def open_session(
    graph: bytes, threads: int | None = None, *, spinning: bool = True, optimized: bool = True
) -> onnxruntime.InferenceSession:
    """A session on the CPU for a graph of any precision and target.

    Args:
        threads: intra-op threads; None leaves the choice to ONNX Runtime (one per core).
        spinning: threads spin between films, which wins on an idle machine only.
        optimized: False runs the nodes as they are written.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def both_heads(session: onnxruntime.InferenceSession) -> Infer:
    """What a session says of images."""
    return lambda image: Outputs(*session.run([LOGITS, LOG_DENSITY], {IMAGE: image}))


def witness(graph: bytes, *, optimized: bool = True) -> Infer:
    """What ONNX Runtime says with a graph: it proves, and serves nobody.

    Threads that spin between films cost more than they win where other work goes on.
    """
    return both_heads(open_session(graph, spinning=False, optimized=optimized))


class OnnxRuntime(Backend):
    """Runs `model.onnx` on the CPU provider.

    It computes float16 graphs in float32 with casts: the rounding of weights and tensors is real,
    the arithmetic is not that of a GPU (docs/graphs.md#witness).

    Args:
        threads: as `open_session`.
    """

    name = "onnxruntime"
    serves: Mapping[Precision, frozenset[Target]] = {
        "fp32": ANY_TARGET,
        "fp16": ANY_TARGET,
        "int8": frozenset({"cpu"}),
    }

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._infer: Infer | None = None

    def arithmetic(self, manifest: Manifest) -> Arithmetic:
        """float32 for float16 graphs too."""
        return "int8" if manifest.precision == "int8" else "float32"

    def activate(self, bundle: Bundle) -> None:
        """Load the graph from the bundle's verified bytes.

        Raises:
            IntegrityError: not an ONNX graph, or not the graph that the manifest describes.
            IncompatibleError: this ONNX Runtime cannot run it.
        """
        try:
            session = open_session(bundle.read(GRAPH), self._threads)
        except (_ort("InvalidProtobuf"), _ort("InvalidGraph")) as error:
            raise IntegrityError(f"{bundle.path / GRAPH} is not a valid graph: {error}") from error
        except (_ort("NotImplemented"), _ort("Fail")) as error:
            raise IncompatibleError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run this graph: {error}"
            ) from error
        spec = bundle.manifest.spec
        stored = session.get_modelmeta().custom_metadata_map.get(SPEC_KEY)
        if stored != spec.model_dump_json():
            raise IntegrityError(f"{bundle.path / GRAPH}: its ModelSpec is not the manifest's")
        image = session.get_inputs()[0]
        if image.name != IMAGE or list(image.shape[1:]) != [1, spec.height, spec.width]:
            raise IntegrityError(
                f"{bundle.path / GRAPH} takes {image.name} {image.shape}, expected "
                f"{IMAGE} (N, 1, {spec.height}, {spec.width})"
            )
        self._infer = both_heads(session)

    def infer(self, image: NDArray[np.float32]) -> Outputs:
        """Both heads of `image` `(N, 1, H, W)`; the outputs belong to the caller."""
        if self._infer is None:
            raise RuntimeError("infer before activate")
        return self._infer(image)

    def deactivate(self) -> None:
        """Free the session."""
        self._infer = None


def _ort(name: str) -> type[Exception]:
    """An exception class of ONNX Runtime; they are defined in its C extension."""
    error: type[Exception] = getattr(onnxruntime.capi.onnxruntime_pybind11_state, name)
    return error
