"""Decoding apart from the reader, in a child process with limits.

A hostile file can crash or hang a decoder, or make it take all memory. `IsolatedLoader` decodes in
a worker with an address-space limit and kills it after a time limit. The worker is a fork of a
nursery: a process that has everything imported and reads no film, so that a new worker is there
within milliseconds. Reader and worker speak a small protocol of their own, lengths first; nothing
that a worker sends is unpickled or trusted unchecked.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from cxrgaze import children
from cxrgaze.errors import FilmError, NotApplicableError, UsageError
from cxrgaze.films.decode import film_from_bytes, promised_samples, read_file
from cxrgaze.films.film import PIXEL_LIMIT, Film, Stored
from cxrgaze.films.identity import DicomIdentity
from cxrgaze.records import Frozen
from cxrgaze.spec import PixelSource

TIME_LIMIT_S = 20.0
MEMORY_LIMIT = 2 << 30
"""Bytes of address space that a worker may take at the most. Enforced on Linux; other systems may
ignore it."""

_BASE = 256 << 20
_BYTES_A_SAMPLE = 32
"""A worker may take `_BASE`, twice the file and this much a sample that the header promises."""

_LENGTHS = struct.Struct("<IIII")  # bytes of JSON header, pixels, stored values and identity
_NUMBER = struct.Struct("<i")  # what the nursery answers: a process or how one ended
_START, _END = b"s", b"e"  # what the nursery is asked for
_START_S = 60.0  # for its imports on a slow device
_END_S = 5.0
_HEADER_LIMIT = 1 << 16


class _Stored(Frozen):
    """What the worker says of stored values, which follow the pixels."""

    kind: Literal["|u1", "<u2", "|i1", "<i2"]
    bits: int
    larger_is_darker: bool


class _Header(Frozen):
    """What the worker says of a film; pixels follow it."""

    number: int
    """Of the request that it answers."""
    error: str | None = None
    not_applicable: tuple[str, ...] = ()
    """Reasons of a file that holds no film at all."""
    exhausted: int = 0
    """The memory limit that the worker met, in bytes; it should be replaced."""
    height: int = Field(default=0, ge=0)
    width: int = Field(default=0, ge=0)
    sha256: str = ""
    pixel_source: PixelSource = "array"
    spacing_mm: tuple[float, float] | None = None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stored: _Stored | None = None


_Bytes = bytes | bytearray
_Answer = tuple[_Header, _Bytes, _Bytes, _Bytes]
"""Header, pixels, stored values, identity."""


class IsolatedLoader(AbstractContextManager["IsolatedLoader"]):
    """`load` as `load_film`, in a child process; a context manager.

    Args:
        time_limit_s: seconds that a film may take; starting the child is outside of them.
        memory_limit: bytes that the child may take at the most; a film may take what its header
            justifies within it.
        keep_stored: see `film_from_bytes`.

    Threads may share it: it reads one film at a time. The worker lives on from film to film and is
    replaced after a crash or a kill.
    """

    def __init__(
        self,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit: int = MEMORY_LIMIT,
        keep_stored: bool = False,
    ) -> None:
        self._keep_stored = keep_stored
        self._time_limit_s = time_limit_s
        self._memory_limit = memory_limit
        self._nursery: _Nursery | None = None
        self._worker: socket.socket | None = None
        self._number = 0
        self._is_closed = False
        self._lock = threading.Lock()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child processes; a film that another thread is reading fails at once."""
        self._is_closed = True
        if nursery := self._nursery:
            nursery.close()  # ends the worker, and so what a thread waits for
        with self._lock:
            self._drop()

    def load(self, path: Path) -> Film:
        """The film in a file.

        Raises:
            FilmError: as `load_film`, or the decoder crashed or went beyond time or memory.
            UsageError: the loader is closed.
        """
        return self._film(str(path))

    def load_bytes(self, data: bytes, name: str) -> Film:
        """The film in the bytes of a file.

        Args:
            name: stands in messages and results; its suffix is a hint.

        Raises:
            FilmError: as `film_from_bytes`, or the decoder crashed or went beyond time or memory.
            UsageError: the loader is closed.
        """
        return self._film(name, data)

    def _film(self, name: str, data: bytes | None = None) -> Film:
        with self._lock:
            start = time.perf_counter()
            if self._is_closed:
                raise UsageError(f"{name}: the loader is closed")
            try:
                header, pixels, stored, identity = self._ask(name, data)
            except BaseException:
                self._drop()  # whatever happened, this worker is not to be trusted any more
                raise
            if header.exhausted:
                self._drop()
        if header.not_applicable:
            raise NotApplicableError(header.not_applicable)
        if header.error is not None:
            raise FilmError(header.error + self._met(header.exhausted))
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
            stored=_stored(header, stored),
        )

    def _ask(self, name: str, data: bytes | None) -> _Answer:
        worker = self._worker = self._worker or self._started()
        self._number += 1
        deadline = time.monotonic() + self._time_limit_s
        size = None if data is None else len(data)
        # json escapes what is no UTF-8 in a path; pydantic refuses it.
        asked = {"number": self._number, "name": name, "size": size, "stored": self._keep_stored}
        request = json.dumps(asked)
        try:
            for part in (request.encode() + b"\n", data or b""):
                worker.settimeout(_left(deadline))
                worker.sendall(part)
            sizes = _LENGTHS.unpack(_received(worker, _LENGTHS.size, deadline))
            header_size, pixel_size, stored_size, identity_size = sizes
            if max(header_size, identity_size) > _HEADER_LIMIT or pixel_size > 4 * PIXEL_LIMIT:
                raise ValueError("lengths beyond the limits")
            header = _Header.model_validate_json(_received(worker, header_size, deadline))
            if pixel_size != 4 * header.height * header.width or header.number != self._number:
                raise ValueError("not the answer to what was asked")
            width = np.dtype(header.stored.kind).itemsize if header.stored else 0
            if stored_size != width * header.height * header.width:
                raise ValueError("other stored values than it says")
            pixels = _received(worker, pixel_size, deadline)
            stored = _received(worker, stored_size, deadline)
            return header, pixels, stored, _received(worker, identity_size, deadline)
        except TimeoutError:
            late = f"{name}: decoding took longer than {self._time_limit_s:g} s"
            raise FilmError(late) from None
        except OSError:  # its end is closed
            raise self._gone(name) from None
        except (ValidationError, ValueError):
            raise FilmError(f"{name}: its decoder sent nonsense; refused") from None

    def _started(self) -> socket.socket:
        if not self._nursery:
            self._nursery = _Nursery(self._memory_limit)
        return self._nursery.start()

    def _drop(self) -> None:
        """End the worker, if there is one."""
        if self._worker:
            self._worker.close()
            self._worker = None
            if self._nursery and self._nursery.end() is None:
                self._nursery.close()  # it is gone too; the next film starts another
                self._nursery = None

    def _gone(self, name: str) -> FilmError | UsageError:
        if self._is_closed:
            return UsageError(f"{name}: the loader was closed while it read")
        code = self._nursery.end() if self._nursery else None
        how = "with its parent" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return FilmError(
            f"{name}: its decoder died ({how}), perhaps at its limit{self._limit}; refused"
        )

    def _met(self, limit: int) -> str:
        """What to add to the message of a worker that met a limit of this many bytes, if any."""
        if not limit:
            return ""
        if limit >= self._memory_limit:
            return f", within its limit{self._limit}"
        return f", beyond the {limit >> 20} MiB that a film of its header's size may take"

    @property
    def _limit(self) -> str:
        size = self._memory_limit >> 20
        return f" of {size} MiB (--isolate-memory, IsolatedLoader(memory_limit=))"


def _stored(header: _Header, data: _Bytes) -> Stored | None:
    said = header.stored
    if said is None:
        return None
    values = np.frombuffer(data, said.kind).reshape(header.height, header.width)
    return Stored(values, said.bits, said.larger_is_darker)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _received(worker: socket.socket, size: int, deadline: float) -> _Bytes:
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        worker.settimeout(_left(deadline))
        count = worker.recv_into(view[filled:])
        if not count:
            raise ConnectionResetError
        filled += count
    return data


class _Nursery:
    """The process that workers are forked from, seen from the reader; one worker at a time."""

    worker: int
    """Process of the worker, 0 before there is one."""

    def __init__(self, memory_limit: int) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_START_S)
        with theirs:
            self._process = subprocess.Popen(
                children.python(__name__, str(theirs.fileno()), str(memory_limit)),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # decoders written in C print where they like
                stderr=subprocess.DEVNULL,  # and may quote the file
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            )
        self.worker = self._answer()  # 0: imports are done

    def start(self) -> socket.socket:
        """The reader's end of a new worker."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [_START], [theirs.fileno()])
        self.worker = self._answer()
        return ours

    def end(self) -> int | None:
        """Kill the worker; how it ended: exit code, minus a signal, None where nobody knows."""
        try:
            self._control.sendall(_END)
            return self._answer()
        except (OSError, FilmError):
            return None

    def close(self) -> None:
        """End nursery and worker."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_END_S)  # it ends the worker first
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._control.close()

    def _answer(self) -> int:
        with contextlib.suppress(OSError, struct.error):
            return int(_NUMBER.unpack(self._control.recv(_NUMBER.size))[0])
        self.close()
        raise FilmError("the decoder process did not start; check the installation of cxrgaze")


def _nurse(control: socket.socket, memory_limit: int) -> None:
    """The nursery: fork a worker, end a worker, until the reader is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader decides when to stop
    import cxrgaze.films.dicom  # noqa: F401 imported once, for all workers

    with contextlib.suppress(ValueError, OSError):  # not every system has it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control.sendall(_NUMBER.pack(0))
    worker = code = 0
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if worker and request != _START:
            os.kill(worker, signal.SIGKILL)
            _, status = os.waitpid(worker, 0)
            code, worker = os.waitstatus_to_exitcode(status), 0
        if not request:
            return
        if request == _END:
            control.sendall(_NUMBER.pack(code))
            continue
        worker = os.fork()
        if not worker:
            control.close()
            with contextlib.suppress(OSError):  # the reader is gone
                _serve(socket.socket(fileno=descriptors[0]), memory_limit)
            os._exit(0)
        os.close(descriptors[0])
        control.sendall(_NUMBER.pack(worker))


def _serve(reader: socket.socket, memory_limit: int) -> None:
    """The worker: a request per line in, a film or an error out, until the reader is gone."""
    requests = reader.makefile("rb")
    for line in requests:
        request = json.loads(line)
        number, name, size = request["number"], request["name"], request["size"]
        allowed = memory_limit
        try:
            _limit_memory(memory_limit, memory_limit)
            data = read_file(name) if size is None else requests.read(size)
            allowed = _allowed(data, memory_limit)
            _limit_memory(allowed, memory_limit)
            film = film_from_bytes(data, name, keep_stored=request["stored"])
        except NotApplicableError as error:
            _reply(reader, _Header(number=number, not_applicable=error.reasons))
        except FilmError as error:
            exhausted = allowed if isinstance(error.__cause__, MemoryError) else 0
            text = str(error)[:2000]
            _reply(reader, _Header(number=number, error=text, exhausted=exhausted))
        else:
            header = _Header(
                number=number,
                height=film.shape[0],
                width=film.shape[1],
                sha256=film.sha256,
                pixel_source=film.pixel_source,
                spacing_mm=film.spacing_mm,
                reasons=film.reasons,
                notes=film.notes,
                stored=_said_of(film.stored) if film.stored else None,
            )
            identity = film.identity.encoded if film.identity else b""
            stored = film.stored.values if film.stored else _NONE
            _reply(reader, header, film.pixels, stored, identity)
            del film, stored


def _allowed(data: bytes, ceiling: int) -> int:
    """Bytes of address space that a worker may take for the film in `data`."""
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        samples = promised_samples(data)
    except Exception:  # not Linux, or no header that says it: the film is refused in its turn
        return ceiling
    return min(ceiling, used + _BASE + 2 * len(data) + _BYTES_A_SAMPLE * samples)


def _limit_memory(size: int, ceiling: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # not every system has it
        resource.setrlimit(resource.RLIMIT_AS, (size, ceiling))


def _said_of(stored: Stored) -> _Stored:
    kind: Any = stored.values.dtype.str  # the model holds it to those that there are
    return _Stored(kind=kind, bits=stored.bits, larger_is_darker=stored.larger_is_darker)


_NONE: NDArray[np.float32] = np.empty(0, np.float32)


def _reply(
    reader: socket.socket,
    header: _Header,
    pixels: NDArray[np.float32] = _NONE,
    stored: NDArray[Any] = _NONE,
    identity: bytes = b"",
) -> None:
    text = header.model_dump_json().encode()
    sizes = _LENGTHS.pack(len(text), pixels.nbytes, stored.nbytes, len(identity))
    reader.sendall(sizes + text)
    for values in (pixels, stored):
        reader.sendall(np.ascontiguousarray(values).data)
    reader.sendall(identity)


if __name__ == "__main__":
    _nurse(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
