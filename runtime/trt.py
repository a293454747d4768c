"""The TensorRT backend, for all three libraries: one engine, one context, one stream.

Plain on purpose: buffers are allocated once, host buffers are page-locked, a batch goes to the
device, through the engine and back, and then the stream is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.bundle import Bundle
from cxrgaze.bundles.manifest import Arithmetic, Manifest, Precision, Target
from cxrgaze.bundles.verdicts import Gate
from cxrgaze.command import deferred_interrupts
from cxrgaze.errors import DeviceError, IncompatibleError, IntegrityError, OutOfMemoryError
from cxrgaze.runtime import plans
from cxrgaze.runtime.backend import ANY_TARGET, Backend
from cxrgaze.runtime.device import Device, open_device
from cxrgaze.runtime.trt_library import Library
from cxrgaze.spec import IMAGE, ModelSpec, Outputs

_STAGES = ("h2d", "compute", "d2h")


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialized engine; `runtime` must live as long as it does."""

    runtime: Any
    engine: Any
    log: Any
    notes: tuple[str, ...]
    """What is less than best, for the readings."""


def load_engine(
    library: Library, record: plans.PlanRecord, plan: bytes, *, allow_host_code: bool = False
) -> LoadedEngine:
    """Deserialize the verified bytes of a plan that fits (`plans.require_fit`).

    To be called inside `Device.current()`.

    Raises:
        IntegrityError: the bytes are no plan.
        IncompatibleError: another version's plan, or the library does not load it, with its log.
    """
    plans.check_header(plan, record.inputs)
    log = library.logger()
    runtime = library.module.Runtime(log)
    if record.has_host_code:
        runtime.engine_host_code_allowed = allow_host_code
    with deferred_interrupts():  # the library swallows what is raised in our logger
        note = library.require_valid(runtime, plan, log)
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise IncompatibleError(
            f"{library.name} {library.version} could not load the plan {record.inputs.key}: "
            f"{library.said(log)}; run: cxrgaze-build --rebuild"
        )
    return LoadedEngine(runtime, engine, log, (note,) if note else ())


class TensorRT(Backend):
    """Runs a plan of the cache.

    Args:
        library: the TensorRT that built it.
        cache: where it lies.
        record: its record, of this bundle and fit for this device.
        allow_host_code: load a plan that brings code of its own for the CPU.
        opens: makes the device.
    """

    serves: Mapping[Precision, frozenset[Target]] = {
        "fp32": ANY_TARGET,
        "fp16": ANY_TARGET,
        "int8": frozenset({"tensorrt"}),
    }

    def __init__(
        self,
        library: Library,
        cache: plans.Cache,
        record: plans.PlanRecord,
        *,
        allow_host_code: bool = False,
        opens: Callable[[], Device] = open_device,
    ) -> None:
        self.name = library.name
        self.device = record.built_on["gpu"]
        self._library = library
        self._cache = cache
        self._record = record
        # Its own verdict: what its graph passed on the host says nothing of the plan.
        self.gate = record.gate or Gate(
            level="engine",
            verdict="not_gated",
            reason="this plan's accuracy was not measured; run: cxrgaze-build --gate SET",
        )
        self._allow_host_code = allow_host_code
        self._opens = opens
        self._device: Device | None = None
        self._loaded: LoadedEngine | None = None
        self._context: Any = None
        self.identity = {
            "plan": record.inputs.key,
            "library": f"{library.name} {library.version}",
            "plan_options": _options(record.inputs),
        }

    def arithmetic(self, manifest: Manifest) -> Arithmetic:
        """TensorFloat-32 where the plan may use it for a float32 graph."""
        said = super().arithmetic(manifest)
        return "tf32" if said == "float32" and self._record.inputs.tf32 else said

    def activate(self, bundle: Bundle) -> None:
        """Load the plan, make its context and all buffers.

        Raises:
            IntegrityError: the plan is missing or altered, or not of this bundle.
            IncompatibleError: the library does not load it.
            OutOfMemoryError, DeviceError: the device has no room, or fails.
        """
        if self._record.inputs.bundle_sha256 != bundle.sha256:
            raise IntegrityError(f"the plan {self._record.inputs.key} is not of {bundle.path}")
        plan = self._cache.read(self._record)
        self._device = device = self._opens()
        self.device = device.gpu.name
        try:
            with device.current():
                free = device.free_bytes()
                self._prepare(device, plan, bundle.manifest.spec)
                taken = max(free - device.free_bytes(), 0)
                self.memory_bytes = {"plan": len(plan), "device": taken}
                self.notes = self._standing_notes()
        except BaseException:
            self.deactivate()
            raise

    def _prepare(self, device: Device, plan: bytes, spec: ModelSpec) -> None:
        self._loaded = load_engine(
            self._library, self._record, plan, allow_host_code=self._allow_host_code
        )
        engine = self._loaded.engine
        check_engine(engine, self._library.module, spec, self._record.inputs)
        self._context = engine.create_execution_context()
        if self._context is None:
            raise OutOfMemoryError(
                f"{self.name} could not make an execution context, which needs "
                f"{engine.device_memory_size_v2 / 1e6:.0f} MB beside the weights, with "
                f"{device.free_bytes() / 1e6:.0f} MB free: {self._library.said(self._loaded.log)}"
            )
        largest = self._record.inputs.batch[2]
        self._heads = spec.heads
        image = {IMAGE: (largest, 1, spec.height, spec.width)}
        shapes: dict[str, tuple[int, ...]] = {
            **image,
            **{str(head): shape for head, shape in spec.shapes(largest).items()},
        }
        self._host = {n: device.pinned(s, np.float32) for n, s in shapes.items()}
        self._address = {n: device.allocate(a.nbytes) for n, a in self._host.items()}
        for name, address in self._address.items():
            self._accepted(self._context.set_tensor_address(name, address), "set_tensor_address")
        self._size = 0
        self._events = [device.event() for _ in range(len(_STAGES) + 1)]

    def infer(self, image: NDArray[np.float32]) -> Outputs:
        """The heads of `image` `(N, 1, H, W)`, any N >= 1; the outputs belong to the caller.

        More films than the plan's largest batch go through in parts; fewer than its smallest are
        filled up with empty ones.

        Raises:
            DeviceError: the device failed.
        """
        if self._device is None:
            raise RuntimeError("infer before activate")
        largest = self._record.inputs.batch[2]
        outputs = {
            head: np.empty((len(image), *self._host[head].shape[1:]), np.float32)
            for head in self._heads
        }
        self.stages_ms = dict.fromkeys(_STAGES, 0.0)
        with self._device.current():
            for start in range(0, len(image), largest):
                part = slice(start, start + largest)
                self._run(self._device, image[part], {n: a[part] for n, a in outputs.items()})
        return outputs

    def _run(
        self, device: Device, part: NDArray[np.float32], outputs: dict[str, NDArray[np.float32]]
    ) -> None:
        count = len(part)
        size = max(count, self._record.inputs.batch[0])
        host = {name: array[:size] for name, array in self._host.items()}
        host[IMAGE][:count] = part
        host[IMAGE][count:] = 0
        if size != self._size:
            self._accepted(
                self._context.set_input_shape(IMAGE, host[IMAGE].shape), "set_input_shape"
            )
            self._size = size
        begin, copied, computed, end = self._events
        device.mark(begin)
        device.to_device(self._address[IMAGE], host[IMAGE])
        device.mark(copied)
        self._accepted(self._context.execute_async_v3(device.stream), "execute_async_v3")
        device.mark(computed)
        for name in outputs:
            device.to_host(host[name], self._address[name])
        device.mark(end)
        device.synchronize()
        self.stages_ms = {
            stage: self.stages_ms[stage] + device.between_ms(*self._events[index : index + 2])
            for index, stage in enumerate(_STAGES)
        }
        for name, array in outputs.items():
            array[:] = host[name][:count]

    def _accepted(self, done: bool, call: str) -> None:
        if not done:
            said = self._library.said(self._loaded.log) if self._loaded else ""
            raise DeviceError(f"{self.name}: {call} failed: {said}")

    def _standing_notes(self) -> tuple[str, ...]:
        """What every reading must say of this plan on this device."""
        notes = self._loaded.notes if self._loaded else ()
        built_on = self._record.built_on["gpu"]
        if built_on not in ("none", self.device):
            notes += (f"the plan was built on {built_on} and timed for it; this is {self.device}",)
        return notes

    def deactivate(self) -> None:
        """Free context, engine, buffers and the device; may be called twice."""
        device, self._device = self._device, None
        if device is None:
            return
        try:
            with device.current():
                self._context = None
                self._loaded = None
        finally:
            self._host, self._address = {}, {}
            device.close()


def _options(inputs: plans.PlanInputs) -> str:
    """What a plan was built with beside the defaults, in words."""
    level = inputs.optimization_level
    said = {
        "TF32": inputs.tf32,
        f"optimization level {level}": level is not None,
        "hardware-compatible": inputs.hardware_compatible,
        "version-compatible": inputs.version_compatible,
    }
    return ", ".join(words for words, is_so in said.items() if is_so) or "defaults"


def check_engine(engine: Any, trt: Any, spec: ModelSpec, inputs: plans.PlanInputs) -> None:
    """Refuse an engine that does not take and give what the ModelSpec says.

    Raises:
        IntegrityError: names, directions, types, shapes or the batch profile differ.
    """
    tensors = {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        is_float = engine.get_tensor_dtype(name) == trt.DataType.FLOAT
        tensors[name] = (is_input, is_float, tuple(engine.get_tensor_shape(name))[1:])
    expected: dict[str, tuple[bool, bool, tuple[int, ...]]] = {
        IMAGE: (True, True, (1, spec.height, spec.width)),
        **{head: (False, True, shape[1:]) for head, shape in spec.shapes(1).items()},
    }
    if tensors != expected:
        raise IntegrityError(
            f"the plan {inputs.key} has tensors (input, float32, shape) {tensors}, expected "
            f"{expected}; run: cxrgaze-build --rebuild"
        )
    batches = tuple(int(shape[0]) for shape in engine.get_tensor_profile_shape(IMAGE, 0))
    if batches != inputs.batch:
        raise IntegrityError(
            f"the plan {inputs.key} is for batches {batches}, its record says {inputs.batch}; run: "
            "cxrgaze-build --rebuild"
        )
