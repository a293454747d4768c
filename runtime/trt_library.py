"""The three TensorRTs behind one face: where they differ, and nowhere else.

`tensorrt` 10.3 to 10.x (JetPack 6), `tensorrt` 11.x (workstations, JetPack 7.2.2 and later) and
`tensorrt_rtx` 1.x. Networks are always strongly typed and I/O goes by name, so that what is left
are a few flags: TensorRT 11 has no other kind of network; TensorRT-RTX compiles ahead of time for
given compute capabilities and has no workspace, timing cache or version compatibility to ask for
(toolchain.md sections 4 and 7).
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from cxrgaze.errors import IncompatibleError

NAMES = ("tensorrt", "tensorrt_rtx")
"""Modules, in the order that a build prefers."""

SUPPORTED = {"tensorrt": ((10, 3), (12, 0)), "tensorrt_rtx": ((1, 0), (2, 0))}
"""First version that is supported and first that is not, by module."""


@dataclass(frozen=True)
class Library:
    """One TensorRT that can be imported here."""

    name: str
    version: str
    module: Any

    @property
    def number(self) -> tuple[int, ...]:
        """The version as numbers."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version))

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX, which compiles ahead of time without a GPU."""
        return self.name == "tensorrt_rtx"

    @property
    def network_flags(self) -> int:
        """Creation flags of a strongly typed network; TensorRT 11 has no other kind."""
        flags = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flags is None else 1 << int(flags)

    def capability(self, sm: str) -> Any:
        """The enumerator of a compute capability such as "86", for an ahead-of-time build.

        Raises:
            IncompatibleError: this library cannot compile for it.
        """
        known = getattr(self.module, "ComputeCapability", None)
        found = getattr(known, f"SM{sm}", None)
        if found is None:
            can = sorted((n[2:] for n in dir(known) if re.fullmatch(r"SM\d+", n)), key=int)
            raise IncompatibleError(
                f"{self.name} {self.version} cannot compile for compute capability {sm}; it can "
                f"for {', '.join(can) or 'none ahead of time'}"
            )
        return found


def versions() -> dict[str, str]:
    """Version by module of the libraries that can be imported here, supported or not."""
    found = {}
    for name in NAMES:
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except ImportError:
            continue
    return found


def find(name: str = "auto") -> Library:
    """The library called `name`, or the first that is installed and supported.

    Raises:
        IncompatibleError: it is not installed, or of a version that is not supported.
    """
    problems = []
    for candidate in NAMES if name == "auto" else (name,):
        try:
            module = importlib.import_module(candidate)
        except ImportError as error:
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
        "--system-site-packages; elsewhere: pip install 'cxrgaze[tensorrt-rtx]'"
    )
