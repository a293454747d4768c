"""What is known of films, class by class: one array for exclusive classes and for findings.

`(N, C)` int8: `HAS`, `HAS_NOT` or `UNKNOWN`. A film of an exclusive class has that one and no
other, or all of its row is unknown; a finding may be unknown by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxrgaze.spec import ModelSpec

HAS: Final = 1
HAS_NOT: Final = 0
UNKNOWN: Final = -1

Truth = NDArray[np.int8]


def truth_of(statements: Sequence[Mapping[str, bool]], spec: ModelSpec) -> Truth:
    """The truth of films `(N, C)` for the classes of a network.

    Args:
        statements: what is known of each film, by class name; classes that the network does not
            have are left alone.
    """
    truth = np.full((len(statements), len(spec.classes)), UNKNOWN, dtype=np.int8)
    for row, known in zip(truth, statements, strict=True):
        for column, name in enumerate(spec.class_names):
            if name in known:
                row[column] = HAS if known[name] else HAS_NOT
        if spec.exclusive:
            row[:] = (row == HAS) if (row == HAS).sum() == 1 else UNKNOWN
    return truth


def one_of(index: Sequence[int] | NDArray[np.integer], classes: int) -> Truth:
    """The truth of films that have one exclusive class each, `(n, C)`.

    Args:
        index: `(n,)`, the class's column; `UNKNOWN` where it is not known.

    Example:
        >>> one_of([1, -1], 2)
        array([[ 0,  1],
               [-1, -1]], dtype=int8)
    """
    index = np.asarray(index)
    truth: Truth = (index[:, None] == np.arange(classes)).astype(np.int8)
    truth[index == UNKNOWN] = UNKNOWN
    return truth


def any_known(truth: Truth) -> NDArray[np.bool_]:
    """Films of which something is known, `(n,)`."""
    return np.asarray((truth != UNKNOWN).any(axis=1))


def class_index(truth: Truth) -> NDArray[np.int64]:
    """The column of the one class that each film has, `(n,)`; `UNKNOWN` where there is not one."""
    has = truth == HAS
    return np.where(has.sum(axis=1) == 1, has.argmax(axis=1), UNKNOWN)


def columns(truth: Truth) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Of each class: of which films it is known `(n,)`, and which of those have it `(known,)`."""
    for column in truth.T:
        known = column != UNKNOWN
        yield known, column[known] == HAS


def present_classes(truth: Truth, fewest: int = 1) -> list[int]:
    """Classes that so many films have and so many have not: with 1, those that an AUC exists for.

    Example:
        >>> present_classes(one_of([0, 2, 2], 3))
        [0, 2]
    """
    return [
        column
        for column, (_, has) in enumerate(columns(truth))
        if min(int(has.sum()), int((~has).sum())) >= fewest
    ]
