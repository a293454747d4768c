"""The three TensorRTs behind one face: where they differ, and nowhere else.

`tensorrt` 10.3 to 10.x (JetPack 6), `tensorrt` 11.x (workstations, JetPack 7.2.2 and later) and
`tensorrt_rtx` 1.x. Networks are always strongly typed and I/O goes by name, so that what is left is
little: TensorRT-RTX compiles ahead of time for given compute capabilities, says before it loads a
plan whether it can, and has no workspace, timing cache, version or hardware compatibility to ask
for (docs/graphs.md#strong-typing, docs/graphs.md#tensorrt-rtx).
docs/tensorrt.md has the table of our calls by version.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrgaze.errors import IncompatibleError, IntegrityError, UsageError
from cxrgaze.files import read_regular, write_atomic
from cxrgaze.runtime import device

NAMES = ("tensorrt", "tensorrt_rtx")
"""Modules, in the order that a build prefers."""

SUPPORTED = {"tensorrt": ((10, 3), (12, 0)), "tensorrt_rtx": ((1, 0), (2, 0))}
"""First version that is supported and first that is not, by module."""

_TIMING_CACHE_LIMIT = 1 << 28


@dataclass(frozen=True)
class Library:
    """One TensorRT that can be imported here."""

    name: str
    version: str
    module: Any

    @property
    def number(self) -> tuple[int, ...]:
        """The version as numbers."""
        return version_number(self.version)

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which compiles ahead of time without a GPU."""
        return self.name == "tensorrt_rtx"

    @property
    def network_flags(self) -> int:
        """Creation flags of a strongly typed network; a TensorRT without the flag has no other."""
        flags = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flags is None else 1 << int(flags)

    def logger(self, on_warning: Callable[[str], None] = lambda text: None) -> Any:
        """A logger for the library that keeps errors (`errors`) and passes warnings on."""
        module, severity = self.module, self.module.ILogger.Severity

        class Logger(module.ILogger):  # type: ignore[misc,name-defined] # known when run
            def __init__(self) -> None:
                module.ILogger.__init__(self)  # the bindings ask for it by name
                self.errors: list[str] = []

            def log(self, level: Any, message: str) -> None:
                if level in (severity.INTERNAL_ERROR, severity.ERROR):
                    self.errors.append(message)
                elif level == severity.WARNING:
                    on_warning(message)

        return Logger()

    def said(self, log: Any) -> str:
        """What the library wrote to a logger of ours as errors, on one line."""
        return "; ".join(dict.fromkeys(map(str.strip, log.errors))) or "nothing in its log"

    def refuse_options(self, **given: object) -> None:
        """Refuse options of a build that this library lacks.

        Args:
            given: value by option, in the option's own spelling with underscores.

        Raises:
            UsageError: naming the first that was given.
        """
        lacks = _RTX_LACKS if self.is_rtx else _RTX_ONLY
        for name, value in given.items():
            if name in lacks and value:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{self.name} {self.version} has no {flag}; leave it out")

    def target(self, config: Any, capabilities: tuple[str, ...]) -> None:
        """Set what to compile for: the GPU here, or given compute capabilities ahead of time.

        Raises:
            IncompatibleError: this library cannot compile for one of them.
        """
        if not self.is_rtx:
            return
        wanted = [self.capability(sm) for sm in capabilities]
        wanted = wanted or [self.module.ComputeCapability.CURRENT]
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            config.set_compute_capability(capability, index)

    def capability(self, sm: str) -> Any:
        """The enumerator of a compute capability such as "86", for an ahead-of-time build.

        Raises:
            IncompatibleError: this library cannot compile for it.
        """
        enumeration = getattr(self.module, "ComputeCapability", None)
        member = getattr(enumeration, f"SM{sm}", None)
        if member is None:
            can = sorted((n[2:] for n in dir(enumeration) if re.fullmatch(r"SM\d+", n)), key=int)
            raise IncompatibleError(
                f"{self.name} {self.version} cannot compile for compute capability {sm}; it can "
                f"for {', '.join(can) or 'none ahead of time'}"
            )
        return member

    @contextlib.contextmanager
    def timing_cache(self, config: Any, path: Path) -> Iterator[None]:
        """Tactic timings of earlier builds from `path`, and with this build's back to it.

        TensorRT-RTX has none: it measures nothing when it builds. A file that the library does not
        take, of another device for one, is replaced.
        """
        if self.is_rtx:
            yield
            return
        try:
            stored = read_regular(path, _TIMING_CACHE_LIMIT)
        except (OSError, IntegrityError):
            stored = b""
        timings = config.create_timing_cache(stored)
        if timings is None or not config.set_timing_cache(timings, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
        yield
        timings = config.get_timing_cache()
        write_atomic(path, bytes(timings.serialize()))

    def require_valid(self, runtime: Any, plan: bytes, log: Any) -> str | None:
        """Ask the library whether it can load a plan, where it answers that without loading it.

        Returns:
            What is less than best, or None.

        Raises:
            IncompatibleError: it cannot, with its diagnostics and log.
        """
        if not self.is_rtx:
            return None
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == self.module.EngineValidity.INVALID:
            names = self._diagnosis(diagnostics)
            if "MALFORMED_ENGINE" not in names:
                runtime.deserialize_cuda_engine(
                    plan
                )  # says why in the log, which the question did not
            helps = "; ".join(_HELPS[name] for name in names if name in _HELPS)
            raise IncompatibleError(
                f"{self.name} {self.version} says that it cannot load the plan "
                f"({', '.join(names)}): {self.said(log)}{helps and f'; {helps}'}"
            )
        if validity == self.module.EngineValidity.SUBOPTIMAL:
            return f"{self.name} calls this plan suboptimal on this device"
        return None

    def _diagnosis(self, bits: int) -> list[str]:
        """The names of the bits that `getEngineValidity` gives."""
        names: Mapping[str, Any] = self.module.EngineInvalidityDiagnostics.__members__
        known = [name for name, bit in names.items() if int(bits) & int(bit)]
        return known or [f"diagnostics {bits}"]


_HELPS = {
    "UNSUPPORTED_CC": "take another library or another card (docs/devices.md)",
    "VERSION_MISMATCH": "run: cxrgaze-build --rebuild",
    "MALFORMED_ENGINE": "run: cxrgaze-build --rebuild",
    "OLD_CUDA_DRIVER": "install a newer driver",
    "INSUFFICIENT_GPU_MEMORY": "free memory of the card",
}
_RTX_LACKS = {"workspace", "version_compatible", "hardware_compatible"}
_RTX_ONLY = {"cpu_only"}


def version_number(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: "10.3.0" as (10, 3, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def versions() -> dict[str, str]:
    """Version by module of the libraries that can be imported here, supported or not."""
    installed = {}
    for name in NAMES:
        try:
            installed[name] = str(importlib.import_module(name).__version__)
        except (ImportError, OSError):
            continue
    return installed


def beside_a_gpu() -> list[str]:
    """Names of the libraries that could run here; none without a GPU, whatever is installed."""
    if isinstance(device.gpus(), str):  # asked first: importing a TensorRT takes its time
        return []
    return list(versions())


def find(name: str = "auto") -> Library:
    """The library called `name`, or the first that is installed and supported.

    Raises:
        IncompatibleError: it is not installed, or of a version that is not supported.
    """
    problems = []
    for candidate in NAMES if name == "auto" else (name,):
        try:
            module = importlib.import_module(candidate)
        except (ImportError, OSError) as error:
            problems.append(f"{candidate}: {error}")
            continue
        library = Library(candidate, str(module.__version__), module)
        low, high = SUPPORTED[candidate]
        if low <= library.number[:2] < high:
            return library
        problems.append(
            f"{candidate} {library.version} is not supported, expected "
            f"{'.'.join(map(str, low))} or later, below {high[0]}"
        )
    raise IncompatibleError(
        "no TensorRT here: " + "; ".join(problems) + ". On a Jetson make the environment with "
        "--system-site-packages; elsewhere install cxrgaze with its extra 'tensorrt-rtx' (README, "
        "Installing)"
    )
