"""From a bundle's graph to a plan: one strongly typed build for the three TensorRTs."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cxrgaze.bundle import GRAPH, Bundle
from cxrgaze.command import say, steps
from cxrgaze.errors import BuildError, IncompatibleError, UsageError
from cxrgaze.files import sha256
from cxrgaze.runtime import plans
from cxrgaze.runtime.host import host_platform
from cxrgaze.runtime.trt_library import Library
from cxrgaze.spec import IMAGE, LOG_DENSITY, LOGITS

OPAQUE = (
    "no engine was loaded: there is no GPU here. Accepted and built by the library, not run; what "
    "precision its layers have is for the device to show"
)


@dataclass(frozen=True)
class Options:
    """What `cxrgaze-build` was asked for."""

    batch: tuple[int, int, int] = (1, 1, 1)
    """Smallest, best and largest batch."""
    capabilities: tuple[str, ...] = ()
    """Compute capabilities for an ahead-of-time build."""
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    version_compatible: bool = False
    tf32: bool = False


class Built(NamedTuple):
    """A plan in the cache."""

    record: plans.PlanRecord
    was_cached: bool


def plan_inputs(bundle: Bundle, library: Library, options: Options) -> plans.PlanInputs:
    """The inputs of a build, which name its plan.

    Raises:
        UsageError: an option that this library does not have.
        IncompatibleError: no GPU here and no `--sm`; a capability that it cannot compile for.
    """
    if library.is_rtx:
        for name, value in (
            ("--workspace", options.workspace_bytes),
            ("--version-compatible", options.version_compatible),
        ):
            if value:
                raise UsageError(f"{library.name} has no {name}; leave it out")
        for sm in options.capabilities:
            library.capability(sm)
    elif options.capabilities:
        raise UsageError(
            f"{library.name} builds for the GPU that it runs on; --sm is for tensorrt_rtx"
        )
    if not options.capabilities:
        raise IncompatibleError(
            "no GPU was found here: with tensorrt_rtx, say for which one to compile ahead of time, "
            "as: --cpu-only --sm 86,89"
        )
    return plans.PlanInputs(
        bundle_sha256=bundle.sha256,
        library="tensorrt_rtx" if library.is_rtx else "tensorrt",
        library_version=library.version,
        architecture=options.capabilities,
        platform=host_platform(),
        batch=options.batch,
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_bytes,
        version_compatible=options.version_compatible,
        tf32=options.tf32,
    )


def build(
    bundle: Bundle,
    library: Library,
    options: Options,
    cache: plans.Cache,
    *,
    rebuild: bool = False,
) -> Built:
    """The plan of a bundle: from the cache where the same inputs were built before.

    Raises:
        BuildError: the library refuses the graph or cannot build it, with its own messages.
        IntegrityError: a bundle or a cache that was altered.
        UsageError, IncompatibleError: as `plan_inputs`.
    """
    bundle.verify(leave=(GRAPH,))
    inputs = plan_inputs(bundle, library, options)
    if not rebuild and (record := cache.find(inputs)):
        cache.read(record)
        return Built(record, was_cached=True)
    started = time.perf_counter()
    plan = _serialized(bundle.read(GRAPH), library, options, bundle)
    seconds = time.perf_counter() - started
    record = plans.PlanRecord(
        bundle_name=bundle.manifest.name,
        inputs=inputs,
        plan_sha256=sha256(plan),
        plan_bytes=len(plan),
        built_precision="opaque",
        built_precision_why=OPAQUE,
        build_seconds=round(seconds, 3),
        created_utc=plans.now_utc(),
        built_on={"gpu": "none", "python": platform.python_version()},
    )
    cache.store(record, plan)
    return Built(record, was_cached=False)


def _serialized(graph: bytes, library: Library, options: Options, bundle: Bundle) -> bytes:
    trt = library.module
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(library.network_flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        found = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BuildError(_failed(library, "does not accept the graph", found))
    _check_interface(network, bundle)
    config = builder.create_builder_config()
    spec = bundle.manifest.spec
    profile = builder.create_optimization_profile()
    shapes = [(n, 1, spec.height, spec.width) for n in options.batch]
    profile.set_shape(IMAGE, *shapes)
    config.add_optimization_profile(profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if library.is_rtx:
        config.num_compute_capabilities = len(options.capabilities)
        for index, sm in enumerate(options.capabilities):
            config.set_compute_capability(library.capability(sm), index)
    monitor = _monitor(trt)
    config.progress_monitor = monitor
    try:
        plan = builder.build_serialized_network(network, config)
    finally:
        monitor.close()
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise BuildError(_failed(library, "could not build the plan", log.errors))
    return bytes(plan)


def _check_interface(network: Any, bundle: Bundle) -> None:
    spec = bundle.manifest.spec
    inputs = {
        (t.name, tuple(t.shape)[1:]) for t in map(network.get_input, range(network.num_inputs))
    }
    outputs = {t.name for t in map(network.get_output, range(network.num_outputs))}
    if inputs != {(IMAGE, (1, spec.height, spec.width))} or outputs != {LOGITS, LOG_DENSITY}:
        raise BuildError(
            f"{bundle.path / GRAPH}: the parsed network takes {inputs} and gives {outputs}, "
            f"expected {IMAGE} (1, {spec.height}, {spec.width}) and {LOGITS}, {LOG_DENSITY}"
        )


def _parser_error(error: Any) -> str:
    node = f" ({error.node_operator()} {error.node_name()})" if error.node_name() else ""
    return f"{error.desc()}{node}"


def _failed(library: Library, what: str, found: Sequence[str]) -> str:
    said = "; ".join(dict.fromkeys(found)) or "nothing in its log"
    return f"{library.name} {library.version} {what}: {said}"


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc] # the base is known at run time only
        """Keeps errors for the message and shows warnings."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                say(f"  {message}")

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # likewise
        """A bar over the outermost phases' steps in a terminal, a line a phase without one.

        Ctrl-C reaches Python between two steps and stops the build at the next.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.steps = 0
            self._bars: dict[str, Any] = {}
            self._total = 0

        def phase_start(self, name: str, parent: str | None, count: int) -> None:
            if not sys.stderr.isatty():
                say(f"  {name}" + (f" ({count} steps)" if count > 1 else ""))
            self._bars[name] = steps(count, sys.stderr.isatty())
            self._bars[name].set_description(name)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                self.steps += 1
                if name in self._bars:
                    self._bars[name].update()
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, name: str) -> None:
            if name in self._bars:
                self._bars.pop(name).close()

        def close(self) -> None:
            for bar in self._bars.values():
                bar.close()

    return Monitor()
