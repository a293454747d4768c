"""Decoding apart from the reader: in a child process with limits, and ahead of inference.

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
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from pydantic import Field, ValidationError

from cxrgaze.errors import FilmError
from cxrgaze.runtime.film import PIXEL_LIMIT, Film, load_film
from cxrgaze.spec import Frozen, PixelSource

TIME_LIMIT_S = 20.0
MEMORY_LIMIT = 2 << 30
"""Bytes of address space of the child. Enforced on Linux; other systems may ignore it."""
AHEAD = 2
"""Films decoded ahead of inference; as many are held in memory."""

_LENGTHS = struct.Struct("<II")  # bytes of the JSON header, bytes of the pixels
_HEADER_LIMIT = 1 << 16

Decode = Callable[[Path], Film]


class _Header(Frozen):
    """What the child says of a film; pixels follow it."""

    error: str | None = None
    exhausted: bool = False
    """The child met its memory limit and should be replaced."""
    height: int = Field(default=0, ge=0)
    width: int = Field(default=0, ge=0)
    sha256: str = ""
    pixel_source: PixelSource = "array"
    spacing_mm: tuple[float, float] | None = None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class IsolatedLoader:
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

    def __enter__(self) -> IsolatedLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        start = time.perf_counter()
        try:
            header, pixels = self._ask(path)
        except BaseException:
            self.close()  # whatever happened, this child is not to be trusted any more
            raise
        if header.exhausted:
            self.close()
        if header.error is not None:
            raise FilmError(header.error)
        return Film(
            pixels=np.frombuffer(pixels, np.float32).reshape(header.height, header.width),
            name=str(path),
            sha256=header.sha256,
            pixel_source=header.pixel_source,
            spacing_mm=header.spacing_mm,
            reasons=header.reasons,
            notes=header.notes,
            decode_ms=(time.perf_counter() - start) * 1e3,
        )

    def _ask(self, path: Path) -> tuple[_Header, bytearray]:
        child = self._child or self._start()
        assert child.stdin and child.stdout
        try:
            child.stdin.write(json.dumps(str(path)).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            raise self._gone(path) from None
        deadline = time.monotonic() + self._time_limit_s
        header_size, pixel_size = _LENGTHS.unpack(self._receive(_LENGTHS.size, deadline, path))
        if header_size > _HEADER_LIMIT or pixel_size > 4 * PIXEL_LIMIT:
            raise FilmError(f"{path}: its decoder sent nonsense; refused")
        try:
            header = _Header.model_validate_json(self._receive(header_size, deadline, path))
        except ValidationError:
            raise FilmError(f"{path}: its decoder sent nonsense; refused") from None
        if pixel_size != 4 * header.height * header.width:
            raise FilmError(f"{path}: its decoder sent nonsense; refused")
        return header, self._receive(pixel_size, deadline, path)

    def _receive(self, size: int, deadline: float, path: Path) -> bytearray:
        assert self._child and self._child.stdout
        descriptor = self._child.stdout.fileno()
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise FilmError(f"{path}: decoding took longer than {self._time_limit_s:g} s")
            count = os.readv(descriptor, [view[filled:]])
            if not count:
                raise self._gone(path)
            filled += count
        return data

    def _gone(self, path: Path) -> FilmError:
        assert self._child
        code = self._child.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return FilmError(
            f"{path}: its decoder died ({how}), within {self._memory_limit >> 20} MiB; refused"
        )

    def _start(self) -> subprocess.Popen[bytes]:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "cxrgaze.runtime.isolate", str(self._memory_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders may quote the file there
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"},
            bufsize=0,
        )
        assert self._child.stdout
        if self._child.stdout.read(1) != b"r":  # imports are done, the limits stand
            raise FilmError("the decoder process did not start; check the installation of cxrgaze")
        return self._child


def decode_ahead(
    paths: Iterable[Path], decode: Decode, depth: int = AHEAD
) -> Generator[Film | FilmError, None, None]:
    """Films in the order of `paths`, decoded by one thread at most `depth` films ahead.

    A film that cannot be read is given as its FilmError, so that it does not end the others.
    """
    waiting: deque[Future[Film | FilmError]] = deque()
    source = iter(paths)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        try:
            for path in source:
                waiting.append(pool.submit(_outcome, decode, path))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _outcome(decode: Decode, path: Path) -> Film | FilmError:
    try:
        return decode(path)
    except FilmError as error:
        return error


def _serve(memory_limit: int) -> None:
    """The child: a path per line in, a film or an error out, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # decoders written in C print where they like
    import cxrgaze.runtime.dicom  # noqa: F401 imported before the limit stands

    with contextlib.suppress(ValueError, OSError):  # not every system has these limits
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    out.write(b"r")
    for line in sys.stdin.buffer:
        path = json.loads(line)
        try:
            film = load_film(path)
        except FilmError as error:
            exhausted = isinstance(error.__cause__, MemoryError)
            _send(out, _Header(error=str(error)[:2000], exhausted=exhausted), b"")
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
            _send(out, header, film.pixels.tobytes())


def _send(out: BinaryIO, header: _Header, pixels: bytes) -> None:
    text = header.model_dump_json().encode()
    out.write(_LENGTHS.pack(len(text), len(pixels)) + text)
    rest = memoryview(pixels)
    while rest:
        rest = rest[out.write(rest) or 0 :]


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
