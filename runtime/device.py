"""The device layer: facts, memory, copies and one stream on a GPU's primary context.

Two providers of the same few calls of the CUDA driver API: NVIDIA's `cuda-bindings`, and `pycuda`
where that is what the device has. Both work on the primary context, which a process shares with
whatever else uses the GPU in it (CUDA driver API, "Primary Context Management"). Every call is
checked; an error says call, code and meaning.

Importing this module touches no device; neither does asking for `gpus`, which makes no context.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cxrgaze.errors import DeviceError, IncompatibleError, OutOfMemoryError

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it."""

    name: str
    capability: str
    """Compute capability without its point: "87"."""
    memory_bytes: int
    integrated: bool
    """Whether it shares the host's memory, as on a Jetson."""
    driver_cuda: str
    """Newest CUDA that the driver supports, such as "12.6"."""
    index: int = 0
    """Its number among those that the driver lists (CUDA_VISIBLE_DEVICES counts)."""
    uuid: str = ""
    """As NVIDIA's tools write it: "GPU-" and 32 hex digits in five groups; empty if not known."""


class Device:
    """Memory, copies and one stream on one GPU; a base of the providers.

    Owns all that it hands out: `close` frees it, and arrays of `pinned` are dead then. Calls must
    be made inside `current()`; one thread at a time.
    """

    provider: str
    gpu: Gpu
    stream: int
    """Handle of the stream (CUstream)."""

    def __init__(self) -> None:
        self._resources = contextlib.ExitStack()  # freed in the context, last made first
        self._context = contextlib.ExitStack()
        self._holds_context = False

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes the primary context current on this thread, and puts back what was there."""
        self._push()
        try:
            yield
        finally:
            self._pop()

    def close(self) -> None:
        """Free everything, also what is left when one of it cannot be freed; may be repeated.

        To be called outside `current()`, which pycuda cannot leave without its context.

        Raises:
            DeviceError: of what could not be freed, the last.
        """
        with self._context.pop_all():
            if self._holds_context:
                self._holds_context = False
                with self.current(), self._resources.pop_all():
                    pass

    def allocate(self, nbytes: int) -> int:
        """Address of `nbytes` of device memory.

        Raises:
            OutOfMemoryError: the device has not that much left.
        """
        raise NotImplementedError

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked host array, from which and to which copies are asynchronous."""
        raise NotImplementedError

    def to_device(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy of a contiguous array to device memory; it must live until `synchronize`."""
        raise NotImplementedError

    def to_host(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy from device memory that fills a contiguous array."""
        raise NotImplementedError

    def event(self) -> Any:
        """An event, to be put into the stream by `mark`, again and again."""
        raise NotImplementedError

    def mark(self, event: Any) -> None:
        """Queue an event: it takes the time when the device comes to it."""
        raise NotImplementedError

    def between_ms(self, first: Any, second: Any) -> float:
        """Milliseconds of the device's clock between two events, after `synchronize`.

        Raises:
            DeviceError: one of them has not happened.
        """
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait for all that was queued; errors of queued work come up here.

        Raises:
            DeviceError: what was queued failed.
        """
        raise NotImplementedError

    def free_bytes(self) -> int:
        """Free device memory."""
        raise NotImplementedError

    def _push(self) -> None:
        raise NotImplementedError

    def _pop(self) -> None:
        raise NotImplementedError


class CudaBindings(Device):
    """The provider on `cuda.bindings.driver` (cuda-bindings 12.6 and later, 13)."""

    provider = "cuda-bindings"

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.gpu = self.gpus()[index]
        device = _driver("cuDeviceGet", index)
        self._primary = _driver("cuDevicePrimaryCtxRetain", device)
        self._context.callback(_driver, "cuDevicePrimaryCtxRelease", device)
        self._holds_context = True
        try:
            with self.current():
                self._stream = _driver("cuStreamCreate", _NON_BLOCKING)
                self._resources.callback(_driver, "cuStreamDestroy", self._stream)
        except BaseException:
            self.close()
            raise
        self.stream = int(self._stream)

    @staticmethod
    def gpus() -> tuple[Gpu, ...]:
        """The GPUs here; no context is made.

        Raises:
            DeviceError: the driver says why there are none.
            ImportError: cuda-bindings is not installed.
        """
        from cuda.bindings import driver

        _driver("cuInit", 0)
        version = int(_driver("cuDriverGetVersion"))

        def gpu(index: int) -> Gpu:
            device = _driver("cuDeviceGet", index)

            def value(name: str) -> int:
                key = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
                return int(_driver("cuDeviceGetAttribute", key, device))

            major, minor = value("COMPUTE_CAPABILITY_MAJOR"), value("COMPUTE_CAPABILITY_MINOR")
            return Gpu(
                name=_driver("cuDeviceGetName", 128, device).split(b"\0")[0].decode(),
                capability=f"{major}{minor}",
                memory_bytes=int(_driver("cuDeviceTotalMem", device)),
                integrated=bool(value("INTEGRATED")),
                driver_cuda=_cuda_version(version),
                index=index,
                uuid=_uuid(bytes(_driver("cuDeviceGetUuid", device).bytes)),
            )

        return tuple(map(gpu, range(_driver("cuDeviceGetCount"))))

    def allocate(self, nbytes: int) -> int:
        """See `Device.allocate`."""
        pointer = _driver("cuMemAlloc", nbytes)
        self._resources.callback(_driver, "cuMemFree", pointer)
        return int(pointer)

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """See `Device.pinned`."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(_driver("cuMemHostAlloc", nbytes, 0))
        self._resources.callback(_driver, "cuMemFreeHost", address)
        buffer = memoryview((ctypes.c_uint8 * nbytes).from_address(address))
        array: NDArray[Any] = np.frombuffer(buffer, dtype=dtype).reshape(shape)
        return array

    def to_device(self, address: int, array: NDArray[Any]) -> None:
        """See `Device.to_device`."""
        _driver("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self._stream)

    def to_host(self, array: NDArray[Any], address: int) -> None:
        """See `Device.to_host`."""
        _driver("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self._stream)

    def event(self) -> Any:
        """See `Device.event`."""
        event = _driver("cuEventCreate", 0)
        self._resources.callback(_driver, "cuEventDestroy", event)
        return event

    def mark(self, event: Any) -> None:
        """See `Device.mark`."""
        _driver("cuEventRecord", event, self._stream)

    def between_ms(self, first: Any, second: Any) -> float:
        """See `Device.between_ms`."""
        return float(_driver("cuEventElapsedTime", first, second))

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        _driver("cuStreamSynchronize", self._stream)

    def free_bytes(self) -> int:
        """See `Device.free_bytes`."""
        free, _ = _driver("cuMemGetInfo")
        return int(free)

    def _push(self) -> None:
        _driver("cuCtxPushCurrent", self._primary)

    def _pop(self) -> None:
        _driver("cuCtxPopCurrent")


class PyCuda(Device):
    """The provider on `pycuda.driver`."""

    provider = "pycuda"

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        from pycuda import driver

        self.gpu = self.gpus()[index]
        self._driver = driver
        device = _pycuda("Device", driver.Device, index)
        self._primary = _pycuda("retain_primary_context", device.retain_primary_context)
        self._context.callback(self._detach)
        self._holds_context = True
        try:
            with self.current():
                self._stream = _pycuda("Stream", driver.Stream, _NON_BLOCKING)
                self._resources.callback(setattr, self, "_stream", None)  # destroyed with it
                self._events: list[Any] = []
                self._resources.callback(self._events.clear)
        except BaseException:
            self.close()
            raise
        self.stream = int(self._stream.handle)

    @staticmethod
    def gpus() -> tuple[Gpu, ...]:
        """The GPUs here; no context is made.

        Raises:
            DeviceError: the driver says why there are none.
            ImportError: pycuda is not installed, or there is no driver library.
        """
        from pycuda import driver

        _pycuda("init", driver.init)
        version = int(_pycuda("get_driver_version", driver.get_driver_version))

        def gpu(index: int) -> Gpu:
            device = _pycuda("Device", driver.Device, index)
            return Gpu(
                name=_pycuda("name", device.name),
                capability="{}{}".format(*_pycuda("compute_capability", device.compute_capability)),
                memory_bytes=int(_pycuda("total_memory", device.total_memory)),
                integrated=bool(
                    _pycuda("get_attribute", device.get_attribute, _integrated(driver))
                ),
                driver_cuda=_cuda_version(version),
                index=index,
            )

        return tuple(map(gpu, range(_pycuda("Device.count", driver.Device.count))))

    def allocate(self, nbytes: int) -> int:
        """See `Device.allocate`."""
        memory = _pycuda("mem_alloc", self._driver.mem_alloc, nbytes)
        self._resources.callback(_pycuda, "DeviceAllocation.free", memory.free)
        return int(memory)

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """See `Device.pinned`."""
        make = self._driver.pagelocked_empty
        array: NDArray[Any] = _pycuda("pagelocked_empty", make, tuple(shape), np.dtype(dtype))
        pointer: Any = array.base  # pycuda's own owner of the page-locked memory
        self._resources.callback(_pycuda, "HostPointer.free", pointer.free)
        return array

    def to_device(self, address: int, array: NDArray[Any]) -> None:
        """See `Device.to_device`."""
        copy = self._driver.memcpy_htod_async
        _pycuda("memcpy_htod_async", copy, address, array, self._stream)

    def to_host(self, array: NDArray[Any], address: int) -> None:
        """See `Device.to_host`."""
        copy = self._driver.memcpy_dtoh_async
        _pycuda("memcpy_dtoh_async", copy, array, address, self._stream)

    def event(self) -> Any:
        """See `Device.event`."""
        self._events.append(_pycuda("Event", self._driver.Event))
        return len(self._events) - 1  # pycuda destroys an event with its last reference

    def mark(self, event: Any) -> None:
        """See `Device.mark`."""
        _pycuda("Event.record", self._events[event].record, self._stream)

    def between_ms(self, first: Any, second: Any) -> float:
        """See `Device.between_ms`."""
        start, end = self._events[first], self._events[second]
        return float(_pycuda("Event.time_till", start.time_till, end))

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        _pycuda("Stream.synchronize", self._stream.synchronize)

    def free_bytes(self) -> int:
        """See `Device.free_bytes`."""
        return int(_pycuda("mem_get_info", self._driver.mem_get_info)[0])

    def _push(self) -> None:
        _pycuda("Context.push", self._primary.push)

    def _pop(self) -> None:
        _pycuda("Context.pop", self._driver.Context.pop)

    def _detach(self) -> None:
        # pycuda pushes the context to detach it, and cuDevicePrimaryCtxRelease pops none; nor can
        # pycuda, which does not count that push. Only what is left current is popped here.
        library = ctypes.CDLL("libcuda.so.1")
        before, after = ctypes.c_void_p(), ctypes.c_void_p()
        library.cuCtxGetCurrent(ctypes.byref(before))
        _pycuda("Context.detach", self._primary.detach)
        library.cuCtxGetCurrent(ctypes.byref(after))
        if after.value != before.value:
            library.cuCtxPopCurrent_v2(ctypes.byref(after))


PROVIDERS: dict[str, type[CudaBindings] | type[PyCuda]] = {
    CudaBindings.provider: CudaBindings,
    PyCuda.provider: PyCuda,
}
"""Providers in the order that is tried."""


def gpus() -> tuple[Gpu, ...] | str:
    """The GPUs here through the first provider that sees any, or why there are none to see."""
    why = []
    for name, provider in PROVIDERS.items():
        try:
            if visible := provider.gpus():
                return visible
            why.append(f"{name}: the driver lists no GPU")
        except ImportError as error:
            why.append(f"{name}: {_line(error)}")
        except (DeviceError, OutOfMemoryError) as error:
            why.append(f"{name}: {error}")
    confined = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = f" (only {confined} may be seen: --gpu, CUDA_VISIBLE_DEVICES)" if confined else ""
    return "; ".join(why) + only


def chosen(visible: Sequence[Gpu], wanted: str | None) -> Gpu:
    """The GPU that was asked for.

    Args:
        wanted: index or UUID, of which the beginning is enough; None is the first.

    Raises:
        IncompatibleError: it is not here, with those that are.
    """
    if wanted is None:
        return visible[0]
    for gpu in visible:
        if wanted == str(gpu.index) or (len(wanted) > 8 and gpu.uuid.startswith(wanted)):
            return gpu
    here = ", ".join(f"{gpu.index}: {gpu.name} {gpu.uuid}".rstrip() for gpu in visible)
    raise IncompatibleError(f"no GPU {wanted} to run on; here are {here}")


def open_device(wanted: str | None = None) -> Device:
    """The GPU that was asked for (`chosen`), through the first provider that works.

    Raises:
        IncompatibleError: none does, with what each says.
        DeviceError, OutOfMemoryError: a provider sees the GPU, and it cannot be used.
    """
    for provider in PROVIDERS.values():
        try:
            visible = provider.gpus()
        except (ImportError, DeviceError):
            continue
        if visible:
            return provider(chosen(visible, wanted).index)
    raise IncompatibleError(f"no GPU to run on: {gpus()}")


def _driver(call: str, *arguments: Any) -> Any:
    """A call of the CUDA driver API: its value, or a tuple where it has several.

    Raises:
        DeviceError, OutOfMemoryError: with the call, its error's name and number, and the meaning.
    """
    from cuda.bindings import driver

    try:
        error, *values = getattr(driver, call)(*arguments)
    except (RuntimeError, OSError, ValueError) as problem:
        # no driver library on this machine, or an error number that these bindings do not know
        raise DeviceError(f"{call}: {_line(problem)}") from problem
    if int(error):
        _, text = driver.cuGetErrorString(error)
        meaning = text.decode() if text else "no text for it"
        name = getattr(error, "name", "unknown")
        _fail(int(error) == _OUT_OF_MEMORY, f"{call} failed: {name} ({int(error)}): {meaning}")
    return values[0] if len(values) == 1 else tuple(values) or None


def _pycuda(call: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """A call of pycuda, whose errors have the driver's call and meaning in their text.

    Raises:
        DeviceError, OutOfMemoryError: likewise; pycuda gives no number.
    """
    from pycuda import driver

    try:
        return function(*arguments)
    except driver.Error as error:
        is_memory = isinstance(error, driver.MemoryError)
        _fail(is_memory, f"{call} failed: {type(error).__name__}: {_line(error)}")


def _fail(is_memory: bool, message: str) -> None:
    if is_memory:
        raise OutOfMemoryError(f"{message}; close what else uses the GPU, or use a smaller batch")
    raise DeviceError(message)


def _integrated(driver: Any) -> Any:
    return driver.device_attribute.INTEGRATED


def _uuid(raw: bytes) -> str:
    digits = raw[:16].hex()
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return f"GPU-{'-'.join(parts)}"


def _cuda_version(number: int) -> str:
    """12060 as "12.6"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
