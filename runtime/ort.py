"""The ONNX Runtime backend on the CPU: the embedded default, and the host's witness."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cxrgaze.bundle import GRAPH, Bundle, Gate, Precision, Target
from cxrgaze.errors import IncompatibleError, IntegrityError
from cxrgaze.runtime.backends import ANY, Outputs
from cxrgaze.spec import IMAGE, LOG_DENSITY, LOGITS, SPEC_KEY


class OnnxRuntime:
    """Runs `model.onnx` on the CPU provider.

    It computes float16 graphs in float32 with casts: the rounding of weights and tensors is real,
    the arithmetic is not that of a GPU (design.md section 6).

    Args:
        threads: intra-op threads; None leaves the choice to ONNX Runtime (one per core).
    """

    name = "onnxruntime"
    device = "cpu"
    serves: Mapping[Precision, frozenset[Target]] = {
        "fp32": ANY,
        "fp16": ANY,
        "int8": frozenset({"cpu"}),
    }
    tolerance = name
    gate: Gate | None = None
    notes: tuple[str, ...] = ()
    stages_ms: Mapping[str, float] = {}
    memory_bytes: Mapping[str, int] = {}

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._session: onnxruntime.InferenceSession | None = None

    def activate(self, bundle: Bundle) -> None:
        """Load the graph from the bundle's verified bytes.

        Raises:
            IntegrityError: not an ONNX graph, or not the graph that the manifest describes.
            IncompatibleError: this ONNX Runtime cannot run it.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.log_severity_level = 3
        graph = bundle.read(GRAPH)
        try:
            session = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        except (_ort("InvalidProtobuf"), _ort("InvalidGraph")) as error:
            raise IntegrityError(f"{bundle.path / GRAPH} is not a valid graph: {error}") from error
        except (_ort("NotImplemented"), _ort("Fail")) as error:
            raise IncompatibleError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run this graph: {error}"
            ) from error
        spec = bundle.manifest.spec
        found = session.get_modelmeta().custom_metadata_map.get(SPEC_KEY)
        if found != spec.model_dump_json():
            raise IntegrityError(f"{bundle.path / GRAPH}: its ModelSpec is not the manifest's")
        image = session.get_inputs()[0]
        if image.name != IMAGE or list(image.shape[1:]) != [1, spec.height, spec.width]:
            raise IntegrityError(
                f"{bundle.path / GRAPH} takes {image.name} {image.shape}, expected "
                f"{IMAGE} (N, 1, {spec.height}, {spec.width})"
            )
        self._session = session

    def infer(self, image: NDArray[np.float32]) -> Outputs:
        """Both heads of `image` `(N, 1, H, W)`; the outputs belong to the caller."""
        if self._session is None:
            raise RuntimeError("infer before activate")
        return Outputs(*self._session.run([LOGITS, LOG_DENSITY], {IMAGE: image}))

    def deactivate(self) -> None:
        """Free the session."""
        self._session = None


def _ort(name: str) -> type[Exception]:
    """An exception class of ONNX Runtime; they are defined in its C extension."""
    found: type[Exception] = getattr(onnxruntime.capi.onnxruntime_pybind11_state, name)
    return found
