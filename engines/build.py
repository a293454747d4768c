"""From a bundle's graph to a plan: one strongly typed build for the three TensorRTs."""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.command import Deferred, deferred_interrupts, say, steps
from cxrgaze.engines import precision
from cxrgaze.environment import now_utc
from cxrgaze.errors import (
    BuildError,
    GateError,
    IncompatibleError,
    OutOfMemoryError,
    UsageError,
)
from cxrgaze.evidence import gate
from cxrgaze.files import sha256
from cxrgaze.runtime import device, host, plans
from cxrgaze.runtime.trt import TensorRT, load_engine
from cxrgaze.runtime.trt_library import Library
from cxrgaze.spec import IMAGE

OPAQUE = (
    "no engine was loaded: it was compiled ahead of time, without its GPU. Accepted and built by "
    "the library, not run; what precision its layers have is for the device to show"
)

BASE_BYTES = 150_000_000
"""What a build takes whatever the graph."""

BYTES_PER_GRAPH_BYTE = 4.2
"""What a build takes for each byte of the graph: the parsed weights, their copies, the plan.

Measured with TensorRT-RTX 1.7.1 ahead of time on x86_64: 126 MB for the demo's 0.7 MB, 564 MB for
the paper's 134 MB (fp16), 977 MB for its 267 MB (fp32). Not measured with TensorRT 10 or 11.
"""

SMALLEST_WORKSPACE = 256 << 20
"""Below this much left for timing kernels, a build is not begun."""


@dataclass(frozen=True)
class BuildOptions:
    """What `cxrgaze-build` was asked for."""

    batch: tuple[int, int, int] = (1, 1, 1)
    """Smallest, best and largest batch."""
    capabilities: tuple[str, ...] = ()
    """Compute capabilities for an ahead-of-time build; none: the GPU here."""
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    allow_host_code: bool = False
    """Build and load a plan that brings code of its own for the CPU (`version_compatible`)."""
    tf32: bool = False


@dataclass(frozen=True)
class Site:
    """Where a plan is built: what depends on the machine, asked once."""

    gpu: device.Gpu | None
    """None: ahead of time."""
    why_no_gpu: str
    available_bytes: int | None
    """Memory of the host that can be had; None where the system does not say."""
    l4t: str | None


class Built(NamedTuple):
    """A plan in the cache."""

    record: plans.PlanRecord
    was_cached: bool


def this_site() -> Site:
    """This machine."""
    visible = device.gpus()
    why = visible if isinstance(visible, str) else ""
    gpu = None if isinstance(visible, str) else visible[0]
    return Site(gpu, why, host.available_memory_bytes(), host.l4t_release())


def plan_inputs(
    bundle: Bundle, library: Library, options: BuildOptions, site: Site
) -> plans.PlanInputs:
    """The inputs of a build, which name its plan.

    Raises:
        UsageError: an option that this library does not have, or host code that is not allowed.
        IncompatibleError: no GPU here and no `--sm`; a capability that it cannot compile for.
    """
    library.refuse_options(
        workspace=options.workspace_bytes,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        cpu_only=options.capabilities,
    )
    if options.version_compatible and not options.allow_host_code:
        raise UsageError(
            "a version-compatible plan carries code that runs on the CPU when it is loaded; add "
            "--allow-host-code, here and where it is read"
        )
    for sm in options.capabilities:
        library.capability(sm)
    if not options.capabilities and site.gpu is None:
        raise IncompatibleError(
            f"no GPU was found here ({site.why_no_gpu}); with tensorrt_rtx, say for which one to "
            "compile ahead of time, as: --cpu-only --sm 86,89"
        )
    if options.hardware_compatible and site.l4t:
        raise IncompatibleError("--hardware-compatible is for discrete GPUs, here is a Jetson")
    here = (site.gpu.capability,) if site.gpu else ()
    return plans.PlanInputs(
        bundle_sha256=bundle.sha256,
        library="tensorrt_rtx" if library.is_rtx else "tensorrt",
        library_version=library.version,
        architecture=options.capabilities or here,
        platform=host.host_platform(),
        batch=options.batch,
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_bytes,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        tf32=options.tf32,
    )


def workspace_to_give(asked: int | None, graph_bytes: int, site: Site) -> int | None:
    """Workspace of a build in bytes; None leaves it to the library.

    On a GPU that shares the host's memory, TensorRT's own limit, all of the device's memory, lets
    the kernel kill the build. There it is at most half of what is left beside the build itself.

    Raises:
        OutOfMemoryError: there is not enough for the build at all.
    """
    if site.gpu is None or not site.gpu.integrated or site.available_bytes is None:
        return asked
    itself = int(BASE_BYTES + BYTES_PER_GRAPH_BYTE * graph_bytes)
    needs = itself + 2 * SMALLEST_WORKSPACE
    if site.available_bytes < needs:
        raise OutOfMemoryError(
            f"the build needs about {needs / 1e6:.0f} MB, {site.available_bytes / 1e6:.0f} MB are "
            "free on this device, which shares them with the GPU; close other programs, stop the "
            "desktop, or add swap"
        )
    most = (site.available_bytes - itself) // 2
    return min(asked, most) if asked else most


def gated(
    bundle: Bundle,
    library: Library,
    cache: plans.Cache,
    record: plans.PlanRecord,
    films: gate.GateSet,
    *,
    allow_host_code: bool = False,
) -> plans.PlanRecord:
    """The record with the plan's own verdict, measured on this device; kept beside the plan.

    Raises:
        GateError: the plan loses more than a limit allows; it is deleted.
        DataError: the bundle has no reference, or none of these films.
        IncompatibleError, DeviceError: the plan cannot run here.
    """
    bundle.verify()
    backend = TensorRT(library, cache, record, allow_host_code=allow_host_code)
    backend.activate(bundle)
    try:
        verdict = gate.judge_engine(bundle, films, backend.infer)
    finally:
        backend.deactivate()
    if verdict.verdict == "fail":
        cache.remove(record.inputs)
        raise GateError(
            f"gate of the plan on {backend.device}: {verdict.reason}. The plan was deleted; build "
            "it from a bundle of higher precision"
        )
    record = record.model_copy(update={"gate": verdict})
    cache.store_record(record)
    return record


def build(
    bundle: Bundle,
    library: Library,
    options: BuildOptions,
    cache: plans.Cache,
    *,
    rebuild: bool = False,
) -> Built:
    """The plan of a bundle: from the cache where the same inputs were built before.

    Raises:
        BuildError: the library refuses the graph or cannot build it, with its own messages; it
            built another precision than the graph has, and the plan is not kept.
        IntegrityError: a bundle or a cache that was altered.
        OutOfMemoryError: the device has no room for the build.
        UsageError, IncompatibleError: as `plan_inputs`; an int8 graph of another target.
    """
    manifest = bundle.manifest
    if manifest.target not in TensorRT.serves[manifest.precision]:
        raise IncompatibleError(
            f"{bundle.path} is {manifest.precision} for target {manifest.target}, which TensorRT "
            "does not take; export it again with --target tensorrt"
        )
    bundle.verify(leave=(GRAPH,))
    site = this_site()
    inputs = plan_inputs(bundle, library, options, site)
    graph = bundle.read(GRAPH)
    if not rebuild and (record := cache.find(inputs)):
        cache.read(record)
        return Built(record, was_cached=True)
    cache.make()
    workspace = workspace_to_give(options.workspace_bytes, len(graph), site)
    started = time.perf_counter()
    timing = cache.timing_path(inputs)
    with deferred_interrupts() as interrupts:  # the library swallows what is raised in callbacks
        plan = _serialized(graph, library, options, workspace, timing, bundle, interrupts)
    seconds = time.perf_counter() - started
    record = plans.PlanRecord(
        bundle_name=bundle.manifest.name,
        inputs=inputs,
        plan_sha256=sha256(plan),
        plan_bytes=len(plan),
        workspace_bytes=workspace,
        built_precision="opaque",
        built_precision_why=OPAQUE,
        build_seconds=round(seconds, 3),
        created_utc=now_utc(),
        built_on=_built_on(site, ahead_of_time=bool(options.capabilities)),
    )
    if not options.capabilities:
        record = _proven(record, plan, library, options, bundle)
        if record.built_precision == "contradicted":
            cache.remove(inputs)
            raise BuildError(
                f"{library.name} {library.version} built another precision than the graph has: "
                f"{record.built_precision_why}. The plan was deleted; try --rebuild once, and "
                "else another version of the library"
            )
    return Built(cache.store(record, plan), was_cached=False)


def _built_on(site: Site, *, ahead_of_time: bool) -> dict[str, str]:
    facts = {"gpu": "none", "python": platform.python_version()}
    if site.gpu and not ahead_of_time:
        facts |= {"gpu": site.gpu.name, "driver_cuda": site.gpu.driver_cuda}
    if site.l4t:
        facts |= {"l4t": site.l4t, "power_mode": host.power_mode() or "unknown"}
    return facts


def _proven(
    record: plans.PlanRecord, plan: bytes, library: Library, options: BuildOptions, bundle: Bundle
) -> plans.PlanRecord:
    """The record with the verdict on the precision that was built."""
    engine = inspected(record, plan, library, allow_host_code=options.allow_host_code)
    manifest = bundle.manifest
    verdict, why = precision.judge(
        manifest.precision, manifest.convolution_macs, engine, tf32=options.tf32
    )
    update = {"engine": engine, "built_precision": verdict, "built_precision_why": why}
    return record.model_copy(update=update)


def inspected(
    record: plans.PlanRecord, plan: bytes, library: Library, *, allow_host_code: bool
) -> plans.BuiltEngine:
    """What the library says of the engine, once it is loaded on its device."""
    form = library.module.LayerInformationFormat.JSON
    opened = device.open_device()
    try:
        with opened.current():
            loaded = load_engine(library, record, plan, allow_host_code=allow_host_code)
            engine = loaded.engine
            inspector = engine.create_engine_inspector()
            information = inspector.get_engine_information(form)
            built = precision.built_engine(information, int(engine.device_memory_size_v2))
            del inspector, engine, loaded  # before the device goes
    finally:
        opened.close()
    return built


def _serialized(
    graph: bytes,
    library: Library,
    options: BuildOptions,
    workspace: int | None,
    timing: Path,
    bundle: Bundle,
    interrupts: Deferred,
) -> bytes:
    trt = library.module
    log = library.logger(on_warning=lambda message: say(f"  {message}"))
    builder = trt.Builder(log)
    network = builder.create_network(library.network_flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        problems = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        said = "; ".join(dict.fromkeys(problems)) or library.said(log)
        raise BuildError(f"{library.name} {library.version} does not accept the graph: {said}")
    _check_interface(network, bundle)
    config = builder.create_builder_config()
    _configure(config, builder, library, options, workspace, bundle)
    monitor = _monitor(trt, interrupts)
    config.progress_monitor = monitor
    try:
        with library.timing_cache(config, timing):
            plan = None if interrupts.asked else builder.build_serialized_network(network, config)
            if interrupts.asked:
                raise KeyboardInterrupt
            if plan is None:
                raise BuildError(
                    f"{library.name} {library.version} could not build the plan: "
                    f"{library.said(log)}"
                )
    finally:
        monitor.close()
    return bytes(plan)


def _configure(
    config: Any,
    builder: Any,
    library: Library,
    options: BuildOptions,
    workspace: int | None,
    bundle: Bundle,
) -> None:
    trt, spec = library.module, bundle.manifest.spec
    profile = builder.create_optimization_profile()
    profile.set_shape(IMAGE, *((n, 1, spec.height, spec.width) for n in options.batch))
    config.add_optimization_profile(profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what the proof reads
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default in all three
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    library.target(config, options.capabilities)


def _check_interface(network: Any, bundle: Bundle) -> None:
    spec = bundle.manifest.spec
    inputs = {
        (t.name, tuple(t.shape)[1:]) for t in map(network.get_input, range(network.num_inputs))
    }
    outputs = {t.name for t in map(network.get_output, range(network.num_outputs))}
    if inputs != {(IMAGE, (1, spec.height, spec.width))} or outputs != set(spec.heads):
        raise BuildError(
            f"{bundle.path / GRAPH}: the parsed network takes {inputs} and gives {outputs}, "
            f"expected {IMAGE} (1, {spec.height}, {spec.width}) and {', '.join(spec.heads)}"
        )


def _parser_error(error: Any) -> str:
    node = f" ({error.node_operator()} {error.node_name()})" if error.node_name() else ""
    return f"{error.desc()}{node}"


def _monitor(trt: Any, interrupts: Deferred) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # known when run
        """A bar over the outermost phases' steps in a terminal, a line a phase without one.

        An interrupt that was asked for stops the build at the next step: what is raised in here
        the library swallows.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps = 0
            self._bars: dict[str, Any] = {}

        def phase_start(self, name: str, parent: str | None, count: int) -> None:
            if not sys.stderr.isatty():
                say(f"  {name}" + (f" ({count} steps)" if count > 1 else ""))
            self._bars[name] = steps(count, sys.stderr.isatty())
            self._bars[name].set_description(name)

        def step_complete(self, name: str, step: int) -> bool:
            self.steps += 1
            if name in self._bars:
                self._bars[name].update()
            return not interrupts.asked

        def phase_finish(self, name: str) -> None:
            if name in self._bars:
                self._bars.pop(name).close()

        def close(self) -> None:
            for bar in self._bars.values():
                bar.close()

    return Monitor()
