"""The support matrix as data: which TensorRT serves which GPU on which system.

From the documents named by row, some of them second-hand; the L4T number of JetPack 7.2.2 is taken
to be 39.2.2. What was run of it is said in docs/devices.md, and is not this table's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cxrgaze.runtime.device import Gpu
from cxrgaze.runtime.trt_library import Library


@dataclass(frozen=True)
class Support:
    """One row: a range of versions on one kind of machine."""

    library: str
    first: tuple[int, ...]
    """First version."""
    before: tuple[int, ...]
    """First version that is not of this row."""
    platform: str
    l4t: tuple[tuple[int, ...], tuple[int, ...]] | None
    """First release of Jetson Linux and first that is not of this row; None: no Jetson."""
    system: str
    capabilities: tuple[str, ...]
    """Compute capabilities."""
    driver_cuda: tuple[int, int]
    """Oldest CUDA that the driver must support."""
    source: str


_TURING_ON = ("75", "80", "86", "89", "90", "100", "120")

MATRIX = (
    Support(
        "tensorrt", (10, 3), (11,), "linux-x86_64", None, "workstation",
        _TURING_ON, (12, 0), "TensorRT 10, support matrix",
    ),
    Support(
        "tensorrt", (11,), (12,), "linux-x86_64", None, "workstation",
        _TURING_ON, (12, 0), "TensorRT 11, prerequisites",
    ),
    Support(
        "tensorrt", (10, 3), (11,), "linux-aarch64", ((36, 4), (37,)), "JetPack 6.1 to 6.2",
        ("87",), (12, 6), "pytorch/TensorRT, JetPack page",
    ),
    Support(
        "tensorrt", (10, 13), (11,), "linux-aarch64", ((38,), (39,)), "JetPack 7.0 to 7.1",
        ("110",), (13, 0), "NVIDIA, archive of JetPack 7.1",
    ),
    Support(
        "tensorrt", (10, 16), (11,), "linux-aarch64", ((39,), (40,)), "JetPack 7.2",
        ("87", "110"), (13, 2), "OE4T/meta-tegra, pull request 2224",
    ),
    Support(
        "tensorrt", (11, 4, 1), (12,), "linux-aarch64", ((39, 2, 2), (40,)), "JetPack 7.2.2 on",
        ("87", "110"), (13, 2), "TensorRT 11.4.1, migration guide, Jetson",
    ),
    Support(
        "tensorrt_rtx", (1,), (2,), "linux-x86_64", None, "workstation",
        ("75", "86", "89", "120", "121"), (13, 0), "TensorRT-RTX, support matrix",
    ),
)  # fmt: skip
"""Rows in the order that they are printed."""


def verdict(library: Library, gpu: Gpu, platform: str, l4t: str | None) -> tuple[bool, str]:
    """Whether a library is documented to serve a GPU here, and the row that says so or why not.

    A verdict on documents: an unsupported pair may work, and nothing refuses to try.
    """
    rows: Sequence[Support] = [row for row in MATRIX if row.library == library.name]
    name = f"{library.name} {library.version}"
    rows = [row for row in rows if row.first <= library.number < row.before]
    if not rows:
        return False, f"{name} is of no version that cxrgaze supports"
    release = tuple(map(int, l4t.split("."))) if l4t and l4t[0].isdigit() else None
    rows = [row for row in rows if row.platform == platform and _same_system(row, release)]
    if not rows:
        system = f"{platform}, Jetson Linux {l4t}" if l4t else platform
        return False, f"{name} is not documented for {system}"
    able = [row for row in rows if gpu.capability in row.capabilities]
    if not able:
        documented = ", ".join(sorted({c for row in rows for c in row.capabilities}, key=int))
        return False, (
            f"{name} is not documented for compute capability {gpu.capability}; it is for "
            f"{documented}"
        )
    row = able[-1]
    if tuple(map(int, gpu.driver_cuda.split("."))) < row.driver_cuda:
        needs = ".".join(map(str, row.driver_cuda))
        return False, f"{name} needs a driver for CUDA {needs}, here is one for {gpu.driver_cuda}"
    return True, f"{name} is documented for {row.system} ({row.source})"


def _same_system(row: Support, release: tuple[int, ...] | None) -> bool:
    if row.l4t is None or release is None:
        return row.l4t is None and release is None
    return row.l4t[0] <= release < row.l4t[1]
