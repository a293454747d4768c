"""Arrays of an `.npz` file from foreign hands: looked at before they take memory.

`numpy.load` believes the header of an array and makes room for it before it reads, so that a file
of kilobytes takes gigabytes. Here each header is held against what is expected first; nothing is
unpickled.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import IntegrityError

Expected = Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...]]]
"""Type and shape by name; None stands for a number of films, alike in all, `AT_MOST` for as many or
fewer."""

AT_MOST = -1

_FILMS = 100_000
"""More films than any stored file has."""
_BYTES = 1 << 30
"""More than all arrays of a stored file take."""


def written(arrays: Mapping[Any, NDArray[Any]]) -> bytes:
    """The bytes of an `.npz` file with these arrays, by name."""
    buffer = io.BytesIO()
    named: dict[str, Any] = {str(name): array for name, array in arrays.items()}
    np.savez(buffer, **named)
    return buffer.getvalue()


def read(data: bytes, expected: Expected, where: str) -> dict[str, NDArray[Any]]:
    """The expected arrays in the bytes of an `.npz` file; others in it are left alone.

    Args:
        where: stands in messages.

    Raises:
        IntegrityError: no such file, or not these arrays.
    """
    films: int | None = None
    arrays: dict[str, NDArray[Any]] = {}
    total = 0
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name, (dtype, shape) in expected.items():
                with archive.open(f"{name}.npy") as member:
                    found_shape, found_type = _header(member)
                    if shape[0] is None and films is None:
                        films = found_shape[0] if found_shape else 0
                    wanted = (films, *shape[1:]) if shape[0] in (None, AT_MOST) else shape
                    if shape[0] == AT_MOST and films is not None:
                        wanted = (min(films, *found_shape[:1]), *shape[1:])
                    if found_shape != wanted or found_type != dtype:
                        raise IntegrityError(
                            f"{where}: {name} is {found_type} {found_shape}, expected "
                            f"{dtype} {wanted}"
                        )
                    size = math.prod(found_shape) * dtype.itemsize
                    total += size
                    if (films or 0) > _FILMS or total > _BYTES:
                        raise IntegrityError(f"{where}: {name} of {found_shape} is too large")
                    content = member.read(size + 1)
                if len(content) != size:
                    raise ValueError(f"{name} has {len(content)} bytes, its header says {size}")
                arrays[name] = np.frombuffer(content, dtype).reshape(found_shape).copy()
    except IntegrityError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise what they like on damaged bytes
        raise IntegrityError(f"{where} is malformed: {error or type(error).__name__}") from error
    return arrays


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array in C order (numpy.lib.format, versions 1 and 2)."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ValueError(f"version {version} of its format is not read")
    if dtype.hasobject or (is_fortran and len(shape) > 1):
        raise ValueError("objects or another order of its axes")
    return shape, dtype
