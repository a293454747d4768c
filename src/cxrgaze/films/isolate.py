"""Decoding apart from the reader, in a child process with limits.

A hostile file can crash or hang a decoder, or make it take all memory. `IsolatedLoader` decodes in
a child with an address-space limit and kills it after a time limit. The child speaks a small
protocol of its own, lengths first; nothing that it sends is unpickled or trusted unchecked.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import Field, ValidationError

from cxrgaze.errors import FilmError, NotApplicableError
from cxrgaze.films.decode import film_from_bytes, load_film
from cxrgaze.films.film import PIXEL_LIMIT, Film
from cxrgaze.films.identity import DicomIdentity
from cxrgaze.records import Frozen
from cxrgaze.spec import PixelSource

TIME_LIMIT_S = 20.0
MEMORY_LIMIT = 2 << 30
"""Bytes of address space of the child. Enforced on Linux; other systems may ignore it."""

_LENGTHS = struct.Struct("<III")  # bytes of the JSON header, of the pixels, of the identity
_CHUNK = 1 << 16  # what a pipe takes at once


_HEADER_LIMIT = 1 << 16


class _Header(Frozen):
    """What the child says of a film; pixels follow it."""

    error: str | None = None
    not_applicable: tuple[str, ...] = ()
    """Reasons of a file that holds no film at all."""
    exhausted: bool = False
    """The child met its memory limit and should be replaced."""
    height: int = Field(default=0, ge=0)
    width: int = Field(default=0, ge=0)
    sha256: str = ""
    pixel_source: PixelSource = "array"
    spacing_mm: tuple[float, float] | None = None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class IsolatedLoader(AbstractContextManager["IsolatedLoader"]):
    """`load` as `load_film`, in a child process; a context manager; one thread at a time.

    The child lives on from film to film and is replaced after a crash or a kill. Starting one takes
    some tenths of a second, outside the time limit.
    """

    def __init__(
        self, *, time_limit_s: float = TIME_LIMIT_S, memory_limit: int = MEMORY_LIMIT
    ) -> None:
        self._time_limit_s = time_limit_s
        self._memory_limit = memory_limit
        self._child: subprocess.Popen[bytes] | None = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        if self._child:
            self._child.kill()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._child.wait()
            self._child = None

    def load(self, path: Path) -> Film:
        """The film in a file.

        Raises:
            FilmError: as `load_film`, or the decoder crashed or went beyond time or memory.
        """
        return self._film(str(path))

    def load_bytes(self, data: bytes, name: str) -> Film:
        """The film in the bytes of a file.

        Args:
            name: stands in messages and results; its suffix is a hint.

        Raises:
            FilmError: as `film_from_bytes`, or the decoder crashed or went beyond time or memory.
        """
        return self._film(name, data)

    def _film(self, name: str, data: bytes | None = None) -> Film:
        start = time.perf_counter()
        try:
            header, pixels, identity = self._ask(name, data)
        except BaseException:
            self.close()  # whatever happened, this child is not to be trusted any more
            raise
        if header.exhausted:
            self.close()
        if header.not_applicable:
            raise NotApplicableError(header.not_applicable)
        if header.error is not None:
            raise FilmError(header.error + (self._within if header.exhausted else ""))
        return Film(
            pixels=np.frombuffer(pixels, np.float32).reshape(header.height, header.width),
            name=name,
            sha256=header.sha256,
            pixel_source=header.pixel_source,
            spacing_mm=header.spacing_mm,
            reasons=header.reasons,
            notes=header.notes,
            identity=DicomIdentity(bytes(identity)) if identity else None,
            decode_ms=(time.perf_counter() - start) * 1e3,
        )

    def _ask(self, name: str, data: bytes | None) -> tuple[_Header, bytearray, bytearray]:
        if not self._child:
            self._start()
        deadline = time.monotonic() + self._time_limit_s
        # json escapes what is no UTF-8 in a path; pydantic refuses it.
        request = json.dumps({"name": name, "size": None if data is None else len(data)})
        self._send(request.encode() + b"\n" + (data or b""), deadline, name)
        lengths = _LENGTHS.unpack(self._receive(_LENGTHS.size, deadline, name))
        header_size, pixel_size, identity_size = lengths
        if max(header_size, identity_size) > _HEADER_LIMIT or pixel_size > 4 * PIXEL_LIMIT:
            raise FilmError(f"{name}: its decoder sent nonsense; refused")
        try:
            header = _Header.model_validate_json(self._receive(header_size, deadline, name))
        except ValidationError:
            raise FilmError(f"{name}: its decoder sent nonsense; refused") from None
        if pixel_size != 4 * header.height * header.width:
            raise FilmError(f"{name}: its decoder sent nonsense; refused")
        pixels = self._receive(pixel_size, deadline, name)
        return header, pixels, self._receive(identity_size, deadline, name)

    def _send(self, data: bytes, deadline: float, name: str) -> None:
        assert self._child and self._child.stdin
        descriptor = self._child.stdin.fileno()
        rest = memoryview(data)
        while rest:
            _, ready, _ = select.select([], [descriptor], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise self._late(name)
            try:
                rest = rest[os.write(descriptor, rest[:_CHUNK]) :]
            except BrokenPipeError:
                raise self._gone(name) from None

    def _receive(self, size: int, deadline: float, name: str) -> bytearray:
        assert self._child and self._child.stdout
        descriptor = self._child.stdout.fileno()
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise self._late(name)
            count = os.readv(descriptor, [view[filled:]])
            if not count:
                raise self._gone(name)
            filled += count
        return data

    def _late(self, name: str) -> FilmError:
        return FilmError(f"{name}: decoding took longer than {self._time_limit_s:g} s")

    def _gone(self, name: str) -> FilmError:
        assert self._child
        code = self._child.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return FilmError(f"{name}: its decoder died ({how}){self._within}; refused")

    @property
    def _within(self) -> str:
        size = self._memory_limit >> 20
        return f", within its limit of {size} MiB (--isolate-memory, IsolatedLoader(memory_limit=))"

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "cxrgaze.films.isolate", str(self._memory_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders may quote the file there
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"},
            bufsize=0,
        )
        assert self._child.stdout
        if self._child.stdout.read(1) != b"r":  # imports are done, the limits stand
            raise FilmError("the decoder process did not start; check the installation of cxrgaze")


def _serve(memory_limit: int) -> None:
    """The child: a path per line in, a film or an error out, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # decoders written in C print where they like
    import cxrgaze.films.dicom  # noqa: F401 imported before the limit stands

    with contextlib.suppress(ValueError, OSError):  # not every system has these limits
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    out.write(b"r")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        name, size = request["name"], request["size"]
        try:
            if size is None:
                film = load_film(name)
            else:
                film = film_from_bytes(sys.stdin.buffer.read(size), name)
        except NotApplicableError as error:
            _reply(out, _Header(not_applicable=error.reasons), b"", b"")
        except FilmError as error:
            exhausted = isinstance(error.__cause__, MemoryError)
            _reply(out, _Header(error=str(error)[:2000], exhausted=exhausted), b"", b"")
        else:
            header = _Header(
                height=film.shape[0],
                width=film.shape[1],
                sha256=film.sha256,
                pixel_source=film.pixel_source,
                spacing_mm=film.spacing_mm,
                reasons=film.reasons,
                notes=film.notes,
            )
            identity = film.identity.encoded if film.identity else b""
            _reply(out, header, film.pixels.tobytes(), identity)


def _reply(out: BinaryIO, header: _Header, pixels: bytes, identity: bytes) -> None:
    text = header.model_dump_json().encode()
    for part in (_LENGTHS.pack(len(text), len(pixels), len(identity)), text, pixels, identity):
        rest = memoryview(part)
        while rest:
            rest = rest[out.write(rest) or 0 :]


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
