"""ONNX Runtime on the CPU: the embedded default, and the host's witness of a graph."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.bundles.manifest import Arithmetic, Manifest, Precision, Target
from cxrgaze.errors import IncompatibleError, IntegrityError, OutOfMemoryError
from cxrgaze.processors import cpu_count, is_confined
from cxrgaze.runtime import graph_look
from cxrgaze.runtime.backend import ANY_TARGET, Backend
from cxrgaze.spec import HEADS, IMAGE, SPEC_KEY, Infer, Outputs


def open_session(
    graph: bytes, threads: int | None = None, *, spinning: bool = True, optimized: bool = True
) -> onnxruntime.InferenceSession:
    """A session on the CPU for a graph of any precision and target.

    Args:
        threads: intra-op threads; None leaves the choice to ONNX Runtime (one per core), which
            knows no container's quota: there it is `processors.cpu_count`.
        spinning: threads spin between films, which wins on an idle machine only.
        optimized: False runs the nodes as they are written.

    Raises:
        IntegrityError: no graph, or one that keeps data in other files.
        IncompatibleError: this ONNX Runtime cannot run it.
        OutOfMemoryError: no room for it.
    """
    graph_look.require_own_data(graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or (cpu_count() if is_confined() else 0)
    options.log_severity_level = 3
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with _errors_are_ours():
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def heads_of(session: onnxruntime.InferenceSession) -> Infer:
    """What a session says of images: the heads that its graph has.

    What it returns raises:
        IncompatibleError: this ONNX Runtime cannot run the graph on it.
        OutOfMemoryError: no room for it.
    """
    there = {output.name for output in session.get_outputs()}
    heads = [head for head in HEADS if head in there]

    def infer(image: NDArray[np.float32]) -> Outputs:
        with _errors_are_ours():
            return dict(zip(heads, session.run(heads, {IMAGE: image}), strict=True))

    return infer


def witness(graph: bytes, *, optimized: bool = True) -> Infer:
    """What ONNX Runtime says with a graph: it proves, and serves nobody.

    Threads that spin between films cost more than they win where other work goes on.
    """
    return heads_of(open_session(graph, spinning=False, optimized=optimized))


class OnnxRuntime(Backend):
    """Runs `model.onnx` on the CPU provider.

    It computes float16 graphs in float32 with casts: the rounding of weights and tensors is real,
    the arithmetic is not that of a GPU (docs/graphs.md#witness).

    Args:
        threads: as `open_session`.
        at_once: threads that may infer at once; they share the others between them.
    """

    name = "onnxruntime"
    serves: Mapping[Precision, frozenset[Target]] = {
        "fp32": ANY_TARGET,
        "fp16": ANY_TARGET,
        "int8": frozenset({"cpu"}),
    }

    def __init__(self, threads: int | None = None, at_once: int = 1) -> None:
        self.at_once = at_once
        # A caller computes beside the pool that all of them share.
        own = threads or (cpu_count() if at_once > 1 else None)
        self._threads = max(own - at_once + 1, 1) if own else None
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
        graph = bundle.read(GRAPH)
        try:
            graph_look.require_known(graph)
            session = open_session(graph, self._threads)
        except IntegrityError as error:
            raise IntegrityError(f"{bundle.path / GRAPH}: {error}") from error
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
        shapes = {head: list(shape[1:]) for head, shape in spec.shapes(1).items()}
        found = {output.name: list(output.shape[1:]) for output in session.get_outputs()}
        if found != shapes:
            raise IntegrityError(f"{bundle.path / GRAPH} gives {found}, expected {shapes}")
        self._infer = heads_of(session)

    def infer(self, image: NDArray[np.float32]) -> Outputs:
        """The heads of `image` `(N, 1, H, W)`; the outputs belong to the caller."""
        if self._infer is None:
            raise RuntimeError("infer before activate")
        return self._infer(image)

    def deactivate(self) -> None:
        """Free the session."""
        self._infer = None


@contextlib.contextmanager
def _errors_are_ours() -> Iterator[None]:
    """Whatever ONNX Runtime raises becomes an error of ours; its classes have no common base."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError("ONNX Runtime: out of memory") from error
    except Exception as error:
        kind, said = type(error).__name__, str(error) or "no message"
        if type(error).__module__ != _MODULE:
            raise
        if kind in _MALFORMED:
            raise IntegrityError(f"not a valid graph: {said}") from error
        if _NO_ROOM.search(said):
            raise OutOfMemoryError(f"ONNX Runtime: out of memory: {said}") from error
        raise IncompatibleError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run this graph ({kind}): {said}"
        ) from error


_MODULE = "onnxruntime.capi.onnxruntime_pybind11_state"
_MALFORMED = ("InvalidProtobuf", "InvalidGraph", "NoModel")
_NO_ROOM = re.compile(r"bad_alloc|bad allocation|[Ff]ailed to allocate|out of memory")
