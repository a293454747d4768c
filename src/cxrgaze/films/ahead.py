"""Work on many films in threads, in their order: decoding ahead of inference, or all of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from cxrgaze.command import say, shown
from cxrgaze.errors import FilmError, unforeseen
from cxrgaze.films.decode import load_film
from cxrgaze.films.film import Film

AHEAD = 2
"""Films decoded ahead of inference; as many are held in memory."""


Decode = Callable[[Path], Film]
Item = TypeVar("Item")
Done = TypeVar("Done")


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
    return in_order(paths, partial(decoded, decode), workers=1, waiting=depth)


def in_order(
    items: Iterable[Item], work: Callable[[Item], Done], *, workers: int, waiting: int
) -> Generator[Done, None, None]:
    """What `work` makes of `items`, in their order.

    Closed or left by an exception, it begins no further item and waits for those in work.

    Args:
        workers: threads. waiting: items that may be in work or wait, beside the one that is given.
    """
    begun: deque[Future[Done]] = deque()
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="films") as pool:
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) > waiting:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
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


def decoded(decode: Decode, path: Path) -> Film | FilmError:
    """A film, or why it cannot be read; an error that nobody foresaw is one about the film."""
    try:
        return decode(path)
    except FilmError as error:
        return error
    except Exception as error:
        return unforeseen(str(path), error)
