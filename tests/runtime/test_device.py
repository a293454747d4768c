"""The device layer against its contract: on host_driver.c, and on a GPU where there is one.

Each target's contract runs in one process of its own, this file as a script, and each case in a
fork of that: neither the stand-in for the driver nor a context is ever loaded into pytest.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cxrgaze.errors import DeviceError, ExitCode, IncompatibleError, OutOfMemoryError
from cxrgaze.runtime import device as layer
from cxrgaze.runtime.device import PROVIDERS, Device, Gpu, open_device

STAND_IN = "stand-in"
ILLEGAL = 700
ILLEGAL_TEXT = r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\): an illegal memory access was encountered"
MIB = 1 << 20
COUNTERS = (
    "device memory",
    "pinned memory",
    "streams",
    "events",
    "retains",
    "context depth",
    "queued",
)


class Driver:
    """The driver library of this process, asked behind the provider's back."""

    def __init__(self, library: str) -> None:
        # Loaded first and globally: from here on, "libcuda.so.1" is this library to all.
        self._library = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        self.is_stand_in = hasattr(self._library, "host_driver_live")

    def call(self, name, *arguments):
        code = getattr(self._library, name)(*arguments)
        assert code == 0, f"{name}: {code}"

    def value(self, name, *arguments, kind=ctypes.c_int):
        result = kind()
        self.call(name, ctypes.byref(result), *arguments)
        return result.value

    def current(self):
        return self.value("cuCtxGetCurrent", kind=ctypes.c_void_p)

    def active(self):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        self.call("cuDevicePrimaryCtxGetState", 0, ctypes.byref(flags), ctypes.byref(active))
        return active.value

    def live(self, what):
        count = self._library.host_driver_live(what.encode())
        assert count >= 0, what
        return count

    def left(self):
        """What was not given back, by name."""
        if self.is_stand_in:
            counts = {what: self.live(what) for what in COUNTERS}
        else:
            counts = {"current context": self.current() or 0, "primary context": self.active()}
        return {what: count for what, count in counts.items() if count}

    def fail(self, name, code=ILLEGAL, nth=1):
        self._library.host_driver_fail(name.encode(), nth, code)

    def set_gpus(self, count):
        ctypes.c_int.in_dll(self._library, "host_driver_gpus").value = count


# The contract: cases of (provider, driver). A case gives back all that it takes, or returns what it
# must leave, by name.

Case = Callable[[type[Device], Driver], "dict[str, int] | None"]
CONTRACT: dict[str, Case] = {}
ON_STAND_IN: dict[str, Case] = {}
"""Cases that need its counters, or a failure at will."""


def contract(case):
    CONTRACT[case.__name__] = case
    return case


def on_stand_in(case):
    ON_STAND_IN[case.__name__] = case
    return case


@contextlib.contextmanager
def opened(provider: type[Device]) -> Iterator[Device]:
    with contextlib.closing(provider()) as device, device.current():
        yield device


def random_bytes(like):
    raw = np.random.default_rng(0).integers(0, 256, like.nbytes, np.uint8)
    return raw.view(like.dtype).reshape(like.shape)


@contract
def facts_are_the_drivers(provider, driver):
    gpus = provider.gpus()
    assert driver.current() is None
    assert len(gpus) == driver.value("cuDeviceGetCount") > 0
    cuda = "{}.{}".format(*divmod(driver.value("cuDriverGetVersion") // 10, 100))
    for index, gpu in enumerate(gpus):
        name = ctypes.create_string_buffer(128)
        driver.call("cuDeviceGetName", name, 128, index)
        integrated, major, minor = (
            driver.value("cuDeviceGetAttribute", attribute, index) for attribute in (18, 75, 76)
        )
        memory = driver.value("cuDeviceTotalMem_v2", index, kind=ctypes.c_size_t)
        expected = Gpu(name.value.decode(), f"{major}{minor}", memory, integrated == 1, cuda)
        assert replace(gpu, index=0, uuid="") == expected
        assert gpu.index == index
    with contextlib.closing(provider()) as device:
        assert device.gpu == gpus[0]
        assert device.provider == provider.provider


@on_stand_in
def facts_are_of_the_gpu_asked_for(provider, driver):
    driver.set_gpus(2)
    one, two = provider.gpus()
    facts = ("stand-in for the driver, no GPU (0)", "87", 64 * MIB, True, "12.6")
    assert one == Gpu(*facts, 0, "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f")
    assert two.name == "stand-in for the driver, no GPU (1)"
    with contextlib.closing(provider(1)) as device, device.current():
        assert device.gpu == two
        its = driver.value("cuDevicePrimaryCtxRetain", 1, kind=ctypes.c_void_p)
        driver.call("cuDevicePrimaryCtxRelease_v2", 1)
        assert driver.current() == its


@contract
def what_goes_to_the_device_comes_back(provider, driver):
    arrays = [
        ((1, 1, 320, 320), np.float32),
        ((4, 3, 7), np.float16),
        ((5,), np.int64),
        ((3, 1001), np.uint8),
        ((), np.float64),
    ]
    with opened(provider) as device:
        for shape, dtype in arrays:
            for make in (device.pinned, np.empty):
                source, target = make(shape, dtype), make(shape, dtype)
                source[...] = random_bytes(source)
                target.fill(0)
                address = device.allocate(source.nbytes)
                device.to_device(address, source)
                device.to_host(target, address)
                device.synchronize()
                assert target.tobytes() == source.tobytes() == random_bytes(source).tobytes()


@contract
def a_part_of_an_allocation_is_an_address_too(provider, driver):
    with opened(provider) as device:
        source, target = device.pinned((2, 6), np.float32), device.pinned((6,), np.float32)
        source[...] = random_bytes(source)
        address = device.allocate(source.nbytes)
        device.to_device(address + source[0].nbytes, source[1])
        device.to_device(address, source[0])
        device.to_host(target, address + source[0].nbytes)
        device.synchronize()
        assert target.tobytes() == source[1].tobytes()


@contract
def pinned_arrays_are_plain_arrays(provider, driver):
    with opened(provider) as device:
        kept = []
        for shape, dtype in [((2, 3, 4), np.float32), ((7,), np.float16), ((1, 5), np.int32)]:
            array = device.pinned(shape, dtype)
            assert isinstance(array, np.ndarray)
            assert (array.shape, array.dtype) == (shape, dtype)
            assert array.flags.writeable and array.flags.c_contiguous and array.flags.aligned
            array[...] = len(kept) + 1
            kept.append(array)
        assert [set(array.ravel().tolist()) for array in kept] == [{1}, {2}, {3}]


@contract
def events_take_the_devices_time_between_the_work(provider, driver):
    with opened(provider) as device:
        array, address = device.pinned((1 << 20,), np.float32), device.allocate(4 << 20)
        first, second, third = (device.event() for _ in range(3))
        for copies in (2, 3):  # events may be marked again
            device.mark(first)
            for _ in range(copies):
                device.to_device(address, array)
            device.mark(second)
            device.to_host(array, address)
            device.mark(third)
            device.synchronize()
            found = [device.between_ms(*pair) for pair in ((first, second), (second, third))]
            assert all(0 < ms < 10_000 for ms in found)
            assert not driver.is_stand_in or found == [copies, 1]  # its clock counts copies


@on_stand_in
def an_event_that_has_not_happened_has_no_time(provider, driver):
    with opened(provider) as device:
        first, second = device.event(), device.event()
        device.mark(first)
        device.synchronize()
        with pytest.raises(DeviceError, match="invalid resource handle"):
            device.between_ms(first, second)  # never marked
        device.mark(second)
        with pytest.raises(DeviceError, match="device not ready"):
            device.between_ms(first, second)
        device.synchronize()
        assert device.between_ms(first, second) == 0


@contract
def free_bytes_falls_by_an_allocation(provider, driver):
    with opened(provider) as device:
        before = device.free_bytes()
        device.allocate(16 * MIB)
        after = device.free_bytes()
        assert 0 < after <= before - 16 * MIB < before <= device.gpu.memory_bytes
        assert not driver.is_stand_in or after == before - 16 * MIB


@contract
def current_nests_and_puts_back(provider, driver):
    with contextlib.closing(provider()) as device:
        assert driver.current() is None
        with device.current():
            mine = driver.current()
            assert mine is not None
            with device.current():
                assert driver.current() == mine
            assert driver.current() == mine
            with pytest.raises(ZeroDivisionError), device.current():
                raise ZeroDivisionError
            assert driver.current() == mine
        assert driver.current() is None


@on_stand_in
def current_puts_anothers_context_back(provider, driver):
    driver.set_gpus(2)
    provider.gpus()
    other = driver.value("cuDevicePrimaryCtxRetain", 1, kind=ctypes.c_void_p)
    driver.call("cuCtxPushCurrent_v2", ctypes.c_void_p(other))
    device = provider()
    assert driver.current() == other
    with device.current():
        assert driver.current() not in (None, other)
    assert driver.current() == other
    device.close()
    assert driver.value("cuCtxPopCurrent_v2", kind=ctypes.c_void_p) == other
    driver.call("cuDevicePrimaryCtxRelease_v2", 1)


@contract
def another_thread_can_take_over(provider, driver):
    with contextlib.closing(provider()) as device:
        with device.current():
            array, address = device.pinned((9,), np.int32), device.allocate(36)

        def there():
            with device.current():
                array[...] = 7
                device.to_device(address, array)
                device.synchronize()

        thread = threading.Thread(target=there)
        thread.start()
        thread.join()
        with device.current():
            array[...] = 0
            device.to_host(array, address)
            device.synchronize()
            assert array.tolist() == [7] * 9


@contract
def close_frees_all_and_may_be_repeated(provider, driver):
    device = provider()
    with device.current():
        for _ in range(3):
            device.allocate(MIB)
            device.pinned((1000,), np.float32)
    assert driver.left()
    device.close()
    assert not driver.left()
    device.close()


@contract
def two_on_one_gpu_do_not_disturb_each_other(provider, driver):
    with contextlib.closing(provider()) as first:
        with contextlib.closing(provider()) as second:
            assert first.stream != second.stream
            with first.current(), second.current():
                array, address = second.pinned((3,), np.float32), second.allocate(12)
                second.to_device(address, array)
                second.synchronize()
        with first.current():
            first.allocate(MIB)


@contract
def too_much_memory_is_out_of_memory(provider, driver):
    with opened(provider) as device:
        with pytest.raises(OutOfMemoryError, match="cuMemAlloc failed.*out of memory") as raised:
            device.allocate(2 * device.gpu.memory_bytes)
        assert raised.value.exit_code == ExitCode.OUT_OF_MEMORY == 10
        device.allocate(MIB)  # it still works


@contract
def a_call_outside_current_fails(provider, driver):
    with contextlib.closing(provider()) as device:
        with pytest.raises(DeviceError, match="invalid device context"):
            device.allocate(16)
        with pytest.raises(DeviceError, match="invalid device context"):
            device.free_bytes()


@on_stand_in
def every_call_outside_current_fails(provider, driver):
    with contextlib.closing(provider()) as device:
        with device.current():
            array, address = device.pinned((4,), np.float32), device.allocate(16)
        for act in _acts(device, array, address).values():
            with pytest.raises(DeviceError, match=r"CUDA_ERROR_INVALID_CONTEXT \(201\): invalid"):
                act()


def _acts(device, array, address):
    """Each call of the driver that acts in the context, as it is exported."""
    return {
        "cuMemAlloc_v2": lambda: device.allocate(16),
        "cuMemHostAlloc": lambda: device.pinned((4,), np.float32),
        "cuMemcpyHtoDAsync_v2": lambda: device.to_device(address, array),
        "cuMemcpyDtoHAsync_v2": lambda: device.to_host(array, address),
        "cuStreamSynchronize": lambda: device.synchronize(),
        "cuEventCreate": lambda: device.event(),
        "cuMemGetInfo_v2": lambda: device.free_bytes(),
    }


@on_stand_in
def a_failed_call_says_call_code_and_meaning(provider, driver):
    with opened(provider) as device:
        acts = _acts(device, device.pinned((4,), np.float32), device.allocate(16))
        acts["cuCtxPushCurrent_v2"] = lambda: device.current().__enter__()
        for exported, act in acts.items():
            call = exported.removesuffix("_v2")
            driver.fail(exported)
            with pytest.raises(DeviceError, match=f"^{call} failed: {ILLEGAL_TEXT}$") as raised:
                act()
            assert raised.value.exit_code == ExitCode.FAILURE
            driver.fail(exported, 2)
            with pytest.raises(OutOfMemoryError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(2\): out of"):
                act()
        driver.fail("cuMemGetInfo_v2", 98765)  # of a newer driver than the provider knows
        with pytest.raises(DeviceError, match=r"^cuMemGetInfo: .*98765"):
            device.free_bytes()


@on_stand_in
def a_fact_that_cannot_be_had_is_named(provider, driver):
    facts = ("GetCount", "Get", "GetName", "GetAttribute", "TotalMem_v2")
    for exported in ("cuInit", "cuDriverGetVersion", *(f"cuDevice{fact}" for fact in facts)):
        driver.fail(exported)
        call = exported.removesuffix("_v2")
        with pytest.raises(DeviceError, match=f"^{call} failed: {ILLEGAL_TEXT}$"):
            provider.gpus()


@on_stand_in
def nothing_arrives_before_synchronize(provider, driver):
    with opened(provider) as device:
        source, target = device.pinned((8,), np.float32), device.pinned((8,), np.float32)
        source[...], target[...] = 1, 2
        address = device.allocate(source.nbytes)
        device.to_device(address, source)
        device.to_host(target, address)
        assert driver.live("queued") == 2
        assert target.tolist() == [2] * 8
        device.synchronize()
        assert driver.live("queued") == 0
        assert target.tolist() == [1] * 8


@on_stand_in
def errors_of_queued_work_come_up_in_synchronize(provider, driver):
    with opened(provider) as device:
        array, address = device.pinned((8,), np.float32), device.allocate(32)
        driver.fail("queued copy", nth=2)
        device.to_device(address, array)
        device.to_host(array, address)
        with pytest.raises(DeviceError, match=f"^cuStreamSynchronize failed: {ILLEGAL_TEXT}$"):
            device.synchronize()


@on_stand_in
def the_driver_refuses_what_is_wrong(provider, driver):
    invalid = r"CUDA_ERROR_INVALID_VALUE \(1\): invalid argument"
    with opened(provider) as device:
        array = device.pinned((4,), np.float32)
        address, host = device.allocate(array.nbytes), array.ctypes.data
        stream, copy = device._stream, "cuMemcpyHtoDAsync"
        for message, arguments in [
            (invalid, (copy, address + 1, host, 16, stream)),  # beyond the allocation
            (invalid, (copy, address + 16, host, 1, stream)),
            (invalid, (copy, address - 1, host, 1, stream)),
            (invalid, (copy, address, host + 1, 16, stream)),  # beyond the pinned memory
            (invalid, (copy, host, host, 16, stream)),  # a host address for a device's
            (invalid, (copy, address, address, 16, stream)),
            (r"CUDA_ERROR_INVALID_HANDLE \(400\)", (copy, address, host, 16, 0xBAD)),
            (r"CUDA_ERROR_INVALID_HANDLE \(400\)", ("cuStreamSynchronize", 0xBAD)),
            (invalid, ("cuMemFree", address + 1)),
            (invalid, ("cuMemFreeHost", address)),
        ]:
            with pytest.raises(DeviceError, match=f"^{arguments[0]} failed: {message}"):
                layer._driver(*arguments)
        freed = layer._driver("cuMemAlloc", 16)
        layer._driver("cuMemFree", freed)
        for again in (("cuMemFree", freed), (copy, freed, host, 16, stream)):
            with pytest.raises(DeviceError, match=invalid):
                layer._driver(*again)
        device.to_device(address, array)
        device.synchronize()


def _close_goes_on(exported, leaves, provider, driver):
    device = provider()
    with device.current():
        for _ in range(3):
            device.allocate(MIB)
            device.pinned((1000,), np.float32)
    driver.fail(exported)
    call = exported.removesuffix("_v2")
    with pytest.raises(DeviceError, match=f"^{call} failed: {ILLEGAL_TEXT}$"):
        device.close()
    assert driver.left() == leaves
    device.close()
    return leaves


ALL = {"device memory": 3, "pinned memory": 3, "streams": 1}
for exported, leaves in {
    "cuMemFree_v2": {"device memory": 1},
    "cuMemFreeHost": {"pinned memory": 1},
    "cuStreamDestroy_v2": {"streams": 1},
    "cuDevicePrimaryCtxRelease_v2": {"retains": 1},
    "cuCtxPopCurrent_v2": {"context depth": 1},
    "cuCtxPushCurrent_v2": ALL,  # freed with the context, for one that is not retained
}.items():
    ON_STAND_IN[f"close_goes_on_after_{exported}"] = functools.partial(
        _close_goes_on, exported, leaves
    )


@on_stand_in
def a_failed_constructor_leaves_nothing(provider, driver):
    for exported in ("cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuStreamCreate"):
        call = exported.removesuffix("_v2")
        driver.fail(exported)
        with pytest.raises(DeviceError, match=f"^{call} failed: {ILLEGAL_TEXT}$"):
            provider()
        assert not driver.left()
    driver.fail("cuStreamCreate", 2)
    with pytest.raises(OutOfMemoryError):
        provider()
    driver.fail("cuCtxPopCurrent_v2")
    with pytest.raises(DeviceError, match="^cuCtxPopCurrent failed"):
        provider()
    return {"context depth": 1}  # and no stream


@on_stand_in
def a_failed_allocation_is_not_freed(provider, driver):
    device = provider()
    with device.current():
        for exported in ("cuMemAlloc_v2", "cuMemHostAlloc"):
            driver.fail(exported)
            with pytest.raises(DeviceError):
                _acts(device, None, 0)[exported]()
    device.close()


@on_stand_in
def cuda_bindings_comes_first(provider, driver):
    device = open_device()
    assert device.provider == "cuda-bindings"
    assert layer.gpus() == (device.gpu,)
    device.close()


@on_stand_in
def a_number_beyond_the_gpus_is_refused(provider, driver):
    with pytest.raises(
        IncompatibleError, match="no GPU 1 to run on; here are 0: stand-in"
    ) as raised:
        open_device("1")
    assert raised.value.exit_code == ExitCode.INCOMPATIBLE
    driver.set_gpus(2)
    second = open_device("1")
    assert (second.gpu.index, second.gpu.uuid[:12]) == (1, "GPU-10111213")
    by_uuid = open_device("GPU-10111213-1415")
    assert by_uuid.gpu == second.gpu
    by_uuid.close()
    second.close()
    for wanted in ("2", "GPU-", "GPU-ffffffff"):
        with pytest.raises(IncompatibleError, match=f"no GPU {wanted} to run on"):
            open_device(wanted)


@on_stand_in
def a_gpu_that_cannot_be_used_is_no_missing_gpu(provider, driver):
    driver.fail("cuStreamCreate")
    with pytest.raises(DeviceError, match="^cuStreamCreate failed"):
        open_device()


@on_stand_in
def a_driver_without_a_gpu_says_so(provider, driver):
    driver.set_gpus(0)
    said = r"cuda-bindings: cuInit failed: CUDA_ERROR_NO_DEVICE \(100\): no CUDA-capable device"
    with pytest.raises(IncompatibleError, match=said):
        open_device()


# The other process.


def _in_a_fork(act: Callable[[], str]) -> str:
    """What it says, or of what it died."""
    reads, writes = os.pipe()
    if not (child := os.fork()):
        os.close(reads)
        try:
            said = act()
        except BaseException as error:
            said = "".join(traceback.TracebackException.from_exception(error).format())
        with open(writes, "w") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(writes)
    with open(reads) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said if code == 0 else f"{said}\nended with {code}"


def _missing(provider: type[Device]) -> str:
    try:
        return "" if provider.gpus() else "the driver lists no GPU"
    except (ImportError, DeviceError) as error:
        return f"{provider.provider}: {error}"


def _run(case: Case, provider: type[Device], driver: Driver) -> str:
    leaves = case(provider, driver) or {}
    left = driver.left()
    return "" if left == leaves else f"leaves {left}, not {leaves}"


def _script(target: str, library: str) -> None:
    """Prints what each case said, as JSON; nothing is well."""
    try:
        driver = Driver(library)
    except OSError as error:
        print(json.dumps({"skip": str(error)}))
        return
    provider = PROVIDERS["cuda-bindings" if target == STAND_IN else target]
    said = {}
    if not driver.is_stand_in and (missing := _in_a_fork(functools.partial(_missing, provider))):
        said["skip"] = missing
    else:
        for name, case in (CONTRACT | ON_STAND_IN if driver.is_stand_in else CONTRACT).items():
            said[name] = _in_a_fork(functools.partial(_run, case, provider, driver))
    print(json.dumps(said))


# The tests.


@pytest.fixture(scope="module")
def host_driver(tmp_path_factory):
    if not shutil.which("cc"):
        pytest.skip("no C compiler `cc` for the stand-in driver")
    library = tmp_path_factory.mktemp("host_driver") / "libcuda.so.1"
    source = Path(__file__).with_name("host_driver.c")
    options = ["-std=c11", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, "-o", library, source, "-ldl"], check=True)
    return library


@functools.cache
def _outcomes(target: str, library: str) -> dict[str, str]:
    # Warnings are errors there too; one thread, since Python 3.12 warns of a fork among several.
    command = [sys.executable, "-W", "error", __file__, target, library]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        return {"died": str(error)}
    return json.loads(ran.stdout) if ran.returncode == 0 else {"died": ran.stderr}


def _check(target, case, library):
    said = _outcomes(target, str(library))
    if "skip" in said:
        pytest.skip(said["skip"])
    assert "died" not in said, said["died"]
    if said[case]:
        pytest.fail(said[case], pytrace=False)


@pytest.mark.parametrize("case", [*CONTRACT, *ON_STAND_IN])
def test_contract_on_the_stand_in_for_the_driver(case, host_driver):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    _check(STAND_IN, case, host_driver)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CONTRACT)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_contract_on_a_gpu(provider, case):
    _check(provider, case, "libcuda.so.1")


def test_without_a_driver_both_providers_say_why():
    why = layer.gpus()
    if not isinstance(why, str):
        pytest.skip("there is a GPU here")
    said = dict(part.split(": ", 1) for part in why.split("; "))
    assert list(said) == ["cuda-bindings", "pycuda"] == list(PROVIDERS)
    assert all(said.values())
    with pytest.raises(IncompatibleError, match="^no GPU to run on: cuda-bindings: .*pycuda: "):
        open_device()


def test_importing_the_layer_loads_no_provider():
    code = "import sys, cxrgaze.runtime.device; print({'cuda', 'pycuda'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


if __name__ == "__main__":
    _script(*sys.argv[1:])
