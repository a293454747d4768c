"""Decoding ahead of inference, in a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cxrgaze.command import say, shown
from cxrgaze.errors import FilmError, unforeseen
from cxrgaze.films.decode import load_film
from cxrgaze.films.film import Film

AHEAD = 2
"""Films decoded ahead of inference; as many are held in memory."""


Decode = Callable[[Path], Film]


class Usable(NamedTuple):
    """Films, apart from those that cannot be read or must not be."""

    films: list[tuple[Path, Film]]
    share: str
    """How many were left out, of how many; empty where none was."""


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


def usable(paths: Iterable[Path], decode: Decode = load_film) -> Usable:
    """The films that a network may be applied to; a line for each of the others says why not."""
    listed = list(paths)
    films: list[tuple[Path, Film]] = []
    for path, film in zip(listed, decode_ahead(listed, decode), strict=True):
        if isinstance(film, FilmError):
            say(f"left out: {shown(path)}: {shown(film)}")
        elif film.reasons:
            say(f"left out: {shown(path)}: not applicable: {shown('; '.join(film.reasons))}")
        else:
            films.append((path, film))
    out = len(listed) - len(films)
    return Usable(films, f"{out} of {len(listed)} films were left out" if out else "")


def _outcome(decode: Decode, path: Path) -> Film | FilmError:
    try:
        return decode(path)
    except FilmError as error:
        return error
    except Exception as error:
        return unforeseen(str(path), error)
